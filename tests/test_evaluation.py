import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mtrl.common.evaluation import (
    MultiTaskEvaluation,
    RandomPolicy,
    evaluate_multi_task_policy,
    format_success_rates,
    format_task_table,
    task_id_of_step,
    wilson_interval,
)
from tests.tiny_envs import PointTasksEnv

STEP_SIZE = 0.5  # the goals are about 1 away: three steps at most


class PointExpert:
    """Walks straight to the goal in the tasks it masters, and stands still in the others."""

    def __init__(self, mastered: tuple[int, ...]):
        self.mastered = mastered

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        masters = np.isin(observation[:, 4:].argmax(axis=1), self.mastered)
        return np.clip((observation[:, 2:4] - observation[:, :2]) / STEP_SIZE, -1, 1) * masters[:, None], state


class CoinEnv(gym.Env):
    """
    Half of the episodes succeed after one step, the others fail after ten; the tasks take turns.

    It tells neither its assigned tasks nor the task in its info; with ``unreachable`` it never comes to its last task.
    """

    def __init__(self, num_tasks: int = 1, unreachable: bool = False):
        self.num_tasks = num_tasks
        self.task_names = tuple(f"coin-{task}" for task in range(num_tasks))
        self.cycle = num_tasks - 1 if unreachable else num_tasks
        self.observation_space = spaces.Box(-1, 1, (1 + num_tasks,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.lucky = bool(self.np_random.integers(2))
        self.steps = 0
        self.obs = np.concatenate([[0.0], np.eye(self.num_tasks)[self.episode % self.cycle]]).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        self.steps += 1
        terminated = self.lucky or self.steps == 10
        return self.obs, 1.0, terminated, False, {"is_success": self.lucky}


def coins(seed: int, n: int) -> list[bool]:
    """The first ``n`` coins of a CoinEnv with this seed."""
    env = CoinEnv()
    env.reset(seed=seed)
    result = [env.lucky]
    for _ in range(n - 1):
        env.reset()
        result.append(env.lucky)
    return result


def make_point_env(n_envs: int, num_tasks: int = 3, assign: bool = False, vec_env_cls: Any = DummyVecEnv, **env_kwargs: Any):
    env_kwargs = {"num_tasks": num_tasks, "horizon": 5, "step_size": STEP_SIZE, **env_kwargs}
    env = make_vec_env(PointTasksEnv, n_envs, env_kwargs=env_kwargs, vec_env_cls=vec_env_cls)
    if assign:
        for i in range(n_envs):
            tasks = [i % num_tasks] if n_envs >= num_tasks else list(range(i, num_tasks, n_envs))
            env.env_method("set_tasks", tasks, indices=i)
    return env


def random_policy(env) -> RandomPolicy:
    return RandomPolicy(env.observation_space, env.action_space)


def make_evaluation(successes: list[list[float]], rewards: list[list[float]] | None = None) -> MultiTaskEvaluation:
    """One inner list per task."""
    successes_, rewards_ = np.array(successes, dtype=float), np.array(successes if rewards is None else rewards, dtype=float)
    n_tasks, n_episodes = successes_.shape
    return MultiTaskEvaluation(
        task_names=("reach", "push", "pick-place")[:n_tasks],
        task_ids=np.repeat(np.arange(n_tasks), n_episodes),
        rewards=rewards_.ravel(),
        lengths=np.full(n_tasks * n_episodes, 5),
        successes=successes_.ravel(),
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("num_tasks,n_envs", [(3, 1), (3, 2), (3, 3), (3, 5), (10, 1), (10, 4), (10, 10), (10, 13)])
@pytest.mark.parametrize("n_episodes", [1, 2, 3])
def test_every_task_is_evaluated_equally_often(num_tasks, n_envs, n_episodes, assign):
    env = make_point_env(n_envs, num_tasks, assign, terminate_on_success=True)
    evaluation = evaluate_multi_task_policy(PointExpert(mastered=(0, 1)), env, n_episodes, seed=0)
    assert evaluation.task_names == tuple(f"point-{task}" for task in range(num_tasks))
    assert evaluation.episode_counts.tolist() == [n_episodes] * num_tasks
    assert evaluation.task_ids.tolist() == np.repeat(np.arange(num_tasks), n_episodes).tolist()
    # The expert reaches the goals of its tasks within 5 steps, and one that stands still never comes near a goal
    assert evaluation.success_rates.tolist() == [1.0, 1.0] + [0.0] * (num_tasks - 2)
    assert (evaluation.lengths[evaluation.task_ids >= 2] == 5).all()
    assert (evaluation.lengths[evaluation.task_ids < 2] < 5).all()


def test_subproc_equals_dummy():
    results = []
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        env = make_point_env(2, assign=True, vec_env_cls=vec_env_cls)
        results.append(evaluate_multi_task_policy(PointExpert((1,)), env, 3, seed=5))
        env.close()
    assert results[0].rewards.tolist() == results[1].rewards.tolist()
    assert results[0].successes.tolist() == results[1].successes.tolist()


def test_seed_fixes_the_start_states_for_every_policy():
    env = make_point_env(5, assign=True, terminate_on_success=True)

    def evaluate_and_record(policy, seed):
        starts = []

        class Recorder:
            def predict(self, observation, state=None, episode_start=None, deterministic=False):
                starts.extend(obs.tolist() for obs in observation[episode_start])
                return policy.predict(observation, state, episode_start, deterministic)

        evaluation = evaluate_multi_task_policy(Recorder(), env, 4, seed=seed)
        return evaluation, starts

    evaluation, starts = evaluate_and_record(PointExpert((0, 1, 2)), seed=1)
    again, starts_again = evaluate_and_record(PointExpert((0, 1, 2)), seed=1)
    assert evaluation.rewards.tolist() == again.rewards.tolist()
    assert starts == starts_again
    assert evaluate_multi_task_policy(PointExpert((0, 1, 2)), env, 4, seed=2).rewards.tolist() != evaluation.rewards.tolist()
    assert evaluate_multi_task_policy(PointExpert((0, 1, 2)), env, 4).rewards.tolist() != evaluation.rewards.tolist()
    # Another policy has episodes of other lengths, but starts every episode that counts where the first policy did:
    # sub-environments 0 and 3 share task 0, two episodes each
    other, other_starts = evaluate_and_record(PointExpert(()), seed=1)
    assert other.mean_ep_length > evaluation.mean_ep_length
    of_task_0 = [[start for start in starts_ if start[4] == 1.0][:4] for starts_ in (starts, other_starts)]
    assert sorted(of_task_0[0]) == sorted(of_task_0[1])


def test_short_episodes_are_not_preferred_in_a_static_division():
    env = make_vec_env(CoinEnv, 5)
    evaluation = evaluate_multi_task_policy(random_policy(env), env, 10, seed=3)
    # 10 episodes over 5 sub-environments: the first two of each, whatever their lengths
    expected = np.concatenate([coins(3 + i, 2) for i in range(5)])
    assert evaluation.successes.tolist() == expected.tolist()
    assert evaluation.lengths.tolist() == np.where(expected, 1, 10).tolist()


def test_short_episodes_are_not_preferred_in_a_shared_quota():
    # With two tasks and no assigned_tasks, the first 20 episodes to start count: of task 0 the first of each sub-environment.
    # Taking the first 20 to end would give nearly only successes, since they end after one step.
    env = make_vec_env(lambda: CoinEnv(num_tasks=2), 20)
    evaluation = evaluate_multi_task_policy(random_policy(env), env, 20, seed=3)
    expected = [coins(3 + i, 1)[0] for i in range(20)]
    assert 0.2 < np.mean(expected) < 0.8
    assert evaluation.successes[evaluation.task_ids == 0].tolist() == expected
    assert evaluation.episode_counts.tolist() == [20, 20]


@pytest.mark.parametrize("n_envs,n_episodes", [(1, 3), (3, 3), (3, 5)])
def test_one_task_equals_sb3(n_envs, n_episodes):
    env = make_point_env(n_envs, num_tasks=1)
    env.seed(4)
    rewards, lengths = evaluate_policy(PointExpert((0,)), env, n_episodes, return_episode_rewards=True)
    evaluation = evaluate_multi_task_policy(PointExpert((0,)), env, n_episodes, seed=4)
    assert sorted(evaluation.rewards.tolist()) == sorted(rewards)
    assert sorted(evaluation.lengths.tolist()) == sorted(lengths)
    assert evaluation.mean_success == 1.0


def test_env_without_tasks_and_success():
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    with pytest.warns(UserWarning, match="Monitor"):
        evaluation = evaluate_multi_task_policy(random_policy(env), env, 2, seed=0)
    assert evaluation.task_names == ("task-0",)
    assert not evaluation.has_success
    assert np.isnan(evaluation.mean_success) and evaluation.worst_task is None and np.isnan(evaluation.worst_success)
    assert evaluation.to_dict()["success_rate"] is None
    assert np.isnan(evaluation.success_intervals()).all()
    assert "-" in format_task_table(evaluation, confidence=0.95)
    assert format_success_rates(evaluation) == f"  task-0 {evaluation.mean_reward:.1f}"


def test_returns_are_those_of_the_monitor():
    env = VecNormalize(make_point_env(2, assign=True), norm_obs=False, norm_reward=True)
    normalized = evaluate_multi_task_policy(PointExpert(()), env, 2, seed=0)
    assert normalized.rewards.tolist() == evaluate_multi_task_policy(PointExpert(()), env.venv, 2, seed=0).rewards.tolist()
    # Standing still for 5 steps at a distance of about 1 to the goal
    assert normalized.mean_reward == pytest.approx(-5.0, rel=0.2)
    with pytest.warns(UserWarning, match="Monitor"):
        plain = DummyVecEnv([lambda: PointTasksEnv(horizon=5)])
        assert evaluate_multi_task_policy(PointExpert(()), plain, 1, seed=0).lengths.tolist() == [5, 5, 5]


def test_recurrent_state_and_episode_starts_are_passed():
    class StepCounter:
        """Its state counts the steps of the episode; it masters task 0, where episodes end early."""

        largest = 0

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            state = np.zeros(len(observation)) if state is None else state
            state = np.where(episode_start, 0, state) + 1
            self.largest = max(self.largest, int(state.max()))
            return PointExpert((0,)).predict(observation)[0], state

    model = StepCounter()
    env = make_point_env(2, terminate_on_success=True)
    evaluate_multi_task_policy(model, env, 5, seed=0)
    assert model.largest == 5  # the horizon: never carried over the end of an episode


def test_task_assigned_to_no_sub_env_is_refused():
    env = make_point_env(2)
    env.env_method("set_tasks", [0])
    with pytest.raises(ValueError, match="point-1, point-2"):
        evaluate_multi_task_policy(random_policy(env), env, 1)


def test_task_that_never_comes_is_an_error():
    env = make_vec_env(lambda: CoinEnv(num_tasks=2, unreachable=True), 2)
    with pytest.raises(RuntimeError, match="coin-1"):
        evaluate_multi_task_policy(random_policy(env), env, 1)


def test_bad_number_of_episodes_is_refused():
    env = make_point_env(1)
    with pytest.raises(ValueError, match="n_eval_episodes_per_task must be at least 1, got 0"):
        evaluate_multi_task_policy(random_policy(env), env, 0)


def test_task_id_of_step():
    one_hot_tail = np.array([0.5, 0.0, 1.0])
    assert task_id_of_step({"task_id": 0}, one_hot_tail, 2) == 0
    assert task_id_of_step({}, one_hot_tail, 2) == 1
    assert task_id_of_step({}, None, 1) == 0
    with pytest.raises(ValueError, match=r"must be in \[0, 2\), got 2"):
        task_id_of_step({"task_id": 2}, one_hot_tail, 2)
    with pytest.raises(ValueError, match="neither in info"):
        task_id_of_step({"success": 1.0}, None, 2)
    with pytest.raises(ValueError, match="must be a one-hot"):
        task_id_of_step({}, np.array([0.5, -0.33, 3.0]), 2)  # a one-hot that VecNormalize has normalised


def test_stochastic_evaluation_is_reproducible_and_leaves_torch_alone():
    env = make_point_env(2, assign=True)
    model = PPO("MlpPolicy", env, policy_kwargs={"net_arch": [4]}, device="cpu")
    th.manual_seed(0)
    expected_next = th.rand(3)
    th.manual_seed(0)
    first = evaluate_multi_task_policy(model, env, 2, deterministic=False, seed=1)
    assert th.equal(th.rand(3), expected_next)
    second = evaluate_multi_task_policy(model, env, 2, deterministic=False, seed=1)
    assert first.rewards.tolist() == second.rewards.tolist()


def test_random_policy():
    env = make_point_env(3)
    state_before = env.action_space.np_random.bit_generator.state
    obs = env.reset()
    actions, state = RandomPolicy(env.observation_space, env.action_space, seed=1).predict(obs, state=None)
    assert actions.shape == (3, 2) and state is None
    assert all(env.action_space.contains(action) for action in actions)
    again = RandomPolicy(env.observation_space, env.action_space, seed=1)
    assert again.predict(obs[0])[0].tolist() == actions[0].tolist()  # one observation, one action
    assert env.action_space.np_random.bit_generator.state == state_before


@pytest.mark.parametrize("confidence,z", [(0.95, 1.959964), (0.99, 2.575829)])
def test_wilson_interval(confidence, z):
    # Closed forms: (0, z^2 / (n + z^2)) for no success, and 1/2 -+ z / (2 sqrt(n + z^2)) for as many successes as failures
    n = 10
    assert wilson_interval(0, n, confidence) == pytest.approx((0.0, z**2 / (n + z**2)), abs=1e-6)
    assert wilson_interval(n, n, confidence) == pytest.approx((1 - z**2 / (n + z**2), 1.0), abs=1e-6)
    half_width = z / (2 * np.sqrt(n + z**2))
    assert wilson_interval(5, n, confidence) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=1e-6)


@pytest.mark.parametrize("args", [(0, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_interval_refuses(args):
    with pytest.raises(ValueError, match="got"):
        wilson_interval(*args)


def test_summary():
    evaluation = make_evaluation([[1, 1], [0, 1], [0, 0]], [[3, 5], [2, 2], [-1, 1]])
    # By hand: the tasks' rates are 1, 1/2, 0, their population standard deviation is sqrt(1/6)
    assert evaluation.success_rates.tolist() == [1.0, 0.5, 0.0]
    assert evaluation.mean_success == 0.5
    assert evaluation.success_std == pytest.approx(np.sqrt(1 / 6))
    assert evaluation.worst_task == "pick-place" and evaluation.worst_success == 0.0
    assert evaluation.mean_rewards.tolist() == [4.0, 2.0, 0.0]
    assert evaluation.std_rewards.tolist() == [1.0, 0.0, 1.0]
    assert evaluation.mean_reward == 2.0
    assert evaluation.std_reward == pytest.approx(np.sqrt((1 + 9 + 0 + 0 + 9 + 1) / 6))
    assert evaluation.mean_ep_length == 5.0
    summary = json.loads(evaluation.to_json())
    assert summary == evaluation.to_dict()
    assert summary["success_rate"] == 0.5 and summary["worst_task"] == "pick-place" and summary["episodes"] == 6
    assert list(summary["tasks"]) == ["reach", "push", "pick-place"]
    interval = summary["tasks"]["push"].pop("success_interval_95")
    assert interval == pytest.approx(wilson_interval(1, 2))
    assert summary["tasks"]["push"] == {"episodes": 2, "success_rate": 0.5, "mean_reward": 2.0, "std_reward": 0.0}


def test_worst_task_among_equal_success_rates_has_the_lowest_reward():
    assert make_evaluation([[0], [0], [1]], [[5], [3], [-9]]).worst_task == "push"


def test_task_without_episodes():
    evaluation = MultiTaskEvaluation(("a", "b"), np.array([0]), np.array([2.0]), np.array([1]), np.array([1.0]))
    assert evaluation.episode_counts.tolist() == [1, 0]
    assert evaluation.worst_task is None
    assert evaluation.to_dict()["tasks"]["b"] == {
        "episodes": 0,
        "success_rate": None,
        "success_interval_95": None,
        "mean_reward": None,
        "std_reward": None,
    }
    assert "episodes per task: 0 to 1" in format_task_table(evaluation)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"task_names": ()}, "task_names"),
        ({"task_ids": np.array([0, 2])}, r"task_ids must be in \[0, 2\), got \[0, 2\]"),
        ({"lengths": np.array([1])}, "one length"),
    ],
)
def test_inconsistent_evaluation_is_refused(changes, message):
    arrays = {name: np.zeros(2) for name in ("rewards", "lengths", "successes")}
    with pytest.raises(ValueError, match=message):
        MultiTaskEvaluation(**({"task_names": ("a", "b"), "task_ids": np.array([0, 1]), **arrays} | changes))


def test_table_of_one_evaluation():
    table = format_task_table(make_evaluation([[1, 1], [0, 1]], [[3, 5], [2, 2]]))
    assert table.splitlines() == [
        "task          | success  reward  std",
        "------------------------------------",
        "reach         |    100%     4.0  1.0",
        "push          |     50%     2.0  0.0",
        "------------------------------------",
        "mean of tasks |     75%     3.0",
        "episodes per task: 2, worst task: push (50%)",
    ]


def test_table_of_two_evaluations_with_intervals():
    trained, random = make_evaluation([[1, 1], [0, 1]]), make_evaluation([[0, 0], [0, 0]])
    table = format_task_table({"trained": trained, "random policy": random}, confidence=0.95, show_reward=False)
    # Wilson, by the closed forms of test_wilson_interval with n = 2: [34, 100], [9, 91] and [0, 66] percent
    assert table.splitlines() == [
        "              | trained               | random policy",
        "task          | success  95% interval | success  95% interval",
        "-------------------------------------------------------------",
        "reach         |    100%     [34, 100] |      0%       [0, 66]",
        "push          |     50%       [9, 91] |      0%       [0, 66]",
        "-------------------------------------------------------------",
        "mean of tasks |     75%               |      0%",
        "trained: episodes per task: 2, worst task: push (50%)",
        "random policy: episodes per task: 2, worst task: reach (0%)",
    ]


def test_table_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="at least one"):
        format_task_table({})
    with pytest.raises(ValueError, match="same tasks"):
        format_task_table({"a": make_evaluation([[1], [0]]), "b": make_evaluation([[1], [0], [0]])})


def test_compact_success_rates():
    evaluation = make_evaluation([[1, 1], [0, 1], [0, 0]])
    assert format_success_rates(evaluation) == "  reach 100%, push 50%, pick-place 0%"
    assert format_success_rates(evaluation, width=25).splitlines() == ["  reach 100%, push 50%,", "  pick-place 0%"]
