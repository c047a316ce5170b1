"""How actors and critics are composed of parameter sets: W as they see it, and how they start."""

import math

import torch as th
from torch import nn

from sb3_mtrl.common.torch_layers import CompositionalMLP, GradientGate, activate_compositional_vectors
from sb3_mtrl.common.utils import needs_static_shapes

# Arguments of SB3's actor that compositional ones do not have
GSDE_ARGUMENTS = ("use_sde", "log_std_init", "use_expln", "clip_mean")


class TaskVectors:
    """
    The compositional vectors of all tasks, W, as the networks see them.

    Actor, critics and target critics hold one and the same object and none of them registers W among its parameters: it has
    its own optimiser, and the soft update of the target critics must not touch it.

    :param w: W, shape ``(T, K)``, owned by the policy
    :param activation: See ``activate_compositional_vectors``
    """

    def __init__(self, w: nn.Parameter, activation: str):
        self.w = w
        self.activation = activation
        self.gate = GradientGate()

    def __call__(self) -> th.Tensor:
        """
        :return: What the layers use, ``(T, K)``
        """
        return activate_compositional_vectors(self.w, self.activation)

    def forward(
        self,
        network: CompositionalMLP,
        x: th.Tensor,
        one_hot: th.Tensor | None,
        n_groups: int | None,
        frozen: bool = False,
    ) -> th.Tensor:
        """
        Evaluate a compositional network.

        :param network: The network
        :param x: Input ``(B, in)``
        :param one_hot: Task of each row ``(B, T)``; None with one task
        :param n_groups: Number G of groups of B / G successive rows that share their task; None: rows of any task in any order
        :param frozen: Hold the network and W constant
        :return: Output ``(N, B, out)`` or ``(N, G, B / G, out)``
        """
        w = self()
        if one_hot is not None and n_groups is None:
            if frozen:
                raise ValueError("frozen needs rows in groups that share their task")
            return network.forward_mixed(x, one_hot @ w)
        if one_hot is None:
            return network.forward_composed(x.unsqueeze(0), network.compose(w, frozen, self.gate))
        assert n_groups is not None
        group_one_hot = one_hot.view(n_groups, -1, len(w))[:, 0]  # (G, T)
        group_tasks = group_one_hot.argmax(dim=1)
        if n_groups <= len(w):
            composed = network.compose(group_one_hot @ w, frozen, self.gate, group_tasks)
            return network.forward_composed(x.view(n_groups, -1, x.shape[1]), composed)
        # Several groups of one task: still composed once per task
        return forward_groups(network, x.view(n_groups, -1, x.shape[1]), network.compose(w, frozen, self.gate), group_tasks)


def forward_groups(
    network: CompositionalMLP, x: th.Tensor, composed: list[tuple[th.Tensor, th.Tensor]], group_tasks: th.Tensor
) -> th.Tensor:
    """
    Evaluate a compositional network on groups of any tasks.

    :param network: The network
    :param x: Input ``(G, b, in)``
    :param composed: Its parameters, composed for each task
    :param group_tasks: Task of each group ``(G,)``
    :return: Output ``(N, G, b, out)``
    """
    if needs_static_shapes(group_tasks):
        # The copies are cheap on a GPU
        selected = [(weight.index_select(1, group_tasks), bias.index_select(1, group_tasks)) for weight, bias in composed]
        return network.forward_composed(x, selected)
    runs, n_runs = th.unique_consecutive(group_tasks, return_counts=True)
    num_tasks = composed[0][0].shape[1]
    if th.equal(runs, th.arange(num_tasks)) and (n_runs == n_runs[0]).all():
        # Equal shares: one product for all tasks
        output = network.forward_composed(x.reshape(num_tasks, -1, x.shape[2]), composed)  # (N, T, B / T, out)
        return output.view(len(output), *x.shape[:2], -1)
    by_task = [list(zip(*(part.split(1, dim=1) for part in layer), strict=True)) for layer in composed]
    outputs = [
        network.forward_composed(rows.flatten(0, 1).unsqueeze(0), [layer[task] for layer in by_task])
        for task, rows in zip(runs.tolist(), x.split(n_runs.tolist()), strict=True)
    ]
    output = th.cat(outputs, dim=2)  # (N, 1, B, out)
    return output.view(len(output), *x.shape[:2], -1)


class CompositionCache:
    """
    Composed parameters of all tasks, kept from one rollout step to the next.
    """

    def __init__(self) -> None:
        self.composed: list[tuple[th.Tensor, th.Tensor]] = []
        # Identity and version of the parameters that it was composed from
        self.composed_from: tuple[tuple[int, int], ...] = ()

    def forget(self) -> None:
        """
        Compose anew the next time: a fused optimiser does not count up the version of the parameters that it changes.
        """
        self.composed_from = ()

    def forward(
        self, network: CompositionalMLP, task_vectors: TaskVectors, x: th.Tensor, one_hot: th.Tensor | None
    ) -> th.Tensor:
        """
        Evaluate a compositional network without gradient on rows of any task in any order.

        :param network: The network, always the same
        :param task_vectors: W
        :param x: Input ``(B, in)``
        :param one_hot: Task of each row ``(B, T)``; None with one task
        :return: Output ``(1, ..., out)`` or ``(B, out)``, rows in order
        """
        parameters = [*network.parameters(), task_vectors.w]
        composed_from = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        if composed_from != self.composed_from:
            self.composed = network.compose(task_vectors())
            self.composed_from = composed_from
        if one_hot is None:
            return network.forward_composed(x.unsqueeze(0), self.composed)
        task_ids = one_hot.argmax(dim=1)
        # One row per task in order, as in a rollout with one sub-environment per task: one product for all
        if th.equal(task_ids, th.arange(one_hot.shape[1], device=task_ids.device)):
            return network.forward_composed(x.unsqueeze(1), self.composed)
        # Else one per task, on views: gathering would copy a whole network for each row
        output = x.new_empty(len(x), self.composed[-1][1].shape[-1])
        for task_id in task_ids.unique().tolist():
            rows = task_ids == task_id
            of_task = [(weight[:, task_id : task_id + 1], bias[:, task_id : task_id + 1]) for weight, bias in self.composed]
            output[rows] = network.forward_composed(x[rows].unsqueeze(0), of_task)[0, 0]
        return output


def init_actor_head_(weight: th.Tensor) -> None:
    """
    Truncated normal draw of standard deviation ``0.3 / sqrt(fan_in)``, cut at two standard deviations of the uncut normal.

    :param weight: ``(out, in)``, changed in place
    """
    # 0.8796 is the standard deviation of a standard normal cut at +-2
    std = 0.3 / math.sqrt(weight.shape[1]) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_critic_hidden_(weight: th.Tensor) -> None:
    """
    :param weight: ``(out, in)``, drawn from ``U(-1, 1) / sqrt(fan_in)`` in place
    """
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)


def init_critic_output_(weight: th.Tensor) -> None:
    """
    :param weight: ``(out, in)``, drawn from ``U(-0.003, 0.003)`` in place
    """
    nn.init.uniform_(weight, -0.003, 0.003)
