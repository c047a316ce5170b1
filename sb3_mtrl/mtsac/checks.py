"""Checks of arguments that the algorithms take."""

from collections.abc import Mapping
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import get_device

from sb3_mtrl.common.utils import check_choice, check_integer, check_number, check_number_or_auto, check_that, number_of


def check_policy(policy: Any, base: type[BasePolicy], aliases: Mapping[str, type[BasePolicy]]) -> None:
    """
    :param policy: Policy class, or its name
    :param base: Class that it has to be, or be derived from
    :param aliases: Names of policies
    :raises ValueError: if it is no such class, nor one of the names
    """
    is_class = isinstance(policy, type) and issubclass(policy, base)
    is_name = isinstance(policy, str) and policy in aliases
    expected = f"a subclass of {base.__name__} or one of {', '.join(map(repr, aliases))}"
    check_that("policy", policy, is_class or is_name, expected)


def check_env(env: Any) -> None:
    """
    :param env: See SB3's ``SAC``
    :raises ValueError: if it is no environment
    """
    is_env = env is None or isinstance(env, str) or hasattr(env, "observation_space")
    check_that("env", env, is_env, "an environment, a vector environment or the id of an environment")


def check_device(device: Any) -> None:
    """
    :param device: PyTorch device, or its name
    :raises ValueError: if PyTorch knows no such device
    """
    try:
        get_device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be 'auto' or a device of PyTorch, got {device!r}: {error}") from error


def check_cuda(name: str, value: Any, other: str, device: th.device) -> None:
    """
    :param name: Name of an argument that asks for a GPU
    :param value: Value got
    :param other: What it has to be without, as it follows "must be"
    :param device: Device of the networks
    :raises ValueError: if that is no GPU
    """
    if device.type != "cuda":
        reason = "" if th.cuda.is_available() else " (PyTorch finds no CUDA device)"
        raise ValueError(f"{name} must be {other} with networks on device {device.type!r}, got {value!r}{reason}")


def check_train_freq(train_freq: Any, n_envs: int) -> Any:
    """
    :param train_freq: See SB3's ``SAC``
    :param n_envs: Number of sub-environments
    :return: The same with Python's int
    :raises ValueError: if it is neither a number of steps nor such a number and its unit, or counts episodes of several
        sub-environments
    """
    is_pair = isinstance(train_freq, tuple) and len(train_freq) == 2
    is_other_sequence = isinstance(train_freq, (list, tuple)) and not is_pair
    check_that("train_freq", train_freq, not is_other_sequence, "an integer or a tuple like (1, 'step') or (1, 'episode')")
    number, unit = train_freq if is_pair else (train_freq, "step")
    unit_name = getattr(unit, "value", unit)
    check_choice("the unit of train_freq", unit_name, [unit.value for unit in TrainFrequencyUnit])
    number = check_integer("train_freq", number, 1)
    if n_envs > 1 and unit_name == TrainFrequencyUnit.EPISODE.value:
        raise ValueError(f"train_freq must be in steps with {n_envs} sub-environments, got {train_freq}")
    return (number, unit) if is_pair else number


def check_learning_rate(learning_rate: Any) -> Any:
    """
    :param learning_rate: A number, or a function of the remaining progress, which is 1 at the start
    :return: The function, or Python's float
    :raises ValueError: if it is neither, or no learning rate at the start
    """
    if not callable(learning_rate):
        return float(check_number("learning_rate", learning_rate, 0))
    try:
        start = float(learning_rate(1.0))
    except Exception as error:
        raise ValueError(
            f"learning_rate must be a number or a function of the remaining progress, got {learning_rate!r}: {error}"
        ) from error
    check_number("learning_rate", start, 0)
    return learning_rate


def check_ent_coef(ent_coef: Any) -> Any:
    """
    :param ent_coef: See ``MTSAC``
    :return: The same, a number as Python's
    :raises ValueError: if it is none of what is listed there
    """
    if isinstance(ent_coef, str) and ent_coef.startswith("auto_"):
        check_number("the start of ent_coef, behind 'auto_',", number_of(ent_coef.removeprefix("auto_")), above=0)
        return ent_coef
    return check_number_or_auto("ent_coef", ent_coef, 0)
