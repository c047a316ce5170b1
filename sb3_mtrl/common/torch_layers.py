"""Layers and features extractors; each idea is written here once and used by the algorithms and by plain SB3 alike."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mtrl.common.utils import split_observation

W_INITS = ("normal", "onehot", "simplex", "uniform")
W_ACTIVATIONS = ("identity", "softmax", "l2")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """
    :param name: Name of the argument
    :param value: Value got
    :param allowed: Values allowed
    :raises ValueError: if the value is not allowed
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


class StackedMLP(nn.Module):
    """
    ``n_networks`` MLPs of one shape, evaluated in one batched product per layer.

    The weights are those of ``n_networks`` ordinary MLPs made one after the other (``create_mlp``), so equal seeds give equal
    networks.

    :param networks: The MLPs to stack: ``nn.Sequential`` of ``nn.Linear`` and parameterless activations
    """

    def __init__(self, networks: Sequence[nn.Sequential]):
        super().__init__()
        self.n_networks = len(networks)
        self.weights = nn.ParameterList()  # of (N, in, out)
        self.biases = nn.ParameterList()  # of (N, 1, out)
        self.activations = nn.ModuleList()  # of what stands between the linear layers
        pending: list[nn.Module] = []
        for layers in zip(*networks, strict=True):
            if isinstance(layers[0], nn.Linear):
                self.weights.append(nn.Parameter(th.stack([layer.weight.detach().t() for layer in layers]).contiguous()))
                self.biases.append(nn.Parameter(th.stack([layer.bias.detach()[None] for layer in layers])))
                if len(self.weights) > 1:
                    self.activations.append(nn.Sequential(*pending))
                pending = []
            else:
                pending.append(layers[0])
        self.output_activation = nn.Sequential(*pending)

    def forward(self, x: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param x: Input ``(B, in)``, shared by all networks
        :param frozen: Hold the parameters constant: the gradient flows to ``x`` only
        :return: Outputs ``(N, B, out)``
        """
        x = x.expand(self.n_networks, *x.shape)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if index > 0:
                x = self.activations[index - 1](x)
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = th.baddbmm(bias, x, weight)  # (N, B, out)
        return self.output_activation(x)


class TaskHeads(nn.Module):
    """
    One linear output layer per task (multi-head networks, Yu et al. 2020, https://arxiv.org/abs/1910.10897).

    :param in_features: Width of the input
    :param out_features: Width of each head's output
    :param num_tasks: Number of tasks T
    :param n_networks: Number N of networks that each have such heads
    """

    def __init__(self, in_features: int, out_features: int, num_tasks: int, n_networks: int = 1):
        super().__init__()
        self.num_tasks = num_tasks
        heads = [nn.Linear(in_features, out_features) for _ in range(n_networks * num_tasks)]
        weight = th.stack([head.weight.detach().t() for head in heads])
        bias = th.stack([head.bias.detach() for head in heads])
        self.weight = nn.Parameter(weight.view(n_networks, num_tasks, in_features, out_features))
        self.bias = nn.Parameter(bias.view(n_networks, num_tasks, 1, out_features))

    def forward(self, x: th.Tensor, one_hot: th.Tensor, n_groups: int | None = None, frozen: bool = False) -> th.Tensor:
        """
        :param x: Input ``(N, B, in)``
        :param one_hot: Task of each row, ``(B, T)``
        :param n_groups: Number G of groups of B / G successive rows that share their task; None: rows of any task in any order
        :param frozen: Hold the parameters constant
        :return: Each row's output of its own task's head, ``(N, B, out)``
        """
        weight, bias = (self.weight.detach(), self.bias.detach()) if frozen else (self.weight, self.bias)
        n_networks, batch_size, in_features = x.shape
        if n_groups is None:
            # All heads in one product, then each row keeps its own
            outputs = th.einsum("nbi,ntio->nbto", x, weight) + bias.squeeze(2).unsqueeze(1)
            return (outputs * one_hot[None, :, :, None]).sum(dim=2)
        group_tasks = one_hot.view(n_groups, -1, self.num_tasks)[:, 0].argmax(dim=1)
        weight, bias = weight[:, group_tasks].flatten(0, 1), bias[:, group_tasks].flatten(0, 1)  # (N G, in, out)
        grouped = x.reshape(n_networks * n_groups, -1, in_features)
        return th.baddbmm(bias, grouped, weight).view(n_networks, batch_size, -1)


class GradientGate:
    """
    Stops the gradients of dropped groups where they enter the composed parameters.

    Zeroing the loss of an exploding task is not enough when its activations are infinite or NaN: the chain rule multiplies
    them by zero, which is NaN, and the shared parameter sets would receive it. Composed parameters belong to one group each,
    so there the gradient of a dropped group can be replaced by zero before it reaches anything shared.
    """

    def __init__(self) -> None:
        self.dropped_groups: th.Tensor | None = None  # (G,) bool, None: nothing is dropped

    def attach(self, composed: th.Tensor) -> None:
        """
        :param composed: Composed parameter, groups on its second axis: ``(N, G, ...)``
        """
        if composed.requires_grad:
            composed.register_hook(self._gate)

    def _gate(self, grad: th.Tensor) -> th.Tensor | None:
        if self.dropped_groups is None:
            return None
        dropped = self.dropped_groups.view(1, -1, *[1] * (grad.dim() - 2))
        return th.where(dropped, 0.0, grad)


class CompositionalLinear(nn.Module):
    """
    Linear layer with K parameter sets: ``y = sum_k w_k (x Phi_k + c_k)``.

    Paper: Parameter-Compositional Multi-Task Reinforcement Learning, https://arxiv.org/abs/2210.11653, equations 1 and 2.
    ``N`` independent layers of the same shape may be held together and are evaluated in one product.

    :param in_features: Width of the input
    :param out_features: Width of the output
    :param n_param_sets: Number K of parameter sets
    :param n_networks: Number N of layers held together
    :param init: Draws the weight of one layer in place, given a tensor ``(out, in)``; every parameter set starts as the same
        draw
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_param_sets: int,
        n_networks: int = 1,
        init: Callable[[th.Tensor], Any] = nn.init.xavier_uniform_,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(th.empty(n_networks, n_param_sets, in_features, out_features))  # Phi
        self.bias = nn.Parameter(th.zeros(n_networks, n_param_sets, out_features))  # c
        with th.no_grad():
            for network_weight in self.weight:
                one_set = th.empty(out_features, in_features)
                init(one_set)
                network_weight.copy_(one_set.t())  # the same for all k

    def compose(self, w: th.Tensor, frozen: bool = False) -> tuple[th.Tensor, th.Tensor]:
        """
        Parameters of the groups, ``theta_g = sum_k w_gk Phi_k``.

        :param w: Compositional vectors ``(G, K)``
        :param frozen: Hold Phi and w constant
        :return: Weight ``(N, G, in, out)`` and bias ``(N, G, 1, out)``
        """
        weight, bias = (self.weight.detach(), self.bias.detach()) if frozen else (self.weight, self.bias)
        if frozen:
            w = w.detach()
        n_networks, n_groups = len(weight), len(w)
        composed_weight = th.matmul(w, weight.flatten(2)).view(n_networks, n_groups, self.in_features, self.out_features)
        return composed_weight, th.matmul(w, bias).unsqueeze(2)

    @staticmethod
    def apply_composed(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        """
        :param x: Input ``(N, G, b, in)``
        :param weight: Composed weight ``(N, G, in, out)``
        :param bias: Composed bias ``(N, G, 1, out)``
        :return: Output ``(N, G, b, out)``
        """
        y = th.baddbmm(bias.flatten(0, 1), x.flatten(0, 1), weight.flatten(0, 1))
        return y.view(*x.shape[:-1], -1)

    def mix(self, x: th.Tensor, w: th.Tensor) -> th.Tensor:
        """
        The same function for rows of any task in any order: the outputs of the K sets, mixed.

        :param x: Input ``(N, B, in)``
        :param w: Compositional vector of each row ``(B, K)``
        :return: Output ``(N, B, out)``
        """
        outputs = th.einsum("nbi,nkio->nbko", x, self.weight) + self.bias.unsqueeze(1)
        return (outputs * w[None, :, :, None]).sum(dim=2)


class CompositionalMLP(nn.Module):
    """
    MLP whose linear layers are all compositional, ``theta_t = sum_k w_tk phi_k``; activations between them.

    :param layers: The layers, first to last
    :param activation_fn: Activation between them
    :param activate_output: Also apply the activation after the last layer
    """

    def __init__(
        self,
        layers: Sequence[CompositionalLinear],
        activation_fn: type[nn.Module] = nn.ReLU,
        activate_output: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = activation_fn()
        self.activate_output = activate_output

    def _activate(self, x: th.Tensor, index: int) -> th.Tensor:
        return self.activation(x) if index < len(self.layers) - 1 or self.activate_output else x

    def compose(
        self, w: th.Tensor, frozen: bool = False, gate: GradientGate | None = None
    ) -> list[tuple[th.Tensor, th.Tensor]]:
        """
        :param w: Compositional vectors ``(G, K)``
        :param frozen: Hold parameters and vectors constant
        :param gate: Stops the gradients of dropped groups
        :return: Weight ``(N, G, in, out)`` and bias ``(N, G, 1, out)`` of each layer
        """
        composed = [layer.compose(w, frozen) for layer in self.layers]  # type: ignore[operator]
        if gate is not None:
            for weight, bias in composed:
                gate.attach(weight)
                gate.attach(bias)
        return composed

    def forward_composed(self, x: th.Tensor, composed: list[tuple[th.Tensor, th.Tensor]]) -> th.Tensor:
        """
        :param x: Input ``(G, b, in)``, shared by the N networks
        :param composed: What ``compose`` returned
        :return: Output ``(N, G, b, out)``
        """
        x = x.expand(len(composed[0][0]), *x.shape)
        for index, (weight, bias) in enumerate(composed):
            x = self._activate(CompositionalLinear.apply_composed(x, weight, bias), index)
        return x

    def forward_mixed(self, x: th.Tensor, w: th.Tensor) -> th.Tensor:
        """
        :param x: Input ``(B, in)``, rows of any task in any order
        :param w: Compositional vector of each row ``(B, K)``
        :return: Output ``(N, B, out)``
        """
        x = x.expand(len(self.layers[0].weight), *x.shape)  # type: ignore[arg-type]
        for index, layer in enumerate(self.layers):
            x = self._activate(layer.mix(x, w), index)  # type: ignore[operator]
        return x


def init_compositional_vectors(num_tasks: int, n_param_sets: int, w_init: str) -> th.Tensor:
    """
    Starting values of W.

    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param w_init: ``"normal"``: N(0, 1), as in the authors' code; ``"onehot"``: the identity, needs K = T (the paper's table
        3); ``"simplex"``: rows uniform on the simplex, Dirichlet(1, ..., 1), so that every task starts from the same network;
        ``"uniform"``: rows of U(0, 1) draws divided by their sum, closer to the centre of the simplex. (Constant rows are not
        offered: all parameter sets start equal and would stay equal.)
    :return: W, shape ``(T, K)``
    :raises ValueError: for another ``w_init``, K below 1, or ``"onehot"`` with K other than T
    """
    check_choice("w_init", w_init, W_INITS)
    if n_param_sets < 1:
        raise ValueError(f"n_param_sets must be at least 1, got {n_param_sets}")
    if w_init == "normal":
        return th.randn(num_tasks, n_param_sets)
    if w_init == "onehot":
        if n_param_sets != num_tasks:
            raise ValueError(f"w_init='onehot' needs n_param_sets equal to num_tasks={num_tasks}, got {n_param_sets}")
        return th.eye(num_tasks)
    draws = th.rand(num_tasks, n_param_sets)
    if w_init == "simplex":
        draws = -th.log1p(-draws)  # Exp(1)
    return draws / draws.sum(dim=1, keepdim=True)


def activate_compositional_vectors(w: th.Tensor, w_activation: str) -> th.Tensor:
    """
    :param w: W, shape ``(T, K)``
    :param w_activation: ``"identity"``, ``"softmax"`` or ``"l2"`` (rows of length 1; for pictures of the K = 2 subspace)
    :return: What the layers use, shape ``(T, K)``. A row that is not finite is replaced by zeros, so that it cannot reach
        other tasks.
    """
    w = th.where(w.isfinite().all(dim=1, keepdim=True), w, 0.0)
    if w_activation == "softmax":
        return w.softmax(dim=1)
    if w_activation == "l2":
        return nn.functional.normalize(w, dim=1)
    return w


class CompositionalExtractor(BaseFeaturesExtractor):
    """
    PaCo's compositional layers as a features extractor for any SB3 algorithm.

    Paper: Parameter-Compositional Multi-Task Reinforcement Learning, https://arxiv.org/abs/2210.11653. The extractor owns its
    W; unlike in ``PaCoSAC``, actor and critic of e.g. ``SAC`` then have one each.

    :param observation_space: Box of shape ``(n + num_tasks,)`` with the task's one-hot at its end; with one task any ``(n,)``
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K
    :param net_arch: Widths of the compositional layers; the last one is the number of features
    :param w_init: See ``init_compositional_vectors``
    :param activation_fn: Activation after each layer
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        observation_space: gym.spaces.Box,
        num_tasks: int,
        n_param_sets: int = 5,
        net_arch: Sequence[int] = (400, 400),
        w_init: str = "normal",
        activation_fn: type[nn.Module] = nn.ReLU,
    ):
        if len(net_arch) == 0:
            raise ValueError("net_arch must name at least one layer width, got none")
        if num_tasks != 1:
            base_observation_space(observation_space, num_tasks)  # refuses one without room for the one-hot
        obs_dim = observation_space.shape[0] - (num_tasks if num_tasks > 1 else 0)
        super().__init__(observation_space, features_dim=net_arch[-1])
        self.num_tasks = num_tasks
        self.compositional_vectors = nn.Parameter(init_compositional_vectors(num_tasks, n_param_sets, w_init))
        dims = [obs_dim, *net_arch]
        layers = [CompositionalLinear(dims[i], dims[i + 1], n_param_sets) for i in range(len(net_arch))]
        self.mlp = CompositionalMLP(layers, activation_fn, activate_output=True)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(B, n + T)``
        :return: Features ``(B, features_dim)``
        """
        w = activate_compositional_vectors(self.compositional_vectors, "identity")
        if self.num_tasks == 1:
            return self.mlp.forward_mixed(observations, w.expand(len(observations), -1)).squeeze(0)
        base, one_hot = split_observation(observations, self.num_tasks)
        return self.mlp.forward_mixed(base, one_hot @ w).squeeze(0)


def base_observation_space(observation_space: gym.spaces.Space, num_tasks: int) -> gym.spaces.Box:
    """
    The observation space without the task's one-hot.

    :param observation_space: Box of shape ``(n + num_tasks,)``
    :param num_tasks: Number of tasks T
    :return: Box of shape ``(n,)``
    :raises ValueError: if the space is not such a Box, or ``num_tasks`` is below 1
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    if (
        not isinstance(observation_space, gym.spaces.Box)
        or len(observation_space.shape) != 1
        or observation_space.shape[0] <= num_tasks
    ):
        raise ValueError(
            f"observation_space must be a Box of shape (n + {num_tasks},) that ends in the one-hot of {num_tasks} tasks, "
            f"got {observation_space}"
        )
    low, high = observation_space.low[:-num_tasks], observation_space.high[:-num_tasks]
    return gym.spaces.Box(low, high, dtype=observation_space.dtype.type)


__all__ = [
    "CompositionalExtractor",
    "CompositionalLinear",
    "CompositionalMLP",
    "GradientGate",
    "StackedMLP",
    "TaskHeads",
    "activate_compositional_vectors",
    "base_observation_space",
    "check_choice",
    "init_compositional_vectors",
]
