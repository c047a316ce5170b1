import io
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import get_parameters_by_name
from stable_baselines3.sac.policies import SACPolicy
from torch.nn import functional as F

from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import record_per_task
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples, TaskLosses
from sb3_mtrl.common.utils import check_choice, check_flag, check_number, check_number_or_auto, polyak_update_, step_unless
from sb3_mtrl.mtsac.checks import check_policy
from sb3_mtrl.mtsac.mtsac import MTSAC, ReplaySamples
from sb3_mtrl.mtsac.policies import MTSACActor, MTSACCritic
from sb3_mtrl.pacosac.policies import PaCoPolicy
from sb3_mtrl.tsacsac.policies import POLICIES, MlpPolicy, TSACPolicy, edit_actions

SelfTSACSAC = TypeVar("SelfTSACSAC", bound="TSACSAC")

# Column of the replay buffer
SPARSE_REWARD = "sparse_reward"
SPARSE_REWARDS = ("success", "first_success", "neg")
LAMBDA_MODES = ("per_task", "shared")
# Lambda does not fall below: nearer to 0 the slope of softplus, and with it the gradient, is below Adam's epsilon, and the
# lambda of a task that has long met its budget would no longer rise when it misses it
LAMBDA_FLOOR = 1e-4
ACTION_DISTANCES = ("hinge", "l2")
SP_VALUES = ("edited", "proposed")


class TSACSAC(MTSAC):
    """
    Task-Specific Action Correction (TSAC) with SAC, after the published description.

    Paper: https://arxiv.org/abs/2404.05950 (2024). Two policies in series: a shared policy (SP) proposes an action for the
    dense reward, an action-correction policy (ACP) sees the proposal and edits it for a sparse, goal-oriented reward,
    ``a = clip(a_hat + 2 da)``. The sparse return has a virtual budget per task, a lower bound that no environment imposes; a
    Lagrange multiplier lambda per task, raised while the budget is missed, makes one objective of the two.

    What the description says: the two policies and their order, dense reward for the SP, sparse reward for the ACP, a
    penalty on the distance between proposed and edited action, the virtual budget, the dynamic multiplier, and that the
    method is an addition to any multi-task method. **What it leaves open**, as the paper's equations and tables and its code
    are not to be had, is filled as follows. Where "SEditor" is named, the choice is that of SEditor's released code (Yu, Xu
    and Zhang, NeurIPS 2022), whose ingredients are the same one by one, with its cost turned into a reward:

    * the edit ``clip(a_hat + 2 da)``, the hinge on the dense value as the distance, the value of the *edited* action as the
      SP's, softplus and Adam (1e-2) for lambda, weights ``1 / (1 + lambda)`` and ``lambda / (1 + lambda)``: SEditor
    * the sparse reward, ``success_bonus`` times success at this step: our choice, so that both values have one scale
    * the budget, half of the steps in success (0.25 for episodes of 150 steps): our choice, from what scripted experts reach
    * one lambda per task, its cap, and its floor of 0.0001 (nearer to 0 it could not rise again): our choice; the abstract may
      mean one for all (``lambda_mode="shared"``)
    * the SP's entropy in the dense target and none in the sparse one: our choice, so that without edits the updates are those
      of MTSAC (SEditor has none in either, ``entropy_in_target=False``)
    * target entropy of the edits ``-n_actions (1 + ln 2)``: our choice, the usual one after the edit's factor 2
    * network sizes, batch, learning rates: those of Meta-World's multi-task SAC; reward normalisation: none

    The update is: lambda, temperatures, critics, SP, ACP, target critics. One draw of a_hat and da serves all losses. With
    ``base="paco"`` SP and dense critics are those of ``PaCoSAC`` (``policy_kwargs``: ``n_param_sets``, ``w_init``,
    ``structure``, ...) and W learns from both of their losses; ACP and sparse critics are ordinary. PaCo's loss maskout and
    w-reset are not installed: add ``LossMaskoutCallback(loss="critic")`` and ``WResetCallback()``, whose critic loss is that
    of dense and sparse critics together.

    Success is read from ``info["success"]`` at every step; where it is missing it counts as 0, with a warning. Observations
    are vectors, with one task as well: the sparse reward is a column of ``MultiTaskReplayBuffer``. The parameters not listed
    are those of ``MTSAC``.

    :param policy: The policy model to use (MlpPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str). It should not end episodes at success: the
        budget counts steps in success
    :param ent_coef: As in MTSAC, for both policies: each has its own entropy coefficient per task
    :param ent_coef_learning_rate: Learning rate of all entropy coefficients; None: ``learning_rate`` and its schedule
    :param base: The multi-task method that TSAC is added to: "mtsac" or "paco"
    :param sparse_reward: r_s over ``success_bonus``: "success": 1 at each step in success; "first_success": 1 at an episode's
        first one (what was before is not in the observation); "neg": -1 at each step that is not
    :param success_bonus: Scale delta of the sparse reward, 10 for dense rewards of up to 10 per step
    :param sparse_budget: Bound C on the mean of ``r_s / success_bonus`` per step, one or one per task; None: 0.5 for
        "success", -0.5 for "neg" (half of the steps). 0.25 suits episodes of 150 steps. "first_success" has no default.
    :param lambda_mode: "per_task": one multiplier per task; "shared": one for all
    :param lambda_init: Start of lambda; 0: it stays 0 and the ACP does not see the sparse value
    :param lambda_max: Cap of lambda (a budget that cannot be met would raise it for ever); None: no cap
    :param lambda_learning_rate: Learning rate of lambda's own optimiser, which no schedule touches; 0: lambda stays
    :param normalize_lagrange: Weigh distance and sparse value by ``1 / (1 + lambda)`` and ``lambda / (1 + lambda)``; else by
        1 and lambda
    :param action_distance: What an edit costs: "hinge": the dense value that it loses, if any; "l2": its mean square
    :param sp_value_on: The SP maximises the dense value of the "edited" or of the "proposed" action
    :param entropy_in_target: Whether the target of the dense critics holds the SP's entropy
    :param edit_target_entropy: Target entropy of the edits; "auto": ``-n_actions (1 + ln 2)``
    :raises ValueError: for a bad argument, or an environment that does not fit it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: TSACPolicy
    editor: MTSACActor
    sparse_critic: MTSACCritic
    sparse_critic_target: MTSACCritic

    def __init__(
        self,
        policy: str | type[TSACPolicy],
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
        warmup_actions: str = "uniform",
        ent_coef_learning_rate: float | None = None,
        min_ent_coef: float | None = None,
        max_ent_coef: float | None = None,
        max_grad_norm: float | None = None,
        base: str = "mtsac",
        sparse_reward: str = "success",
        success_bonus: float = 10.0,
        sparse_budget: float | Sequence[float] | None = None,
        lambda_mode: str = "per_task",
        lambda_init: float = 1.0,
        lambda_max: float | None = 10.0,
        lambda_learning_rate: float = 1e-2,
        normalize_lagrange: bool = True,
        action_distance: str = "hinge",
        sp_value_on: str = "edited",
        entropy_in_target: bool = True,
        edit_target_entropy: str | float = "auto",
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
        check_choice("base", base, tuple(POLICIES))
        check_choice("sparse_reward", sparse_reward, SPARSE_REWARDS)
        check_choice("lambda_mode", lambda_mode, LAMBDA_MODES)
        check_choice("action_distance", action_distance, ACTION_DISTANCES)
        check_choice("sp_value_on", sp_value_on, SP_VALUES)
        if isinstance(policy, str) and policy not in self.policy_aliases:
            raise ValueError(
                f"policy must be 'MlpPolicy' or a subclass of TSACPolicy, got {policy!r} (observations have to be vectors)"
            )
        check_policy(policy, TSACPolicy, self.policy_aliases)
        success_bonus = check_number("success_bonus", success_bonus, above=0)
        lambda_init = check_number("lambda_init", lambda_init, 0)
        lambda_max = check_number("lambda_max", lambda_max, 1e-6, or_none=True)
        if lambda_max is not None and lambda_max < lambda_init:
            raise ValueError(f"lambda_max must be at least lambda_init={lambda_init} or None, got {lambda_max}")
        lambda_learning_rate = check_number("lambda_learning_rate", lambda_learning_rate, 0)
        check_flag("normalize_lagrange", normalize_lagrange)
        check_flag("entropy_in_target", entropy_in_target)
        edit_target_entropy = check_number_or_auto("edit_target_entropy", edit_target_entropy)
        if base == "paco" and n_heads != "shared":
            raise ValueError(f"n_heads must be 'shared' with base='paco', got {n_heads!r}")
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
            n_heads,
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
        if isinstance(policy, str):
            self.policy_class = POLICIES[base]
        self.base = base
        self.sparse_reward = sparse_reward
        self.success_bonus = success_bonus
        self.sparse_budget = sparse_budget
        self.lambda_mode = lambda_mode
        self.lambda_init = lambda_init
        self.lambda_max = lambda_max
        self.lambda_learning_rate = lambda_learning_rate
        self.normalize_lagrange = normalize_lagrange
        self.action_distance = action_distance
        self.sp_value_on = sp_value_on
        self.entropy_in_target = entropy_in_target
        self.edit_target_entropy = edit_target_entropy
        self.log_edit_ent_coef: th.Tensor | None = None
        # Sums of r_s / delta and numbers of steps of each task since the last update, (2, T)
        self._fresh_rewards = np.zeros((2, self.num_tasks))
        # The same for success since the last dump of the logger
        self._logged_success = np.zeros((2, self.num_tasks))
        # Which sub-environments were successful in their running episode, (n_envs,)
        self._succeeded: np.ndarray | None = None
        self._warned_of_missing_success = False

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        if issubclass(self.policy_class, PaCoPolicy) != (self.base == "paco"):
            raise ValueError(
                f"policy must be a subclass of {POLICIES[self.base].__name__} with base={self.base!r}, "
                f"got {self.policy_class.__name__}"
            )
        budgets = self._resolve_budgets()
        self._check_replay_settings("sparse rewards", "does not store them")
        if "extra_columns" in self.replay_buffer_kwargs:
            raise ValueError("replay_buffer_kwargs must not set extra_columns: TSACSAC needs its own")
        self.replay_buffer_class = self.replay_buffer_class or MultiTaskReplayBuffer
        n_multipliers = self.num_tasks if self.lambda_mode == "per_task" else 1
        raw_lambda = th.full((n_multipliers,), inverse_softplus(self.lambda_init), device=self.device)
        self.raw_lambda = raw_lambda.requires_grad_(True)
        # Fused, a step can be skipped on the GPU without waiting for it
        fused = True if self.device.type == "cuda" else None
        self.lambda_optimizer = th.optim.Adam([self.raw_lambda], lr=self.lambda_learning_rate, fused=fused)
        super()._setup_model()  # checks all optimisers
        self.sparse_batch_norm_stats = get_parameters_by_name(self.sparse_critic, ["running_"])
        self.sparse_batch_norm_stats_target = get_parameters_by_name(self.sparse_critic_target, ["running_"])
        if self.edit_target_entropy == "auto":
            # H(2 da) = H(da) + n_actions ln 2: the executed correction gets SAC's usual target entropy
            self.edit_target_entropy = -get_action_dim(self.action_space) * (1 + math.log(2))
        self.edit_target_entropy = float(self.edit_target_entropy)
        if self.log_ent_coef is not None and self.ent_coef_optimizer is not None:
            self.log_edit_ent_coef = self.log_ent_coef.detach().clone().requires_grad_(True)
            self.ent_coef_optimizer.add_param_group({"params": [self.log_edit_ent_coef]})
        self._budgets = th.as_tensor(budgets, dtype=th.float32, device=self.device)  # (T,)
        self._rollout_rewards = th.zeros(2, self.num_tasks, device=self.device)

    def _resolve_budgets(self) -> np.ndarray:
        lowest, highest = (-1, 0) if self.sparse_reward == "neg" else (0, 1)
        budget = self.sparse_budget
        if budget is None:
            if self.sparse_reward == "first_success":
                raise ValueError(
                    "sparse_budget must be given with sparse_reward='first_success', got None "
                    "(p / horizon asks for success in a share p of the episodes)"
                )
            budget = 0.5 + lowest
        try:
            budgets = np.asarray(budget, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"sparse_budget must be a number or one for each task, got {self.sparse_budget!r}") from error
        if budgets.shape not in ((), (self.num_tasks,)):
            raise ValueError(
                f"sparse_budget must be a number or one for each of num_tasks={self.num_tasks} tasks, got {self.sparse_budget}"
            )
        if not np.all((lowest <= budgets) & (budgets <= highest)):
            raise ValueError(
                f"sparse_budget must be in [{lowest}, {highest}] with sparse_reward={self.sparse_reward!r}, "
                f"got {self.sparse_budget}"
            )
        return np.broadcast_to(budgets, (self.num_tasks,)).copy()

    def _create_aliases(self) -> None:
        super()._create_aliases()
        self.editor = self.policy.editor
        self.sparse_critic = self.policy.sparse_critic
        self.sparse_critic_target = self.policy.sparse_critic_target

    def _policy_settings(self) -> dict[str, Any]:
        settings = super()._policy_settings()
        if self.base == "paco":
            del settings["n_heads"]
        return settings

    def _replay_buffer_settings(self) -> dict[str, Any]:
        return {**super()._replay_buffer_settings(), "extra_columns": {SPARSE_REWARD: 1}}

    # ---------------------------------------------------------------- rollouts

    def _start_episodes(self) -> None:
        super()._start_episodes()
        self._succeeded = None

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        success = self._read_success(infos)
        rewards = self._sparse_rewards(success, dones)
        self._count_rewards(success, rewards, infos)
        # The buffer reads its extra columns from the infos; those of the environment stay as they are
        infos = [{**info, SPARSE_REWARD: self.success_bonus * r} for info, r in zip(infos, rewards, strict=True)]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _read_success(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Whether the step just made ended in success, ``(n_envs,)`` bool."""
        tells_success = all("success" in info or info.get("worker_restarted") for info in infos)
        if not self._warned_of_missing_success and not tells_success:
            self._warned_of_missing_success = True
            warnings.warn(
                "the environment's infos hold no 'success': it counts as 0, so the sparse reward of TSACSAC says nothing",
                stacklevel=2,
            )
        return np.array([float(info.get("success", 0.0)) > 0.5 for info in infos])

    def _sparse_rewards(self, success: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """``r_s / delta`` of the step just made, ``(n_envs,)``."""
        if self.sparse_reward == "neg":
            return success - 1.0
        if self.sparse_reward == "success":
            return success.astype(np.float64)
        if self._succeeded is None:
            self._succeeded = np.zeros_like(success)
        first = success & ~self._succeeded
        self._succeeded = (self._succeeded | success) & ~dones.astype(bool)
        return first.astype(np.float64)

    def _count_rewards(self, success: np.ndarray, rewards: np.ndarray, infos: list[dict[str, Any]]) -> None:
        task_ids = self._tasks_of_envs(self._last_obs, infos)
        # Not those that never happened, and those of which no one knows the task
        kept = (task_ids >= 0) & np.array([not info.get("worker_restarted", False) for info in infos])
        task_ids, success = task_ids[kept], success[kept]
        n_steps = np.bincount(task_ids, minlength=self.num_tasks)
        self._logged_success += [np.bincount(task_ids, weights=success, minlength=self.num_tasks), n_steps]
        # Random actions of the warm-up say nothing of the policies
        if self.num_timesteps - len(rewards) >= self.learning_starts:  # this step is counted already
            self._fresh_rewards += [np.bincount(task_ids, weights=rewards[kept], minlength=self.num_tasks), n_steps]

    # ------------------------------------------------------------------ update

    @property
    def multipliers(self) -> th.Tensor:
        """lambda of each task, ``(T,)``, constant."""
        return F.softplus(self.raw_lambda.detach()).expand(self.num_tasks)

    def _sequential_update(self, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        One update: lambda, temperatures, critics, shared policy (phi), action-correction policy (psi).

        :param replay_data: The batch
        :param spoilt: (T,) bool, tasks to drop in any case; None: there is none
        :return: (T,) bool, tasks whose samples were dropped; None: there is none, and no guard wants to be told
        """
        obs, next_obs = self._observations(replay_data)
        assert isinstance(obs, th.Tensor) and isinstance(next_obs, th.Tensor)
        for optimizer in self._shared_optimizers():
            optimizer.zero_grad()

        # a_hat ~ pi_phi(. | o)
        proposals, log_prob = self.actor.action_log_prob(obs)
        log_prob = log_prob.reshape(-1, 1)
        ent_coef = self._ent_coef_per_row(replay_data)
        edit_ent_coef = self._edit_ent_coef_per_row(replay_data)
        td_errors, sparse_td_errors = self._both_td_errors(replay_data, obs, next_obs, ent_coef)  # (n_critics, B, 1) each
        task_critic_losses = self._task_means(self._critic_losses(td_errors), replay_data)
        task_sparse_critic_losses = self._task_means(self._critic_losses(sparse_td_errors), replay_data)
        dropped = self._dropped_tasks(TaskLosses(task_critic_losses + task_sparse_critic_losses, None, None), spoilt)

        # The graph is cut at a_hat and at a, so that one pass of each network serves both policies: what reaches a_hat, also
        # through da, is phi's, and what reaches psi is as for a constant proposal
        proposal = self._keep(proposals.detach(), dropped, replay_data).requires_grad_()
        # da ~ pi_psi(. | o, a_hat)
        edits, edit_log_prob = self.policy.sample_edits(obs, proposal)
        edit_log_prob = edit_log_prob.reshape(-1, 1)
        actions = edit_actions(proposal, edits)
        action = actions.detach().requires_grad_()

        self._update_lambda(dropped)
        # The coefficients were read above, so this step does not change the losses below
        ent_coef_losses = self._ent_coef_losses(log_prob, replay_data, dropped)
        if ent_coef_losses is not None and self.ent_coef_optimizer is not None:
            edit_ent_coef_losses = self._edit_ent_coef_losses(edit_log_prob, replay_data, dropped)
            self._optimize(self.ent_coef_optimizer, (ent_coef_losses + edit_ent_coef_losses).mean(), dropped)

        self._optimize(self.critic.optimizer, self._critic_loss(td_errors, dropped, replay_data), dropped)
        self._optimize(self.sparse_critic.optimizer, self._critic_loss(sparse_td_errors, dropped, replay_data), dropped)

        # Min over all critic networks, which are held constant here, and d Q / d a
        values = self.critic.q_values(obs, action, frozen=True).min(dim=0).values
        sparse_values = self.sparse_critic.q_values(obs, action, frozen=True).min(dim=0).values
        (value_grad,) = th.autograd.grad(values.sum(), action)  # (B, n_actions)
        (sparse_value_grad,) = th.autograd.grad(sparse_values.sum(), action)
        proposed_values = self._proposed_values(obs, proposal)

        # L_phi = alpha log pi_phi(a_hat | o) - Q_d(o, a), with g = d Q_d / d a_hat
        if self.sp_value_on == "edited" or proposed_values is None:
            sp_values = values
            (g,) = th.autograd.grad(actions, proposal, value_grad, retain_graph=True)
        else:
            sp_values = proposed_values
            (g,) = th.autograd.grad(proposed_values.sum(), proposal)
        entropy_term = ent_coef * log_prob
        policy_improvement = (self._keep(g, dropped, replay_data) * proposals).sum(dim=1, keepdim=True)
        actor_losses = self._keep(entropy_term - policy_improvement, dropped, replay_data)
        self._optimize(self.actor.optimizer, actor_losses.mean(), dropped)

        # L_psi = alpha log pi_psi(da | o, a_hat) + w_d distance - w_s Q_s(o, a)
        distances, distance_grad = self._distances(action.detach(), proposal.detach(), values, proposed_values, value_grad)
        dense_weight, sparse_weight = self._reward_weights(replay_data)
        edit_grad = self._keep(dense_weight * distance_grad - sparse_weight * sparse_value_grad, dropped, replay_data)
        edit_entropy_term = edit_ent_coef * edit_log_prob
        edit_losses = self._keep(edit_entropy_term + (edit_grad * actions).sum(dim=1, keepdim=True), dropped, replay_data)
        self._optimize(self.editor.optimizer, edit_losses.mean(), dropped)

        for optimizer in self._shared_optimizers():
            self._step(optimizer, dropped)
        self._update_priorities(th.cat([td_errors, sparse_td_errors]), dropped, replay_data)
        task_actor_losses = self._task_means(entropy_term - sp_values, replay_data)
        self._sum_train_values(task_critic_losses, task_actor_losses, ent_coef_losses)
        edit_losses = edit_entropy_term + dense_weight * distances - sparse_weight * sparse_values
        self._sum_edit_values(replay_data, proposal, action, distances, edit_losses, task_sparse_critic_losses)
        return dropped

    def _both_td_errors(
        self, replay_data: ReplaySamples, obs: th.Tensor, next_obs: th.Tensor, ent_coef: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """Errors of the dense and of the sparse critics against their targets, ``(n_critics, B, 1)`` each."""
        assert isinstance(replay_data, MultiTaskReplayBufferSamples)
        discounts = (1 - replay_data.dones) * self.gamma
        with th.no_grad():
            next_proposals, next_log_prob = self.actor.action_log_prob(next_obs)
            next_actions = edit_actions(next_proposals, self.policy.sample_edits(next_obs, next_proposals)[0])
            next_values = self.critic_target.q_values(next_obs, next_actions).min(dim=0).values
            if self.entropy_in_target:
                next_values = next_values - ent_coef * next_log_prob.reshape(-1, 1)
            next_sparse_values = self.sparse_critic_target.q_values(next_obs, next_actions).min(dim=0).values
            targets = replay_data.rewards + discounts * next_values
            sparse_targets = replay_data.extras[SPARSE_REWARD] + discounts * next_sparse_values
        actions = replay_data.actions
        return self.critic.q_values(obs, actions) - targets, self.sparse_critic.q_values(obs, actions) - sparse_targets

    def _update_lambda(self, dropped: th.Tensor | None) -> None:
        """
        One step on ``L(lambda) = sum_t lambda_t (mean of r_s / delta in the fresh rollouts - C_t)``, then the bounds.

        The lambda of a task without fresh steps, or that was dropped, stays; without any no step is made, so that of several
        updates after one rollout only the first one counts.
        """
        if self._static_update is None:  # else it is done already, as an update must not touch the host then
            self._upload_host_values()
        sums, counts = self._rollout_rewards
        is_fresh = counts > 0
        if dropped is not None:
            is_fresh = is_fresh & ~dropped
        gaps = th.where(is_fresh, sums / counts.clamp(min=1) - self._budgets, 0.0)  # (T,)
        before = self.raw_lambda.detach().clone()
        self.lambda_optimizer.zero_grad()
        (F.softplus(self.raw_lambda) * gaps).sum().backward()
        step_unless(self.lambda_optimizer, ~is_fresh.any())
        with th.no_grad():
            if self.lambda_mode == "per_task":  # Adam's momentum moves those without a gradient, too
                self.raw_lambda.copy_(th.where(is_fresh, self.raw_lambda, before))
            cap = None if self.lambda_max is None else inverse_softplus(self.lambda_max)
            self.raw_lambda.clamp_(min=inverse_softplus(min(self.lambda_init, LAMBDA_FLOOR)), max=cap)

    def _upload_host_values(self) -> None:
        self._rollout_rewards.copy_(th.from_numpy(self._fresh_rewards.astype(np.float32)), non_blocking=True)
        self._fresh_rewards[:] = 0

    def _reward_weights(self, replay_data: ReplaySamples) -> tuple[th.Tensor, th.Tensor]:
        """Weights of distance and sparse value in each row, ``(B, 1)``, constant."""
        multipliers = self._rows(self.multipliers, replay_data)
        if not self.normalize_lagrange:
            return th.ones_like(multipliers), multipliers
        return 1 / (1 + multipliers), multipliers / (1 + multipliers)

    def _proposed_values(self, obs: th.Tensor, proposal: th.Tensor) -> th.Tensor | None:
        """Dense value of the proposals, ``(B, 1)``; with a gradient to them if the SP maximises it. None: nobody asks."""
        if self.action_distance != "hinge" and self.sp_value_on == "edited":
            return None
        with th.set_grad_enabled(self.sp_value_on == "proposed"):
            return self.critic.q_values(obs, proposal, frozen=True).min(dim=0).values

    def _distances(
        self,
        action: th.Tensor,
        proposal: th.Tensor,
        values: th.Tensor,
        proposed_values: th.Tensor | None,
        value_grad: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        """What the edit of each row costs, ``(B, 1)``, and its derivative by the action, ``(B, n_actions)``."""
        if self.action_distance == "l2":
            difference = action - proposal
            return difference.square().mean(dim=1, keepdim=True), 2 / difference.shape[1] * difference
        # An edit that raises the dense value costs nothing
        assert proposed_values is not None
        losses = F.relu(proposed_values - values).detach()
        return losses, th.where(losses > 0, -value_grad, 0.0)

    def _log_ent_coefs(self) -> list[th.Tensor]:
        return [*super()._log_ent_coefs(), *([] if self.log_edit_ent_coef is None else [self.log_edit_ent_coef])]

    def _edit_ent_coef_per_row(self, replay_data: ReplaySamples) -> th.Tensor:
        """Entropy coefficient of the edits in each row, ``(B, 1)`` or broadcastable to it, constant."""
        if self.log_edit_ent_coef is None:
            return self.ent_coef_tensor
        return self._rows(self._bounded_below(self.log_edit_ent_coef).detach().exp(), replay_data)

    def _edit_ent_coef_losses(
        self, edit_log_prob: th.Tensor, replay_data: ReplaySamples, dropped: th.Tensor | None
    ) -> th.Tensor:
        """Loss of each row on its task's entropy coefficient of the edits, ``(B, 1)``."""
        assert self.log_edit_ent_coef is not None and isinstance(self.edit_target_entropy, float)
        entropy_gap = self._keep((edit_log_prob + self.edit_target_entropy).detach(), dropped, replay_data)
        return -self._rows(self._bounded_below(self.log_edit_ent_coef), replay_data) * entropy_gap

    def _scheduled_optimizers(self) -> list[th.optim.Optimizer]:
        # Not that of lambda, which has its own rate
        return [*super()._scheduled_optimizers(), self.editor.optimizer, self.sparse_critic.optimizer]

    def _own_learning_rates(self) -> list[tuple[th.optim.Optimizer, float]]:
        return [*super()._own_learning_rates(), (self.lambda_optimizer, self.lambda_learning_rate)]

    def _update_target_networks(self) -> None:
        super()._update_target_networks()
        polyak_update_(self.sparse_critic.parameters(), self.sparse_critic_target.parameters(), self.tau)
        # Copy running stats, see GH issue #996
        polyak_update_(self.sparse_batch_norm_stats, self.sparse_batch_norm_stats_target, 1.0)

    # ----------------------------------------------------------------- logging

    def _sum_edit_values(
        self,
        replay_data: ReplaySamples,
        proposal: th.Tensor,
        actions: th.Tensor,
        distances: th.Tensor,
        edit_losses: th.Tensor,
        task_sparse_critic_losses: th.Tensor,
    ) -> None:
        edit_sizes = (actions - proposal).abs().mean(dim=1, keepdim=True)
        clipped = (actions.abs() >= 1).float().mean(dim=1, keepdim=True)
        row_values = th.cat([edit_sizes, clipped, distances, edit_losses], dim=1)  # (B, 4)
        means = self._task_means(row_values, replay_data).view(self.num_tasks, -1).unbind(dim=1)
        values = dict(zip(("edit_size", "clipped_fraction", "edit_distance", "edit_loss"), means, strict=True))
        values["sparse_critic_loss"] = task_sparse_critic_losses
        values["lambda"] = self.multipliers
        if self.log_edit_ent_coef is not None:
            values["edit_ent_coef"] = self._bounded_below(self.log_edit_ent_coef).detach().exp()
        self._add_to_train_sums(values)

    def dump_logs(self) -> None:
        """
        Write log data; beside that of ``MTSAC`` the share of steps in success, lambda, the edits (mean ``|a - a_hat|``, share
        of clipped action entries, distance, loss, entropy coefficient) and the loss of the sparse critics, of each task.
        """
        sums, counts = self._logged_success
        if counts.any():
            self.logger.record("rollout/success_fraction", float(sums.sum() / counts.sum()))
            if self.num_tasks > 1:
                fractions = {
                    name: float(total / count)
                    for name, total, count in zip(self.task_names, sums, counts, strict=True)
                    if count > 0
                }
                record_per_task(self.logger, "rollout/success_fraction", fractions, console=False)
        self._logged_success[:] = 0
        super().dump_logs()

    # -------------------------------------------------------- export, save, load

    def _check_loaded_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, own_buffer: ReplayBuffer | None) -> None:
        super()._check_loaded_buffer(path, own_buffer)
        columns = getattr(self.replay_buffer, "extra_columns", {})
        if columns != {SPARSE_REWARD: 1}:
            raise ValueError(f"path must name a replay buffer with the column {SPARSE_REWARD!r}, got {path} with {columns}")

    def export_task_policy(self, task: int | str) -> SACPolicy:
        """
        Not possible: the action is made by two networks in series and an edit, which no plain ``SACPolicy`` does.

        :param task: Task id or name
        :raises ValueError: always
        """
        raise ValueError(
            "a policy of TSACSAC cannot be exported as a plain SACPolicy: a second network edits the action of the first"
        )

    @classmethod
    def plain_classes(cls) -> dict[str, dict[str, type]]:
        """
        :return: Classes that a model file may name in plain text, by attribute and name
        """
        return {**super().plain_classes(), "policy_class": dict(POLICIES)}

    def _running_state(self) -> list[str]:
        return [*super()._running_state(), "_fresh_rewards", "_logged_success", "_succeeded", "_warned_of_missing_success"]

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "editor",
            "sparse_critic",
            "sparse_critic_target",
            "sparse_batch_norm_stats",
            "sparse_batch_norm_stats_target",
            "_budgets",
            "_rollout_rewards",
            "_warned_of_missing_success",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        state_dicts = [*state_dicts, "editor.optimizer", "sparse_critic.optimizer", "lambda_optimizer"]
        variables = [*variables, "raw_lambda"]
        if self.log_edit_ent_coef is not None:
            variables.append("log_edit_ent_coef")
        return state_dicts, variables

    def learn(
        self: SelfTSACSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "TSACSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTSACSAC:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )


def inverse_softplus(value: float) -> float:
    """
    :param value: At least 0
    :return: x with ``ln(1 + e^x) = value``; minus infinity for 0
    """
    if value == 0:
        return -math.inf
    return value + math.log(-math.expm1(-value))
