import copy
import inspect
import io
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    ReplayBufferSamples,
    RolloutReturn,
    Schedule,
    TensorDict,
    TrainFreq,
)
from stable_baselines3.common.utils import get_device, update_learning_rate
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import has_multi_task_evaluation, record_per_task
from sb3_mtrl.common.checkpoint import find_checkpoint_callbacks
from sb3_mtrl.common.cpu_tuning import bfloat16_probe, fast_matmul, learner_threads, tune_process
from sb3_mtrl.common.policies import single_task_policy
from sb3_mtrl.common.prioritized import SuccessWindows, TaskPrioritizedReplayBuffer
from sb3_mtrl.common.safe_load import DAMAGE, check_archive, read_bytes, replace_pickles, space_to_plain, train_freq_to_plain
from sb3_mtrl.common.torch_layers import base_observation_space
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples, TaskLosses, UpdateGuard
from sb3_mtrl.common.utils import (
    NonFiniteError,
    are_within,
    check_choice,
    check_flag,
    check_integer,
    check_kwargs,
    check_number,
    check_number_or_auto,
    check_that,
    finite_task_ids,
    fuse,
    get_num_tasks,
    get_task_names,
    have_finite_gradients,
    is_fused,
    polyak_update_,
    step_unless,
)
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv, UpdateWhileStepping, VecTaskNormalize
from sb3_mtrl.mtsac.checks import (
    check_cuda,
    check_device,
    check_ent_coef,
    check_env,
    check_learning_rate,
    check_policy,
    check_train_freq,
)
from sb3_mtrl.mtsac.policies import N_HEADS, CnnPolicy, MlpPolicy, MTSACActor, MTSACCritic, MTSACPolicy, MultiInputPolicy
from sb3_mtrl.mtsac.static_update import StaticUpdate, check_capturable

SelfMTSAC = TypeVar("SelfMTSAC", bound="MTSAC")

# Its square is still a float32, so that no layer of usual weights turns it into an infinity
MAX_INPUT = 1e18

ReplaySamples = ReplayBufferSamples | MultiTaskReplayBufferSamples
Update = Callable[[ReplaySamples, th.Tensor | None], th.Tensor | None]


class BadGradient(Exception):
    """Ends an update at the first gradient that is not finite."""


class MTSAC(SAC):
    """
    Multi-task Soft Actor-Critic: SAC on several tasks at once, with one entropy coefficient per task and batches that hold
    every task in equal share. With one task it is SB3's SAC.

    Paper: multi-task SAC is the baseline of Meta-World, https://arxiv.org/abs/1910.10897 (MT-SAC, and with
    ``n_heads="per_task"`` MT-multi-head-SAC); SAC itself is https://arxiv.org/abs/1801.01290 and
    https://arxiv.org/abs/1812.05905.

    The task is read from the observation: a Box of shape ``(n + T,)`` whose last T entries are the task's one-hot. T comes
    from the environment's attribute ``num_tasks``. The parameters not listed are those of SB3's ``SAC``.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param buffer_size: Number of transitions over all tasks
    :param batch_size: Transitions per update over all tasks, a multiple of T; None: 128 per task, or 256 if T is 1
    :param replay_buffer_class: None: ``MultiTaskReplayBuffer`` if T is above 1 (then only it or a subclass will do),
        else SB3's choice
    :param optimize_memory_usage: With one task only
    :param n_steps: With several tasks only 1
    :param ent_coef: "auto", "auto_0.1" (initial value 0.1) to learn one entropy coefficient per task, or a fixed value
    :param num_tasks: Number of tasks T; None: the ``num_tasks`` of the environment, 1 if it has none
    :param n_heads: "shared": one output layer for all tasks, "per_task": one for each
    :param optimizer_order: "sequential": temperature, critic, then actor with the new critic, as SB3 does;
        "joint": all gradients at the same parameters, then all optimisers step, as PaCo's authors do
    :param warmup_actions: Actions before ``learning_starts``: "uniform" as in SB3, or drawn from the initial "policy"
    :param ent_coef_learning_rate: Learning rate of the entropy coefficients; None: ``learning_rate`` and its schedule
    :param min_ent_coef: Entropy coefficients are read as at least this (without gradient below it); None: no bound
    :param max_ent_coef: Entropy coefficients are brought down to this after each update; None: no bound
    :param max_grad_norm: Clip the gradient norm of actor and of critics to this; None: no clipping
    :param cpu_tuning: On a CPU, set of the process what makes training faster and no number other than float32 rounding does:
        products by oneDNN where that is exact and faster (within ``train`` only), memory that glibc keeps (for good), with
        ``overlap`` threads that leave cores to workers slower than the update (within it); False leaves the process alone
    :param amp: "none": float32; "bf16": automatic mixed precision, hidden layers in bfloat16 (faster where the device computes
        in it; the gradients are then good to 1 %)
    :param overlap: Let the environments step in their workers while the learner updates. An action is then chosen before the
        update that in SB3's order would come before it; each update sees the transitions that it sees in SB3's order
    :param on_nonfinite: What a NaN or an infinity in a reward, an observation, a loss or a gradient does. "raise": training
        stops with a ``NonFiniteError`` that names task, time step and last checkpoint, and no optimiser steps on it (those
        whose gradient comes earlier in the update, and is finite, have stepped); "mask": the transition is not stored, or
        its task is left out of the update, both are counted and training goes on. Dict observations are not looked at
        themselves, only the losses and gradients that come of them
    :param replay_device: Where transitions are kept: "cpu", or on the GPU of the networks, "cuda", which takes its memory,
        draws uniform batches itself (other ones than from main memory) and saves copying them
    :param cuda_graph: On a GPU, run an update as one CUDA graph: recorded once, after three updates, and then started as a
        whole, which saves the launches of its kernels one by one. It is recorded anew when arguments, networks or optimisers
        change. Observations have to be vectors, without gSDE, and all optimisers Adam or AdamW
    :raises ValueError: for a bad argument, or an environment that does not fit it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MTSACPolicy
    actor: MTSACActor
    critic: MTSACCritic
    critic_target: MTSACCritic
    task_names: tuple[str, ...]
    _ent_coef_adam_eps: ClassVar[float] = 1e-8

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int | None = None,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        num_tasks: int | None = None,
        n_heads: str = "shared",
        optimizer_order: str = "sequential",
        warmup_actions: str = "uniform",
        ent_coef_learning_rate: float | None = None,
        min_ent_coef: float | None = None,
        max_ent_coef: float | None = None,
        max_grad_norm: float | None = None,
        cpu_tuning: bool = True,
        amp: str = "none",
        overlap: bool = False,
        on_nonfinite: str = "raise",
        replay_device: str = "cpu",
        cuda_graph: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        # What SB3's constructor looks at; it takes the rest as it is, which `_check_arguments` looks at
        check_policy(policy, MTSACPolicy, self.policy_aliases)
        check_env(env)
        check_device(device)
        check_kwargs("replay_buffer_kwargs", replay_buffer_kwargs)
        check_kwargs("policy_kwargs", policy_kwargs)
        check_flag("use_sde", use_sde)
        super().__init__(
            policy,
            env,
            check_learning_rate(learning_rate),
            buffer_size,
            learning_starts,
            batch_size,  # type: ignore[arg-type]  # resolved in _setup_model
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            ent_coef,
            target_update_interval,
            target_entropy,
            use_sde,
            sde_sample_freq,
            use_sde_at_warmup,
            check_integer("stats_window_size", stats_window_size, 1),
            tensorboard_log,
            policy_kwargs,
            check_integer("verbose", int(verbose) if isinstance(verbose, bool) else verbose, 0),
            check_integer("seed", seed, 0, 2**32 - 1, or_none=True),
            device,
            _init_setup_model=False,
        )
        self.n_heads = n_heads
        self.optimizer_order = optimizer_order
        self.warmup_actions = warmup_actions
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.min_ent_coef = min_ent_coef
        self.max_ent_coef = max_ent_coef
        self.max_grad_norm = max_grad_norm
        self.cpu_tuning = cpu_tuning
        self.amp = amp
        self.overlap = overlap
        self.on_nonfinite = on_nonfinite
        self.replay_device = replay_device
        self.cuda_graph = cuda_graph
        self._check_arguments()
        self.num_tasks = self._resolve_num_tasks(check_integer("num_tasks", num_tasks, 1, or_none=True))
        self.task_names = get_task_names(self.env) if self.env is not None else ()
        if len(self.task_names) != self.num_tasks:  # no environment yet, or one that names no tasks
            self.task_names = tuple(f"task-{task_id}" for task_id in range(self.num_tasks))
        # What the task priorities of a TaskPrioritizedReplayBuffer follow, None without
        self.success_windows: SuccessWindows | None = None
        self.update_guards: list[UpdateGuard] = []
        #: Path of the last checkpoint that a callback wrote, for the message of a ``NonFiniteError``
        self.last_checkpoint: str | None = None
        # Tasks of the sub-environments when they were last told, (n_envs,)
        self._env_tasks: np.ndarray | None = None
        # Rows of the batch that are left out of any update, (B, 1) bool; None: not one is
        self._spoilt_rows: th.Tensor | None = None
        # Whether gradients are only looked at, to learn whose are not finite, and what was found in the update being made
        self._is_rehearsal = False
        self._has_bad_gradients = False
        # Of the update being made, in all its passes: optimisers that have stepped, and those whose gradient was not finite
        self._stepped_optimizers: set[th.optim.Optimizer] = set()
        self._refused_optimizers: set[th.optim.Optimizer] = set()
        # Of its last pass: values to log, and rows with the sizes of their TD errors
        self._pass_values: list[dict[str, th.Tensor]] = []
        self._pass_priorities: tuple[np.ndarray, th.Tensor] | None = None
        # Sums of logged values since the last dump, on the device
        self._train_sums: dict[str, th.Tensor] = {}
        self._n_summed_updates = 0
        # While learning with `overlap`: the environment, and the calls of `train` that its next step makes
        self._stepping_env: UpdateWhileStepping | None = None
        self._waiting_updates: list[tuple[int, int | None]] | None = None  # None: `train` updates at once
        # Makes the updates with `cuda_graph`
        self._static_update: StaticUpdate | None = None

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _check_arguments(self) -> None:
        """
        Refuse bad arguments, which would fail in the middle of ``learn`` or change the numbers, and make Python's numbers of
        NumPy's.
        """
        self.buffer_size = check_integer("buffer_size", self.buffer_size, 1)
        self.learning_starts = check_number("learning_starts", self.learning_starts)
        self.batch_size = check_integer("batch_size", self.batch_size, 1, or_none=True)
        self.tau = check_number("tau", self.tau, 0, at_most=1)
        self.gamma = check_number("gamma", self.gamma, 0, at_most=1)
        self.train_freq = check_train_freq(self.train_freq, 1 if self.env is None else self.n_envs)
        self.gradient_steps = check_integer("gradient_steps", self.gradient_steps, -1)
        is_noise = self.action_noise is None or isinstance(self.action_noise, ActionNoise)
        check_that("action_noise", self.action_noise, is_noise, "an ActionNoise or None")
        buffer_class: Any = self.replay_buffer_class
        is_buffer_class = isinstance(buffer_class, type) and issubclass(buffer_class, ReplayBuffer)
        is_right = buffer_class is None or is_buffer_class
        check_that("replay_buffer_class", buffer_class, is_right, "a subclass of ReplayBuffer or None")
        self.n_steps = check_integer("n_steps", self.n_steps, 1)
        self.ent_coef = check_ent_coef(self.ent_coef)
        self.target_update_interval = check_integer("target_update_interval", self.target_update_interval, 1)
        self.target_entropy = check_number_or_auto("target_entropy", self.target_entropy)
        self.sde_sample_freq = check_integer("sde_sample_freq", self.sde_sample_freq, -1)
        check_choice("n_heads", self.n_heads, N_HEADS)
        check_choice("optimizer_order", self.optimizer_order, ("sequential", "joint"))
        check_choice("warmup_actions", self.warmup_actions, ("uniform", "policy"))
        self.ent_coef_learning_rate = check_number(
            "ent_coef_learning_rate", self.ent_coef_learning_rate, above=0, or_none=True
        )
        self.max_ent_coef = check_number("max_ent_coef", self.max_ent_coef, above=0, or_none=True, finite=False)
        self.min_ent_coef = check_number("min_ent_coef", self.min_ent_coef, above=0, or_none=True)
        if self.min_ent_coef is not None and self.max_ent_coef is not None and self.min_ent_coef > self.max_ent_coef:
            raise ValueError(f"min_ent_coef must be at most max_ent_coef={self.max_ent_coef}, got {self.min_ent_coef}")
        self.max_grad_norm = check_number("max_grad_norm", self.max_grad_norm, above=0, or_none=True, finite=False)
        check_choice("amp", self.amp, ("none", "bf16"))
        check_choice("on_nonfinite", self.on_nonfinite, ("mask", "raise"))
        is_path = self.tensorboard_log is None or isinstance(self.tensorboard_log, (str, os.PathLike))
        check_that("tensorboard_log", self.tensorboard_log, is_path, "a folder or None")
        check_flag("optimize_memory_usage", self.optimize_memory_usage)
        check_flag("use_sde_at_warmup", self.use_sde_at_warmup)
        check_flag("cpu_tuning", self.cpu_tuning)
        check_flag("overlap", self.overlap)
        check_choice("replay_device", self.replay_device, ("cpu", "cuda"))
        check_flag("cuda_graph", self.cuda_graph)

    def _resolve_num_tasks(self, num_tasks: int | None) -> int:
        env_num_tasks = None
        if self.env is not None and self.env.has_attr("num_tasks"):
            env_num_tasks = get_num_tasks(self.env)
        if num_tasks is not None and env_num_tasks is not None and num_tasks != env_num_tasks:
            raise ValueError(f"num_tasks must equal the environment's num_tasks={env_num_tasks} or be None, got {num_tasks}")
        return num_tasks or env_num_tasks or 1

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError("env must be given to build a model, got None")
        self.task_names = tuple(self.task_names)  # saved as a list
        if self.num_tasks > 1:
            self._check_multi_task_setup()
        if self.batch_size is None:
            self.batch_size = 256 if self.num_tasks == 1 else 128 * self.num_tasks
        if self.replay_device == "cuda":
            check_cuda("replay_device", self.replay_device, "'cpu'", self.device)
            self._check_replay_settings("replay_device='cuda'", "keeps transitions in main memory")
            self.replay_buffer_class = self.replay_buffer_class or MultiTaskReplayBuffer
        if self.env is not None:
            self._check_env_tasks(self.env)
        foreign = set(self._policy_settings()) - set(inspect.signature(self.policy_class).parameters)
        if foreign:
            raise ValueError(
                f"policy must be one of {type(self).__name__}'s, got {self.policy_class.__name__}, "
                f"which takes no {', '.join(sorted(foreign))} (is this a model of another algorithm?)"
            )
        if self.amp == "bf16" and self.device.type == "cpu" and bfloat16_probe().speedup < 1:
            warnings.warn(
                f"amp='bf16' makes training slower on this CPU, which multiplies matrices in bfloat16 at "
                f"{bfloat16_probe().speedup:.2f} times the speed of float32",
                stacklevel=2,
            )
        # The networks and the buffer need T; what the user gave stays as it is, it is what save() writes
        policy_kwargs, replay_buffer_kwargs = self.policy_kwargs, self.replay_buffer_kwargs
        for name, value in self._policy_settings().items():
            self._check_misplaced("policy_kwargs", name, policy_kwargs.get(name, value), value)
        self.policy_kwargs = {**self._policy_settings(), **policy_kwargs}
        if self.num_tasks > 1 or (self.replay_buffer_class and issubclass(self.replay_buffer_class, MultiTaskReplayBuffer)):
            self.replay_buffer_class = self.replay_buffer_class or MultiTaskReplayBuffer
            given_num_tasks = replay_buffer_kwargs.get("num_tasks", self.num_tasks)
            self._check_misplaced("replay_buffer_kwargs", "num_tasks", given_num_tasks, self.num_tasks)
            self.replay_buffer_kwargs = {**self._replay_buffer_settings(), **replay_buffer_kwargs}
        super()._setup_model()
        self.policy_kwargs, self.replay_buffer_kwargs = policy_kwargs, replay_buffer_kwargs
        if isinstance(self.replay_buffer, MultiTaskReplayBuffer):
            self.replay_buffer.rows_per_task(self.batch_size)  # refuses a batch that has no equal shares
        prioritized = self._prioritized_buffer
        loaded_windows, self.success_windows = self.success_windows, None
        if prioritized is not None and self.num_tasks > 1 and prioritized.performance_source == "train":
            self.success_windows = SuccessWindows(self.num_tasks, prioritized.performance_window)
            if loaded_windows is not None:
                self.success_windows.take_over(loaded_windows)
        if self.log_ent_coef is not None:
            self.log_ent_coef = self.log_ent_coef.detach().repeat(self.num_tasks).requires_grad_(True)
            learning_rate = self.ent_coef_learning_rate or self.lr_schedule(1)
            # Fused, a step can be skipped on the GPU without waiting for it
            fused = True if self.device.type == "cuda" else None
            self.ent_coef_optimizer = th.optim.Adam(
                [self.log_ent_coef], lr=learning_rate, eps=self._ent_coef_adam_eps, fused=fused
            )

        # How often each task's samples were dropped by a guard
        self.dropped_updates = th.zeros(self.num_tasks, device=self.device)
        self._dropped_at_last_dump = self.dropped_updates.clone()
        self._warned_of_stuck_tasks = False
        # Steps of optimisers that were not made as a gradient was not finite
        self.skipped_steps = th.zeros((), device=self.device)
        # Looking at a mask is free on the CPU and would stall a GPU
        self._may_look = self.device.type == "cpu"
        # On a GPU: tasks of which something was not finite, not yet looked at
        self._nonfinite_tasks = th.zeros(self.num_tasks, dtype=th.bool, device=self.device)
        self._warned_of_nonfinite = False
        self._warned_of_passes = False
        self.update_guards.clear()
        self._static_update = None
        if self.cuda_graph:
            check_capturable(self)
            self._static_update = StaticUpdate(self)

    def _check_misplaced(self, place: str, name: str, given: Any, own: Any) -> None:
        """Refuse another value of an argument elsewhere: some parts of the algorithm would follow the one, some the other."""
        if getattr(given, "ndim", 0) > 0 or given != own:
            raise ValueError(
                f"{name} must be given as an argument of {type(self).__name__}, not in {place}, "
                f"got {given!r} there and {own!r} here"
            )

    @property
    def _prioritized_buffer(self) -> TaskPrioritizedReplayBuffer | None:
        return self.replay_buffer if isinstance(self.replay_buffer, TaskPrioritizedReplayBuffer) else None

    def add_update_guard(self, guard: UpdateGuard) -> None:
        """
        Let a guard watch the losses of every update, from now on; it replaces a guard of the same class. Guards are not saved.

        :param guard: E.g. a ``LossMaskoutCallback``, which calls this itself
        """
        self.update_guards = [other for other in self.update_guards if type(other) is not type(guard)]
        self.update_guards.append(guard)

    def _policy_settings(self) -> dict[str, Any]:
        """Policy arguments that follow from the algorithm's own."""
        return dict(num_tasks=self.num_tasks, n_heads=self.n_heads)

    def _replay_buffer_settings(self) -> dict[str, Any]:
        """Arguments of the multi-task replay buffer that follow from the algorithm's own."""
        settings: dict[str, Any] = dict(num_tasks=self.num_tasks, task_in_observation=self.num_tasks > 1)
        if self.replay_device == "cuda":
            settings["storage_device"] = self.device
        return settings

    def _check_multi_task_setup(self) -> None:
        base_observation_space(self.observation_space, self.num_tasks)
        self._check_replay_settings(f"num_tasks={self.num_tasks}", "does not balance tasks")

    def _check_replay_settings(self, reason: str, lack: str) -> None:
        """
        Refuse what rules out ``MultiTaskReplayBuffer``.

        :param reason: What asks for that buffer
        :param lack: What other buffers lack
        """
        if self.replay_buffer_class is not None and not issubclass(self.replay_buffer_class, MultiTaskReplayBuffer):
            raise ValueError(
                f"replay_buffer_class must be None, MultiTaskReplayBuffer or a subclass with {reason}, "
                f"got {self.replay_buffer_class.__name__} (it {lack})"
            )
        if self.n_steps > 1:
            raise ValueError(f"n_steps must be 1 with {reason}, got {self.n_steps}")
        if self.optimize_memory_usage:
            raise ValueError(f"optimize_memory_usage must be False with {reason}, got True")

    def _check_env_tasks(self, env: VecEnv) -> None:
        """Refuse an environment of other tasks, or whose observations lose the task; warn where tasks are not shared out."""
        if env.has_attr("num_tasks"):
            num_tasks = get_num_tasks(env)
            if num_tasks != self.num_tasks:
                raise ValueError(
                    f"this model was made for num_tasks={self.num_tasks}, the environment has num_tasks={num_tasks}"
                )
        if self.num_tasks == 1:
            return
        if env.has_attr("task_names") and get_task_names(env) != self.task_names:
            warnings.warn(
                f"this model was made for the tasks {', '.join(self.task_names)}; the environment has other tasks "
                f"(or another order): {', '.join(get_task_names(env))}",
                stacklevel=2,
            )
        normalizer = unwrap_vec_normalize(env)
        if isinstance(normalizer, VecNormalize) and normalizer.norm_obs and not isinstance(normalizer, VecTaskNormalize):
            raise ValueError(
                "VecNormalize(norm_obs=True) would normalise the one-hot of the task: "
                "use sb3_mtrl.common.vec_env.VecTaskNormalize, or norm_obs=False"
            )
        if env.num_envs > 1 and env.has_attr("assigned_tasks"):
            if all(len(tasks) == self.num_tasks for tasks in env.get_attr("assigned_tasks")):
                warnings.warn(
                    f"each of the {env.num_envs} sub-environments cycles through all {self.num_tasks} tasks; "
                    "wrap them in sb3_mtrl.common.vec_env.VecTaskAssignment to share the tasks out",
                    stacklevel=2,
                )

    @property
    def _tunes_cpu(self) -> bool:
        return self.cpu_tuning and self.device.type == "cpu"

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training
        :raises ValueError: if it has another number of tasks
        """
        env = self._wrap_env(env, self.verbose)
        self._check_env_tasks(env)
        super().set_env(env, force_reset)

    def _task_id(self, task: int | str) -> int:
        if isinstance(task, str):
            if task not in self.task_names:
                raise ValueError(f"task must be one of {', '.join(self.task_names)}, got {task!r}")
            return self.task_names.index(task)
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be between 0 and {self.num_tasks - 1}, got {task}")
        return task

    # ---------------------------------------------------------------- rollouts

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._last_obs is None:  # SB3 resets the environment then
            self._start_episodes()
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        buffer = self._prioritized_buffer
        if buffer is not None and buffer.follows_evaluations and not has_multi_task_evaluation(callback):
            warnings.warn(
                "performance_source='eval' needs the evaluations of a MultiTaskEvalCallback, and learn() was given none: "
                "the shares of the tasks in a batch stay as they are unless you call set_task_performance",
                stacklevel=2,
            )
        # All is set up for a new training: what a checkpoint holds takes its place
        for checkpoints in find_checkpoint_callbacks(callback):
            checkpoints.start_training(callback)
        if self._tunes_cpu:  # after a checkpoint said how the products are computed
            tune_process(self.verbose)
        return total_timesteps, callback

    def _start_episodes(self) -> None:
        """Forget what belongs to the running episodes: all sub-environments are reset."""
        self._env_tasks = None
        if self.success_windows is not None:
            self.success_windows.start_episodes(self.n_envs)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # In every step, so that a task is known when an observation does not tell it any more
        task_ids = self._tasks_of_envs(self._last_obs, infos)
        if self.on_nonfinite == "raise":
            if not (finite := np.isfinite(reward)).all():
                self._stop("the reward", task_ids[~finite].tolist())
            if isinstance(new_obs, np.ndarray) and not (finite := np.isfinite(new_obs)).all():
                # Of an episode that has just begun the task is not that of before
                self._env_tasks = np.where(dones, -1, task_ids)
                rows = finite.reshape(len(new_obs), -1).all(axis=1)
                self._stop("the observation", self._tasks_of_envs(new_obs)[~rows].tolist())
        buffer = self.replay_buffer if isinstance(self.replay_buffer, MultiTaskReplayBuffer) else None
        n_refused = 0 if buffer is None else buffer.refused.sum()
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self.on_nonfinite == "raise" and buffer is not None and buffer.refused.sum() > n_refused:
            assert buffer.last_refused is not None
            task, parts = buffer.last_refused
            self._stop(f"the transition ({', '.join(parts)})", [task])
        if self.num_tasks > 1:
            self._env_tasks = np.where(dones, -1, task_ids)
        if self.success_windows is None:
            return
        # This step is counted already
        is_warm_up = self.num_timesteps - self.n_envs < self.learning_starts
        changed = self.success_windows.add_step(task_ids, dones, infos, is_warm_up)
        if changed and self._prioritized_buffer is not None:
            self._prioritized_buffer.set_task_performance(self.success_windows.rates)

    def _tasks_of_envs(self, obs: Any, infos: Sequence[Mapping[str, Any]] = ()) -> np.ndarray:
        """
        :param obs: Observations ``(n_envs, n + T)``
        :param infos: Infos of the step that they came before, for their ``task_id``
        :return: Tasks that the observations announce, ``(n_envs,)``; where they tell none, those of before or of the infos;
            -1: unknown
        """
        if self.num_tasks == 1:
            return np.zeros(self.n_envs, dtype=np.int64)
        assert isinstance(obs, np.ndarray)
        if self._env_tasks is None or len(self._env_tasks) != len(obs):
            self._env_tasks = np.full(len(obs), -1, dtype=np.int64)
        for index in np.flatnonzero(self._env_tasks < 0)[: len(infos)].tolist():
            self._env_tasks[index] = infos[index].get("task_id", -1)
        self._env_tasks = finite_task_ids(obs, self.num_tasks, self._env_tasks)
        return self._env_tasks

    def _sample_action(
        self,
        learning_starts: int,
        action_noise: ActionNoise | None = None,
        n_envs: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.warmup_actions == "policy":
            learning_starts = 0
        with self._finite_last_obs():
            return super()._sample_action(learning_starts, action_noise, n_envs)

    @contextmanager
    def _finite_last_obs(self) -> Iterator[None]:
        """Have zeros in place of what is not finite in ``_last_obs`` while an action is chosen."""
        last_obs = self._last_obs
        if isinstance(last_obs, np.ndarray) and not (finite := np.isfinite(last_obs)).all():
            if self.on_nonfinite == "raise":
                rows = finite.reshape(len(last_obs), -1).all(axis=1)
                self._stop("the observation", self._tasks_of_envs(last_obs)[~rows].tolist())
            self._last_obs = np.where(finite, last_obs, np.zeros_like(last_obs))
        try:
            yield
        finally:
            self._last_obs = last_obs

    def _stop(self, what: str, tasks: Sequence[int]) -> NoReturn:
        """
        :param what: What is not finite
        :param tasks: The tasks that it belongs to; none, or -1: unknown
        :raises NonFiniteError: always
        """
        names = ", ".join(self.task_names[task] for task in sorted(set(tasks)) if task >= 0) or "unknown"
        raise NonFiniteError(
            f"{what} is not finite, task {names}, at time step {self.num_timesteps} after {self._n_updates} updates; nothing "
            f"was learned from it. Last good checkpoint: {self.last_checkpoint or 'none'}. "
            "(on_nonfinite='mask' leaves such things out and goes on)"
        )

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        Collect transitions, see SB3's ``collect_rollouts``; with ``overlap``, update while the first of the steps is made.
        """
        return super().collect_rollouts(
            self._stepping_env or env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
        )

    def _run_waiting_updates(self) -> None:
        waiting, self._waiting_updates = self._waiting_updates or [], None
        if waiting:
            with learner_threads(self._n_busy_workers()) if self._tunes_cpu else nullcontext():
                for gradient_steps, batch_size in waiting:
                    self.train(gradient_steps, batch_size)
            # The rollout goes on
            self.policy.set_training_mode(False)
            if self.use_sde:
                self.actor.reset_noise(self.n_envs)
        self._waiting_updates = []

    def _n_busy_workers(self) -> int:
        """Number of processes that step all the time that an update takes; where they are done sooner, none."""
        if self._stepping_env is None or not self._stepping_env.is_slower:
            return 0
        venv = self._stepping_env.unwrapped
        if isinstance(venv, SharedMemoryVecEnv):
            return len(venv.assignment)
        return venv.num_envs if isinstance(venv, SubprocVecEnv) else 0

    # ------------------------------------------------------------------ update

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:  # type: ignore[override]
        """
        Sample the replay buffer and do the updates.

        :param gradient_steps: Number of updates
        :param batch_size: Transitions per update over all tasks; None: the one given at construction
        """
        # Without a step to come, at the end of learning, there is nothing to wait for
        if self._waiting_updates is not None and self.num_timesteps < self._total_timesteps:
            self._waiting_updates.append((gradient_steps, batch_size))
            return
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._scheduled_optimizers())
        for optimizer, learning_rate in self._own_learning_rates():
            update_learning_rate(optimizer, learning_rate)
        if self._prioritized_buffer is not None:
            self._prioritized_buffer.anneal_beta(self._current_progress_remaining)
        if not self._may_look:
            # Here, as parameters that are loaded bring the settings of their optimisers along
            for optimizer in self._stepping_optimizers():
                fuse(optimizer)
        if self._static_update is not None:
            self._static_update.start()
        skipped_before = self.skipped_steps.clone()

        for gradient_step in range(gradient_steps):
            replay_data = self._sample_batch(batch_size or self.batch_size)  # type: ignore[arg-type]
            # We need to sample because `log_std` may have changed between two gradient steps
            if self.use_sde:
                self.actor.reset_noise()
            updates_targets = gradient_step % self.target_update_interval == 0
            if self._static_update is not None:
                self._static_update(replay_data, updates_targets)
                continue
            dropped = self._make_update(replay_data, updates_targets)
            self._finish_update()
            if dropped is not None:
                for guard in self.update_guards:
                    guard.after_update(dropped)

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.on_nonfinite == "raise" and not self._may_look:
            self._stop_if_something_was_left_out(skipped_before)

    def _make_update(self, replay_data: ReplaySamples, updates_targets: bool) -> th.Tensor | None:
        """
        All that an update does on the device, but for what guards do after it.

        :param replay_data: The batch
        :param updates_targets: Whether the target networks follow
        :return: (T,) bool, tasks whose samples were dropped; None: there is none, and no guard wants to be told
        """
        update = self._joint_update if self.optimizer_order == "joint" else self._sequential_update
        spoilt = self._clear_spoilt_rows(replay_data)
        with self._update_context():
            dropped = self._guarded_update(update, replay_data, spoilt)
        if self.policy.gradient_gate is not None:
            self.policy.gradient_gate.dropped_tasks = None
        if updates_targets:
            self._update_target_networks()
        if self.max_ent_coef is not None:
            with th.no_grad():
                for log_ent_coef in self._log_ent_coefs():
                    log_ent_coef.clamp_(max=math.log(self.max_ent_coef))
        if dropped is not None:
            self.dropped_updates.add_(dropped)
        return dropped

    def _finish_update(self) -> None:
        """What an update leaves to do on the host: it is counted, and a prioritized buffer told its errors."""
        self._n_summed_updates += 1
        if self._pass_priorities is not None and self._prioritized_buffer is not None:
            self._prioritized_buffer.update_priorities(*self._pass_priorities)
        self._pass_priorities = None

    def _upload_host_values(self) -> None:
        """Bring values of the host that the next update reads, beside the batch, to where it reads them."""

    def _guarded_update(self, update: Update, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        One update; on the CPU, where looking is free, again without the tasks whose gradients were not finite in it, for the
        optimisers that did not step. (On a GPU a step with such a gradient is left out for all tasks.)
        """
        self._stepped_optimizers.clear()
        self._refused_optimizers.clear()
        with suppress(BadGradient):
            dropped = self._make_pass(update, replay_data, spoilt)
            if self._has_bad_gradients:
                blamed = self._tasks_with_bad_gradients(update, replay_data)
                if blamed.any():  # else only together
                    left_out = blamed if spoilt is None else blamed | spoilt
                    dropped = self._make_pass(update, self._without_inputs(replay_data, blamed), left_out)
                self._warn_of_passes()
                self.skipped_steps.add_(len(self._refused_optimizers - self._stepped_optimizers))
            self._sum_pass()
            return dropped
        self._stop("a gradient", self._tasks_with_bad_gradients(update, replay_data).nonzero().flatten().tolist())

    def _make_pass(self, update: Update, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        self._has_bad_gradients = False
        self._pass_values.clear()
        self._pass_priorities = None
        return update(replay_data, spoilt)

    def _sum_pass(self) -> None:
        """What the last pass of an update computed is logged; that of those before is not."""
        for values in self._pass_values:
            for name, value in values.items():
                if name not in self._train_sums:
                    self._train_sums[name] = th.zeros_like(value)
                self._train_sums[name].add_(value)
        self._pass_values.clear()
        self._stepped_optimizers.clear()
        self._refused_optimizers.clear()

    def _warn_of_passes(self) -> None:
        if not self._warned_of_passes:
            self._warned_of_passes = True
            warnings.warn(
                f"a gradient was not finite: to find its task, such an update takes {self.num_tasks + 2} passes instead of "
                "one (one for each task, and another without those at fault)",
                stacklevel=2,
            )

    def _tasks_with_bad_gradients(self, update: Update, replay_data: ReplaySamples) -> th.Tensor:
        """Tasks of the batch whose gradients are not finite without the other tasks, ``(T,)`` bool; nothing is learned."""
        blamed = th.zeros(self.num_tasks, dtype=th.bool)
        self._is_rehearsal = True
        try:
            for task in range(self.num_tasks):
                others = th.ones(self.num_tasks, dtype=th.bool, device=self.device)
                others[task] = False
                self._make_pass(update, self._without_inputs(replay_data, others), others)
                blamed[task] = self._has_bad_gradients
        finally:
            self._is_rehearsal = False
        return blamed

    def _without_inputs(self, replay_data: ReplaySamples, tasks: th.Tensor) -> ReplaySamples:
        """The batch with zeros for all that the networks see of some tasks: even a zero may come back as NaN."""
        if not isinstance(replay_data, MultiTaskReplayBufferSamples):
            return replay_data
        rows = self._rows(tasks, replay_data)
        return replay_data._replace(
            observations=th.where(rows, 0.0, replay_data.observations),
            next_observations=th.where(rows, 0.0, replay_data.next_observations),
            actions=th.where(rows, 0.0, replay_data.actions),
            extras={name: th.where(rows, 0.0, tensor) for name, tensor in replay_data.extras.items()},
        )

    def _stop_if_something_was_left_out(self, skipped_before: th.Tensor) -> None:
        """
        On a GPU, once a call of ``train``, in one transfer: the parameters are those of training with "mask".

        :param skipped_before: ``skipped_steps`` at the start of the call
        """
        has_skipped = (self.skipped_steps > skipped_before).reshape(1)
        *is_nonfinite, skipped = th.cat([self._nonfinite_tasks, has_skipped]).tolist()
        if any(is_nonfinite):
            self._nonfinite_tasks.zero_()
            self._stop("a loss, or the batch that it is of,", np.flatnonzero(is_nonfinite).tolist())
        if skipped:
            self._stop("a gradient", [])

    def _sample_batch(self, batch_size: int) -> ReplaySamples:
        return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]

    @contextmanager
    def _update_context(self) -> Iterator[None]:
        """What each update runs in."""
        with ExitStack() as stack:
            if self._tunes_cpu:
                stack.enter_context(fast_matmul())
            if self.amp == "bf16":
                # Without its cache, which would hold the weights of before an optimiser's step
                stack.enter_context(th.autocast(self.device.type, th.bfloat16, cache_enabled=False))
            yield

    def _sequential_update(self, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        One update in SB3's order: each optimiser steps before the next loss is formed.

        :param replay_data: The batch
        :param spoilt: (T,) bool, tasks to drop in any case; None: there is none
        :return: (T,) bool, tasks whose samples were dropped; None: there is none, and no guard wants to be told
        """
        obs, next_obs = self._observations(replay_data)
        for optimizer in self._shared_optimizers():
            optimizer.zero_grad()

        # Action by the current actor for the sampled state
        actor_obs = self._actor_observations(obs, replay_data)
        actions_pi, log_prob = self.actor.action_log_prob(actor_obs)
        log_prob = log_prob.reshape(-1, 1)
        ent_coef = self._ent_coef_per_row(replay_data)
        td_errors = self._td_errors(replay_data, obs, next_obs, ent_coef)  # (n_critics, B, 1)
        task_losses = TaskLosses(self._task_means(self._critic_losses(td_errors), replay_data), None, None)
        dropped = self._dropped_tasks(task_losses, spoilt)

        # `ent_coef` was read above, so this step does not change the losses below
        ent_coef_losses = self._ent_coef_losses(log_prob, replay_data, dropped)
        if ent_coef_losses is not None and self.ent_coef_optimizer is not None:
            self._optimize(self.ent_coef_optimizer, ent_coef_losses.mean(), dropped)

        critic_loss = self._critic_loss(td_errors, dropped, replay_data)
        critic_loss = critic_loss + self._auxiliary_loss("critic", obs, next_obs, replay_data, dropped)
        self._optimize(self.critic.optimizer, critic_loss, dropped)

        # Min over all critic networks, which are held constant here
        min_qf_pi = self.critic.q_values(actor_obs, actions_pi, frozen=True).min(dim=0).values
        actor_losses = ent_coef * log_prob - min_qf_pi
        actor_loss = self._keep(actor_losses, dropped, replay_data).mean()
        actor_loss = actor_loss + self._auxiliary_loss("actor", obs, next_obs, replay_data, dropped)
        self._optimize(self.actor.optimizer, actor_loss, dropped)

        for optimizer in self._shared_optimizers():
            self._step(optimizer, dropped)
        self._update_priorities(td_errors, dropped, replay_data)
        self._sum_train_values(task_losses.critic, self._task_means(actor_losses, replay_data), ent_coef_losses)
        return dropped

    def _joint_update(self, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        One update in the order of PaCo's authors: all gradients are taken at the same parameters, then all optimisers step.

        :param replay_data: The batch
        :param spoilt: (T,) bool, tasks to drop in any case; None: there is none
        :return: (T,) bool, tasks whose samples were dropped; None: there is none, and no guard wants to be told
        """
        obs, next_obs = self._observations(replay_data)
        optimizers = self._all_optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()

        actor_obs = self._actor_observations(obs, replay_data)
        actions_pi, log_prob = self.actor.action_log_prob(actor_obs)
        log_prob = log_prob.reshape(-1, 1)
        ent_coef = self._ent_coef_per_row(replay_data)
        td_errors = self._td_errors(replay_data, obs, next_obs, ent_coef)  # (n_critics, B, 1)

        # The actor's gradient through the critics is g = d min_i Q_i(s, a) / d a, with the critics held constant
        frozen_actions = actions_pi.detach().requires_grad_()
        min_qf_pi = self.critic.q_values(actor_obs, frozen_actions, frozen=True).min(dim=0).values
        (action_grad,) = th.autograd.grad(min_qf_pi.sum(), frozen_actions)  # (B, n_actions)
        entropy_term = ent_coef * log_prob
        ent_coef_losses = self._ent_coef_losses(log_prob, replay_data, None)

        # An actor loss for the guards that is large when the critic is steep, which alpha log pi - Q would hide
        actor_values = 0.5 * action_grad.square().sum(dim=1, keepdim=True) + entropy_term.detach()
        task_losses = TaskLosses(
            critic=self._task_means(self._critic_losses(td_errors), replay_data),
            actor=self._task_means(actor_values, replay_data),
            ent_coef=None if ent_coef_losses is None else self._task_means(ent_coef_losses, replay_data),
        )
        dropped = self._dropped_tasks(task_losses, spoilt)

        policy_improvement = (self._keep(action_grad, dropped, replay_data) * actions_pi).sum(dim=1, keepdim=True)
        actor_losses = self._keep(entropy_term - policy_improvement, dropped, replay_data)
        loss = self._critic_loss(td_errors, dropped, replay_data) + actor_losses.mean()
        for side in ("critic", "actor"):
            loss = loss + self._auxiliary_loss(side, obs, next_obs, replay_data, dropped)
        if ent_coef_losses is not None:
            loss = loss + self._ent_coef_losses(log_prob, replay_data, dropped).mean()  # type: ignore[union-attr]
        loss.backward()
        self._clip_gradients(self.critic.optimizer)
        self._clip_gradients(self.actor.optimizer)
        for optimizer in optimizers:
            self._step(optimizer, dropped)
        self._update_priorities(td_errors, dropped, replay_data)
        self._sum_train_values(task_losses.critic, self._task_means(entropy_term - min_qf_pi, replay_data), ent_coef_losses)
        return dropped

    def _observations(self, replay_data: ReplaySamples) -> tuple[PyTorchObs, PyTorchObs]:
        """Observations and next observations; in groups that share their task, ``(G, B / G, n + T)``, with several tasks."""
        if isinstance(replay_data, MultiTaskReplayBufferSamples) and self.num_tasks > 1:
            obs, next_obs = replay_data.observations, replay_data.next_observations
            n_groups = len(replay_data.group_tasks)
            return obs.view(n_groups, -1, obs.shape[1]), next_obs.view(n_groups, -1, obs.shape[1])
        return replay_data.observations, replay_data.next_observations

    def _actor_observations(self, obs: PyTorchObs, replay_data: ReplaySamples) -> PyTorchObs:
        """Observations that actor and entropy coefficients learn from, in the same groups as those of the critics."""
        return obs

    def _td_errors(self, replay_data: ReplaySamples, obs: PyTorchObs, next_obs: PyTorchObs, ent_coef: th.Tensor) -> th.Tensor:
        """Errors of all critics against the target, ``(n_critics, B, 1)``."""
        # For n-step replay, discount factor is gamma**n_steps (when no early termination)
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        with th.no_grad():
            # Select action according to policy
            next_actions, next_log_prob = self.actor.action_log_prob(next_obs)
            # Compute the next Q values: min over all critics targets
            next_q_values = self.critic_target.q_values(next_obs, next_actions).min(dim=0).values
            # add entropy term
            next_q_values = next_q_values - ent_coef * next_log_prob.reshape(-1, 1)
            # td error + entropy term
            target_q_values = replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values
        return self.critic.q_values(obs, replay_data.actions) - target_q_values

    @staticmethod
    def _critic_losses(td_errors: th.Tensor) -> th.Tensor:
        """Loss of each row, ``(B, 1)``: half the squared errors, summed over the critics."""
        return 0.5 * td_errors.square().sum(dim=0)

    def _critic_loss(self, td_errors: th.Tensor, dropped: th.Tensor | None, replay_data: ReplaySamples) -> th.Tensor:
        """
        The loss that is minimised, a scalar: one mean over the batch, in which a task counts by its number of rows, with the
        importance weights of a prioritized buffer.
        """
        losses = self._critic_losses(self._keep(td_errors, dropped, replay_data))
        weights = replay_data.weights if isinstance(replay_data, MultiTaskReplayBufferSamples) else None
        return losses.mean() if weights is None else (weights * losses).mean()

    def _update_priorities(self, td_errors: th.Tensor, dropped: th.Tensor | None, replay_data: ReplaySamples) -> None:
        """
        Have a prioritized buffer told the errors ``(n_critics, B, 1)`` of this update, if this is its last pass; those of
        dropped tasks mean nothing.
        """
        buffer = self._prioritized_buffer
        if buffer is None or not isinstance(replay_data, MultiTaskReplayBufferSamples) or replay_data.indices is None:
            return
        sizes = buffer.td_error_sizes(td_errors.detach())
        if dropped is not None:
            sizes = th.where(self._rows(dropped, replay_data), th.nan, sizes)
        if self._spoilt_rows is not None:
            # Else they would be drawn, and their task dropped, ever more often, as the errors of the others fall
            sizes = th.where(self._spoilt_rows, 0.0, sizes)
        self._pass_priorities = replay_data.indices, sizes

    def _auxiliary_loss(
        self,
        side: str,
        obs: PyTorchObs,
        next_obs: PyTorchObs,
        replay_data: ReplaySamples,
        dropped: th.Tensor | None,
    ) -> th.Tensor | float:
        """Mean of ``_auxiliary_losses`` without dropped tasks; 0 if there are none."""
        losses = self._auxiliary_losses(side, obs, next_obs, replay_data, dropped)
        return 0.0 if losses is None else self._keep(losses, dropped, replay_data).mean()

    def _auxiliary_losses(
        self,
        side: str,
        obs: PyTorchObs,
        next_obs: PyTorchObs,
        replay_data: ReplaySamples,
        dropped: th.Tensor | None,
    ) -> th.Tensor | None:
        """
        A further loss of each row for the optimiser of the "critic" or the "actor", ``(B, 1)``. It is asked for once the
        networks of that side have seen their observations and before they change. The losses of dropped tasks are left out
        afterwards; ``dropped`` is for losses of a row on others.
        """
        return None

    def _ent_coef_per_row(self, replay_data: ReplaySamples) -> th.Tensor:
        """Entropy coefficient of each row's task, ``(B, 1)`` or broadcastable to it, constant."""
        if self.log_ent_coef is None:
            return self.ent_coef_tensor
        return self._rows(self._bounded_log_ent_coef().detach().exp(), replay_data)

    def _bounded_log_ent_coef(self) -> th.Tensor:
        assert self.log_ent_coef is not None
        return self._bounded_below(self.log_ent_coef)

    def _bounded_below(self, log_ent_coef: th.Tensor) -> th.Tensor:
        if self.min_ent_coef is None:
            return log_ent_coef
        return log_ent_coef.clamp(min=math.log(self.min_ent_coef))

    def _log_ent_coefs(self) -> list[th.Tensor]:
        """Logarithms of all learned entropy coefficients, each of one entry per task."""
        return [] if self.log_ent_coef is None else [self.log_ent_coef]

    def _ent_coef_losses(self, log_prob: th.Tensor, replay_data: ReplaySamples, dropped: th.Tensor | None) -> th.Tensor | None:
        """Loss of each row on its task's entropy coefficient, ``(B, 1)``; None if the coefficient is fixed."""
        if self.log_ent_coef is None:
            return None
        assert isinstance(self.target_entropy, float)
        entropy_gap = self._keep((log_prob + self.target_entropy).detach(), dropped, replay_data)
        return -self._rows(self._bounded_log_ent_coef(), replay_data) * entropy_gap

    def _rows(self, task_values: th.Tensor, replay_data: ReplaySamples) -> th.Tensor:
        """Spread values per task ``(T,)`` over the rows of the batch: ``(B, 1)``, or ``(1,)`` with one task."""
        if not isinstance(replay_data, MultiTaskReplayBufferSamples):
            return task_values
        groups = replay_data.group_tasks
        return task_values[groups].unsqueeze(1).expand(-1, len(replay_data.rewards) // len(groups)).reshape(-1, 1)

    def _task_means(self, row_values: th.Tensor, replay_data: ReplaySamples) -> th.Tensor:
        """
        Means over the rows of each task: ``(B, 1)`` to ``(T,)``, or ``(B, n)`` to ``(T, n)``, constant; 0 for a task that
        is not in the batch.
        """
        row_values = row_values.detach()
        if not isinstance(replay_data, MultiTaskReplayBufferSamples):
            return row_values.mean(dim=0, keepdim=True).squeeze(1)
        groups = replay_data.group_tasks
        # Groups are of one size, so the mean over a task's groups is the mean over its rows
        group_means = row_values.view(len(groups), -1, row_values.shape[1]).mean(dim=1)
        zeros = group_means.new_zeros(self.num_tasks, group_means.shape[1])
        n_groups = zeros.index_add(0, groups, th.ones_like(group_means))
        return (zeros.index_add(0, groups, group_means) / n_groups.clamp(min=1)).squeeze(1)

    def _keep(self, values: th.Tensor, dropped: th.Tensor | None, replay_data: ReplaySamples) -> th.Tensor:
        """
        Replace the values of dropped tasks by zero; the batch size that losses are divided by stays the same.

        Not a product with a mask: a dropped value may be infinite or NaN, and so would the product be.

        :param values: ``(..., B, n)``
        :param dropped: (T,) bool, or None
        :param replay_data: The batch
        :return: The values that stay, zeros elsewhere
        """
        if dropped is None:
            return values
        return th.where(self._rows(dropped, replay_data), 0.0, values)

    def _clear_spoilt_rows(self, replay_data: ReplaySamples) -> th.Tensor | None:
        """
        Replace the rows that hold a NaN, an infinity or a number of which a network makes one by zeros, in place, and name
        their tasks, ``(T,)`` bool; None if that is known to be none.

        A loss of zero would not keep them from the weights that all tasks share: the gradient multiplies it with the input.
        """
        self._spoilt_rows = None
        if not isinstance(replay_data, MultiTaskReplayBufferSamples):
            return None
        inputs = (replay_data.observations, replay_data.next_observations, replay_data.actions, *replay_data.extras.values())
        if self._may_look and are_within((*inputs, replay_data.rewards), MAX_INPUT):
            return None
        finite = th.stack([(tensor.abs() < MAX_INPUT).all(dim=1) for tensor in inputs]).all(dim=0)  # False for NaN
        self._spoilt_rows = ~(finite & replay_data.rewards.isfinite().squeeze(1)).unsqueeze(1)
        for tensor in inputs:
            tensor.copy_(th.where(finite.unsqueeze(1), tensor, 0.0))
        spoilt_groups = ~finite.view(len(replay_data.group_tasks), -1).all(dim=1)
        spoilt_tasks = th.zeros(self.num_tasks, device=self.device)
        spoilt = spoilt_tasks.index_add_(0, replay_data.group_tasks, spoilt_groups.float()) > 0
        if self.on_nonfinite == "raise" and self._may_look and spoilt.any():
            self._stop("an observation, action or extra column of the batch", spoilt.nonzero().flatten().tolist())
        return spoilt

    def _dropped_tasks(self, task_losses: TaskLosses, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        Which tasks must not contribute, ``(T,)`` bool: those that are spoilt, those with a loss that is not finite, and those
        that a guard drops; None if that is known to be none and no guard wants to be told.
        """
        losses = {name: loss for name, loss in task_losses._asdict().items() if loss is not None}
        may_be_passed = self._may_look and spoilt is None and not self.update_guards
        if may_be_passed and all(math.isfinite(loss.sum().item()) for loss in losses.values()):
            if self.policy.gradient_gate is not None:
                self.policy.gradient_gate.dropped_tasks = None
            return None
        finite = th.stack([loss.isfinite() for loss in losses.values()])  # (losses, T)
        dropped = ~finite.all(dim=0)
        if not self._may_look:
            self._nonfinite_tasks.logical_or_(dropped if spoilt is None else dropped | spoilt)
        elif self.on_nonfinite == "raise" and dropped.any() and not self._is_rehearsal:
            names = [name for name, row in zip(losses, finite, strict=True) if not row.all()]
            self._stop(f"the loss ({', '.join(names)})", dropped.nonzero().flatten().tolist())
        if spoilt is not None:
            dropped = dropped | spoilt
        for guard in self.update_guards:
            dropped = dropped | guard.drop_tasks(task_losses)
        nothing_dropped = self._may_look and not dropped.any()
        if self.policy.gradient_gate is not None:
            self.policy.gradient_gate.dropped_tasks = None if nothing_dropped else dropped
        return None if nothing_dropped and not self.update_guards else dropped

    def _optimize(self, optimizer: th.optim.Optimizer, loss: th.Tensor, dropped: th.Tensor | None) -> None:
        """One step of one optimiser on one loss; no step if every task is dropped."""
        optimizer.zero_grad()
        loss.backward()
        if optimizer is not self.ent_coef_optimizer:
            self._clip_gradients(optimizer)
        self._step(optimizer, dropped)

    def _step(self, optimizer: th.optim.Optimizer, dropped: th.Tensor | None) -> None:
        """One step of an optimiser; none if every task is dropped or a gradient is not finite."""
        skip = None if dropped is None else dropped.all()
        finite = have_finite_gradients(optimizer)
        if self._may_look:
            if finite is not None and not finite:
                self._has_bad_gradients = True
                if not self._is_rehearsal:
                    self._refused_optimizers.add(optimizer)
                    if self.on_nonfinite == "raise":
                        raise BadGradient
            elif not self._is_rehearsal and optimizer not in self._stepped_optimizers and (skip is None or not skip):
                optimizer.step()
                self._stepped_optimizers.add(optimizer)
            return
        if finite is not None:
            self.skipped_steps.add_(~finite)
            if is_fused(optimizer):
                skip = ~finite if skip is None else skip | ~finite
            else:
                if not self.update_guards:
                    skip = None  # to skip the step would mean to wait for the device; only the moments move the parameters
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param.grad.masked_fill_(~finite, 0.0)
        step_unless(optimizer, skip)

    def _clip_gradients(self, optimizer: th.optim.Optimizer) -> None:
        if self.max_grad_norm is not None:
            for group in optimizer.param_groups:
                th.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)

    def _scheduled_optimizers(self) -> list[th.optim.Optimizer]:
        """Optimisers that follow ``learning_rate``."""
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self.ent_coef_optimizer is not None and self.ent_coef_learning_rate is None:
            optimizers.append(self.ent_coef_optimizer)
        followers = [name for name, learning_rate in self.policy.shared_optimizers().items() if learning_rate is None]
        return [*optimizers, *(getattr(self.policy, name) for name in followers)]

    def _own_learning_rates(self) -> list[tuple[th.optim.Optimizer, float]]:
        """Optimisers with a learning rate of their own."""
        own_learning_rates = [
            (getattr(self.policy, name), learning_rate)
            for name, learning_rate in self.policy.shared_optimizers().items()
            if learning_rate is not None
        ]
        if self.ent_coef_optimizer is not None and self.ent_coef_learning_rate is not None:
            own_learning_rates.insert(0, (self.ent_coef_optimizer, self.ent_coef_learning_rate))
        return own_learning_rates

    def _stepping_optimizers(self) -> list[th.optim.Optimizer]:
        """All optimisers."""
        return [*self._scheduled_optimizers(), *(optimizer for optimizer, _ in self._own_learning_rates())]

    def _shared_optimizers(self) -> list[th.optim.Optimizer]:
        """Optimisers of parameters that actor and critics share; they step once an update, on the sum of both gradients."""
        return [getattr(self.policy, name) for name in self.policy.shared_optimizers()]

    def _all_optimizers(self) -> list[th.optim.Optimizer]:
        optimizers = [self.actor.optimizer, self.critic.optimizer, *self._shared_optimizers()]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        return optimizers

    def _update_target_networks(self) -> None:
        polyak_update_(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        # Copy running stats, see GH issue #996
        polyak_update_(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    # ----------------------------------------------------------------- logging

    def _sum_train_values(
        self, task_critic_losses: th.Tensor, task_actor_losses: th.Tensor, ent_coef_losses: th.Tensor | None
    ) -> None:
        """Add this update, if this is its last pass, to the sums that ``dump_logs`` reads; nothing leaves the device here."""
        values = {"critic_loss": task_critic_losses, "actor_loss": task_actor_losses}
        if self.log_ent_coef is not None and ent_coef_losses is not None:
            values["ent_coef"] = self._bounded_log_ent_coef().detach().exp()
            values["ent_coef_loss"] = ent_coef_losses.detach().mean()
        else:
            values["ent_coef"] = self.ent_coef_tensor
        self._add_to_train_sums(values)

    def _add_to_train_sums(self, values: dict[str, th.Tensor]) -> None:
        self._pass_values.append(values)

    def dump_logs(self) -> None:
        """
        Write log data, the ``train/*`` values averaged over the updates since the last dump.
        """
        self._warn_of_tasks_that_do_not_learn()
        if self._n_summed_updates > 0:
            for name, total in self._train_sums.items():
                self._record_train_mean(name, (total / self._n_summed_updates).cpu().numpy())
        self._forget_train_sums()
        self._record_what_was_left_out()
        for guard in self.update_guards:
            guard.log_to(self.logger, self.task_names)
        if self._prioritized_buffer is not None:
            self._record_priorities(self._prioritized_buffer)
        super().dump_logs()

    def _record_train_mean(self, name: str, mean: np.ndarray) -> None:
        """
        :param name: Name of what was summed up, see ``_add_to_train_sums``
        :param mean: Its mean over the updates since the last dump, a number, one of each task, or as it was summed up
        """
        self.logger.record(f"train/{name}", float(mean.mean()))
        if self.num_tasks > 1 and mean.size == self.num_tasks:
            self._record_per_task(f"train/{name}", mean.tolist())

    def _forget_train_sums(self) -> None:
        self._n_summed_updates = 0
        if self._static_update is None:
            self._train_sums.clear()
        for total in self._train_sums.values():
            total.zero_()  # in place: a graph goes on adding to it

    def _record_what_was_left_out(self) -> None:
        """Counts since the start of training; without guards only once there is something to count."""
        refused = self.replay_buffer.refused.tolist() if isinstance(self.replay_buffer, MultiTaskReplayBuffer) else []
        dropped = self.dropped_updates.tolist()
        n_skipped = int(self.skipped_steps)
        if self.update_guards or any(dropped):
            self.logger.record("train/dropped_updates", sum(dropped))
            if self.num_tasks > 1:
                self._record_per_task("train/dropped_updates", dropped)
        if any(refused):
            self.logger.record("train/refused_transitions", sum(refused))
            if self.num_tasks > 1:
                self._record_per_task("train/refused_transitions", refused)
        if n_skipped:
            self.logger.record("train/skipped_steps", n_skipped)
        if (any(refused) or n_skipped) and not self._warned_of_nonfinite:
            self._warned_of_nonfinite = True
            left_out = []
            if any(refused):
                tasks = ", ".join(f"{name} ({n})" for name, n in zip(self.task_names, refused, strict=True) if n)
                left_out.append(f"transitions of the tasks {tasks}")
            if n_skipped:
                left_out.append(f"steps of optimisers ({n_skipped})")
            warnings.warn(
                f"what was not finite was left out: {' and '.join(left_out)}; "
                "train/refused_transitions and train/skipped_steps count them, without further warnings",
                stacklevel=2,
            )

    def _record_priorities(self, buffer: TaskPrioritizedReplayBuffer) -> None:
        """``train/priority_*`` as they are now: shares of the tasks, success rates that they follow, highest priorities."""
        self.logger.record("train/priority_beta", buffer.beta)
        self.logger.record("train/priority_max", float(buffer.highest_priorities.max()))
        if self.num_tasks == 1:
            return
        assert self.batch_size is not None
        self._record_per_task("train/priority_max", buffer.highest_priorities.tolist())
        self._record_per_task("train/priority_task", buffer.task_priorities.tolist())
        self._record_per_task("train/priority_quota", buffer.quotas(self.batch_size).tolist())
        rates = buffer.success_rates
        if np.isfinite(rates).all():
            self._record_per_task("train/priority_success", rates.tolist())
            self.logger.record("train/priority_success", float(rates.mean()))
            self.logger.record("train/priority_success_std", float(rates.std()))
            self.logger.record("train/priority_success_worst", float(rates.min()))

    def _warn_of_tasks_that_do_not_learn(self) -> None:
        """Dropping a task keeps its loss from coming down, too: one that is dropped all the time will be for ever."""
        n_updates = self._n_summed_updates
        dropped_since = (self.dropped_updates - self._dropped_at_last_dump).tolist()
        self._dropped_at_last_dump = self.dropped_updates.clone()
        stuck = [name for name, count in zip(self.task_names, dropped_since, strict=True) if count >= max(n_updates, 10)]
        if stuck and not self._warned_of_stuck_tasks:
            self._warned_of_stuck_tasks = True
            warnings.warn(
                f"all of the last {n_updates} updates left out {', '.join(stuck)}: this does not mend itself. If the "
                "rewards are large, normalise them or raise the threshold of the loss maskout (it scales with their square)",
                stacklevel=2,
            )

    def _record_per_task(self, name: str, values: Sequence[float]) -> None:
        record_per_task(self.logger, name, dict(zip(self.task_names, values, strict=True)), console=False)

    def learn(
        self: SelfMTSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MTSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMTSAC:
        """
        Train, see SB3's ``learn``.

        :raises ValueError: if ``log_interval`` is neither a number of episodes nor None
        """
        check_integer("log_interval", log_interval, 1, or_none=True)  # SB3 divides by it when the first episode ends
        if self.overlap and self.env is not None:
            self._stepping_env, self._waiting_updates = UpdateWhileStepping(self.env, self._run_waiting_updates), []
        try:
            return super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
        finally:
            self._stepping_env, self._waiting_updates = None, None

    # -------------------------------------------------------- export, save, load

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file, see SB3's ``load_replay_buffer``.

        The settings of a prioritized buffer are those of the file; a warning names those that the model's had otherwise.

        :raises ValueError: if it holds other tasks or observations, lacks what this algorithm stores beside transitions, or
            has no priorities where the model's has them (or the other way round); the model keeps its own then
        """
        own_buffer = getattr(self, "replay_buffer", None)
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            self._check_loaded_buffer(path, own_buffer)
            if isinstance(self.replay_buffer, MultiTaskReplayBuffer) and isinstance(own_buffer, MultiTaskReplayBuffer):
                self.replay_buffer.take_device_of(own_buffer)
        except Exception:
            self.replay_buffer = own_buffer
            raise
        if isinstance(self.replay_buffer, MultiTaskReplayBuffer):
            self.replay_buffer.n_envs = self.n_envs  # its rings belong to tasks, not to sub-environments

    def _check_loaded_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, own_buffer: ReplayBuffer | None) -> None:
        """Refuse a replay buffer that was loaded in the place of the model's own one if it does not fit."""
        loaded = self.replay_buffer
        assert loaded is not None
        expected = {
            "num_tasks": self.num_tasks,
            "obs_shape": get_obs_shape(self.observation_space),
            "action_dim": get_action_dim(self.action_space),
        }
        # SB3's own buffers hold one task
        got = {name: getattr(loaded, name, 1) for name in expected}
        if got != expected:
            raise ValueError(f"path must name a replay buffer of {expected}, got {path}, a {type(loaded).__name__} of {got}")
        own_is_prioritized = isinstance(own_buffer, TaskPrioritizedReplayBuffer)
        if own_buffer is not None and own_is_prioritized != isinstance(loaded, TaskPrioritizedReplayBuffer):
            raise ValueError(
                f"path must name a {type(own_buffer).__name__}, got {path}, a {type(loaded).__name__} "
                "(give the model that class as replay_buffer_class to go on with it)"
            )
        if isinstance(loaded, TaskPrioritizedReplayBuffer) and isinstance(own_buffer, TaskPrioritizedReplayBuffer):
            own_settings, settings = own_buffer.settings(), loaded.settings()
            others = [f"{name}={settings[name]!r}" for name in settings if settings[name] != own_settings[name]]
            if others:
                warnings.warn(f"the loaded replay buffer goes on with its own {', '.join(others)}", stacklevel=3)

    def export_task_policy(self, task: int | str) -> SACPolicy:
        """
        The policy of one task as SB3's plain ``SACPolicy``: observations without the one-hot, no code of this package needed.

        :param task: Task id or name
        :return: The policy; ``predict`` gives the same deterministic actions. Write it with ``policy.save`` or with
            ``sb3_mtrl.common.policies.export_onnx``. With one task the observations stay as they are. A policy
            trained with normalised observations expects them (a warning says so).
        :raises ValueError: for an unknown task, or a policy with an own features extractor or gSDE
        """
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            warnings.warn(
                "this model was trained on normalised observations: the exported policy expects them normalised, too "
                "(statistics: model.get_vec_normalize_env().obs_rms)",
                stacklevel=2,
            )
        return single_task_policy(self.policy, self.num_tasks, self._task_id(task))

    @classmethod
    def plain_classes(cls) -> dict[str, dict[str, type]]:
        """
        :return: Classes that a model file may name in plain text, by attribute and name
        """
        buffers = (MultiTaskReplayBuffer, TaskPrioritizedReplayBuffer, ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)
        return {
            "policy_class": dict(cls.policy_aliases),
            "replay_buffer_class": {buffer.__name__: buffer for buffer in buffers},
        }

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip-file, see SB3's ``save``; what SB3 pickles is also described in plain text, for
        ``load(safe=True)``.

        :param path: Path to the file
        :param exclude: Names of attributes to leave out
        :param include: Names of attributes to save that are left out otherwise
        """
        self.plain_settings: dict[str, Any] = {
            "observation_space": space_to_plain(self.observation_space),
            "action_space": space_to_plain(self.action_space),
            "train_freq": train_freq_to_plain(self.train_freq) if isinstance(self.train_freq, TrainFreq) else None,
        }
        for name, classes in self.plain_classes().items():
            own_class = getattr(self, name)
            self.plain_settings[name] = next((key for key, value in classes.items() if value is own_class), None)
        super().save(path, exclude, include)

    _unsaved = (
        "update_guards",
        "_train_sums",
        "_n_summed_updates",
        "_dropped_at_last_dump",
        "_warned_of_stuck_tasks",
        "_warned_of_nonfinite",
        "_warned_of_passes",
        "_nonfinite_tasks",
        "_may_look",
        "_env_tasks",
        "_is_rehearsal",
        "_has_bad_gradients",
        "_stepped_optimizers",
        "_refused_optimizers",
        "_pass_values",
        "_pass_priorities",
        "_spoilt_rows",
        "_stepping_env",
        "_waiting_updates",
        "_static_update",
        "last_checkpoint",
    )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._unsaved]

    def _running_state(self) -> list[str]:
        """
        Attributes that a training changes, beside parameters, optimisers and replay buffer: what a checkpoint has to hold for
        the training to go on exactly. A subclass adds its own.
        """
        return [
            *("num_timesteps", "_episode_num", "_n_updates", "_current_progress_remaining", "action_noise"),
            *("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"),
            *("success_windows", "_train_sums", "_n_summed_updates", "_dropped_at_last_dump", "_warned_of_stuck_tasks"),
            *("_waiting_updates", "_env_tasks", "_nonfinite_tasks", "_warned_of_nonfinite", "_warned_of_passes"),
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        shared_optimizers = (f"policy.{name}" for name in self.policy.shared_optimizers())
        return [*state_dicts, *shared_optimizers], [*variables, "dropped_updates", "skipped_steps"]

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see SB3's ``set_parameters``.

        :raises RuntimeError: if they are of a model of other shapes, e.g. of another number of tasks; nothing is changed then
        """
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except RuntimeError as e:
            super().set_parameters(before, True, device)  # type: ignore[arg-type]
            raise RuntimeError(
                f"the parameters do not fit this model of num_tasks={self.num_tasks} "
                f"(other tasks, networks or parameter sets?): {e}"
            ) from e

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfMTSAC],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        safe: bool = False,
        **kwargs: Any,
    ) -> SelfMTSAC:
        """
        Load the model from a zip-file, see SB3's ``load``.

        Such a file holds pickles: to load it is to run what its author put there. With ``safe=True`` weights and numbers are
        read alone. Spaces, the kinds of policy and buffer and the training frequency come from their plain descriptions in
        the file, the schedule from a learning rate that is a number; the state of the interrupted run (last observation,
        windows of statistics) is left out. What else is not plain, e.g. a learning rate that is a function, or
        ``policy_kwargs`` with classes, has to be given as an argument.

        :param safe: Whether to unpickle nothing
        :raises ValueError: if the file is damaged, ``env`` does not have the tasks that the model was made for, or ``safe``
            refuses something, which it names
        """
        shown_path = path
        if safe:
            path = read_bytes(path)
            env = None if env is None else cls._wrap_env(env)
            env_spaces = {} if env is None else dict(observation_space=env.observation_space, action_space=env.action_space)
            given = {**(custom_objects or {}), **kwargs}
            custom_objects = replace_pickles(shown_path, path, cls, given, env_spaces)
        try:
            check_archive(path)
            data, _, _ = load_from_zip_file(path, device="cpu", custom_objects=custom_objects)
        except DAMAGE as e:
            raise ValueError(
                f"path must name a whole model file, got {shown_path}, which is damaged, or holds more than tensors: {e}"
            ) from e
        if data is None or "num_tasks" not in data:
            raise ValueError(
                f"path must name a whole file of an {cls.__name__} model, got {shown_path}, which lacks some of its parts"
            )
        if env is not None:
            env = cls._wrap_env(env, data["verbose"])
            env_num_tasks = get_num_tasks(env)
            if env.has_attr("num_tasks") and env_num_tasks != data["num_tasks"]:
                raise ValueError(
                    f"env must have the model's num_tasks={data['num_tasks']}, got one with num_tasks={env_num_tasks}"
                )
        # The policy of older versions took an argument of the algorithm from there
        for name, value in (data.get("policy_kwargs") or {}).items():
            if name in data:
                kwargs.setdefault(name, value)
        if get_device(device).type != "cuda":  # a model that was trained on a GPU, too
            kwargs = {"replay_device": "cpu", "cuda_graph": False, **kwargs}
        if isinstance(path, io.BufferedIOBase):
            path.seek(0)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
