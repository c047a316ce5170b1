"""A multi-task environment small enough for tests: the conventions of the real suites without a simulator."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class PointTasksEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A 2-D point has to reach the goal of the current task; one environment cycles over several tasks.

    It follows the convention of the package's multi-task environments: the last ``num_tasks`` entries of the observation are
    the task's one-hot, the attributes ``num_tasks``, ``task_names``, ``task_id`` and ``assigned_tasks`` and the method
    ``set_tasks`` exist, and every ``info`` names the task and says whether it was solved so far in this episode.

    The observation is ``(position (2), goal (2), one-hot (num_tasks))``: the base has ``BASE_DIM = 4`` entries. The action
    ``a`` in [-1, 1]^2 moves the point by ``step_size * a``; the reward is ``-reward_scales[task] * distance to the goal``
    plus ``reward_scales[task]`` while the point is within ``tolerance`` of the goal.

    :param num_tasks: Number of tasks T, at least 1.
    :param horizon: Steps after which an episode is truncated.
    :param reward_scales: One positive factor per task (T,); ones where None.
    :param random_goals: Draw a new goal near the task's nominal one at each reset; otherwise the nominal one is used.
    :param terminate_on_success: End the episode at its first success.
    :param step_size: Distance that an action of 1 moves the point along one axis.
    :param tolerance: Distance from the goal within which the task counts as solved.
    """

    BASE_DIM = 4
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        num_tasks: int = 3,
        horizon: int = 20,
        reward_scales: Sequence[float] | None = None,
        random_goals: bool = True,
        terminate_on_success: bool = False,
        step_size: float = 0.2,
        tolerance: float = 0.15,
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        if reward_scales is not None and len(reward_scales) != num_tasks:
            raise ValueError(f"reward_scales must hold one value per task ({num_tasks}), got {len(reward_scales)}")
        self.num_tasks = num_tasks
        self.task_names = tuple(f"point-{task}" for task in range(num_tasks))
        self.assigned_tasks: tuple[int, ...] = tuple(range(num_tasks))
        self.task_id = 0
        self.horizon = horizon
        self.reward_scales = np.ones(num_tasks) if reward_scales is None else np.asarray(reward_scales, dtype=np.float64)
        self.random_goals = random_goals
        self.terminate_on_success = terminate_on_success
        self.step_size = step_size
        self.tolerance = tolerance
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.BASE_DIM + num_tasks,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        angles = 2.0 * np.pi * np.arange(num_tasks) / num_tasks
        self.nominal_goals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self._next = 0
        self._steps = 0
        self._solved = False
        self._position = np.zeros(2)
        self._goal = self.nominal_goals[0]

    def set_tasks(self, task_ids: Sequence[int]) -> None:
        """
        Cycle through these tasks only, from the next reset on.

        :param task_ids: At least one task id in [0, num_tasks).
        """
        task_ids = tuple(int(task_id) for task_id in task_ids)
        if not task_ids or not all(0 <= task_id < self.num_tasks for task_id in task_ids):
            raise ValueError(f"task_ids must be a non-empty list of ids in [0, {self.num_tasks}), got {task_ids}")
        self.assigned_tasks = task_ids
        self._next = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode of the next assigned task; a seed also restarts the cycle, so equal seeds give equal episodes."""
        super().reset(seed=seed)
        if seed is not None:
            self._next = 0
        self.task_id = self.assigned_tasks[self._next % len(self.assigned_tasks)]
        self._next += 1
        self._steps = 0
        self._solved = False
        self._position = self.np_random.uniform(-0.1, 0.1, size=2)
        noise = self.np_random.uniform(-0.2, 0.2, size=2) if self.random_goals else np.zeros(2)
        self._goal = self.nominal_goals[self.task_id] + noise
        return self._observation(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the point and pay the negative, scaled distance to the goal."""
        self._position = self._position + self.step_size * np.clip(action, -1.0, 1.0)
        self._steps += 1
        distance = float(np.linalg.norm(self._position - self._goal))
        success = distance <= self.tolerance
        self._solved = self._solved or success
        reward = float(self.reward_scales[self.task_id] * (float(success) - distance))
        terminated = self.terminate_on_success and success
        return self._observation(), reward, terminated, self._steps >= self.horizon, self._info(success)

    def _observation(self) -> np.ndarray:
        one_hot = np.zeros(self.num_tasks)
        one_hot[self.task_id] = 1.0
        return np.concatenate([self._position, self._goal, one_hot]).astype(np.float32)

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": float(success),
            "is_success": self._solved,
            "task_name": self.task_names[self.task_id],
            "task_id": self.task_id,
        }
