"""SharedMemoryVecEnv: SB3's contract, DummyVecEnv's numbers, and what happens when something goes wrong."""

import glob
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl import MTSAC
from sb3_mtrl.common.callbacks import MultiTaskEvalCallback
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy
from sb3_mtrl.common.vec_env import (
    SharedMemoryVecEnv,
    VecTaskNormalize,
    WorkerTraceback,
    balance_assignment,
    make_multi_task_vec_env,
)
from tests.tiny_envs import PointTasksEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    deadline = time.monotonic() + 5
    while mp.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mp.active_children() == []
    assert glob.glob(f"/dev/shm/sb3_mtrl_{os.getpid()}_*") == []


class PickyEnv(gym.Env):
    """
    Dictionary observations, and an attribute of each kind that a VecEnv has to reach. With ``fault`` the third step, or what
    else it names, goes wrong.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's own declaration)
    observation_space = spaces.Dict({"image": spaces.Box(0, 255, (2, 3, 1), np.uint8), "count": spaces.Box(-9, 9, (1,))})
    action_space = spaces.Discrete(5)
    task_names = ("tidy", "sweep")
    task_id = 1

    def __init__(self, number: int = 0, fault: str | None = None, render_mode: str | None = "rgb_array"):
        self.number, self.fault, self.render_mode = number, fault, render_mode
        self.last_action: Any = None
        if fault == "make":
            raise OSError("no such robot")
        if fault == "space":
            self.observation_space = spaces.Box(0, 1, (2,))

    def _obs(self) -> dict[str, np.ndarray]:
        image = np.full((2, 3, 1), 10 * self.number + self.steps, dtype=np.uint8)
        return {"image": image, "count": np.array([self.steps], dtype=np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if self.fault == "reset":
            raise OSError("stuck")
        return self._obs(), {"options": options, "draw": float(self.np_random.uniform())}

    def step(self, action):
        self.steps += 1
        self.last_action = action
        if self.steps == 3:
            go_wrong(self.fault)
        return self._obs(), float(action), self.steps == 4, self.steps >= 2 and self.number == 1, {}

    def render(self):
        return np.full((2, 2, 3), self.number, dtype=np.uint8)

    def scaled(self, factor, offset=0):
        return factor * self.number + offset


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def go_wrong(fault: str | None) -> None:
    if fault == "raise":
        raise ZeroDivisionError("the gripper is gone")
    if fault == "raise unpicklable":
        raise UnpicklableError("this", "that")
    if fault == "exit":
        os._exit(3)
    if fault == "exit with a child":
        # The child keeps the pipe open: its end alone would not tell that the worker is gone
        if os.fork() == 0:
            time.sleep(20)
        os._exit(3)


def picky_envs(n_envs: int = 3, faults: dict[int, str] | None = None) -> list[Any]:
    return [partial(PickyEnv, number, (faults or {}).get(number)) for number in range(n_envs)]


@pytest.fixture
def make_shared():
    """Makes them with the start method that needs no import, and closes them."""
    made = []

    def make(env_fns, n_workers=2, start_method="fork", **kwargs) -> SharedMemoryVecEnv:
        made.append(SharedMemoryVecEnv(env_fns, n_workers=n_workers, start_method=start_method, **kwargs))
        return made[-1]

    yield make
    for venv in made:
        venv.close()


def assert_same(value: Any, expected: Any) -> None:
    assert type(value) is type(expected) or isinstance(value, dict)  # SB3's are OrderedDict
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected.keys() - {"t"}:  # Monitor's clock
            assert_same(value[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected)
        for item, expected_item in zip(value, expected, strict=True):
            assert_same(item, expected_item)
    elif isinstance(expected, np.ndarray):
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)
    else:
        assert value == expected


# ---------------------------------------------------------- DummyVecEnv's numbers


def point_env_fns(n_envs: int) -> list[Any]:
    return [lambda: Monitor(PointTasksEnv(num_tasks=3, horizon=5, terminate_on_success=True)) for _ in range(n_envs)]


@pytest.mark.parametrize("n_workers", [1, 2, 5, 9])
def test_equal_to_dummy(make_shared, n_workers):
    venv, dummy = make_shared(point_env_fns(5), n_workers), DummyVecEnv(point_env_fns(5))
    assert len(venv.assignment) == min(n_workers, 5)
    for seed in (3, None):
        for env in (venv, dummy):
            env.seed(seed) if seed is not None else None
        assert_same(venv.reset(), dummy.reset())
        for actions in np.random.default_rng(0).uniform(-1, 1, (17, 5, 2)):
            # Other types than that of the space are handed on as they are
            for dtype in (np.float32, np.float64):
                assert_same(venv.step(actions.astype(dtype)), dummy.step(actions.astype(dtype)))
            assert_same(venv.reset_infos, dummy.reset_infos)


def test_equal_to_dummy_with_dictionaries_and_discrete_actions(make_shared):
    venv, dummy = make_shared(picky_envs()), DummyVecEnv(picky_envs())
    for env in (venv, dummy):
        env.seed(1)
        env.set_options([{"where": 0}, {}, {"where": 2}])
    assert_same(venv.reset(), dummy.reset())
    assert_same(venv.reset_infos, dummy.reset_infos)
    assert [info["options"] for info in venv.reset_infos] == [{"where": 0}, None, {"where": 2}]
    kept = []
    for actions in np.random.default_rng(0).integers(5, size=(9, 3)):
        results = venv.step(actions), dummy.step(actions)
        kept.append((results[0], [np.copy(array) for array in results[0][0].values()]))
        assert_same(*results)
        assert_same(venv.reset_infos, dummy.reset_infos)
        assert_same(venv.get_attr("last_action"), dummy.get_attr("last_action"))
    # What was returned is the caller's, later steps do not write into it
    for (obs, *_), copies in kept:
        assert_same(list(obs.values()), copies)


@pytest.mark.parametrize("start_method", mp.get_all_start_methods())
def test_start_methods_with_metaworld(start_method):
    venvs = [
        make_multi_task_vec_env("MT3", n_envs=3, seed=0, env_kwargs={"horizon": 4}, **kwargs)
        for kwargs in (
            {"vec_env": "shared", "n_workers": 2, "vec_env_kwargs": {"start_method": start_method}},
            {"vec_env": "dummy"},
        )
    ]
    assert isinstance(venvs[0].venv, SharedMemoryVecEnv)
    assert_same(venvs[0].reset(), venvs[1].reset())
    for actions in np.random.default_rng(0).uniform(-1, 1, (9, 3, 4)).astype(np.float32):
        assert_same(*(venv.step(actions) for venv in venvs))
    for venv in venvs:
        venv.close()


def test_training_and_evaluation_equal_those_on_dummy():
    parameters, evaluations = [], []
    for vec_env in ("dummy", "shared"):
        kwargs = {"vec_env_kwargs": {"start_method": "fork", "n_workers": 2}} if vec_env == "shared" else {}
        venv, eval_venv = (
            make_multi_task_vec_env(PointTasksEnv, n_envs=3, seed=0, env_kwargs={"horizon": 5}, vec_env=vec_env, **kwargs)
            for _ in range(2)
        )
        env = VecTaskNormalize(venv, norm_reward=False)
        model = MTSAC("MlpPolicy", env, learning_starts=6, batch_size=9, policy_kwargs={"net_arch": [8]}, seed=0)
        callback = MultiTaskEvalCallback(
            VecTaskNormalize(eval_venv, training=False), eval_freq=10, n_eval_episodes=3, verbose=0
        )
        model.learn(60, callback=callback)
        parameters.append([value.numpy(force=True) for value in model.policy.state_dict().values()])
        evaluations.append([callback.last_mean_reward, evaluate_multi_task_policy(model, callback.eval_env, 2).mean_reward])
        env.close()
        eval_venv.close()
    assert_same(*parameters)
    assert evaluations[0] == evaluations[1]


# -------------------------------------------------------------------- the contract


def test_attributes_and_methods(make_shared):
    venv = make_shared(picky_envs(5), assignment=[[4, 0], [1, 3, 2]])
    assert venv.get_attr("number") == [0, 1, 2, 3, 4]
    assert venv.get_attr("number", indices=3) == [3]
    assert venv.get_attr("number", indices=[4, 1, -1, 1]) == [4, 1, 4, 1]
    venv.set_attr("number", 7, indices=[1, 2])
    venv.set_attr("new", "here")
    assert venv.get_attr("number") == [0, 7, 7, 3, 4]
    assert venv.has_attr("new")
    assert not venv.has_attr("nothing")
    assert venv.env_method("scaled", 10, offset=1, indices=[3, 0]) == [31, 1]
    assert venv.env_is_wrapped(Monitor) == [False] * 5
    with pytest.raises(AttributeError):
        venv.get_attr("nothing")
    with pytest.raises(IndexError):
        venv.get_attr("number", indices=5)
    assert venv.env_method("scaled", 1) == [0, 7, 7, 3, 4]


def test_render(make_shared):
    venv = make_shared(picky_envs(4))
    assert venv.render_mode == "rgb_array"
    images = venv.get_images()
    assert [image[0, 0, 0] for image in images] == [0, 1, 2, 3]
    assert venv.render("rgb_array").shape == (4, 4, 3)
    with pytest.warns(UserWarning, match="render mode is None"):
        assert make_shared([partial(PickyEnv, render_mode=None)]).get_images() == [None]


def test_requests_during_a_step(make_shared):
    venv, dummy = make_shared(picky_envs()), DummyVecEnv(picky_envs())
    for env in (venv, dummy):
        env.reset()
    venv.step_async(np.ones(3, dtype=int))
    assert venv.get_attr("steps") == [1, 1, 1]
    assert_same(venv.step_wait(), dummy.step(np.ones(3, dtype=int)))
    # A reset cancels it
    venv.step_async(np.ones(3, dtype=int))
    assert_same(venv.reset(), dummy.reset())
    assert_same(venv.step(np.ones(3, dtype=int)), dummy.step(np.ones(3, dtype=int)))


def test_wrong_order(make_shared):
    venv = make_shared(picky_envs())
    venv.reset()
    with pytest.raises(RuntimeError, match="without step_async"):
        venv.step_wait()
    with pytest.raises(ValueError, match=r"one action per sub-environment \(3\), got 2"):
        venv.step(np.ones(2, dtype=int))
    venv.step_async(np.ones(3, dtype=int))
    with pytest.raises(RuntimeError, match="called twice"):
        venv.step_async(np.ones(3, dtype=int))
    # With a step under way
    venv.close()
    venv.close()
    with pytest.raises(RuntimeError, match="was closed"):
        venv.reset()


@pytest.mark.parametrize(
    "n_envs, kwargs, message",
    [
        (0, {}, "at least one function"),
        (2, {"n_workers": 0}, "n_workers must be at least 1, got 0"),
        (2, {"assignment": [[0]]}, "each of the 2 sub-environments to one worker"),
        (2, {"assignment": [[0, 1], []]}, "each worker at least one"),
        (2, {"assignment": [[0, 1], [1]]}, "each of the 2"),
        (2, {"assignment": [[0, 1]], "n_workers": 2}, "number of groups in assignment, 1, got 2"),
        (2, {"start_method": "thread"}, "start_method must be one of .*'thread'"),
    ],
)
def test_wrong_arguments(n_envs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SharedMemoryVecEnv(picky_envs(n_envs), **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"vec_env": "threads"}, "vec_env must be one of 'dummy', 'subproc', 'shared', got 'threads'"),
        ({"vec_env": "dummy", "vec_env_cls": DummyVecEnv}, "exclude each other"),
        ({"n_workers": 2}, "n_workers is for vec_env='shared' alone, got n_workers=2 for DummyVecEnv"),
    ],
)
def test_make_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_multi_task_vec_env(PointTasksEnv, **kwargs)


def test_default_is_one_worker_per_core(make_shared):
    venv = make_shared(picky_envs(3), n_workers=None)
    assert len(venv.assignment) == min(3, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())


def test_balance_assignment():
    # 5 + 1 against 4 + 2, by hand: 5 | 4, then 2 to the second (4 < 5), then 1 to the first (5 < 6)
    assert balance_assignment([5, 4, 2, 1], 2) == [[0, 3], [1, 2]]
    assert balance_assignment([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert balance_assignment([1.0, 2.0], 5) == [[1], [0]]
    for costs in ([], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match="costs must be positive"):
            balance_assignment(costs, 2)


# ------------------------------------------------------------- when things go wrong


def steps(venv: SharedMemoryVecEnv, n_steps: int) -> None:
    for _ in range(n_steps):
        venv.step(np.ones(venv.num_envs, dtype=int))


def test_exception_in_a_step(make_shared):
    venv = make_shared(picky_envs(4, {2: "raise"}))
    venv.reset()
    steps(venv, 2)
    with pytest.raises(ZeroDivisionError, match="the gripper is gone") as caught:
        steps(venv, 1)
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerTraceback)
    assert "in step() of sub-environment 2, task 'sweep'" in str(cause)
    assert "go_wrong(self.fault)" in str(cause)
    # The workers are still there
    venv.set_attr("fault", None)
    venv.reset()
    steps(venv, 5)


def test_exception_that_cannot_be_pickled(make_shared):
    venv = make_shared(picky_envs(2, {1: "raise unpicklable"}))
    venv.set_attr("number", 0)
    venv.reset()
    with pytest.raises(RuntimeError, match="sub-environment 1, task 'sweep': UnpicklableError: this and that"):
        steps(venv, 3)


@pytest.mark.parametrize("fault, request_name", [("make", "make"), ("reset", "reset")])
def test_exception_elsewhere(make_shared, fault, request_name):
    with pytest.raises(OSError) as caught:
        make_shared(picky_envs(3, {1: fault})).reset()
    assert f"in {request_name}() of sub-environment 1" in str(caught.value.__cause__)


def test_different_spaces():
    with pytest.raises(ValueError, match=r"equal spaces.*number 2"):
        SharedMemoryVecEnv(picky_envs(3, {2: "space"}), n_workers=2, start_method="fork")


@pytest.mark.parametrize("fault", ["exit", "exit with a child"])
def test_worker_that_ends(make_shared, fault):
    venv = make_shared(picky_envs(4, {1: fault}))
    venv.set_attr("number", 0)
    venv.reset()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"worker 1 .*sub-environments \[1, 3\], ended with exit code 3"):
        steps(venv, 3)
    # From now on it is said at once
    for call in (venv.reset, lambda: venv.get_attr("number"), lambda: steps(venv, 1)):
        with pytest.raises(RuntimeError, match="exit code 3"):
            call()
    venv.close()
    assert time.monotonic() - start < 15  # the child sleeps longer


def test_a_request_that_cannot_be_pickled_reaches_no_worker(make_shared):
    venv = make_shared(picky_envs(2), n_workers=2)
    venv.reset()
    venv.set_options([{"level": 1}, {"level": lambda: 0}])  # the second worker's
    with pytest.raises(Exception, match="pickle"):
        venv.reset()
    assert venv.get_attr("number") == [0, 1]  # and not the reply to the first worker's reset


def test_after_an_interrupt_there_is_an_error_and_no_hang(make_shared, monkeypatch):
    venv = make_shared(picky_envs(2), n_workers=2)
    venv.reset()
    venv.step_async(np.zeros(2, dtype=np.int64))
    # Shells start what is to run in the background with interrupts ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                SharedMemoryVecEnv, "_receive_all", lambda *args: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5)
            )
            with pytest.raises(KeyboardInterrupt):
                venv.step_wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="interrupted by KeyboardInterrupt; make a new environment"):
        venv.reset()


def test_worker_that_is_killed(make_shared):
    venv = make_shared(picky_envs(4))
    venv.reset()
    os.kill(venv._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 0 .*sub-environments \[0, 2\], ended with exit code -9"):
        steps(venv, 1)


ORPHANS = """
import os, signal
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv
from tests.test_shared_memory_vec_env import picky_envs
venv = SharedMemoryVecEnv(picky_envs(3), n_workers=3, start_method="fork")
venv.reset()
print(*[process.pid for process in venv._processes], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_main_process():
    result = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False
