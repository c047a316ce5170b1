"""Compositional layers, stacked networks and task heads, against closed forms and plain networks."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_mtrl.common.torch_layers import (
    CompositionalExtractor,
    CompositionalLinear,
    CompositionalMLP,
    GradientGate,
    StackedMLP,
    TaskHeads,
    activate_compositional_vectors,
    init_compositional_vectors,
)
from sb3_mtrl.common.vec_env import VecTaskAssignment
from tests.tiny_envs import PointTasksEnv

DEVICE = "cpu"


def test_compositional_linear_by_hand():
    # Phi_1 = [1, 2], Phi_2 = [-1, .5], c = (.1, -.2), x = (2, 3): outputs 6.1 and -0.7 before mixing
    layer = CompositionalLinear(2, 1, n_param_sets=2)
    layer.weight.data = th.tensor([[[[1.0], [2.0]], [[-1.0], [0.5]]]])
    layer.bias.data = th.tensor([[[0.1], [-0.2]]])
    x = th.tensor([[2.0, 3.0], [2.0, 3.0]])
    w = th.tensor([[1.0, 0.0], [0.5, 2.0]])
    expected = th.tensor([8.1, 0.5 * 8.1 + 2.0 * (-0.7)])  # 8.1 and 2.65
    th.testing.assert_close(layer.mix(x[None], w)[0, :, 0], expected)
    weight, bias = layer.compose(w)
    composed = layer.apply_composed(x.view(1, 2, 1, 2), weight, bias)
    th.testing.assert_close(composed.flatten(), expected)
    assert expected.tolist() == pytest.approx([8.1, 2.65])


def test_composed_and_mixed_paths_are_one_function_with_one_gradient():
    th.manual_seed(0)
    num_tasks, rows_per_task, n_networks = 4, 3, 2
    mlp = CompositionalMLP([CompositionalLinear(5, 7, 3, n_networks), CompositionalLinear(7, 2, 3, n_networks)]).double()
    for parameter in mlp.parameters():
        parameter.data.normal_()
    w = th.randn(num_tasks, 3, dtype=th.float64, requires_grad=True)
    x = th.randn(num_tasks, rows_per_task, 5, dtype=th.float64)
    grouped = mlp.forward_composed(x, mlp.compose(w)).reshape(n_networks, -1, 2)
    mixed = mlp.forward_mixed(x.flatten(0, 1), w.repeat_interleave(rows_per_task, dim=0))
    th.testing.assert_close(grouped, mixed)
    direction = th.randn_like(grouped)
    parameters = [w, *mlp.parameters()]
    for one, other in zip(
        th.autograd.grad((grouped * direction).sum(), parameters),
        th.autograd.grad((mixed * direction).sum(), parameters),
        strict=True,
    ):
        th.testing.assert_close(one, other)


def test_parameter_sets_start_equal_and_networks_do_not():
    th.manual_seed(0)
    layer = CompositionalLinear(6, 5, n_param_sets=4, n_networks=2)
    assert all(th.equal(layer.weight[:, 0], layer.weight[:, k]) for k in range(4))
    assert not th.equal(layer.weight[0], layer.weight[1])
    assert th.all(layer.bias == 0)


def test_gradient_of_one_task_is_its_vector_times_a_common_gradient():
    # With equal sets, d/dPhi_k = w_tk G for one and the same G
    th.manual_seed(0)
    layer = CompositionalLinear(3, 2, n_param_sets=3)
    w = th.tensor([[0.5, -2.0, 3.0]])
    weight, bias = layer.compose(w)
    layer.apply_composed(th.randn(1, 1, 4, 3), weight, bias).square().sum().backward()
    common = layer.weight.grad[0, 0] / 0.5
    th.testing.assert_close(layer.weight.grad[0, 1], -2.0 * common)
    th.testing.assert_close(layer.weight.grad[0, 2], 3.0 * common)


def test_gate_keeps_a_dropped_group_s_nan_from_the_shared_sets():
    th.manual_seed(0)
    mlp = CompositionalMLP([CompositionalLinear(3, 4, 2), CompositionalLinear(4, 1, 2)])
    w = th.randn(2, 2, requires_grad=True)
    x = th.randn(2, 5, 3)
    poisoned = x.clone()
    poisoned[1] = np.inf
    gate = GradientGate()
    keep = th.tensor([True, False]).view(1, 2, 1, 1)

    def gradients(inputs: th.Tensor, dropped: th.Tensor | None) -> list[th.Tensor]:
        gate.dropped_tasks = dropped
        output = mlp.forward_composed(inputs, mlp.compose(w, gate=gate))
        return th.autograd.grad(th.where(keep, output, 0.0).sum(), [w, *mlp.parameters()])

    assert not all(grad.isfinite().all() for grad in gradients(poisoned, None))
    for got, expected in zip(gradients(poisoned, th.tensor([False, True])), gradients(x, None), strict=True):
        th.testing.assert_close(got, expected)


def test_stacked_mlp_equals_its_networks():
    th.manual_seed(0)
    networks = [nn.Sequential(*create_mlp(5, 2, [8, 6], nn.Tanh, squash_output=True)) for _ in range(3)]
    stack = StackedMLP(networks)
    x = th.randn(10, 5, requires_grad=True)
    outputs = stack(x)
    assert outputs.shape == (3, 10, 2)
    for output, network in zip(outputs, networks, strict=True):
        th.testing.assert_close(output, network(x))
    # Frozen: the same gradient for the input, none for the parameters
    (grad,) = th.autograd.grad(sum(network(x).sum() for network in networks), x)
    frozen = stack(x, frozen=True)
    th.testing.assert_close(th.autograd.grad(frozen.sum(), x, retain_graph=True)[0], grad)
    frozen.sum().backward()
    assert all(parameter.grad is None for parameter in stack.parameters())


@pytest.mark.parametrize("n_groups", [None, 3])
def test_task_heads_equal_a_loop_over_rows(n_groups):
    th.manual_seed(0)
    heads = TaskHeads(4, 2, num_tasks=3, n_networks=2)
    tasks = [2, 2, 0, 0, 2, 2] if n_groups else [0, 2, 1, 1, 0, 2]
    x = th.randn(2, 6, 4)
    outputs = heads(x, th.eye(3)[tasks], n_groups)
    for network in range(2):
        for row, task in enumerate(tasks):
            expected = x[network, row] @ heads.weight[network, task] + heads.bias[network, task, 0]
            th.testing.assert_close(outputs[network, row], expected)


def test_w_inits():
    th.manual_seed(0)
    normal = init_compositional_vectors(2000, 5, "normal")
    assert normal.mean().abs() < 0.05 and (normal.std() - 1).abs() < 0.05
    assert th.equal(init_compositional_vectors(4, 4, "onehot"), th.eye(4))
    simplex = init_compositional_vectors(20_000, 5, "simplex")
    uniform = init_compositional_vectors(20_000, 5, "uniform")
    for rows in (simplex, uniform):
        assert th.all(rows >= 0)
        th.testing.assert_close(rows.sum(dim=1), th.ones(len(rows)))
        th.testing.assert_close(rows.mean(dim=0), th.full((5,), 0.2), atol=0.01, rtol=0)
    # Dirichlet(1, ..., 1) with K = 5: standard deviation sqrt(4 / 150) = 0.1633; uniform rows stay closer to the centre
    th.testing.assert_close(simplex.std(dim=0), th.full((5,), 0.1633), atol=0.005, rtol=0)
    assert th.all(uniform.std(dim=0) < 0.13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0, "normal"), "n_param_sets must be at least 1, got 0"),
        ((3, 2, "onehot"), "n_param_sets equal to num_tasks=3, got 2"),
        ((3, 2, "zeros"), "w_init must be one of 'normal', 'onehot', 'simplex', 'uniform', got 'zeros'"),
    ],
)
def test_bad_w_init(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_compositional_vectors(*arguments)


def test_w_activations():
    w = th.tensor([[3.0, 4.0], [np.nan, 1.0]])
    assert activate_compositional_vectors(w, "identity").tolist() == [[3.0, 4.0], [0.0, 0.0]]
    th.testing.assert_close(activate_compositional_vectors(w, "l2")[0], th.tensor([0.6, 0.8]))
    softmax = activate_compositional_vectors(w, "softmax")
    th.testing.assert_close(softmax[0, 1] / softmax[0, 0], th.tensor(np.e, dtype=th.float32))


@pytest.mark.parametrize("algorithm", [SAC, TQC, PPO])
def test_compositional_extractor_in_plain_algorithms(algorithm):
    env = VecTaskAssignment(DummyVecEnv([lambda: PointTasksEnv(3) for _ in range(3)]))
    policy_kwargs = dict(
        features_extractor_class=CompositionalExtractor,
        features_extractor_kwargs=dict(num_tasks=3, n_param_sets=2, net_arch=[8, 6]),
        net_arch=[8],
    )
    off_policy = dict(learning_starts=30, batch_size=16) if algorithm is not PPO else dict(n_steps=32, batch_size=32)
    model = algorithm("MlpPolicy", env, policy_kwargs=policy_kwargs, seed=0, device=DEVICE, **off_policy)
    owner = model.policy if algorithm is PPO else model.actor
    extractor = owner.features_extractor
    assert extractor.features_dim == 6
    before = {name: parameter.detach().clone() for name, parameter in extractor.named_parameters()}
    model.learn(150)
    changed = {name for name, parameter in extractor.named_parameters() if not th.equal(parameter, before[name])}
    assert changed == set(before)  # every layer and W learn
    # Two tasks see two networks: the same base observation gives other actions
    obs = np.concatenate([np.tile([0.1, 0.2, 0.3, 0.4], (3, 1)), np.eye(3)], axis=1).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=True)
    assert len(np.unique(actions.round(6), axis=0)) == 3


def test_compositional_extractor_refuses_bad_arguments():
    space = spaces.Box(-1, 1, (7,), np.float32)
    with pytest.raises(ValueError, match="one-hot of 7 tasks"):
        CompositionalExtractor(space, num_tasks=7)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        CompositionalExtractor(space, num_tasks=0)
    with pytest.raises(ValueError, match="net_arch"):
        CompositionalExtractor(space, num_tasks=3, net_arch=[])
