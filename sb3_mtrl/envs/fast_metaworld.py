"""
Meta-World's environments at more than twice their speed, with the same numbers to the last bit.

Most of the time of a step is not spent in MuJoCo but in Python around it, and a reset simulates the arm's way to its place
twice. :func:`fast_env_class` derives a class from one of Meta-World's that does the same work with less:

* contacts are read from MuJoCo's arrays, not from one Python object per contact;
* positions are read through views that are looked up once, and the observation is put together in place;
* orientations and the reward's ``tolerance`` are computed with plain floats. Meta-World's functions find these two names in
  their modules; the derived class holds copies of the functions that find the fast ones. Meta-World itself is not changed;
* forces that no one reads (``mj_rnePostConstraint``) are not computed, nor the arm's way in the first of the two passes that a
  reset makes: only its effects on the model matter, the second pass begins with a simulation at rest;
* what a reset leads to depends on the goal alone: it is computed once per goal and then restored.

All this was found equal for the versions and sources below (``tests/test_fast_envs.py``). With any others Meta-World's own
classes are used, and a warning says so.
"""

import copy
import functools
import hashlib
import importlib.metadata
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import metaworld
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from metaworld.sawyer_xyz_env import SawyerMocapBase, SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from sb3_mtrl.envs.simulation_state import SimulationState, get_simulation, is_simulation_view, set_simulation

TESTED_VERSIONS = {"metaworld": "3.1.1", "mujoco": "3.3.0"}
# SHA-256 of what is replaced or relied on, see source_digest
TESTED_SOURCES = "a8074c59e740469441c2768364e8cbe3fa06a3ca90b6a34e3e1a4ac5b229c517"

OBS_DIM = 39
CURRENT_DIM = 18  # an observation holds the current state twice: now and one step ago
OPEN_GRIPPER = 0.1


# ------------------------------------------------------------------- the versions that this was tested with


def source_digest() -> str:
    """
    :return: SHA-256 of the source of Meta-World's simulations and rewards and of Gymnasium's functions around MuJoCo
    """
    root = Path(metaworld.__file__).parent
    files = [root / "sawyer_xyz_env.py", root / "utils" / "reward_utils.py", *sorted((root / "envs").glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    for function in (
        MujocoEnv.reset,
        MujocoEnv.set_state,
        MujocoEnv.do_simulation,
        MujocoEnv._step_mujoco_simulation,
        MujocoEnv.get_body_com,
    ):
        digest.update(inspect.getsource(function).encode())
    return digest.hexdigest()


@functools.cache
def why_not_fast() -> str | None:
    """
    :return: What differs from what the fast classes were tested with, None if nothing does
    """
    for package, tested in TESTED_VERSIONS.items():
        version = importlib.metadata.version(package)
        if version != tested:
            return f"they were tested with {package} {tested}, this is {version}"
    if source_digest() != TESTED_SOURCES:
        return "the source of Meta-World, or of Gymnasium's MujocoEnv, is not the one that they were tested with"
    return None


def fast_env_class(stock_class: type[SawyerXYZEnv]) -> type[SawyerXYZEnv]:
    """
    :param stock_class: One of Meta-World's classes, e.g. ``ALL_V3_ENVIRONMENTS["reach-v3"]``
    :return: A class derived from it with the same behaviour, or, after a warning, the class itself if the installed
        versions are not those that this was tested with
    """
    reason = why_not_fast()
    if reason is not None:
        warnings.warn(
            f"Meta-World's own, slower environments are used: the fast ones are off because {reason}. "
            "The numbers are the same; fast=False says that this is wanted",
            stacklevel=2,
        )
        return stock_class
    return _derive(stock_class)  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _derive(stock_class: type[SawyerXYZEnv]) -> type[SawyerXYZEnv]:
    replacements: dict[str, Any] = {"reward_utils": _fast_reward_utils()}
    if _has_scipys_bits():
        replacements["Rotation"] = FastRotation
    functions: dict[str, types.FunctionType] = {}
    for ancestor in reversed(stock_class.__mro__):
        if issubclass(ancestor, SawyerXYZEnv):
            own_functions = {name: value for name, value in vars(ancestor).items() if isinstance(value, types.FunctionType)}
            functions.update(own_functions)
    namespace: dict[str, Any] = {
        name: _rebind(function, replacements)
        for name, function in functions.items()
        if name not in vars(FastSawyerMixin) and not replacements.keys().isdisjoint(function.__globals__)
    }
    if functions["_gripper_caging_reward"] is SawyerXYZEnv._gripper_caging_reward:  # some tasks have their own
        namespace["_gripper_caging_reward"] = gripper_caging_reward
    # The name is shown to the user as task_name
    namespace.update(__module__=__name__, __doc__=stock_class.__doc__, stock_class=stock_class)
    return type(stock_class.__name__, (FastSawyerMixin, stock_class), namespace)


def _rebind(function: types.FunctionType, replacements: dict[str, Any]) -> types.FunctionType:
    """A copy of the function for which some names of its module stand for something else."""
    module = function.__globals__
    names = {**module, **{name: value for name, value in replacements.items() if name in module}}
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------- functions on numbers


def tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """
    ``metaworld.utils.reward_utils.tolerance`` without arrays, for what its reward functions call it with nearly always:
    numbers in double precision. Everything else is left to the original, error messages included.

    :param x: The value
    :param bounds: The interval in which the result is 1
    :param margin: Distance from the interval at which the result is ``value_at_margin``
    :param sigmoid: How the result falls off
    :param value_at_margin: See ``margin``
    :return: A number in [0, 1]
    """
    lower, upper = bounds
    is_plain = isinstance(x, float) and isinstance(margin, (float, int)) and lower <= upper and margin >= 0
    if is_plain:
        if lower <= x <= upper:
            return 1.0
        if margin == 0:
            return 0.0
        if sigmoid == "long_tail" and value_at_margin == 0.1:
            distance = float(lower - x if x < lower else x - upper) / float(margin)
            # ** and not a product, which differs in the last bit; 3 = sqrt(1 / 0.1 - 1)
            if distance < 1e100:
                return 1 / ((distance * 3.0) ** 2 + 1)
    return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)  # type: ignore[arg-type]


def _fast_reward_utils() -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**vars(reward_utils), "tolerance": tolerance})


class FastRotation:
    """
    The one thing that Meta-World needs SciPy's ``Rotation`` for, for one matrix: ``from_matrix(matrix).as_quat()``.

    :param quaternion: x, y, z, w
    """

    __slots__ = ("_quaternion",)

    def __init__(self, quaternion: tuple[float, float, float, float]):
        self._quaternion = quaternion

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> "FastRotation":
        """
        Markley's method ("Unit Quaternion from Rotation Matrix", 2008), operation for operation as in SciPy.

        :param matrix: A rotation matrix (3, 3), as exact as those of MuJoCo: it is not made orthogonal first
        :return: The rotation
        """
        (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = matrix.tolist()
        trace = m00 + m11 + m22
        largest = max(m00, m11, m22, trace)
        if m00 == largest:
            x, y, z, w = 1 - trace + 2 * m00, m10 + m01, m20 + m02, m21 - m12
        elif m11 == largest:
            x, y, z, w = m01 + m10, 1 - trace + 2 * m11, m21 + m12, m02 - m20
        elif m22 == largest:
            x, y, z, w = m02 + m20, m12 + m21, 1 - trace + 2 * m22, m10 - m01
        else:
            x, y, z, w = m21 - m12, m02 - m20, m10 - m01, 1 + trace
        norm = math.sqrt(x * x + y * y + z * z + w * w)
        return cls((x / norm, y / norm, z / norm, w / norm))

    def as_quat(self) -> np.ndarray:
        """
        :return: The unit quaternion (x, y, z, w)
        """
        return np.array(self._quaternion)


@functools.cache
def _has_scipys_bits() -> bool:
    """Whether this SciPy rounds as :class:`FastRotation` does: a compiler may contract its products and sums."""
    quaternions = np.random.default_rng(0).normal(size=(64, 4))
    matrices = [np.eye(3), *Rotation.from_quat(quaternions).as_matrix()]
    return all(
        np.array_equal(FastRotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat())
        for matrix in matrices
    )


# -------------------------------------------------------------------------------------------------- the simulation


class PositionsByName(dict[str, np.ndarray]):
    """
    Views of the positions of bodies or sites in the simulation, each looked up once.

    :param find: ``MjData.body`` or ``MjData.site``
    """

    def __init__(self, find: Callable[[str], Any]):
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> np.ndarray:
        view = self[name] = self._find(name).xpos
        return view


class ResetResult(NamedTuple):
    """What a reset to some goal leaves behind."""

    obs: np.ndarray
    info: dict[str, Any]
    attributes: dict[str, Any]
    simulation: SimulationState


class FastSawyerMixin(SawyerXYZEnv):
    """
    Placed before one of Meta-World's classes by :func:`fast_env_class`. Methods without a description do what they do in
    Meta-World. Whatever is out of the ordinary (no task set, an episode that is over, goals drawn at each reset) is left to
    Meta-World's methods.
    """

    stock_class: type[SawyerXYZEnv]
    # What a new environment has already, see simulation_state
    rebuilt_attributes: ClassVar[tuple[str, ...]] = (
        *("_body_positions", "_site_positions", "_pad_ids", "_mocap_position", "_mocap_quaternion", "_ctrl"),
        *("_simulates", "_reset_results"),
    )

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, data = super()._initialize_simulation()
        self._body_positions = PositionsByName(data.body)
        self._site_positions = PositionsByName(data.site)
        self._pad_ids = (data.geom("leftpad_geom").id, data.geom("rightpad_geom").id)
        self._mocap_position, self._mocap_quaternion = data.mocap_pos[0], data.mocap_quat[0]
        self._ctrl = data.ctrl
        self._simulates = True
        self._reset_results: dict[tuple[bytes, bool], ResetResult] = {}
        return model, data

    def __getstate__(self) -> Any:
        state = super().__getstate__()
        for name in self.rebuilt_attributes:
            state["state"].pop(name, None)
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_instance, (self.stock_class,), self.__getstate__()

    # ------------------------------------------------------------------- reading the simulation

    def get_body_com(self, body_name: str) -> np.ndarray:
        return self._body_positions[body_name]

    def get_endeff_pos(self) -> np.ndarray:
        return self._body_positions["hand"]

    def _get_site_pos(self, site_name: str) -> np.ndarray:
        return self._site_positions[site_name].copy()

    @property
    def tcp_center(self) -> np.ndarray:
        return (self._site_positions["rightEndEffector"] + self._site_positions["leftEndEffector"]) / 2.0

    def touching_object(self, object_geom_id: int) -> bool:
        contact = self.data.contact
        pairs = contact.geom.tolist()
        force = self.data.efc_force
        for pad_id in self._pad_ids:
            pad_force: Any = 0
            for index, pair in enumerate(pairs):
                if pad_id in pair and object_geom_id in pair:
                    pad_force += force[contact.efc_address[index]]
            if not pad_force > 0:
                return False
        return True

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        bodies = self._body_positions
        opening = bodies["rightclaw"] - bodies["leftclaw"]
        position, quaternion = self._get_pos_objects(), self._get_quat_objects()
        obs = np.zeros(CURRENT_DIM)
        obs[:3] = bodies["hand"]
        obs[3] = min(max(_norm(opening) / OPEN_GRIPPER, 0.0), 1.0)
        obs[4:7], obs[7:11] = position[:3], quaternion[:4]
        if len(position) > 3:  # a second object
            obs[11:14], obs[14:18] = position[3:], quaternion[4:]
        return obs

    def _get_obs(self) -> np.ndarray:
        current = self._get_curr_obs_combined_no_goal()
        obs = np.empty(OBS_DIM)
        obs[:CURRENT_DIM] = current
        obs[CURRENT_DIM:-3] = self._prev_obs
        obs[-3:] = 0.0 if self._partially_observable else self._get_pos_goal()
        self._prev_obs = current
        return obs

    # -------------------------------------------------------------------------------- stepping

    def set_xyz_action(self, action: np.ndarray) -> None:
        position = self._mocap_position + np.minimum(np.maximum(action, -1), 1) * self.action_scale
        np.minimum(np.maximum(position, self.mocap_low), self.mocap_high, out=self._mocap_position)
        self._mocap_quaternion[:] = (1.0, 0.0, 1.0, 0.0)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        if (
            not self._set_task_called
            or self.curr_path_length >= self.max_path_length
            or len(action) != 4
            or self._did_see_sim_exception
        ):
            return super().step(action)
        self.set_xyz_action(action[:3])
        self._ctrl[0], self._ctrl[1] = action[-1], -action[-1]
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        self.curr_path_length += 1
        # Meta-World first moves the site of the goal in the data: this computes it from the model again
        mujoco.mj_forward(self.model, self.data)
        space = self.sawyer_observation_space
        obs = self._get_obs()
        np.minimum(np.maximum(obs, space.low, out=obs), space.high, out=obs)
        self._last_stable_obs = obs
        reward, info = self.evaluate_state(obs, action)  # type: ignore[arg-type]
        return obs.copy(), reward, False, self.curr_path_length == self.max_path_length, info

    def _step_mujoco_simulation(self, ctrl: Any, n_frames: int) -> None:
        if self._simulates:
            self.data.ctrl[:] = ctrl
            mujoco.mj_step(self.model, self.data, nstep=n_frames)

    # ------------------------------------------------------------------------------- resetting

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if not self._freeze_rand_vec or self._last_rand_vec is None:
            return super().reset(seed, options)
        key = (self._last_rand_vec.tobytes(), self._partially_observable)
        if key in self._reset_results:
            self._restore(self._reset_results[key])
            if self.render_mode == "human":
                self.render()
        else:
            self._reset_results[key] = self._reset_from_scratch()
        result = self._reset_results[key]
        return result.obs.copy(), dict(result.info)

    def _reset_from_scratch(self) -> ResetResult:
        with self._recorded_assignments() as names:
            self.curr_path_length = 0
            self._simulates = False
            try:
                self.reset_model()
            finally:
                self._simulates = True
            obs, info = super(SawyerMocapBase, self).reset()
            self._prev_obs = obs[:CURRENT_DIM].copy()
        obs[CURRENT_DIM:-3] = self._prev_obs
        attributes = {name: _keep(vars(self)[name]) for name in names}
        return ResetResult(obs, info, attributes, get_simulation(self))

    def _restore(self, result: ResetResult) -> None:
        set_simulation(self, result.simulation)
        vars(self).update({name: _keep(value) for name, value in result.attributes.items()})

    @contextmanager
    def _recorded_assignments(self) -> Iterator[set[str]]:
        """Yield a set that takes in the name of every attribute that is assigned inside the ``with`` block."""
        names: set[str] = set()
        fast_class = type(self)

        def record(env: Any, name: str, value: Any) -> None:
            names.add(name)
            object.__setattr__(env, name, value)

        self.__class__ = type(fast_class.__name__, (fast_class,), {"__setattr__": record})
        try:
            yield names
        finally:
            object.__setattr__(self, "__class__", fast_class)


def gripper_caging_reward(
    self: SawyerXYZEnv,
    action: np.ndarray,
    obj_pos: np.ndarray,
    obj_radius: float,
    pad_success_thresh: float,
    object_reach_radius: float,
    xz_thresh: float,
    desired_gripper_effort: float = 1.0,
    high_density: bool = False,
    medium_density: bool = False,
) -> float:
    """``SawyerXYZEnv._gripper_caging_reward`` with plain floats: how well the gripper is around the object and closed."""
    if self.obj_init_pos is None or (high_density and medium_density):
        raise ValueError("a caging reward needs obj_init_pos, and high_density or medium_density but not both")
    init_pos, init_tcp, tcp = self.obj_init_pos, self.init_tcp, self.tcp_center
    caging_y = []
    for pad in ("leftpad", "rightpad"):
        pad_y = float(self.get_body_com(pad)[1])
        margin = abs(abs(pad_y - float(init_pos[1])) - pad_success_thresh)
        distance = abs(pad_y - float(obj_pos[1]))
        caging_y.append(tolerance(distance, (obj_radius, pad_success_thresh), margin, "long_tail"))
    margin = _norm(init_pos[::2] - init_tcp[::2]) - xz_thresh
    caging_xz = tolerance(_norm(tcp[::2] - obj_pos[::2]), (0, xz_thresh), margin, "long_tail")
    caging = reward_utils.hamacher_product(reward_utils.hamacher_product(*caging_y), caging_xz)
    # The action is in single precision, and so is what Meta-World computes from it
    gripper_closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
    reward = reward_utils.hamacher_product(caging, gripper_closed if caging > 0.97 else 0.0)
    if high_density:
        reward = (reward + caging) / 2
    if medium_density:
        reach_margin = abs(_norm(init_pos - init_tcp) - object_reach_radius)
        reach = tolerance(_norm(obj_pos - tcp), (0, object_reach_radius), reach_margin, "long_tail")
        reward = (reward + reach) / 2
    return reward


def _norm(vector: np.ndarray) -> float:
    # NumPy's own way for vectors: a sum of squares by hand would round differently
    return math.sqrt(vector.dot(vector))


def _new_instance(stock_class: type[SawyerXYZEnv]) -> SawyerXYZEnv:
    fast_class = fast_env_class(stock_class)
    return fast_class.__new__(fast_class)


def _keep(value: Any) -> Any:
    """A copy that later steps cannot change, except of views of the simulation, which are to follow it."""
    return value if is_simulation_view(value) else copy.deepcopy(value)
