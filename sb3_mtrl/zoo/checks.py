"""Refuse hyperparameters that RL Zoo would stumble over later, with a message that does not name them."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mtrl.common.utils import check_choice, check_flag, check_integer, check_number, check_that, number_of

# What RL Zoo reads beside the arguments of the algorithm
RL_ZOO_KEYS = (
    *("n_envs", "n_timesteps", "normalize", "env_wrapper", "vec_env_wrapper", "callback", "frame_stack", "monitor_kwargs"),
    *("env_kwargs", "noise_type", "noise_std"),
)
# What RL Zoo evaluates where it is a string
CODE_KEYS = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize")
# What sb3_mtrl.zoo.exp_manager reads
OWN_KEYS = (
    *("batch_size_per_task", "vec_env", "n_workers", "worker_timeout", "restart_workers"),
    *("random_baseline", "tuning_objective"),
)
# Arguments of the algorithm that come from the command line
COMMAND_LINE_KEYS = ("env", "seed", "verbose", "device", "tensorboard_log")
NOISE_TYPES = ("normal", "ornstein-uhlenbeck")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
TUNING_OBJECTIVES = ("success_rate", "mean_reward")


def check_config_file(path: Path, env_id: str) -> None:
    """
    :param path: Hyperparameter file (YAML)
    :param env_id: Id of the environment
    :raises ValueError: if it is no YAML file, or its entry for the environment is no mapping or names the batch size twice
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"the hyperparameter file {path} must be YAML, got: {error}") from error
    check_that(f"the content of {path}", content, isinstance(content, dict), "a mapping from environments to hyperparameters")
    key = env_id if env_id in content else "default"
    entry = content.get(key, {})  # RL Zoo says it if there is none
    check_that(f"the entry {key!r} of {path}", entry, isinstance(entry, dict), "a mapping of hyperparameters")
    check_batch_size(f"the entry {key!r} of {path}", entry)


def check_batch_size(place: str, hyperparams: Mapping[str, Any]) -> None:
    """
    :param place: Where the hyperparameters are given
    :param hyperparams: Hyperparameters
    :raises ValueError: if they name the size of a batch both over all tasks and per task
    """
    given = {key: hyperparams.get(key) for key in ("batch_size", "batch_size_per_task")}
    if None not in given.values():
        raise ValueError(
            f"only one of batch_size and batch_size_per_task must be given in {place}, "
            f"got {' and '.join(f'{key}={value!r}' for key, value in given.items())}"
        )


def check_hyperparams(algorithm: type[BaseAlgorithm], hyperparams: Mapping[str, Any]) -> None:
    """
    Check all that is not an argument of the algorithm, which checks those itself.

    :param algorithm: Class of the algorithm
    :param hyperparams: Entry of a hyperparameter file
    :raises ValueError: for an unknown key, one that is missing, or a bad value
    """
    _check_keys(algorithm, hyperparams)
    # "num_tasks" stands for a number that is not known yet
    given: dict[str, Any] = {key: 1 if value == "num_tasks" else value for key, value in hyperparams.items()}
    policy = given["policy"]
    check_that("policy", policy, isinstance(policy, str), "the name of a policy, or of a class with its module")
    if "." in policy:
        _check_name("policy", policy)
    check_number("n_timesteps", given.get("n_timesteps", 1), above=0)
    check_integer("n_envs", given.get("n_envs", 1), 1)
    check_integer("batch_size_per_task", given.get("batch_size_per_task"), 1, or_none=True)
    check_integer("frame_stack", given.get("frame_stack"), 1, or_none=True)
    check_integer("n_workers", given.get("n_workers"), 1, or_none=True)
    check_number("worker_timeout", given.get("worker_timeout"), above=0, or_none=True, finite=False)
    if given.get("restart_workers") is not None:
        check_flag("restart_workers", given["restart_workers"])
    check_number("learning_starts", given.get("learning_starts", 0))
    check_flag("random_baseline", given.get("random_baseline", False))
    check_choice("tuning_objective", given.get("tuning_objective", TUNING_OBJECTIVES[0]), TUNING_OBJECTIVES)
    env_kwargs = given.get("env_kwargs", {})
    check_that("env_kwargs", env_kwargs, isinstance(env_kwargs, dict), "a mapping")
    for key, types in (("monitor_kwargs", (dict, str)), ("normalize", (bool, dict, str))):
        value = given.get(key)
        is_right = value is None or isinstance(value, types)
        check_that(key, value, is_right, f"of type {' or '.join(kind.__name__ for kind in types)}, or null")
    for key in CODE_KEYS:
        if isinstance(given.get(key), str):
            _check_syntax(key, given[key])
    if "learning_rate" in given:
        _check_learning_rate(given["learning_rate"])
    _check_noise(given)
    for key in ("env_wrapper", "vec_env_wrapper", "callback"):
        value = given.get(key)
        for entry in value if isinstance(value, list) else [] if value is None else [value]:
            _check_entry(key, entry)


def _check_keys(algorithm: type[BaseAlgorithm], hyperparams: Mapping[str, Any]) -> None:
    known = [*(name for name in _arguments_of(algorithm) if name not in COMMAND_LINE_KEYS), *RL_ZOO_KEYS, *OWN_KEYS]
    for key in hyperparams:
        if key in known:
            continue
        if key in COMMAND_LINE_KEYS:
            raise ValueError(
                f"{key} must be given on the command line, not among the hyperparameters, got {hyperparams[key]!r}"
            )
        nearest = difflib.get_close_matches(str(key), known, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(sorted(known))}"
        raise ValueError(f"{key!r} is no hyperparameter of {algorithm.__name__}{hint}")
    for key in ("policy", "n_timesteps"):
        if key not in hyperparams:
            raise ValueError(f"{key} must be among the hyperparameters, got only {', '.join(map(str, hyperparams))}")


def _arguments_of(algorithm: type[BaseAlgorithm]) -> list[str]:
    """Names of its arguments, with those of its base classes if it passes on what it does not know."""
    arguments: list[str] = []
    for base in algorithm.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        kinds = {parameter.kind for parameter in parameters.values()}
        arguments += [
            name
            for name, parameter in parameters.items()
            if name != "self" and not name.startswith("_") and parameter.kind not in VARIADIC
        ]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return arguments


def _check_syntax(key: str, code: str) -> None:
    try:
        compile(code.lstrip(" \t"), key, "eval")
    except (SyntaxError, ValueError) as error:  # a ValueError for null bytes
        raise ValueError(f"{key} must be Python code that RL Zoo can evaluate, got {code!r}: {error}") from error


def _check_learning_rate(learning_rate: Any) -> None:
    if not isinstance(learning_rate, str):
        check_number("learning_rate", learning_rate, 0)
        return
    parts = learning_rate.split("_")
    check_that("learning_rate", learning_rate, len(parts) == 2, "a number or 'lin_<number>'")
    check_number("the number in learning_rate", number_of(parts[1]), 0)


def _check_noise(given: Mapping[str, Any]) -> None:
    # RL Zoo would hand these two on to the algorithm where noise_type is none
    if "noise_type" not in given:
        if "noise_std" in given:
            raise ValueError(f"noise_std must not be given without noise_type, got {given['noise_std']!r}")
        return
    noise_type = given["noise_type"]
    check_choice("noise_type", noise_type.strip() if isinstance(noise_type, str) else noise_type, NOISE_TYPES)
    if "noise_std" not in given:
        raise ValueError(f"noise_std must be given with noise_type, got only noise_type={noise_type!r}")
    noise_std = given["noise_std"]
    for value in noise_std if isinstance(noise_std, list) else [noise_std]:
        check_number("noise_std", value, 0)


def _check_entry(key: str, entry: Any) -> None:
    """Refuse what RL Zoo takes for no wrapper or callback; arguments may follow it, ``{name: {argument: value}}``."""
    if isinstance(entry, dict):
        check_that(key, entry, len(entry) == 1, "classes, each as 'name' or as 'name: {argument: value}'")
        ((entry, kwargs),) = entry.items()
        check_that(f"the arguments of {entry} in {key}", kwargs, isinstance(kwargs, dict), "a mapping")
    is_object = isinstance(entry, BaseCallback) if key == "callback" else isinstance(entry, type)
    if not is_object:
        _check_name(key, entry)


def _check_name(key: str, name: Any) -> None:
    """Refuse what does not name something that can be imported and called."""
    check_that(key, name, isinstance(name, str), "names of classes")
    module, _, attribute = name.rpartition(".")
    check_that(key, name, bool(module), "names of classes with their module, like 'module.Class'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # a ValueError for names like "..Class"
        raise ValueError(f"{key} must name classes that can be imported, got {name!r}: {error}") from error
    check_that(key, name, callable(found), "names of classes")
