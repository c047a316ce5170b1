import copy
import pickle
import warnings
from types import SimpleNamespace

import gymnasium as gym
import metaworld
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mtrl.envs
from sb3_mtrl.envs import MetaWorldMultiTaskEnv, list_tasks
from sb3_mtrl.envs.metaworld import CAMERAS, _goal_cache, draw_goals


def random_actions(n_steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, size=(n_steps, 4)).astype(np.float32)


def seen_tasks(env: gym.Env, n_episodes: int) -> list[int]:
    return [env.reset()[1]["task_id"] for _ in range(n_episodes)]


# Registration


@pytest.mark.parametrize("suite, num_tasks", [("MT3", 3), ("MT10", 10), ("MT25", 25), ("MT50", 50)])
@pytest.mark.parametrize(
    "suffix, horizon, goals",
    [("", 500, "random"), ("-fixed", 500, "fixed"), ("-short", 150, "random"), ("-short-fixed", 150, "fixed")],
)
def test_suite_ids(suite, num_tasks, suffix, horizon, goals):
    env = gym.make(f"MetaWorld-{suite}{suffix}-v3")
    assert env.observation_space.shape == (39 + num_tasks,)
    assert env.observation_space.dtype == np.float32
    assert env.unwrapped.task_names == list_tasks(suite)
    assert (env.unwrapped.horizon, env.unwrapped.goals) == (horizon, goals)
    # The environment truncates itself; a TimeLimit would be a second clock
    assert env.spec.max_episode_steps is None


def test_suites_are_those_of_metaworld():
    for suite in ("MT10", "MT25", "MT50"):
        assert list_tasks(suite) == tuple(getattr(metaworld.env_dict, f"{suite}_V3"))
    assert list_tasks() == tuple(ALL_V3_ENVIRONMENTS)


def test_ids_with_tasks_of_ones_own():
    env = gym.make("MetaWorld-MT1-short-v3", task="push").unwrapped
    assert (env.task_names, env.horizon, env.observation_space.shape) == (("push-v3",), 150, (40,))
    env = gym.make("MetaWorld-Custom-fixed-v3", tasks=["sweep-v3", "reach"]).unwrapped
    assert (env.task_names, env.goals) == (("sweep-v3", "reach-v3"), "fixed")


@pytest.mark.parametrize(
    "env_id, kwargs, message",
    [
        ("MetaWorld-MT1-v3", {}, "task='reach-v3'"),
        ("MetaWorld-MT1-v3", {"task": "MT10"}, "needs the name of its task"),
        ("MetaWorld-Custom-v3", {}, r"tasks=\['reach-v3', 'push-v3'\]"),
    ],
)
def test_ids_that_need_an_argument_say_so(env_id, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gym.make(env_id, **kwargs)


def test_registration_can_be_repeated():
    before = dict(gym.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_mtrl.envs.register_envs()
    assert dict(gym.registry) == before


# Bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"tasks": "reech-v3"}, "unknown Meta-World task 'reech-v3', did you mean 'reach-v3'.*list_tasks"),
        ({"tasks": ["push-v3", "peg-insert-sid"]}, "did you mean 'peg-insert-side-v3'"),
        ({"tasks": "reach-v2"}, "did you mean 'reach-v3'"),
        ({"tasks": "MT11"}, "did you mean 'MT1"),
        ({"tasks": "\N{SNOWMAN}"}, "unknown Meta-World task .*list_tasks"),
        ({"tasks": ["reach-v3", "reach"]}, "reach-v3 more than once"),
        ({"tasks": []}, "at least one"),
        ({"tasks": [3]}, "by its name"),
        ({"horizon": 0}, "horizon must be an integer of at least 1, got 0"),
        ({"horizon": 1.5}, "horizon must be an integer"),
        ({"horizon": True}, "horizon must be an integer"),
        ({"reward_function_version": "v3"}, "reward_function_version must be one of .*'v3'"),
        ({"goals": "some"}, "goals must be one of"),
        ({"reward": "sparse"}, "reward must be one of"),
        ({"success": "first"}, "success must be one of"),
        ({"terminate_on_success": "yes"}, "terminate_on_success must be one of"),
        ({"goal_seed": -1}, "goal_seed must be an integer from 0"),
        ({"render_mode": "ansi"}, "render_mode must be one of"),
        ({"camera_name": "corner9"}, "camera_name must be one of"),
        ({"render_size": 8}, "render_size must be an integer of at least 16"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MetaWorldMultiTaskEnv(**{"tasks": "MT3", **kwargs})


@pytest.mark.parametrize(
    "task_ids, message", [([], "at least one"), ([3], "from 0 to 2, got 3"), ([-1], "-1"), ([0, 0], "differ")]
)
def test_wrong_task_ids(task_ids, message):
    with pytest.raises(ValueError, match=message):
        MetaWorldMultiTaskEnv("MT3").set_tasks(task_ids)


def test_wrong_use():
    env = MetaWorldMultiTaskEnv("reach")
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())
    with pytest.raises(ValueError, match="options\\['task'\\] must be an integer from 0 to 0, got 1"):
        env.reset(options={"task": 1})
    with pytest.raises(ValueError, match="suite must be one of"):
        list_tasks("MT11")


# Meta-World's own numbers


@pytest.fixture
def three_goals(monkeypatch):
    """Meta-World settles the arm for each goal: three of them instead of fifty take 0.05 s instead of 0.7 s."""
    monkeypatch.setattr(metaworld, "_N_GOALS", 3)


@pytest.mark.filterwarnings("ignore:Constant.s. may be too high")  # Meta-World's experts, about themselves
@pytest.mark.parametrize("task_name", list_tasks())
def test_numbers_equal_those_of_metaworld(task_name, three_goals):
    """
    The expected numbers are those of an environment that Meta-World itself made and was given its own benchmark's goal.
    """
    tasks = metaworld.MT1(task_name, seed=0).train_tasks
    raw_env = ALL_V3_ENVIRONMENTS[task_name]()
    raw_env.set_task(tasks[0])
    env = MetaWorldMultiTaskEnv(["dial-turn", task_name] if task_name != "dial-turn-v3" else task_name, goals="fixed")
    task_id = env.num_tasks - 1
    expert = ENV_POLICY_MAP[task_name]()
    # Full episodes for MT10's tasks; the expert moves things, noise keeps it from standing still
    n_steps = 500 if task_name in list_tasks("MT10") else 40
    noise = 0.3 * random_actions(n_steps)

    obs, _ = env.reset(options={"task": task_id})
    assert list(_goal_cache[task_name, 0][:3]) == tasks
    raw_obs, _ = raw_env.reset()
    one_hot = np.eye(env.num_tasks)[task_id]
    any_success = False
    trajectory = [obs]
    actions = []
    for step in range(n_steps):
        np.testing.assert_array_equal(obs, np.concatenate([raw_obs, one_hot]).astype(np.float32))
        action = np.clip(expert.get_action(raw_obs) + noise[step], -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = env.step(action)
        raw_obs, raw_reward, _, raw_truncated, raw_info = raw_env.step(action)
        any_success |= raw_info["success"] == 1.0
        assert reward == raw_reward
        assert (terminated, truncated) == (False, raw_truncated)
        assert truncated == (step == 499)
        assert info["is_success"] == any_success
        assert {key: info[key] for key in raw_info} == raw_info
        trajectory.append(obs)
        actions.append(action)
    # The second episode with the same goal is the same: nothing is left over from the first
    obs, _ = env.reset(options={"task": task_id})
    for action, expected in zip(actions[:10], trajectory, strict=False):
        np.testing.assert_array_equal(obs, expected)
        obs = env.step(action)[0]


@pytest.mark.filterwarnings("ignore:Constant.s. may be too high")
def test_expert_solves_and_reward_v1_is_metaworlds():
    task = metaworld.MT1("reach-v3", seed=0).train_tasks[0]
    raw_env = ALL_V3_ENVIRONMENTS["reach-v3"](reward_function_version="v1")
    raw_env.set_task(task)
    env = MetaWorldMultiTaskEnv("reach", goals="fixed", reward_function_version="v1")
    expert = ENV_POLICY_MAP["reach-v3"]()
    env.reset()
    raw_obs, _ = raw_env.reset()
    for _ in range(100):
        action = expert.get_action(raw_obs)
        raw_obs, raw_reward, *_ = raw_env.step(action)
        _, reward, _, _, info = env.step(action)
        assert reward == raw_reward
    assert info["is_success"]


@pytest.mark.parametrize("task_name, seed", [("reach-v3", 7), ("push-v3", 0), ("peg-insert-side-v3", 3)])
def test_goals_equal_those_of_metaworld(task_name, seed):
    """All fifty, byte for byte, and without touching NumPy's global generator. The tasks reject some draws."""
    env = ALL_V3_ENVIRONMENTS[task_name]()
    state = np.random.get_state()[1].copy()
    goals = draw_goals(env, task_name, seed)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert list(goals) == metaworld.MT1(task_name, seed=seed).train_tasks
    assert len(set(goals)) == 50


# Tasks and goals


def test_cycle_over_assigned_tasks():
    env = MetaWorldMultiTaskEnv("MT3")
    assert env.assigned_tasks == (0, 1, 2)
    env.set_tasks(np.array([2, 0]))
    assert env.assigned_tasks == (2, 0)
    assert seen_tasks(env, 5) == [2, 0, 2, 0, 2]
    # Only what was visited was built
    assert sorted(env._envs) == [0, 2]
    # A visit in between leaves the cycle where it was
    obs, info = env.reset(options={"task": 1})
    assert (info["task_id"], info["task_name"], env.task_id) == (1, "push-v3", 1)
    np.testing.assert_array_equal(obs[39:], [0, 1, 0])
    assert seen_tasks(env, 2) == [0, 2]
    # A seed restarts the cycle, and so does a new assignment
    assert env.reset(seed=3)[1]["task_id"] == 2
    env.set_tasks([1])
    assert seen_tasks(env, 2) == [1, 1]


def test_cycle_without_assignment_starts_anywhere():
    env = MetaWorldMultiTaskEnv("MT3")
    first = set()
    for seed in range(20):
        first.add(env.reset(seed=seed)[1]["task_id"])
        if seed < 3:
            tasks = [env.task_id, *seen_tasks(env, 3)]
            assert sorted(tasks[:3]) == [0, 1, 2]
            assert tasks[3] == tasks[0]
    assert first == {0, 1, 2}


def test_goals():
    env = MetaWorldMultiTaskEnv("push", goals="random")
    goals = {tuple(env.reset(seed=0 if i == 0 else None)[0][36:39]) for i in range(12)}
    # 12 draws from 50: the expected number of different goals is 50 (1 - 0.98^12) = 10.8
    assert 7 <= len(goals) <= 12
    env = MetaWorldMultiTaskEnv("push", goals="fixed")
    first = env.reset()[0]
    for _ in range(3):
        np.testing.assert_array_equal(env.reset()[0], first)
    other = MetaWorldMultiTaskEnv("push", goals="fixed", goal_seed=1).reset()[0]
    assert not np.array_equal(other[36:39], first[36:39])


def test_goals_in_turn():
    """Each of the 50 goals once, in the list's order, also where two tasks take turns; the same after any seed."""
    env = MetaWorldMultiTaskEnv(["reach", "push"], goals="cycle", goal_seed=2)
    env.set_tasks([1, 0])
    assert env.n_goals == 50
    observations = [env.reset(seed=7 if i == 0 else None)[0] for i in range(102)]
    for offset, task in ((0, "push-v3"), (1, "reach-v3")):
        rand_vecs = [pickle.loads(goal.data)["rand_vec"] for goal in _goal_cache[task, 2]]
        visited = [tuple(obs[36:39]) for obs in observations[offset::2]]
        # Meta-World's goal is the end of the random vector; push takes its height from the object
        np.testing.assert_allclose([goal[:2] for goal in visited[:50]], [vec[-3:-1] for vec in rand_vecs], atol=1e-6)
        assert len(set(visited)) == 50 and visited[50] == visited[0]
    np.testing.assert_array_equal(env.reset(seed=8)[0], observations[0])
    assert MetaWorldMultiTaskEnv("reach", goals="fixed").n_goals == 1


def test_equal_seeds_give_equal_trajectories_whatever_came_before():
    env, other = MetaWorldMultiTaskEnv("MT3", horizon=5), MetaWorldMultiTaskEnv("MT3", horizon=5)
    seen_tasks(other, 4)
    for seed in (0, 1):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], other.reset(seed=seed)[0])
        for action in random_actions(20):
            step, other_step = env.step(action), other.step(action)
            np.testing.assert_array_equal(step[0], other_step[0])
            assert step[1:] == other_step[1:]
            if step[3]:
                np.testing.assert_array_equal(env.reset()[0], other.reset()[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_continue_the_cycle(duplicate):
    env = MetaWorldMultiTaskEnv("MT3")
    env.reset(seed=5)
    other = duplicate(env)
    with pytest.raises(gym.error.ResetNeeded):
        other.step(env.action_space.sample())
    for _ in range(3):
        obs, info = env.reset()
        other_obs, other_info = other.reset()
        np.testing.assert_array_equal(obs, other_obs)
        assert info == other_info


# Episodes


@pytest.mark.parametrize("horizon", [3, 501])
def test_horizon(horizon):
    """Also beyond Meta-World's own limit of 500 steps."""
    env = MetaWorldMultiTaskEnv("reach", horizon=horizon)
    for _ in range(2):
        env.reset()
        ends = [env.step(action)[2:4] for action in random_actions(horizon)]
        assert ends == [(False, False)] * (horizon - 1) + [(False, True)]
    with pytest.raises(ValueError, match="must reset"):
        env.step(random_actions(1)[0])


def test_time_limit_in_vec_env():
    venv = DummyVecEnv([lambda: gym.make("MetaWorld-MT1-v3", task="reach", horizon=2)])
    venv.reset()
    _, _, dones, infos = venv.step(random_actions(1))
    assert (dones[0], infos[0]["TimeLimit.truncated"]) == (False, False)
    _, _, dones, infos = venv.step(random_actions(1))
    assert (dones[0], infos[0]["TimeLimit.truncated"]) == (True, True)
    assert infos[0]["terminal_observation"].shape == (40,)


def with_successes(successes: list[float], **kwargs) -> MetaWorldMultiTaskEnv:
    """An environment whose simulation reports these successes, and rewards 0.1, 0.2, ..."""
    env = MetaWorldMultiTaskEnv("reach", **kwargs)
    env.reset()
    results = iter([(np.zeros(39), 0.1 * (i + 1), False, False, {"success": s}) for i, s in enumerate(successes)])
    env._env = SimpleNamespace(step=lambda action: next(results))
    return env


@pytest.mark.parametrize("success, expected", [("any", [False, True, True, True]), ("last", [False, True, False, True])])
def test_is_success(success, expected):
    env = with_successes([0.0, 1.0, 0.0, 1.0], success=success)
    infos = [env.step(action)[4] for action in random_actions(4)]
    assert [info["is_success"] for info in infos] == expected
    assert [info["success"] for info in infos] == [0.0, 1.0, 0.0, 1.0]
    assert {(info["task_id"], info["task_name"]) for info in infos} == {(0, "reach-v3")}


def test_success_reward_is_paid_once_per_episode():
    env = with_successes([0.0, 1.0, 0.0, 1.0], reward="success")
    assert [env.step(action)[1] for action in random_actions(4)] == [0.0, 1.0, 0.0, 0.0]
    env.reset()
    assert env._has_succeeded is False


def test_terminate_on_success():
    env = with_successes([0.0, 1.0], terminate_on_success=True, horizon=2)
    assert env.step(random_actions(1)[0])[2:4] == (False, False)
    assert env.step(random_actions(1)[0])[2:4] == (True, True)
    env = with_successes([1.0], terminate_on_success=False)
    assert env.step(random_actions(1)[0])[2] is False


# Checkers, rendering, closing


@pytest.mark.parametrize("env_id", ["MetaWorld-MT3-v3", "MetaWorld-MT10-short-fixed-v3"])
def test_checkers(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Meta-World gives no bounds of its observations, as MuJoCo environments in general
        warnings.filterwarnings("ignore", message=".*observation space (minimum|maximum) value is -?infinity")
        env = gym.make(env_id)
        env.unwrapped.set_tasks([0])
        gymnasium_check_env(env.unwrapped, skip_render_check=True)
        sb3_check_env(env)
        # The passive checker of gym.make
        env.reset(seed=0)
        for action in random_actions(3):
            env.step(action)


def test_close():
    env = MetaWorldMultiTaskEnv("reach")
    obs, _ = env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())
    np.testing.assert_array_equal(env.reset(seed=0)[0], obs)


def test_cameras_exist_in_all_models():
    """The camera is checked before there is a model."""
    for task_name in ("reach-v3", "door-open-v3", "stick-pull-v3"):
        model = ALL_V3_ENVIRONMENTS[task_name]().model
        assert sorted(model.camera(i).name for i in range(model.ncam)) == sorted(CAMERAS)


@pytest.mark.parametrize("camera_name, turned", [(None, False), ("topview", False), ("corner2", True)])
def test_render_makes_context_current_and_turns_corner_cameras(camera_name, turned):
    """Without OpenGL: a renderer that writes down what is asked of it."""
    env = MetaWorldMultiTaskEnv("reach", render_mode="rgb_array", camera_name=camera_name)
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    env.reset()
    frame = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    calls = []
    viewer = SimpleNamespace(make_context_current=lambda: calls.append("current"))
    env._env = SimpleNamespace(
        mujoco_renderer=SimpleNamespace(_get_viewer=lambda mode: calls.append(mode) or viewer),
        render=lambda: calls.append("render") or frame,
    )
    np.testing.assert_array_equal(env.render(), frame[::-1, ::-1] if turned else frame)
    assert calls == ["rgb_array", "current", "render"]


def test_render_without_mode():
    env = MetaWorldMultiTaskEnv("reach")
    env.reset()
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None


def test_human_mode_renders_each_step_and_keeps_one_window(monkeypatch):
    env = MetaWorldMultiTaskEnv("MT3", render_mode="human")
    rendered = []
    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", lambda self: rendered.append(type(self).__name__))
    monkeypatch.setattr(env, "render", lambda: rendered.append("step"))
    env.set_tasks([0, 1])
    env.reset()
    env.step(random_actions(1)[0])
    assert rendered[-1] == "step"
    env.reset()
    assert list(env._envs) == [1]


@pytest.mark.filterwarnings("ignore::glfw.GLFWError")  # what a machine without a display says, before the test is skipped
def test_frames_of_several_tasks():
    env = MetaWorldMultiTaskEnv("MT3", render_mode="rgb_array", camera_name="corner2", goals="fixed")
    env.set_tasks([0, 1, 2])
    env.reset()
    try:
        env.render()
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error!r}")
    frames = {}
    for task_id in (0, 1, 2, 0, 1, 2):
        env.reset(options={"task": task_id})
        frame = env.render()
        assert frame.shape == (480, 480, 3)
        assert frame.dtype == np.uint8
        # Each task's frame is its own, also when others were drawn in between (some pixels at edges differ by 1)
        assert mean_difference(frames.setdefault(task_id, frame), frame) < 0.005
    assert mean_difference(frames[0], frames[1]) > 0.02
    assert mean_difference(frames[0], frames[2]) > 0.02
    env.close()


def mean_difference(frame: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(frame.astype(int) - other.astype(int)).mean())
