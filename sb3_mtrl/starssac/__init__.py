from sb3_mtrl.starssac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_mtrl.starssac.starssac import STARSSAC

__all__ = ["STARSSAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
