"""Experts, gate, task encoder and InfoNCE, against closed forms, plain networks and loops."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC
from torch import nn

from sb3_mtrl.common.torch_layers import (
    ExpertMixtureExtractor,
    Experts,
    TaskEncoder,
    expert_similarities,
    info_nce_losses,
)
from tests.models import make_env


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("net_arch", [(7,), (7, 5)])
def test_experts_equal_a_loop_over_plain_networks(net_arch):
    th.manual_seed(0)
    experts = Experts(4, 3, n_experts=5, net_arch=net_arch).double()
    for bias in experts.biases:
        bias.data.normal_()
    x = th.randn(6, 4, dtype=th.float64, requires_grad=True)
    gate_weights = th.rand(6, 5, dtype=th.float64).softmax(dim=1).requires_grad_()

    def expert(index: int) -> th.Tensor:
        hidden = x
        for layer, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
            hidden = hidden.relu() if layer > 0 else hidden
            hidden = hidden @ weight[index] + bias[index]
        return hidden

    expected = th.stack([expert(index) for index in range(5)])
    th.testing.assert_close(experts(x), expected)
    expected_mixture = sum(gate_weights[:, j : j + 1] * expected[j] for j in range(5))
    th.testing.assert_close(experts.mix(x, gate_weights), expected_mixture)
    # One function with one gradient
    inputs = [x, gate_weights, *experts.parameters()]
    direction = th.randn(6, 3, dtype=th.float64)
    for got, wanted in zip(
        th.autograd.grad((experts.mix(x, gate_weights) * direction).sum(), inputs),
        th.autograd.grad((expected_mixture * direction).sum(), inputs),
        strict=True,
    ):
        th.testing.assert_close(got, wanted)


def test_frozen_experts_pass_the_gradient_to_their_input_only():
    th.manual_seed(0)
    experts = Experts(4, 3, n_experts=2)
    x = th.randn(6, 4, requires_grad=True)
    gate_weights = th.full((6, 2), 0.5)
    (expected,) = th.autograd.grad(experts.mix(x, gate_weights).sum(), x)
    loss = experts.mix(x, gate_weights, frozen=True).sum() + 0 * experts(x, frozen=True).sum()
    loss.backward()
    th.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_parameter_counts():
    # cf. hand calculation: (12 * 64 + 64) + (64 * 64 + 64) per expert; 10 * 64, 64-128, 128-64, 64-64, 64-64 of the encoder
    assert n_parameters(Experts(12, 64)) == 6 * (832 + 4160) == 29_952
    assert n_parameters(TaskEncoder(10)) == 640 + 8320 + 8256 + 4160 + 4160 == 25_536


def test_task_encoder_is_a_lookup_and_an_mlp():
    th.manual_seed(0)
    encoder = TaskEncoder(3, out_features=5, embedding_dim=4, net_arch=(6,))
    hidden = encoder.embeddings[1].relu() @ encoder.mlp[1].weight.t() + encoder.mlp[1].bias
    expected = hidden.relu() @ encoder.mlp[3].weight.t() + encoder.mlp[3].bias
    th.testing.assert_close(encoder()[1], expected)


def test_pretrained_task_embeddings_stay_as_they_are():
    vectors = np.array([[-1.0, 2.0], [0.5, -3.0]])
    encoder = TaskEncoder(2, out_features=3, net_arch=(4,), pretrained_embeddings=vectors)
    encoder().sum().backward()
    assert encoder.embeddings.grad is None
    assert encoder.embeddings.tolist() == vectors.tolist()
    # Their signs reach the first layer
    th.testing.assert_close(encoder.mlp[0](encoder.embeddings), encoder.embeddings @ encoder.mlp[0].weight.t())
    with pytest.raises(ValueError, match=r"pretrained_task_embeddings must have shape \(3, d\).*got \(2, 2\)"):
        TaskEncoder(3, pretrained_embeddings=vectors)


IDENTICAL = th.ones(6, 1, 8).expand(6, 4, 8) * th.arange(1, 5).view(1, 4, 1)
ORTHOGONAL = th.eye(6).unsqueeze(1).expand(6, 4, 6) * 3.0
SIMPLEX = (th.eye(6) - 1 / 6).unsqueeze(1).expand(6, 4, 6)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (IDENTICAL, 6 * math.log(6)),  # 10.7506: six equal logits
        (ORTHOGONAL, 6 * math.log1p(5 * math.exp(-10))),  # 0.0013618: cosines 1 and five 0
        (SIMPLEX, 6 * math.log1p(5 * math.exp(-12))),  # 0.00018432: cosines 1 and five -1/5, the lowest possible value
    ],
)
def test_info_nce_of_known_configurations(outputs, expected):
    """Closed forms for k = 6 experts, temperature 0.1 and a next observation equal to this one."""
    losses, similarities = info_nce_losses(outputs.double(), outputs.double(), temperature=0.1)
    assert losses.shape == (4, 1) and similarities.shape == (4, 6, 6)
    np.testing.assert_allclose(losses[:, 0], expected, rtol=0, atol=1e-6)
    # In single precision too, where the loss of the last row is near the rounding of its logits of 10
    np.testing.assert_allclose(info_nce_losses(outputs, outputs, 0.1)[0][:, 0], expected, rtol=0, atol=6e-6)


def test_info_nce_equals_a_loop_over_experts_and_rows():
    th.manual_seed(0)
    outputs, next_outputs = th.randn(4, 5, 3, dtype=th.float64), th.randn(4, 5, 3, dtype=th.float64)
    losses, similarities = info_nce_losses(outputs, next_outputs, temperature=0.5)

    def cosine(a: th.Tensor, b: th.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    for row in range(5):
        loss = 0.0
        for i in range(4):
            logits = [cosine(outputs[i, row], next_outputs[i, row])]
            logits += [cosine(outputs[i, row], outputs[j, row]) for j in range(4) if j != i]
            loss += math.log(sum(math.exp(logit / 0.5) for logit in logits)) - logits[0] / 0.5
            for j in range(4):
                assert similarities[row, i, j].item() == pytest.approx(cosine(outputs[i, row], outputs[j, row]))
        assert losses[row, 0].item() == pytest.approx(loss)


def test_info_nce_trains_queries_and_negatives_but_no_positives():
    th.manual_seed(0)
    outputs = th.randn(3, 5, 4, dtype=th.float64, requires_grad=True)
    next_outputs = th.randn(3, 5, 4, dtype=th.float64, requires_grad=True)
    info_nce_losses(outputs, next_outputs, 0.1)[0].mean().backward()
    assert next_outputs.grad is None
    # Only the direction of an output matters, so its gradient is at a right angle to it
    th.testing.assert_close((outputs.grad * outputs).sum(dim=-1), th.zeros(3, 5, dtype=th.float64))
    # Expert 0 is pushed by the terms of the others too: without them its gradient is another one
    own = outputs.detach().requires_grad_()
    directions = nn.functional.normalize(own, dim=-1)
    logits = th.stack(
        [
            (directions[0] * nn.functional.normalize(next_outputs[0], dim=-1)).sum(-1),
            (directions[0] * directions[1].detach()).sum(-1),
            (directions[0] * directions[2].detach()).sum(-1),
        ]
    )
    nn.functional.cross_entropy(logits.t() / 0.1, th.zeros(5, dtype=th.long)).backward()
    assert not th.allclose(own.grad[0], outputs.grad[0])


def test_similarity_of_one_expert_with_itself_is_one():
    assert th.allclose(expert_similarities(th.randn(1, 3, 4)), th.ones(3, 1, 1))
    assert info_nce_losses(th.randn(1, 3, 4), th.randn(1, 3, 4))[0].abs().max() < 1e-5  # no negatives, no loss


@pytest.mark.parametrize("algorithm", [SAC, TQC, PPO])
def test_expert_mixture_extractor_in_plain_algorithms(algorithm):
    policy_kwargs = dict(
        features_extractor_class=ExpertMixtureExtractor,
        features_extractor_kwargs=dict(num_tasks=3, n_experts=2, expert_arch=[8], feature_dim=6, task_embedding_dim=5),
        net_arch=[8],
    )
    off_policy = dict(learning_starts=30, batch_size=16) if algorithm is not PPO else dict(n_steps=32, batch_size=32)
    model = algorithm("MlpPolicy", make_env(), policy_kwargs=policy_kwargs, seed=0, device="cpu", **off_policy)
    extractor = (model.policy if algorithm is PPO else model.actor).features_extractor
    assert extractor.features_dim == 11
    before = {name: parameter.detach().clone() for name, parameter in extractor.named_parameters()}
    model.learn(150)
    assert {name for name, parameter in extractor.named_parameters() if not th.equal(parameter, before[name])} == set(before)
    # The gate differs from task to task
    gate_weights = extractor.gate(extractor.task_encoder())
    assert gate_weights.shape == (3, 2) and gate_weights.std(dim=0).max() > 0


def test_the_gate_does_not_train_the_task_encoder():
    extractor = ExpertMixtureExtractor(spaces.Box(-1, 1, (7,), np.float32), num_tasks=3)
    obs = th.cat([th.randn(5, 4), th.eye(3)[[0, 1, 2, 1, 0]]], dim=1)
    extractor(obs)[:, :64].sum().backward()  # the mixture
    assert all(not parameter.grad.any() for parameter in extractor.task_encoder.parameters())
    assert extractor.gate.linear.weight.grad.abs().max() > 0


def test_bad_arguments():
    space = spaces.Box(-1, 1, (7,), np.float32)
    with pytest.raises(ValueError, match="n_experts must be at least 1, got 0"):
        ExpertMixtureExtractor(space, num_tasks=3, n_experts=0)
    with pytest.raises(ValueError, match="expert_arch must name at least one layer width"):
        ExpertMixtureExtractor(space, num_tasks=3, expert_arch=[])
    with pytest.raises(ValueError, match="one-hot of 7 tasks"):
        ExpertMixtureExtractor(space, num_tasks=7)
