"""For ``--gym-packages tests.tiny_zoo_envs``: registers the tiny multi-task environment for runs of RL Zoo."""

import time
from pathlib import Path
from typing import Any

import gymnasium as gym

from tests.tiny_envs import PointTasksEnv


class HeldPointTasksEnv(PointTasksEnv):
    """
    Makes no step before a file exists.

    :param release: The file
    """

    def __init__(self, release: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.release = Path(release)

    def step(self, action: Any) -> Any:
        while not self.release.exists():
            time.sleep(0.05)
        return super().step(action)


gym.register("PointTasks-v0", entry_point="tests.tiny_envs:PointTasksEnv")
gym.register("HeldPointTasks-v0", entry_point=HeldPointTasksEnv)
