"""Layers and features extractors; each idea is written here once and used by the algorithms and by plain SB3 alike."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn

from sb3_mtrl.common.utils import check_choice, check_integer, check_widths, split_observation

W_INITS = ("normal", "onehot", "simplex", "uniform")
W_ACTIVATIONS = ("identity", "softmax", "l2")


def precise_baddbmm(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    ``baddbmm`` that stays in float32 under autocast, for the last layer of critics: bfloat16 has 8 bits, and a value of 1000
    rounded to them is off by up to 2.

    :param bias: ``(N, 1, out)``
    :param x: ``(N, B, in)``
    :param weight: ``(N, in, out)``
    :return: ``(N, B, out)``
    """
    if not th.is_autocast_enabled(x.device.type):
        return th.baddbmm(bias, x, weight)
    with th.autocast(x.device.type, enabled=False):
        return th.baddbmm(bias.float(), x.float(), weight.float())


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
            is_last = index == len(self.weights) - 1
            x = (precise_baddbmm if is_last else th.baddbmm)(bias, x, weight)  # (N, B, out)
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
        return precise_baddbmm(bias, grouped, weight).view(n_networks, batch_size, -1)


class GradientGate:
    """
    Stops the gradients of dropped tasks where they enter the composed parameters.

    Zeroing the loss of an exploding task is not enough when its activations are infinite or NaN: the chain rule multiplies
    them by zero, which is NaN, and the shared parameter sets would receive it. Composed parameters belong to one task each,
    so there the gradient of a dropped task can be replaced by zero before it reaches anything shared.
    """

    def __init__(self) -> None:
        self.dropped_tasks: th.Tensor | None = None  # (T,) bool, None: nothing is dropped

    def attach(self, composed: th.Tensor, tasks: th.Tensor | None = None) -> None:
        """
        :param composed: Composed parameter (or another tensor made of parts that belong to one task each), the parts on its
            second axis: ``(N, G, ...)``
        :param tasks: Task of each part ``(G,)``; None: part t is task t's
        """

        def stop(grad: th.Tensor) -> th.Tensor | None:
            if self.dropped_tasks is None:
                return None
            dropped = self.dropped_tasks if tasks is None else self.dropped_tasks[tasks]
            return th.where(dropped.view(1, -1, *[1] * (grad.dim() - 2)), 0.0, grad)

        if composed.requires_grad:
            composed.register_hook(stop)


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
        # One product (G, K) by (K, in out) per network. matmul would fold the networks into it, and the backward pass would
        # transpose all of Phi for that
        w = w.expand(len(weight), -1, -1)
        composed_weight = th.bmm(w, weight.flatten(2)).unflatten(2, (self.in_features, self.out_features))
        return composed_weight, th.bmm(w, bias).unsqueeze(2)

    @staticmethod
    def apply_composed(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, is_last: bool = False) -> th.Tensor:
        """
        :param x: Input ``(N, G, b, in)``
        :param weight: Composed weight ``(N, G, in, out)``
        :param bias: Composed bias ``(N, G, 1, out)``
        :param is_last: Whether it is the last layer, see ``precise_baddbmm``
        :return: Output ``(N, G, b, out)``
        """
        product = precise_baddbmm if is_last else th.baddbmm
        y = product(bias.flatten(0, 1), x.flatten(0, 1), weight.flatten(0, 1))
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
        self, w: th.Tensor, frozen: bool = False, gate: GradientGate | None = None, tasks: th.Tensor | None = None
    ) -> list[tuple[th.Tensor, th.Tensor]]:
        """
        :param w: Compositional vectors ``(G, K)``
        :param frozen: Hold parameters and vectors constant
        :param gate: Stops the gradients of dropped tasks
        :param tasks: Task of each vector ``(G,)``, for the gate; None: vector t is task t's
        :return: Weight ``(N, G, in, out)`` and bias ``(N, G, 1, out)`` of each layer
        """
        composed = [layer.compose(w, frozen) for layer in self.layers]  # type: ignore[operator]
        if gate is not None:
            for weight, bias in composed:
                gate.attach(weight, tasks)
                gate.attach(bias, tasks)
        return composed

    def forward_composed(self, x: th.Tensor, composed: list[tuple[th.Tensor, th.Tensor]]) -> th.Tensor:
        """
        :param x: Input ``(G, b, in)``, shared by the N networks
        :param composed: What ``compose`` returned
        :return: Output ``(N, G, b, out)``
        """
        x = x.expand(len(composed[0][0]), *x.shape)
        for index, (weight, bias) in enumerate(composed):
            is_last = index == len(composed) - 1
            x = self._activate(CompositionalLinear.apply_composed(x, weight, bias, is_last), index)
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
    n_param_sets = check_integer("n_param_sets", n_param_sets, 1)
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
        check_widths("net_arch", net_arch)
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


def xavier_init_(module: nn.Module) -> None:
    """
    Xavier-uniform weights and zero biases for every linear layer below a module, and for every network of a ``StackedMLP``.

    :param module: Changed in place; other layers (embeddings, LSTM cells) stay as they are
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, StackedMLP):
            for weight, bias in zip(part.weights, part.biases, strict=True):
                for network_weight in weight.unbind(0):
                    nn.init.xavier_uniform_(network_weight)
                nn.init.zeros_(bias)


class Experts(StackedMLP):
    """
    k expert MLPs on one input, all evaluated together; no activation after their last layer.

    Paper: Contrastive Modules with Temporal Attention, https://arxiv.org/abs/2311.01075.

    :param in_features: Width of the input
    :param out_features: Width of each expert's output
    :param n_experts: Number k of experts
    :param net_arch: Widths of the hidden layers, at least one
    :param activation_fn: Activation between the layers
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_experts: int = 6,
        net_arch: Sequence[int] = (64,),
        activation_fn: type[nn.Module] = nn.ReLU,
    ):
        n_experts = check_integer("n_experts", n_experts, 1)
        check_widths("expert_arch", net_arch)
        if len(net_arch) == 0:
            raise ValueError("expert_arch must name at least one layer width, got none")
        layers = [create_mlp(in_features, out_features, list(net_arch), activation_fn) for _ in range(n_experts)]
        super().__init__([nn.Sequential(*expert_layers) for expert_layers in layers])
        xavier_init_(self)

    def forward(self, x: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param x: Input ``(B, in)``, shared by all experts
        :param frozen: Hold the parameters constant: the gradient flows to ``x`` only
        :return: Outputs ``(k, B, out)``
        """
        weight, bias = self._layer(-1, frozen)
        return th.baddbmm(bias, self.last_hidden(x, frozen), weight)

    def mix(self, x: th.Tensor, gate_weights: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        The weighted sum of the experts' outputs without forming these: the weights go into the last product.

        :param x: Input ``(B, in)``
        :param gate_weights: Weight of each expert for each row ``(B, k)``
        :param frozen: Hold the parameters constant: the gradient flows to ``x`` and the weights only
        :return: Mixture ``(B, out)``
        """
        weight, bias = self._layer(-1, frozen)
        weighted = self.last_hidden(x, frozen) * gate_weights.t().unsqueeze(2)  # (k, B, h)
        weighted = weighted.transpose(0, 1).flatten(1)  # (B, k h)
        return th.addmm(gate_weights @ bias.squeeze(1), weighted, weight.flatten(0, 1))

    def _layer(self, index: int, frozen: bool) -> tuple[th.Tensor, th.Tensor]:
        weight, bias = self.weights[index], self.biases[index]
        return (weight.detach(), bias.detach()) if frozen else (weight, bias)

    def last_hidden(self, x: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param x: Input ``(B, in)``
        :param frozen: Hold the parameters constant: the gradient flows to ``x`` only
        :return: Input of the experts' last layer, ``(k, B, h)``
        """
        weight, bias = self._layer(0, frozen)
        # The input is shared, so the first layers of all experts are one wide product
        hidden = th.addmm(bias.reshape(-1), x, weight.transpose(0, 1).reshape(x.shape[1], -1))  # (B, k h)
        hidden = self.activations[0](hidden.unflatten(1, (self.n_networks, -1)).transpose(0, 1))
        for index in range(1, len(self.weights) - 1):
            weight, bias = self._layer(index, frozen)
            hidden = self.activations[index](th.baddbmm(bias, hidden, weight))
        return hidden


class ExpertGate(nn.Module):
    """
    Soft attention over experts: one linear layer and a softmax.

    :param context_dim: Width of the context
    :param n_experts: Number k of experts
    """

    def __init__(self, context_dim: int, n_experts: int):
        super().__init__()
        self.linear = nn.Linear(context_dim, n_experts)
        xavier_init_(self)

    def forward(self, context: th.Tensor) -> th.Tensor:
        """
        :param context: ``(B, context_dim)``
        :return: Weight of each expert, ``(B, k)``; rows sum to 1
        """
        return self.linear(context).softmax(dim=1)


class TaskEncoder(nn.Module):
    """
    A representation of each task, learned from its id: an embedding followed by an MLP.

    Paper: CARE, https://arxiv.org/abs/2102.06177, and CMTA, https://arxiv.org/abs/2311.01075 (which learns the embedding from
    scratch).

    :param num_tasks: Number of tasks T
    :param out_features: Width of the representation
    :param embedding_dim: Width of the embedding
    :param net_arch: Widths of the MLP's hidden layers
    :param pretrained_embeddings: Vectors ``(T, d)`` to use instead of a learned embedding, e.g. of sentences that describe the
        tasks; they stay as they are
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        num_tasks: int,
        out_features: int = 64,
        embedding_dim: int = 64,
        net_arch: Sequence[int] = (128, 64, 64),
        pretrained_embeddings: Any = None,
    ):
        super().__init__()
        if pretrained_embeddings is None:
            # Standard normal, as torch's nn.Embedding
            self.embeddings = nn.Parameter(th.randn(num_tasks, embedding_dim))
        else:
            vectors = th.as_tensor(pretrained_embeddings, dtype=th.float32)
            if vectors.dim() != 2 or len(vectors) != num_tasks:
                raise ValueError(
                    f"pretrained_task_embeddings must have shape ({num_tasks}, d), one vector per task, "
                    f"got {tuple(vectors.shape)}"
                )
            embedding_dim = vectors.shape[1]
            self.embeddings = nn.Parameter(vectors.clone(), requires_grad=False)
        # What is learned may be cut at zero like any hidden layer; vectors of another model would lose their signs
        first_activation = [nn.ReLU()] if pretrained_embeddings is None else []
        self.mlp = nn.Sequential(*first_activation, *create_mlp(embedding_dim, out_features, list(net_arch)))
        xavier_init_(self)

    def forward(self) -> th.Tensor:
        """
        :return: Representations of all tasks, ``(T, out)``. Those of a batch are ``one_hot @ encoder()``: the MLP works on T
            rows, however large the batch.
        """
        return self.mlp(self.embeddings)


class ExpertMixtureExtractor(BaseFeaturesExtractor):
    """
    CMTA's mixture of experts without its memory, as a features extractor for any SB3 algorithm.

    Paper: Contrastive Modules with Temporal Attention, https://arxiv.org/abs/2311.01075. The experts see the observation
    without the one-hot, a gate on the task alone weighs them, and the features are the mixture and the task's representation
    side by side. As in ``CMTASAC`` the representation learns through the features only, not through the gate. There is no
    contrastive loss: that needs the algorithm's part.

    :param observation_space: Box of shape ``(n + num_tasks,)`` with the task's one-hot at its end
    :param num_tasks: Number of tasks T
    :param n_experts: Number k of experts
    :param expert_arch: Widths of the experts' hidden layers
    :param feature_dim: Width of the experts' outputs
    :param task_embedding_dim: Width of the task embedding and of the task's representation
    :param task_encoder_arch: Widths of the hidden layers between the two
    :param pretrained_task_embeddings: See ``TaskEncoder``
    :param activation_fn: Activation of the experts
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        observation_space: gym.spaces.Box,
        num_tasks: int,
        n_experts: int = 6,
        expert_arch: Sequence[int] = (64,),
        feature_dim: int = 64,
        task_embedding_dim: int = 64,
        task_encoder_arch: Sequence[int] = (128, 64, 64),
        pretrained_task_embeddings: Any = None,
        activation_fn: type[nn.Module] = nn.ReLU,
    ):
        obs_dim = base_observation_space(observation_space, num_tasks).shape[0]
        super().__init__(observation_space, features_dim=feature_dim + task_embedding_dim)
        self.num_tasks = num_tasks
        self.task_encoder = TaskEncoder(
            num_tasks, task_embedding_dim, task_embedding_dim, task_encoder_arch, pretrained_task_embeddings
        )
        self.experts = Experts(obs_dim, feature_dim, n_experts, expert_arch, activation_fn)
        self.gate = ExpertGate(task_embedding_dim, n_experts)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(B, n + T)``
        :return: Features ``(B, features_dim)``
        """
        base, one_hot = split_observation(observations, self.num_tasks)
        z = one_hot @ self.task_encoder()  # (B, task_embedding_dim)
        return th.cat([self.experts.mix(base, self.gate(z.detach())), z], dim=1)


def expert_similarities(outputs: th.Tensor) -> th.Tensor:
    """
    Cosine similarity of every pair of experts at each row.

    :param outputs: Outputs of the experts ``(k, B, D)``
    :return: ``(B, k, k)``
    """
    directions = nn.functional.normalize(outputs, dim=-1).transpose(0, 1)  # (B, k, D)
    return directions @ directions.transpose(1, 2)


def info_nce_losses(outputs: th.Tensor, next_outputs: th.Tensor, temperature: float = 0.1) -> tuple[th.Tensor, th.Tensor]:
    """
    InfoNCE between experts: each is drawn to what it says of the next observation and pushed from what the others say of this.

    Paper: Contrastive Modules with Temporal Attention, https://arxiv.org/abs/2311.01075. With unit vectors q_i of this
    observation, p_i of the next one and ``e_i = e^(q_i p_i / t)``,
    ``L = sum_i -log(e_i / (e_i + sum_(j != i) e^(q_i q_j / t)))``.

    :param outputs: Outputs of the experts ``(k, B, D)``
    :param next_outputs: Outputs of the target experts at the next observations ``(k, B, D)``; no gradient reaches them
    :param temperature: Temperature t of the cosines
    :return: L of each row ``(B, 1)``, and ``expert_similarities(outputs)``, constant
    """
    similarities = expert_similarities(outputs)
    positives = nn.functional.cosine_similarity(outputs, next_outputs.detach(), dim=-1, eps=1e-12).t()  # (B, k)
    # An expert's similarity with itself is no negative: the positive takes its place on the diagonal
    is_self = th.eye(len(outputs), dtype=th.bool, device=outputs.device)
    logits = th.where(is_self, positives.unsqueeze(2), similarities) / temperature
    losses = logits.logsumexp(dim=2) - positives / temperature  # (B, k)
    return losses.sum(dim=1, keepdim=True), similarities.detach()


def base_observation_space(observation_space: gym.spaces.Space, num_tasks: int) -> gym.spaces.Box:
    """
    The observation space without the task's one-hot.

    :param observation_space: Box of shape ``(n + num_tasks,)``
    :param num_tasks: Number of tasks T
    :return: Box of shape ``(n,)``
    :raises ValueError: if the space is not such a Box, or ``num_tasks`` is below 1
    """
    num_tasks = check_integer("num_tasks", num_tasks, 1)
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
    "ExpertGate",
    "ExpertMixtureExtractor",
    "Experts",
    "GradientGate",
    "StackedMLP",
    "TaskEncoder",
    "TaskHeads",
    "activate_compositional_vectors",
    "base_observation_space",
    "expert_similarities",
    "info_nce_losses",
    "init_compositional_vectors",
    "xavier_init_",
]
