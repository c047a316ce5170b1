"""The layers of STARS against plain numpy loops, hand calculations and counts."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC

from sb3_mtrl.common.shared_unique import SharedUniqueExtractor, SharedUniqueMLP, sample_triplets, triplet_losses
from tests.models import make_env

# Tasks of groups of rows: in order, out of order, a missing task, unequal shares, a task with groups apart
LAYOUTS = [[0, 1, 2], [2, 0, 1], [0, 2, 0], [0, 0, 0, 1, 2, 2], [1, 0, 2, 1, 1, 0]]


@pytest.mark.parametrize("group_tasks", LAYOUTS)
@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_triplets_are_of_the_right_tasks(group_tasks, group_size):
    """Of every row, against the definition: another row of the task, and a row of another task; all are drawn in the end."""
    th.manual_seed(0)
    tasks = np.repeat(group_tasks, group_size)
    n = len(tasks)
    drawn_positives, drawn_negatives = np.zeros((n, n)), np.zeros((n, n))
    n_draws = 400
    for _ in range(n_draws):
        positives, negatives, valid = sample_triplets(th.tensor(group_tasks), n, num_tasks=3)
        rows = np.flatnonzero(valid)
        drawn_positives[rows, positives[rows]] += 1
        drawn_negatives[rows, negatives[rows]] += 1
    is_same = tasks[:, None] == tasks[None, :]
    may_be_positive = is_same & ~np.eye(n, dtype=bool)
    has_positive = may_be_positive.any(axis=1)
    assert np.array_equal(valid.numpy(), has_positive)
    expected_positives = may_be_positive / np.maximum(may_be_positive.sum(axis=1, keepdims=True), 1)
    expected_negatives = ~is_same / (~is_same).sum(axis=1, keepdims=True) * has_positive[:, None]
    # Where the definition allows no draw there is none; elsewhere the frequencies are uniform, within five deviations
    for drawn, expected in ((drawn_positives, expected_positives), (drawn_negatives, expected_negatives)):
        deviation = np.sqrt(n_draws * expected * (1 - expected))
        assert np.all(np.abs(drawn - n_draws * expected) <= 5 * deviation)


def test_a_batch_of_one_task_has_no_triplets():
    th.manual_seed(0)
    embeddings = th.randn(8, 3, requires_grad=True)
    losses, active = triplet_losses(embeddings, th.tensor([1, 1]), num_tasks=3)
    assert losses.tolist() == [[0.0]] * 8 and active == 0
    losses.sum().backward()
    assert th.all(embeddings.grad == 0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("group_tasks", [[0, 1, 2], [0, 0, 0, 0, 1, 2], [0, 1, 1]])
def test_triplet_losses_equal_a_loop(group_tasks, normalize):
    """The mean over the rows that have a triplet; groups of one row leave tasks 1 and 2 of the second layout without."""
    batch_size = len(group_tasks) * (1 if len(group_tasks) == 6 else 4)
    generator = th.Generator().manual_seed(3)
    embeddings = th.randn(batch_size, 5, generator=generator)
    th.manual_seed(1)
    triplets = sample_triplets(th.tensor(group_tasks), batch_size, 3)
    th.manual_seed(1)
    losses, active = triplet_losses(embeddings, th.tensor(group_tasks), 3, margin=0.7, normalize=normalize)
    u = embeddings.numpy().astype(np.float64)
    if normalize:
        u /= np.linalg.norm(u, axis=1, keepdims=True)
    expected = []
    for row in range(batch_size):
        if triplets.valid[row]:
            positive, negative = u[triplets.positives[row]], u[triplets.negatives[row]]
            expected.append(max(0.0, 0.7 + np.linalg.norm(u[row] - positive) - np.linalg.norm(u[row] - negative)))
    assert losses.mean().item() == pytest.approx(np.mean(expected), abs=1e-5)
    assert active.item() == pytest.approx(np.mean(np.array(expected) > 0))


def test_triplet_loss_by_hand():
    """
    Two tasks with two rows each leave no choice of the positive. Task 0 at (1, 0) twice, task 1 at (0, 1) and (0, -1): every
    negative is sqrt(2) away; positives 0 and 2. Losses .5 + 0 - 1.4142 < 0 and .5 + 2 - 1.4142 = 1.0858: mean 0.5429.
    """
    embeddings = th.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
    losses, active = triplet_losses(embeddings, th.tensor([0, 1]), num_tasks=2)
    th.testing.assert_close(losses[:, 0], th.tensor([0.0, 0.0, 1.0858, 1.0858]), rtol=0, atol=1e-4)
    assert active == 0.5
    # As they are: |(3, 0) - (1, 0)| = 2, and the negatives of the first row are sqrt(13) and sqrt(10) away
    losses, _ = triplet_losses(embeddings, th.tensor([0, 1]), num_tasks=2, margin=3.0, normalize=False)
    assert min(abs(losses[0].item() - (5 - np.sqrt(d))) for d in (13, 10)) < 1e-4


def test_coinciding_embeddings_have_a_finite_gradient_that_parts_them():
    embeddings = th.ones(6, 4, requires_grad=True)
    th.manual_seed(0)
    losses, _ = triplet_losses(embeddings, th.tensor([0, 1, 2]), 3, normalize=False)
    losses.mean().backward()
    assert embeddings.grad.isfinite().all() and embeddings.grad.abs().max() > 0


def numpy_network(mlp: SharedUniqueMLP, w: np.ndarray, x: np.ndarray, unique: np.ndarray, network: int) -> np.ndarray:
    """One row through explicitly summed weights, in float64."""
    for index, layer in enumerate(mlp.layers):
        if index == 2 and unique.size > 0:
            x = np.concatenate([x, unique])
        sets, biases = layer.weight[network].detach().double().numpy(), layer.bias[network].detach().double().numpy()
        coefficients = w if len(sets) == len(w) else np.ones(1)
        weight = sum(w_k * set_k for w_k, set_k in zip(coefficients, sets, strict=True))
        bias = sum(w_k * bias_k for w_k, bias_k in zip(coefficients, biases, strict=True))
        x = x @ weight + bias
        if index < len(mlp.layers) - 1:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("compositional_head", [True, False])
@pytest.mark.parametrize("unique_dim", [0, 4])
def test_composed_forward_equals_explicitly_summed_weights(compositional_head, unique_dim):
    th.manual_seed(0)
    mlp = SharedUniqueMLP(5, 3, [7, 6, 8], 2, unique_dim, n_networks=2, compositional_head=compositional_head)
    with th.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()  # the sets start equal
    assert [len(layer.weight[0]) for layer in mlp.layers] == ([2] * 4 if compositional_head else [2, 2, 1, 1])
    w, x = th.randn(3, 2), th.randn(3, 4, 5 + unique_dim)
    composed = mlp.forward_composed(x, mlp.compose(w)).detach()
    mixed = mlp.forward_mixed(x.flatten(0, 1), w.repeat_interleave(4, dim=0)).detach()
    th.testing.assert_close(mixed.view_as(composed), composed, rtol=1e-4, atol=1e-4)
    for task in range(3):
        for row in range(4):
            base, unique = np.split(x[task, row].double().numpy(), [5])
            for network in range(2):
                expected = numpy_network(mlp, w[task].double().numpy(), base, unique, network)
                np.testing.assert_allclose(composed[network, task, row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", [SAC, TQC, PPO])
def test_extractor_in_plain_algorithms(algorithm):
    policy_kwargs = dict(
        features_extractor_class=SharedUniqueExtractor,
        features_extractor_kwargs=dict(num_tasks=3, n_param_sets=2, net_arch=[8, 6], unique_dim=5, unique_arch=[7]),
        net_arch=[8],
    )
    off_policy = dict(learning_starts=30, batch_size=16) if algorithm is not PPO else dict(n_steps=32, batch_size=32)
    model = algorithm("MlpPolicy", make_env(), policy_kwargs=policy_kwargs, seed=0, device="cpu", **off_policy)
    owner = model.policy if algorithm is PPO else model.actor
    extractor = owner.features_extractor
    assert extractor.features_dim == 6 + 5
    before = {name: parameter.detach().clone() for name, parameter in extractor.named_parameters()}
    model.learn(150)
    changed = {name for name, parameter in extractor.named_parameters() if not th.equal(parameter, before[name])}
    assert changed == set(before)  # both branches and W learn
    obs = np.concatenate([np.tile([0.1, 0.2, 0.3, 0.4], (3, 1)), np.eye(3)], axis=1).astype(np.float32)
    with th.no_grad():
        features = extractor(th.as_tensor(obs))
        assert th.equal(features[:, :6], extractor.shared(th.as_tensor(obs)))
        assert th.equal(features[:, 6:], extractor.unique(th.as_tensor(obs)))


def test_extractor_without_unique_features_and_with_one_task():
    space = spaces.Box(-1, 1, (7,), np.float32)
    extractor = SharedUniqueExtractor(space, num_tasks=1, net_arch=[6], unique_dim=0)
    assert extractor(th.zeros(2, 7)).shape == (2, extractor.features_dim) == (2, 6)
    extractor = SharedUniqueExtractor(space, num_tasks=1, net_arch=[6], unique_dim=3)
    assert extractor(th.zeros(2, 7)).shape == (2, 9)


def test_extractor_refuses_bad_arguments():
    space = spaces.Box(-1, 1, (7,), np.float32)
    with pytest.raises(ValueError, match="unique_dim must be at least 0, got -1"):
        SharedUniqueExtractor(space, num_tasks=3, unique_dim=-1)
    with pytest.raises(ValueError, match="one-hot of 7 tasks"):
        SharedUniqueExtractor(space, num_tasks=7)
