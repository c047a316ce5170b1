import copy
import difflib
import operator
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

# Meta-World (and MuJoCo with it) takes 0.6 s to import: only those who build an environment pay for it
if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
    from metaworld.types import Task

SUITES = ("MT3", "MT10", "MT25", "MT50")
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
# The set that PaCo's paper draws its method with (figure 1)
MT3_TASKS = ("reach-v3", "push-v3", "peg-insert-side-v3")
# Tasks on which a few minutes of training on a CPU show something; for trying things out, not for results
QUICKSTART_TASKS = ("reach-v3", "drawer-close-v3", "handle-press-v3", "door-close-v3")
HOW_TO_LIST = "sb3_mtrl.envs.list_tasks() lists all tasks"
BASE_OBS_DIM = 39
N_GOALS = 50

# What an environment remembers from step to step beside the simulation
_STATE_ATTRIBUTES = (
    *("task_id", "_assigned_tasks", "_next_position", "_next_goals", "_goal", "_elapsed_steps", "_has_succeeded"),
    *("_np_random", "_np_random_seed"),
)

# (task, goal_seed) -> the goals of the task. Not an lru_cache, because the goals are drawn with the
# environment that needs them, to compile each MuJoCo model only once.
_goal_cache: dict[tuple[str, int], tuple["Task", ...]] = {}


def list_tasks(suite: str = "MT50") -> tuple[str, ...]:
    """
    Names of the tasks of a Meta-World suite, in the suite's order.

    :param suite: ``"MT3"`` (reach, push, peg-insert-side), ``"MT10"``, ``"MT25"`` or ``"MT50"`` (all)
    :return: Task names, e.g. ``("reach-v3", "push-v3", ...)``
    :raises ValueError: if there is no such suite
    """
    from metaworld import env_dict

    if suite == "MT3":
        return MT3_TASKS
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    return tuple(getattr(env_dict, f"{suite}_V3"))


def resolve_tasks(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """
    Turn what a user calls his tasks into Meta-World's names.

    :param tasks: A suite (``"MT10"``), a task, or several tasks; the ending ``-v3`` may be left out
    :return: Task names as Meta-World writes them
    :raises ValueError: if a name is unknown or given twice, or if there is none
    """
    if isinstance(tasks, str):
        if tasks in SUITES:
            return list_tasks(tasks)
        tasks = [tasks]
    names = tuple(_resolve_task(task) for task in tasks)
    if not names:
        raise ValueError(f"tasks must name at least one Meta-World task, got {tasks!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"tasks must differ from each other, got {', '.join(repeated)} more than once")
    return names


def _resolve_task(task: str) -> str:
    known = list_tasks()
    if not isinstance(task, str):
        raise ValueError(f"a task must be given by its name, e.g. 'reach-v3', got {task!r}")
    for name in (task, f"{task}-v3"):
        if name in known:
            return name
    nearest = difflib.get_close_matches(task, [*known, *SUITES], n=1, cutoff=0.3)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ";"
    raise ValueError(f"unknown Meta-World task {task!r}{hint} {HOW_TO_LIST}, the suites are {', '.join(SUITES)}")


def draw_goals(env: "SawyerXYZEnv", task_name: str, goal_seed: int) -> tuple["Task", ...]:
    """
    The 50 goals that ``metaworld.MT1(task_name, seed=goal_seed)`` has, fifty times faster: the arm is not
    settled for each of them (no goal depends on it), and NumPy's global generator is left alone.

    ``metaworld.MT10(seed)`` and the larger suites draw their tasks one after the other from one stream, so the goals of
    a task would depend on the tasks before it; here they are the task's own, in whichever suite it is.

    :param env: An environment of the task; it must be reset before it is stepped again
    :param task_name: Name of the task
    :param goal_seed: Seed of the draw
    :return: 50 tasks in Meta-World's sense, for ``env.set_task``
    """
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.types import Task

    def place_hand(steps: int = 50) -> None:
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center

    rand_vecs = []
    env._set_task_called = True
    env._freeze_rand_vec = False
    # Meta-World seeds the legacy global generator; the same numbers come out of a private one
    env.seeded_rand_vec = True
    env.np_random = np.random.RandomState(goal_seed)  # type: ignore[assignment]
    # Attributes of the instance hide the methods that simulate the arm and look at the scene
    hidden = {"_reset_hand": place_hand, "_get_obs": lambda: np.zeros(BASE_OBS_DIM)}
    vars(env).update(hidden)
    try:
        for _ in range(N_GOALS):
            env.reset()
            rand_vecs.append(env._last_rand_vec)
    finally:
        for name in hidden:
            del vars(env)[name]
        env.seeded_rand_vec = False
        env.seed(goal_seed)
    env_class = ALL_V3_ENVIRONMENTS[task_name]
    contents = ({"rand_vec": vec, "env_cls": env_class, "partially_observable": False} for vec in rand_vecs)
    return tuple(Task(env_name=task_name, data=pickle.dumps(content)) for content in contents)


class MetaWorldMultiTaskEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    Meta-World's tasks as one Gymnasium environment that moves to its next task at each reset.

    Observations, rewards and success are Meta-World's own numbers. The observation, cast to float32, is followed by the
    one-hot of the current task: ``Box(39 + T,)``, also for a single task (40 entries). The goal is visible, as in
    Meta-World's MT benchmarks.

    ``info`` carries Meta-World's own entries, among them ``success`` (float, this step), and ``is_success`` (bool, see the
    argument ``success``), ``task_name`` and ``task_id``. The MuJoCo model of a task is compiled when the task is first
    reset to, so that an environment that was given few tasks with :meth:`set_tasks` is built as fast as those.

    Meta-World: https://arxiv.org/abs/1910.10897, Meta-World+: https://arxiv.org/abs/2505.11289

    :param tasks: A suite (``"MT3"``, ``"MT10"``, ``"MT25"``, ``"MT50"``), or names of tasks (``"reach-v3"`` or ``"reach"``)
    :param horizon: Steps after which an episode is truncated, at least 1 (Meta-World: 500; the papers of PaCo and CMTA: 150)
    :param reward_function_version: Meta-World's reward functions, ``"v2"`` or ``"v1"``
    :param goals: ``"random"`` draws one of the task's 50 goals at each reset, ``"fixed"`` always takes the first, ``"cycle"``
        takes them in turn, beginning with the first: for evaluations that visit each goal equally often
    :param terminate_on_success: End the episode at the first success; meant for evaluation
    :param reward: ``"dense"`` for Meta-World's reward, ``"success"`` for 1 at the first success of an episode and 0 else
    :param success: What ``is_success`` tells: success in ``"any"`` step of the episode so far, or in the ``"last"`` step
    :param goal_seed: Seed of the 50 goals: they are those of ``metaworld.MT1(task, seed=goal_seed)``. The same in every run
        unless changed, and independent of ``reset(seed=)``, which draws among them
    :param render_mode: ``"rgb_array"``, ``"human"`` or None
    :param camera_name: One of Meta-World's cameras, e.g. ``"corner2"``; None for a free camera that looks at the whole table.
        Frames of the corner cameras, which are mounted upside down, are turned
    :param fast: Simulate with :mod:`sb3_mtrl.envs.fast_metaworld`: the same numbers to the last bit in less than half the
        time, for tested versions of Meta-World; with others it warns and changes nothing. False for Meta-World's own code
    :param render_size: Width and height of a frame in pixels, at least 16
    :raises ValueError: if an argument is none of these
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array"], "render_fps": 80}  # type: ignore[misc]

    def __init__(
        self,
        tasks: str | Sequence[str],
        horizon: int = 500,
        reward_function_version: str = "v2",
        goals: str = "random",
        terminate_on_success: bool = False,
        reward: str = "dense",
        success: str = "any",
        goal_seed: int = 0,
        render_mode: str | None = None,
        camera_name: str | None = None,
        fast: bool = True,
        render_size: int = 480,
    ):
        self.task_names = resolve_tasks(tasks)
        self.num_tasks = len(self.task_names)
        self.horizon = _check_int("horizon", horizon, 1, None)
        self.goal_seed = _check_int("goal_seed", goal_seed, 0, 2**32 - 1)
        self.reward_function_version = _check_choice("reward_function_version", reward_function_version, ("v1", "v2"))
        self.goals = _check_choice("goals", goals, ("random", "fixed", "cycle"))
        self.reward = _check_choice("reward", reward, ("dense", "success"))
        self.success = _check_choice("success", success, ("any", "last"))
        self.terminate_on_success = _check_choice("terminate_on_success", terminate_on_success, (True, False))
        self.render_mode = _check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.camera_name = _check_choice("camera_name", camera_name, (None, *CAMERAS))
        self.fast = _check_choice("fast", fast, (True, False))
        self.render_size = _check_int("render_size", render_size, 16, None)

        self.observation_space = spaces.Box(-np.inf, np.inf, shape=(BASE_OBS_DIM + self.num_tasks,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(4,), dtype=np.float32)

        self.task_id = 0
        self._assigned_tasks: tuple[int, ...] | None = None
        self._next_position: int | None = None  # in assigned_tasks; None: the cycle has not begun
        self._next_goals = [0] * self.num_tasks  # of each task, for goals="cycle"
        self._goal = 0  # of this episode
        self._envs: dict[int, SawyerXYZEnv] = {}
        self._env: SawyerXYZEnv | None = None  # the one of the current task; None: not reset yet
        self._elapsed_steps = 0
        self._has_succeeded = False
        self._obs_template = np.zeros(self.observation_space.shape, dtype=np.float32)

    @property
    def assigned_tasks(self) -> tuple[int, ...]:
        """The tasks that this environment cycles through: all, unless :meth:`set_tasks` said otherwise."""
        return tuple(range(self.num_tasks)) if self._assigned_tasks is None else self._assigned_tasks

    @property
    def n_goals(self) -> int:
        """Number of goals that an episode of a task may have."""
        return 1 if self.goals == "fixed" else N_GOALS

    def set_tasks(self, task_ids: Sequence[int]) -> None:
        """
        Cycle only through these tasks, from the next reset on and beginning with the first of them.

        :param task_ids: Ids of tasks, each in [0, ``num_tasks``), all different
        :raises ValueError: if there is none, one is out of range, or one is given twice
        """
        assigned = tuple(_check_int("a task id", task_id, 0, self.num_tasks - 1) for task_id in task_ids)
        if not assigned:
            raise ValueError(f"task_ids must hold at least one of the {self.num_tasks} tasks, got {task_ids!r}")
        if len(set(assigned)) != len(assigned):
            raise ValueError(f"task_ids must differ from each other, got {list(assigned)}")
        self._assigned_tasks = assigned
        self._next_position = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Begin an episode of the next task in the cycle.

        :param seed: Seeds the choice of goals and restarts the cycles: equal seeds give equal sequences of episodes
        :param options: ``{"task": task_id}`` visits this task now, and leaves the cycle where it is
        :return: Observation, shape ``(39 + T,)``, and info with ``task_name`` and ``task_id``
        """
        super().reset(seed=seed)
        if seed is not None or self._next_position is None:
            # Environments that were not told their tasks must not all start with the same one
            self._next_position = 0 if self._assigned_tasks is not None else int(self.np_random.integers(self.num_tasks))
            self._next_goals = [0] * self.num_tasks
        if options is not None and options.get("task") is not None:
            task_id = _check_int("options['task']", options["task"], 0, self.num_tasks - 1)
        else:
            assigned = self.assigned_tasks
            task_id = assigned[self._next_position]
            self._next_position = (self._next_position + 1) % len(assigned)

        env = self._switch_to(task_id)
        self._goal = self._choose_goal(task_id)
        self._set_goal(env)
        self._elapsed_steps = 0
        self._has_succeeded = False
        raw_obs, _ = env.reset()
        return self._make_obs(raw_obs), {"task_name": self.task_names[task_id], "task_id": task_id}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: Displacement of the hand (3) and closing of the gripper (1), each in [-1, 1]
        :return: Observation ``(39 + T,)``, reward, terminated (False without ``terminate_on_success``), truncated, info
        :raises gymnasium.error.ResetNeeded: if there was no reset yet
        """
        if self._env is None:
            raise gym.error.ResetNeeded("reset() must be called before step()")
        raw_obs, raw_reward, _, _, raw_info = self._env.step(action)
        self._elapsed_steps += 1
        # Plain floats: copying and pickling them, as vector environments do, is much faster than NumPy's scalars
        info: dict[str, Any] = {key: float(value) for key, value in raw_info.items()}
        succeeds = info["success"] == 1.0
        is_first_success = succeeds and not self._has_succeeded
        self._has_succeeded |= succeeds
        info["is_success"] = self._has_succeeded if self.success == "any" else succeeds
        info["task_name"] = self.task_names[self.task_id]
        info["task_id"] = self.task_id
        reward = float(raw_reward) if self.reward == "dense" else float(is_first_success)
        if self.render_mode == "human":
            self.render()
        terminated = self.terminate_on_success and succeeds
        return self._make_obs(raw_obs), reward, terminated, self._elapsed_steps >= self.horizon, info

    def render(self) -> np.ndarray | None:
        """
        :return: A frame ``(render_size, render_size, 3)``, uint8, in the mode ``"rgb_array"``, else None
        """
        if self.render_mode is None:
            gym.logger.warn('render() without a render_mode: pass render_mode="rgb_array" or "human" to gym.make')
            return None
        if self._env is None:
            raise gym.error.ResetNeeded("reset() must be called before render()")
        # Each task has an OpenGL context of its own, and Gymnasium takes for granted that the right one is current
        self._env.mujoco_renderer._get_viewer(self.render_mode).make_context_current()
        frame = self._env.render()
        if frame is None or self.camera_name is None or not self.camera_name.startswith("corner"):
            return frame
        return np.ascontiguousarray(frame[::-1, ::-1])

    def close(self) -> None:
        """Free the models and windows of all tasks. May be called twice; a later reset builds what it needs anew."""
        for env in self._envs.values():
            env.close()
        self._envs.clear()
        self._env = None

    def __getstate__(self) -> dict[str, Any]:
        # The simulations stay behind: a copy continues the cycle and the goals, with a reset
        return {**self.__dict__, "_envs": {}, "_env": None}

    def get_checkpoint_state(self) -> dict[str, Any]:
        """
        :return: What all later steps depend on, in the middle of an episode too, for :meth:`set_checkpoint_state`
        """
        from sb3_mtrl.envs.simulation_state import get_simulation, get_simulation_attributes

        env = self._env
        state = {
            "task_names": self.task_names,
            "attributes": {name: getattr(self, name) for name in _STATE_ATTRIBUTES},
            "simulation": None if env is None else (get_simulation(env), get_simulation_attributes(env)),
        }
        return copy.deepcopy(state)  # later steps must not change it

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        """
        Go on from where another environment with the same arguments was: the same steps lead to the same numbers.

        :param state: What :meth:`get_checkpoint_state` returned
        :raises ValueError: if it is of other tasks
        """
        from sb3_mtrl.envs.simulation_state import set_simulation

        if tuple(state["task_names"]) != self.task_names:
            raise ValueError(f"state must be of the tasks {self.task_names}, got one of {tuple(state['task_names'])}")
        state = copy.deepcopy(state)
        vars(self).update(state["attributes"])
        self._env = None
        if state["simulation"] is None:
            return
        env = self._switch_to(self.task_id)
        # The reset makes what is no state: spaces, and views of the simulation
        self._set_goal(env)
        env.reset()
        simulation, attributes = state["simulation"]
        set_simulation(env, simulation)
        vars(env).update(attributes)

    def _set_goal(self, env: "SawyerXYZEnv") -> None:
        env.set_task(_goal_cache[self.task_names[self.task_id], self.goal_seed][self._goal])

    def _choose_goal(self, task_id: int) -> int:
        if self.goals == "random":
            return int(self.np_random.integers(N_GOALS))
        goal = self._next_goals[task_id]
        if self.goals == "cycle":
            self._next_goals[task_id] = (goal + 1) % N_GOALS
        return goal

    def _switch_to(self, task_id: int) -> "SawyerXYZEnv":
        """Make a task the current one; compile its MuJoCo model and draw its goals if that was not done."""
        if self.render_mode == "human" and task_id != self.task_id:
            self.close()  # one window at a time
        if task_id not in self._envs:
            self._envs[task_id] = self._build(self.task_names[task_id])
        self.task_id = task_id
        self._env = self._envs[task_id]
        self._obs_template[BASE_OBS_DIM:] = 0.0
        self._obs_template[BASE_OBS_DIM + task_id] = 1.0
        return self._env

    def _build(self, task_name: str) -> "SawyerXYZEnv":
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        env_class = ALL_V3_ENVIRONMENTS[task_name]
        if self.fast:
            from sb3_mtrl.envs.fast_metaworld import fast_env_class

            env_class = fast_env_class(env_class)
        env = env_class(
            reward_function_version=self.reward_function_version,
            render_mode=self.render_mode,  # type: ignore[arg-type]
            camera_name=self.camera_name,
            height=self.render_size,
            width=self.render_size,
        )
        # Beyond its own limit of 500 Meta-World refuses to step
        env.max_path_length = self.horizon
        if (task_name, self.goal_seed) not in _goal_cache:
            _goal_cache[task_name, self.goal_seed] = draw_goals(env, task_name, self.goal_seed)
        return env

    def _make_obs(self, raw_obs: np.ndarray) -> np.ndarray:
        obs = self._obs_template.copy()
        obs[:BASE_OBS_DIM] = raw_obs
        return obs


def make_mt1(task: str | None = None, **kwargs: Any) -> MetaWorldMultiTaskEnv:
    """
    Entry point of ``MetaWorld-MT1-v3``: one task.

    :param task: Name of the task
    :param kwargs: Further arguments of :class:`MetaWorldMultiTaskEnv`
    :return: The environment
    """
    if not isinstance(task, str) or task in SUITES:
        raise ValueError(
            f"MetaWorld-MT1 needs the name of its task, got task={task!r}: gym.make('MetaWorld-MT1-v3', task='reach-v3'), "
            "env_kwargs=dict(task='reach-v3'), or --env-kwargs task:\"'reach-v3'\" on RL Zoo's command line; "
            f"{HOW_TO_LIST}"
        )
    return MetaWorldMultiTaskEnv(tasks=task, **kwargs)


def make_custom(tasks: Sequence[str] | None = None, **kwargs: Any) -> MetaWorldMultiTaskEnv:
    """
    Entry point of ``MetaWorld-Custom-v3``: a list of tasks of one's own.

    :param tasks: Names of the tasks, in the order of the one-hot
    :param kwargs: Further arguments of :class:`MetaWorldMultiTaskEnv`
    :return: The environment
    """
    if tasks is None:
        raise ValueError(
            "MetaWorld-Custom needs the names of its tasks, got tasks=None: gym.make('MetaWorld-Custom-v3', "
            "tasks=['reach-v3', 'push-v3']), env_kwargs=dict(tasks=['reach-v3', 'push-v3']), or "
            "--env-kwargs tasks:\"['reach-v3','push-v3']\" on RL Zoo's command line; "
            f"{HOW_TO_LIST}"
        )
    return MetaWorldMultiTaskEnv(tasks=tasks, **kwargs)


def _check_int(name: str, value: Any, low: int, high: int | None) -> int:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value
