"""STARS' features: a compositional branch that tasks share, a unique one of the state, and the triplet loss on the latter."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn

from sb3_mtrl.common.torch_layers import CompositionalExtractor, CompositionalLinear, CompositionalMLP
from sb3_mtrl.common.utils import check_integer, check_widths

# The unique features join the shared ones after this many layers
N_SHARED_LAYERS = 2


class OneSetLinear(CompositionalLinear):
    """
    An ordinary linear layer among compositional ones: one parameter set for all tasks, whatever W is.

    :param in_features: Width of the input
    :param out_features: Width of the output
    :param n_networks: Number N of layers held together
    :param init: Draws the weight of one layer in place, given a tensor ``(out, in)``
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_networks: int = 1,
        init: Callable[[th.Tensor], Any] = nn.init.xavier_uniform_,
    ):
        super().__init__(in_features, out_features, 1, n_networks, init)

    def compose(self, w: th.Tensor, frozen: bool = False) -> tuple[th.Tensor, th.Tensor]:
        """
        :param w: Compositional vectors ``(G, K)``; only their number counts
        :param frozen: Hold the parameters constant
        :return: Weight ``(N, G, in, out)`` and bias ``(N, G, 1, out)``, the same for all G
        """
        weight, bias = (self.weight.detach(), self.bias.detach()) if frozen else (self.weight, self.bias)
        return weight.expand(-1, len(w), -1, -1), bias.unsqueeze(2).expand(-1, len(w), -1, -1)

    def mix(self, x: th.Tensor, w: th.Tensor) -> th.Tensor:
        """
        :param x: Input ``(N, B, in)``
        :param w: Compositional vector of each row ``(B, K)``, unused
        :return: Output ``(N, B, out)``
        """
        return th.baddbmm(self.bias, x, self.weight.squeeze(1))


class SharedUniqueMLP(CompositionalMLP):
    """
    Compositional MLP, some of whose inputs join only after the shared layers.

    Its input holds both side by side: first what the shared layers see, then the ``unique_dim`` unique features. Without
    unique features it is PaCo's network.

    :param in_features: Width of what the shared layers see
    :param out_features: Width of the output
    :param net_arch: Widths of the hidden layers; the first two are the shared ones
    :param n_param_sets: Number K of parameter sets
    :param unique_dim: Width of the unique features
    :param n_networks: Number N of networks held together
    :param compositional_head: Whether the layers after the concatenation are compositional, too
    :param init_hidden: Draws the weight of a hidden layer, see ``CompositionalLinear``
    :param init_output: Draws the weight of the last layer
    :param activation_fn: Activation between the layers
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        net_arch: Sequence[int],
        n_param_sets: int,
        unique_dim: int = 0,
        n_networks: int = 1,
        compositional_head: bool = True,
        init_hidden: Callable[[th.Tensor], Any] = nn.init.xavier_uniform_,
        init_output: Callable[[th.Tensor], Any] = nn.init.xavier_uniform_,
        activation_fn: type[nn.Module] = nn.ReLU,
    ):
        n_shared = min(N_SHARED_LAYERS, len(net_arch))
        dims = [in_features, *net_arch, out_features]
        layers: list[CompositionalLinear] = []
        for index in range(len(dims) - 1):
            init = init_hidden if index < len(net_arch) else init_output
            width = dims[index] + (unique_dim if index == n_shared else 0)
            if index < n_shared or compositional_head:
                layers.append(CompositionalLinear(width, dims[index + 1], n_param_sets, n_networks, init))
            else:
                layers.append(OneSetLinear(width, dims[index + 1], n_networks, init))
        super().__init__(layers, activation_fn)
        self.n_shared = n_shared
        self.unique_dim = unique_dim

    def forward_composed(self, x: th.Tensor, composed: list[tuple[th.Tensor, th.Tensor]]) -> th.Tensor:
        """
        :param x: Input ``(G, b, in + unique_dim)``, shared by the N networks
        :param composed: What ``compose`` returned
        :return: Output ``(N, G, b, out)``
        """

        def layer(index: int, x: th.Tensor) -> th.Tensor:
            return CompositionalLinear.apply_composed(x, *composed[index], is_last=index == len(composed) - 1)

        return self._forward(x, len(composed[0][0]), layer)

    def forward_mixed(self, x: th.Tensor, w: th.Tensor) -> th.Tensor:
        """
        :param x: Input ``(B, in + unique_dim)``, rows of any task in any order
        :param w: Compositional vector of each row ``(B, K)``
        :return: Output ``(N, B, out)``
        """

        def layer(index: int, x: th.Tensor) -> th.Tensor:
            return self.layers[index].mix(x, w)  # type: ignore[operator]

        return self._forward(x, len(self.layers[0].weight), layer)  # type: ignore[arg-type]

    def _forward(self, x: th.Tensor, n_networks: int, layer: Callable[[int, th.Tensor], th.Tensor]) -> th.Tensor:
        x, unique = x.split([x.shape[-1] - self.unique_dim, self.unique_dim], dim=-1)
        x = x.expand(n_networks, *x.shape)
        for index in range(len(self.layers)):
            if index == self.n_shared and self.unique_dim > 0:
                x = th.cat([x, unique.expand(n_networks, *unique.shape)], dim=-1)
            x = self._activate(layer(index, x), index)
        return x


class Triplets(NamedTuple):
    """Rows drawn for each row of a batch of B rows."""

    positives: th.Tensor  # (B,) int64, another row of the same task
    negatives: th.Tensor  # (B,) int64, a row of another task
    valid: th.Tensor  # (B,) bool, whether both exist


def sample_triplets(group_tasks: th.Tensor, batch_size: int, num_tasks: int) -> Triplets:
    """
    Draw for each row another row of its task and a row of another task, both uniformly.

    In an order of the rows in which tasks follow one another, the row of rank r of a task of n rows has the others at ranks
    ``r + 1, ..., r + n - 1`` modulo n, and the rows of other tasks at the ``B - n`` places after the task's own, modulo B: one
    random offset each, and no comparison of all rows with all others. Shapes depend on nothing but those of the arguments.

    :param group_tasks: Task of each group of ``batch_size / G`` successive rows, ``(G,)``, in any order
    :param batch_size: Number B of rows
    :param num_tasks: Number of tasks T
    :return: The rows drawn; where ``valid`` is False they are any rows
    """
    device, group_size = group_tasks.device, batch_size // len(group_tasks)
    order = group_tasks.argsort(stable=True)  # groups in the order of their tasks
    places = th.arange(batch_size, device=device).view(-1, group_size)
    row_at = places[order].reshape(-1)  # row at each place of the sorted batch
    place_of = th.empty_like(row_at).scatter_(0, row_at, places.reshape(-1))
    counts = th.zeros(num_tasks, dtype=th.int64, device=device)
    counts.index_add_(0, group_tasks, th.full_like(group_tasks, group_size))
    tasks = group_tasks.unsqueeze(1).expand(-1, group_size).reshape(-1)  # (B,)
    n_same = counts[tasks]
    start = (counts.cumsum(0) - counts)[tasks]

    def draw(n: th.Tensor) -> th.Tensor:
        # In single precision the product may round up to n
        return th.minimum((th.rand(batch_size, device=device) * n).long(), n - 1).clamp(min=0)

    rank = place_of - start
    positives = start + (rank + 1 + draw(n_same - 1)) % n_same
    negatives = (start + n_same + draw(batch_size - n_same)) % batch_size
    return Triplets(row_at[positives], row_at[negatives], (n_same > 1) & (n_same < batch_size))


def triplet_losses(
    embeddings: th.Tensor,
    group_tasks: th.Tensor,
    num_tasks: int,
    margin: float = 0.5,
    normalize: bool = True,
    dropped: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Triplet loss between tasks: a row's embedding shall be closer to that of another row of its task than to that of a row of
    another task, by a margin.

    Paper: FaceNet, https://arxiv.org/abs/1503.03832 (with squared distances there). ``L_i = max(0, m + |u_i - u_p| - |u_i -
    u_n|)`` with p and n drawn by ``sample_triplets``.

    :param embeddings: ``(B, E)``
    :param group_tasks: Task of each group of B / G successive rows, ``(G,)``, in any order
    :param num_tasks: Number of tasks T
    :param margin: Margin m
    :param normalize: Whether embeddings are first brought to length 1, so that distances lie between 0 and 2
    :param dropped: (T,) bool, tasks whose rows are in no triplet; None: there are none
    :return: Loss of each row ``(B, 1)``, scaled such that the mean over the batch is the mean over the rows that have a
        triplet; and the share of these whose loss is above 0, constant
    """
    triplets = sample_triplets(group_tasks, len(embeddings), num_tasks)
    valid = triplets.valid
    if dropped is not None:
        is_out = dropped[group_tasks].unsqueeze(1).expand(-1, len(embeddings) // len(group_tasks)).reshape(-1)
        valid = valid & ~is_out & ~is_out[triplets.negatives]
        embeddings = th.where(is_out.unsqueeze(1), 0.0, embeddings)
    if normalize:
        embeddings = nn.functional.normalize(embeddings, dim=1)
    losses = nn.functional.triplet_margin_loss(
        embeddings,
        embeddings.index_select(0, triplets.positives),
        embeddings.index_select(0, triplets.negatives),
        margin=margin,
        reduction="none",
    )
    losses = th.where(valid, losses, 0.0)
    n_valid = valid.sum().clamp(min=1)
    return (losses * (len(losses) / n_valid)).unsqueeze(1), (losses.detach() > 0).sum() / n_valid


class SharedUniqueExtractor(BaseFeaturesExtractor):
    """
    STARS' shared and unique features side by side, as a features extractor for any SB3 algorithm.

    After the published description of STARS, https://arxiv.org/abs/2406.00761; see ``STARSSAC`` for what had to be filled
    in. The shared features are PaCo's (``CompositionalExtractor``, the extractor owns its W), the unique ones an MLP's on the
    whole observation. There is no triplet loss: that needs the algorithm's part (``triplet_losses`` on
    ``unique(observations)``, if you write one).

    :param observation_space: Box of shape ``(n + num_tasks,)`` with the task's one-hot at its end; with one task any ``(n,)``
    :param num_tasks: Number of tasks T
    :param n_param_sets: Number of parameter sets K of the shared branch
    :param net_arch: Widths of the shared, compositional layers
    :param unique_dim: Number E of unique features; 0: none
    :param unique_arch: Widths of the hidden layers of the unique branch
    :param w_init: See ``init_compositional_vectors``
    :param activation_fn: Activation of both branches (the unique features themselves are linear)
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        observation_space: gym.spaces.Box,
        num_tasks: int,
        n_param_sets: int = 5,
        net_arch: Sequence[int] = (400, 400),
        unique_dim: int = 64,
        unique_arch: Sequence[int] = (400, 400),
        w_init: str = "normal",
        activation_fn: type[nn.Module] = nn.ReLU,
    ):
        unique_dim = check_integer("unique_dim", unique_dim, 0)
        check_widths("unique_arch", unique_arch)
        shared = CompositionalExtractor(observation_space, num_tasks, n_param_sets, net_arch, w_init, activation_fn)
        super().__init__(observation_space, features_dim=shared.features_dim + unique_dim)
        self.shared = shared
        self.unique: nn.Module | None = None
        if unique_dim > 0:
            self.unique = nn.Sequential(*create_mlp(observation_space.shape[0], unique_dim, list(unique_arch), activation_fn))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(B, n + T)``
        :return: Features ``(B, features_dim)``
        """
        shared = self.shared(observations)
        return shared if self.unique is None else th.cat([shared, self.unique(observations)], dim=1)
