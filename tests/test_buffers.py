"""MultiTaskReplayBuffer: routing, rings, balance, time limits, extra columns, saving."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize
from tests.tiny_envs import PointTasksEnv

BASE_DIM = 2


def make_buffer(num_tasks: int = 3, buffer_size: int = 12, n_envs: int = 1, **kwargs) -> MultiTaskReplayBuffer:
    observation_space = spaces.Box(-np.inf, np.inf, (BASE_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    return MultiTaskReplayBuffer(
        buffer_size, observation_space, action_space, device="cpu", n_envs=n_envs, num_tasks=num_tasks, **kwargs
    )


def observations(tasks: list[int], values: list[float], num_tasks: int = 3) -> np.ndarray:
    """Observations whose base entries are (value, task), so that a row can be traced back."""
    base = np.stack([np.asarray(values, dtype=np.float64), np.asarray(tasks, dtype=np.float64)], axis=1)
    return np.concatenate([base, np.eye(num_tasks)[tasks]], axis=1).astype(np.float32)


def add(buffer: MultiTaskReplayBuffer, tasks: list[int], values: list[float], dones=None, infos=None, **kwargs) -> None:
    n = len(tasks)
    obs = observations(tasks, values, buffer.num_tasks)
    next_obs = observations(tasks, [value + 0.5 for value in values], buffer.num_tasks)
    buffer.add(
        obs,
        next_obs,
        action=np.full((n, 1), 0.25, np.float32),
        reward=np.asarray(values) * 10,
        done=np.zeros(n, bool) if dones is None else np.asarray(dones),
        infos=infos or [{}] * n,
        **kwargs,
    )


def test_rows_go_to_the_ring_of_the_task_in_the_observation():
    buffer = make_buffer(n_envs=2)
    # Sub-environment 0 plays tasks 2, 0 and sub-environment 1 plays tasks 0, 0: the position of the env does not matter
    add(buffer, [2, 0], [1.0, 2.0])
    add(buffer, [0, 0], [3.0, 4.0])
    assert buffer.sizes().tolist() == [3, 0, 1]
    assert buffer.size() == 4
    np.random.seed(0)
    batch = buffer.sample(300)
    task_of_row = batch.observations[:, 1].numpy()
    one_hot_task = batch.observations[:, BASE_DIM:].argmax(1).numpy()
    assert np.array_equal(task_of_row, one_hot_task)
    values = {task: set(batch.observations[task_of_row == task, 0].tolist()) for task in (0, 2)}
    assert values == {0: {2.0, 3.0, 4.0}, 2: {1.0}}
    # Every field belongs to the same transition
    assert th.equal(batch.next_observations[:, 0], batch.observations[:, 0] + 0.5)
    assert th.equal(batch.next_observations[:, BASE_DIM:], batch.observations[:, BASE_DIM:])
    assert th.equal(batch.rewards[:, 0], batch.observations[:, 0] * 10)
    assert th.all(batch.actions == 0.25)


def test_batches_are_balanced_and_task_major():
    buffer = make_buffer(n_envs=3, buffer_size=300)
    for step in range(50):
        add(buffer, [0, 1, 2], [step] * 3)
    batch = buffer.sample(12)
    assert batch.group_tasks.tolist() == [0, 1, 2]
    assert batch.observations[:, 1].view(3, 4).tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    assert [tuple(tensor.shape) for tensor in batch[:5]] == [(12, 5), (12, 1), (12, 5), (12, 1), (12, 1)]
    assert all(tensor.dtype == th.float32 for tensor in batch[:5])


def test_draws_are_uniform_over_a_ring():
    buffer = make_buffer(num_tasks=2, buffer_size=10)
    for value in range(5):
        add(buffer, [0], [value])
        add(buffer, [1], [value])
    np.random.seed(1)
    values = buffer.sample(2 * 20_000).observations[:, 0].view(2, -1)
    for task_values in values:
        counts = np.bincount(task_values.int().numpy(), minlength=5)
        # Binomial(20 000, 1/5): mean 4000, standard deviation 57
        assert np.all(np.abs(counts - 4000) < 5 * 57)


def test_ring_goes_round_and_keeps_the_newest():
    buffer = make_buffer(num_tasks=2, buffer_size=6)  # 3 places each
    for value in range(5):
        add(buffer, [1], [value])
    add(buffer, [0], [9.0])
    assert buffer.full.tolist() == [False, True]
    assert buffer.pos.tolist() == [1, 2]
    batch = buffer.sample(200)
    assert set(batch.observations[100:, 0].tolist()) == {2.0, 3.0, 4.0}
    assert set(batch.observations[:100, 0].tolist()) == {9.0}


def test_sub_environments_on_one_task_wrap_together():
    buffer = make_buffer(num_tasks=1, buffer_size=4, n_envs=3)
    add(buffer, [0, 0, 0], [0.0, 1.0, 2.0])
    add(buffer, [0, 0, 0], [3.0, 4.0, 5.0])
    assert buffer.sizes().tolist() == [4]
    assert set(buffer.sample(200).observations[:, 0].tolist()) == {2.0, 3.0, 4.0, 5.0}


def test_a_task_without_data_leaves_its_group_to_the_others():
    buffer = make_buffer()
    add(buffer, [1], [7.0])
    batch = buffer.sample(6)
    assert batch.group_tasks.tolist() == [1, 1, 1]
    assert th.all(batch.observations[:, 0] == 7.0)
    assert th.equal(batch.observations[:, BASE_DIM:], th.eye(3)[[1] * 6])


@pytest.mark.parametrize("handle_timeout_termination", [True, False])
def test_time_limits_bootstrap(handle_timeout_termination):
    buffer = make_buffer(num_tasks=1, buffer_size=10, n_envs=3, handle_timeout_termination=handle_timeout_termination)
    infos = [{}, {"TimeLimit.truncated": True}, {"TimeLimit.truncated": False}]
    add(buffer, [0, 0, 0], [0.0, 1.0, 2.0], dones=[False, True, True], infos=infos)
    batch = buffer.sample(60)
    done_of_value = dict(zip(batch.observations[:, 0].tolist(), batch.dones[:, 0].tolist(), strict=True))
    assert done_of_value == {0.0: 0.0, 1.0: 0.0 if handle_timeout_termination else 1.0, 2.0: 1.0}


def test_extra_columns_come_from_infos_or_from_the_caller():
    buffer = make_buffer(num_tasks=1, buffer_size=10, extra_columns={"success": 1, "state": 2})
    for value in range(3):
        add(buffer, [0], [value], infos=[{"success": value / 2}], extras={"state": np.array([[value, -value]])})
    batch = buffer.sample(30)
    value = batch.observations[:, 0]
    assert th.equal(batch.extras["success"][:, 0], value / 2)
    assert th.equal(batch.extras["state"], th.stack([value, -value], dim=1))
    with pytest.raises(ValueError, match="'success'"):
        add(buffer, [0], [0.0], extras={"state": np.zeros((1, 2))})


def test_saved_file_holds_the_data_not_the_capacity(tmp_path):
    buffer = make_buffer(buffer_size=300_000, n_envs=2)
    for step in range(20):
        add(buffer, [step % 3, (step + 1) % 3], [step, step + 100])
    path = tmp_path / "buffer.pkl"
    save_to_pkl(path, buffer)
    assert path.stat().st_size < 20_000
    loaded = load_from_pkl(path)
    assert loaded.sizes().tolist() == buffer.sizes().tolist()
    for one in (buffer, loaded):  # goes on as the original does
        add(one, [0, 2], [7.0, 8.0])
    np.random.seed(3)
    expected = buffer.sample(60)
    np.random.seed(3)
    got = loaded.sample(60)
    assert all(th.equal(a, b) for a, b in zip(expected[:5], got[:5], strict=True))


def test_pickle_of_a_ring_that_went_round():
    buffer = make_buffer(num_tasks=2, buffer_size=6)
    for value in range(5):
        add(buffer, [1], [value])
    loaded = pickle.loads(pickle.dumps(buffer))
    assert np.array_equal(loaded._rows, buffer._rows)
    assert loaded.pos.tolist() == buffer.pos.tolist()


def test_reset_forgets():
    buffer = make_buffer()
    add(buffer, [0], [1.0])
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(3)


def test_normalised_batches_keep_the_one_hot_and_use_each_task_s_reward_scale():
    scales = [1.0, 100.0]
    venv = DummyVecEnv([lambda: PointTasksEnv(2, reward_scales=scales) for _ in range(2)])
    venv = VecTaskNormalize(VecTaskAssignment(venv), gamma=0.9)
    buffer = MultiTaskReplayBuffer(1000, venv.observation_space, venv.action_space, device="cpu", n_envs=2, num_tasks=2)
    venv.reset()
    original = venv.get_original_obs()
    rng = np.random.default_rng(0)
    for _ in range(100):
        action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        _, _, dones, infos = venv.step(action)
        buffer.add(original, venv.get_original_obs(), action, venv.get_original_reward(), dones, infos)
        original = venv.get_original_obs()
    np.random.seed(0)
    raw = buffer.sample(200)
    np.random.seed(0)
    batch = buffer.sample(200, env=venv)
    assert th.equal(batch.observations[:, -2:], raw.observations[:, -2:])
    expected_obs = venv.normalize_obs(raw.observations.numpy())
    np.testing.assert_allclose(batch.observations.numpy(), expected_obs, rtol=1e-5, atol=1e-6)
    task_ids = raw.observations[:, -2:].argmax(1).numpy()
    expected_rewards = venv.normalize_reward(raw.rewards[:, 0].numpy(), task_ids)
    np.testing.assert_allclose(batch.rewards[:, 0].numpy(), expected_rewards, rtol=1e-5)
    # The tasks differ a hundredfold in scale before, and hardly after
    spread = [batch.rewards[task_ids == task].std().item() for task in (0, 1)]
    assert 1 / 3 < spread[1] / spread[0] < 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_tasks=0), "num_tasks must be at least 1, got 0"),
        (dict(n_envs=0), "n_envs must be at least 1, got 0"),
        (dict(buffer_size=2), "buffer_size must be at least num_tasks=3, got 2"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage must be False"),
        (dict(extra_columns={"obs": 2}), "extra_columns must have other names than obs, next_obs, .*, got 'obs'"),
        (dict(extra_columns={"h": 0}), "the width of 'h' in extra_columns must be at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_buffer(**kwargs)


def test_observation_space_without_room_for_the_one_hot():
    with pytest.raises(ValueError, match="more than num_tasks=3"):
        MultiTaskReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), num_tasks=3)
    with pytest.raises(ValueError, match="must be a Box"):
        MultiTaskReplayBuffer(10, spaces.Discrete(3), spaces.Box(-1, 1, (1,)), num_tasks=3)


def test_unequal_shares_and_lost_one_hots_are_refused():
    buffer = make_buffer()
    add(buffer, [0], [0.0])
    with pytest.raises(ValueError, match=r"multiple of num_tasks=3.*got 7 \(nearest allowed: 6 or 9\)"):
        buffer.sample(7)
    with pytest.raises(ValueError, match="must be a one-hot"):
        obs = observations([0], [0.0]) * 0.5
        buffer.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    assert buffer.size() == 1


def test_one_task_without_a_one_hot_keeps_the_whole_observation():
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    buffer = MultiTaskReplayBuffer(10, observation_space, action_space, device="cpu", n_envs=2, task_in_observation=False)
    obs = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer.add(obs, obs + 10, np.zeros((2, 1)), np.array([1.0, 2.0]), np.zeros(2), [{}, {}])
    batch = buffer.sample(8)
    assert buffer.sizes().tolist() == [2]
    for row, next_row, reward in zip(batch.observations, batch.next_observations, batch.rewards, strict=True):
        th.testing.assert_close(row, th.as_tensor(obs[int(reward) - 1]))
        th.testing.assert_close(next_row, row + 10)
    # Statistics of VecNormalize are of the same three entries
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    env.obs_rms.mean, env.obs_rms.var = np.array([1.0, 2.0, 3.0]), np.full(3, 1.0 - env.epsilon)
    normalized = buffer.sample(4, env).observations
    assert all((row + th.tensor([1.0, 2.0, 3.0])).round().tolist() in obs.tolist() for row in normalized)
    with pytest.raises(ValueError, match="task_in_observation must be True with num_tasks=2, got False"):
        MultiTaskReplayBuffer(10, observation_space, action_space, num_tasks=2, task_in_observation=False)
