"""The state of a simulation on MuJoCo, in the middle of an episode too."""

import pickle
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

# What makes pictures, and what Gymnasium says of an environment
_NOT_STATE = ("model", "data", "mujoco_renderer", "spec")


class SimulationState(NamedTuple):
    """What the steps of a simulation depend on: what MuJoCo integrates, and positions in its model that resets may change."""

    integration: np.ndarray
    body_pos: np.ndarray
    site_pos: np.ndarray


def get_simulation(env: Any) -> SimulationState:
    """
    :param env: A ``MujocoEnv`` of Gymnasium
    :return: State of its simulation
    """
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return SimulationState(state, env.model.body_pos.copy(), env.model.site_pos.copy())


def set_simulation(env: Any, state: SimulationState) -> None:
    """
    :param env: A ``MujocoEnv`` of Gymnasium with the same model
    :param state: What ``get_simulation`` returned
    """
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_resetData(env.model, env.data)
    env.model.body_pos[:], env.model.site_pos[:] = state.body_pos, state.site_pos
    mujoco.mj_setState(env.model, env.data, state.integration, kind)
    # What is computed from the state; this overwrites the acceleration that the solver starts from, so once more
    mujoco.mj_forward(env.model, env.data)
    mujoco.mj_setState(env.model, env.data, state.integration, kind)


def get_full_simulation(env: Any) -> bytes:
    """
    :param env: A ``MujocoEnv`` of Gymnasium
    :return: Its data, and its model, in which resets may change anything
    """
    return pickle.dumps(env.data)  # with its model


def set_full_simulation(env: Any, state: bytes) -> None:
    """
    Also what the next step overwrites is restored: some environments read it before. Contacts and forces of constraints alone
    are those of the state itself, until the next step.

    :param env: A ``MujocoEnv`` of Gymnasium with a model of the same sizes
    :param state: What ``get_full_simulation`` returned
    """
    import mujoco

    data = pickle.loads(state)
    model = data.model
    _copy_arrays(model, env.model)
    _copy_arrays(model.opt, env.model.opt)
    for name in dir(model.opt):
        if isinstance(value := getattr(model.opt, name), (int, float)):
            setattr(env.model.opt, name, value)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, integration, kind)
    mujoco.mj_resetData(env.model, env.data)
    mujoco.mj_setState(env.model, env.data, integration, kind)
    mujoco.mj_forward(env.model, env.data)
    _copy_arrays(data, env.data)


def _copy_arrays(source: Any, destination: Any) -> None:
    """In place, for views of them; those of contacts have sizes that change."""
    for name in dir(source):
        value = getattr(source, name)
        if isinstance(value, np.ndarray) and value.flags.writeable:
            own = getattr(destination, name)
            if own.shape == value.shape:
                own[...] = value


def get_simulation_attributes(env: Any) -> dict[str, Any]:
    """
    :param env: A ``MujocoEnv`` of Gymnasium
    :return: Its other attributes, but for spaces, views of the simulation, and those that it names in ``rebuilt_attributes``
    """
    left_out = (*_NOT_STATE, *getattr(env, "rebuilt_attributes", ()))
    return {
        name: value
        for name, value in vars(env).items()
        if name not in left_out and not isinstance(value, spaces.Space) and not is_simulation_view(value)
    }


def is_simulation_view(value: Any) -> bool:
    """
    :param value: Attribute of an environment on MuJoCo
    :return: Whether it is an array in MuJoCo's own memory, which follows the simulation
    """
    if not isinstance(value, np.ndarray):
        return False
    while isinstance(value.base, np.ndarray):
        value = value.base
    return type(value.base).__name__ == "PyCapsule"
