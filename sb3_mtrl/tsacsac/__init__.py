from sb3_mtrl.tsacsac.policies import MlpPolicy
from sb3_mtrl.tsacsac.tsacsac import TSACSAC

__all__ = ["TSACSAC", "MlpPolicy"]
