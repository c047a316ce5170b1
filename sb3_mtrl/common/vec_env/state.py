"""
The state of environments, in the middle of an episode too, for checkpoints of a training.

An environment says itself what its state is with two methods, ``get_checkpoint_state()`` and ``set_checkpoint_state(state)``,
as Meta-World's do here. Of any other all attributes are taken, of those on MuJoCo model and data of the simulation, too.
Wrappers are taken attribute by attribute, but for what belongs to the process, such as open files. What refers to one of the
wrappers or to the environment in them refers to that of the new process afterwards.
"""

import io
import pickle
from collections.abc import Iterator
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor

from sb3_mtrl.common.utils import constructor_arguments
from sb3_mtrl.envs.simulation_state import get_full_simulation, get_simulation_attributes, set_full_simulation

# What the constructor of a wrapper sets anew, and what belongs to the process
_NOT_WRAPPER_STATE = ("env", "_cached_spec", "_metadata")
_NOT_MONITOR_STATE = ("results_writer", "t_start")
# Of every vector environment; what a step leaves behind is the learner's
_VEC_ENV_STATE = ("_seeds", "_options", "reset_infos")
_NOT_VEC_STATE = ("venv", "class_attributes", "num_envs", "metadata", "render_mode")
# What its worker sets on the outermost wrapper, which must be the monitor then
_MONITOR_STATE = (
    *("rewards", "needs_reset", "episode_returns", "episode_lengths", "episode_times", "total_steps"),
    "current_reset_info",
)
# Wrappers of gym.make that hold nothing once the environment was reset
_STATELESS_WRAPPERS = ("OrderEnforcing", "PassiveEnvChecker")


class StateNotAvailable(Exception):
    """The state of an environment cannot be taken; the message says why."""


# --------------------------------------------------------------------------------------------------- one environment


def get_env_state(env: gym.Env) -> bytes:
    """
    :param env: An environment with all its wrappers
    :return: Its state
    :raises StateNotAvailable: if an attribute cannot be pickled
    """
    layers = list(_layers(env))
    references = _get_references(layers)
    return pickle.dumps([(type(layer).__name__, _get_layer_state(layer, references)) for layer in layers])


def set_env_state(env: gym.Env, state: bytes) -> None:
    """
    :param env: An environment that was made, and wrapped, as the one that the state is of
    :param state: What ``get_env_state`` returned
    :raises ValueError: if it is wrapped otherwise
    """
    layers, states = list(_layers(env)), pickle.loads(state)
    names, expected = [type(layer).__name__ for layer in layers], [name for name, _ in states]
    if names != expected:
        raise ValueError(f"env must be made as when its state was saved, {' of '.join(expected)}, got {' of '.join(names)}")
    references = _get_references(layers)
    for layer, (_, layer_state) in zip(layers, states, strict=True):
        _set_layer_state(layer, _unpickle(layer_state, references))


def _layers(env: gym.Env) -> Iterator[gym.Env]:
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def _has_simulation(layer: Any) -> bool:
    is_base = not isinstance(layer, gym.Wrapper)
    return is_base and hasattr(layer, "data") and type(layer.data).__module__.startswith("mujoco")


def _get_references(layers: list[Any]) -> dict[str, Any]:
    """What every process has its own of: states refer to it by these names."""
    references: dict[str, Any] = {f"layer {index}": layer for index, layer in enumerate(layers)}
    if _has_simulation(layers[-1]):
        references.update(model=layers[-1].model, data=layers[-1].data)
    return references


def _get_layer_state(layer: Any, references: dict[str, Any]) -> bytes:
    if not isinstance(layer, gym.Wrapper) and hasattr(layer, "get_checkpoint_state"):
        state: dict[str, Any] = {"own": layer.get_checkpoint_state()}
    elif _has_simulation(layer):
        state = {"simulation": get_full_simulation(layer), "attributes": get_simulation_attributes(layer)}
    else:
        left_out: tuple[str, ...] = _NOT_WRAPPER_STATE if isinstance(layer, gym.Wrapper) else ()
        if isinstance(layer, Monitor):
            left_out += _NOT_MONITOR_STATE
        state = {"attributes": _attributes(layer, left_out)}
    return _pickle(layer, {**state, "generators": get_space_generators(layer)}, references)


def _set_layer_state(layer: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        layer.set_checkpoint_state(state["own"])
    else:
        if "simulation" in state:
            set_full_simulation(layer, state["simulation"])
        vars(layer).update(state["attributes"])
    if isinstance(layer, Monitor) and layer.results_writer is not None:
        _cut_monitor_file(layer.results_writer.file_handler.name, len(layer.episode_returns))
    set_space_generators(layer, state["generators"])


def _cut_monitor_file(path: str, n_episodes: int) -> None:
    """Episodes after the checkpoint are going to be played, and written, again: a file that goes on loses their rows."""
    with open(path, "rb+") as file:
        n_header_lines = 2
        for _ in range(n_header_lines + n_episodes):
            file.readline()
        file.truncate(file.tell())


def _attributes(layer: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in left_out and not isinstance(value, (spaces.Space, EnvSpec))
    }


class _Pickler(cloudpickle.Pickler):
    """Leaves out what every process has its own of, wherever it is referred to: a copy of it would be none that steps."""

    def __init__(self, file: io.BytesIO, references: dict[str, Any]):
        super().__init__(file)
        self._names = {id(value): name for name, value in references.items()}

    def persistent_id(self, obj: Any) -> str | None:
        name = self._names.get(id(obj))
        if name is None and isinstance(obj, (gym.Env, VecEnv)):
            # gym.utils.EzPickle, for one, keeps nothing but the arguments of the constructor
            own_way = getattr(type(obj), "__getstate__", None) is not getattr(object, "__getstate__", None)
            if own_way or isinstance(obj, VecEnv):
                raise TypeError(f"it holds another environment, a {type(obj).__name__}, which cannot be copied with its state")
        return name


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, references: dict[str, Any]):
        super().__init__(file)
        self._references = references

    def persistent_load(self, pid: str) -> Any:
        return self._references[pid]


def _pickle(layer: Any, state: dict[str, Any], references: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, references).dump(state)
    except Exception as error:  # of whatever kind an unpicklable object raises
        raise StateNotAvailable(f"the state of {type(layer).__name__} cannot be pickled: {error}") from error
    return file.getvalue()


def _unpickle(state: bytes, references: dict[str, Any]) -> dict[str, Any]:
    return _Unpickler(io.BytesIO(state), references).load()


def _subspaces(space: spaces.Space) -> Iterator[spaces.Space]:
    yield space
    children = getattr(space, "spaces", ())
    for child in children.values() if isinstance(children, dict) else children:
        yield from _subspaces(child)


def get_space_generators(owner: Any) -> dict[str, list[Any]]:
    """
    :param owner: Whose attributes are spaces
    :return: The generators that their ``sample`` draws from, by name of the attribute
    """
    found = {name: value for name, value in vars(owner).items() if isinstance(value, spaces.Space)}
    return {name: [part._np_random for part in _subspaces(space)] for name, space in found.items()}


def set_space_generators(owner: Any, generators: dict[str, list[Any]]) -> None:
    """
    :param owner: Whose attributes are spaces
    :param generators: What ``get_space_generators`` returned
    """
    for name, states in generators.items():
        for part, generator in zip(_subspaces(vars(owner)[name]), states, strict=True):
            part._np_random = generator


# ------------------------------------------------------------------------------------------------ vector environments


def get_vec_env_state(venv: VecEnv) -> dict[str, Any]:
    """
    :param venv: A vector environment with all its wrappers
    :return: Its state. ``reason`` is None, or says why a part is missing, of a wrapper or of the sub-environments
    """
    *wrappers, base = _vec_layers(venv)
    references = _get_vec_references(venv)
    layers: list[tuple[str, bytes | None]] = []
    envs, reasons = None, []
    for wrapper in wrappers:
        wrapper_state = None
        try:
            wrapper_state = _get_wrapper_state(wrapper, references)
        except StateNotAvailable as error:
            reasons.append(str(error))
        layers.append((type(wrapper).__name__, wrapper_state))
    try:
        envs = _get_env_states(base)
    except StateNotAvailable as error:
        reasons.append(str(error))
    return {
        "layers": layers,
        "base": {name: getattr(base, name) for name in _VEC_ENV_STATE},
        "generators": get_space_generators(base),
        "envs": envs,
        "reason": "; ".join(reasons) or None,
    }


def set_vec_env_state(venv: VecEnv, state: dict[str, Any]) -> None:
    """
    :param venv: A vector environment that was made, and wrapped, as the one that the state is of
    :param state: What ``get_vec_env_state`` returned. Wrappers and sub-environments whose part is missing stay as they are
    :raises ValueError: if it is wrapped otherwise
    """
    *wrappers, base = _vec_layers(venv)
    names, expected = [type(wrapper).__name__ for wrapper in wrappers], [name for name, _ in state["layers"]]
    if names != expected:
        raise ValueError(
            f"the vector environment must be wrapped as when its state was saved, in {expected or 'nothing'}, "
            f"got {names or 'nothing'}"
        )
    references = _get_vec_references(venv)
    for wrapper, (_, wrapper_state) in zip(wrappers, state["layers"], strict=True):
        if wrapper_state is not None:
            vars(wrapper).update(_unpickle(wrapper_state, references))
    if state["envs"] is None:
        return
    vars(base).update(state["base"])
    _set_env_states(base, state["envs"])
    set_space_generators(base, state["generators"])


def _vec_layers(venv: VecEnv) -> Iterator[VecEnv]:
    yield venv
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
        yield venv


def _get_vec_references(venv: VecEnv) -> dict[str, Any]:
    layers = list(_vec_layers(venv))
    references: dict[str, Any] = {f"layer {index}": layer for index, layer in enumerate(layers)}
    for number, env in enumerate(layers[-1].envs if isinstance(layers[-1], DummyVecEnv) else []):
        references.update({f"env {number} layer {index}": layer for index, layer in enumerate(_layers(env))})
    return references


def _get_wrapper_state(wrapper: VecEnv, references: dict[str, Any]) -> bytes:
    left_out = (*_NOT_VEC_STATE, *(_NOT_MONITOR_STATE if isinstance(wrapper, VecMonitor) else ()))
    # Arguments of its constructor are those of the program that goes on
    return _pickle(wrapper, _attributes(wrapper, (*left_out, *constructor_arguments(type(wrapper)))), references)


def _get_env_states(venv: VecEnv) -> list[Any]:
    if isinstance(venv, DummyVecEnv):
        return [get_env_state(env) for env in venv.envs]
    if hasattr(venv, "get_env_states"):
        return venv.get_env_states()
    _check_workers_envs(venv)
    own_states = venv.env_method("get_checkpoint_state")
    monitors: list[dict[str, Any]] = [{}] * venv.num_envs
    if all(venv.env_is_wrapped(Monitor)):
        columns = {name: venv.get_attr(name) for name in _MONITOR_STATE}
        monitors = [{name: column[index] for name, column in columns.items()} for index in range(venv.num_envs)]
    return list(zip(own_states, monitors, strict=True))


def _set_env_states(venv: VecEnv, states: list[Any]) -> None:
    if isinstance(venv, DummyVecEnv):
        for env, state in zip(venv.envs, states, strict=True):
            set_env_state(env, state)
        return
    if hasattr(venv, "set_env_states"):
        venv.set_env_states(states)
        return
    _check_workers_envs(venv)
    for index, (own_state, monitor) in enumerate(states):
        venv.env_method("set_checkpoint_state", own_state, indices=index)
        for name, value in monitor.items():
            venv.set_attr(name, value, indices=index)


def _check_workers_envs(venv: VecEnv) -> None:
    """Workers of SB3 can be asked for methods and attributes alone, not for their wrappers."""
    if not isinstance(venv, SubprocVecEnv):
        raise StateNotAvailable(f"{type(venv).__name__} does not tell the state of its sub-environments")
    if not (venv.has_attr("get_checkpoint_state") and venv.has_attr("set_checkpoint_state")):
        raise StateNotAvailable("sub-environments in a SubprocVecEnv need get_checkpoint_state and set_checkpoint_state")
    for text in venv.env_method("__str__"):
        parts = text.split("<")[1:]  # "<Monitor<OrderEnforcing<Env<its id>>>>", or "<Monitor<Env instance>>" without an id
        wrappers = parts[: -1 if " instance>" in parts[-1] else -2]
        wrappers = [wrapper for wrapper in wrappers if wrapper not in _STATELESS_WRAPPERS]
        if wrappers[:1] == ["Monitor"]:
            wrappers = wrappers[1:]
        if len(wrappers) > 0:
            raise StateNotAvailable(f"a SubprocVecEnv does not tell the state of the wrapper {wrappers[0]}")
