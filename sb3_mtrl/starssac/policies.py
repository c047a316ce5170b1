from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN
from torch import nn

from sb3_mtrl.common.compositional import (
    GSDE_ARGUMENTS,
    CompositionCache,
    TaskVectors,
    init_actor_head_,
    init_critic_hidden_,
    init_critic_output_,
)
from sb3_mtrl.common.policies import Layers, fold_task_into_bias, merge_late_branch
from sb3_mtrl.common.shared_unique import N_SHARED_LAYERS, SharedUniqueMLP
from sb3_mtrl.common.torch_layers import GradientGate, init_compositional_vectors
from sb3_mtrl.common.utils import check_flag, check_integer, check_widths
from sb3_mtrl.mtsac.policies import MTSACActor, MTSACCritic, MTSACPolicy, split_tasks_and_groups


class UniqueBranch(nn.Module):
    """
    The unique features of STARS: an embedding of the state, shaped by a triplet loss beside the losses of SAC.

    After the published description of STARS, https://arxiv.org/abs/2406.00761.

    :param features_dim: Width of the state's features
    :param num_tasks: Number of tasks T
    :param unique_dim: Width E of the embedding
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Activation between the layers
    :param observes_task: Whether the one-hot is part of the input (with one task it is not)
    :param learns_from_rl: Whether the losses of SAC train the branch, too
    :param gate: Stops the gradients of dropped tasks
    """

    def __init__(
        self,
        features_dim: int,
        num_tasks: int,
        unique_dim: int,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module],
        observes_task: bool,
        learns_from_rl: bool,
        gate: GradientGate,
    ):
        super().__init__()
        self.features_dim = features_dim
        self.unique_dim = unique_dim
        self.net_arch = list(net_arch)
        self.observes_task = observes_task and num_tasks > 1
        self.learns_from_rl = learns_from_rl
        self.gate = gate
        in_features = features_dim + (num_tasks if self.observes_task else 0)
        self.mlp = nn.Sequential(*create_mlp(in_features, unique_dim, self.net_arch, activation_fn))
        # Whether the embeddings that a forward pass with gradient makes are kept until they are taken
        self.keeps_embeddings = False
        self._last_embeddings: th.Tensor | None = None
        # Length of the gradient that each kind of loss last sent to the embeddings of a batch
        self.gradient_norms: dict[str, th.Tensor] = {}

    def forward(self, features: th.Tensor, one_hot: th.Tensor | None, n_groups: int | None) -> th.Tensor:
        """
        :param features: Features of the state ``(B, features_dim)``
        :param one_hot: Task of each row ``(B, T)``; None with one task
        :param n_groups: Number of groups of successive rows that share their task; None: rows of any task in any order
        :return: The embeddings as features of a network, ``(B, E)``
        """
        if self.observes_task:
            assert one_hot is not None
            features = th.cat([features, one_hot], dim=1)
        embeddings = self.mlp(features)
        if not th.is_grad_enabled():
            return embeddings
        if self.keeps_embeddings:
            self._last_embeddings = embeddings
        if not self.learns_from_rl:
            return embeddings.detach()
        grouped = embeddings.view(1, n_groups or 1, -1, self.unique_dim)
        if n_groups is not None and one_hot is not None:
            self.gate.attach(grouped, one_hot.view(n_groups, -1, one_hot.shape[1])[:, 0].argmax(dim=1))
        self._watch(grouped, "rl")
        return grouped.view_as(embeddings)

    def take_embeddings(self) -> th.Tensor:
        """
        What the last forward pass with gradient made, so that the triplet loss need not compute it again. It can be taken
        once, if ``keeps_embeddings`` was set before.

        :return: Embeddings ``(B, E)``
        """
        assert self._last_embeddings is not None
        embeddings = self._last_embeddings.view_as(self._last_embeddings)
        self._last_embeddings = None
        self._watch(embeddings, "triplet")
        return embeddings

    def _watch(self, embeddings: th.Tensor, loss: str) -> None:
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: self.gradient_norms.update({loss: gradient.norm()}))

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(in, out)`` and bias of each layer for this task, on an input without the one-hot
        """
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        layers: Layers = [(linear.weight.t(), linear.bias) for linear in linears]
        if self.observes_task:
            layers = fold_task_into_bias(layers, task_id, slice(self.features_dim, self.mlp[0].in_features))
        return layers


class STARSActor(MTSACActor):
    """
    SAC's actor on shared, compositional features and unique features of the state.

    After the published description of STARS, https://arxiv.org/abs/2406.00761. The parameters not listed are those of SB3's
    ``Actor``.

    :param task_vectors: W, not registered as a parameter of this network
    :param unique_branch: Makes the unique features; None: there are none
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param compositional_head: Whether the layers after the concatenation are compositional
    :param log_std_bounds: Lowest and highest log standard deviation
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        task_vectors: TaskVectors,
        unique_branch: UniqueBranch | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        num_tasks: int = 1,
        n_param_sets: int = 5,
        compositional_head: bool = True,
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
        self.n_param_sets = n_param_sets
        self.compositional_head = compositional_head
        self.task_vectors = task_vectors
        self.unique_branch = unique_branch
        del self.mu, self.log_std, self.latent_pi
        # Mean and log standard deviation side by side: one product
        self.compositional = SharedUniqueMLP(
            features_dim,
            2 * get_action_dim(action_space),
            net_arch,
            n_param_sets,
            0 if unique_branch is None else unique_branch.unique_dim,
            compositional_head=compositional_head,
            init_output=init_actor_head_,
            activation_fn=activation_fn,
        )
        self.composition_cache = CompositionCache()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in (*GSDE_ARGUMENTS, "full_std", "n_heads", "observe_task"):
            del data[name]
        data.update(
            task_vectors=self.task_vectors,
            unique_branch=self.unique_branch,
            n_param_sets=self.n_param_sets,
            compositional_head=self.compositional_head,
        )
        return data

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups that share their task (``B = G b``)
        :return: Mean and log standard deviation, ``(B, n_actions)``, and no further arguments
        """
        one_hot, n_groups = None, None
        if self.num_tasks > 1:
            obs, one_hot, n_groups = split_tasks_and_groups(obs, self.num_tasks)  # type: ignore[arg-type]
            obs = obs[:, : -self.num_tasks]
        network_input = self.extract_features(obs, self.features_extractor)
        if self.unique_branch is not None:
            network_input = th.cat([network_input, self.unique_branch(network_input, one_hot, n_groups)], dim=1)
        # A rollout has rows of any task and does not train: there the composed parameters are kept
        if n_groups is None and not self.training and not th.is_grad_enabled():
            output = self.composition_cache.forward(self.compositional, self.task_vectors, network_input, one_hot)
        else:
            output = self.task_vectors.forward(self.compositional, network_input, one_hot, n_groups)
        mean_actions, log_std = output.reshape(len(network_input), -1).chunk(2, dim=1)
        return mean_actions, th.clamp(log_std, *self.log_std_bounds), {}

    def train(self, mode: bool = True) -> "STARSActor":
        """
        :param mode: Whether the network is about to be trained; what was composed before is forgotten then
        :return: This network
        """
        if mode:
            self.composition_cache.forget()
        return super().train(mode)

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(in, out)`` and bias of each linear layer of a plain network that is this actor for this task; the
            last one gives mean and log standard deviation
        :raises ValueError: if the two branches differ in depth
        """
        composed = self.compositional.compose(self.task_vectors()[task_id : task_id + 1])
        layers = [(weight[0, 0], bias[0, 0, 0]) for weight, bias in composed]
        if self.unique_branch is None:
            return layers
        return merge_late_branch(layers, self.unique_branch.single_task_layers(task_id), self.compositional.n_shared)


class STARSCritic(MTSACCritic):
    """
    SAC's critics on shared, compositional features of state and action and unique features of the state, all critics in one
    batched product per layer. The unique branch is one for all critics.

    After the published description of STARS, https://arxiv.org/abs/2406.00761. The parameters not listed are those of SB3's
    ``ContinuousCritic``.

    :param task_vectors: W, not registered as a parameter of this network
    :param unique_branch: Makes the unique features; None: there are none
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param compositional_head: Whether the layers after the concatenation are compositional
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        task_vectors: TaskVectors,
        unique_branch: UniqueBranch | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        num_tasks: int = 1,
        n_param_sets: int = 5,
        compositional_head: bool = True,
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
            share_features_extractor,
            num_tasks,
            observe_task=False,
        )
        del self.q_stack
        self.n_param_sets = n_param_sets
        self.compositional_head = compositional_head
        self.task_vectors = task_vectors
        self.unique_branch = unique_branch
        self.compositional = SharedUniqueMLP(
            features_dim + get_action_dim(action_space),
            1,
            net_arch,
            n_param_sets,
            0 if unique_branch is None else unique_branch.unique_dim,
            n_critics,
            compositional_head,
            init_critic_hidden_,
            init_critic_output_,
            activation_fn,
        )

    def q_values(self, obs: PyTorchObs, actions: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups that share their task (``B = G b``)
        :param actions: Actions ``(B, n_actions)``
        :param frozen: Hold the critics and W constant: the gradient flows to the actions only
        :return: Values of all critics ``(n_critics, B, 1)``
        """
        network_input, one_hot, n_groups = self._network_input(obs, actions, frozen)
        if self.unique_branch is not None:
            with th.set_grad_enabled(th.is_grad_enabled() and not frozen):
                features = network_input[:, : self.unique_branch.features_dim]
                unique_features = self.unique_branch(features, one_hot, n_groups)
            network_input = th.cat([network_input, unique_features], dim=1)
        output = self.task_vectors.forward(self.compositional, network_input, one_hot, n_groups, frozen)
        return output.reshape(self.n_critics, len(network_input), 1)

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(n_critics, in, out)`` and bias ``(n_critics, out)`` of each linear layer of plain networks that are
            these critics for this task
        :raises ValueError: if the two branches differ in depth
        """
        composed = self.compositional.compose(self.task_vectors()[task_id : task_id + 1])
        layers = [(weight[:, 0], bias[:, 0, 0]) for weight, bias in composed]
        if self.unique_branch is None:
            return layers
        return merge_late_branch(layers, self.unique_branch.single_task_layers(task_id), self.compositional.n_shared)


class STARSPolicy(MTSACPolicy):
    """
    Policy of STARS: actor, critics and target critics with shared features composed from K parameter sets and unique
    features of the state.

    After the published description of STARS, https://arxiv.org/abs/2406.00761; see ``STARSSAC`` for what had to be filled in.
    The target critics follow with a W of their own. The parameters not listed are those of SB3's ``SACPolicy``.

    :param net_arch: Widths of the hidden layers, the first two of which are shared features; None: 400, 400, 400
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K; 1: ordinary networks, W is 1 and stays so
    :param w_init: How W starts, see ``init_compositional_vectors``
    :param w_learning_rate: Learning rate of W; None: that of actor and critics
    :param unique_dim: Number E of unique features; 0: none
    :param unique_arch: Widths of the hidden layers of the unique branch; None: those of the shared layers
    :param unique_observes_task: Whether the unique branch sees the task's one-hot
    :param unique_from_rl: Whether the losses of SAC train the unique branch
    :param compositional_head: Whether the layers after the concatenation are compositional
    :param log_std_bounds: Lowest and highest log standard deviation of the actor
    :raises ValueError: for a bad argument
    """

    actor: STARSActor
    critic: STARSCritic
    critic_target: STARSCritic

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
        share_features_extractor: bool = False,
        num_tasks: int = 1,
        n_param_sets: int = 5,
        w_init: str = "normal",
        w_learning_rate: float | None = None,
        unique_dim: int = 64,
        unique_arch: Sequence[int] | None = None,
        unique_observes_task: bool = True,
        unique_from_rl: bool = True,
        compositional_head: bool = True,
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ):
        if use_sde:
            raise ValueError("use_sde must be False, got True (STARS' actor has a state dependent standard deviation)")
        unique_dim = check_integer("unique_dim", unique_dim, 0)
        if unique_arch is not None:
            check_widths("unique_arch", unique_arch)
        check_flag("unique_observes_task", unique_observes_task)
        # Before super().__init__, which builds the networks
        self.n_param_sets = n_param_sets
        self.w_init = w_init
        self.w_learning_rate = w_learning_rate
        self.unique_dim = unique_dim
        self.unique_arch = unique_arch
        self.unique_observes_task = unique_observes_task
        self.unique_from_rl = unique_from_rl
        self.compositional_head = compositional_head
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [400, 400, 400] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
            num_tasks=num_tasks,
            log_std_bounds=log_std_bounds,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        w = init_compositional_vectors(self.num_tasks, self.n_param_sets, self.w_init)
        is_composed = bool(self.n_param_sets > 1)
        self.compositional_vectors = nn.Parameter(w if is_composed else th.ones_like(w), requires_grad=is_composed)
        self.target_compositional_vectors = nn.Parameter(self.compositional_vectors.detach().clone(), requires_grad=False)
        self.task_vectors = TaskVectors(self.compositional_vectors, "identity")
        self.gradient_gate = self.task_vectors.gate
        super()._build(lr_schedule)
        self.critic_target.task_vectors = TaskVectors(self.target_compositional_vectors, "identity")
        learning_rate = self.w_learning_rate if self.w_learning_rate is not None else lr_schedule(1)
        self.w_optimizer = self.optimizer_class([self.compositional_vectors], lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    def shared_optimizers(self) -> dict[str, float | None]:
        """
        :return: The optimiser of W, see ``MTSACPolicy``
        """
        return {"w_optimizer": self.w_learning_rate}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in (*GSDE_ARGUMENTS, "n_heads", "observe_task"):
            del data[name]
        data.update(
            n_param_sets=self.n_param_sets,
            w_init=self.w_init,
            w_learning_rate=self.w_learning_rate,
            unique_dim=self.unique_dim,
            unique_arch=self.unique_arch,
            unique_observes_task=self.unique_observes_task,
            unique_from_rl=self.unique_from_rl,
            compositional_head=self.compositional_head,
        )
        return data

    def _branch_kwargs(
        self, network_kwargs: dict[str, Any], features_extractor: BaseFeaturesExtractor | None
    ) -> dict[str, Any]:
        """Keyword arguments of an actor or critic, with a unique branch of its own."""
        kwargs = self._network_kwargs(network_kwargs, features_extractor, observe_task=False)
        kwargs.update(
            task_vectors=self.task_vectors, n_param_sets=self.n_param_sets, compositional_head=self.compositional_head
        )
        if self.unique_dim > 0:
            kwargs["unique_branch"] = UniqueBranch(
                kwargs["features_dim"],
                self.num_tasks,
                self.unique_dim,
                kwargs["net_arch"][:N_SHARED_LAYERS] if self.unique_arch is None else self.unique_arch,
                self.activation_fn,
                self.unique_observes_task,
                self.unique_from_rl,
                self.task_vectors.gate,
            )
        return kwargs

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> STARSActor:  # type: ignore[override]
        kwargs = self._branch_kwargs(self.actor_kwargs, features_extractor)
        for name in GSDE_ARGUMENTS:
            del kwargs[name]
        return STARSActor(**kwargs, log_std_bounds=self.log_std_bounds).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> STARSCritic:  # type: ignore[override]
        return STARSCritic(**self._branch_kwargs(self.critic_kwargs, features_extractor)).to(self.device)


MlpPolicy = STARSPolicy


class CnnPolicy(STARSPolicy):
    """
    Policy for image observations (one task only): ``STARSPolicy`` with ``NatureCNN`` as its features extractor.
    """

    _default_features_extractor_class = NatureCNN


class MultiInputPolicy(STARSPolicy):
    """
    Policy for Dict observations (one task only): ``STARSPolicy`` with ``CombinedExtractor`` as its features extractor.
    """

    _default_features_extractor_class = CombinedExtractor
