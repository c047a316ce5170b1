"""Common aliases for type hints."""

from typing import NamedTuple, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger


class MultiTaskReplayBufferSamples(NamedTuple):
    """
    A batch of ``B`` transitions in ``G`` groups of ``g = B / G`` rows; the rows of a group share their task.

    The first six fields are those of SB3's ``ReplayBufferSamples``. Unequal shares of the tasks are unequal numbers of
    groups, so that shapes never change. ``MultiTaskReplayBuffer`` makes one group per task, in order; only while a task has no
    transitions yet its group is filled with another task's.
    """

    observations: th.Tensor  # (B, n + T), the one-hot restored
    actions: th.Tensor  # (B, n_actions), scaled to [-1, 1]
    next_observations: th.Tensor  # (B, n + T)
    dones: th.Tensor  # (B, 1), 1 at true terminations only
    rewards: th.Tensor  # (B, 1)
    discounts: th.Tensor | None  # None: the algorithm's gamma
    group_tasks: th.Tensor  # (G,) int64, the task of each group
    extras: dict[str, th.Tensor]  # name -> (B, width), the extra columns
    indices: np.ndarray | None = None  # (B,) int64, what to name the rows by when their priorities are updated
    weights: th.Tensor | None = None  # (B, 1), importance weights of the critic loss; None: all 1


class TaskLosses(NamedTuple):
    """Mean losses per task in one batch, each of shape ``(T,)``; 0 for a task that is not in the batch."""

    critic: th.Tensor
    actor: th.Tensor | None  # None where the actor loss is not known before the critic step (sequential order)
    ent_coef: th.Tensor | None


class UpdateGuard(Protocol):
    """What ``MTSAC.train`` asks between the losses and the optimiser step, and tells after it."""

    def drop_tasks(self, task_losses: TaskLosses) -> th.Tensor:
        """
        :param task_losses: Losses of this update
        :return: (T,) bool, True for a task whose samples must not contribute to this update
        """
        ...

    def after_update(self, dropped: th.Tensor) -> None:
        """
        :param dropped: (T,) bool, the tasks that were dropped from the update that was just made
        """
        ...

    def log_to(self, logger: Logger, task_names: tuple[str, ...]) -> None:
        """
        Record counts. Called when the logger is about to dump, the only moment at which device values may be read.

        :param logger: The algorithm's logger
        :param task_names: Names of the tasks
        """
        ...
