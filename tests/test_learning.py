"""Every algorithm learns two tasks with opposite optimal actions, which no policy that ignores the task can solve."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl.common.evaluation import MultiTaskEvaluation, evaluate_multi_task_policy
from sb3_mtrl.common.vec_env import VecTaskAssignment
from sb3_mtrl.zoo.algorithms import ALGORITHMS

HORIZON = 10
TOLERANCE = 0.25
SIGNS = (1.0, -1.0)


class OppositeTasksEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    The two tasks see the same numbers ``x``, uniform in [0.5, 1], and want opposite actions: the reward is
    ``-(a - sign x)^2`` with the task's sign. ``x`` is new at each step, whatever the action was, so discounting makes no
    difference to the best policy. An episode succeeds if every action was within ``TOLERANCE`` of ``sign x``.

    In closed form: the best policy returns 0 and always succeeds. A policy that sees ``x`` but not the task does best with
    ``a = 0``, whose cost is ``E x^2 = (1 - 0.5^3) / (3 * 0.5) = 7/12`` per step; it never succeeds, and no other policy can
    succeed in both tasks, whose goals are at least 1 apart.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(self) -> None:
        self.num_tasks = 2
        self.task_names = ("plus", "minus")
        self.assigned_tasks: tuple[int, ...] = (0, 1)
        self.observation_space = spaces.Box(-1.0, 1.0, (1 + self.num_tasks,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.task_id, self._next, self._steps, self._x, self._n_successes = 0, 0, 0, 0.0, 0

    def set_tasks(self, task_ids: list[int]) -> None:
        self.assigned_tasks, self._next = tuple(task_ids), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.task_id = self.assigned_tasks[self._next % len(self.assigned_tasks)]
        self._next += 1
        self._steps = self._n_successes = 0
        return self._observe(), {"task_id": self.task_id}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        distance = abs(float(action[0]) - SIGNS[self.task_id] * self._x)
        self._steps += 1
        success = distance <= TOLERANCE
        self._n_successes += success
        info = {"task_id": self.task_id, "success": float(success), "is_success": self._n_successes == self._steps}
        return self._observe(), -(distance**2), False, self._steps >= HORIZON, info

    def _observe(self) -> np.ndarray:
        self._x = float(self.np_random.uniform(0.5, 1.0))
        one_hot = np.eye(self.num_tasks)[self.task_id]
        return np.concatenate([[self._x], one_hot]).astype(np.float32)


class TaskBlindPolicy:
    """
    The best that a policy without the task can do for the return (``share=0``), or for the success of one task (1 or -1).

    :param share: Action, in units of ``x``
    """

    def __init__(self, share: float):
        self.share = share

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        return self.share * observation[:, :1], state


def make_env() -> VecTaskAssignment:
    return VecTaskAssignment(DummyVecEnv([lambda: Monitor(OppositeTasksEnv())] * 2))


def is_solved(evaluation: MultiTaskEvaluation) -> bool:
    """
    Nine of ten episodes of each task succeed, and the mean return of each task, whose optimum is 0, loses less than a tenth of
    what a task-blind policy loses.
    """
    blind_return = -7 / 12 * HORIZON
    return bool((evaluation.success_rates >= 0.9).all() and (evaluation.mean_rewards >= 0.1 * blind_return).all())


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 0.5])
def test_a_task_blind_policy_does_not_pass(share: float) -> None:
    evaluation = evaluate_multi_task_policy(TaskBlindPolicy(share), make_env(), 200, seed=0)
    assert not is_solved(evaluation)
    assert evaluation.success_rates.min() == 0.0
    # E (share x - sign x)^2 = (share - sign)^2 7/12; 2000 steps of a variable in [0, 4]
    expected = [-((share - sign) ** 2) * 7 / 12 * HORIZON for sign in SIGNS]
    np.testing.assert_allclose(evaluation.mean_rewards, expected, atol=0.05 * HORIZON)


def test_the_best_policy_passes() -> None:
    class Best:
        def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
            return observation[:, :1] * (observation[:, 1:2] - observation[:, 2:3]), state

    evaluation = evaluate_multi_task_policy(Best(), make_env(), 5, seed=0)
    assert is_solved(evaluation)
    np.testing.assert_allclose(evaluation.mean_rewards, 0.0, atol=1e-6)


# What the algorithms need beside the settings that all of them share; published settings are made for larger networks
SETTINGS: dict[str, dict[str, Any]] = {
    "cmtasac": dict(
        contrastive_coef=1.0,
        policy_kwargs=dict(
            net_arch=[32], expert_arch=[16], feature_dim=16, lstm_hidden_dim=8, task_embedding_dim=4, log_std_squash="clip"
        ),
    ),
    # With vectors of any sign and length (the published start) the first policies of so small networks are saturated
    "pacosac": dict(n_param_sets=2, w_init="simplex", warmup_actions="uniform", ent_coef_learning_rate=3e-3),
}


@pytest.mark.expensive
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_opposite_tasks_are_solved(algo: str) -> None:
    settings: dict[str, Any] = dict(
        learning_rate=3e-3,
        learning_starts=200,
        batch_size=64,
        gamma=0.5,
        tau=0.02,
        seed=0,
        device="cpu",
        policy_kwargs=dict(net_arch=[32, 32]),
    )
    model = ALGORITHMS[algo].algorithm_class("MlpPolicy", make_env(), **{**settings, **SETTINGS.get(algo, {})})
    assert not is_solved(evaluate_multi_task_policy(model, make_env(), 10, seed=1))
    model.learn(2500)
    assert is_solved(evaluate_multi_task_policy(model, make_env(), 20, seed=1))
