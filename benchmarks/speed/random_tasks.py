"""An environment of Meta-World's shape at no cost: something to fill replay buffers with."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

OBS_DIM, ACTION_DIM = 39, 4


class RandomTasksEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    Random observations and rewards.

    :param num_tasks: Number of tasks T, whose one-hot ends the observations
    """

    def __init__(self, num_tasks: int):
        self.num_tasks = num_tasks
        self.task_names = tuple(f"task-{task_id}" for task_id in range(num_tasks))
        self.assigned_tasks = tuple(range(num_tasks))
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

    def set_tasks(self, task_ids: list[int]) -> None:
        self.assigned_tasks = tuple(task_ids)

    def _observation(self) -> np.ndarray:
        one_hot = np.eye(self.num_tasks)[self.assigned_tasks[0]]
        return np.concatenate([self.np_random.normal(size=OBS_DIM), one_hot]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observation(), float(self.np_random.uniform(0, 10)), False, False, {}
