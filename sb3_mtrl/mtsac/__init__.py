from sb3_mtrl.mtsac.mtsac import MTSAC
from sb3_mtrl.mtsac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["MTSAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
