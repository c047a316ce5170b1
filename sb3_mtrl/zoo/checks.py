"""Refuse hyperparameters that RL Zoo would stumble over later, with a message that does not name them."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mtrl.common.utils import check_choice, check_integer, check_number, check_that, number_of

# What RL Zoo reads beside the arguments of the algorithm
RL_ZOO_KEYS = (
    *("n_envs", "n_timesteps", "normalize", "env_wrapper", "vec_env_wrapper", "callback", "frame_stack", "monitor_kwargs"),
    *("env_kwargs", "noise_type", "noise_std"),
)
# What sb3_mtrl.zoo.exp_manager reads
OWN_KEYS = (
    *("batch_size_per_task", "vec_env", "n_workers", "worker_timeout", "restart_workers"),
    *("random_baseline", "tuning_objective"),
)
# Arguments of the algorithm that come from the command line
COMMAND_LINE_KEYS = ("env", "seed", "verbose", "device", "tensorboard_log")
NOISE_TYPES = ("normal", "ornstein-uhlenbeck")


def check_config_file(path: Path, env_id: str) -> None:
    """
    :param path: Hyperparameter file (YAML)
    :param env_id: Id of the environment
    :raises ValueError: if it is no YAML file, or its entry for the environment is no mapping
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"the hyperparameter file {path} must be YAML, got: {error}") from error
    check_that(f"the content of {path}", content, isinstance(content, dict), "a mapping from environments to hyperparameters")
    key = env_id if env_id in content else "default"
    entry = content.get(key, {})  # RL Zoo says it if there is none
    check_that(f"the entry {key!r} of {path}", entry, isinstance(entry, dict), "a mapping of hyperparameters")


def check_hyperparams(algorithm: type[BaseAlgorithm], hyperparams: Mapping[str, Any]) -> None:
    """
    Check all that is not an argument of the algorithm, which checks those itself.

    :param algorithm: Class of the algorithm
    :param hyperparams: Entry of a hyperparameter file
    :raises ValueError: for an unknown key, one that is missing, or a bad value
    """
    _check_keys(algorithm, hyperparams)
    # "num_tasks" stands for a number that is not known yet
    given = {key: 1 if value == "num_tasks" else value for key, value in hyperparams.items()}
    policy = given["policy"]
    check_that("policy", policy, isinstance(policy, (str, type)), "the name of a policy or a policy class")
    if isinstance(policy, str) and "." in policy:
        _check_class_name("policy", policy)
    check_number("n_timesteps", given.get("n_timesteps", 1), above=0)
    check_integer("n_envs", given.get("n_envs", 1), 1)
    check_integer("batch_size_per_task", given.get("batch_size_per_task"), 1, or_none=True)
    check_integer("frame_stack", given.get("frame_stack"), 1, or_none=True)
    check_integer("n_workers", given.get("n_workers"), 1, or_none=True)
    check_number("worker_timeout", given.get("worker_timeout"), above=0, or_none=True, finite=False)
    check_choice("restart_workers", given.get("restart_workers"), (True, False, None))
    check_number("learning_starts", given.get("learning_starts", 0), 0)
    check_choice("random_baseline", given.get("random_baseline", False), (True, False))
    for key, types in (("env_kwargs", (dict,)), ("monitor_kwargs", (dict, str)), ("normalize", (bool, dict, str))):
        value = given.get(key, {})
        check_that(key, value, isinstance(value, types), f"of type {' or '.join(kind.__name__ for kind in types)}")
    learning_rate = given.get("learning_rate")
    if isinstance(learning_rate, str):
        check_that("learning_rate", learning_rate, learning_rate.startswith("lin_"), "a number or 'lin_<number>'")
        check_number("the number in learning_rate", number_of(learning_rate.removeprefix("lin_")), 0)
    if given.get("noise_type") is not None:
        check_choice("noise_type", given["noise_type"], NOISE_TYPES)
        check_number("noise_std", given.get("noise_std"), 0)
    for key in ("env_wrapper", "vec_env_wrapper", "callback"):
        value = given.get(key)
        for entry in value if isinstance(value, list) else [value]:
            _check_class_name(key, entry)


def _check_keys(algorithm: type[BaseAlgorithm], hyperparams: Mapping[str, Any]) -> None:
    arguments = [name for name in inspect.signature(algorithm).parameters if not name.startswith("_")]
    known = [*(name for name in arguments if name not in COMMAND_LINE_KEYS), *RL_ZOO_KEYS, *OWN_KEYS]
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


def _check_class_name(key: str, entry: Any) -> None:
    """Refuse what is no class that can be imported; arguments may follow it, ``{name: {argument: value}}``."""
    if isinstance(entry, dict):
        check_that(key, entry, len(entry) == 1, "classes, each as 'name' or as 'name: {argument: value}'")
        ((entry, kwargs),) = entry.items()
        check_that(f"the arguments of {entry} in {key}", kwargs, isinstance(kwargs, dict), "a mapping")
    if not isinstance(entry, str):
        check_that(key, entry, entry is None or isinstance(entry, type) or hasattr(entry, "init_callback"), "names of classes")
        return
    module, _, name = entry.rpartition(".")
    check_that(key, entry, bool(module), "names of classes with their module, like 'module.Class'")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} must name classes that can be imported, got {entry!r}: {error}") from error
