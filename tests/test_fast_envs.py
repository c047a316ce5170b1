"""
The fast environments against Meta-World's own, to the bit and to the type.

Each of the fifty tasks is run through a whole episode in which its expert succeeds, and through shorter ones;
``FAST_ENVS_STEPS=500 pytest tests/test_fast_envs.py`` makes all of them whole.
"""

import copy
import os
import pickle
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from metaworld import sawyer_xyz_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from sb3_mtrl.envs import MetaWorldMultiTaskEnv, fast_metaworld, list_tasks
from sb3_mtrl.envs.fast_metaworld import FastRotation, fast_env_class, tolerance
from sb3_mtrl.envs.metaworld import draw_goals

pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high")  # Meta-World's experts, about themselves

# With a caging reward of the base class and of their own, without one, and with two objects
TASKS_WITH_WHOLE_EPISODES = ("reach-v3", "push-v3", "pick-place-v3", "hammer-v3")
EPISODE_LENGTH = 500  # Meta-World's
N_STEPS = int(os.environ.get("FAST_ENVS_STEPS", "0"))
# goal, who acts. A goal that returns is restored instead of simulated, also after others and after a moved scene
EPISODES = ((0, "expert"), (1, "random"), (0, "both"), (1, "expert"))


def make_pair(task_name: str, **kwargs) -> tuple[SawyerXYZEnv, SawyerXYZEnv]:
    """Meta-World's environment of a task, and the fast one."""
    stock_class = ALL_V3_ENVIRONMENTS[task_name]
    fast_class = fast_env_class(stock_class)
    assert fast_class is not stock_class
    return stock_class(**kwargs), fast_class(**kwargs)


def assert_same(values: tuple, expected: tuple) -> None:
    """Equal types and equal bits, NaN and the sign of zero included."""
    assert len(values) == len(expected)
    for value, expected_value in zip(values, expected, strict=True):
        assert type(value) is type(expected_value)
        if isinstance(value, dict):
            assert value.keys() == expected_value.keys()
            assert_same(tuple(value.values()), tuple(expected_value.values()))
        elif isinstance(value, np.ndarray):
            assert value.dtype == expected_value.dtype
            assert value.tobytes() == expected_value.tobytes()
        else:
            assert np.asarray(value).tobytes() == np.asarray(expected_value).tobytes()


def run_episodes(stock, fast, goals, expert, n_steps, episodes=EPISODES) -> bool:
    """Compare them step by step; returned is whether there was success."""
    succeeded = False
    rng = np.random.default_rng(0)
    for goal, actor in episodes:
        for env in (stock, fast):
            env.set_task(goals[goal])
        expected = stock.reset()
        assert_same(fast.reset(), expected)
        obs = expected[0]
        for step in range(n_steps):
            # Beyond the limits, too: the environment clips
            action = rng.uniform(-1.2, 1.2, size=4)
            if actor == "expert" or (actor == "both" and step % 40 < 30):
                action = expert.get_action(obs)
            action = action.astype(np.float32)
            expected = stock.step(action)
            assert_same(fast.step(action), expected)
            obs = expected[0]
            succeeded |= expected[4]["success"] == 1.0
    return succeeded


@pytest.mark.parametrize("task_name", list_tasks())
def test_numbers_equal_those_of_metaworld(task_name):
    stock, fast = make_pair(task_name)
    goals, expert = draw_goals(stock, task_name, 0), ENV_POLICY_MAP[task_name]()
    # Until one with success, so that each part of the reward was compared; experts fail at some goals
    n_episodes = 1
    while not run_episodes(stock, fast, goals, expert, EPISODE_LENGTH, episodes=((1 + n_episodes, "expert"),)):
        n_episodes += 1
        assert n_episodes <= 4
    # The next step is refused in both
    for env in (stock, fast):
        with pytest.raises(ValueError, match="must reset"):
            env.step(np.zeros(4))
    n_steps = N_STEPS or (EPISODE_LENGTH if task_name in TASKS_WITH_WHOLE_EPISODES else 25)
    run_episodes(stock, fast, goals, expert, n_steps)
    assert len(fast._reset_results) == 2 + n_episodes
    assert fast.task_name == stock.task_name


@pytest.mark.parametrize("task_name", ["push-v3", "drawer-open-v3", "peg-insert-side-v3", "faucet-open-v3"])
def test_first_reward_version(task_name):
    """It keeps flags on the environment that a reset clears, or does not."""
    stock, fast = make_pair(task_name, reward_function_version="v1")
    goals = draw_goals(stock, task_name, 0)
    run_episodes(stock, fast, goals, ENV_POLICY_MAP[task_name](), N_STEPS or 80)


def test_double_precision_actions_and_hidden_goals():
    stock, fast = make_pair("push-v3")
    visible = draw_goals(stock, "push-v3", 0)[3]
    hidden = visible._replace(data=pickle.dumps({**pickle.loads(visible.data), "partially_observable": True}))
    for task in (visible, hidden, visible, hidden):
        for env in (stock, fast):
            env.set_task(task)
        assert_same(fast.reset(), stock.reset())
        for action in np.random.default_rng(0).uniform(-1, 1, (10, 4)):
            expected = stock.step(action)
            assert_same(fast.step(action), expected)
            assert np.any(expected[0][36:] != 0.0) == (task is visible)


def test_goals_drawn_at_each_reset():
    """They depend on a random generator: nothing is restored."""
    envs = make_pair("push-v3")
    for env in envs:
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env.seed(7)
    stock, fast = envs
    first = []
    for _ in range(3):
        expected = stock.reset()
        assert_same(fast.reset(), expected)
        first.append(expected[0].tobytes())
        for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)):
            assert_same(fast.step(action), stock.step(action))
    assert len(set(first)) == 3
    assert not fast._reset_results


def test_wrong_use_is_refused_as_in_metaworld():
    for env in make_pair("reach-v3"):
        with pytest.raises(RuntimeError, match="set_task"):
            env.step(np.zeros(4))
        env.set_task(draw_goals(env, "reach-v3", 0)[0])
        env.reset()
        with pytest.raises(AssertionError, match="size 4, got 3"):
            env.step(np.zeros(3))


def test_metaworld_is_left_alone():
    before = {name: vars(SawyerXYZEnv)[name] for name in ("step", "reset", "_get_obs", "_gripper_caging_reward")}
    stock_class = ALL_V3_ENVIRONMENTS["push-v3"]
    compute_reward = stock_class.compute_reward
    fast = fast_env_class(stock_class)()
    assert isinstance(fast, stock_class)
    assert {name: vars(SawyerXYZEnv)[name] for name in before} == before
    assert stock_class.compute_reward is compute_reward
    assert compute_reward.__globals__["reward_utils"] is sawyer_xyz_env.reward_utils is reward_utils
    assert compute_reward.__globals__["Rotation"] is Rotation
    assert type(fast).compute_reward.__globals__["Rotation"] is FastRotation
    assert type(fast).compute_reward.__globals__["reward_utils"].tolerance is tolerance


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies(duplicate):
    stock, fast = make_pair("push-v3")
    goals = draw_goals(stock, "push-v3", 0)
    for env in (stock, fast):
        env.set_task(goals[0])
        env.reset()
    # Meta-World's copies are welded differently to the hand than their originals: so copies are compared with copies
    stock_copy, fast_copy = duplicate(stock), duplicate(fast)
    assert type(fast_copy) is type(fast)
    expert = ENV_POLICY_MAP["push-v3"]()
    run_episodes(stock_copy, fast_copy, goals, expert, 20)
    run_episodes(stock, fast, goals, expert, 20)


def test_restored_simulation_is_computed_from_its_state():
    """Before the first step of a restored episode, positions that are read, or drawn, belong to it."""
    _, fast = make_pair("push-v3")
    goals = draw_goals(fast, "push-v3", 0)
    positions = []
    for goal in (0, 1, 0):
        fast.set_task(goals[goal])
        obs, _ = fast.reset()
        np.testing.assert_array_equal(fast.data.body("hand").xpos, obs[:3])
        np.testing.assert_allclose(fast.data.body("obj").xpos, obs[4:7], atol=1e-12)
        positions.append(fast.data.geom_xpos.copy())
        for _ in range(5):
            fast.step(np.ones(4))
    np.testing.assert_allclose(positions[0], positions[2], atol=1e-12)


def test_human_mode_draws_restored_resets(monkeypatch):
    drawn = []
    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", lambda self: drawn.append(self.task_name))
    stock, fast = make_pair("reach-v3", render_mode="human")
    goal = draw_goals(stock, "reach-v3", 0)[0]
    drawn.clear()
    for env in (stock, fast):
        env.set_task(goal)
        for _ in range(3):
            env.reset()
    assert len(drawn) == 6


# Functions on numbers


def test_tolerance_equals_metaworlds():
    rng = np.random.default_rng(0)
    n_inside = 0
    for _ in range(3000):
        x = np.float64(rng.choice([0.0, rng.uniform(-0.2, 0.2), rng.exponential(10.0)]))
        lower = rng.choice([0.0, rng.uniform(-0.1, 0.1)])
        bounds = (lower, lower + rng.choice([0.0, rng.uniform(0, 0.1)]))
        margin = rng.choice([0.0, rng.uniform(0, 0.5), 10 ** rng.uniform(-20, 2)])
        sigmoid = str(rng.choice(["long_tail", "long_tail", "gaussian", "linear"]))
        for value, margin_value in ((x, margin), (float(x), float(margin)), (x, np.float32(margin))):
            result = tolerance(value, bounds=bounds, margin=margin_value, sigmoid=sigmoid)
            expected = reward_utils.tolerance(value, bounds=bounds, margin=margin_value, sigmoid=sigmoid)
            assert type(result) is type(expected)
            assert result == expected
        n_inside += expected == 1.0
    assert 300 < n_inside < 2700
    assert np.isnan(tolerance(np.nan, (0, 1), 0.5, "long_tail"))
    # Arrays are the original's
    np.testing.assert_array_equal(
        tolerance(np.array([0.5, 2.0]), (0, 1), 0.5), reward_utils.tolerance(np.array([0.5, 2.0]), (0, 1), 0.5)
    )
    for arguments in ((0.0, (1, 0)), (0.0, (0, 1), -1.0), (2.0, (0, 1), 1.0, "no such")):
        with pytest.raises(ValueError):
            tolerance(*arguments)


def test_rotation_equals_scipys():
    rng = np.random.default_rng(1)
    quaternions = np.concatenate([rng.normal(size=(2000, 4)), np.eye(4), 0.5 * np.ones((1, 4)), [[1, 1, 0, 0], [0, 0, 1, 1]]])
    for matrix in Rotation.from_quat(quaternions).as_matrix():
        assert FastRotation.from_matrix(matrix).as_quat().tobytes() == Rotation.from_matrix(matrix).as_quat().tobytes()


# Falling back


@pytest.fixture
def forgotten():
    """What was found out about the installed versions is forgotten before and after the test."""
    caches = (fast_metaworld.why_not_fast, fast_metaworld._derive, fast_metaworld._has_scipys_bits)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("TESTED_VERSIONS", {"metaworld": "3.0.0", "mujoco": "3.3.0"}, "tested with metaworld 3.0.0, this is"),
        ("TESTED_VERSIONS", {"metaworld": "3.1.1", "mujoco": "3.2.0"}, "tested with mujoco 3.2.0, this is"),
        ("TESTED_SOURCES", "another digest", "source of Meta-World"),
    ],
)
def test_other_versions_fall_back(monkeypatch, forgotten, name, value, message):
    monkeypatch.setattr(fast_metaworld, name, value)
    env = MetaWorldMultiTaskEnv("push")
    with pytest.warns(UserWarning, match=message):
        obs, _ = env.reset(seed=0)
    assert type(env._env) is ALL_V3_ENVIRONMENTS["push-v3"]
    stock = MetaWorldMultiTaskEnv("push", fast=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(obs, stock.reset(seed=0)[0])
    action = np.array([0.5, -0.5, 0.2, 1.0], dtype=np.float32)
    assert_same(env.step(action), stock.step(action))


def test_scipy_that_rounds_differently_is_kept(monkeypatch, forgotten):
    other = SimpleNamespace(as_quat=lambda: np.zeros(4))
    monkeypatch.setattr(FastRotation, "from_matrix", lambda matrix: other)
    fast_class = fast_env_class(ALL_V3_ENVIRONMENTS["push-v3"])
    assert fast_class._get_quat_objects.__globals__["Rotation"] is Rotation


# Through our environment


def test_argument_of_the_ids():
    action = np.array([0.5, -0.5, 0.2, 1.0], dtype=np.float32)
    results = []
    for fast in (True, False):
        env = gym.make("MetaWorld-MT3-short-v3", fast=fast)
        trajectory = []
        for seed in (0, None, None, None):
            trajectory.append(env.reset(seed=seed))
            trajectory += [env.step(action) for _ in range(10)]
        assert {isinstance(inner, fast_metaworld.FastSawyerMixin) for inner in env.unwrapped._envs.values()} == {fast}
        results.append(trajectory)
    for values, expected in zip(*results, strict=True):
        assert_same(values, expected)
    with pytest.raises(ValueError, match="fast must be one of"):
        MetaWorldMultiTaskEnv("reach", fast="yes")
