"""Forms of our algorithms that support more of what SB3's tests ask for than their defaults do."""

from typing import Any

from sb3_mtrl import CMTASAC


class MemorylessCMTASAC(CMTASAC):
    """
    CMTASAC as if ``use_temporal=False`` were its default. Without recurrent states it falls back to SB3's own replay
    buffers with one task: Dict and image observations, HER and n-step returns then work.
    """

    def __init__(self, *args: Any, use_temporal: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, use_temporal=use_temporal, **kwargs)
