"""From a multi-task policy to a policy of one of its tasks, as a plain SB3 policy or an ONNX file."""

import copy
import pathlib
from typing import Any, Protocol

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_mtrl.common.torch_layers import base_observation_space

# Weight (..., in, out) and bias (..., out) of each linear layer, first to last
Layers = list[tuple[th.Tensor, th.Tensor]]


class SingleTaskLayers(Protocol):
    """A network that can say what it is for one task."""

    observe_task: bool

    def single_task_layers(self, task_id: int) -> Layers:
        """
        :param task_id: The task
        :return: The linear layers for this task. An actor's last one gives mean and log standard deviation side by side;
            the tensors of critics have a leading axis, one entry per critic.
        """
        ...


def fold_task_into_bias(layers: Layers, task_id: int, one_hot: slice) -> Layers:
    """
    Remove the one-hot from the input of a network that observes it: for one task it is a constant.

    :param layers: The linear layers, first to last
    :param task_id: The task
    :param one_hot: Where the one-hot stands in the input of the first layer
    :return: The layers of the same function on an input without the one-hot
    """
    (weight, bias), *rest = layers
    bias = bias + weight[..., one_hot, :][..., task_id, :]
    weight = th.cat([weight[..., : one_hot.start, :], weight[..., one_hot.stop :, :]], dim=-2)
    return [(weight, bias), *rest]


def merge_late_branch(layers: Layers, branch: Layers, n_layers: int) -> Layers:
    """
    One plain network of two branches that see the same input and meet before layer ``n_layers`` of the first.

    Side by side, hidden layers of both are one wider layer without weights across; the linear output of the second branch is
    part of the layer that it enters.

    :param layers: The first branch and what follows the meeting, first to last; the layer at ``n_layers`` takes the branch's
        output after its own. They may have leading axes (critics).
    :param branch: The second branch ``(in, out)``; its input is the first part of the first one's
    :param n_layers: Number of layers before the meeting
    :return: The layers of the same function, with the same activation after each hidden layer
    :raises ValueError: if the branches do not have the same number of hidden layers, or none
    """
    *branch_hidden, (out_weight, out_bias) = branch
    if len(branch_hidden) != n_layers or n_layers == 0:
        raise ValueError(
            f"unique_arch must have as many hidden layers as there are shared ones ({n_layers}, at least 1) to export, "
            f"got {len(branch_hidden)}"
        )
    merged: Layers = []
    for index, ((weight, bias), (branch_weight, branch_bias)) in enumerate(zip(layers, branch_hidden, strict=False)):
        leading = weight.shape[:-2]
        n_in, n_out, n_branch = weight.shape[-2], weight.shape[-1], branch_weight.shape[-1]
        shared_rows = 0 if index == 0 else n_in  # the input is one for both branches
        rows = n_in if index == 0 else n_in + len(branch_weight)
        wide = weight.new_zeros(*leading, rows, n_out + n_branch)
        wide[..., :n_in, :n_out] = weight
        wide[..., shared_rows : shared_rows + len(branch_weight), n_out:] = branch_weight
        merged.append((wide, th.cat([bias, branch_bias.expand(*leading, -1)], dim=-1)))
    weight, bias = layers[n_layers]
    own, entering = weight.split([weight.shape[-2] - len(out_bias), len(out_bias)], dim=-2)
    merged.append((th.cat([own, out_weight @ entering], dim=-2), bias + out_bias @ entering))
    return [*merged, *layers[n_layers + 1 :]]


def single_task_policy(policy: SACPolicy, num_tasks: int, task_id: int) -> SACPolicy:
    """
    The policy of one task as SB3's own ``SACPolicy``, which knows nothing of tasks.

    :param policy: Multi-task policy whose actor and critics have ``single_task_layers``
    :param num_tasks: Number of tasks T it was made for
    :param task_id: The task
    :return: A policy on observations without the one-hot, with the same deterministic actions and values. (Its stochastic
        actions are the same too, up to the bounds of the log standard deviation: SB3's are -20 and 2.)
    :raises ValueError: if the policy has an own features extractor or uses gSDE
    """
    if policy.features_extractor_class is not FlattenExtractor:
        raise ValueError(
            f"features_extractor_class must be FlattenExtractor to export, got {policy.features_extractor_class.__name__}"
        )
    if policy.actor.use_sde:
        raise ValueError("use_sde must be False to export, got True")
    observation_space = policy.observation_space
    if num_tasks > 1:
        observation_space = base_observation_space(observation_space, num_tasks)
    obs_dim = spaces.utils.flatdim(observation_space)
    one_hot = slice(obs_dim, obs_dim + num_tasks)

    def layers_of(network: Any) -> Layers:
        layers = network.single_task_layers(task_id)
        return fold_task_into_bias(layers, task_id, one_hot) if num_tasks > 1 and network.observe_task else layers

    def widths_of(layers: Layers) -> list[int]:
        return [weight.shape[-1] for weight, _ in layers[:-1]]

    actor_layers, critic_layers = layers_of(policy.actor), layers_of(policy.critic)
    critic_kwargs: dict[str, Any] = policy.critic_kwargs
    exported = SACPolicy(
        observation_space,
        policy.action_space,  # type: ignore[arg-type]
        ConstantSchedule(0.0),
        net_arch={"pi": widths_of(actor_layers), "qf": widths_of(critic_layers)},
        activation_fn=policy.activation_fn,
        n_critics=critic_kwargs["n_critics"],
    ).to(policy.device)
    *trunk, (head_weight, head_bias) = actor_layers
    mean_weight, log_std_weight = head_weight.chunk(2, dim=-1)
    mean_bias, log_std_bias = head_bias.chunk(2, dim=-1)
    _fill(exported.actor.latent_pi, trunk)
    _fill(exported.actor.mu, [(mean_weight, mean_bias)])
    _fill(exported.actor.log_std, [(log_std_weight, log_std_bias)])  # type: ignore[arg-type]
    for layers, target in ((critic_layers, exported.critic), (layers_of(policy.critic_target), exported.critic_target)):
        for index, q_network in enumerate(target.q_networks):
            _fill(q_network, [(weight[index], bias[index]) for weight, bias in layers])
    exported.set_training_mode(False)
    return exported


def _fill(network: nn.Module, layers: Layers) -> None:
    """Copy weights ``(in, out)`` and biases into the linear layers of a network."""
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    with th.no_grad():
        for linear, (weight, bias) in zip(linears, layers, strict=True):
            linear.weight.copy_(weight.t())
            linear.bias.copy_(bias)


class _DeterministicActor(nn.Module):
    """Observation to action in the units of the environment; no distribution object, which exporters cannot follow."""

    def __init__(self, policy: SACPolicy):
        super().__init__()
        self.actor = policy.actor
        assert isinstance(policy.action_space, spaces.Box)
        self.low = th.as_tensor(policy.action_space.low)
        self.high = th.as_tensor(policy.action_space.high)

    def forward(self, observation: th.Tensor) -> th.Tensor:
        mean_actions, _, _ = self.actor.get_action_dist_params(observation)
        return self.low + 0.5 * (th.tanh(mean_actions) + 1.0) * (self.high - self.low)


def export_onnx(policy: SACPolicy, path: str | pathlib.Path) -> None:
    """
    Write the deterministic actor of a policy on vector observations as an ONNX file.

    Input ``observation`` (batch, n) float32, output ``action`` (batch, n_actions) float32 in the units of the action space.

    :param policy: E.g. what ``export_task_policy`` returned
    :param path: File to write
    :raises ImportError: if the package's extra ``onnx`` is not installed
    :raises ValueError: if the observations are no vectors
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install sb3-mtrl[onnx]") from error
    observation_space = policy.observation_space
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(f"policy must have vector observations, got {observation_space}")
    module = _DeterministicActor(copy.deepcopy(policy).cpu()).eval()
    example = th.zeros(2, *observation_space.shape)
    th.onnx.export(
        module,
        (example,),
        str(path),
        input_names=["observation"],
        output_names=["action"],
        dynamic_shapes={"observation": {0: th.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
