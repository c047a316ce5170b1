from collections.abc import Callable
from typing import Any, NamedTuple

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mtrl.cmtasac import CMTASAC
from sb3_mtrl.mtsac import MTSAC
from sb3_mtrl.pacosac import PaCoSAC
from sb3_mtrl.starssac import STARSSAC
from sb3_mtrl.tsacsac import TSACSAC
from sb3_mtrl.zoo.hyperparams_opt import (
    convert_multi_task_params,
    sample_cmtasac_params,
    sample_mtsac_params,
    sample_pacosac_params,
    sample_starssac_params,
    sample_tsacsac_params,
)


class ZooAlgorithm(NamedTuple):
    """
    What RL Zoo needs to know of an algorithm.

    :param algorithm_class: The class
    :param sampler: Draws hyperparameters from an Optuna trial
    :param converter: Makes hyperparameters of the parameters that a trial stored
    """

    algorithm_class: type[BaseAlgorithm]
    sampler: Callable[..., dict[str, Any]]
    converter: Callable[[dict[str, Any]], dict[str, Any]]


# name for --algo (and of its file in hyperparams/) -> class, sampler, converter
ALGORITHMS: dict[str, ZooAlgorithm] = {
    "cmtasac": ZooAlgorithm(CMTASAC, sample_cmtasac_params, convert_multi_task_params),
    "mtsac": ZooAlgorithm(MTSAC, sample_mtsac_params, convert_multi_task_params),
    "pacosac": ZooAlgorithm(PaCoSAC, sample_pacosac_params, convert_multi_task_params),
    "starssac": ZooAlgorithm(STARSSAC, sample_starssac_params, convert_multi_task_params),
    "tsacsac": ZooAlgorithm(TSACSAC, sample_tsacsac_params, convert_multi_task_params),
}
