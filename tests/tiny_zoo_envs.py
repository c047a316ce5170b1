"""For ``--gym-packages tests.tiny_zoo_envs``: registers the tiny multi-task environment for runs of RL Zoo."""

import gymnasium as gym

gym.register("PointTasks-v0", entry_point="tests.tiny_envs:PointTasksEnv")
