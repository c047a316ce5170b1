from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN
from torch import nn

from sb3_mtrl.common.policies import Layers
from sb3_mtrl.common.torch_layers import ExpertGate, Experts, TaskEncoder, base_observation_space, xavier_init_
from sb3_mtrl.common.utils import check_choice, check_integer, check_widths, split_observation
from sb3_mtrl.mtsac.policies import MTSACActor, MTSACCritic, MTSACPolicy, sample_squashed_gaussian

GATE_SHARING = ("full", "released", "actor")
LOG_STD_SQUASH = ("tanh", "clip")

# Hidden and cell state (h, c), each (1, n_envs, H): the convention of sb3-contrib's recurrent policies
RecurrentState = tuple[np.ndarray, ...]


class ObservationLayout(NamedTuple):
    """
    How the networks' observations are laid out: ``(B, n + 2H + T)``, the recurrent state between what the environment shows
    and the one-hot, so that the state goes wherever an observation goes.
    """

    base_dim: int | None  # n; None if the observations are no vectors (one task, no recurrent state)
    state_dim: int  # 2H, 0 without temporal attention
    num_tasks: int

    @property
    def one_hot_dim(self) -> int:
        return self.num_tasks if self.num_tasks > 1 else 0

    def attach_state(self, obs: th.Tensor, state: th.Tensor) -> th.Tensor:
        """
        :param obs: Observations of the environment ``(..., n + T)``
        :param state: Hidden and cell state side by side ``(..., 2H)``
        :return: ``(..., n + 2H + T)``
        """
        assert self.base_dim is not None
        return th.cat([obs[..., : self.base_dim], state, obs[..., self.base_dim :]], dim=-1)

    def split(self, obs: PyTorchObs) -> tuple[Any, th.Tensor | None, th.Tensor | None]:
        """
        :param obs: Observations ``(B, n + 2H + T)``, or ``(G, b, n + 2H + T)`` in groups (``B = G b``). Without the state,
            ``(B, n + T)``, they are taken for the first of their episodes.
        :return: What the environment shows ``(B, n)``, the state ``(B, 2H)`` (None without temporal attention) and the
            one-hots ``(B, T)`` (None with one task)
        """
        if self.base_dim is None or not isinstance(obs, th.Tensor):
            return obs, None, None
        rows = obs.flatten(0, -2)
        one_hot = split_observation(rows, self.num_tasks)[1] if self.num_tasks > 1 else None
        base, state = rows[:, : self.base_dim], None
        if self.state_dim > 0 and rows.shape[1] == self.base_dim + self.one_hot_dim:
            state = rows.new_zeros(len(rows), self.state_dim, dtype=th.float32)
        elif self.state_dim > 0:
            state = rows[:, self.base_dim : self.base_dim + self.state_dim]
        return base, state, one_hot


class TaskRepresentations:
    """
    The tasks' representations z, as the networks see them.

    Actor, critics and target critics hold one and the same object and none of them registers the task encoder: it has its own
    optimiser, and the target critics use the current one.

    :param encoder: The task encoder, owned by the policy
    """

    def __init__(self, encoder: TaskEncoder):
        self.encoder = encoder

    def __call__(self, one_hot: th.Tensor | None, n_rows: int) -> th.Tensor:
        """
        :param one_hot: Task of each row ``(B, T)``; None with one task
        :param n_rows: Number of rows B
        :return: z of each row ``(B, task_embedding_dim)``
        """
        z = self.encoder()
        return z.expand(n_rows, -1) if one_hot is None else one_hot @ z


class Encoding(NamedTuple):
    """What the encoder makes of B observations."""

    latent: th.Tensor  # [m; z], (B, feature_dim + task_embedding_dim)
    gate_weights: th.Tensor  # w, (B, k)
    next_state: th.Tensor | None  # [h'; c'], (B, 2H); None without temporal attention
    expert_outputs: th.Tensor | None  # E, (k, B, feature_dim); None where only their mixture was asked for


class TemporalAttention(nn.Module):
    """
    CMTA's gate: soft attention over the experts by ``[stop-gradient(z); h']``, h' from one LSTM step on the observation.

    :param features_dim: Width of what the LSTM sees
    :param task_dim: Width of the task representation z
    :param n_experts: Number k of experts
    :param lstm_hidden_dim: Width H of the LSTM; 0: no LSTM, the gate sees z alone
    """

    def __init__(self, features_dim: int, task_dim: int, n_experts: int, lstm_hidden_dim: int):
        super().__init__()
        self.lstm_hidden_dim = lstm_hidden_dim
        self.lstm = nn.LSTMCell(features_dim, lstm_hidden_dim) if lstm_hidden_dim > 0 else None
        self.gate = ExpertGate(task_dim + lstm_hidden_dim, n_experts)

    def next_state(self, features: th.Tensor, state: th.Tensor) -> th.Tensor:
        """
        :param features: What the LSTM sees ``(B, features_dim)``
        :param state: ``[h; c]`` before this observation ``(B, 2H)``
        :return: ``[h'; c']`` after it ``(B, 2H)``
        """
        assert self.lstm is not None
        hidden, cell = state.chunk(2, dim=1)
        return th.cat(self.lstm(features, (hidden, cell)), dim=1)

    def forward(self, features: th.Tensor, z: th.Tensor, state: th.Tensor | None) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param features: What the LSTM sees ``(B, features_dim)``
        :param z: Task representations ``(B, task_dim)``
        :param state: ``[h; c]`` before this observation ``(B, 2H)``; None without LSTM
        :return: Weight of each expert ``(B, k)`` and the state after this observation
        """
        z = z.detach()
        if state is None:
            return self.gate(z), None
        next_state = self.next_state(features, state)
        hidden = next_state[:, : self.lstm_hidden_dim]
        return self.gate(th.cat([z, hidden], dim=1)), next_state


class ExpertEncoder(nn.Module):
    """
    k experts and the attention that mixes them.

    :param experts: The experts; actor and critics hold the same
    :param attention: The attention
    """

    def __init__(self, experts: Experts, attention: TemporalAttention):
        super().__init__()
        self.experts = experts
        self.attention = attention

    def forward(
        self,
        features: th.Tensor,
        z: th.Tensor,
        state: th.Tensor | None,
        keep_experts: bool = False,
        freeze_experts: bool = False,
    ) -> Encoding:
        """
        :param features: What experts and LSTM see ``(B, features_dim)``
        :param z: Task representations ``(B, task_dim)``
        :param state: ``[h; c]`` ``(B, 2H)``, None without LSTM
        :param keep_experts: Also return the outputs of the single experts
        :param freeze_experts: Hold the experts constant
        :return: The encoding
        """
        gate_weights, next_state = self.attention(features, z, state)
        expert_outputs = None
        if keep_experts:
            expert_outputs = self.experts(features, freeze_experts)
            mixture = (expert_outputs * gate_weights.t().unsqueeze(2)).sum(dim=0)
        else:
            mixture = self.experts.mix(features, gate_weights, freeze_experts)
        return Encoding(th.cat([mixture, z], dim=1), gate_weights, next_state, expert_outputs)


class CMTAActor(MTSACActor):
    """
    SAC's actor on ``[m; z]``, the mixture of the critics' experts and the task representation.

    Paper: Contrastive Modules with Temporal Attention, https://arxiv.org/abs/2311.01075. No gradient of the actor reaches
    experts or task encoder. The parameters not listed are those of SB3's ``Actor``.

    :param encoder: Experts (the critics') and attention (the critics' or its own)
    :param task_representations: The tasks' z, not registered as parameters of this network
    :param layout: Layout of the observations
    :param train_attention: Whether the actor loss trains the attention
    :param log_std_squash: How the log standard deviation is kept within its bounds: ``"tanh"`` or ``"clip"``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        encoder: ExpertEncoder,
        task_representations: TaskRepresentations,
        layout: ObservationLayout,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        num_tasks: int = 1,
        train_attention: bool = False,
        log_std_squash: str = "tanh",
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images=normalize_images,
            num_tasks=num_tasks,
            observe_task=False,
            log_std_bounds=log_std_bounds,
        )
        self.encoder = encoder
        self.task_representations = task_representations
        self.layout = layout
        self.train_attention = train_attention
        self.log_std_squash = log_std_squash
        for head in (self.latent_pi, self.mu, self.log_std):
            xavier_init_(head)  # type: ignore[arg-type]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("use_sde", "log_std_init", "full_std", "use_expln", "clip_mean", "n_heads", "observe_task"):
            del data[name]
        data.update(
            features_dim=self.features_dim,
            encoder=self.encoder,
            task_representations=self.task_representations,
            layout=self.layout,
            train_attention=self.train_attention,
            log_std_squash=self.log_std_squash,
        )
        return data

    def head_parameters(self) -> list[nn.Parameter]:
        """
        :return: Parameters of the MLP on ``[m; z]``
        """
        return [p for head in (self.latent_pi, self.mu, self.log_std) for p in head.parameters()]  # type: ignore[union-attr]

    def encode(self, obs: PyTorchObs, z: th.Tensor | None = None) -> Encoding:
        """
        :param obs: Observations, see ``ObservationLayout.split``
        :param z: Task representation of each row ``(B, task_dim)``, if known already
        :return: The encoding, constant but for the attention where the actor loss trains it
        """
        base, state, one_hot = self.layout.split(obs)
        with th.no_grad():
            features = self.extract_features(base, self.features_extractor)
            z = self.task_representations(one_hot, len(features)) if z is None else z.detach()
        with th.set_grad_enabled(th.is_grad_enabled() and self.train_attention):
            return self.encoder(features, z, state, freeze_experts=True)

    def next_state(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: Observations with recurrent state ``(..., n + 2H + T)``
        :return: State after them ``(B, 2H)``, constant
        """
        base, state, _ = self.layout.split(obs)
        assert state is not None
        with th.no_grad():
            return self.encoder.attention.next_state(self.extract_features(base, self.features_extractor), state)

    def latent_dist_params(self, latent: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param latent: ``[m; z]``, ``(B, features_dim)``
        :return: Mean and log standard deviation, ``(B, n_actions)``
        """
        hidden = self.latent_pi(latent)
        mean_actions, log_std = self.mu(hidden), self.log_std(hidden)  # type: ignore[operator]
        if self.log_std_squash == "clip":
            return mean_actions, th.clamp(log_std, *self.log_std_bounds)
        low, high = self.log_std_bounds
        return mean_actions, low + 0.5 * (high - low) * (th.tanh(log_std) + 1)

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        :param obs: Observations, see ``ObservationLayout.split``
        :return: Mean and log standard deviation, ``(B, n_actions)``, and no further arguments
        """
        return *self.latent_dist_params(self.encode(obs).latent), {}

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :raises ValueError: always, a gated mixture is no plain MLP
        """
        raise ValueError("an actor of CMTA mixes experts by a gate and cannot be exported as a plain network")


class CMTACritic(MTSACCritic):
    """
    SAC's critics on ``[m; z; a]``; they own the encoder.

    The parameters not listed are those of SB3's ``ContinuousCritic``.

    :param encoder: Experts and attention
    :param task_representations: The tasks' z, not registered as parameters of this network
    :param layout: Layout of the observations
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        encoder: ExpertEncoder,
        task_representations: TaskRepresentations,
        layout: ObservationLayout,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        num_tasks: int = 1,
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images,
            n_critics,
            share_features_extractor=False,
            num_tasks=num_tasks,
            observe_task=False,
        )
        self.encoder = encoder
        self.task_representations = task_representations
        self.layout = layout
        xavier_init_(self.q_stack)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """
        :return: Parameters of all that comes before ``[m; z; a]``
        """
        return [*self.features_extractor.parameters(), *self.encoder.parameters()]

    def encode(self, obs: PyTorchObs, z: th.Tensor | None = None, keep_experts: bool = False) -> Encoding:
        """
        :param obs: Observations, see ``ObservationLayout.split``
        :param z: Task representation of each row ``(B, task_dim)``, if known already
        :param keep_experts: Also return the outputs of the single experts
        :return: The encoding
        """
        base, state, one_hot = self.layout.split(obs)
        features = self.extract_features(base, self.features_extractor)
        if z is None:
            z = self.task_representations(one_hot, len(features))
        return self.encoder(features, z, state, keep_experts)

    def expert_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations, see ``ObservationLayout.split``
        :return: Outputs of the single experts ``(k, B, feature_dim)``
        """
        return self.encoder.experts(self.extract_features(self.layout.split(obs)[0], self.features_extractor))

    def latent_q_values(self, latent: th.Tensor, actions: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param latent: ``[m; z]``, ``(B, features_dim)``
        :param actions: Actions ``(B, n_actions)``
        :param frozen: Hold the critics constant: the gradient flows to latent and actions only
        :return: Values of all critics ``(n_critics, B, 1)``
        """
        return self.q_stack(th.cat([latent, actions], dim=1), frozen)

    def _network_input(
        self, obs: PyTorchObs, actions: th.Tensor, frozen: bool
    ) -> tuple[th.Tensor, th.Tensor | None, int | None]:
        with th.set_grad_enabled(th.is_grad_enabled() and not frozen):
            latent = self.encode(obs).latent
        return th.cat([latent, actions], dim=1), None, None

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :raises ValueError: always, a gated mixture is no plain MLP
        """
        raise ValueError("critics of CMTA mix experts by a gate and cannot be exported as plain networks")


class CMTAPolicy(MTSACPolicy):
    """
    Policy of CMTA: actor and critics on a mixture of experts, weighed by an attention that remembers.

    Paper: Contrastive Modules with Temporal Attention, https://arxiv.org/abs/2311.01075. ``predict`` is recurrent: hand the
    state that it returned to the next call, and ``episode_start`` where an episode begins, as with sb3-contrib's recurrent
    policies. The parameters not listed are those of SB3's ``SACPolicy``; the defaults are those of the authors' code.

    :param net_arch: Widths of actor and critics behind the encoder; None: ``[512, 512, 512]``
    :param num_tasks: Number of tasks T
    :param n_experts: Number k of experts
    :param expert_arch: Widths of the experts' hidden layers
    :param feature_dim: Width of the experts' outputs
    :param use_temporal: Whether the attention has an LSTM; else it sees the task alone
    :param lstm_hidden_dim: Width H of the LSTM
    :param gate_sharing: The actor's attention. "full": it is the critics', which the critic loss trains; "released": its own,
        never trained, as in the authors' code; "actor": its own, trained by the actor loss
    :param task_embedding_dim: Width of the task embedding and of the task representation z
    :param task_encoder_arch: Widths of the hidden layers between the two
    :param pretrained_task_embeddings: Vectors ``(T, d)`` that replace the learned embedding and stay as they are
    :param log_std_squash: How the log standard deviation is kept within ``log_std_bounds``: "tanh" squashes it (new networks
        start in the middle, almost deterministic), "clip" cuts it off as SB3 does
    :param log_std_bounds: Lowest and highest log standard deviation of the actor
    :raises ValueError: for a bad argument
    """

    actor: CMTAActor
    critic: CMTACritic
    critic_target: CMTACritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        num_tasks: int = 1,
        n_experts: int = 6,
        expert_arch: Sequence[int] = (64,),
        feature_dim: int = 64,
        use_temporal: bool = True,
        lstm_hidden_dim: int = 64,
        gate_sharing: str = "full",
        task_embedding_dim: int = 64,
        task_encoder_arch: Sequence[int] = (128, 64, 64),
        pretrained_task_embeddings: Any = None,
        log_std_squash: str = "tanh",
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ):
        check_choice("gate_sharing", gate_sharing, GATE_SHARING)
        check_choice("log_std_squash", log_std_squash, LOG_STD_SQUASH)
        if use_sde:
            raise ValueError("use_sde must be False, got True (CMTA's actor has a state dependent standard deviation)")
        for name, value in (
            ("feature_dim", feature_dim),
            ("lstm_hidden_dim", lstm_hidden_dim),
            ("task_embedding_dim", task_embedding_dim),
        ):
            check_integer(name, value, 1)
        check_widths("expert_arch", expert_arch)
        check_widths("task_encoder_arch", task_encoder_arch)
        base_space = base_observation_space(observation_space, num_tasks) if num_tasks > 1 else observation_space
        is_vector = isinstance(base_space, spaces.Box) and len(base_space.shape) == 1
        if use_temporal and not is_vector:
            raise ValueError(
                f"use_temporal must be False unless observations are vectors (a 1-D Box), got {observation_space}"
            )
        # Before super().__init__, which builds the networks
        self.layout = ObservationLayout(
            base_space.shape[0] if is_vector else None,  # type: ignore[index]
            2 * lstm_hidden_dim if use_temporal else 0,
            num_tasks,
        )
        self.n_experts = n_experts
        self.expert_arch = list(expert_arch)
        self.feature_dim = feature_dim
        self.use_temporal = use_temporal
        self.lstm_hidden_dim = lstm_hidden_dim
        self.gate_sharing = gate_sharing
        self.task_embedding_dim = task_embedding_dim
        self.task_encoder_arch = list(task_encoder_arch)
        self.pretrained_task_embeddings = pretrained_task_embeddings
        self.log_std_squash = log_std_squash
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [512, 512, 512] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
            num_tasks=num_tasks,
            log_std_bounds=log_std_bounds,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.task_encoder = TaskEncoder(
            self.num_tasks,
            self.task_embedding_dim,
            self.task_embedding_dim,
            self.task_encoder_arch,
            self.pretrained_task_embeddings,
        )
        self.task_representations = TaskRepresentations(self.task_encoder)
        self.critic = self.make_critic()
        self.actor = self.make_actor(self.critic.features_extractor)
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        # Target networks should always be in eval mode
        self.critic_target.set_training_mode(False)

        # No tensor is in two optimisers, each of which would step on gradients that belong to the other
        actor_parameters = self.actor.head_parameters()
        if self.gate_sharing == "actor":
            actor_parameters += list(self.actor.encoder.attention.parameters())
        elif self.gate_sharing == "released":
            self.actor.encoder.attention.requires_grad_(False)
        self.actor.optimizer = self._make_optimizer(actor_parameters, lr_schedule)
        self.critic.optimizer = self._make_optimizer(list(self.critic.parameters()), lr_schedule)
        self.task_encoder_optimizer = self._make_optimizer(
            [parameter for parameter in self.task_encoder.parameters() if parameter.requires_grad], lr_schedule
        )

    def shared_optimizers(self) -> dict[str, float | None]:
        """
        :return: The optimiser of the task encoder, see ``MTSACPolicy``
        """
        return {"task_encoder_optimizer": None}

    def _make_optimizer(self, parameters: list[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        return self.optimizer_class(parameters, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _make_attention(self, features_dim: int) -> TemporalAttention:
        lstm_hidden_dim = self.lstm_hidden_dim if self.use_temporal else 0
        return TemporalAttention(features_dim, self.task_embedding_dim, self.n_experts, lstm_hidden_dim)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> CMTACritic:
        kwargs = self._network_kwargs(self.critic_kwargs, features_extractor, observe_task=False)
        del kwargs["share_features_extractor"]
        features_dim = kwargs["features_dim"]
        experts = Experts(features_dim, self.feature_dim, self.n_experts, self.expert_arch, self.activation_fn)
        kwargs["features_dim"] = self.feature_dim + self.task_embedding_dim
        return CMTACritic(
            **kwargs,
            encoder=ExpertEncoder(experts, self._make_attention(features_dim)),
            task_representations=self.task_representations,
            layout=self.layout,
        ).to(self.device)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> CMTAActor:  # type: ignore[override]
        kwargs = self._network_kwargs(self.actor_kwargs, features_extractor, observe_task=False)
        for name in ("use_sde", "log_std_init", "use_expln", "clip_mean"):
            del kwargs[name]
        encoder = self.critic.encoder
        if self.gate_sharing != "full":
            # Its own attention on the critics' experts
            encoder = ExpertEncoder(encoder.experts, self._make_attention(kwargs["features_dim"]))
        kwargs["features_dim"] = self.feature_dim + self.task_embedding_dim
        return CMTAActor(
            **kwargs,
            encoder=encoder,
            task_representations=self.task_representations,
            layout=self.layout,
            train_attention=self.gate_sharing == "actor",
            log_std_squash=self.log_std_squash,
            log_std_bounds=self.log_std_bounds,
        ).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        dropped = ("use_sde", "log_std_init", "use_expln", "clip_mean", "share_features_extractor", "n_heads", "observe_task")
        for name in dropped:
            del data[name]
        data.update(
            n_experts=self.n_experts,
            expert_arch=self.expert_arch,
            feature_dim=self.feature_dim,
            use_temporal=self.use_temporal,
            lstm_hidden_dim=self.lstm_hidden_dim,
            gate_sharing=self.gate_sharing,
            task_embedding_dim=self.task_embedding_dim,
            task_encoder_arch=self.task_encoder_arch,
            pretrained_task_embeddings=self.pretrained_task_embeddings,
            log_std_squash=self.log_std_squash,
        )
        return data

    # -------------------------------------------------------- recurrent state

    def initial_state(self, n_envs: int) -> RecurrentState:
        """
        :param n_envs: Number of sub-environments
        :return: State ``(h, c)`` at the start of an episode, each ``(1, n_envs, H)``
        """
        return tuple(np.zeros((1, n_envs, self.lstm_hidden_dim), dtype=np.float32) for _ in range(2))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, RecurrentState | None]:
        """
        Get the policy's action from an observation and the recurrent state.

        Called without the state that the last call returned, the policy acts as at the first step of an episode.

        :param observation: One observation or a batch of them
        :param state: State ``(h, c)``, each ``(1, n_envs, H)``; None: that of the start of an episode
        :param episode_start: Where an episode begins, ``(n_envs,)``: the state is reset there; None: nowhere
        :param deterministic: Whether to return deterministic actions
        :return: The actions and the state after them (the ``state`` given if the policy has no temporal attention)
        :raises ValueError: if the state is of another shape
        """
        if not self.use_temporal or isinstance(observation, tuple):  # for which SB3 has a message
            return super().predict(observation, state, episode_start, deterministic)  # type: ignore[arg-type]
        self.set_training_mode(False)
        obs, vectorized_env = self.obs_to_tensor(observation)
        with th.no_grad():
            encoding = self.actor.encode(self._with_state(obs, state, episode_start))
            mean_actions, log_std = self.actor.latent_dist_params(encoding.latent)
            squashed = th.tanh(mean_actions) if deterministic else sample_squashed_gaussian(mean_actions, log_std)[0]
        assert encoding.next_state is not None and self.action_space.shape is not None
        actions = self.unscale_action(squashed.cpu().numpy().reshape((-1, *self.action_space.shape)))
        if not vectorized_env:
            actions = actions.squeeze(axis=0)
        return actions, self._to_numpy(encoding.next_state)

    def next_state(
        self,
        observation: np.ndarray,
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
    ) -> RecurrentState:
        """
        The state that ``predict`` would return, whatever the action.

        :param observation: See ``predict``
        :param state: See ``predict``
        :param episode_start: See ``predict``
        :return: State ``(h, c)`` after the observation
        """
        obs, _ = self.obs_to_tensor(observation)
        return self._to_numpy(self.actor.next_state(self._with_state(obs, state, episode_start)))

    def gate_weights(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        How much the actor listens to each expert.

        :param observation: See ``predict``
        :param state: See ``predict``
        :param episode_start: See ``predict``
        :return: Weights ``(n_envs, k)``; rows sum to 1
        """
        obs, _ = self.obs_to_tensor(observation)
        with th.no_grad():
            if self.use_temporal:
                obs = self._with_state(obs, state, episode_start)
            return self.actor.encode(obs).gate_weights.cpu().numpy()

    def _with_state(self, obs: PyTorchObs, state: RecurrentState | None, episode_start: np.ndarray | None) -> th.Tensor:
        assert isinstance(obs, th.Tensor)
        n_envs = len(obs)
        state = self.initial_state(n_envs) if state is None else state
        expected = (1, n_envs, self.lstm_hidden_dim)
        shapes = [np.shape(part) for part in state]
        if shapes != [expected, expected]:
            raise ValueError(f"state must be a pair (h, c) of arrays of shape {expected} or None, got {shapes}")
        joined = np.concatenate(state, axis=2)[0]
        if episode_start is not None:
            joined = np.where(np.reshape(episode_start, (n_envs, 1)), 0.0, joined)
        return self.layout.attach_state(obs.float(), th.as_tensor(joined, dtype=th.float32, device=self.device))

    @staticmethod
    def _to_numpy(state: th.Tensor) -> RecurrentState:
        """``[h; c]``, ``(B, 2H)``, to ``(h, c)``, each ``(1, B, H)``."""
        return tuple(part[None] for part in np.split(state.cpu().numpy(), 2, axis=1))


MlpPolicy = CMTAPolicy


class CnnPolicy(CMTAPolicy):
    """
    Policy for image observations (one task and no temporal attention): ``CMTAPolicy`` with ``NatureCNN`` as its features
    extractor.
    """

    _default_features_extractor_class = NatureCNN


class MultiInputPolicy(CMTAPolicy):
    """
    Policy for Dict observations (one task and no temporal attention): ``CMTAPolicy`` with ``CombinedExtractor`` as its
    features extractor.
    """

    _default_features_extractor_class = CombinedExtractor
