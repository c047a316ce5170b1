from sb3_mtrl.pacosac.pacosac import PaCoSAC
from sb3_mtrl.pacosac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "PaCoSAC"]
