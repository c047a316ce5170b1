import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecMonitor,
    VecNormalize,
    sync_envs_normalization,
)

from sb3_mtrl.common.vec_env import (
    SharedMemoryVecEnv,
    TaskMeanStd,
    VecTaskAssignment,
    VecTaskNormalize,
    make_multi_task_vec_env,
    split_tasks,
)
from tests.tiny_envs import PointTasksEnv

VEC_ENVS = [DummyVecEnv, SubprocVecEnv, SharedMemoryVecEnv]


def point_venv(n_envs: int = 3, seed: int = 0, **kwargs) -> VecTaskAssignment:
    return make_multi_task_vec_env(PointTasksEnv, n_envs=n_envs, seed=seed, env_kwargs=kwargs)


def random_actions(n_steps: int, n_envs: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, size=(n_steps, n_envs, dim)).astype(np.float32)


# Sharing out the tasks


@pytest.mark.parametrize(
    "num_tasks, n_envs, expected",
    [
        (10, 1, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
        (10, 4, [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
        (3, 3, [[0], [1], [2]]),
        (3, 5, [[0], [1], [2], [0], [1]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_split_tasks(num_tasks, n_envs, expected):
    assert [split_tasks(num_tasks, n_envs, index) for index in range(n_envs)] == expected


@pytest.mark.parametrize("n_envs", [1, 4, 10, 13])
def test_every_task_is_given_away(n_envs):
    shares = [split_tasks(10, n_envs, index) for index in range(n_envs)]
    assert set().union(*shares) == set(range(10))
    lengths = {len(share) for share in shares}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "args, name", [((0, 1, 0), "num_tasks"), ((2, 0, 0), "n_envs"), ((2, 2, 2), "index"), ((2, 2, -1), "index")]
)
def test_split_tasks_wrong_arguments(args, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        split_tasks(*args)


@pytest.mark.parametrize("n_envs", [1, 2, 3, 5])
def test_assignment(n_envs):
    venv = VecTaskAssignment(DummyVecEnv([lambda: PointTasksEnv(num_tasks=3, horizon=2)] * n_envs))
    visited: list[set] = [set() for _ in range(n_envs)]
    venv.seed(0)
    venv.reset()
    for actions in random_actions(12, n_envs, 2):
        for index, info in enumerate(venv.step(actions)[3]):
            visited[index].add(info["task_id"])
    assert visited == [set(split_tasks(3, n_envs, index)) for index in range(n_envs)]
    assert venv.task_assignment == [split_tasks(3, n_envs, index) for index in range(n_envs)]
    # The sub-environments can be talked to as before, also through further wrappers
    outer = VecTaskNormalize(VecMonitor(venv))
    assert outer.get_attr("num_tasks") == [3] * n_envs
    outer.env_method("set_tasks", [1], indices=[0])
    assert outer.get_attr("assigned_tasks")[0] == (1,)
    assert outer.has_attr("task_names")
    assert not outer.has_attr("no_such_thing")


@pytest.mark.parametrize("vec_env_cls", VEC_ENVS)
def test_assignment_needs_tasks(vec_env_cls):
    venv = make_vec_env("Pendulum-v1", n_envs=1, vec_env_cls=vec_env_cls)
    with pytest.raises(ValueError, match=r"set_tasks\(task_ids\)"):
        VecTaskAssignment(venv)
    # No worker was lost by asking
    assert venv.reset().shape == (1, 3)
    venv.close()


# make_multi_task_vec_env


@pytest.mark.parametrize("env_id", ["MT10", "MetaWorld-MT10-v3", "MT10-short"])
def test_make_by_name(env_id):
    venv = make_multi_task_vec_env(env_id, n_envs=10)
    assert venv.observation_space.shape == (49,)
    assert venv.get_attr("assigned_tasks") == [(task,) for task in range(10)]
    assert venv.get_attr("horizon") == [150 if "short" in env_id else 500] * 10
    assert venv.render_mode == "rgb_array"
    venv.close()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n_envs": 0}, "n_envs must be at least 1, got 0"),
        ({"env_id": "no_such_module:Env-v0"}, "env_id must be a registered environment, got 'no_such_module:Env-v0'"),
        ({"env_kwargs": {1: 2}}, "env_kwargs must be a dict from names of arguments"),
        ({"vec_env": np.ones(2)}, "vec_env must be one of 'dummy'"),
        ({"env_id": "MT11"}, "did you mean 'MetaWorld-MT1-v3'.*MetaWorld-MT50-short-v3"),
        ({"env_id": "MetaWorld-MT10-v4"}, "did you mean 'MetaWorld-MT10-v3'"),
        ({"env_id": "Pendulum-v1"}, "set_tasks"),
        ({"env_id": "MT1"}, "needs the name of its task"),
    ],
)
def test_make_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_multi_task_vec_env(**kwargs)


def test_equal_seeds_give_equal_trajectories():
    """In this process and in workers, over the ends of episodes."""
    trajectories = []
    for vec_env_cls in (DummyVecEnv, DummyVecEnv, SubprocVecEnv):
        venv = make_multi_task_vec_env("MT3", n_envs=2, seed=0, vec_env_cls=vec_env_cls, env_kwargs={"horizon": 4})
        trajectory = [venv.reset()]
        for actions in random_actions(10, 2, 4):
            obs, rewards, dones, infos = venv.step(actions)
            # SB3's DummyVecEnv returns float32, its SubprocVecEnv float64
            trajectory += [obs, rewards.astype(np.float32), dones, np.array([info["task_id"] for info in infos])]
        trajectories.append(trajectory)
        venv.close()
    for other in trajectories[1:]:
        for array, other_array in zip(trajectories[0], other, strict=True):
            np.testing.assert_array_equal(array, other_array)


class NoWorkers(SubprocVecEnv):
    def __init__(self, env_fns):
        raise InterruptedError


def test_workers_inherit_the_imports(monkeypatch):
    preloaded = []
    monkeypatch.setattr("multiprocessing.set_forkserver_preload", preloaded.extend)
    make_multi_task_vec_env(PointTasksEnv)
    assert preloaded == []
    with pytest.raises(InterruptedError):
        make_multi_task_vec_env(PointTasksEnv, vec_env_cls=NoWorkers)
    assert {"sb3_mtrl", "metaworld"} <= set(preloaded)


def test_different_seeds_give_different_goals():
    obs = [make_multi_task_vec_env("MT1", seed=seed, env_kwargs={"task": "push"}).reset() for seed in (0, 1)]
    assert not np.array_equal(obs[0][0, 36:39], obs[1][0, 36:39])


def test_monitor_file_names_task_and_success(tmp_path):
    kwargs = {"task": "reach", "horizon": 2}
    venv = make_multi_task_vec_env("MT1", n_envs=1, seed=0, monitor_dir=str(tmp_path), env_kwargs=kwargs)
    venv.reset()
    for actions in random_actions(4, 1, 4):
        infos = venv.step(actions)[3]
    assert infos[0]["episode"]["task_name"] == "reach-v3"
    venv.close()
    results = load_results(str(tmp_path))
    assert list(results["task_name"]) == ["reach-v3"] * 2
    assert list(results["is_success"]) == [False, False]
    assert list(results["l"]) == [2, 2]


# VecTaskNormalize


def test_equals_vec_normalize_where_no_task_is_named():
    venvs = [cls(make_vec_env("Pendulum-v1", n_envs=3, seed=0)) for cls in (VecNormalize, VecTaskNormalize)]
    for venv in venvs:
        venv.reset()
    for actions in random_actions(250, 3, 1):
        (obs, rewards, _, infos), (other_obs, other_rewards, _, other_infos) = (venv.step(actions) for venv in venvs)
        np.testing.assert_array_equal(obs, other_obs)
        np.testing.assert_array_equal(rewards, other_rewards)
        if "terminal_observation" in infos[0]:
            np.testing.assert_array_equal(infos[0]["terminal_observation"], other_infos[0]["terminal_observation"])
    batch = np.ones((5, 1))
    np.testing.assert_array_equal(venvs[0].normalize_reward(batch), venvs[1].normalize_reward(batch))


def test_equals_vec_normalize_with_one_task():
    """But for the one-hot, which SB3 normalises like everything else."""
    venvs = [cls(point_venv(n_envs=4, num_tasks=1, horizon=7)) for cls in (VecNormalize, VecTaskNormalize)]
    np.testing.assert_array_equal(*(venv.reset()[:, :4] for venv in venvs))
    for actions in random_actions(40, 4, 2):
        steps = [venv.step(actions) for venv in venvs]
        np.testing.assert_array_equal(*(step[0][:, :4] for step in steps))
        np.testing.assert_allclose(*(step[1] for step in steps), rtol=1e-6)
        np.testing.assert_array_equal(steps[1][0][:, 4:], 1.0)
    np.testing.assert_allclose(venvs[1].ret_rms.var, venvs[0].ret_rms.var, rtol=1e-12)
    batch = np.linspace(-1, 1, 5).reshape(5, 1)
    np.testing.assert_allclose(*(venv.normalize_reward(batch) for venv in venvs), rtol=1e-6)
    np.testing.assert_allclose(*(venv.unnormalize_reward(batch) for venv in venvs), rtol=1e-12)


def test_one_hot_is_left_alone():
    venv = VecTaskNormalize(point_venv(n_envs=2, num_tasks=3, horizon=3), clip_obs=0.5, epsilon=0.1)
    raw = venv.venv
    obs = venv.reset()
    terminal = []
    for actions in random_actions(12, 2, 2):
        np.testing.assert_array_equal(obs[:, 4:], venv.get_original_obs()[:, 4:])
        np.testing.assert_array_equal(np.sort(obs[:, 4:]), [[0, 0, 1]] * 2)
        assert np.abs(obs[:, :4]).max() <= 0.5
        obs, _, _, infos = venv.step(actions)
        terminal += [info["terminal_observation"] for info in infos if "terminal_observation" in info]
    np.testing.assert_array_equal(venv.obs_rms.mean[4:], 0)
    np.testing.assert_array_equal(venv.obs_rms.var[4:], 1)
    assert np.all(venv.obs_rms.mean[:4] != 0)
    assert len(terminal) == 8
    for terminal_obs in terminal:
        np.testing.assert_array_equal(np.sort(terminal_obs[4:]), [0, 0, 1])
        assert np.abs(terminal_obs[:4]).max() <= 0.5
    raw_obs = venv.get_original_obs()
    loose = VecTaskNormalize(raw, clip_obs=1e6)
    loose.obs_rms = venv.obs_rms.copy()
    np.testing.assert_allclose(loose.unnormalize_obs(loose.normalize_obs(raw_obs)), raw_obs, atol=1e-5)


def test_reward_statistics_are_per_task():
    """The expected statistics are those of one NumPy loop over the discounted returns of each task."""
    scales = [1.0, 30.0, 0.1]
    venv = VecTaskNormalize(point_venv(n_envs=2, num_tasks=3, horizon=5, reward_scales=scales), gamma=0.9, clip_reward=np.inf)
    venv.reset()
    returns_of_task: list[list[float]] = [[], [], []]
    returns = np.zeros(2)
    for actions in random_actions(300, 2, 2):
        tasks = venv.get_attr("task_id")  # of this step, also where the episode ends with it
        _, rewards, dones, infos = venv.step(actions)
        assert [info["task_id"] for info in infos] == tasks
        returns = 0.9 * returns + venv.get_original_reward()
        for task, value in zip(tasks, returns, strict=True):
            returns_of_task[task].append(value)
        expected = venv.get_original_reward() / np.sqrt(venv.ret_rms.var[tasks] + 1e-8)
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
        returns[dones] = 0
    for task, values in enumerate(returns_of_task):
        assert venv.ret_rms.count[task] == pytest.approx(len(values) + 1e-4)
        # The prior (mean 0, variance 1, weight 1e-4) still shows a little
        assert venv.ret_rms.var[task] == pytest.approx(np.var(values), rel=0.01)
        assert venv.ret_rms.mean[task] == pytest.approx(np.mean(values), rel=0.01)
    # Equal shares of reward, whatever the scale: that is what it is for
    assert venv.ret_rms.var[1] > 100 * venv.ret_rms.var[0] > 100 * venv.ret_rms.var[2]

    batch = np.array([[2.0], [2.0], [2.0], [2.0]])
    task_ids = np.array([0, 1, 2, 1])
    expected = 2.0 / np.sqrt(venv.ret_rms.var[task_ids] + 1e-8)
    normalized = venv.normalize_reward(batch, task_ids)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected[:, None], rtol=1e-6)
    np.testing.assert_allclose(venv.normalize_reward(batch[:, 0], task_ids=task_ids), expected, rtol=1e-6)
    np.testing.assert_allclose(venv.unnormalize_reward(normalized, task_ids), batch, rtol=1e-6)
    venv.norm_reward = False
    np.testing.assert_array_equal(venv.normalize_reward(batch, task_ids), batch)


def test_task_mean_std_keeps_absent_tasks_exactly():
    stats = TaskMeanStd(2)
    stats.update_tasks(np.array([0.1, 0.7, 0.3]), np.array([1, 1, 1]))
    mean, var = stats.mean[1], stats.var[1]
    assert (stats.mean[0], stats.var[0], stats.count[0]) == (0.0, 1.0, 1e-4)
    copy = stats.copy()
    for _ in range(1000):
        stats.update_tasks(np.array([5.0]), np.array([0]))
    assert (stats.mean[1], stats.var[1]) == (mean, var)
    assert (copy.mean[0], copy.count[0]) == (0.0, 1e-4)
    assert stats.mean[0] == pytest.approx(5.0, rel=1e-6)


def test_normalize_reward_wrong_use():
    venv = VecTaskNormalize(point_venv(n_envs=2, num_tasks=3))
    with pytest.raises(ValueError, match=r"after reset\(\)"):
        venv.normalize_reward(np.ones(2))
    venv.reset()
    assert venv.normalize_reward(np.ones(2)).shape == (2,)
    # A replay buffer's batch, also if it happens to have as many rows as there are sub-environments
    for batch in (np.ones((4, 1)), np.ones((2, 1))):
        with pytest.raises(ValueError, match="pass task_ids"):
            venv.normalize_reward(batch)
    with pytest.raises(ValueError, match="one per reward"):
        venv.normalize_reward(np.ones((4, 1)), np.zeros(3, dtype=int))
    for task_id in (3, -1):
        with pytest.raises(ValueError, match="task_ids must be from 0 to 2"):
            venv.normalize_reward(np.ones((1, 1)), np.array([task_id]))


class DictTasksEnv(gym.Env):
    """Names tasks, but does not end its observation with them."""

    num_tasks = 2
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
    action_space = spaces.Box(-1, 1, (1,))


def test_refuses_observations_without_one_hot():
    with pytest.raises(ValueError, match="ends with the one-hot of the 2 tasks"):
        VecTaskNormalize(DummyVecEnv([DictTasksEnv]))


def test_save_load(tmp_path):
    venv = VecTaskNormalize(point_venv(n_envs=3, horizon=4), gamma=0.95, clip_reward=3.0)
    venv.reset()
    for actions in random_actions(20, 3, 2):
        venv.step(actions)
    path = str(tmp_path / "vecnormalize.pkl")
    venv.save(path)

    loaded = VecTaskNormalize.load(path, point_venv(n_envs=2, seed=1, horizon=4))
    assert (loaded.gamma, loaded.clip_reward, loaded.num_envs) == (0.95, 3.0, 2)
    np.testing.assert_array_equal(loaded.ret_rms.var, venv.ret_rms.var)
    np.testing.assert_array_equal(loaded.obs_rms.mean, venv.obs_rms.mean)
    # With training off the statistics stand still
    loaded.training = False
    loaded.reset()
    loaded.step(np.zeros((2, 2), dtype=np.float32))
    np.testing.assert_array_equal(loaded.ret_rms.var, venv.ret_rms.var)
    np.testing.assert_array_equal(loaded.obs_rms.var, venv.obs_rms.var)
    # SB3's own loader, which RL Zoo uses, gives the same object
    assert isinstance(VecNormalize.load(path, point_venv(n_envs=1)), VecTaskNormalize)

    with pytest.raises(ValueError, match="for 3 tasks, the environment has 5"):
        VecTaskNormalize.load(path, point_venv(num_tasks=5))
    VecNormalize(point_venv()).save(path)
    with pytest.raises(ValueError, match="must hold a VecTaskNormalize, got VecNormalize"):
        VecTaskNormalize.load(path, point_venv())


def test_sync_with_evaluation_environment():
    """As SB3's EvalCallback does before each evaluation."""
    venv, eval_venv = (VecTaskNormalize(point_venv(seed=seed)) for seed in (0, 1))
    eval_venv.training = False
    venv.reset()
    for actions in random_actions(5, 3, 2):
        venv.step(actions)
    sync_envs_normalization(venv, eval_venv)
    eval_venv.reset()
    np.testing.assert_array_equal(eval_venv.ret_rms.var, venv.ret_rms.var)
    assert eval_venv.ret_rms is not venv.ret_rms
    obs = venv.get_original_obs()
    np.testing.assert_array_equal(eval_venv.normalize_obs(obs), venv.normalize_obs(obs))


def test_plain_sac_trains_on_it():
    venv = VecTaskNormalize(point_venv(n_envs=3, horizon=5), norm_reward=False)
    model = SAC("MlpPolicy", venv, learning_starts=6, batch_size=8, buffer_size=100, policy_kwargs={"net_arch": [8]}, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(15)
    assert model.num_timesteps == 15
    # The buffer keeps raw observations: their tails are one-hots
    tails = model.replay_buffer.observations[:5, :, 4:]
    np.testing.assert_array_equal(np.sort(tails, axis=-1), np.broadcast_to([0, 0, 1], (5, 3, 3)))
