import math
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule

from sb3_mtrl.common.callbacks import SIMPLEX_DRAWS, LossMaskoutCallback, WResetCallback
from sb3_mtrl.common.prioritized import PERFORMANCE_SOURCES, TASK_PRIORITIES, TaskPrioritizedReplayBuffer
from sb3_mtrl.common.shared_unique import triplet_losses
from sb3_mtrl.common.torch_layers import W_INITS
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples
from sb3_mtrl.common.utils import check_choice, check_flag, check_integer, check_number, polyak_update_
from sb3_mtrl.mtsac.checks import check_policy
from sb3_mtrl.mtsac.mtsac import MTSAC, ReplaySamples
from sb3_mtrl.starssac.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    STARSActor,
    STARSCritic,
    STARSPolicy,
    UniqueBranch,
)

SelfSTARSSAC = TypeVar("SelfSTARSSAC", bound="STARSSAC")

# What the actor learns from where that is not what the critics do, among the extras of a batch
ACTOR_OBSERVATIONS = "actor_observations"


class STARSSAC(MTSAC):
    """
    Shared-Unique Features and Task-Aware Prioritized Sampling (STARS) with SAC, after the published description.

    Paper: https://arxiv.org/abs/2406.00761. Of the paper only abstracts, summaries and reviews were at hand, no full text and
    no code. They say: features are those of PaCo (K parameter sets that tasks share, mixed by one vector w_t per task), next
    to an embedding of the state that layers of its own make; both are concatenated and feed the policy. A triplet loss with
    Euclidean distances pulls embeddings of one task together and apart from those of other tasks. Each task has a replay
    buffer of its own, prioritized by TD error, and tasks that do worse get more of the batch. Less certain: the task priority
    is clipped. No published number is meant to be reproduced.

    What they leave open, and what is done here, after PaCo [P], prioritized experience replay by Schaul et al. [E], FaceNet
    [F] or by our own choice [R] (for the buffer's part see ``TaskPrioritizedReplayBuffer``):

    * Number of parameter sets and widths: 5 and 3 x 400, as on MT10 [P]; size of the embedding: 64 [R].
    * Where the concatenation happens, and whether the layers after it are compositional: after the second layer [R], and they
      are, since PaCo loses much with fewer compositional layers [P]. ``compositional_head=False`` is the other reading.
    * Actor, critics or both: both, with separate parameter sets and embeddings (the critics share one). W is one for all, with
      an optimiser of its own [P]; the target critics follow with a copy of W, like every other parameter of theirs [R].
    * Whether SAC's losses train the unique features, too: yes, see ``unique_from_rl`` [R].
    * Whether the unique branch sees the task's one-hot: yes, see ``unique_observes_task`` of the policy [R].
    * Margin, normalisation, weight and choice of triplets: 0.5, unit length [F], 1, random ones [R].
    * Performance of a task: success rate of its last 20 training episodes after the warm-up [R].
    * Its priority and bounds: ``clip(1 - success rate, 0.1, 1)``; shares of the batch by largest remainder [R].
    * Exponents and new priorities: 0.6, 0.4 to 1, the running maximum; importance weights in the critic loss only [E],
      within each task [R].
    * Loss maskout and w-reset: on [P], by the critic loss alone and at 10,000 [R].
    * Environments and evaluation: the presets of PaCo and of Meta-World, see ``hyperparams/starssac.yml`` [P].

    The parameters not listed are those of ``MTSAC``.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param replay_buffer_class: None: ``TaskPrioritizedReplayBuffer`` if T is above 1, else SB3's choice. With a
        ``MultiTaskReplayBuffer`` batches are drawn uniformly, in equal shares.
    :param replay_buffer_kwargs: Further arguments of the buffer
    :param optimizer_order: "sequential" as in SB3, or "joint" as in PaCo. W steps once an update in both, on the sum of the
        gradients of actor and critics; the actor's through Q does not reach it.
    :param n_param_sets: Number of parameter sets K; 1: ordinary networks beside the unique features, W is 1 and stays so
    :param w_init: Start of W, see ``PaCoSAC``
    :param w_learning_rate: Learning rate of W; None: ``learning_rate`` and its schedule
    :param unique_dim: Number E of unique features; 0: none (PaCo with task-aware sampling)
    :param unique_from_rl: Whether SAC's losses train the unique branch, beside the triplet loss
    :param compositional_head: Whether the layers after the concatenation are compositional
    :param triplet_coef: Weight of the triplet loss beside the losses of actor and critics; 0: it is not computed
    :param triplet_margin: Its margin
    :param triplet_normalize: Whether embeddings are brought to length 1 before distances are taken
    :param task_priority: How the share of a task in the batch follows its success rate: "linear", "softmax", "rank" or
        "uniform" (equal shares), see ``TaskPrioritizedReplayBuffer``
    :param rho_min: Priority that a solved task keeps, where that of an unsolved one is 1
    :param performance_source: Whose success rates count: those of the last "train" episodes, or of the "eval" callback
    :param performance_window: Number of last training episodes per task
    :param per_alpha: Exponent of transition priorities; 0: uniform draws within a task. Like the other settings of the buffer
        it needs T above 1, or the buffer as ``replay_buffer_class``
    :param per_beta: Exponent of the importance weights at the start; it becomes 1 at the end of training
    :param actor_batch: What actor and entropy coefficients learn from: the "same" rows as the critics, without importance
        weights, or as many other rows of each task, drawn uniformly ("uniform_in_task")
    :param maskout_threshold: Critic loss above which a task is masked out of an update (it scales with the square of the
        reward sum; early errors on Meta-World with 500 steps reach some thousands); None: never, and then no w-reset either
    :param w_reset: Whether the vector of a masked task is reset (not with ``n_param_sets=1``)
    :param w_reset_simplex: How the new vector is drawn, see ``PaCoSAC``
    :param on_nonfinite: As in ``MTSAC``; "mask", which belongs to loss maskout, by default
    :raises ValueError: for a bad argument, or an environment that does not fit it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: STARSPolicy
    actor: STARSActor
    critic: STARSCritic
    critic_target: STARSCritic

    def __init__(
        self,
        policy: str | type[STARSPolicy],
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
        optimizer_order: str = "sequential",
        warmup_actions: str = "uniform",
        ent_coef_learning_rate: float | None = None,
        min_ent_coef: float | None = math.exp(-10),
        max_ent_coef: float | None = 1.0,
        max_grad_norm: float | None = None,
        n_param_sets: int = 5,
        w_init: str = "normal",
        w_learning_rate: float | None = None,
        unique_dim: int = 64,
        unique_from_rl: bool = True,
        compositional_head: bool = True,
        triplet_coef: float = 1.0,
        triplet_margin: float = 0.5,
        triplet_normalize: bool = True,
        task_priority: str = "linear",
        rho_min: float = 0.1,
        performance_source: str = "train",
        performance_window: int = 20,
        per_alpha: float = 0.6,
        per_beta: float = 0.4,
        actor_batch: str = "same",
        maskout_threshold: float | None = 1e4,
        w_reset: bool = True,
        w_reset_simplex: str = "dirichlet",
        cpu_tuning: bool = True,
        amp: str = "none",
        overlap: bool = False,
        on_nonfinite: str = "mask",
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
        check_policy(policy, STARSPolicy, self.policy_aliases)
        n_param_sets = check_integer("n_param_sets", n_param_sets, 1)
        check_choice("w_init", w_init, W_INITS)
        w_learning_rate = check_number("w_learning_rate", w_learning_rate, 0, or_none=True)
        unique_dim = check_integer("unique_dim", unique_dim, 0)
        check_flag("unique_from_rl", unique_from_rl)
        check_flag("compositional_head", compositional_head)
        triplet_coef = check_number("triplet_coef", triplet_coef, 0)
        triplet_margin = check_number("triplet_margin", triplet_margin, above=0)
        check_flag("triplet_normalize", triplet_normalize)
        check_choice("task_priority", task_priority, TASK_PRIORITIES)
        check_choice("performance_source", performance_source, PERFORMANCE_SOURCES)
        check_choice("actor_batch", actor_batch, ("same", "uniform_in_task"))
        rho_min = check_number("rho_min", rho_min, 0, at_most=1)
        per_alpha = check_number("per_alpha", per_alpha, 0, at_most=1)
        per_beta = check_number("per_beta", per_beta, 0, at_most=1)
        performance_window = check_integer("performance_window", performance_window, 1)
        maskout_threshold = check_number("maskout_threshold", maskout_threshold, 0, or_none=True, finite=False)
        check_flag("w_reset", w_reset)
        check_choice("w_reset_simplex", w_reset_simplex, SIMPLEX_DRAWS)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
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
            num_tasks,
            optimizer_order=optimizer_order,
            warmup_actions=warmup_actions,
            ent_coef_learning_rate=ent_coef_learning_rate,
            min_ent_coef=min_ent_coef,
            max_ent_coef=max_ent_coef,
            max_grad_norm=max_grad_norm,
            cpu_tuning=cpu_tuning,
            amp=amp,
            overlap=overlap,
            on_nonfinite=on_nonfinite,
            replay_device=replay_device,
            cuda_graph=cuda_graph,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.n_param_sets = n_param_sets
        self.w_init = w_init
        self.w_learning_rate = w_learning_rate
        self.unique_dim = unique_dim
        self.unique_from_rl = unique_from_rl
        self.compositional_head = compositional_head
        self.triplet_coef = triplet_coef
        self.triplet_margin = triplet_margin
        self.triplet_normalize = triplet_normalize
        self.task_priority = task_priority
        self.rho_min = rho_min
        self.performance_source = performance_source
        self.performance_window = performance_window
        self.per_alpha = per_alpha
        self.per_beta = per_beta
        self.actor_batch = actor_batch
        self.maskout_threshold = maskout_threshold
        self.w_reset = w_reset
        self.w_reset_simplex = w_reset_simplex

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        guards: list[LossMaskoutCallback | WResetCallback] = []
        if self.maskout_threshold is not None:
            guards.append(LossMaskoutCallback(self.maskout_threshold, "critic"))
        if self.maskout_threshold is not None and self.w_reset and self.n_param_sets > 1:
            guards.append(WResetCallback(self.w_reset_simplex, reset_moments=True))
        if self.num_tasks > 1:
            self.replay_buffer_class = self.replay_buffer_class or TaskPrioritizedReplayBuffer
        if self.unique_dim > 0 and not self.unique_from_rl and not self._has_triplet_loss:
            raise ValueError(
                "unique_from_rl must be True without a triplet loss (one task, or triplet_coef=0), got False: nothing would "
                "train the unique branch"
            )
        super()._setup_model()
        for guard in guards:
            guard.init_callback(self)
        for branch in self._unique_branches().values():
            branch.keeps_embeddings = self._has_triplet_loss

    def _policy_settings(self) -> dict[str, Any]:
        settings = super()._policy_settings()
        del settings["n_heads"]
        settings.update(
            n_param_sets=self.n_param_sets,
            w_init=self.w_init,
            w_learning_rate=self.w_learning_rate,
            unique_dim=self.unique_dim,
            unique_from_rl=self.unique_from_rl,
            compositional_head=self.compositional_head,
        )
        return settings

    def _replay_buffer_settings(self) -> dict[str, Any]:
        settings = super()._replay_buffer_settings()
        assert self.replay_buffer_class is not None
        if issubclass(self.replay_buffer_class, TaskPrioritizedReplayBuffer):
            settings.update(
                task_priority=self.task_priority,
                rho_min=self.rho_min,
                performance_source=self.performance_source,
                performance_window=self.performance_window,
                alpha=self.per_alpha,
                beta=self.per_beta,
            )
        return settings

    @property
    def _has_triplet_loss(self) -> bool:
        # Batches of one task have no negatives
        return self.triplet_coef > 0 and self.unique_dim > 0 and self.num_tasks > 1

    # ------------------------------------------------------------------ update

    def _sample_batch(self, batch_size: int) -> ReplaySamples:
        replay_data = super()._sample_batch(batch_size)
        buffer = self._prioritized_buffer
        if self.actor_batch == "same" or buffer is None or not isinstance(replay_data, MultiTaskReplayBufferSamples):
            return replay_data
        assert replay_data.indices is not None
        # Of the indices, which are on the CPU
        group_tasks = replay_data.indices.reshape(len(replay_data.group_tasks), -1)[:, 0] % self.num_tasks
        uniform = buffer.sample_groups(group_tasks, batch_size // len(group_tasks), self._vec_normalize_env)
        return replay_data._replace(extras={**replay_data.extras, ACTOR_OBSERVATIONS: uniform.observations})

    def _actor_observations(self, obs: PyTorchObs, replay_data: ReplaySamples) -> PyTorchObs:
        extras = replay_data.extras if isinstance(replay_data, MultiTaskReplayBufferSamples) else {}
        if ACTOR_OBSERVATIONS not in extras:
            return obs
        assert isinstance(obs, th.Tensor)
        return extras[ACTOR_OBSERVATIONS].view_as(obs)

    def _auxiliary_losses(
        self,
        side: str,
        obs: PyTorchObs,
        next_obs: PyTorchObs,
        replay_data: ReplaySamples,
        dropped: th.Tensor | None,
    ) -> th.Tensor | None:
        if not self._has_triplet_loss:
            return None
        assert isinstance(replay_data, MultiTaskReplayBufferSamples)
        embeddings = self._unique_branches()[side].take_embeddings()
        losses, active = triplet_losses(
            embeddings, replay_data.group_tasks, self.num_tasks, self.triplet_margin, self.triplet_normalize, dropped
        )
        self._add_to_train_sums({f"{side}_triplet_loss": losses.detach().mean(), f"{side}_triplets_active": active})
        return self.triplet_coef * losses

    def _unique_branches(self) -> dict[str, UniqueBranch]:
        branches = {"actor": self.actor.unique_branch, "critic": self.critic.unique_branch}
        return {side: branch for side, branch in branches.items() if branch is not None}

    def _update_target_networks(self) -> None:
        super()._update_target_networks()
        policy = self.policy
        polyak_update_([policy.compositional_vectors], [policy.target_compositional_vectors], self.tau)

    # ----------------------------------------------------------------- logging

    def _sum_train_values(
        self, task_critic_losses: th.Tensor, task_actor_losses: th.Tensor, ent_coef_losses: th.Tensor | None
    ) -> None:
        super()._sum_train_values(task_critic_losses, task_actor_losses, ent_coef_losses)
        for side, branch in self._unique_branches().items():
            norms = {f"{side}_unique_grad_{loss}": norm for loss, norm in branch.gradient_norms.items()}
            self._add_to_train_sums(norms)

    # -------------------------------------------------------- export, save, load

    @property
    def w_reset_callback(self) -> WResetCallback | None:
        """The w-reset that watches the updates, None without."""
        return next((guard for guard in self.update_guards if isinstance(guard, WResetCallback)), None)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.w_reset_callback is not None:
            variables = [*variables, "w_reset_callback.resets", "w_reset_callback.generator_state"]
        return state_dicts, variables

    def learn(
        self: SelfSTARSSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "STARSSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSTARSSAC:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
