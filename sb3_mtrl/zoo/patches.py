import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_mtrl.zoo.algorithms import ALGORITHMS

# Where rl_zoo3.enjoy looks without `-f`, and where rl_zoo3.train writes without `-f`
ENJOY_FOLDER = "rl-trained-agents"
TRAIN_FOLDER = "logs"


def patch_utils(utils: ModuleType) -> None:
    """
    :param utils: ``rl_zoo3.utils``
    """
    for name, entry in ALGORITHMS.items():
        utils.ALGOS.setdefault(name, entry.algorithm_class)
    _wrap_function(utils, "get_model_path", _find_in_train_folder)
    _wrap_function(utils, "create_test_env", _report_tasks)


def patch_hyperparams_opt(hyperparams_opt: ModuleType) -> None:
    """
    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``
    """
    for name, entry in ALGORITHMS.items():
        hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault(name, entry.sampler)
        hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault(name, entry.converter)


def patch_exp_manager(exp_manager: ModuleType) -> None:
    """
    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    from sb3_mtrl.zoo.exp_manager import MultiTaskExperimentMixin

    base = exp_manager.ExperimentManager
    if issubclass(base, MultiTaskExperimentMixin):
        return
    # Name and module of the original, so that instances can be pickled
    namespace = {"__module__": exp_manager.__name__, "__doc__": base.__doc__}
    _replace(exp_manager, "ExperimentManager", type("ExperimentManager", (MultiTaskExperimentMixin, base), namespace))


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": patch_utils,
    "rl_zoo3.hyperparams_opt": patch_hyperparams_opt,
    "rl_zoo3.exp_manager": patch_exp_manager,
}


def _wrap_function(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``wrapper(function, *args, **kwargs)`` called instead of the module's function."""
    function = getattr(module, name)
    if getattr(function, "wrapped_by_sb3_mtrl", False):
        return
    wrapped = functools.wraps(function)(functools.partial(wrapper, function))
    wrapped.wrapped_by_sb3_mtrl = True  # type: ignore[attr-defined]
    _replace(module, name, wrapped)


def _replace(module: ModuleType, name: str, new: Any) -> None:
    """Replace an attribute in its module and in the modules of RL Zoo that imported it before (with the hook, none has)."""
    old = getattr(module, name)
    for key, loaded in list(sys.modules.items()):
        if key.split(".")[0] == "rl_zoo3" and loaded is not None and vars(loaded).get(name) is old:
            setattr(loaded, name, new)
    setattr(module, name, new)


def _find_in_train_folder(
    get_model_path: Callable[..., tuple[str, str, str]],
    exp_id: int,
    folder: str,
    algo: str,
    env_name: str,
    *args: Any,
    **kwargs: Any,
) -> tuple[str, str, str]:
    """
    ``train`` without ``-f`` writes to ``logs``, ``enjoy`` without ``-f`` reads from ``rl-trained-agents`` and then asks SB3's
    hub, which has no agents of ours: so look into ``logs`` as well.
    """
    if algo not in ALGORITHMS or os.path.normpath(folder) != ENJOY_FOLDER:
        return get_model_path(exp_id, folder, algo, env_name, *args, **kwargs)
    for candidate in (folder, TRAIN_FOLDER):
        try:
            return get_model_path(exp_id, candidate, algo, env_name, *args, **kwargs)
        except (AssertionError, ValueError) as error:
            last_error = error
    # A type that enjoy does not take as "download it"
    raise FileNotFoundError(
        f"no trained {algo} agent for {env_name} in {ENJOY_FOLDER} or {TRAIN_FOLDER} ({last_error}): "
        f"train one with `python -m rl_zoo3.train --algo {algo} --env {env_name}`, or name its folder with -f"
    )


def _report_tasks(create_test_env: Callable[..., VecEnv], *args: Any, **kwargs: Any) -> VecEnv:
    """Print a per-task table when a multi-task environment made for ``enjoy`` is closed."""
    env = create_test_env(*args, **kwargs)
    if not env.has_attr("num_tasks"):
        return env
    from sb3_mtrl.zoo.report import VecTaskReport

    return VecTaskReport(env)
