"""Forms of our algorithms that support more of what SB3's tests ask for than their defaults do."""

from typing import Any

from gymnasium import spaces

from sb3_mtrl import CMTASAC, MTSAC
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer


class MemorylessCMTASAC(CMTASAC):
    """
    CMTASAC as if ``use_temporal=False`` were its default. Without recurrent states it falls back to SB3's own replay
    buffers with one task: Dict and image observations, HER and n-step returns then work.
    """

    def __init__(self, *args: Any, use_temporal: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, use_temporal=use_temporal, **kwargs)


class PrioritizedMTSAC(MTSAC):
    """
    MTSAC as if its replay buffer were prioritized by default, wherever that buffer can serve: vector observations, one-step
    returns, and no second choice by the caller.
    """

    def _setup_model(self) -> None:
        is_vector = isinstance(self.observation_space, spaces.Box) and len(self.observation_space.shape) == 1
        if is_vector and self.replay_buffer_class is None and self.n_steps == 1 and not self.optimize_memory_usage:
            self.replay_buffer_class = TaskPrioritizedReplayBuffer
        super()._setup_model()
