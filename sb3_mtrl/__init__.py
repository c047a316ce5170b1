from pathlib import Path

import sb3_mtrl.envs  # noqa: F401  # registers the environments
from sb3_mtrl.cmtasac import CMTASAC
from sb3_mtrl.common.vec_env import make_multi_task_vec_env
from sb3_mtrl.mtsac import MTSAC
from sb3_mtrl.pacosac import PaCoSAC
from sb3_mtrl.starssac import STARSSAC
from sb3_mtrl.tsacsac import TSACSAC

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()

__all__ = ["CMTASAC", "MTSAC", "STARSSAC", "TSACSAC", "PaCoSAC", "make_multi_task_vec_env"]
