"""Updates while the environments step: the order of things, with and without."""

import time
from functools import partial

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper

from sb3_mtrl import MTSAC
from sb3_mtrl.common import cpu_tuning
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv, UpdateWhileStepping, VecTaskAssignment
from tests.models import ALGORITHMS, NUM_TASKS, make_env, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv


class RecordingVecEnv(VecEnvWrapper):
    """Writes down when a step begins and when it is waited for."""

    def __init__(self, venv, events: list[str]):
        super().__init__(venv)
        self.events = events

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.events.append("step")
        self.venv.step_async(actions)

    def step_wait(self):
        self.events.append("wait")
        return self.venv.step_wait()


def record_updates(monkeypatch, events: list[str]):
    """Updates write down how many transitions of each task they could sample from."""
    update = MTSAC._sequential_update

    def recorded(self, *args):
        events.append(f"update {self.replay_buffer.size() // NUM_TASKS}")
        return update(self, *args)

    monkeypatch.setattr(MTSAC, "_sequential_update", recorded)


def events_of(monkeypatch, n_steps: int, **kwargs) -> list[str]:
    events: list[str] = []
    with monkeypatch.context() as patch:
        record_updates(patch, events)
        model = make_model(env=RecordingVecEnv(make_env(), events), learning_starts=NUM_TASKS, **kwargs)
        model.learn(n_steps * NUM_TASKS)
    return events


def test_without_overlap_the_order_is_sb3s(monkeypatch):
    # The first step is the warm-up; from then on act, step, update, as SB3 does
    assert events_of(monkeypatch, 4) == [
        *("step", "wait"),
        *("step", "wait", "update 2"),
        *("step", "wait", "update 3"),
        *("step", "wait", "update 4"),
    ]


def test_with_overlap_updates_are_made_during_the_next_step(monkeypatch):
    # Each update sees what it would see in SB3's order, and none is left out at the end
    assert events_of(monkeypatch, 4, overlap=True) == [
        *("step", "wait"),
        *("step", "wait"),
        *("step", "update 2", "wait"),
        *("step", "update 3", "wait", "update 4"),
    ]


def test_several_steps_and_updates_at_a_time(monkeypatch):
    settings = dict(train_freq=2, gradient_steps=2, overlap=True)
    assert events_of(monkeypatch, 4, **settings) == [
        *("step", "wait", "step", "wait"),
        *("step", "update 2", "update 2", "wait", "step", "wait", "update 4", "update 4"),
    ]


def test_without_overlap_the_numbers_are_sb3s():
    """SB3's own loop on one task, with the same seeds."""
    models = []
    for algorithm, kwargs in ((SAC, {}), (MTSAC, {"overlap": False})):
        env = DummyVecEnv([lambda: PointTasksEnv(1)])
        model = algorithm(
            "MlpPolicy", env, seed=0, learning_starts=10, policy_kwargs=dict(net_arch=[16]), device="cpu", **kwargs
        )
        model.learn(40)
        models.append(model)
    sb3, ours = models
    assert sb3._n_updates == ours._n_updates == 30
    np.testing.assert_array_equal(sb3.replay_buffer.actions[:11], ours.replay_buffer.actions[:11])
    # After the first update up to the rounding of stacked critics
    np.testing.assert_allclose(sb3.replay_buffer.actions[:40], ours.replay_buffer.actions[:40], atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_overlap_does_what_its_documentation_says(algorithm):
    """The same by hand: act, then update on what there is, then let the environment step."""
    n_steps, learning_starts = 12, 2 * NUM_TASKS
    overlapped = make_model(algorithm, overlap=True, learning_starts=learning_starts)
    overlapped.learn(n_steps * NUM_TASKS)

    class UpdateBeforeStepping(VecEnvWrapper):
        update = staticmethod(lambda: None)

        def reset(self):
            return self.venv.reset()

        def step_async(self, actions):
            self.venv.step_async(actions)

        def step_wait(self):
            self.update()
            return self.venv.step_wait()

    env = UpdateBeforeStepping(make_env())
    by_hand = make_model(algorithm, env=env, learning_starts=learning_starts)
    train = by_hand.train
    by_hand.train = lambda **kwargs: None  # `learn` only collects
    n_waiting = 0

    def update():
        nonlocal n_waiting
        # The update that belongs to the step before this one
        if by_hand.num_timesteps > learning_starts:
            train(gradient_steps=1)
            n_waiting += 1

    env.update = update
    by_hand.learn(n_steps * NUM_TASKS)
    train(gradient_steps=1)
    assert overlapped._n_updates == by_hand._n_updates == n_waiting + 1 == n_steps - 2
    expected = parameters_of(by_hand)
    for name, tensor in parameters_of(overlapped).items():
        assert th.equal(tensor, expected[name]), name


class SlowEnv(PointTasksEnv):
    """Steps take their time."""

    def step(self, action):
        time.sleep(0.1)
        return super().step(action)


@pytest.mark.parametrize(
    ["vec_env", "env_class", "update_seconds", "expected"],
    [
        (SubprocVecEnv, SlowEnv, 0.0, 1),
        (partial(SharedMemoryVecEnv, n_workers=2), SlowEnv, 0.0, 2),
        (DummyVecEnv, SlowEnv, 0.0, 4),
        (SubprocVecEnv, PointTasksEnv, 0.1, 4),
    ],
    ids=["subproc", "shared", "no workers", "fast"],
)
def test_threads_leave_cores_to_workers_that_are_slower(monkeypatch, vec_env, env_class, update_seconds, expected):
    """Four cores: those of three (of two) workers are theirs if they step all the time."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_tuning, "available_cores", lambda: 4)
    monkeypatch.setattr(cpu_tuning, "_THREADS_AT_IMPORT", 4)
    seen = []

    def update(*args):
        seen.append(th.get_num_threads())
        time.sleep(update_seconds)

    threads_before = th.get_num_threads()
    env = VecTaskAssignment(vec_env([lambda: env_class(NUM_TASKS) for _ in range(NUM_TASKS)]))
    try:
        th.set_num_threads(4)
        model = make_model(env=env, overlap=True, learning_starts=NUM_TASKS)
        monkeypatch.setattr(model, "_sequential_update", update)
        model.learn(8 * NUM_TASKS)
        assert th.get_num_threads() == 4
    finally:
        th.set_num_threads(threads_before)
        env.close()
    # The first update does not know yet how long it takes, the last waits for no step
    assert len(seen) == 7 and seen[1:-1] == [expected] * 5 and seen[-1] == 4


def test_called_by_hand_train_updates_at_once():
    model = make_model(overlap=True, collect=30)
    model.train(2)
    assert model._n_updates == 2


class Stop(BaseCallback):
    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def _on_step(self) -> bool:
        return self.n_calls < self.after


def test_stopping_early_leaves_no_update_behind():
    model = make_model(overlap=True, learning_starts=NUM_TASKS)
    model.learn(100 * NUM_TASKS, callback=Stop(after=5))
    # Steps 2 to 4 were followed by an update; SB3 does not update after the step that a callback stops at
    assert model._n_updates == 3
    model.learn(2 * NUM_TASKS, reset_num_timesteps=False)
    assert model._n_updates == 5


def test_a_failing_update_does_not_leave_the_workers_answer_behind():
    env = SubprocVecEnv([lambda: PointTasksEnv(1)])
    try:
        env.reset()

        def fail():
            raise RuntimeError("in the update")

        stepping = UpdateWhileStepping(env, fail)
        with pytest.raises(RuntimeError, match="in the update"):
            stepping.step(np.zeros((1, 2)))
        assert env.reset().shape == (1, 5)
    finally:
        env.close()


def test_a_checkpoint_during_learning_can_be_continued(tmp_path):
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 4:
                self.model.save(tmp_path / "model")
            return True

    make_model(overlap=True, learning_starts=NUM_TASKS).learn(6 * NUM_TASKS, callback=Save())
    model = MTSAC.load(tmp_path / "model", env=make_env())
    assert model.overlap and model._n_updates == 2  # steps 2 and 3
    model.learn(6 * NUM_TASKS, reset_num_timesteps=False)
