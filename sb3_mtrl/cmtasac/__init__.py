from sb3_mtrl.cmtasac.cmtasac import CMTASAC
from sb3_mtrl.cmtasac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CMTASAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
