"""Workers of SharedMemoryVecEnv that hang, end or raise: what is said, what is replaced, and what stays behind (nothing)."""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.monitor import Monitor

from sb3_mtrl import MTSAC, TSACSAC
from sb3_mtrl.common.evaluation import RandomPolicy, evaluate_multi_task_policy
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv, VecTaskAssignment, VecTaskNormalize, make_multi_task_vec_env
from tests.models import make_model
from tests.test_shared_memory_vec_env import is_running, nothing_is_left_behind
from tests.tiny_envs import PointTasksEnv

__all__ = ["nothing_is_left_behind"]  # a fixture that is used by itself

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FAULT_STEP = 3
TIMEOUT = 3  # seconds, which a replacement has for its start as well


class FaultyTasksEnv(PointTasksEnv):
    """
    Goes wrong in its third step on task 1, as often as the file has lines: each time one is taken away.

    A process that goes wrong cannot remember that it did.
    """

    def __init__(self, fault: str = "none", file: str | Path = os.devnull, **kwargs: Any):
        super().__init__(**{"horizon": 6, **kwargs})
        self.fault, self.file = fault, Path(file)
        self.size = 1.0

    def step(self, action):
        if self.task_id == 1 and self._steps == FAULT_STEP - 1 and (lines := self.file.read_text().splitlines()):
            self.file.write_text("".join(f"{line}\n" for line in lines[1:]))
            self._go_wrong()
        return super().step(action)

    def _go_wrong(self) -> None:
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "raise":
            raise ZeroDivisionError("the gripper is gone")
        if self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "sleep":
            time.sleep(60)

    def set_size(self, size: float) -> None:
        self.size = size


@pytest.fixture
def make_faulty(tmp_path):
    made = []

    def make(fault: str, n_faults: int = 1, n_envs: int = 4, monitor_dir: Path | None = None, **kwargs: Any):
        file = tmp_path / "faults"
        file.write_text("now\n" * n_faults)

        def env_fn(index: int):
            path = None if monitor_dir is None else str(monitor_dir / str(index))
            return Monitor(FaultyTasksEnv(fault, file), path)

        settings = {"n_workers": 2, "start_method": "fork", **kwargs}
        made.append(VecTaskAssignment(SharedMemoryVecEnv([partial(env_fn, index) for index in range(n_envs)], **settings)))
        return made[-1]

    yield make
    for venv in made:
        venv.close()


def set_timeout(venv, fault: str) -> None:
    """Only now, after the start of the workers and the first steps, which may take long on a busy machine."""
    if fault in ("stop", "sleep"):
        venv.unwrapped.worker_timeout = TIMEOUT


def step(venv, n_steps: int = 1):
    for _ in range(n_steps):
        result = venv.step(np.zeros((venv.num_envs, 2), dtype=np.float32))
    return result


# Four sub-environments of three tasks, 0, 1, 2 and 0; worker 1 has the second and the fourth one
WHO = r"worker 1 \(process \d+\), which had the sub-environments \[1, 3\], "
WHERE = "; it was working on sub-environment 1, task 'point-1'"
FATES = {
    "exit": WHO + "ended with exit code 3" + WHERE,
    "stop": WHO + rf"did not answer for {TIMEOUT} s \(worker_timeout\) and was killed" + WHERE,
    "sleep": WHO + rf"did not answer for {TIMEOUT} s \(worker_timeout\) and was killed" + WHERE,
    "raise": WHO + "raised ZeroDivisionError: the gripper is gone in step.. of sub-environment 1, task 'point-1'",
}


@pytest.mark.parametrize("fault", ["exit", "stop", "sleep"])
def test_the_error_names_worker_sub_environment_and_task(make_faulty, fault):
    venv = make_faulty(fault)
    venv.reset()
    step(venv, 2)
    set_timeout(venv, fault)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=FATES[fault]):
        step(venv)
    with pytest.raises(RuntimeError, match=FATES[fault]):
        venv.reset()
    venv.close()
    assert time.monotonic() - start < 60


def test_a_worker_that_is_idle_when_it_ends(make_faulty):
    venv = make_faulty("none")
    venv.reset()
    step(venv)
    os.kill(venv.unwrapped._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 0 .*ended with exit code -9\. A negative"):  # working on nothing
        step(venv)


@pytest.mark.parametrize("fault", list(FATES))
def test_a_replaced_worker_ends_its_episodes(make_faulty, fault):
    """The sub-environments of the other worker are what they are without the fault; those of this one are truncated."""
    runs = []
    for name in ("none", fault):
        venv = make_faulty(name, restart_workers=True)
        venv.seed(0)
        runs.append([(venv.reset(),)] + [step(venv) for _ in range(2)])
        set_timeout(venv, name)
        if name == "none":
            runs[-1] += [step(venv) for _ in range(2)]
    with pytest.warns(UserWarning, match=FATES[fault] + r".* it is replaced, and the episodes .* \(replacement number 1"):
        obs, rewards, dones, infos = step(venv)
    runs[1] += [(obs, rewards, dones, infos), step(venv)]
    expected, got = runs
    assert venv.unwrapped.n_restarts == 1
    for after in (3, 4):
        np.testing.assert_array_equal(got[after][0][[0, 2]], expected[after][0][[0, 2]])
        np.testing.assert_array_equal(got[after][1][[0, 2]], expected[after][1][[0, 2]])
    assert dones.tolist() == [False, True, False, True] and rewards[[1, 3]].tolist() == [0, 0]
    for index in (1, 3):
        assert infos[index]["TimeLimit.truncated"] and infos[index]["worker_restarted"]
        np.testing.assert_array_equal(infos[index]["terminal_observation"], got[2][0][index])
        # Another episode of the same task, and not the old one again
        np.testing.assert_array_equal(obs[index][-3:], got[0][0][index][-3:])
        assert not np.array_equal(obs[index], got[0][0][index])
    assert not any("worker_restarted" in info for info in got[4][3])
    # What was set before is set again
    assert venv.get_attr("assigned_tasks") == [(0,), (1,), (2,), (0,)]


def test_replacements_are_reproducible_and_never_the_same_episode(make_faulty):
    first_observations = []
    for _ in range(2):
        venv = make_faulty("exit", n_faults=3, restart_workers=True)
        venv.seed(5)
        observations = [venv.reset()[1]]
        with pytest.warns(UserWarning, match="is replaced"):
            for _ in range(3):
                observations.append(step(venv, 3)[0][1])
        first_observations.append(np.stack(observations))
    np.testing.assert_array_equal(*first_observations)
    assert len(np.unique(first_observations[0], axis=0)) == 4


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_what_was_set_last_is_set_again(make_faulty):
    venv = make_faulty("exit", restart_workers=True)
    venv.env_method("set_size", 2.0)
    venv.env_method("set_size", 3.0, indices=[1, 2])
    venv.set_attr("tolerance", 0.5, indices=3)
    venv.reset()
    step(venv, 3)
    assert venv.unwrapped.n_restarts == 1
    assert venv.get_attr("size") == [2, 3, 3, 2]
    assert venv.get_attr("tolerance") == [0.15, 0.15, 0.15, 0.5]


@pytest.mark.filterwarnings("ignore:.*is replaced")
@pytest.mark.parametrize("request_name", ["get_attr", "reset"])
def test_a_worker_that_ended_between_steps(make_faulty, request_name):
    venv = make_faulty("none", restart_workers=True)
    venv.seed(0)
    before = venv.reset()
    step(venv)
    os.kill(venv.unwrapped._processes[0].pid, signal.SIGKILL)
    if request_name == "reset":
        venv.reset()
        assert not step(venv)[2].any()
        return
    assert venv.get_attr("task_id") == [0, 1, 2, 0]
    obs, rewards, dones, infos = step(venv)  # the new episodes have not taken this step
    assert dones.tolist() == [True, False, True, False] and rewards[0] == 0
    assert infos[0]["worker_restarted"] and not np.array_equal(obs[0], before[0])
    assert step(venv)[2].tolist() == [False] * 4


def patch_start(monkeypatch, venv, before=lambda: None, after=lambda process: None) -> None:
    """Do something before and after the next start of a worker."""
    start_worker = venv.unwrapped._start_worker

    def start(*args: Any, **kwargs: Any):
        monkeypatch.setattr(venv.unwrapped, "_start_worker", start_worker)
        before()
        connection, process = start_worker(*args, **kwargs)
        after(process)
        return connection, process

    monkeypatch.setattr(venv.unwrapped, "_start_worker", start)


def end(process) -> None:
    process.kill()
    process.join()


@pytest.mark.parametrize("request_name", ["step", "get_attr"])
def test_a_second_worker_that_ends_meanwhile_is_replaced_too(make_faulty, monkeypatch, request_name):
    venv = make_faulty("none", restart_workers=True)
    venv.seed(0)
    venv.reset()
    step(venv, 2)
    processes = list(venv.unwrapped._processes)
    end(processes[1])
    patch_start(monkeypatch, venv, before=lambda: end(processes[0]))
    with pytest.warns(UserWarning, match="replacement number 2"):
        if request_name == "get_attr":
            assert venv.get_attr("task_id") == [0, 1, 2, 0]
        _, rewards, dones, infos = step(venv)
    assert dones.all() and not rewards.any() and all(info["worker_restarted"] for info in infos)
    assert venv.unwrapped.lost_steps.all() and venv.unwrapped.n_restarts == 2
    obs, _, dones, infos = step(venv)
    assert not dones.any() and not venv.unwrapped.lost_steps.any() and np.isfinite(obs).all()
    assert not any("worker_restarted" in info for info in infos)


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_a_replacement_that_ends_at_once_is_an_error(make_faulty, monkeypatch):
    venv = make_faulty("exit", restart_workers=True)
    venv.reset()
    step(venv, 2)
    patch_start(monkeypatch, venv, after=end)
    with pytest.raises(RuntimeError, match=r"worker 1 .*ended with exit code -9"):
        step(venv)
    assert venv.unwrapped.n_restarts == 1


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_what_kept_a_worker_from_being_replaced_is_named(make_faulty, monkeypatch):
    venv = make_faulty("exit", restart_workers=True)
    venv.reset()
    step(venv, 2)

    def fail() -> None:
        raise OSError("no more processes")

    patch_start(monkeypatch, venv, before=fail)
    with pytest.raises(OSError, match="no more"):
        step(venv)
    with pytest.raises(RuntimeError, match=r"replacing a worker was interrupted by OSError \(no more processes\); make a new"):
        step(venv)


def test_a_fault_that_a_new_process_does_not_mend(make_faulty):
    venv = make_faulty("raise", n_faults=9, restart_workers=True)
    venv.reset()
    with pytest.warns(UserWarning, match="is replaced"), pytest.raises(ZeroDivisionError, match="gripper") as caught:
        step(venv, 12)
    assert "in step() of sub-environment 1" in str(caught.value.__cause__)
    assert venv.unwrapped.n_restarts == 3
    with pytest.raises(RuntimeError, match="it had been replaced 3 times within 1000 steps before"):
        step(venv)


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_monitor_files_go_on(make_faulty, tmp_path):
    venv = make_faulty("exit", monitor_dir=tmp_path, restart_workers=True)
    (tmp_path / "faults").write_text("")
    venv.reset()
    step(venv, 6)
    (tmp_path / "faults").write_text("now\n")
    step(venv, 9)  # the third one is lost, then comes another episode
    assert venv.unwrapped.n_restarts == 1
    lines = (tmp_path / "1.monitor.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["l", "6", "6"]  # lengths, below one heading


@pytest.mark.filterwarnings("ignore:.*is replaced")
@pytest.mark.parametrize("algorithm", [MTSAC, TSACSAC])
def test_a_lost_step_is_not_learned_from(make_faulty, algorithm):
    venv = make_faulty("exit", restart_workers=True)
    model = make_model(algorithm, venv, learning_starts=8)
    model.learn(10 * 4, log_interval=None)
    assert venv.unwrapped.n_restarts == 1
    # Ten steps each, of two sub-environments on task 0; the worker of 1 and 3 lost one step
    assert model.replay_buffer.sizes().tolist() == [19, 9, 10]
    assert not model.replay_buffer.refused.any()
    if algorithm is TSACSAC:
        assert model._logged_success[1].tolist() == [19, 9, 10]


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_a_lost_step_is_in_no_running_return(make_faulty):
    env = VecTaskNormalize(make_faulty("exit", restart_workers=True))
    env.seed(0)
    env.reset()
    step(env, 4)
    assert env.unwrapped.n_restarts == 1
    np.testing.assert_allclose(env.ret_rms.count, [7, 3, 4], atol=1e-3)  # two sub-environments on task 0 lost one step


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_other_buffers_bootstrap_at_the_last_observation(make_faulty):
    venv = make_faulty("exit", restart_workers=True)
    model = SAC("MlpPolicy", venv, learning_starts=1000, seed=0)
    model.learn(4 * 4)
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.next_observations[2, 1], buffer.observations[2, 1])
    assert buffer.dones[2, 1] == 1 and buffer.timeouts[2, 1] == 1  # sampled as dones * (1 - timeouts) = 0: it bootstraps
    assert not np.array_equal(buffer.observations[3, 1], buffer.observations[2, 1])


@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_a_lost_episode_is_played_again_in_evaluations(make_faulty):
    venv = make_faulty("exit", n_envs=3, restart_workers=True)
    policy = RandomPolicy(venv.observation_space, venv.action_space, seed=0)
    evaluation = evaluate_multi_task_policy(policy, venv, n_eval_episodes_per_task=2)
    assert venv.unwrapped.n_restarts == 1
    assert evaluation.lengths.tolist() == [6] * 6
    assert evaluation.task_ids.tolist() == [0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------- no orphans

SCRIPT = """
import os, signal, sys, time
import numpy as np
from tests.test_worker_faults import FaultyTasksEnv
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv
from functools import partial

if __name__ == "__main__":
    fault, start_method, end = sys.argv[1:4]
    venv = SharedMemoryVecEnv([partial(FaultyTasksEnv, fault, sys.argv[4])] * 3, n_workers=3, start_method=start_method)
    venv.env_method("set_tasks", [1], indices=[0])
    venv.reset()
    print(*[process.pid for process in venv._processes], flush=True)
    venv.step_async(np.zeros((3, 2), dtype=np.float32))
    venv.step_wait()
    venv.step_async(np.zeros((3, 2), dtype=np.float32))
    venv.step_wait()
    venv.step_async(np.zeros((3, 2), dtype=np.float32))  # the first worker hangs
    time.sleep(0.3)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "interrupt":
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        venv.step_wait()
    # else: the interpreter ends without close()
"""


@pytest.mark.parametrize(
    "fault, start_method, end",
    [
        ("stop", "fork", "exit"),
        ("sleep", "forkserver", "exit"),
        ("stop", "fork", "interrupt"),
        ("sleep", "fork", "kill"),
        ("sleep", "forkserver", "kill"),
    ],
)
def test_no_orphans_and_no_hang_at_exit(fault, start_method, end, tmp_path):
    if start_method not in mp.get_all_start_methods():
        pytest.skip(f"this system has no start method {start_method!r}")
    script = tmp_path / "script.py"
    script.write_text("import sb3_mtrl.common.vec_env.shared_memory_vec_env as module\nmodule.CLOSE_TIMEOUT = 0.5\n" + SCRIPT)
    (tmp_path / "faults").write_text("now\n")
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, script, fault, start_method, end, tmp_path / "faults"],
        env=variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert time.monotonic() - start < 50  # the worker sleeps for 60 s
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 3, result.stderr
    assert result.returncode == {"exit": 0, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL}[end], result.stderr
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


# -------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"worker_timeout": 0}, "worker_timeout must be .*above 0, got 0"),
        ({"worker_timeout": float("nan")}, "worker_timeout must be .*above 0, got nan"),
        ({"restart_workers": "yes"}, "restart_workers must be True or False, got 'yes'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_multi_task_vec_env(PointTasksEnv, vec_env="shared", n_workers=1, **kwargs)


@pytest.mark.parametrize("name, value", [("worker_timeout", 5), ("restart_workers", True)])
def test_arguments_reach_the_class_and_no_other(name, value):
    with pytest.raises(ValueError, match=f"{name} is for vec_env='shared' alone, got {name}={value} for SubprocVecEnv"):
        make_multi_task_vec_env(PointTasksEnv, vec_env="subproc", **{name: value})
    kwargs = {"n_workers": 1, "vec_env_kwargs": {"start_method": "fork"}, name: value}
    venv = make_multi_task_vec_env(PointTasksEnv, vec_env="shared", **kwargs)
    assert getattr(venv.unwrapped, name) == value
    venv.close()


@pytest.mark.expensive
@pytest.mark.filterwarnings("ignore:.*is replaced")
def test_a_worker_of_metaworld_is_replaced():
    venv = make_multi_task_vec_env(
        "MT3", n_envs=3, seed=0, env_kwargs={"horizon": 8}, vec_env="shared", n_workers=3, restart_workers=True
    )
    dummy = make_multi_task_vec_env("MT3", n_envs=3, seed=0, env_kwargs={"horizon": 8})
    first = venv.reset()
    np.testing.assert_array_equal(first, dummy.reset())
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 3, 4)).astype(np.float32)
    for action in actions[:2]:
        np.testing.assert_array_equal(venv.step(action)[0], dummy.step(action)[0])
    os.kill(venv.unwrapped._processes[1].pid, signal.SIGKILL)
    obs, _, dones, infos = venv.step(actions[2])
    expected = dummy.step(actions[2])[0]
    assert dones.tolist() == [False, True, False] and infos[1]["worker_restarted"]
    np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
    assert not np.array_equal(obs[1], first[1]) and obs[1, -3:].tolist() == [0, 1, 0]
    assert venv.get_attr("assigned_tasks") == dummy.get_attr("assigned_tasks")
    for action in actions[3:]:
        assert np.isfinite(venv.step(action)[0]).all()
    venv.close()
