import math
from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, SACPolicy
from torch import nn

from sb3_mtrl.common.policies import Layers
from sb3_mtrl.common.torch_layers import GradientGate, StackedMLP, TaskHeads, base_observation_space
from sb3_mtrl.common.utils import (
    check_choice,
    check_flag,
    check_integer,
    check_kwargs,
    check_number,
    check_that,
    check_widths,
    split_observation,
)

N_HEADS = ("shared", "per_task")


def check_factory(name: str, factory: Any, base: type) -> None:
    """
    :param name: Name of the argument
    :param factory: A subclass, or a function in its place
    :param base: Of what
    :raises ValueError: if it is neither
    """
    is_subclass = isinstance(factory, type) and issubclass(factory, base)
    is_function = isinstance(factory, (partial, FunctionType))
    check_that(name, factory, is_subclass or is_function, f"a subclass of {base.__name__}")


def check_net_arch(net_arch: Any) -> None:
    """
    :param net_arch: See SB3's ``SACPolicy``
    :raises ValueError: if these are no widths of layers
    """
    if isinstance(net_arch, dict):
        # SB3 ignores other keys
        check_that("net_arch", net_arch, {"pi", "qf"} <= set(net_arch), "a list, or a dict of the lists 'pi' and 'qf'")
        check_widths("net_arch", net_arch["pi"])
        check_widths("net_arch", net_arch["qf"])
    elif net_arch is not None:
        check_that("net_arch", net_arch, isinstance(net_arch, list), "a list, or a dict of the lists 'pi' and 'qf'")
        check_widths("net_arch", net_arch)


def split_tasks_and_groups(obs: th.Tensor, num_tasks: int) -> tuple[th.Tensor, th.Tensor, int | None]:
    """
    Read an observation of several tasks; networks take rows of any task in any order, or groups of rows that share their task.

    :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups (``B = G b``)
    :param num_tasks: Number of tasks T
    :return: The observations as rows ``(B, n + T)``, the one-hots ``(B, T)``, and G (None without groups)
    """
    n_groups = len(obs) if obs.dim() == 3 else None
    rows = obs.flatten(0, -2)
    return rows, split_observation(rows, num_tasks)[1], n_groups


def sample_squashed_gaussian(mean: th.Tensor, log_std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param mean: Mean before the squashing ``(B, n_actions)``
    :param log_std: Log standard deviation before the squashing ``(B, n_actions)``
    :return: Actions ``tanh(u)`` of draws u ``(B, n_actions)``, and their log probabilities ``(B,)``
    """
    mean, log_std = mean.float(), log_std.float()  # log(1 - a^2) has nothing left in bfloat16
    noise = th.randn_like(mean)
    actions = th.tanh(mean + log_std.exp() * noise)
    gaussian_log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # Squash correction, kept finite as in SB3
    return actions, (gaussian_log_prob - th.log(1 - actions.square() + 1e-6)).sum(dim=1)


class MTSACActor(Actor):
    """
    SAC's actor with, optionally, an output layer per task and without the task in its input.

    The parameters not listed are those of SB3's ``Actor``.

    :param num_tasks: Number of tasks T
    :param n_heads: ``"shared"`` or ``"per_task"``
    :param observe_task: Whether the one-hot is part of the input
    :param log_std_bounds: Lowest and highest log standard deviation
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        log_std_init: float = -3,
        full_std: bool = True,
        use_expln: bool = False,
        clip_mean: float = 2.0,
        normalize_images: bool = True,
        num_tasks: int = 1,
        n_heads: str = "shared",
        observe_task: bool = True,
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            use_sde,
            log_std_init,
            full_std,
            use_expln,
            clip_mean,
            normalize_images,
        )
        self.num_tasks = num_tasks
        self.n_heads = n_heads
        self.observe_task = observe_task
        self.log_std_bounds = log_std_bounds
        if n_heads == "per_task":
            last_layer_dim = net_arch[-1] if len(net_arch) > 0 else features_dim
            self.mu = TaskHeads(last_layer_dim, get_action_dim(action_space), num_tasks)
            self.log_std = TaskHeads(last_layer_dim, get_action_dim(action_space), num_tasks)  # type: ignore[assignment]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            num_tasks=self.num_tasks,
            n_heads=self.n_heads,
            observe_task=self.observe_task,
            log_std_bounds=self.log_std_bounds,
        )
        return data

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups that share their task (``B = G b``)
        :return: Mean and log standard deviation, ``(B, n_actions)``, and gSDE's keyword arguments
        """
        one_hot, n_groups = None, None
        if self.num_tasks > 1:
            obs, one_hot, n_groups = split_tasks_and_groups(obs, self.num_tasks)  # type: ignore[arg-type]
            obs = obs if self.observe_task else obs[:, : -self.num_tasks]
        if self.n_heads == "shared" and self.use_sde:
            return super().get_action_dist_params(obs)
        latent_pi = self.latent_pi(self.extract_features(obs, self.features_extractor))
        if self.n_heads == "per_task":
            mean_actions = self.mu(latent_pi[None], one_hot, n_groups).squeeze(0)
            log_std = self.log_std(latent_pi[None], one_hot, n_groups).squeeze(0)  # type: ignore[operator]
        else:
            mean_actions = self.mu(latent_pi)
            log_std = self.log_std(latent_pi)  # type: ignore[operator]
        return mean_actions, th.clamp(log_std, *self.log_std_bounds), {}

    def action_log_prob(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Sample squashed actions; the numbers of SB3's distribution without its check of the arguments, which would wait for
        the device.

        :param obs: Observations, see ``get_action_dist_params``
        :return: Actions ``(B, n_actions)`` and their log probabilities ``(B,)``
        """
        mean_actions, log_std, kwargs = self.get_action_dist_params(obs)
        if self.use_sde:
            return self.action_dist.log_prob_from_params(mean_actions, log_std, **kwargs)
        return sample_squashed_gaussian(mean_actions, log_std)

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(in, out)`` and bias of each linear layer for this task; the last one gives mean and log standard
            deviation
        """
        layers = [(layer.weight.t(), layer.bias) for layer in self.latent_pi if isinstance(layer, nn.Linear)]
        heads: list[Any] = [self.mu, self.log_std]
        if self.n_heads == "per_task":
            head_layers = [(head.weight[0, task_id], head.bias[0, task_id, 0]) for head in heads]
        else:
            head_layers = [(head.weight.t(), head.bias) for head in heads]
        weights, biases = zip(*head_layers, strict=True)
        return [*layers, (th.cat(weights, dim=-1), th.cat(biases, dim=-1))]


class MTSACCritic(ContinuousCritic):
    """
    SAC's critics, all evaluated in one batched product per layer.

    The parameters not listed are those of SB3's ``ContinuousCritic``; with equal seeds the critics start as SB3's do.

    :param num_tasks: Number of tasks T
    :param n_heads: ``"shared"`` or ``"per_task"``
    :param observe_task: Whether the one-hot is part of the input
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        num_tasks: int = 1,
        n_heads: str = "shared",
        observe_task: bool = True,
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
        )
        self.num_tasks = num_tasks
        self.n_heads = n_heads
        self.observe_task = observe_task
        networks: list[Any] = list(self.q_networks)
        # SB3 registers each critic by name; its parameters live in the stack from here on
        for index in range(n_critics):
            delattr(self, f"qf{index}")
        del self.q_networks
        self.task_heads: TaskHeads | None = None
        if n_heads == "per_task":
            networks = [network[:-1] for network in networks]
            last_layer_dim = net_arch[-1] if len(net_arch) > 0 else features_dim + get_action_dim(action_space)
            self.task_heads = TaskHeads(last_layer_dim, 1, num_tasks, n_networks=n_critics)
        self.q_stack = StackedMLP(networks)

    def _network_input(
        self, obs: PyTorchObs, actions: th.Tensor, frozen: bool
    ) -> tuple[th.Tensor, th.Tensor | None, int | None]:
        """Features and actions side by side ``(B, in)``, one-hots and number of groups of ``split_tasks_and_groups``."""
        one_hot, n_groups = None, None
        if self.num_tasks > 1:
            obs, one_hot, n_groups = split_tasks_and_groups(obs, self.num_tasks)  # type: ignore[arg-type]
            obs = obs if self.observe_task else obs[:, : -self.num_tasks]
        # A shared features extractor learns from the actor loss only, as in SB3
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor and not frozen):
            features = self.extract_features(obs, self.features_extractor)
        return th.cat([features, actions], dim=1), one_hot, n_groups

    def q_values(self, obs: PyTorchObs, actions: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups that share their task (``B = G b``)
        :param actions: Actions ``(B, n_actions)``
        :param frozen: Hold the critics constant: the gradient flows to the actions only
        :return: Values of all critics ``(n_critics, B, 1)``
        """
        network_input, one_hot, n_groups = self._network_input(obs, actions, frozen)
        latent = self.q_stack(network_input, frozen)  # (N, B, .)
        if self.task_heads is None:
            return latent
        assert one_hot is not None
        return self.task_heads(latent, one_hot, n_groups, frozen)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: Observations, see ``q_values``
        :param actions: Actions ``(B, n_actions)``
        :return: One ``(B, 1)`` tensor per critic, as SB3's critics return them
        """
        return tuple(self.q_values(obs, actions))

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: Observations, see ``q_values``
        :param actions: Actions ``(B, n_actions)``
        :return: Values of the first critic ``(B, 1)``
        """
        with th.no_grad():
            return self.q_values(obs, actions)[0]

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: Weight ``(n_critics, in, out)`` and bias ``(n_critics, out)`` of each linear layer for this task
        """
        layers = [(weight, bias[:, 0]) for weight, bias in zip(self.q_stack.weights, self.q_stack.biases, strict=True)]
        if self.task_heads is not None:
            layers.append((self.task_heads.weight[:, task_id], self.task_heads.bias[:, task_id, 0]))
        return layers


class MTSACPolicy(SACPolicy):
    """
    Policy of multi-task SAC: SAC's actor and critics on observations that end in the task's one-hot.

    The parameters not listed are those of SB3's ``SACPolicy``.

    :param optimizer_kwargs: Additional keyword arguments of the optimisers; None with Adam: ``fused=True``, one kernel a step,
        which rounds otherwise than SB3's in the last bits
    :param num_tasks: Number of tasks T; with 1 it is SB3's policy on any observation space
    :param n_heads: ``"shared"``: one output layer (MT-SAC); ``"per_task"``: one per task (MT-multi-head-SAC)
    :param observe_task: Whether the one-hot is part of the networks' input
    :param log_std_bounds: Lowest and highest log standard deviation of the actor
    :raises ValueError: for a bad argument
    """

    actor: MTSACActor
    critic: MTSACCritic
    critic_target: MTSACCritic
    # Stops gradients of dropped tasks, where the networks have parameters of single tasks to stop them at
    gradient_gate: GradientGate | None = None
    _default_features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        log_std_init: float = -3,
        use_expln: bool = False,
        clip_mean: float = 2.0,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        num_tasks: int = 1,
        n_heads: str = "shared",
        observe_task: bool = True,
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ):
        check_choice("n_heads", n_heads, N_HEADS)
        num_tasks = check_integer("num_tasks", num_tasks, 1)
        check_net_arch(net_arch)
        check_factory("activation_fn", activation_fn, nn.Module)
        check_factory("optimizer_class", optimizer_class, th.optim.Optimizer)
        if features_extractor_class is not None:
            check_factory("features_extractor_class", features_extractor_class, BaseFeaturesExtractor)
        check_kwargs("features_extractor_kwargs", features_extractor_kwargs)
        check_kwargs("optimizer_kwargs", optimizer_kwargs)
        n_critics = check_integer("n_critics", n_critics, 1)
        log_std_init = check_number("log_std_init", log_std_init)
        clip_mean = check_number("clip_mean", clip_mean, finite=False)  # no clipping if negative
        for name, flag in (
            ("use_expln", use_expln),
            ("normalize_images", normalize_images),
            ("share_features_extractor", share_features_extractor),
            ("observe_task", observe_task),
        ):
            check_flag(name, flag)
        if n_heads == "per_task" and num_tasks == 1:
            n_heads = "shared"  # one task has one head
        if n_heads == "per_task" and use_sde:
            raise ValueError("use_sde must be False with n_heads='per_task', got True (gSDE has one exploration matrix)")
        if num_tasks > 1:
            base_observation_space(observation_space, num_tasks)
        is_pair = isinstance(log_std_bounds, Sequence) and len(log_std_bounds) == 2
        check_that("log_std_bounds", log_std_bounds, is_pair, "(lowest, highest)")
        for bound in log_std_bounds:
            check_number("each of log_std_bounds", bound)
        check_that("log_std_bounds", log_std_bounds, log_std_bounds[0] < log_std_bounds[1], "(lowest, highest)")
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            optimizer_kwargs = dict(fused=True)
        # Before super().__init__, which builds the networks
        self.num_tasks = num_tasks
        self.n_heads = n_heads
        self.observe_task = observe_task
        self.log_std_bounds = (float(log_std_bounds[0]), float(log_std_bounds[1]))
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            use_sde,
            log_std_init,
            use_expln,
            clip_mean,
            features_extractor_class or self._default_features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            share_features_extractor=self.share_features_extractor,  # SB3's SACPolicy forgets it
            num_tasks=self.num_tasks,
            n_heads=self.n_heads,
            observe_task=self.observe_task,
            log_std_bounds=self.log_std_bounds,
        )
        return data

    def _network_kwargs(
        self,
        network_kwargs: dict[str, Any],
        features_extractor: BaseFeaturesExtractor | None,
        observe_task: bool,
    ) -> dict[str, Any]:
        """Keyword arguments of an actor or critic, its features extractor made for what the network observes."""
        network_kwargs = {**network_kwargs, "num_tasks": self.num_tasks}
        if self.num_tasks > 1 and not observe_task:
            observation_space = base_observation_space(network_kwargs["observation_space"], self.num_tasks)
            network_kwargs["observation_space"] = observation_space
        if features_extractor is None:
            features_extractor = self.features_extractor_class(
                network_kwargs["observation_space"], **self.features_extractor_kwargs
            )
        return self._update_features_extractor(network_kwargs, features_extractor)

    def shared_optimizers(self) -> dict[str, float | None]:
        """
        :return: Names of the policy's optimisers beside those of actor and critics, for parameters that both use; each with
            the learning rate of its own, None if it is that of actor and critics
        """
        return {}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> MTSACActor:
        kwargs = self._network_kwargs(self.actor_kwargs, features_extractor, self.observe_task)
        return MTSACActor(
            **kwargs, n_heads=self.n_heads, observe_task=self.observe_task, log_std_bounds=self.log_std_bounds
        ).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> MTSACCritic:
        kwargs = self._network_kwargs(self.critic_kwargs, features_extractor, self.observe_task)
        return MTSACCritic(**kwargs, n_heads=self.n_heads, observe_task=self.observe_task).to(self.device)


MlpPolicy = MTSACPolicy


class CnnPolicy(MTSACPolicy):
    """
    Policy for image observations (one task only): ``MTSACPolicy`` with ``NatureCNN`` as its features extractor.
    """

    _default_features_extractor_class = NatureCNN


class MultiInputPolicy(MTSACPolicy):
    """
    Policy for Dict observations (one task only): ``MTSACPolicy`` with ``CombinedExtractor`` as its features extractor.
    """

    _default_features_extractor_class = CombinedExtractor
