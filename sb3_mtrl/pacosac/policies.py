from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mtrl.common.compositional import (
    GSDE_ARGUMENTS,
    CompositionCache,
    TaskVectors,
    init_actor_head_,
    init_critic_hidden_,
    init_critic_output_,
)
from sb3_mtrl.common.policies import Layers
from sb3_mtrl.common.torch_layers import W_ACTIVATIONS, CompositionalLinear, CompositionalMLP, init_compositional_vectors
from sb3_mtrl.common.utils import check_choice
from sb3_mtrl.mtsac.policies import MTSACActor, MTSACCritic, MTSACPolicy, split_tasks_and_groups

STRUCTURES = ("ac_shared", "actor_only", "output_only")


class PaCoActor(MTSACActor):
    """
    SAC's actor with compositional layers, ``theta_t = sum_k w_tk phi_k``.

    Paper: Parameter-Compositional Multi-Task Reinforcement Learning, https://arxiv.org/abs/2210.11653. The task's one-hot
    only selects the row of W, it is no input. The parameters not listed are those of SB3's ``Actor``.

    :param task_vectors: W, not registered as a parameter of this network
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param compositional_trunk: Whether the hidden layers are compositional; else only the two heads are, and an ordinary
        trunk sees the one-hot
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
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        num_tasks: int = 1,
        n_param_sets: int = 5,
        compositional_trunk: bool = True,
        log_std_bounds: tuple[float, float] = (-10.0, 2.0),
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
            observe_task=not compositional_trunk,
            log_std_bounds=log_std_bounds,
        )
        self.n_param_sets = n_param_sets
        self.task_vectors = task_vectors
        del self.mu, self.log_std
        self.latent_pi = nn.Sequential()
        hidden: list[CompositionalLinear] = []
        dims = [features_dim, *net_arch]
        if compositional_trunk:
            hidden = [CompositionalLinear(dims[i], dims[i + 1], n_param_sets) for i in range(len(net_arch))]
        else:
            self.latent_pi = nn.Sequential(*create_mlp(features_dim, -1, net_arch, activation_fn))
        # Mean and log standard deviation side by side: one product
        head = CompositionalLinear(dims[-1], 2 * get_action_dim(action_space), n_param_sets, init=init_actor_head_)
        self.compositional = CompositionalMLP([*hidden, head], activation_fn)
        self.composition_cache = CompositionCache()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in (*GSDE_ARGUMENTS, "full_std", "n_heads", "observe_task"):
            del data[name]
        data.update(
            task_vectors=self.task_vectors,
            n_param_sets=self.n_param_sets,
            compositional_trunk=not self.observe_task,
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
            obs = obs if self.observe_task else obs[:, : -self.num_tasks]
        latent = self.latent_pi(self.extract_features(obs, self.features_extractor))  # (B, in)
        # A rollout has rows of any task and does not train: there the composed parameters are kept
        if n_groups is None and not self.training and not th.is_grad_enabled():
            output = self.composition_cache.forward(self.compositional, self.task_vectors, latent, one_hot)
        else:
            output = self.task_vectors.forward(self.compositional, latent, one_hot, n_groups)
        mean_actions, log_std = output.reshape(len(latent), -1).chunk(2, dim=1)
        return mean_actions, th.clamp(log_std, *self.log_std_bounds), {}

    def train(self, mode: bool = True) -> "PaCoActor":
        """
        :param mode: Whether the network is about to be trained; what was composed before is forgotten then (a fused
            optimiser does not count up the version of the parameters that it changes)
        :return: This network
        """
        if mode:
            self.composition_cache.forget()
        return super().train(mode)

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(in, out)`` and bias of each linear layer for this task; the last one gives mean and log standard
            deviation
        """
        trunk = [(layer.weight.t(), layer.bias) for layer in self.latent_pi if isinstance(layer, nn.Linear)]
        composed = self.compositional.compose(self.task_vectors()[task_id : task_id + 1])
        return [*trunk, *((weight[0, 0], bias[0, 0, 0]) for weight, bias in composed)]


class PaCoCritic(MTSACCritic):
    """
    SAC's critics with compositional layers, all in one batched product per layer.

    The parameters not listed are those of SB3's ``ContinuousCritic``.

    :param task_vectors: W, not registered as a parameter of this network
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        task_vectors: TaskVectors,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        num_tasks: int = 1,
        n_param_sets: int = 5,
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
        self.task_vectors = task_vectors
        dims = [features_dim + get_action_dim(action_space), *net_arch, 1]
        layers = []
        for index in range(len(dims) - 1):
            init = init_critic_hidden_ if index < len(net_arch) else init_critic_output_
            layers.append(CompositionalLinear(dims[index], dims[index + 1], n_param_sets, n_critics, init))
        self.compositional = CompositionalMLP(layers, activation_fn)

    def q_values(self, obs: PyTorchObs, actions: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups that share their task (``B = G b``)
        :param actions: Actions ``(B, n_actions)``
        :param frozen: Hold the critics and W constant: the gradient flows to the actions only
        :return: Values of all critics ``(n_critics, B, 1)``
        """
        network_input, one_hot, n_groups = self._network_input(obs, actions, frozen)
        output = self.task_vectors.forward(self.compositional, network_input, one_hot, n_groups, frozen)
        return output.reshape(self.n_critics, len(network_input), 1)

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(n_critics, in, out)`` and bias ``(n_critics, out)`` of each linear layer for this task
        """
        composed = self.compositional.compose(self.task_vectors()[task_id : task_id + 1])
        return [(weight[:, 0], bias[:, 0, 0]) for weight, bias in composed]


class PaCoPolicy(MTSACPolicy):
    """
    Policy of PaCo: actor, critics and target critics composed from K parameter sets by one matrix W.

    Paper: Parameter-Compositional Multi-Task Reinforcement Learning, https://arxiv.org/abs/2210.11653. The parameters not
    listed are those of SB3's ``SACPolicy``; the defaults are those of the paper's Meta-World runs.

    :param optimizer_kwargs: Additional keyword arguments of the optimisers; None with Adam: ``eps=1e-7`` as in the authors'
        code
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param w_init: How W starts, see ``init_compositional_vectors``
    :param w_activation: What the layers use of W: "identity" (the paper), "softmax" or "l2" of each row
    :param w_learning_rate: Learning rate of W; None: that of actor and critics
    :param structure: "ac_shared": everything is compositional; "actor_only": ordinary critics that see the one-hot;
        "output_only": only the actor's two heads are compositional, its ordinary trunk and the ordinary critics see the
        one-hot (table 3 of the paper)
    :param log_std_bounds: Lowest and highest log standard deviation of the actor
    :raises ValueError: for a bad argument
    """

    actor: PaCoActor
    critic: MTSACCritic
    critic_target: MTSACCritic

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
        w_activation: str = "identity",
        w_learning_rate: float | None = None,
        structure: str = "ac_shared",
        log_std_bounds: tuple[float, float] = (-10.0, 2.0),
    ):
        check_choice("w_activation", w_activation, W_ACTIVATIONS)
        check_choice("structure", structure, STRUCTURES)
        if use_sde:
            raise ValueError("use_sde must be False, got True (PaCo's actor has a state dependent standard deviation)")
        if share_features_extractor and structure == "actor_only" and num_tasks > 1:
            raise ValueError(
                "share_features_extractor must be False with structure='actor_only', got True "
                "(the critics observe the task's one-hot, the actor does not)"
            )
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            optimizer_kwargs = dict(eps=1e-7, fused=True)
        # Before super().__init__, which builds the networks
        self.n_param_sets = n_param_sets
        self.w_init = w_init
        self.w_activation = w_activation
        self.w_learning_rate = w_learning_rate
        self.structure = structure
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
        self.compositional_vectors = nn.Parameter(init_compositional_vectors(self.num_tasks, self.n_param_sets, self.w_init))
        self.task_vectors = TaskVectors(self.compositional_vectors, self.w_activation)
        self.gradient_gate = self.task_vectors.gate
        super()._build(lr_schedule)
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
            w_activation=self.w_activation,
            w_learning_rate=self.w_learning_rate,
            structure=self.structure,
        )
        return data

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> PaCoActor:  # type: ignore[override]
        compositional_trunk = self.structure != "output_only"
        kwargs = self._network_kwargs(self.actor_kwargs, features_extractor, observe_task=not compositional_trunk)
        for name in GSDE_ARGUMENTS:
            del kwargs[name]
        return PaCoActor(
            **kwargs,
            task_vectors=self.task_vectors,
            n_param_sets=self.n_param_sets,
            compositional_trunk=compositional_trunk,
            log_std_bounds=self.log_std_bounds,
        ).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> MTSACCritic:
        if self.structure != "ac_shared":
            return super().make_critic(features_extractor)
        kwargs = self._network_kwargs(self.critic_kwargs, features_extractor, observe_task=False)
        return PaCoCritic(**kwargs, task_vectors=self.task_vectors, n_param_sets=self.n_param_sets).to(self.device)


MlpPolicy = PaCoPolicy


class CnnPolicy(PaCoPolicy):
    """
    Policy for image observations (one task only): ``PaCoPolicy`` with ``NatureCNN`` as its features extractor.
    """

    _default_features_extractor_class = NatureCNN


class MultiInputPolicy(PaCoPolicy):
    """
    Policy for Dict observations (one task only): ``PaCoPolicy`` with ``CombinedExtractor`` as its features extractor.
    """

    _default_features_extractor_class = CombinedExtractor
