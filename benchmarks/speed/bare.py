"""
What ``MTSAC`` is measured by: multi-task SAC as a bare PyTorch loop, without SB3 and without options (what does the framework
around it cost?), and the matrix products of an update alone (what could any PyTorch code reach?).
"""

import copy
import itertools
import math

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

GAMMA, TAU = 0.99, 0.005


class StackedCritics(nn.Module):
    """Two critics, evaluated in one batched product per layer."""

    def __init__(self, dims: list[int]):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in itertools.pairwise(dims):
            layer = nn.Module()
            bound = 1 / math.sqrt(n_in)
            layer.weight = nn.Parameter(th.empty(2, n_in, n_out).uniform_(-bound, bound))
            layer.bias = nn.Parameter(th.empty(2, 1, n_out).uniform_(-bound, bound))
            self.layers.append(layer)

    def forward(self, obs: th.Tensor, actions: th.Tensor, frozen: bool = False) -> th.Tensor:
        x = th.cat([obs, actions], dim=1).expand(2, -1, -1)
        for index, layer in enumerate(self.layers):
            weight, bias = (layer.weight.detach(), layer.bias.detach()) if frozen else (layer.weight, layer.bias)
            x = th.baddbmm(bias, F.relu(x) if index > 0 else x, weight)
        return x  # (2, B, 1)


class BareMTSAC:
    """
    The update of multi-task SAC, in the order of SB3.

    :param obs_dim: Width of the observations without the one-hot
    :param action_dim: Number of actions
    :param num_tasks: Number of tasks T
    :param batch_size: Rows per update
    :param net_arch: Widths of the hidden layers
    :param n_rows: Rows per task that there are to sample from, random
    """

    def __init__(
        self, obs_dim: int, action_dim: int, num_tasks: int, batch_size: int, net_arch: tuple[int, ...], n_rows: int = 300
    ):
        self.num_tasks, self.rows_per_task = num_tasks, batch_size // num_tasks
        dims = [obs_dim + num_tasks, *net_arch]
        hidden = [layer for i in range(len(net_arch)) for layer in (nn.Linear(dims[i], dims[i + 1]), nn.ReLU())]
        self.actor = nn.Sequential(*hidden, nn.Linear(dims[-1], 2 * action_dim))
        self.critics = StackedCritics([dims[0] + action_dim, *net_arch, 1])
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = th.zeros(num_tasks, requires_grad=True)
        self.actor_optimizer, self.critic_optimizer = (
            th.optim.Adam(network.parameters(), lr=3e-4, fused=True) for network in (self.actor, self.critics)
        )
        self.alpha_optimizer = th.optim.Adam([self.log_alpha], lr=3e-4, fused=True)
        self.target_entropy = -float(action_dim)
        self.widths = [obs_dim, obs_dim, action_dim, 1, 1]
        self.rng = np.random.default_rng(0)
        self.rows = self.rng.uniform(-1, 1, (num_tasks, n_rows, sum(self.widths))).astype(np.float32)
        self.rows[..., -1] = 0.0
        self.one_hot = th.eye(num_tasks).repeat_interleave(self.rows_per_task, dim=0)

    def sample_actions(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        log_std = log_std.clamp(-20, 2)
        noise = th.randn_like(mean)
        actions = th.tanh(mean + log_std.exp() * noise)
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - th.log(1 - actions.square() + 1e-6)
        return actions, log_prob.sum(dim=1, keepdim=True)

    @staticmethod
    def step(optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self) -> None:
        indices = self.rng.integers(self.rows.shape[1], size=(self.num_tasks, self.rows_per_task))
        rows = np.take_along_axis(self.rows, indices[..., None], axis=1).reshape(len(self.one_hot), -1)
        obs, next_obs, actions, rewards, dones = th.from_numpy(rows).split(self.widths, dim=1)
        obs, next_obs = th.cat([obs, self.one_hot], dim=1), th.cat([next_obs, self.one_hot], dim=1)
        log_alpha = self.log_alpha.repeat_interleave(self.rows_per_task).unsqueeze(1)
        alpha = log_alpha.detach().exp()

        actions_pi, log_prob = self.sample_actions(obs)
        self.step(self.alpha_optimizer, -(log_alpha * (log_prob.detach() + self.target_entropy)).mean())
        with th.no_grad():
            next_actions, next_log_prob = self.sample_actions(next_obs)
            next_values = self.target(next_obs, next_actions).min(dim=0).values - alpha * next_log_prob
            targets = rewards + (1 - dones) * GAMMA * next_values
        self.step(self.critic_optimizer, 0.5 * (self.critics(obs, actions) - targets).square().sum(dim=0).mean())
        values = self.critics(obs, actions_pi, frozen=True).min(dim=0).values
        self.step(self.actor_optimizer, (alpha * log_prob - values).mean())
        with th.no_grad():
            targets_, sources = list(self.target.parameters()), list(self.critics.parameters())
            th._foreach_mul_(targets_, 1 - TAU)
            th._foreach_add_(targets_, sources, alpha=TAU)


class MatrixProducts:
    """
    The matrix products that an update of multi-task SAC cannot do without, and nothing else: no activations, no losses, no
    optimisers, no memory to allocate. The gradient of the critics' weights is formed once, in the critic loss.

    :param obs_dim: Width of the observations without the one-hot
    :param action_dim: Number of actions
    :param num_tasks: Number of tasks T
    :param batch_size: Rows per update
    :param net_arch: Widths of the hidden layers
    """

    def __init__(self, obs_dim: int, action_dim: int, num_tasks: int, batch_size: int, net_arch: tuple[int, ...]):
        self.products: list[tuple[th.Tensor, th.Tensor, th.Tensor]] = []
        self.flop = 0
        actor_dims = [obs_dim + num_tasks, *net_arch, 2 * action_dim]
        critic_dims = [obs_dim + num_tasks + action_dim, *net_arch, 1]
        for index, (n_in, n_out) in enumerate(itertools.pairwise(actor_dims)):
            # Actions for states and next states; its loss needs no gradient to the observations
            self._add(1, batch_size, n_in, n_out, n_forward=2, n_to_inputs=int(index > 0))
        for index, (n_in, n_out) in enumerate(itertools.pairwise(critic_dims)):
            # Targets, critic loss, actor loss; of the first layer only the actor loss needs the gradient to the inputs
            self._add(2, batch_size, n_in, n_out, n_forward=3, n_to_inputs=1 + int(index > 0))

    def _add(self, n_networks: int, batch_size: int, n_in: int, n_out: int, n_forward: int, n_to_inputs: int) -> None:
        inputs, weight = th.rand(n_networks, batch_size, n_in), th.rand(n_networks, n_in, n_out)
        outputs = th.rand(n_networks, batch_size, n_out)
        results = [th.empty_like(tensor) for tensor in (inputs, weight, outputs)]
        self.products += n_forward * [(inputs, weight, results[2])]
        self.products += n_to_inputs * [(outputs, weight.transpose(1, 2), results[0])]
        self.products += [(inputs.transpose(1, 2), outputs, results[1])]
        self.flop += 2 * n_networks * batch_size * n_in * n_out * (n_forward + n_to_inputs + 1)

    def update(self) -> None:
        for left, right, result in self.products:
            th.bmm(left, right, out=result)
