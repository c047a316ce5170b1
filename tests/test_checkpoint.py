"""Checkpoints: going on exactly, broken files, full disks, and what does not fit."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps, ProgressBarCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC, make_multi_task_vec_env
from sb3_mtrl.common import checkpoint, checkpoint_store, cpu_tuning
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import (
    LossMaskoutCallback,
    MultiTaskEvalCallback,
    ProgressFileCallback,
    TaskSuccessCallback,
    WResetCallback,
)
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.checkpoint_store import ROWS, BrokenCheckpointError, CheckpointStore, read_checkpoint
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv, VecTaskAssignment, VecTaskNormalize
from sb3_mtrl.common.vec_env.state import get_env_state, get_vec_env_state, set_env_state, set_vec_env_state
from tests import kill_and_resume
from tests.fingerprint import differences, fingerprint
from tests.models import ALGORITHMS, NUM_TASKS, make_env, make_model
from tests.tiny_envs import PointTasksEnv

TOTAL = 130  # time steps


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    # What it is for no test can show, short of pulling a plug; on a busy disk it would take most of the time
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(Exception):
    """Ends a training where the test wants it to."""


class CrashAt(BaseCallback):
    """Raise an error at a time step."""

    def __init__(self, timesteps: float):
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.timesteps:
            raise Crash
        return True


NEVER = float("inf")


def monitored_env(**kwargs):
    return VecTaskAssignment(DummyVecEnv([lambda: Monitor(PointTasksEnv(NUM_TASKS, horizon=7, **kwargs))] * NUM_TASKS))


def pendulum(**kwargs):
    return dict(
        env=DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1", max_episode_steps=11))] * 2), buffer_size=200, **kwargs
    )


def her_settings():
    from stable_baselines3.common.envs import BitFlippingEnv

    def make():
        return BitFlippingEnv(n_bits=3, continuous=True, max_steps=6)

    return dict(
        env=DummyVecEnv([make]),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2, goal_selection_strategy="future"),
        learning_starts=20,
        buffer_size=200,
    )


# Settings that keep some state of their own between two steps or two rollouts
VARIANTS = {
    **{algorithm.__name__: (algorithm, dict) for algorithm in ALGORITHMS},
    "normalised": (MTSAC, lambda: dict(env=VecTaskNormalize(monitored_env()))),
    "gSDE": (MTSAC, lambda: dict(use_sde=True, sde_sample_freq=3, train_freq=4, gradient_steps=2)),
    "noise": (MTSAC, lambda: dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.2)))),
    "long rollouts": (MTSAC, lambda: dict(train_freq=5, gradient_steps=-1, optimizer_order="joint")),
    "overlap": (CMTASAC, lambda: dict(overlap=True, train_freq=2)),
    "schedule": (PaCoSAC, lambda: dict(learning_rate=lambda progress: 1e-2 * progress, maskout_threshold=0.5)),
    "full rings": (STARSSAC, lambda: dict(buffer_size=60, gradient_steps=2)),
    "priorities": (TSACSAC, lambda: dict(buffer_size=50, replay_buffer_class=TaskPrioritizedReplayBuffer)),
    "episodes": (MTSAC, lambda: dict(env=make_env(n_envs=1, horizon=7), train_freq=(1, "episode"))),
    "one task": (MTSAC, lambda: pendulum(learning_starts=20)),
    "n-step": (MTSAC, lambda: pendulum(learning_starts=20, n_steps=3)),
    "memory": (CMTASAC, lambda: pendulum(learning_starts=20)),
    "normalised rewards": (MTSAC, lambda: pendulum(learning_starts=20) | dict(env=VecNormalize(pendulum()["env"]))),
    "HER": (MTSAC, her_settings),
}


def train(folder: Path, variant: str, crash_at: float = NEVER, total: int = TOTAL, save_freq: int = 7):
    """Train with checkpoints; what came of it, or None after a crash."""
    algorithm, settings = VARIANTS[variant]
    kwargs = {"env": monitored_env(), "learning_starts": 30, **settings()}
    policy = kwargs.pop("policy", "MlpPolicy")
    kwargs["policy_kwargs"] = {"net_arch": [8], **({"lstm_hidden_dim": 4} if algorithm is CMTASAC else {})}
    model = algorithm(policy, kwargs.pop("env"), seed=0, device="cpu", batch_size=24, **kwargs)
    children: list[BaseCallback] = [
        MultiTaskCheckpointCallback(save_freq, folder, resume="auto"),
        EveryNTimesteps(40, Count()),
    ]
    if model.num_tasks > 1:
        eval_env = monitored_env()
        if isinstance(model.env, VecTaskNormalize):
            eval_env = VecTaskNormalize(eval_env, training=False)
        eval_env.seed(7)  # once: each evaluation goes on from the one before
        children += [TaskSuccessCallback(window_size=3), MultiTaskEvalCallback(eval_env, eval_freq=17, seed=None, verbose=0)]
        children += [LossMaskoutCallback(5.0, "critic")]
    callback = CallbackList([*children, CrashAt(crash_at)])
    try:
        model.learn(total, callback=callback)
    except Crash:
        return None
    return fingerprint(model, callback)


class Count(BaseCallback):
    """A state that only pickling knows."""

    def __init__(self):
        super().__init__()
        self.triggers: list[int] = []

    def _on_step(self) -> bool:
        self.triggers.append(self.num_timesteps)
        return True


@pytest.mark.filterwarnings("ignore:all of the last")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_that_crashed_goes_on_exactly(variant, tmp_path):
    # The expected values are those of the same training without a crash
    expected = train(tmp_path / "whole", variant)
    for crash_at in (60, 61 + sum(map(ord, variant)) % 50):
        assert train(tmp_path / "crashed", variant, crash_at) is None
    assert any((tmp_path / "crashed").glob("checkpoint_*"))
    result = train(tmp_path / "crashed", variant)
    assert differences(expected, result) == []
    # It did train, and the fingerprint tells other trainings apart
    other = train(tmp_path / "other", variant, total=TOTAL + 6)
    assert len(differences(expected, other)) > 10


def test_killed_processes_end_alike(capfd):
    # Real kills, real Meta-World, all five algorithms; `python -m tests.kill_and_resume` makes 20 for each
    assert kill_and_resume.main(["--kills", "2", "--together", "--seed", "0"]) == 0
    output = capfd.readouterr().out
    assert output.count("parts equal") == 5 and "2 kills" in output


# --------------------------------------------------------------------------------------------------------- environments

META_WORLD = dict(tasks=["reach-v3", "hammer-v3", "pick-place-v3", "door-lock-v3", "assembly-v3"], horizon=30)


@pytest.mark.parametrize("fast", [True, False])
def test_meta_world_goes_on_in_the_middle_of_an_episode(fast):
    rng = np.random.default_rng(0)

    def make():
        return Monitor(gym.make("MetaWorld-Custom-v3", goals="cycle" if fast else "random", fast=fast, **META_WORLD))

    env, copy = make(), make()
    env.reset(seed=3)
    copy.reset(seed=9)
    for n_steps in (0, 1, 17, 30, 44, 30):  # in different tasks, at the first step and at the last one
        for _ in range(n_steps):
            step(env, rng)
        set_env_state(copy, get_env_state(env))
        for _ in range(37):  # into the next episode
            seed = rng.integers(1 << 30)
            for one, other in zip(
                step(env, np.random.default_rng(seed)), step(copy, np.random.default_rng(seed)), strict=True
            ):
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert env.get_episode_rewards() == copy.get_episode_rewards() and len(env.get_episode_rewards()) > 8


def step(env, rng):
    obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
    if terminated or truncated:
        obs, _ = env.reset()
    return obs, reward, truncated, info["success"], info["task_id"]


@pytest.mark.parametrize("vec_env", ["subproc", "shared"])
def test_meta_world_in_workers_goes_on_in_the_middle_of_an_episode(vec_env):
    def make():
        env_kwargs = dict(tasks=["reach-v3", "push-v3", "door-open-v3"], horizon=12)
        return make_multi_task_vec_env("MetaWorld-Custom-v3", n_envs=2, env_kwargs=env_kwargs, seed=0, vec_env=vec_env)

    env, copy = VecTaskNormalize(make()), VecTaskNormalize(make())
    try:
        rng = np.random.default_rng(0)
        env.reset()
        copy.reset()
        for _ in range(17):
            env.step(rng.uniform(-1, 1, (2, 4)).astype(np.float32))
        state = get_vec_env_state(env)
        assert state["reason"] is None
        set_vec_env_state(copy, state)
        for _ in range(15):
            actions = rng.uniform(-1, 1, (2, 4)).astype(np.float32)
            (obs, rewards, dones, infos), (*others, other_infos) = env.step(actions), copy.step(actions)
            for one, other in zip((obs, rewards, dones), others, strict=True):
                assert one.tobytes() == other.tobytes()
            episodes = [[info.get("episode", {}).get("r") for info in step_infos] for step_infos in (infos, other_infos)]
            assert episodes[0] == episodes[1]  # also the monitors have gone on
    finally:
        env.close()
        copy.close()


def test_other_environments_and_wrappers():
    def make(max_steps=8):
        return gym.wrappers.FrameStackObservation(gym.make("Pendulum-v1", max_episode_steps=max_steps), 2)

    env, copy = make(), make()
    env.reset(seed=0)
    copy.reset(seed=1)
    for _ in range(5):
        env.step(np.ones(1))
    set_env_state(copy, get_env_state(env))
    for _ in range(3):
        one, other = env.step(np.ones(1)), copy.step(np.ones(1))
        assert np.array_equal(one[0], other[0]) and one[1:4] == other[1:4]
    assert one[3]  # the time limit was restored
    assert np.array_equal(env.reset()[0], copy.reset()[0])  # so was the generator
    with pytest.raises(ValueError, match="env must be made as when its state was saved, FrameStackObservation of"):
        set_env_state(gym.make("Pendulum-v1"), get_env_state(env))
    with pytest.raises(ValueError, match=r"wrapped as when its state was saved, in \['VecTaskAssignment'\], got nothing"):
        set_vec_env_state(DummyVecEnv([PointTasksEnv]), get_vec_env_state(make_env()))


class UnpicklableEnv(PointTasksEnv):
    """Its state cannot be taken."""

    def __init__(self):
        super().__init__(num_tasks=NUM_TASKS, horizon=7)
        self.lock = threading.Lock()


def unpicklable_env():
    return VecTaskNormalize(VecTaskAssignment(DummyVecEnv([UnpicklableEnv] * NUM_TASKS)))


@pytest.mark.parametrize("algorithm", [CMTASAC, TSACSAC])
def test_where_the_environment_has_no_state_episodes_begin_anew(algorithm, tmp_path):
    def learn(total):
        model = make_model(algorithm, env=unpicklable_env(), learning_starts=20)
        with pytest.warns(UserWarning, match="cannot hold the state of the training environment .the state of Unpick"):
            model.learn(total, callback=MultiTaskCheckpointCallback(3, tmp_path, resume="auto"))
        return model

    first = learn(60)
    second = learn(120)
    assert second.num_timesteps == 120 and second._n_updates > first._n_updates
    assert second.replay_buffer.size() == 120
    rows = second.replay_buffer._rows.reshape(NUM_TASKS, -1, second.replay_buffer._rows.shape[1])
    # The 20 steps of before, of episodes with 7 steps, end in the sixth step of one. The next row belongs to a new episode,
    # with another goal; goals are the third and fourth number of an observation
    assert not np.array_equal(rows[0, 19, 2:4], rows[0, 20, 2:4])
    # Not that of the first episode of the training, which its seed gave
    assert not np.array_equal(rows[0, 0, 2:4], rows[0, 20, 2:4])
    # Statistics of the normalisation go on: one observation of each step and sub-environment, and those of the resets
    assert second.env.obs_rms.count > 120


# ---------------------------------------------------------------------------------------------------- broken checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with three checkpoints of a training of 90 steps that crashed after 60."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(Crash):
        learn(folder, 90, crash_at=64)
    return folder


def learn(folder, total, algorithm=STARSSAC, resume="auto", save_freq=5, crash_at=NEVER, **kwargs):
    model = make_model(algorithm, learning_starts=20, policy_kwargs=dict(net_arch=[4]), **kwargs)
    model.learn(total, callback=[MultiTaskCheckpointCallback(save_freq, folder, resume=resume), CrashAt(crash_at)])
    return model


def find(folder):
    return CheckpointStore(folder, 3).find()


def damage(path: Path, offset: int, flip: bool) -> None:
    content = bytearray(path.read_bytes())
    if flip:
        content[offset] ^= 0x10
    path.write_bytes(content if flip else content[:offset])


def test_checkpoints_are_kept_and_named(checkpoints):
    # Every fifth call with three sub-environments
    assert [path.name for path in find(checkpoints)] == [
        "checkpoint_000002_30_steps",
        "checkpoint_000003_45_steps",
        "checkpoint_000004_60_steps",
    ]
    assert not list(checkpoints.glob(".[wr]*"))
    model = STARSSAC.load(find(checkpoints)[-1] / "model.zip", device="cpu")  # an agent like any other
    assert model.num_timesteps == 60


def test_damage_at_any_place_is_found(checkpoints, tmp_path):
    whole = find(checkpoints)[-1]
    read_checkpoint(whole)
    n_damages = 0
    files = [*sorted(path.name for path in whole.iterdir()), *(f"../{ROWS}/{s.name}" for s in read_checkpoint(whole).segments)]
    assert len(files) >= 3 + 3  # manifest, model, state; a segment for each checkpoint that added rows
    rng = np.random.default_rng(0)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints, copy)
    for name in files:
        path = copy / whole.name / name
        content, size = path.read_bytes(), path.stat().st_size
        cuts = {0, 1, size // 2, size - 1, *rng.integers(0, size, 20).tolist()}
        for offset in sorted(cuts):
            for flip in (False, True):
                if flip and name == "manifest.json" and chr(content[offset]).isspace():
                    continue  # it says the same then
                damage(path, offset, flip)
                with pytest.raises(BrokenCheckpointError, match=Path(name).name.replace(".", r"\.")):
                    read_checkpoint(copy / whole.name)
                path.write_bytes(content)
                n_damages += 1
        path.unlink()
        with pytest.raises(BrokenCheckpointError, match="No such file"):
            read_checkpoint(copy / whole.name)
        path.write_bytes(content)
    assert n_damages > 200
    read_checkpoint(copy / whole.name)


def test_broken_checkpoints_are_skipped(checkpoints, tmp_path):
    expected = fingerprint(learn(tmp_path / "whole", 90))
    shutil.copytree(checkpoints, tmp_path / "broken")
    newest, middle = find(tmp_path / "broken")[:0:-1]
    damage(newest / "state.pth", 100, flip=True)
    (middle / "manifest.json").write_text("{")
    with pytest.warns(UserWarning) as caught:
        model = learn(tmp_path / "broken", 90)
    messages = [message for warning in caught if (message := str(warning.message)).startswith("skipping")]
    assert [newest.name in messages[0], "state.pth: its checksum is wrong" in messages[0]] == [True, True]
    assert "manifest.json: it is no whole manifest" in messages[1] and len(messages) == 2
    # From 30 instead of 60 steps, to the same end
    assert differences(expected, fingerprint(model)) == []
    assert model.last_checkpoint == str(find(tmp_path / "broken")[-1])
    read_checkpoint(Path(model.last_checkpoint))


def test_no_whole_checkpoint_is_an_error(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "broken")
    for path in find(tmp_path / "broken"):
        (path / "model.zip").unlink()
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(ValueError, match=r"where all are broken .*model\.zip"):
        learn(tmp_path / "broken", 90)
    assert len(find(tmp_path / "broken")) == 3


def test_another_format_is_skipped(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "newer")
    manifest = find(tmp_path / "newer")[-1] / "manifest.json"
    content = json.loads(manifest.read_text())["content"]
    content["format"] += 1
    manifest.write_text(json.dumps({"content": content, "sha256": checkpoint_store._digest(content)}))
    with pytest.warns(UserWarning, match="it has format 2, this version of sb3_mtrl reads format 1"):
        assert learn(tmp_path / "newer", 75).num_timesteps == 75


def test_nothing_is_deleted_while_a_manifest_cannot_be_read(checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints, folder)
    before = sorted(folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store, "FORMAT", 2)
        with (
            pytest.warns(UserWarning, match="skipping"),
            pytest.raises(ValueError, match=r"where all are broken .*has format 1"),
        ):
            learn(folder, 90)
    assert sorted(folder.rglob("*")) == before
    # Neither does a training delete rows that goes on from an older checkpoint, with the newest one out of reach
    newest = find(folder)[-1]
    manifest = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text("")
    segments = set((folder / ROWS).iterdir())
    with pytest.warns(UserWarning, match="skipping"):
        learn(folder, 75)
    assert [path.name[18:] for path in find(folder)] == ["30_steps", "45_steps", "60_steps", "60_steps", "75_steps"][1:]
    assert segments < set((folder / ROWS).iterdir())
    (newest / "manifest.json").write_text(manifest)
    assert learn(tmp_path / "back", 75, resume=newest).num_timesteps == 75
    read_checkpoint(newest)


def test_files_of_others_are_left_alone(checkpoints, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints, folder)
    others = [
        folder / ROWS / "notes.csv",
        folder / ROWS / "1.f32",
        folder / ".writing_a_thesis",
        folder / "rows" / "000001.f32",
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / ROWS / "segment_000099.f32").mkdir()
    learn(folder, 75)
    assert all(path.exists() for path in others) and (folder / ROWS / "segment_000099.f32").is_dir()
    # A folder that is refused is not touched at all
    (folder / ROWS / "segment_000098.f32").touch()
    with pytest.raises(ValueError, match="without checkpoints with resume=None"):
        learn(folder, 90, resume=None)
    assert (folder / ROWS / "segment_000098.f32").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(algorithm=PaCoSAC), "algorithm STARSSAC instead of PaCoSAC"),
        (dict(env=make_env(n_envs=2)), "n_envs 3 instead of 2"),
        (dict(env=make_env(2), batch_size=16), r"tasks \['point-0', 'point-1', 'point-2'\] instead of"),
        (dict(n_param_sets=3), "parameters {.* instead of {"),
        (dict(buffer_size=300), r"replay_buffer \['TaskPrioritizedReplayBuffer', 999999\] instead of"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(checkpoints, tmp_path, kwargs, message):
    shutil.copytree(checkpoints, tmp_path / "copy")
    with pytest.raises(ValueError, match=rf"_60_steps is of another training: it has .*{message}"):
        learn(tmp_path / "copy", 90, **kwargs)


def test_other_settings_and_versions_are_named(checkpoints, tmp_path, monkeypatch):
    shutil.copytree(checkpoints, tmp_path / "copy")
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.warns(UserWarning) as caught:
        model = learn(tmp_path / "copy", 66, learning_rate=0.5)
    messages = " / ".join(str(warning.message) for warning in caught)
    assert "the training goes on with learning_rate=0.5 (before: 0.0003)" in messages
    assert "(now 1.0): training goes on from it, but it may round otherwise" in messages
    assert model.actor.optimizer.param_groups[0]["lr"] == 0.5


def test_settings_that_are_no_numbers_are_named_too(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "copy")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn(tmp_path / "copy", 66)
    assert not [warning for warning in caught if "goes on with" in str(warning.message)]
    message = (
        r"goes on with .*replay_buffer_kwargs=\{.*'alpha': 0.3.*train_freq=TrainFreq\(frequency=4.* \(before: .*frequency=1"
    )
    with pytest.warns(UserWarning, match=message):
        learn(tmp_path / "copy", 90, train_freq=4, replay_buffer_kwargs=dict(alpha=0.3))


def test_arguments_of_callbacks_are_those_of_the_program(tmp_path):
    def run(total, n_eval_episodes, window_size, log_path=None):
        model = make_model(MTSAC, env=monitored_env(), learning_starts=20)
        evaluation = MultiTaskEvalCallback(
            monitored_env(), n_eval_episodes=n_eval_episodes, eval_freq=7, verbose=0, log_path=log_path
        )
        success = TaskSuccessCallback(window_size)
        checkpoints = MultiTaskCheckpointCallback(5, tmp_path / f"checkpoints {log_path}", resume="auto")
        model.learn(total, callback=[checkpoints, evaluation, success])
        return evaluation, success

    run(90, 3, 2)
    evaluation, success = run(300, 7, 9)
    assert evaluation.n_eval_episodes_per_task == 3 and len(evaluation.last_evaluation.rewards) == 9  # of three tasks
    # Two episodes of each from before; 70 more steps of each hold nine new ones
    assert [len(window) for window in success._rewards] == [9] * NUM_TASKS


def test_evaluations_of_another_size_do_not_go_into_the_same_file(tmp_path):
    def run(total, n_eval_episodes):
        model = make_model(MTSAC, env=monitored_env(), learning_starts=20)
        evaluation = MultiTaskEvalCallback(
            monitored_env(), n_eval_episodes=n_eval_episodes, eval_freq=7, verbose=0, log_path=str(tmp_path / "log")
        )
        model.learn(total, callback=[MultiTaskCheckpointCallback(5, tmp_path, resume="auto"), evaluation])

    run(60, 3)
    with pytest.raises(ValueError, match=r"n_eval_episodes must stay 3, .* so far, .* got 6"):
        run(90, 6)
    run(90, 2)  # rounded up to three


def test_resume_takes_none_and_a_path(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"without checkpoints with resume=None, got .* holds checkpoint_000004_60_steps"):
        learn(checkpoints, 90, resume=None)
    middle = find(checkpoints)[1]
    model = learn(tmp_path / "other", 90, resume=middle)
    # All rows were written there, none is missing
    expected = fingerprint(learn(tmp_path / "whole", 90))
    assert differences(expected, fingerprint(model)) == []
    read_checkpoint(find(tmp_path / "other")[-1])
    assert [path.name[-8:] for path in find(checkpoints)] == ["30_steps", "45_steps", "60_steps"]
    # A restart would begin there again, beside what came of it
    with pytest.raises(ValueError, match=r"without checkpoints where resume=.*_45_steps' lies elsewhere, got .*/other, which"):
        learn(tmp_path / "other", 90, resume=middle)
    with pytest.raises(BrokenCheckpointError, match=r"nowhere/manifest.json: No such file"):
        learn(tmp_path / "third", 90, resume=tmp_path / "nowhere")


def test_the_branch_that_was_given_up_goes_in_its_turn(checkpoints, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints, folder)
    learn(folder, 60, resume=find(folder)[0])
    # 2, 3 and 4 had 30, 45 and 60 steps; 45 and 60 came again
    assert [path.name for path in find(folder)] == [
        "checkpoint_000004_60_steps",
        "checkpoint_000005_45_steps",
        "checkpoint_000006_60_steps",
    ]
    learn(folder, 75, resume=find(folder)[-1])
    assert [path.name[11:17] for path in find(folder)] == ["000005", "000006", "000007"]
    used = {segment.name for path in find(folder) for segment in read_checkpoint(path).segments}
    assert {path.name for path in (folder / ROWS).iterdir()} == used


def test_bad_arguments(tmp_path):
    for name in ("save_freq", "keep"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MultiTaskCheckpointCallback(**{"save_freq": 5, "save_path": tmp_path, name: 0})
    with pytest.raises(ValueError, match="resume must be 'auto', a folder or None, got True"):
        MultiTaskCheckpointCallback(5, tmp_path, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"save_path must be a folder that can be written to, got .*file/below"):
        MultiTaskCheckpointCallback(5, tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="is for MTSAC and its subclasses, got a model of SAC"):
        SAC("MlpPolicy", "Pendulum-v1", device="cpu").learn(5, callback=MultiTaskCheckpointCallback(5, tmp_path / "sac"))


# ------------------------------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("where", ["_get_state", "_model_bytes"])
def test_too_little_memory_costs_only_checkpoints(where, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    model, callback = make_model(MTSAC, learning_starts=20), MultiTaskCheckpointCallback(5, tmp_path)
    model.learn(30, callback=callback)
    with monkeypatch.context() as patch:
        if where == "_get_state":
            patch.setattr(callback, "_get_state", fail)
        else:
            patch.setattr(checkpoint, "_model_bytes", fail)
        with pytest.warns(
            UserWarning, match=r"at 45 steps cannot be written to .* \(MemoryError\); the last one is .*_30_steps"
        ):
            model.learn(18, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == 48 and len(find(tmp_path)) == 2 and not list(tmp_path.glob(".[wr]*"))
    model.learn(12, callback=callback, reset_num_timesteps=False)
    assert read_checkpoint(find(tmp_path)[-1]).timesteps == 60


def test_a_state_that_can_no_longer_be_taken_is_said_once(tmp_path):
    class Lock(BaseCallback):
        """From some time on the environments hold what cannot be pickled."""

        def _on_step(self) -> bool:
            if self.num_timesteps == 30:
                for env in self.training_env.unwrapped.envs:
                    env.unwrapped.lock = threading.Lock()
            return True

    model = make_model(MTSAC, learning_starts=20)
    with pytest.warns(UserWarning) as caught:
        model.learn(75, callback=[Lock(), MultiTaskCheckpointCallback(5, tmp_path)])
    assert sum("cannot hold the state of the training environment" in str(warning.message) for warning in caught) == 1


@pytest.mark.filterwarnings("ignore:the checkpoint at .* cannot be written", "ignore:the checkpoint holds something of")
def test_a_limit_of_the_system_on_files_costs_only_checkpoints(tmp_path):
    class LimitFiles(BaseCallback):
        """From 90 steps on the system lets no file grow beyond 1 kB."""

        def _on_step(self) -> bool:
            if self.num_timesteps == 90:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            return True

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = make_model(PaCoSAC, learning_starts=20)
    try:
        with pytest.warns(
            UserWarning, match="at 105 steps cannot be written .*File too large.*the last one is .*_75_steps.*goes on"
        ):
            model.learn(120, callback=[LimitFiles(), MultiTaskCheckpointCallback(5, tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert model.num_timesteps == 120
    assert [path.name[18:] for path in find(tmp_path)] == ["45_steps", "60_steps", "75_steps"]
    assert not list(tmp_path.glob(".[wr]*")) and model.last_checkpoint == str(find(tmp_path)[-1])
    for path in find(tmp_path):
        read_checkpoint(path)
    # What was unwritten is written with the next checkpoint: it ends like a training without a limit
    resumed = make_model(PaCoSAC, learning_starts=20)
    resumed.learn(120, callback=MultiTaskCheckpointCallback(5, tmp_path, resume="auto"))
    assert differences(fingerprint(model), fingerprint(resumed)) == []


def test_a_failure_at_any_write_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    model = learn(tmp_path, 60)
    store = CheckpointStore(tmp_path, 3)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    write = checkpoint_store.HashingFile.write
    n_failures = 0
    while True:
        n_writes = 0

        def failing_write(file, data, fails_at=n_failures):
            nonlocal n_writes
            n_writes += 1
            if n_writes > fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_store.HashingFile, "write", failing_write)
            try:
                store.write(
                    99, {}, {"a": lambda file: file.write(b"a"), "b": lambda file: file.write(b"b")}, model.replay_buffer
                )
                break
            except OSError:
                n_failures += 1
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert n_failures == NUM_TASKS + 3  # the rows of each task, two files, the manifest
    read_checkpoint(find(tmp_path)[-1])


# ------------------------------------------------------------------------------------------------------------------ rows


def make_buffer(capacity, buffer_class=MultiTaskReplayBuffer, n_envs=4):
    env = make_env()
    return buffer_class(
        capacity * NUM_TASKS, env.observation_space, env.action_space, "cpu", n_envs=n_envs, num_tasks=NUM_TASKS
    )


def add_rows(buffer, tasks, rng):
    n = len(tasks)
    obs = np.concatenate([rng.normal(size=(n, 4)), np.eye(NUM_TASKS)[tasks]], axis=1)
    buffer.add(obs, obs, rng.normal(size=(n, 2)), rng.normal(size=n), np.zeros(n), [{}] * n)


def assert_rows_come_back(buffer, checkpoint, make):
    copy = make()
    copy.set_checkpoint_state(buffer.get_checkpoint_state())
    checkpoint.load_rows(copy)
    for task, (start, end) in enumerate(buffer.row_numbers().tolist()):
        blocks = zip(buffer.row_blocks(task, start, end), copy.row_blocks(task, start, end), strict=True)
        assert all(np.array_equal(one, other) for one, other in blocks)
    return copy


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in (folder / ROWS).iterdir())


@pytest.mark.parametrize("compacts", [False, True])
@pytest.mark.parametrize("buffer_class", [MultiTaskReplayBuffer, TaskPrioritizedReplayBuffer])
def test_rows_are_written_once_and_come_back(buffer_class, compacts, tmp_path, monkeypatch):
    # Random numbers of rows between checkpoints, up to several rounds of a ring of 11; expected is what the buffer holds
    if not compacts:
        monkeypatch.setattr(checkpoint_store, "MAX_BYTES_PER_HELD", NEVER)
    rng = np.random.default_rng(0)

    def make():
        return make_buffer(11, buffer_class)

    buffer, store = make(), CheckpointStore(tmp_path, 2)
    row_bytes = buffer._rows.itemsize * buffer._rows.shape[1]
    n_rows, n_rows_before = np.zeros(NUM_TASKS, dtype=int), np.zeros(NUM_TASKS, dtype=int)
    names = {"pos", "full", "_laps", "refused"}
    n_new_segments, n_compacted = 0, 0
    for n_adds in [0, 1, 0, 3, 9, 2, *rng.integers(0, 14, 30)]:
        for _ in range(n_adds):
            tasks = rng.integers(NUM_TASKS, size=4)
            add_rows(buffer, tasks, rng)
            n_rows += np.bincount(tasks, minlength=NUM_TASKS)
        n_held = np.minimum(n_rows, 11)
        if n_adds == 9 and buffer_class is MultiTaskReplayBuffer:
            buffer.reset()
            n_rows = buffer.row_numbers()[:, 1].copy()
            n_held = np.zeros(NUM_TASKS, dtype=int)
            n_rows_at_reset = n_rows.copy()
        elif buffer_class is MultiTaskReplayBuffer and "n_rows_at_reset" in locals():
            n_held = np.minimum(n_rows - n_rows_at_reset, 11)
        assert buffer.row_numbers()[:, 1].tolist() == n_rows.tolist()
        n_expected = np.minimum(n_rows - n_rows_before, n_held).sum()  # new, and not overwritten since
        n_rows_before = n_rows.copy()
        segments_before = {path.name for path in (tmp_path / ROWS).iterdir()}
        checkpoint = read_checkpoint(store.write(0, {}, {}, buffer))
        new = [segment for segment in checkpoint.segments if segment.name not in segments_before]
        n_written = sum(segment.entry.n_bytes for segment in new) / row_bytes
        n_new_segments += len(new)
        if compacts and n_written != n_expected:
            assert n_written == n_held.sum() and checkpoint.segments == new
            n_compacted += 1
        else:
            assert n_written == n_expected and len(new) == (n_expected > 0)
        copy = assert_rows_come_back(buffer, checkpoint, make)
        for name in names:
            assert np.array_equal(getattr(copy, name), getattr(buffer, name))
        if buffer_class is TaskPrioritizedReplayBuffer:
            for name in ("highest_priorities", "success_rates"):
                assert np.array_equal(getattr(copy, name), getattr(buffer, name), equal_nan=True)
            assert copy.beta == buffer.beta and np.array_equal(copy._tree.nodes, buffer._tree.nodes)
    assert n_new_segments > 20 and (0 < n_compacted < n_new_segments) == compacts
    # Only what the two checkpoints that are kept refer to is left
    used = {segment.name for path in store.find() for segment in read_checkpoint(path).segments}
    assert {path.name for path in (tmp_path / ROWS).iterdir()} == used and len(store.find()) == 2


def test_rows_of_tasks_that_come_alike_are_never_written_twice(tmp_path):
    # Two rows of each task a checkpoint in rings of 60: full after 30 of them, and 31 segments from then on
    rng = np.random.default_rng(0)
    buffer, store = make_buffer(60, n_envs=NUM_TASKS), CheckpointStore(tmp_path, 1)
    row_bytes = buffer._rows.itemsize * buffer._rows.shape[1]
    for _ in range(70):
        for _ in range(2):
            add_rows(buffer, np.arange(NUM_TASKS), rng)
        segments = read_checkpoint(store.write(0, {}, {}, buffer)).segments
        assert segments[-1].entry.n_bytes == 2 * NUM_TASKS * row_bytes
    assert len(segments) == 30
    assert bytes_on_disk(tmp_path) == buffer._rows.nbytes


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("rate", ["slow", "stopped", "none"])
def test_the_disk_holds_no_more_than_some_rings(rate, keep, tmp_path):
    # Task 0 comes nearly always; the others at a rate of 1/50, or only in the first 40 steps, or never. Without compaction
    # the files grow to several times the rings
    rng = np.random.default_rng(0)

    def make():
        return make_buffer(100, n_envs=1)

    buffer, store = make(), CheckpointStore(tmp_path, keep)
    n_steps, n_segments, ratios = 0, [], []
    for _ in range(150):
        for _ in range(15):
            n_steps += 1
            is_other = {"slow": n_steps % 50 == 0, "stopped": n_steps < 40, "none": False}[rate]
            add_rows(buffer, [n_steps // 50 % 2 + 1 if is_other else 0], rng)
        checkpoint = read_checkpoint(store.write(n_steps, {}, {}, buffer))
        n_segments.append(len(checkpoint.segments))
        row_bytes = buffer._rows.itemsize * buffer._rows.shape[1]
        if rate != "slow":  # old rows of task 0 go with their segments
            assert checkpoint.segments[-1].entry.n_bytes == 15 * row_bytes
        n_held_bytes = buffer.sizes().sum() * row_bytes
        named = {segment.name: segment.entry.n_bytes for segment in checkpoint.segments}
        assert sum(named.values()) <= 1.5 * n_held_bytes
        ratios.append(bytes_on_disk(tmp_path) / n_held_bytes)
    assert max(ratios) <= (1.5 if keep == 1 else 2.5 + 2 * 15 / 100)  # rows that came while two older ones were kept
    assert max(n_segments) > 3
    assert_rows_come_back(buffer, checkpoint, make)
    for path in store.find():
        read_checkpoint(path)


def test_many_small_segments_become_one(tmp_path):
    rng = np.random.default_rng(0)
    buffer, store = make_buffer(200, n_envs=1), CheckpointStore(tmp_path, 1)
    n_segments = []
    for _ in range(140):
        add_rows(buffer, [0], rng)
        checkpoint = read_checkpoint(store.write(0, {}, {}, buffer))
        n_segments.append(len(checkpoint.segments))
    assert n_segments[:66] == [*range(1, 65), 1, 2] and max(n_segments) == 64
    assert_rows_come_back(buffer, checkpoint, lambda: make_buffer(200, n_envs=1))


def test_a_kill_at_any_moment_of_a_compaction_loses_nothing(tmp_path, monkeypatch):
    """Whatever the last thing was that reached the disk: all checkpoints that are seen are whole."""

    class Kill(BaseException):
        """What no code cleans up after."""

    rng = np.random.default_rng(0)
    buffer, store = make_buffer(40, n_envs=1), CheckpointStore(tmp_path / "folder", 2)
    row_bytes = buffer._rows.itemsize * buffer._rows.shape[1]
    # 30 rows of task 0 and 10 of task 1, which stay; then 10 of task 0 each time. The fifth checkpoint would need files with
    # 40 + 4 * 10 rows for the 40 + 10 that are held
    for tasks in ([0] * 30 + [1] * 10, [0] * 10, [0] * 10, [0] * 10):
        for task in tasks:
            add_rows(buffer, [task], rng)
        store.write(0, {}, {}, buffer)
    for _ in range(10):
        add_rows(buffer, [0], rng)
    assert len(read_checkpoint(store.find()[-1]).segments) == 4
    n_calls = kill_at = 0

    def killing(function):
        def call(*args, **kwargs):
            nonlocal n_calls
            n_calls += 1
            if n_calls > kill_at:
                raise Kill  # and so does all that would clean up
            return function(*args, **kwargs)

        return call

    calls = [(os, "fsync"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")]
    n_kills = 0
    for kill_at in range(99):
        copy = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "folder", copy)
        victim = CheckpointStore(copy, 2)
        victim.go_on_from(read_checkpoint(victim.find()[-1]), buffer)
        n_calls = 0
        with monkeypatch.context() as patch:
            for owner, name in calls:
                patch.setattr(owner, name, killing(getattr(owner, name)))
            try:
                path = victim.write(99, {}, {"a": lambda file: file.write(b"a")}, buffer)
            except Kill:
                path = None
        n_kills += path is None
        survivors = CheckpointStore(copy, 2)
        assert len(survivors.find()) >= 2
        for found in survivors.find():
            read_checkpoint(found)
        survivors.clean_up()
        for found in survivors.find():
            read_checkpoint(found)
        if path is not None:
            break
    assert n_kills > 8 and path is not None
    (segment,) = read_checkpoint(path).segments
    assert segment.entry.n_bytes == 50 * row_bytes


def test_what_a_crash_left_behind_is_removed(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "copy")
    (tmp_path / "copy" / ".writing_5").mkdir()
    (tmp_path / "copy" / ".writing_5" / "model.zip").touch()
    (tmp_path / "copy" / ".removed_checkpoint_000001_15_steps").mkdir()
    (tmp_path / "copy" / ROWS / "segment_000005.f32").touch()
    before = sorted(path.relative_to(checkpoints) for path in checkpoints.rglob("*"))
    assert learn(tmp_path / "copy", 60).num_timesteps == 60  # it had come to its end
    assert sorted(path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*")) == before


def test_two_processes_in_one_folder_are_refused(tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="save_path must be a folder that no other process trains in"):
            learn(tmp_path, 30)
        process.communicate("\n")
    assert learn(tmp_path, 30).num_timesteps == 30


# ------------------------------------------------------------------------------------------------- callbacks and processes


def test_generators_of_another_device_start_anew():
    """The state of one of a GPU has 16 bytes."""
    callback = WResetCallback()
    callback.generator = th.Generator().manual_seed(5)
    resuming = SimpleNamespace(_callbacks=lambda: [callback])
    with pytest.warns(UserWarning, match="starts anew from its seed"):
        MultiTaskCheckpointCallback._restore_callbacks(
            resuming, [("WResetCallback", {"generator": th.zeros(16, dtype=th.uint8), "verbose": 3})]
        )
    assert callback.verbose == 3
    assert th.equal(callback.generator.get_state(), th.Generator().manual_seed(5).get_state())


def test_state_of_callbacks(tmp_path):
    """Guards with generators, windows and files; each goes on, and only what belongs to the process is new."""

    def make(*others):
        maskout, reset = LossMaskoutCallback(0.0, "critic"), WResetCallback()
        files = ProgressFileCallback(str(tmp_path / "progress"))
        return [files, TaskSuccessCallback(), *others, maskout, reset]

    def run(total, callbacks):
        model = make_model(PaCoSAC, env=monitored_env(), learning_starts=20, seed=None)
        checkpoint = MultiTaskCheckpointCallback(5, tmp_path / "checkpoints", resume="auto")
        model.learn(total, callback=[*callbacks, checkpoint], log_interval=3)
        return model, callbacks

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all of the last")
        first_model, first = run(60, make())
        second_model, second = run(60, make(ProgressBarCallback()))
    assert second_model._n_updates == first_model._n_updates > 0
    assert second[1]._rewards == first[1]._rewards and any(second[1]._rewards)
    assert th.equal(second[-1].generator_state, first[-1].generator_state)
    assert th.equal(second[-1].generator.get_state(), first[-1].generator.get_state())
    assert second_model.dropped_updates.tolist() == first_model.dropped_updates.tolist()
    assert second_model.logger.name_to_value.keys() == first_model.logger.name_to_value.keys()
    # A file of its own for what comes after the checkpoint
    assert sorted(path.name for path in (tmp_path / "progress").iterdir()) == ["progress.csv", "progress_60.csv"]


def test_other_callbacks_than_before_are_named(tmp_path):
    learn(tmp_path, 60)
    model = make_model(STARSSAC, learning_starts=20, policy_kwargs=dict(net_arch=[4]))
    callbacks = [MultiTaskCheckpointCallback(5, tmp_path, resume="auto"), TaskSuccessCallback()]
    message = "holds nothing of TaskSuccessCallback, and something of CrashAt, which is not here: other callbacks than before"
    with pytest.warns(UserWarning, match=message):
        model.learn(90, callback=callbacks)


def test_monitor_files_go_on_without_the_rows_that_come_again(tmp_path):
    def run(crash_at=NEVER, append=True):
        env = DummyVecEnv([lambda: Monitor(PointTasksEnv(1, horizon=5), str(tmp_path / "0"), override_existing=not append)])
        model = MTSAC("MlpPolicy", env, seed=0, device="cpu", policy_kwargs=dict(net_arch=[4]), learning_starts=1000)
        callbacks = [MultiTaskCheckpointCallback(12, tmp_path / "checkpoints", resume="auto"), CrashAt(crash_at)]
        with contextlib.suppress(Crash):
            model.learn(60, callback=callbacks)
        env.close()
        return (tmp_path / "0.monitor.csv").read_text().splitlines()

    crashed = run(crash_at=23, append=False)
    assert len(crashed) == 2 + 4  # header, and the episodes that end at 5, 10, 15 and 20
    whole = run()
    assert len(whole) == 2 + 12 and whole[:4] == crashed[:4]
    # The rewards of 15 and 20, after the checkpoint at 12, came again
    assert [row.split(",")[0] for row in whole[4:6]] == [row.split(",")[0] for row in crashed[4:6]]


def test_products_are_computed_as_before_the_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_tuning, "_choice", None)
    own_choice = cpu_tuning.uses_onednn()
    learn(tmp_path, 30)
    # The probe of another day, when the processor was busy, might decide otherwise
    other = cpu_tuning.MatmulProbe(speedup=9.0 if not own_choice else 0.1, error=0.0)
    monkeypatch.setattr(cpu_tuning, "onednn_probe", lambda: other)
    assert cpu_tuning.uses_onednn() is not own_choice
    learn(tmp_path, 60, verbose=1)
    assert cpu_tuning.uses_onednn() is own_choice
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU tuning"))
    by_onednn = "products by oneDNN" if own_choice else "products as they are, not by oneDNN"
    assert f"{by_onednn}, as the checkpoint says ({other.speedup:.2f} times as fast" in line
    # It is not only said so
    entered = []
    monkeypatch.setattr(cpu_tuning, "_onednn_matmul", lambda: contextlib.nullcontext(entered.append(True)))
    monkeypatch.setattr(cpu_tuning, "_matmul_backend", lambda: th.backends.mkldnn)
    with cpu_tuning.fast_matmul():
        assert bool(entered) is own_choice


def test_a_training_that_a_callback_stops_keeps_its_last_whole_checkpoint(tmp_path):
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 51

    model = make_model(MTSAC, learning_starts=20)
    model.learn(90, callback=[MultiTaskCheckpointCallback(5, tmp_path), Stop()])
    # SB3 stops it before the transition is stored; 45 is the last point at which all was
    assert model.last_checkpoint.endswith("_45_steps") and len(find(tmp_path)) == 3


@pytest.mark.parametrize("total", [90, 51])
def test_an_interrupted_update_is_not_published(total, tmp_path, monkeypatch):
    model, callback = make_model(MTSAC, learning_starts=20), MultiTaskCheckpointCallback(5, tmp_path)
    update_targets = MTSAC._update_target_networks

    def interrupt(self):
        if self.num_timesteps >= 51:
            raise KeyboardInterrupt
        update_targets(self)

    monkeypatch.setattr(MTSAC, "_update_target_networks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(total, callback=callback)
    callback.on_training_end()  # as RL Zoo does, also when the interrupt came in the last update of all
    assert model.num_timesteps == 51 and model.last_checkpoint.endswith("_45_steps")
    assert find(tmp_path)[-1].name.endswith("_45_steps")


def test_an_interrupt_after_the_rename_costs_no_rows(tmp_path, monkeypatch):
    buffer, store = make_buffer(11, n_envs=1), CheckpointStore(tmp_path, 3)
    add_rows(buffer, [0], np.random.default_rng(0))
    rename = Path.rename

    def rename_and_interrupt(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.write(1, {}, {}, buffer)
    (path,) = store.find()
    assert len(read_checkpoint(path).segments) == 1
    read_checkpoint(store.write(2, {}, {}, buffer))
    read_checkpoint(path)


def test_learning_on_in_the_same_process(tmp_path):
    model, callback = make_model(MTSAC, learning_starts=20), MultiTaskCheckpointCallback(5, tmp_path, keep=9)
    model.learn(30, callback=callback)
    model.learn(30, callback=callback, reset_num_timesteps=False)
    assert [path.name[18:] for path in find(tmp_path)] == ["15_steps", "30_steps", "45_steps", "60_steps"]
    resumed = make_model(MTSAC, learning_starts=20)
    resumed.learn(60, callback=MultiTaskCheckpointCallback(5, tmp_path, resume="auto"))
    assert resumed._n_updates == model._n_updates and resumed.replay_buffer.size() == 60


def test_shared_memory_environments_say_what_has_no_state():
    env = SharedMemoryVecEnv([UnpicklableEnv], n_workers=1)
    try:
        assert "cannot be pickled" in get_vec_env_state(env)["reason"]
    finally:
        env.close()
    env = SubprocVecEnv([PointTasksEnv])
    try:
        assert "need get_checkpoint_state" in get_vec_env_state(env)["reason"]
    finally:
        env.close()
