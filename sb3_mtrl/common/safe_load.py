"""
Reading SB3's model files without unpickling anything: weights and plain numbers only.

An SB3 zip holds a JSON text and tensors. What JSON cannot express (classes, spaces, schedules, the last observation) stands in
it as a pickle, and unpickling a file means to run what its author put there. Plain text is no safer by itself: SB3 makes an
environment of the string ``env``, and Gymnasium imports the module that such a string names. So a name counts only if a model
of this version has it plain, with a value that the algorithm accepts as an argument. The tensors are read by torch with
``weights_only=True`` in any case.
"""

import inspect
import io
import json
import math
import pathlib
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_mtrl.common.utils import check_integer, check_that

# What the wrong types, keys or sizes in plain values raise, in NumPy, Gymnasium and here
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
# Entry of the JSON with plain descriptions of what SB3 would pickle
PLAIN = "plain_settings"
# What training leaves behind. A model that is loaded safely starts without it.
RUN_STATE = (
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "_last_state"),
    *("ep_info_buffer", "ep_success_buffer", "success_windows", "_succeeded"),
)
# The same, as numbers of each task: (2, T)
RUN_SUMS = ("_fresh_rewards", "_logged_success")
# Entries whose value is never the file's: made anew, or, as a folder to write to, for the user to choose
MADE_ANEW = ("lr_schedule", "action_noise", "tensorboard_log", "batch_norm_stats", "batch_norm_stats_target")
# Arguments of the algorithms that no plain value stands for
NOT_PLAIN = ("policy", "env", "device", "train_freq", "replay_buffer_class", *MADE_ANEW)
# Plain numbers that training keeps, or that are safe with any value
NUMBERS = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "start_time", "_episode_num", "n_envs", "_n_updates"),
    *("_current_progress_remaining", "_stats_window_size", "verbose"),
)
# What files are damaged in, see zipfile, json and torch
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, UnicodeDecodeError, pickle.UnpicklingError)


def space_to_plain(space: spaces.Space) -> dict[str, Any] | None:
    """
    :param space: A space
    :return: It in types that JSON can hold; None if it is no Box and no dictionary of boxes
    """
    if isinstance(space, spaces.Dict):
        parts = {key: space_to_plain(part) for key, part in space.spaces.items()}
        return None if None in parts.values() else {"dict": parts}
    if not isinstance(space, spaces.Box):
        return None
    bounds: dict[str, Any] = {}
    for name, bound in (("low", space.low), ("high", space.high)):
        values = np.unique(bound)
        # float32 to float to text and back is exact; JSON's Infinity is Python's
        bounds[name] = values[0].item() if len(values) == 1 else bound.tolist()
    return {"shape": list(space.shape), "dtype": str(space.dtype), **bounds}


def space_from_plain(plain: Mapping[str, Any]) -> spaces.Space:
    """
    :param plain: What ``space_to_plain`` returned
    :return: The space
    """
    if "dict" in plain:
        return spaces.Dict({key: space_from_plain(part) for key, part in plain["dict"].items()})
    shape, dtype = tuple(plain["shape"]), np.dtype(plain["dtype"])
    check_that("the dtype of a space", plain["dtype"], dtype.kind in "biuf", "a number type")
    low, high = (np.broadcast_to(np.asarray(plain[name], dtype=dtype), shape) for name in ("low", "high"))
    return spaces.Box(low, high, shape, dtype.type)  # type: ignore[arg-type]


def train_freq_to_plain(train_freq: TrainFreq) -> list[Any]:
    """
    :param train_freq: Frequency and unit
    :return: Both in types that JSON can hold
    """
    return [train_freq.frequency, train_freq.unit.value]


def read_bytes(path: str | pathlib.Path | io.BufferedIOBase) -> io.BytesIO:
    """
    :param path: A file, with or without its ending ``.zip``, or one that is open
    :return: Its content: what is checked is then what is read afterwards
    """
    if isinstance(path, io.BufferedIOBase):
        return io.BytesIO(path.read())
    path = pathlib.Path(path)
    if not path.exists() and path.suffix != ".zip":
        path = pathlib.Path(f"{path}.zip")
    return io.BytesIO(path.read_bytes())


def check_archive(path: str | pathlib.Path | io.BufferedIOBase) -> None:
    """
    Compare what a model file holds with its checksums. Python 3.13 does not where a part is read by seeking in it, as PyTorch
    does.

    :param path: A file, with or without its ending ``.zip``, or one that is open
    :raises zipfile.BadZipFile: if it is not as it was written
    """
    with zipfile.ZipFile(path if isinstance(path, io.BufferedIOBase) else read_bytes(path)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")


def replace_pickles(
    path: str | pathlib.Path | io.BufferedIOBase,
    content: io.BytesIO,
    algorithm_class: type,
    given: Mapping[str, Any],
    env_spaces: Mapping[str, spaces.Space],
) -> dict[str, Any]:
    """
    Find a value for everything that a model file holds as a pickle, without reading the pickles, and check what it holds as
    plain text.

    :param path: The file's name, for messages
    :param content: The file
    :param algorithm_class: Class of the model
    :param given: Values by name, which win
    :param env_spaces: Spaces for files that describe none
    :return: What SB3's ``load`` takes as ``custom_objects``: with them it unpickles nothing
    :raises ValueError: if the file is damaged, something in it can neither be rebuilt nor left out, or has a value that no
        model has
    """
    try:
        with zipfile.ZipFile(content) as archive:
            data = dict(json.loads(archive.read("data").decode()))
    except (*DAMAGE, TypeError, ValueError) as error:
        raise ValueError(f"path must name a whole model file, got {path}, which is damaged: {error}") from error
    finally:
        content.seek(0)
    pickles = {name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value}
    plain = {name: value for name, value in data.items() if name not in pickles and name not in given}
    values: dict[str, Any] = dict.fromkeys((*MADE_ANEW, *RUN_STATE)) | dict(env_spaces)
    try:
        values |= _from_plain(plain.get(PLAIN), algorithm_class)
        refused = _check_plain({name: value for name, value in plain.items() if name not in values}, algorithm_class)
        values |= {name: np.zeros((2, int(data.get("num_tasks", 1)))) for name in RUN_SUMS}
    except MALFORMED as error:
        raise ValueError(f"safe=True reads values that a model can have and refused some of {path}: {error!r}") from error
    values |= given
    refused = sorted(name for name in {*pickles, *refused} if name not in values)
    if refused:
        raise ValueError(
            f"safe=True reads weights and numbers only and refused {', '.join(refused)} of {path}: pickles, or names that "
            f"{algorithm_class.__name__} does not save as plain values. Pass values for them as arguments of load "
            "(observation_space and action_space also come with env), or, if you trust the file, safe=False"
        )
    if "action_noise" in pickles and "action_noise" not in given:
        warnings.warn("safe=True left out the action noise of the model: pass action_noise to train on", stacklevel=3)
    return {name: values[name] for name in data if name in values}


def _check_plain(plain: Mapping[str, Any], algorithm_class: Any) -> list[str]:
    """
    Check plain entries, the arguments among them by the constructor of the algorithm.

    :return: Names that no model has as plain values
    :raises ValueError: for a value that no model has
    """
    arguments = {
        name: plain[name]
        for name in inspect.signature(algorithm_class).parameters
        if name in plain and name not in NOT_PLAIN and not name.startswith("_")
    }
    for name, value in plain.items():
        if name in NUMBERS and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    check_that(PLAIN, plain.get(PLAIN), isinstance(plain.get(PLAIN), (dict, type(None))), "descriptions by name")
    check_integer("n_envs", plain.get("n_envs", 1), 1)
    task_names = plain.get("task_names", [])
    is_names = isinstance(task_names, list) and all(isinstance(task_name, str) for task_name in task_names)
    check_that("task_names", task_names, is_names, "a list of names")
    policy = next(iter(algorithm_class.policy_aliases))
    # Without `_setup_model` this makes no network
    model = algorithm_class(policy, None, device="cpu", _init_setup_model=False, **{**arguments, "verbose": 0})
    known = (*arguments, *NUMBERS, "task_names", PLAIN)
    # Arguments that a subclass settles have the values it gives them
    return [name for name in plain if name not in known and not _is_same_scalar(vars(model).get(name), plain[name])]


def _is_same_scalar(own: Any, value: Any) -> bool:
    return isinstance(own, (str, int, float)) and type(own) is type(value) and own == value


def _from_plain(plain: Any, algorithm_class: Any) -> dict[str, Any]:
    """Values of ``plain_settings``; names of classes count only where the algorithm knows them itself."""
    if not isinstance(plain, dict):
        return {}
    values: dict[str, Any] = {}
    for name in ("observation_space", "action_space"):
        if plain.get(name) is not None:
            values[name] = space_from_plain(plain[name])
    if plain.get("train_freq") is not None:
        frequency, unit = plain["train_freq"]
        check_integer("train_freq", frequency, 1)
        values["train_freq"] = TrainFreq(int(frequency), TrainFrequencyUnit(unit))
    for name, known in algorithm_class.plain_classes().items():
        if plain.get(name) in known:
            values[name] = known[plain[name]]
    return values
