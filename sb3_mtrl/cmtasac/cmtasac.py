import io
import pathlib
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from stable_baselines3.sac.policies import SACPolicy

from sb3_mtrl.cmtasac.policies import (
    GATE_SHARING,
    CMTAActor,
    CMTACritic,
    CMTAPolicy,
    CnnPolicy,
    Encoding,
    MlpPolicy,
    MultiInputPolicy,
    RecurrentState,
)
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import record_per_task
from sb3_mtrl.common.torch_layers import info_nce_losses
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples, TaskLosses
from sb3_mtrl.common.utils import check_choice, check_flag, check_integer, check_number, polyak_update_
from sb3_mtrl.mtsac.checks import check_policy
from sb3_mtrl.mtsac.mtsac import MTSAC, ReplaySamples
from sb3_mtrl.mtsac.policies import sample_squashed_gaussian

SelfCMTASAC = TypeVar("SelfCMTASAC", bound="CMTASAC")

# Columns of the replay buffer: [h; c] before and after the step
STATE, NEXT_STATE = "recurrent_state", "next_recurrent_state"


class CMTASAC(MTSAC):
    """
    Contrastive Modules with Temporal Attention (CMTA) with SAC.

    Paper: https://arxiv.org/abs/2311.01075 (NeurIPS 2023). k experts look at the observation without the task, an attention
    that sees the task and remembers the episode (an LSTM) weighs them, and actor and critics work on the mixture m and the
    task representation z. A contrastive loss (InfoNCE) keeps the experts apart. The critic loss trains experts and attention,
    the temporal difference error alone trains the task encoder, and the actor trains only its own head.

    The constants are those of the authors' code, which differs from SB3's SAC in more than the networks: no factor 1/2 in the
    critic loss, a log standard deviation squashed by tanh (new policies are almost deterministic), an entropy coefficient loss
    on alpha itself, a target encoder that follows ten times as fast as the target critics, and an update in the order critic,
    actor (drawn anew), entropy coefficient. Unlike there, batches hold all tasks in equal share, and the last transition of
    an episode keeps its true last observation.

    The LSTM learns from single steps: the state before each transition, as it was when the step was made, is stored with it.
    The parameters not listed are those of ``MTSAC``.

    :param policy: The policy model to use (MlpPolicy; CnnPolicy and MultiInputPolicy with one task and
        ``use_temporal=False``)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param buffer_size: Number of transitions over all tasks; the recurrent states take 4 ``lstm_hidden_dim`` floats each
        (1 kB), or half of it with ``recompute_states``
    :param optimizer_order: "sequential": critic, actor at the new critic, entropy coefficient, task encoder, each step before
        the next loss; "joint": all gradients at the same parameters, then all steps
    :param n_experts: Number k of experts
    :param use_temporal: Whether the attention remembers; else it sees the task alone, and no states are stored
    :param gate_sharing: The actor's attention. "full": it is the critics', which the critic loss trains; "released": its own,
        never trained, as in the authors' code; "actor": its own, trained by the actor loss
    :param contrastive_coef: Weight of InfoNCE in the critic loss; 0: it is not computed
    :param contrastive_temperature: Temperature of its cosines; the coefficient has to follow a change of it
    :param encoder_tau: Soft update coefficient of the target critics' encoder (``tau`` is that of the rest)
    :param ent_coef_loss: What the entropy coefficient loss multiplies: "alpha" or, as SB3 does, "log_alpha"
    :param recompute_states: Compute the state after a transition from the one before, with the current LSTM, instead of
        storing both
    :raises ValueError: for a bad argument, or an environment that does not fit it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: CMTAPolicy
    actor: CMTAActor
    critic: CMTACritic
    critic_target: CMTACritic

    def __init__(
        self,
        policy: str | type[CMTAPolicy],
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
        min_ent_coef: float | None = None,
        max_ent_coef: float | None = None,
        max_grad_norm: float | None = None,
        n_experts: int = 6,
        use_temporal: bool = True,
        gate_sharing: str = "full",
        contrastive_coef: float = 2500.0,
        contrastive_temperature: float = 0.1,
        encoder_tau: float = 0.05,
        ent_coef_loss: str = "alpha",
        recompute_states: bool = False,
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
        check_policy(policy, CMTAPolicy, self.policy_aliases)
        n_experts = check_integer("n_experts", n_experts, 1)
        check_flag("use_temporal", use_temporal)
        check_choice("gate_sharing", gate_sharing, GATE_SHARING)
        check_choice("ent_coef_loss", ent_coef_loss, ("alpha", "log_alpha"))
        contrastive_coef = check_number("contrastive_coef", contrastive_coef, 0)
        contrastive_temperature = check_number("contrastive_temperature", contrastive_temperature, above=0)
        encoder_tau = check_number("encoder_tau", encoder_tau, above=0, at_most=1)
        check_flag("recompute_states", recompute_states)
        if recompute_states and not use_temporal:
            raise ValueError("recompute_states must be False with use_temporal=False, got True (there are no states)")
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
        self.n_experts = n_experts
        self.use_temporal = use_temporal
        self.gate_sharing = gate_sharing
        self.contrastive_coef = contrastive_coef
        self.contrastive_temperature = contrastive_temperature
        self.encoder_tau = encoder_tau
        self.ent_coef_loss = ent_coef_loss
        self.recompute_states = recompute_states
        # State of the actor's LSTM in the training environment: before the step to come, and after the one being made
        self._last_state: RecurrentState | None = None
        self._next_state: RecurrentState | None = None

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        if self.use_temporal:
            self._check_temporal_setup()
            self.replay_buffer_class = self.replay_buffer_class or MultiTaskReplayBuffer
        super()._setup_model()
        state_dim = self.policy.layout.state_dim
        if state_dim != (self._state_columns()[STATE] if self.use_temporal else 0):
            raise ValueError(
                f"policy must follow use_temporal={self.use_temporal} and the lstm_hidden_dim of policy_kwargs, "
                f"got one whose recurrent state has {state_dim} entries"
            )

    def _check_temporal_setup(self) -> None:
        self._check_replay_settings("use_temporal=True", "does not store recurrent states")
        if "extra_columns" in self.replay_buffer_kwargs:
            raise ValueError("replay_buffer_kwargs must not set extra_columns with use_temporal=True, which needs its own")
        check_integer("lstm_hidden_dim", self._lstm_hidden_dim, 1)

    def _policy_settings(self) -> dict[str, Any]:
        settings = super()._policy_settings()
        del settings["n_heads"]
        settings.update(n_experts=self.n_experts, use_temporal=self.use_temporal, gate_sharing=self.gate_sharing)
        return settings

    def _replay_buffer_settings(self) -> dict[str, Any]:
        settings = super()._replay_buffer_settings()
        if self.use_temporal:
            settings["extra_columns"] = self._state_columns()
        return settings

    def _state_columns(self) -> dict[str, int]:
        names = (STATE,) if self.recompute_states else (STATE, NEXT_STATE)
        return {name: 2 * self._lstm_hidden_dim for name in names}

    @property
    def _lstm_hidden_dim(self) -> int:
        return self.policy_kwargs.get("lstm_hidden_dim", 64)

    @property
    def _is_contrastive(self) -> bool:
        # One expert has no others to be told from
        return self.contrastive_coef > 0 and self.n_experts > 1

    # ---------------------------------------------------------------- rollouts

    def _start_episodes(self) -> None:
        super()._start_episodes()
        self._last_state = None

    def _sample_action(
        self,
        learning_starts: int,
        action_noise: ActionNoise | None = None,
        n_envs: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.use_temporal:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        if self._last_state is None:
            self._last_state = self.policy.initial_state(n_envs)
        assert isinstance(self._last_obs, np.ndarray)
        with self._finite_last_obs():
            if self.warmup_actions == "uniform" and self.num_timesteps < learning_starts:
                # The state goes on: the episode, and its memory, may outlast the warm-up
                unscaled_action = np.array([self.action_space.sample() for _ in range(n_envs)])
                self._next_state = self.policy.next_state(self._last_obs, self._last_state)
            else:
                unscaled_action, self._next_state = self.policy.predict(self._last_obs, self._last_state, deterministic=False)
        scaled_action = self.policy.scale_action(unscaled_action)
        if action_noise is not None:
            scaled_action = np.clip(scaled_action + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_action), scaled_action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if not self.use_temporal:
            return super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert self._last_state is not None and self._next_state is not None
        states = {STATE: self._last_state, NEXT_STATE: self._next_state}
        assert isinstance(replay_buffer, MultiTaskReplayBuffer)
        extras = {name: np.concatenate(states[name], axis=2)[0] for name in replay_buffer.extra_columns}
        # SB3 calls `add` with its own arguments; the states come along
        with_states = SimpleNamespace(add=partial(replay_buffer.add, extras=extras))
        super()._store_transition(with_states, buffer_action, new_obs, reward, dones, infos)  # type: ignore[arg-type]
        # Only now: the state after the last step of an episode belongs to its true last observation
        starts = dones.reshape(1, -1, 1)
        self._last_state = tuple(np.where(starts, np.float32(0), part) for part in self._next_state)

    # ------------------------------------------------------------------ update

    def _sequential_update(self, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        """
        One update in the order of CMTA's authors: critics and encoder, actor, entropy coefficients, task encoder.

        :param replay_data: The batch
        :param spoilt: (T,) bool, tasks to drop in any case; None: there is none
        :return: (T,) bool, tasks whose samples were dropped; None: there is none, and no guard wants to be told
        """
        obs, next_obs = self._observations(replay_data)
        for optimizer in self._shared_optimizers():
            optimizer.zero_grad()
        z = self.policy.task_representations(self.policy.layout.split(obs)[2], len(replay_data.rewards))  # (B, Z)
        ent_coef = self._ent_coef_per_row(replay_data)
        # For n-step replay, discount factor is gamma**n_steps (when no early termination)
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma

        with th.no_grad():
            next_mean, next_log_std = self.actor.latent_dist_params(self.actor.encode(next_obs, z).latent)
            next_actions, next_log_prob = sample_squashed_gaussian(next_mean, next_log_std)
            next_encoding = self.critic_target.encode(next_obs, z, keep_experts=self._is_contrastive)
            next_q_values = self.critic_target.latent_q_values(next_encoding.latent, next_actions).min(dim=0).values
            next_q_values = next_q_values - ent_coef * next_log_prob.reshape(-1, 1)
            target_q_values = replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values

        encoding = self.critic.encode(obs, z, keep_experts=self._is_contrastive)
        td_errors = self.critic.latent_q_values(encoding.latent, replay_data.actions) - target_q_values
        task_losses = TaskLosses(self._task_means(self._critic_losses(td_errors), replay_data), None, None)
        dropped = self._dropped_tasks(task_losses, spoilt)
        critic_loss = self._critic_loss(td_errors, dropped, replay_data)
        contrastive_losses, similarities = self._contrastive_losses(encoding.expert_outputs, next_encoding.expert_outputs)
        if contrastive_losses is not None:
            contrastive_loss = self._keep(contrastive_losses, dropped, replay_data).mean()
            critic_loss = critic_loss + self.contrastive_coef * contrastive_loss
        self._optimize(self.critic.optimizer, critic_loss, dropped)

        # Action by the current actor, on what the new critics and their experts make of the sampled state
        actor_encoding = self.actor.encode(obs, z)
        mean_actions, log_std = self.actor.latent_dist_params(actor_encoding.latent)
        actions_pi, log_prob = sample_squashed_gaussian(mean_actions, log_std)
        log_prob = log_prob.reshape(-1, 1)
        with th.no_grad():
            is_shared = self.gate_sharing == "full"
            critic_latent = actor_encoding.latent if is_shared else self.critic.encode(obs, z).latent
        min_qf_pi = self.critic.latent_q_values(critic_latent, actions_pi, frozen=True).min(dim=0).values
        actor_losses = ent_coef * log_prob - min_qf_pi
        self._optimize(self.actor.optimizer, self._keep(actor_losses, dropped, replay_data).mean(), dropped)

        ent_coef_losses = self._ent_coef_losses(log_prob, replay_data, dropped)
        if ent_coef_losses is not None and self.ent_coef_optimizer is not None:
            self._optimize(self.ent_coef_optimizer, ent_coef_losses.mean(), dropped)
        for optimizer in self._shared_optimizers():
            self._step(optimizer, dropped)
        self._update_priorities(td_errors, dropped, replay_data)
        self._sum_train_values(task_losses.critic, self._task_means(actor_losses, replay_data), ent_coef_losses)
        self._sum_encoder_values(replay_data, actor_encoding, contrastive_losses, similarities)
        return dropped

    def _joint_update(self, replay_data: ReplaySamples, spoilt: th.Tensor | None) -> th.Tensor | None:
        dropped = super()._joint_update(replay_data, spoilt)
        with th.no_grad():
            encoding = self.actor.encode(self._observations(replay_data)[0])
        self._sum_encoder_values(replay_data, encoding, None, None)
        return dropped

    def _observations(self, replay_data: ReplaySamples) -> tuple[PyTorchObs, PyTorchObs]:
        if not self.use_temporal:
            return super()._observations(replay_data)
        assert isinstance(replay_data, MultiTaskReplayBufferSamples)
        layout, extras = self.policy.layout, replay_data.extras
        obs = layout.attach_state(replay_data.observations, extras[STATE])
        next_state = self.actor.next_state(obs) if self.recompute_states else extras[NEXT_STATE]
        return obs, layout.attach_state(replay_data.next_observations, next_state)

    @staticmethod
    def _critic_losses(td_errors: th.Tensor) -> th.Tensor:
        """Loss of each row, ``(B, 1)``: squared errors, summed over the critics (SB3 takes half of it)."""
        return td_errors.square().sum(dim=0)

    def _contrastive_losses(
        self, outputs: th.Tensor | None, next_outputs: th.Tensor | None
    ) -> tuple[th.Tensor | None, th.Tensor | None]:
        """InfoNCE of each row ``(B, 1)`` and similarities of the experts ``(B, k, k)``; None without contrastive loss."""
        if outputs is None or next_outputs is None:
            return None, None
        with th.autocast(self.device.type, enabled=False):  # cosines are compared after a division by the temperature
            return info_nce_losses(outputs.float(), next_outputs.float(), self.contrastive_temperature)

    def _auxiliary_losses(
        self,
        side: str,
        obs: PyTorchObs,
        next_obs: PyTorchObs,
        replay_data: ReplaySamples,
        dropped: th.Tensor | None,
    ) -> th.Tensor | None:
        if side == "actor" or not self._is_contrastive:
            return None
        with th.no_grad():
            next_outputs = self.critic_target.expert_outputs(next_obs)
        losses, similarities = self._contrastive_losses(self.critic.expert_outputs(obs), next_outputs)
        assert losses is not None and similarities is not None
        self._add_to_train_sums({"contrastive_loss": losses.detach().mean(), "expert_similarities": similarities.mean(dim=0)})
        return self.contrastive_coef * losses

    def _ent_coef_losses(self, log_prob: th.Tensor, replay_data: ReplaySamples, dropped: th.Tensor | None) -> th.Tensor | None:
        if self.log_ent_coef is None or self.ent_coef_loss == "log_alpha":
            return super()._ent_coef_losses(log_prob, replay_data, dropped)
        assert isinstance(self.target_entropy, float)
        entropy_gap = self._keep((log_prob + self.target_entropy).detach(), dropped, replay_data)
        return -self._rows(self._bounded_log_ent_coef().exp(), replay_data) * entropy_gap

    def _update_target_networks(self) -> None:
        critic, target = self.critic, self.critic_target
        polyak_update_(critic.q_stack.parameters(), target.q_stack.parameters(), self.tau)
        polyak_update_(critic.encoder_parameters(), target.encoder_parameters(), self.encoder_tau)
        polyak_update_(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    # ----------------------------------------------------------------- logging

    def _sum_encoder_values(
        self,
        replay_data: ReplaySamples,
        encoding: Encoding,
        contrastive_losses: th.Tensor | None,
        similarities: th.Tensor | None,
    ) -> None:
        gate_weights = encoding.gate_weights.detach()
        entropies = -(gate_weights * gate_weights.clamp(min=1e-9).log()).sum(dim=1, keepdim=True)
        values = {
            "gate_entropy": self._task_means(entropies, replay_data),
            "gate_weights": self._task_means(gate_weights, replay_data).view(self.num_tasks, -1),
        }
        if contrastive_losses is not None and similarities is not None:
            values["contrastive_loss"] = contrastive_losses.detach().mean()
            values["expert_similarities"] = similarities.mean(dim=0)
        self._add_to_train_sums(values)

    def _record_train_mean(self, name: str, mean: np.ndarray) -> None:
        """As ``MTSAC`` does; the cosine similarity of each pair of experts, and the weights of each task's gate."""
        if name == "expert_similarities":
            pairs = list(zip(*np.triu_indices(self.n_experts, k=1), strict=True))
            self.logger.record("train/expert_similarity", float(np.mean([mean[i, j] for i, j in pairs])))
            for i, j in pairs:
                self.logger.record(f"train/expert_similarity/{i}-{j}", float(mean[i, j]), exclude=("stdout", "log"))
        elif name == "gate_weights":  # (T, k)
            for expert, column in enumerate(mean.T):
                values = dict(zip(self.task_names, column.tolist(), strict=True))
                record_per_task(self.logger, f"train/gate_weight_{expert}", values, console=False)
        else:
            super()._record_train_mean(name, mean)

    # -------------------------------------------------------- export, save, load

    def _check_loaded_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, own_buffer: ReplayBuffer | None) -> None:
        super()._check_loaded_buffer(path, own_buffer)
        expected = self._state_columns() if self.use_temporal else {}
        columns = getattr(self.replay_buffer, "extra_columns", {})
        if self.use_temporal and columns != expected:
            raise ValueError(
                f"path must name a replay buffer with the recurrent states {expected} (name and width), "
                f"got {path} with {columns}"
            )

    def export_task_policy(self, task: int | str) -> SACPolicy:
        """
        Not possible: the policy mixes experts by a gate, which no plain ``SACPolicy`` does.

        :param task: Task id or name
        :raises ValueError: always
        """
        raise ValueError("a policy of CMTASAC cannot be exported as a plain SACPolicy: it mixes experts by a gate")

    def _running_state(self) -> list[str]:
        return [*super()._running_state(), "_last_state", "_next_state"]

    def _excluded_save_params(self) -> list[str]:
        # The state before the step to come is saved as SB3 saves the observation it belongs to
        return [*super()._excluded_save_params(), "_next_state"]

    def learn(
        self: SelfCMTASAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "CMTASAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfCMTASAC:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
