"""Everything that two trainings must have in common to be the same one, to the last bit."""

import hashlib
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecEnv

from sb3_mtrl import MTSAC
from sb3_mtrl.common.checkpoint import iter_callbacks

# Of the process or its clock, and what is compared by itself
NOT_COMPARED = {
    *("start_time", "_num_timesteps_at_start", "last_checkpoint", "_store", "_saved_timesteps", "_has_started", "_root"),
    *("_at_rollout_start", "_is_due", "_n_updates_in_rollout", "_inexact"),
    *("save_path", "log_path", "best_model_save_path", "folder", "seed", "resume"),
    *("locals", "globals", "model", "parent", "policy_class", "replay_buffer_class", "batch_norm_stats_target"),
    *("_spoilt_rows", "_rollout_rewards"),  # of one update, which sets them first
    "timesteps",  # of the callback that ends a training
    "plain_settings",  # what `save` writes of the model beside its attributes
}
# Without a state, or one that is compared by itself
NO_STATE = (
    *(th.nn.Module, th.optim.Optimizer, VecEnv, gym.Env, spaces.Space, BaseAlgorithm, BaseCallback, Logger, KVWriter),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)


def fingerprint(model: MTSAC, callback: BaseCallback | None = None, n_steps: int = 5) -> dict[str, str]:
    """
    :param model: A model after training; the environment is stepped
    :param callback: The callback of the training
    :param n_steps: Steps to make for a look at the state of the environment
    :return: A digest of each part: parameters, optimisers, replay buffer, all attributes of the model and of the callbacks,
        generators, and the steps that the environment makes next
    """
    parts: dict[str, Any] = {"parameters": model.get_parameters()}
    parts["variables"] = {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}
    parts["model"] = {name: value for name, value in vars(model).items() if name != "replay_buffer"}
    parts["guards"] = [vars(guard) for guard in model.update_guards]
    parts["replay_buffer"] = {name: value for name, value in vars(model.replay_buffer).items() if name != "_shares"}
    parts["generators"] = [random.getstate(), np.random.get_state(), th.get_rng_state()]
    parts["actions"] = [model.action_space.sample() for _ in range(3)]
    if callback is not None:
        parts["callbacks"] = [[type(child).__name__, vars(child)] for child in iter_callbacks(callback)]
    zeros = np.zeros((model.n_envs, *model.action_space.shape), dtype=np.float32)
    parts["steps"] = [model.env.step(zeros) for _ in range(n_steps)]
    return {name: hashlib.sha256(value).hexdigest() for part in parts for name, value in leaves(part, parts[part])}


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """
    :param one: A fingerprint
    :param other: Another one
    :return: Names of the parts that differ
    """
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def leaves(name: str, value: Any) -> Iterator[tuple[str, bytes]]:
    """
    :param name: Name of the value
    :param value: The value
    :return: Name and content of each number, array and text in it
    """
    if isinstance(value, NO_STATE):
        return
    if isinstance(value, th.Tensor):
        yield name, f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().cpu().numpy().tobytes()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield name, f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, np.random.Generator):
        yield name, repr(value.bit_generator.state).encode()
    elif isinstance(value, th.Generator):
        yield name, value.get_state().numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            # "t" is when an episode ended, by the clock
            if key not in NOT_COMPARED and key != "t" and not str(key).startswith("time/"):
                yield from leaves(f"{name}.{key}", entry)
    elif isinstance(value, (list, tuple, deque, np.ndarray)):
        yield f"{name}.length", str(len(value)).encode()
        for index, entry in enumerate(value):
            yield from leaves(f"{name}.{index}", entry)
    elif hasattr(value, "__dict__") or is_dataclass(value):
        yield from leaves(f"{name}.{type(value).__name__}", vars(value))
    else:
        yield name, repr(value).encode()
