"""Checkpoints from which a training goes on as if it had not been stopped."""

import copy
import io
import os
import pathlib
import pickle
import platform
import random
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import version
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.vec_env import VecEnv

import sb3_mtrl
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.checkpoint_store import (
    BrokenCheckpointError,
    Checkpoint,
    CheckpointStore,
    read_checkpoint,
)
from sb3_mtrl.common.cpu_tuning import use_onednn, uses_onednn
from sb3_mtrl.common.utils import check_integer, check_that, constructor_arguments, restore_generator
from sb3_mtrl.common.vec_env.state import get_space_generators, get_vec_env_state, set_space_generators, set_vec_env_state

MODEL, STATE, FOREIGN_BUFFER = "model.zip", "state.pth", "replay_buffer.pkl"
# What a callback refers to, which is not its own state
_NOT_CALLBACK_STATE = ("model", "locals", "globals", "parent", "_root")
_NOT_STATE_TYPES = (
    *(BaseCallback, VecEnv, gym.Env, BaseAlgorithm, BaseBuffer),
    *(th.nn.Module, th.optim.Optimizer, Logger, KVWriter),
)
# What the logger has taken in since the last dump
_LOGGED = ("name_to_value", "name_to_count", "name_to_excluded")
# Arguments that say how a training is run and shown, not what it computes
_NOT_SETTINGS = ("verbose", "seed", "device", "tensorboard_log", "stats_window_size", "policy", "env")


class MultiTaskCheckpointCallback(BaseCallback):
    """
    Write checkpoints from which the training goes on exactly, and go on from the newest one.

    With ``resume="auto"`` the same program, started again after a crash, does the rest: ``learn`` sets everything up as for a
    new training, then the newest whole checkpoint takes its place, and ``num_timesteps`` counts on to the same
    ``total_timesteps``. A broken checkpoint is skipped with a warning that names file and reason.

    A checkpoint holds networks, optimisers, replay buffer (with priorities and extra columns), statistics of
    ``VecNormalize``, environments, also in the middle of an episode, and evaluation environments of callbacks, the state of
    all callbacks and guards, values not yet logged, and the generators of PyTorch, NumPy, Python, environments and spaces.
    On a CPU, with ``DummyVecEnv`` and the same versions, the training ends with the same parameters, to the last bit. Where
    the state of an environment cannot be taken a warning says so; episodes are begun anew then.

    It is written at the start of a rollout, when all updates are made, the first time after every ``save_freq`` calls, and at
    the end of a training that has come to its end. If that fails (the disk or the memory is full), a warning says so, older
    checkpoints stay, and training goes on.

    Callbacks are recognised by class and order. What is restored of one is all that can be pickled, but for attributes with
    the name of an argument of its constructor: arguments are those of the program that goes on.

    A checkpoint holds pickled objects: load none that you do not trust.

    :param save_freq: Calls of the callback (each is one step of all sub-environments) between two checkpoints, at least 1
    :param save_path: Folder of the checkpoints, for this training alone
    :param keep: Number of last checkpoints to keep, at least 1
    :param resume: None: start anew, ``save_path`` must not hold checkpoints. "auto": go on from the newest whole checkpoint
        in ``save_path``, start anew if there is none. A path: go on from the checkpoint in this folder; each start begins
        there again, so use "auto" to restart. Where it does not lie in ``save_path`` that must not hold checkpoints; where it
        does, newer ones stay until ``keep`` others are newer
    :param verbose: Verbosity level: 1 names what is written or restored
    :raises ValueError: for a bad argument, or if ``save_path`` cannot be written to; when training starts, if another process
        trains there, if the folder holds checkpoints but none is whole, or if the checkpoint is of other networks, tasks,
        sub-environments or another algorithm
    """

    model: Any  # an MTSAC, whose module imports this one

    def __init__(
        self,
        save_freq: int,
        save_path: str | os.PathLike[str],
        keep: int = 3,
        resume: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        check_integer("save_freq", save_freq, 1)
        check_integer("keep", keep, 1)
        check_that("save_path", save_path, isinstance(save_path, (str, os.PathLike)), "a folder")
        check_that("resume", resume, resume is None or isinstance(resume, (str, os.PathLike)), "'auto', a folder or None")
        self.save_freq = save_freq
        self.save_path = save_path
        self.keep = keep
        self.resume = resume
        self._store = CheckpointStore(save_path, keep)
        self._has_started = False
        self._is_due = False
        self._is_in_rollout = False
        self._saved_timesteps: int | None = None  # of the last checkpoint
        self._n_updates_in_rollout = 0  # made when the last rollout ended
        self._inexact: set[str] = set()  # environments of which a warning has said that their state cannot be taken
        self._root: BaseCallback = self  # of the tree of callbacks
        # What the first rollout draws before the moment at which the checkpoint was written is taken back
        self._at_rollout_start: dict[str, Any] | None = None

    def _init_callback(self) -> None:
        if not hasattr(self.model, "_running_state"):
            raise ValueError(
                f"MultiTaskCheckpointCallback is for MTSAC and its subclasses, got a model of {type(self.model).__name__}"
            )

    # ------------------------------------------------------------ what SB3 calls

    def start_training(self, root: BaseCallback) -> None:
        """
        Restore a checkpoint, if that is asked for; called by the model when all is set up for training.

        :param root: The callback with all others in it
        """
        self._root = root
        self._is_due = self._is_in_rollout = False
        if self._has_started:  # learn() was called again
            return
        self._has_started = True
        self._store.lock()
        checkpoint = self._find_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
            if self.verbose >= 1:
                print(f"Going on from {checkpoint.path}")
        else:
            state = self._get_state()
            _state_bytes(state)  # what cannot be pickled is to be known now, not after hours
            for what, environment in state["environments"]:
                self._warn_if_not_exact(what, environment["reason"])
        self._store.clean_up()

    def _on_rollout_start(self) -> None:
        if self._at_rollout_start is not None:
            self._set_generators(self._at_rollout_start)
            self._at_rollout_start = None
        if self._is_due:
            self._save(at_rollout_start=True)
        self._is_in_rollout = True

    def _on_step(self) -> bool:
        self._is_due = self._is_due or self.n_calls % self.save_freq == 0
        return True

    def _on_rollout_end(self) -> None:
        self._is_in_rollout = False
        self._n_updates_in_rollout = self.model._n_updates

    def _on_training_end(self) -> None:
        # A callback that stops a training does so within a step, whose transition is lost then. RL Zoo also calls this after
        # a KeyboardInterrupt, which may have come in the middle of an update
        model = self.model
        has_ended = not self._is_in_rollout and model.num_timesteps >= model._total_timesteps
        waits_for_updates = (
            model.num_timesteps > model.learning_starts
            and model.gradient_steps != 0
            and model._n_updates == self._n_updates_in_rollout
        )
        if has_ended and not waits_for_updates and self._saved_timesteps != model.num_timesteps:
            self._save(at_rollout_start=False)

    # -------------------------------------------------------------------- saving

    def _save(self, at_rollout_start: bool) -> None:
        start = time.perf_counter()
        model, buffer = self.model, self.model.replay_buffer
        self._is_due = False
        try:
            state = self._get_state()
        except MemoryError as error:
            self._warn_of_failure(error)
            return
        for what, environment in state["environments"]:
            self._warn_if_not_exact(what, environment["reason"])
        description = {**self._describe(), "at_rollout_start": at_rollout_start}
        writers = {
            MODEL: lambda file: file.write(_model_bytes(model)),
            STATE: lambda file: file.write(_state_bytes(state)),
        }
        has_rings = isinstance(buffer, MultiTaskReplayBuffer)
        if buffer is not None and not has_rings:
            writers[FOREIGN_BUFFER] = lambda file: pickle.dump(buffer, file, pickle.HIGHEST_PROTOCOL)
        try:
            path = self._store.write(model.num_timesteps, description, writers, buffer if has_rings else None)
        except (OSError, MemoryError) as error:
            self._warn_of_failure(error)
            return
        model.last_checkpoint = str(path)
        self._saved_timesteps = model.num_timesteps
        if self.verbose >= 1:
            print(f"Checkpoint: {path} ({time.perf_counter() - start:.2f} s)")

    def _warn_of_failure(self, error: Exception) -> None:
        last = self.model.last_checkpoint
        kept = f"the last one is {last}" if last else "there is none before it"
        reason = str(error) or type(error).__name__  # a MemoryError often says nothing
        warnings.warn(
            f"the checkpoint at {self.model.num_timesteps} steps cannot be written to {self.save_path} ({reason}); {kept}. "
            "Training goes on",
            stacklevel=3,
        )

    def _describe(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the model, and what rounding depends on."""
        model, buffer = self.model, self.model.replay_buffer
        training = {
            "algorithm": type(model).__name__,
            "tasks": list(model.task_names),
            "n_envs": model.n_envs,
            "overlap": model.overlap,
            "parameters": {name: list(tensor.shape) for name, tensor in model.policy.state_dict().items()},
            "replay_buffer": None if buffer is None else [type(buffer).__name__, buffer.buffer_size],
        }
        if isinstance(buffer, MultiTaskReplayBuffer):
            training["columns"] = {name: column.stop - column.start for name, column in buffer._columns.items()}
        platform_ = {
            "sb3_mtrl": sb3_mtrl.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "torch": str(th.__version__),
            "numpy": np.__version__,
            "gymnasium": version("gymnasium"),
            "python": platform.python_version(),
            "processor": th.backends.cpu.get_cpu_capability(),
            "threads": th.get_num_threads(),
            "device": model.device.type,
        }
        return {"training": training, "platform": platform_}

    def _get_state(self) -> dict[str, Any]:
        model = self.model
        state = {
            "model": {name: getattr(model, name) for name in model._running_state()},
            "settings": _settings(model),
            "callbacks": [(type(callback).__name__, _get_callback_state(callback)) for callback in self._callbacks()],
            "environments": [(what, get_vec_env_state(venv)) for what, venv in self._environments()],
            "logger": [_picklable(getattr(model.logger, name)) for name in _LOGGED],
            "generators": self._get_generators(),
            "uses_onednn": uses_onednn(),
        }
        if isinstance(model.replay_buffer, MultiTaskReplayBuffer):
            state["replay_buffer"] = model.replay_buffer.get_checkpoint_state()
        return state

    def _get_generators(self) -> dict[str, Any]:
        model = self.model
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            # As NumPy's: a tensor would follow the others to their device
            "torch": th.get_rng_state().numpy(),
            "spaces": get_space_generators(model),  # for actions of the warm-up
        }
        if model.device.type == "cuda":
            state["cuda"] = th.cuda.get_rng_state(model.device).numpy()
        if model.use_sde:
            # Drawn for this rollout already
            noise = model.actor.action_dist
            state["noise"] = (noise.exploration_mat, noise.exploration_matrices)
        return state

    # ----------------------------------------------------------------- restoring

    def _find_checkpoint(self) -> Checkpoint | None:
        found = self._store.find()
        if self.resume is not None and self.resume != "auto":
            path = pathlib.Path(self.resume)
            if found and not self._store.holds(path):
                raise ValueError(
                    f"save_path must be a folder without checkpoints where resume={str(path)!r} lies elsewhere, got "
                    f"{self.save_path}, which holds {found[-1].name} (resume='auto' goes on from it)"
                )
            return read_checkpoint(path)
        if not found:
            return None
        if self.resume is None:
            raise ValueError(
                f"save_path must be a folder without checkpoints with resume=None, got {self.save_path}, which holds "
                f"{found[-1].name} (resume='auto' goes on from it)"
            )
        reasons = []
        for path in reversed(found):
            try:
                return read_checkpoint(path)
            except BrokenCheckpointError as error:
                reasons.append(str(error))
                warnings.warn(f"skipping the checkpoint {path}, which is broken: {error}", stacklevel=2)
        raise ValueError(
            f"save_path must hold a whole checkpoint with resume='auto', got {self.save_path}, where all are broken "
            f"({'; '.join(reasons)}); move them away to start anew"
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._check_fit(checkpoint)
        model = self.model
        with checkpoint.open(STATE) as file:
            state = th.load(file, map_location=model.device, weights_only=False)
        with checkpoint.open(MODEL) as file:
            _, parameters, variables = load_from_zip_file(file, device=model.device, load_data=False)
        model.set_parameters(parameters, device=model.device)
        for name, value in (variables or {}).items():
            recursive_getattr(model, name).data = value.data
        _warn_of_settings(state["settings"], _settings(model))
        for name, value in state["model"].items():
            setattr(model, name, value)
        # Frames per second are those of this process
        model._num_timesteps_at_start = model.num_timesteps
        self._restore_buffer(checkpoint, state)
        self._restore_callbacks(state["callbacks"])
        for name, values in zip(_LOGGED, state["logger"], strict=True):
            getattr(model.logger, name).clear()
            getattr(model.logger, name).update(values)
        self._restore_environments(state["environments"])
        self._set_generators(state["generators"])
        if checkpoint.description["at_rollout_start"]:
            self._at_rollout_start = state["generators"]
        if model._tunes_cpu and not use_onednn(state["uses_onednn"]):
            warnings.warn(
                "oneDNN, which computed the products so far, is not to be had: they will be rounded otherwise", stacklevel=2
            )
        self._store.go_on_from(checkpoint, model.replay_buffer if "replay_buffer" in state else None)
        self._is_due = False
        self._saved_timesteps = model.num_timesteps
        model.last_checkpoint = str(checkpoint.path)

    def _check_fit(self, checkpoint: Checkpoint) -> None:
        own, saved = self._describe(), checkpoint.description
        differences = [
            f"{name} {_shorten(saved['training'].get(name), value)} instead of {_shorten(value, saved['training'].get(name))}"
            for name, value in own["training"].items()
            if saved["training"].get(name) != value
        ]
        if differences:
            raise ValueError(
                f"the checkpoint {checkpoint.path} is of another training: it has {', '.join(differences)}. Start with the "
                "same arguments, or in another save_path"
            )
        others = [
            f"{name} {saved['platform'].get(name)} (now {value})"
            for name, value in own["platform"].items()
            if saved["platform"].get(name) != value
        ]
        if others:
            warnings.warn(
                f"the checkpoint {checkpoint.path} was written with {', '.join(others)}: training goes on from it, but it may "
                "round otherwise than it would have without the stop",
                stacklevel=2,
            )

    def _restore_buffer(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        model = self.model
        if "replay_buffer" in state:
            model.replay_buffer.set_checkpoint_state(state["replay_buffer"])
            checkpoint.load_rows(model.replay_buffer)
        elif FOREIGN_BUFFER in checkpoint.files:
            with checkpoint.open(FOREIGN_BUFFER) as file:
                model.load_replay_buffer(file, truncate_last_traj=False)

    def _restore_callbacks(self, states: list[tuple[str, dict[str, Any]]]) -> None:
        remaining = list(states)
        missing = []
        for callback in self._callbacks():
            match = next((entry for entry in remaining if entry[0] == type(callback).__name__), None)
            if match is None:
                missing.append(type(callback).__name__)
                continue
            remaining.remove(match)
            for name, value in match[1].items():
                current = getattr(callback, name, None)
                if isinstance(current, th.Generator):
                    restore_generator(current, value)
                else:
                    setattr(callback, name, value)
        if missing or remaining:
            parts = [f"nothing of {', '.join(missing)}"] if missing else []
            parts += [f"something of {', '.join(name for name, _ in remaining)}, which is not here"] if remaining else []
            warnings.warn(
                f"the checkpoint holds {', and '.join(parts)}: other callbacks than before go on as new ones", stacklevel=2
            )

    def _restore_environments(self, states: list[tuple[str, dict[str, Any]]]) -> None:
        remaining = list(states)
        for what, venv in self._environments():
            match = next((entry for entry in remaining if entry[0] == what), None)
            if match is None:
                continue  # of a callback that there was not; this was said
            remaining.remove(match)
            set_vec_env_state(venv, match[1])
            if match[1]["reason"] is not None:
                self._warn_if_not_exact(what, match[1]["reason"])
                if venv is self.model.env:
                    self._begin_episodes()

    def _begin_episodes(self) -> None:
        """Where the state of the environment is not known its episodes end here, without a transition to store."""
        model = self.model
        if model.seed is not None:
            model.env.seed(model.seed + model.num_timesteps)  # else the episodes of the beginning would come again
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
        if model._vec_normalize_env is not None:
            model._last_original_obs = model._vec_normalize_env.get_original_obs()
        model._start_episodes()

    def _set_generators(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        th.set_rng_state(th.from_numpy(state["torch"]))
        set_space_generators(self.model, copy.deepcopy(state["spaces"]))
        if "cuda" in state and self.model.device.type == "cuda":
            th.cuda.set_rng_state(th.from_numpy(state["cuda"]), self.model.device)
        if "noise" in state:
            noise = self.model.actor.action_dist
            noise.exploration_mat, noise.exploration_matrices = state["noise"]

    # ------------------------------------------------------------------- helpers

    def _callbacks(self) -> list[BaseCallback]:
        """All callbacks, and guards of the model that are not among them."""
        callbacks = list(iter_callbacks(self._root))
        guards = [guard for guard in self.model.update_guards if isinstance(guard, BaseCallback)]
        return callbacks + [guard for guard in guards if not any(guard is callback for callback in callbacks)]

    def _environments(self) -> list[tuple[str, VecEnv]]:
        """The training environment, and those of callbacks, each with a name."""
        environments = [("the training environment", self.model.env)]
        for callback in self._callbacks():
            for name, value in vars(callback).items():
                if isinstance(value, VecEnv) and not any(value is venv for _, venv in environments):
                    environments.append((f"{name} of {type(callback).__name__}", value))
        return environments

    def _warn_if_not_exact(self, what: str, reason: str | None) -> None:
        if reason is not None and what not in self._inexact:
            self._inexact.add(what)
            warnings.warn(
                f"checkpoints cannot hold the state of {what} ({reason}): a training that goes on from one begins new "
                "episodes, and is not exactly the one that it would have been",
                stacklevel=2,
            )


def find_checkpoint_callbacks(root: BaseCallback) -> list[MultiTaskCheckpointCallback]:
    """
    :param root: A callback with others in it
    :return: Those that write checkpoints
    """
    return [callback for callback in iter_callbacks(root) if isinstance(callback, MultiTaskCheckpointCallback)]


def iter_callbacks(root: BaseCallback, seen: set[int] | None = None) -> Iterator[BaseCallback]:
    """
    :param root: A callback
    :param seen: Identities of callbacks to leave out
    :return: It, and all callbacks in it, in order and each once
    """
    seen = set() if seen is None else seen
    seen.add(id(root))
    yield root
    for name, value in vars(root).items():
        if name in _NOT_CALLBACK_STATE:
            continue
        for child in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(child, BaseCallback) and id(child) not in seen:
                yield from iter_callbacks(child, seen)


def _get_callback_state(callback: BaseCallback) -> dict[str, Any]:
    if isinstance(callback, MultiTaskCheckpointCallback):
        return {"n_calls": callback.n_calls, "num_timesteps": callback.num_timesteps}
    left_out = (*_NOT_CALLBACK_STATE, *constructor_arguments(type(callback)))
    state = {}
    for name, value in vars(callback).items():
        if name in left_out or _is_foreign(value):
            continue
        state[name] = value.get_state() if isinstance(value, th.Generator) else value
    return _picklable(state)


def _is_foreign(value: Any) -> bool:
    """Whether this is somebody else's state, which is saved there, or belongs to the process."""
    if isinstance(value, (list, tuple)) and value:
        return all(_is_foreign(part) for part in value)
    return isinstance(value, _NOT_STATE_TYPES)


def _picklable(values: dict[str, Any]) -> dict[str, Any]:
    """Those that can be pickled: a progress bar or an open file cannot, and the new process has its own."""
    kept = {}
    for name, value in values.items():
        try:
            cloudpickle.dumps(value)
        except Exception:  # of whatever kind an unpicklable object raises
            continue
        kept[name] = value
    return kept


def _settings(model: Any) -> dict[str, str]:
    """Arguments of the model, as text: classes of the main program are others in each process."""
    names = sorted(constructor_arguments(type(model)) - set(_NOT_SETTINGS))
    return {name: repr(getattr(model, name)) for name in names if _is_plain(getattr(model, name, ...))}


def _is_plain(value: Any) -> bool:
    """Whether the text of a value says all of it, and nothing of its place in memory."""
    if isinstance(value, dict):
        return all(_is_plain(part) for entry in value.items() for part in entry)
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, type, Enum, type(None)))


def _warn_of_settings(saved: dict[str, str], own: dict[str, str]) -> None:
    changed = [f"{name}={own[name]} (before: {saved[name]})" for name in own if name in saved and saved[name] != own[name]]
    if changed:
        warnings.warn(f"the training goes on with {', '.join(changed)}", stacklevel=2)


def _shorten(value: Any, other: Any) -> Any:
    """Of two dictionaries what the first has otherwise than the second; two of many entries, which are enough to see why."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return value
    differing = {name: entry for name, entry in value.items() if other.get(name) != entry}
    shown = dict(list(differing.items())[:2])
    return f"{shown} and {len(differing) - 2} more" if len(differing) > 2 else shown


def _model_bytes(model: Any) -> memoryview:
    # In memory first: a full disk is then an error of the file, not one of many kinds of PyTorch's
    buffer = io.BytesIO()
    model.save(buffer)
    return buffer.getbuffer()


def _state_bytes(state: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    th.save(state, buffer, pickle_module=cloudpickle, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getbuffer()
