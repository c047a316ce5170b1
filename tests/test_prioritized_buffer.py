"""TaskPrioritizedReplayBuffer: sums, draws, weights, quotas, priorities, saving; and MTSAC with it."""

import io
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import EveryNTimesteps
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import MultiTaskEvalCallback
from sb3_mtrl.common.prioritized import SuccessWindows, SumTree, TaskPrioritizedReplayBuffer, apportion
from sb3_mtrl.common.vec_env import VecTaskAssignment
from tests.models import ALGORITHMS, DropTasks, make_env, make_model, parameters_of
from tests.test_buffers import BASE_DIM, add
from tests.tiny_envs import PointTasksEnv

PER = TaskPrioritizedReplayBuffer


def make_buffer(num_tasks: int = 3, buffer_size: int = 300, n_envs: int = 1, **kwargs) -> PER:
    observation_space = spaces.Box(-np.inf, np.inf, (BASE_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    return PER(buffer_size, observation_space, action_space, device="cpu", n_envs=n_envs, num_tasks=num_tasks, **kwargs)


def filled_buffer(num_tasks: int = 3, n_rows: int = 40, **kwargs) -> PER:
    buffer = make_buffer(num_tasks, n_envs=num_tasks, **kwargs)
    for value in range(n_rows):
        add(buffer, list(range(num_tasks)), [float(value)] * num_tasks)
    return buffer


def slots_of(batch) -> np.ndarray:
    """Rows are numbered by their first observation entry in these tests."""
    return batch.observations[:, 0].numpy().astype(int)


def tasks_of(batch) -> np.ndarray:
    return batch.observations[:, 1].numpy().astype(int)


# --------------------------------------------------------------------- sum tree


@pytest.mark.parametrize("capacity", [1, 2, 5, 64, 100])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_tree_finds_what_a_cumulative_sum_finds(capacity, num_tasks):
    rng = np.random.default_rng(0)
    tree = SumTree(num_tasks, capacity)
    values = rng.exponential(size=(num_tasks, capacity))
    task_ids, slots = (array.reshape(-1) for array in np.indices(values.shape))
    tree.set(task_ids, slots, values.reshape(-1))
    np.testing.assert_allclose(tree.totals, values.sum(axis=1), rtol=1e-12)
    task_ids = rng.integers(0, num_tasks, 500)
    masses = rng.uniform(size=500) * tree.totals[task_ids]
    expected = [
        np.searchsorted(np.cumsum(values[task]), mass, side="right") for task, mass in zip(task_ids, masses, strict=True)
    ]
    assert tree.find(task_ids, masses).tolist() == expected
    assert np.array_equal(tree.get(task_ids, tree.find(task_ids, masses)), values[task_ids, expected])


@pytest.mark.parametrize("n_rows", [1, 7, 400])  # fewer and more rows than nodes of a level
def test_sums_do_not_drift(n_rows):
    rng = np.random.default_rng(1)
    tree = SumTree(2, 50)
    for _ in range(60_000 // n_rows):
        values = 10 ** rng.uniform(-6, 3, n_rows)
        tree.set(rng.integers(0, 2, n_rows), rng.integers(0, 50, n_rows), values)
    updated = tree.nodes.copy()
    tree.rebuild()
    assert np.array_equal(updated, tree.nodes)  # to the bit
    # Pairwise sums: at most 6 roundings, each of half a unit in the last place
    np.testing.assert_allclose(tree.totals, [np.longdouble(leaves).sum() for leaves in tree.leaves], rtol=7 * 2**-53)


def test_the_last_of_several_values_for_a_leaf_stays():
    tree = SumTree(1, 4)
    tree.set(np.zeros(3, int), np.array([2, 1, 2]), np.array([5.0, 1.0, 7.0]))
    assert tree.leaves.tolist() == [[0.0, 1.0, 7.0, 0.0]]
    assert tree.totals.tolist() == [8.0]


@pytest.mark.parametrize("capacity", [1, 6])
def test_filling_a_task_keeps_the_sums_right(capacity):
    tree = SumTree(3, capacity)
    tree.leaves[:, :capacity] = np.random.default_rng(0).uniform(size=(3, capacity))
    tree.rebuild()
    others = tree.totals[[0, 2]].copy()
    tree.fill(1, capacity, 0.1)
    filled = tree.nodes.copy()
    tree.rebuild()
    assert np.array_equal(filled, tree.nodes)
    assert tree.totals[1] == pytest.approx(0.1 * capacity)
    assert np.array_equal(tree.totals[[0, 2]], others)


# ------------------------------------------------------------- draws and weights


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_draws_follow_the_priorities_within_a_task(alpha):
    buffer = filled_buffer(2, 5, alpha=alpha)
    errors = np.array([[1.0, 2.0, 4.0, 0.5, 0.01], [3.0, 0.0, 1.0, 1.0, 7.0]])
    indices = np.array([[slot * 2 + task for slot in range(5)] for task in range(2)])  # the n-th row of task t is 2 n + t
    buffer.update_priorities(indices.reshape(-1), errors.reshape(-1))
    np.random.seed(0)
    n_rows, n_batches = 10, 2000
    counts = np.zeros((2, 5))
    for _ in range(n_batches):
        batch = buffer.sample(2 * n_rows)
        np.add.at(counts, (tasks_of(batch), slots_of(batch)), 1)
    priorities = (errors + 1e-6) ** alpha
    expected = priorities / priorities.sum(axis=1, keepdims=True) * n_rows * n_batches
    # Stratified draws vary less than multinomial ones, whose standard deviation is below sqrt(expected)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 1)


def test_draws_are_stratified():
    # Eight rows of equal priority and eight draws: one in each eighth of the sum, so each row exactly once
    buffer = filled_buffer(2, 8)
    for _ in range(20):
        batch = buffer.sample(16)
        assert slots_of(batch).tolist() == [*range(8), *range(8)]


def test_weights_are_those_of_the_formula_and_at_most_one_in_each_task():
    buffer = filled_buffer(3, 40, beta=0.7)
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=(40, 3)) * [1, 10, 100]
    buffer.update_priorities(np.arange(120), errors.reshape(-1))
    batch = buffer.sample(30)
    priorities = np.minimum(errors + 1e-6, 1e3) ** 0.6
    probabilities = priorities / priorities.sum(axis=0)
    expected = (40 * probabilities[slots_of(batch), tasks_of(batch)]) ** -0.7
    for task in range(3):
        of_task = tasks_of(batch) == task
        expected[of_task] /= expected[of_task].max()
        assert batch.weights[of_task].max() == 1
    np.testing.assert_allclose(batch.weights[:, 0].numpy(), expected, rtol=1e-6)


def test_alf_style():
    buffer = filled_buffer(1, 10, per_style="alf", alpha=0.7, beta_end=0.4)
    errors = th.tensor([3.0, 4.0]).view(2, 1, 1)  # two critics, one row
    assert buffer.td_error_sizes(errors).tolist() == [[5.0]]  # sqrt(3^2 + 4^2)
    assert filled_buffer(1, 1).td_error_sizes(errors).tolist() == [[3.5]]
    buffer.update_priorities(np.arange(10), np.arange(10.0))
    batch = buffer.sample(10)
    priorities = (np.arange(10) + 1e-6) ** 0.7
    expected = (priorities[slots_of(batch)] / priorities.mean()) ** -0.4
    np.testing.assert_allclose(batch.weights[:, 0].numpy(), expected, rtol=1e-6)


def test_new_rows_get_the_highest_priority_that_their_task_has_had():
    buffer = filled_buffer(2, 3, alpha=1.0)
    assert buffer.highest_priorities.tolist() == [1.0, 1.0]
    buffer.update_priorities(np.array([0, 0]), np.array([50.0, 2.0]))  # the first row of task 0, twice
    add(buffer, [0, 1], [3.0, 3.0])
    np.testing.assert_allclose(buffer._tree.leaves[:, :4], [[2, 1, 1, 50], [1, 1, 1, 1]], rtol=1e-5)


def test_beta_goes_from_start_to_end():
    buffer = make_buffer(beta=0.4, beta_end=1.0)
    for progress_remaining, expected in ((1.0, 0.4), (0.5, 0.7), (0.0, 1.0), (-0.1, 1.0)):
        buffer.anneal_beta(progress_remaining)
        assert buffer.beta == pytest.approx(expected)


def test_bad_errors_leave_priorities_as_they_are():
    buffer = filled_buffer(1, 4, alpha=1.0, max_priority=100.0)
    buffer.update_priorities(np.arange(4), np.array([np.nan, np.inf, -7.0, 1e9]))
    np.testing.assert_allclose(buffer._tree.leaves[0, :4], [1, 1, 7, 100], rtol=1e-6)
    assert buffer.highest_priorities.tolist() == [100.0]
    with pytest.raises(ValueError, match="one error for each of the 4 indices, got 3"):
        buffer.update_priorities(np.arange(4), np.ones(3))


def test_rows_overwritten_since_they_were_sampled_keep_the_priority_of_the_new_row():
    buffer = make_buffer(2, 8, alpha=1.0)  # 4 places each
    for value in range(4):
        add(buffer, [0], [value])
        add(buffer, [1], [value])
    batch = buffer.sample(16)
    for value in (4, 5):
        add(buffer, [0], [value])  # over rows 0 and 1 of task 0
    buffer.update_priorities(batch.indices, np.full(16, 9.0))
    np.testing.assert_allclose(buffer._tree.leaves, [[1, 1, 9, 9], [9, 9, 9, 9]], rtol=1e-5)
    # A ring later the places are the same again, the rows are not
    for value in range(6, 10):
        add(buffer, [0], [value])
    leaves = buffer._tree.leaves.copy()
    buffer.update_priorities(batch.indices[:8], np.full(8, 2.0))
    assert np.array_equal(buffer._tree.leaves, leaves)


def test_reset_forgets_rows_and_their_indices():
    buffer = filled_buffer(1, 4, alpha=1.0)
    buffer.update_priorities(np.arange(4), np.full(4, 30.0))
    buffer.reset()
    assert buffer._tree.totals.tolist() == [0.0]
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(4)
    add(buffer, [0], [0.0])
    buffer.update_priorities(np.arange(4), np.full(4, 30.0))  # rows of before
    np.testing.assert_allclose(buffer._tree.leaves[0, :4], [1, 0, 0, 0])
    assert set(slots_of(buffer.sample(20))) == {0}


def test_resetting_a_task_touches_no_other():
    buffer = filled_buffer(2, 3, alpha=0.5)
    buffer.update_priorities(np.arange(6), np.full(6, 25.0))
    buffer.reset_task_priorities(0)
    np.testing.assert_allclose(buffer._tree.leaves[:, :4], [[1, 1, 1, 0], [5, 5, 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(buffer._tree.totals, [3, 15], rtol=1e-6)
    np.testing.assert_allclose(buffer.highest_priorities, [1, 25], rtol=1e-6)
    with pytest.raises(ValueError, match="task must be between 0 and 1, got 2"):
        buffer.reset_task_priorities(2)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_one_task_equals_a_slow_prioritized_buffer(batch_size: int):
    """An independent loop over python lists: proportional PER with stratified draws, as in Schaul et al. (2016)."""
    capacity, alpha, beta, eps = 7, 0.6, 0.5, 1e-6
    space, action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32)
    buffer = PER(capacity, space, action_space, device="cpu", task_in_observation=False, alpha=alpha, beta=beta)
    stored, priorities, highest, rng = [], [], 1.0, np.random.default_rng(0)
    for step in range(60):
        obs = np.array([[float(step)]])
        buffer.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
        if step < capacity:
            stored.append(step)
            priorities.append(highest)
        else:
            stored[step % capacity], priorities[step % capacity] = step, highest
        state = np.random.get_state()
        batch = buffer.sample(batch_size)
        np.random.set_state(state)
        uniforms = np.random.random_sample(batch_size)
        total, drawn = sum(p**alpha for p in priorities), []
        for k in range(batch_size):
            mass, slot = (k + uniforms[k]) / batch_size * total, 0
            while mass >= priorities[slot] ** alpha:
                mass -= priorities[slot] ** alpha
                slot += 1
            drawn.append(slot)
        weights = [(len(stored) * priorities[slot] ** alpha / total) ** -beta for slot in drawn]
        assert slots_of(batch).tolist() == [stored[slot] for slot in drawn]
        np.testing.assert_allclose(batch.weights[:, 0].numpy(), np.array(weights) / max(weights), rtol=1e-6)
        errors = rng.normal(size=batch_size) * 10
        buffer.update_priorities(batch.indices, errors)
        for slot, error in zip(drawn, errors, strict=True):
            priorities[slot] = abs(error) + eps
            highest = max(highest, priorities[slot])


# ------------------------------------------------------------------------ quotas


def quotas_when(success_rates: list[float], batch_size: int, **kwargs) -> np.ndarray:
    buffer = filled_buffer(len(success_rates), 2, **kwargs)
    buffer.set_task_performance(np.array(success_rates))
    return buffer.quotas(batch_size)


ONE_HARD = [0.0] + [1.0] * 9


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        # rho = 0.1 for nine tasks, 1 for one: shares 67.37 and 673.68, the three largest remainders of equals go to the first
        (dict(rows_per_group=1), [674, 68, 68, 68, 67, 67, 67, 67, 67, 67]),
        # 98.46 and 393.85
        (dict(rows_per_group=1, rho_min=0.25), [394, 99, 99, 99, 99, 98, 98, 98, 98, 98]),
        # Nothing for solved tasks but the least share
        (dict(rows_per_group=1, rho_min=0.0), [1244] + [4] * 9),
        # In groups of 32, the default: 2.11 and 21.05 of 40 groups
        (dict(), [672, 96] + [64] * 8),
        # In groups of 16: 4.21 and 42.11 of 80 groups
        (dict(rows_per_group=16), [672, 80, 80] + [64] * 7),
        # In groups of 64 one for each, and the others for the unsolved task
        (dict(rows_per_group=64), [704] + [64] * 9),
        # exp(2) / (exp(2) + 9) of the batch: 577.09, the others 78.10
        (dict(rows_per_group=1, task_priority="softmax"), [577, 79] + [78] * 8),
        # rank 1, and rank 6 for nine equals: 1 / (1 + 9 / sqrt(6)) of the batch: 273.9, the others 111.8
        (dict(rows_per_group=1, task_priority="rank"), [274] + [112] * 7 + [111] * 2),
        (dict(task_priority="uniform"), [128] * 10),
    ],
)
def test_quotas_of_one_unsolved_task(kwargs, expected):
    assert quotas_when(ONE_HARD, 1280, **kwargs).tolist() == expected


def test_quotas_of_fifty_tasks():
    # 0.1 / 5.9 and 1 / 5.9 of 6400: 108.47 and 1084.75
    quotas = quotas_when([0.0] + [1.0] * 49, 6400, rows_per_group=1)
    assert quotas[0] == 1085 and set(quotas[1:]) == {108, 109} and quotas.sum() == 6400


@pytest.mark.parametrize("task_priority", ["linear", "softmax", "rank"])
def test_quotas_follow_the_success_rates(task_priority):
    rng = np.random.default_rng(0)
    for rows_per_group in (1, 4, 16):
        success_rates = rng.integers(0, 21, 8) / 20
        quotas = quotas_when(success_rates.tolist(), 8 * 64, task_priority=task_priority, rows_per_group=rows_per_group)
        assert quotas.sum() == 8 * 64
        assert quotas.min() >= 4
        assert np.all(quotas % rows_per_group == 0)
        for i in range(8):  # equals may differ by the group that rounding left over
            assert np.all(quotas[i] >= quotas[success_rates > success_rates[i]])
            assert np.all(np.abs(quotas[success_rates == success_rates[i]] - quotas[i]) <= rows_per_group)


def test_equal_tasks_take_turns():
    """Of 40 groups of 32 rows nine solved tasks are due 2.11 each, the other 21.05: one of the nine gets 3."""
    buffer, gets_more = filled_buffer(10, 2), []
    for _ in range(12):
        buffer.set_task_performance(np.array(ONE_HARD))
        quotas = buffer.quotas(1280)
        assert sorted(quotas.tolist()) == [64] * 8 + [96, 672]
        gets_more.append(quotas.tolist().index(96))
    assert gets_more == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1]  # the turn of task 0 is of no use to it
    restored = filled_buffer(10, 2)
    restored.set_checkpoint_state(buffer.get_checkpoint_state())
    for one in (buffer, restored):
        one.set_task_performance(np.array(ONE_HARD))
    assert buffer.quotas(1280).tolist() == restored.quotas(1280).tolist() == [672, 64, 96] + [64] * 7


def test_largest_remainders():
    # By hand: 10 seats for 0.55, 0.32, 0.13: 5.5, 3.2, 1.3; with a floor of 2 for the last 8 * (0.55, 0.32) / 0.87
    shares = np.array([0.55, 0.32, 0.13])
    assert apportion(shares, 10, np.zeros(3, int)).tolist() == [6, 3, 1]
    assert apportion(shares, 10, np.full(3, 2)).tolist() == [5, 3, 2]
    assert apportion(np.array([0.0, 1.0]), 10, np.array([0, 2])).tolist() == [0, 10]
    assert apportion(np.array([0.0, 1.0]), 10, np.array([3, 2])).tolist() == [3, 7]


def test_quotas_are_equal_until_every_task_is_known():
    buffer = filled_buffer(3, 5)
    assert buffer.quotas(48).tolist() == [16, 16, 16]
    buffer.set_task_performance(np.array([1.0, np.nan, 0.0]))
    assert buffer.quotas(48).tolist() == [16, 16, 16]
    buffer.set_task_performance(np.array([1.0, 1.0, 0.0]))
    assert buffer.task_priorities.tolist() == pytest.approx([0.1 / 1.2, 0.1 / 1.2, 1 / 1.2])
    assert buffer.quotas(480).tolist() == [32, 32, 416]  # 1.25, 1.25 and 12.5 groups of 32
    # A new buffer of a resumed run has rows to collect first
    empty = make_buffer(3, n_envs=1)
    empty.set_task_performance(np.array([1.0, 1.0, 0.0]))
    assert empty.quotas(48).tolist() == [16, 16, 16]
    add(empty, [1], [0.0])
    assert empty.quotas(48).tolist() == [0, 48, 0]
    batch = empty.sample(48)
    assert set(tasks_of(batch)) == {1}
    add(empty, [0], [0.0])
    assert empty.quotas(48).tolist() == [24, 24, 0]
    add(empty, [2], [0.0])
    assert empty.quotas(48).tolist() == [4, 4, 40]  # 1, 1 and 10 groups of 4


def test_batches_have_the_quotas_in_whole_groups():
    buffer = filled_buffer(3, 40)
    buffer.set_task_performance(np.array([1.0, 0.0, 0.5]))
    for batch_size, group_size in ((96, 8), (72, 6), (51, 1), (384, 32)):
        batch = buffer.sample(batch_size)
        assert batch.group_tasks.shape == (batch_size // group_size,)
        assert np.array_equal(tasks_of(batch), np.repeat(batch.group_tasks.numpy(), group_size))
        assert np.bincount(tasks_of(batch), minlength=3).tolist() == buffer.quotas(batch_size).tolist()
        assert th.equal(batch.observations[:, BASE_DIM:].argmax(1), th.from_numpy(tasks_of(batch)))


def test_without_priorities_it_draws_as_the_plain_buffer():
    buffer = filled_buffer(2, 5, alpha=0.0, task_priority="uniform")
    buffer.set_task_performance(np.array([0.0, 1.0]))
    plain = MultiTaskReplayBuffer(300, buffer.observation_space, buffer.action_space, device="cpu", n_envs=2, num_tasks=2)
    for value in range(5):
        add(plain, [0, 1], [float(value)] * 2)
    np.random.seed(0)
    for one in (buffer, plain):
        batch = one.sample(40_000)
        assert np.bincount(tasks_of(batch)).tolist() == [20_000, 20_000]
        counts = np.stack([np.bincount(slots_of(batch)[tasks_of(batch) == task]) for task in (0, 1)])
        # At most binomial(20 000, 1/5): mean 4000, standard deviation 57
        assert np.all(np.abs(counts - 4000) < 5 * 57)
    assert th.all(buffer.sample(40).weights == 1)


# ------------------------------------------------------------------------ saving


def test_saved_buffer_goes_on_bit_for_bit(tmp_path):
    buffer = filled_buffer(3, 120, buffer_size=300)  # rings of 100 that went round
    buffer.update_priorities(buffer.sample(96).indices, np.random.default_rng(0).exponential(size=96) * 5)
    buffer.set_task_performance(np.array([0.2, 0.9, 1.0]))
    buffer.anneal_beta(0.3)
    sampled = buffer.sample(96)
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    loaded = load_from_pkl(tmp_path / "buffer.pkl")
    assert np.array_equal(loaded._tree.nodes, buffer._tree.nodes)
    results = []
    for one in (buffer, loaded):
        np.random.seed(0)
        one.update_priorities(sampled.indices, np.linspace(0, 3, 96))
        add(one, [0, 1, 2], [7.0, 8.0, 9.0])
        batch = one.sample(96)
        results.append([*batch[:5], batch.weights, th.from_numpy(batch.indices), batch.group_tasks])
    assert all(th.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_file_holds_the_data_not_the_capacity():
    assert len(pickle.dumps(filled_buffer(3, 10, buffer_size=300_000))) < 20_000


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(alpha=-0.1), r"alpha must be in \[0, 1\], got -0.1"),
        (dict(beta=1.1), r"beta must be in \[0, 1\], got 1.1"),
        (dict(beta_end=float("nan")), r"beta_end must be in \[0, 1\], got nan"),
        (dict(eps=0.0), "eps must be above 0, got 0"),
        (dict(max_priority=1e-7), "max_priority must be finite and above eps=1e-06, got 1e-07"),
        (dict(rho_min=0.5, rho_max=0.2), "0 <= rho_min <= rho_max .* got 0.5, 0.2"),
        (dict(rho_min=0.0, rho_max=0.0), "0 < rho_max, got 0.0, 0.0"),
        (dict(temperature=0.0), "temperature must be above 0, got 0"),
        (dict(task_priority="return"), "task_priority must be one of 'linear', 'softmax', 'rank', 'uniform', got 'return'"),
        (dict(per_style="rank"), "per_style must be one of 'schaul', 'alf', got 'rank'"),
        (dict(performance_source="test"), "performance_source must be one of 'train', 'eval', got 'test'"),
        (dict(min_rows_per_task=0), "min_rows_per_task must be at least 1, got 0"),
        (dict(performance_window=0), "performance_window must be at least 1, got 0"),
        (dict(rows_per_group=0), "rows_per_group must be at least 1 or None, got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_buffer(**kwargs)


@pytest.mark.parametrize(
    ("batch_size", "kwargs", "message"),
    [
        (25, {}, r"multiple of num_tasks=3.*got 25 \(nearest allowed: 24 or 27\)"),
        (24, dict(rows_per_group=16), "rows_per_group must divide batch_size / num_tasks = 8 or be None, got 16"),
        (9, {}, "min_rows_per_task must be at most batch_size / num_tasks = 3, got 4"),
    ],
)
def test_batches_without_shares_are_refused(batch_size, kwargs, message):
    with pytest.raises(ValueError, match=message):
        filled_buffer(3, 2, **kwargs).sample(batch_size)
    with pytest.raises(ValueError, match=message):
        make_model(batch_size=batch_size, replay_buffer_class=PER, replay_buffer_kwargs=kwargs)


@pytest.mark.parametrize("success_rates", [[0.0, 1.0], [0.0, 0.5, 1.5], [-0.1, 0.0, 0.0]])
def test_bad_success_rates_are_refused(success_rates):
    with pytest.raises(ValueError, match=r"success_rates must be 3 rates in \[0, 1\] or NaN"):
        make_buffer().set_task_performance(np.array(success_rates))


# ------------------------------------------------------------------- algorithms


def prioritized_model(algorithm=MTSAC, collect: int = 60, per: dict | None = None, **kwargs):
    settings = dict(batch_size=48, replay_buffer_class=PER, replay_buffer_kwargs=per or {})
    settings.update(kwargs)
    return make_model(algorithm, collect=collect, **settings)


def train_on(model, batch) -> None:
    """One update on a given batch."""
    sample, model.replay_buffer.sample = model.replay_buffer.sample, lambda *args, **kwargs: batch
    model.set_random_seed(3)
    model.train(1)
    model.replay_buffer.sample = sample


def plain_form(batch, num_tasks: int = 3):
    """The same rows as the plain buffer would have given them, in one group per task."""
    return batch._replace(group_tasks=th.arange(num_tasks), indices=None, weights=None)


@pytest.mark.parametrize("optimizer_order", ["sequential", "joint"])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [(MTSAC, {}), (MTSAC, dict(n_heads="per_task")), (PaCoSAC, {}), (CMTASAC, dict(use_temporal=False))],
)
def test_without_priorities_an_update_is_that_with_the_plain_buffer(algorithm, kwargs, optimizer_order):
    per = dict(alpha=0.0, task_priority="uniform", rows_per_group=4)
    models = [prioritized_model(algorithm, per=per, optimizer_order=optimizer_order, **kwargs) for _ in range(2)]
    batch = models[0].replay_buffer.sample(48)
    assert len(batch.group_tasks) == 12
    for model, samples in zip(models, (batch, plain_form(batch)), strict=True):
        train_on(model, samples)
    ours, plain = (parameters_of(model) for model in models)
    for name, tensor in ours.items():
        th.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)
    for name, total in models[0]._train_sums.items():
        th.testing.assert_close(total, models[1]._train_sums[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "kwargs"), [(MTSAC, {}), (MTSAC, dict(n_heads="per_task")), (PaCoSAC, {})])
def test_groups_of_unequal_shares_give_what_single_rows_give(algorithm, kwargs):
    model = prioritized_model(algorithm, per=dict(rows_per_group=4), **kwargs)
    model.replay_buffer.set_task_performance(np.array([1.0, 0.2, 1.0]))
    batch = model.replay_buffer.sample(48)
    assert batch.group_tasks.tolist() == [0] + [1] * 10 + [2]
    obs, _ = model._observations(batch)
    gradients = []
    for form in (obs, batch.observations):
        model.critic.zero_grad()
        q_values = model.critic.q_values(form, batch.actions)
        q_values.square().mean().backward()
        gradients.append([q_values.detach(), *(p.grad.clone() for p in model.critic.parameters() if p.grad is not None)])
    for grouped, single in zip(*gradients, strict=True):
        th.testing.assert_close(grouped, single, rtol=1e-4, atol=1e-6)


def test_task_means_are_means_over_the_rows_of_each_task():
    model = prioritized_model(per=dict(rows_per_group=4))
    model.replay_buffer.set_task_performance(np.array([1.0, 0.2, 1.0]))
    batch = model.replay_buffer.sample(48)
    values = th.arange(48.0).unsqueeze(1)
    # Rows 0-3, 4-43 and 44-47
    assert model._task_means(values, batch).tolist() == [1.5, 23.5, 45.5]
    only_task_1 = batch._replace(group_tasks=th.ones(12, dtype=th.int64))
    assert model._task_means(values, only_task_1).tolist() == [0.0, 23.5, 0.0]
    assert model._rows(th.tensor([5.0, 6.0, 7.0]), batch)[:, 0].tolist() == [5.0] * 4 + [6.0] * 40 + [7.0] * 4


def test_quotas_act_on_the_critic_loss():
    """A task with ten of twelve parts of the batch has that part of the loss; means per task would give it a third."""
    model = prioritized_model(per=dict(rows_per_group=4))
    buffer = model.replay_buffer
    buffer.set_task_performance(np.array([1.0, 0.2, 1.0]))
    batch = buffer.sample(48)._replace(weights=None)
    task_errors = th.tensor([0.0, 2.0, 0.0])
    td_errors = model._rows(task_errors, batch).expand(2, -1, -1)
    # Half the squares of both critics: 4 for rows of task 1
    assert model._critic_loss(td_errors, None, batch).item() == pytest.approx(4 * 40 / 48)
    mean_per_task = model._task_means(model._critic_losses(td_errors), batch).mean()
    assert mean_per_task.item() == pytest.approx(4 / 3)  # whatever the quotas


def test_weights_act_on_the_critic_loss_alone():
    models = [prioritized_model(ent_coef="auto") for _ in range(2)]
    batch = models[0].replay_buffer.sample(48)
    for model, weight in zip(models, (1.0, 0.0), strict=True):
        train_on(model, batch._replace(weights=th.full((48, 1), weight)))
    weighted = models[1]
    before = prioritized_model()
    # Weights of zero leave the critics where they were, and the temperature's step as it was
    for name, tensor in weighted.critic.state_dict().items():
        assert th.equal(tensor, before.critic.state_dict()[name])
    assert th.equal(weighted.log_ent_coef, models[0].log_ent_coef)
    assert not th.equal(weighted.actor.mu.weight, before.actor.mu.weight)
    td_errors = th.randn(2, 48, 1)
    expected = (batch.weights * 0.5 * td_errors.square().sum(dim=0)).mean()
    th.testing.assert_close(weighted._critic_loss(td_errors, None, batch), expected)


@pytest.mark.parametrize(
    ["algorithm", "settings"],
    [
        (TSACSAC, {}),  # has one order
        *(
            (algorithm, dict(optimizer_order=order))
            for algorithm in (MTSAC, PaCoSAC, CMTASAC, STARSSAC)
            for order in ("sequential", "joint")
        ),
    ],
)
def test_priorities_become_the_errors_before_the_update(algorithm, settings):
    model = prioritized_model(algorithm, per=dict(alpha=1.0), **settings)
    buffer = model.replay_buffer
    batch = buffer.sample(48)
    told = []
    buffer.update_priorities, update = lambda *args: (told.append(args), update(*args)), buffer.update_priorities
    train_on(model, batch)
    ((indices, sizes),) = told
    assert indices is batch.indices
    numbers, task_ids = np.divmod(indices, 3)
    expected = dict(zip(zip(task_ids, numbers, strict=True), sizes[:, 0].tolist(), strict=True))
    for (task, slot), size in expected.items():
        assert buffer._tree.leaves[task, slot] == pytest.approx(size + 1e-6, rel=1e-5)


def test_the_error_of_a_row_is_the_mean_over_the_critics():
    model = prioritized_model(ent_coef=0.3, gamma=0.9)
    batch = model.replay_buffer.sample(48)
    told = []
    model.replay_buffer.update_priorities = lambda indices, sizes: told.append(sizes)
    reference = prioritized_model(ent_coef=0.3, gamma=0.9)
    train_on(model, batch)
    # SB3's formulas, with the draws in the order of the update
    reference.set_random_seed(3)
    with th.no_grad():
        reference.actor.action_log_prob(batch.observations)
        next_actions, next_log_prob = reference.actor.action_log_prob(batch.next_observations)
        next_q = th.min(*reference.critic_target(batch.next_observations, next_actions))
        target = batch.rewards + 0.9 * (1 - batch.dones) * (next_q - 0.3 * next_log_prob.reshape(-1, 1))
        q1, q2 = reference.critic(batch.observations, batch.actions)
    th.testing.assert_close(told[0], ((q1 - target).abs() + (q2 - target).abs()) / 2, rtol=1e-4, atol=1e-5)


def test_dropped_tasks_keep_their_priorities_and_spoilt_rows_lose_them():
    model = prioritized_model(per=dict(alpha=1.0), on_nonfinite="mask")
    buffer = model.replay_buffer
    model.add_update_guard(DropTasks([False, True, False]))
    buffer._rows[buffer.capacity_per_task * 2 + np.arange(20), 0] = np.nan  # all of task 2
    before = buffer._tree.leaves.copy()
    for _ in range(5):
        model.train(1)
    assert np.array_equal(buffer._tree.leaves[1], before[1])
    # Else a row that is never learned from would be drawn, and its task dropped, for ever
    changed = buffer._tree.leaves[2] != before[2]
    assert changed.any() and np.allclose(buffer._tree.leaves[2][changed], buffer.eps)
    assert not np.array_equal(buffer._tree.leaves[0], before[0])
    assert np.isfinite(buffer._tree.nodes).all()
    # Without guards, too
    other = prioritized_model(per=dict(alpha=1.0), on_nonfinite="mask")
    other.replay_buffer._rows[:, 0] = np.nan
    before = other.replay_buffer._tree.leaves.copy()
    other.train(1)
    changed = other.replay_buffer._tree.leaves != before
    assert changed.any() and np.allclose(other.replay_buffer._tree.leaves[changed], other.replay_buffer.eps)


def test_a_task_that_is_not_finite_does_not_reach_the_others_through_its_groups():
    model = prioritized_model(PaCoSAC, per=dict(rows_per_group=4), w_reset=False)
    buffer = model.replay_buffer
    buffer.set_task_performance(np.array([1.0, 0.2, 1.0]))
    buffer._rows[buffer.capacity_per_task : buffer.capacity_per_task + 20, 0] = 1e38  # task 1, in 10 of 12 groups
    before = parameters_of(model)
    model.train(3)
    assert model.dropped_updates.tolist() == [0.0, 3.0, 0.0]
    after = parameters_of(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    w = "compositional_vectors"
    assert th.equal(after[w][1], before[w][1])
    assert not th.equal(after[w][0], before[w][0])


@pytest.mark.parametrize(("own", "stored"), [(PER, MultiTaskReplayBuffer), (MultiTaskReplayBuffer, PER)])
def test_a_buffer_of_the_other_kind_is_not_loaded(tmp_path, own, stored):
    make_model(collect=30, replay_buffer_class=stored).save_replay_buffer(tmp_path / "buffer")
    model = make_model(replay_buffer_class=own)
    before = model.replay_buffer
    with pytest.raises(ValueError, match=f"path must name a {own.__name__}, got .*, a {stored.__name__}"):
        model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is before


def test_settings_of_a_loaded_buffer_are_named_where_they_differ(tmp_path, recwarn):
    prioritized_model().save_replay_buffer(tmp_path / "buffer")
    prioritized_model(collect=0).load_replay_buffer(tmp_path / "buffer")
    assert not [warning for warning in recwarn if "goes on with its own" in str(warning.message)]
    other = prioritized_model(collect=0, per=dict(alpha=0.2, rho_min=0.5))
    with pytest.warns(UserWarning, match=r"goes on with its own alpha=0.6, rho_min=0.1$"):
        other.load_replay_buffer(tmp_path / "buffer")


def test_windows_of_a_loaded_model_go_on_in_its_settings(tmp_path):
    model = prioritized_model(per=dict(performance_window=4), learning_starts=0)
    model.success_windows.windows[0].extend([1.0, 0.0, 1.0])
    model.save(tmp_path / "model")
    buffer_kwargs = dict(performance_window=2)
    longer = MTSAC.load(tmp_path / "model", env=make_env(), replay_buffer_kwargs=buffer_kwargs)
    assert list(longer.success_windows.windows[0]) == [0.0, 1.0]  # the last two
    by_eval = MTSAC.load(tmp_path / "model", env=make_env(), replay_buffer_kwargs=dict(performance_source="eval"))
    assert by_eval.success_windows is None


def test_windows_hold_training_episodes_after_the_warm_up():
    windows = SuccessWindows(2, window_size=3)
    windows.start_episodes(2)
    tasks = np.array([1, 0])

    def step(solved, dones, is_warm_up=False) -> bool:
        return windows.add_step(tasks, np.array(dones), [{"is_success": flag} for flag in solved], is_warm_up)

    assert not step([True, False], [False, True], is_warm_up=True)
    assert not step([False, False], [True, False])  # sub-environment 0 began this episode in the warm-up
    assert np.isnan(windows.rates).all()
    step([True, False], [False, False])
    assert step([False, False], [True, True])  # solved at an earlier step; never solved
    assert windows.rates.tolist() == [0.0, 1.0]
    step([True, True], [False, False])
    windows.start_episodes(2)  # the environment was reset
    assert step([False, False], [True, True])
    assert windows.rates.tolist() == [0.0, 0.5]
    for _ in range(3):
        step([True, True], [True, True])
    assert windows.rates.tolist() == [1.0, 1.0]  # of the last three
    with pytest.warns(UserWarning, match="the infos have no is_success"):
        assert not windows.add_step(tasks, np.array([True, True]), [{}, {}], False)


def test_training_feeds_the_task_priorities():
    # Task 0 is solved wherever the point is, the others nowhere
    env = make_env(3, horizon=5)
    for sub_env in env.venv.envs:
        if sub_env.unwrapped.assigned_tasks == (0,):
            sub_env.unwrapped.tolerance = 1e9
        else:
            sub_env.unwrapped.tolerance = 0.0
    model = prioritized_model(env=env, collect=0, learning_starts=30, per=dict(performance_window=4))
    model.learn(30)  # two episodes of warm-up each
    assert model.success_windows.rates.tolist() == pytest.approx([np.nan] * 3, nan_ok=True)
    model.learn(45, reset_num_timesteps=False)
    assert model.success_windows.rates.tolist() == [1.0, 0.0, 0.0]
    assert model.replay_buffer.success_rates.tolist() == [1.0, 0.0, 0.0]
    # 0.71, 7.14 and 7.14 groups of 32
    assert model.replay_buffer.quotas(480).tolist() == [32, 224, 224]
    assert model.replay_buffer.beta == pytest.approx(0.4 + 0.6 * (1 - model._current_progress_remaining))


def test_logged_shares():
    model = prioritized_model(batch_size=480)
    model.replay_buffer.set_task_performance(np.array([1.0, 0.5, 0.0]))
    logged = {}
    model.logger.dump = lambda step=0: logged.update(model.logger.name_to_value)
    model.dump_logs()
    quotas = [logged[f"train/priority_quota/point-{task}"] for task in range(3)]
    assert quotas == model.replay_buffer.quotas(480).tolist()
    assert [logged[f"train/priority_success/point-{task}"] for task in range(3)] == [1.0, 0.5, 0.0]
    assert logged["train/priority_success"] == 0.5
    assert logged["train/priority_success_std"] == pytest.approx(np.sqrt(1 / 6))
    assert logged["train/priority_success_worst"] == 0.0
    shares = [logged[f"train/priority_task/point-{task}"] for task in range(3)]
    assert shares == pytest.approx([0.1 / 1.6, 0.5 / 1.6, 1 / 1.6])


def test_performance_of_evaluations_without_evaluations_is_warned_about():
    model = make_model(STARSSAC, performance_source="eval")
    idle = MultiTaskEvalCallback(make_env(), eval_freq=-1, verbose=0)
    for callback in (None, idle):
        with pytest.warns(UserWarning, match="performance_source='eval' needs the evaluations of a MultiTaskEvalCallback"):
            model.learn(3, callback=callback)
    evaluation = MultiTaskEvalCallback(make_env(), eval_freq=1000, verbose=0)
    for callback in (evaluation, [evaluation], EveryNTimesteps(1000, evaluation)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="performance_source")
            model.learn(3, callback=callback)


class SilentEnv(PointTasksEnv):
    """It tells nothing of success."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        del info["is_success"]
        return obs, reward, terminated, truncated, info


def silent_evaluation(num_tasks: int) -> MultiTaskEvalCallback:
    env = VecTaskAssignment(DummyVecEnv([lambda: SilentEnv(num_tasks, horizon=4)]))
    return MultiTaskEvalCallback(env, n_eval_episodes=num_tasks, eval_freq=1, verbose=0, warn=False)


@pytest.mark.parametrize(("num_tasks", "task_priority"), [(3, "uniform"), (1, "linear")])
def test_shares_that_follow_nothing_need_no_evaluations(num_tasks, task_priority):
    model = make_model(STARSSAC, make_env(num_tasks), performance_source="eval", task_priority=task_priority)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="performance_source|the evaluation tells")
        model.learn(3)
        model.learn(3, callback=silent_evaluation(num_tasks))


def test_evaluations_without_success_are_warned_about():
    model = make_model(STARSSAC, performance_source="eval")
    with pytest.warns(UserWarning, match=r"the evaluation tells nothing of success.* unless you call set_task_performance"):
        model.learn(3, callback=silent_evaluation(3))


def test_evaluation_feeds_the_task_priorities_where_asked_to():
    for source in ("train", "eval"):
        model = prioritized_model(collect=0, learning_starts=10_000, per=dict(performance_source=source))
        eval_env = make_env(3, n_envs=1, horizon=4, tolerance=1e9)
        model.learn(30, callback=MultiTaskEvalCallback(eval_env, n_eval_episodes=3, eval_freq=10, verbose=0, warn=False))
        if source == "eval":
            assert model.success_windows is None
            assert model.replay_buffer.success_rates.tolist() == [1.0, 1.0, 1.0]
        else:
            assert np.isnan(model.replay_buffer.success_rates).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_is_the_run_without_a_break(algorithm):
    settings = dict(collect=0, learning_starts=30, buffer_size=90, per=dict(performance_window=4))
    settings["env"] = make_env(horizon=5, tolerance=0.8)
    model = prioritized_model(algorithm, **settings)
    model.learn(150)
    file, buffer_file = io.BytesIO(), io.BytesIO()
    model.save(file)
    model.save_replay_buffer(buffer_file)
    file.seek(0)
    buffer_file.seek(0)
    loaded = algorithm.load(file, device="cpu")
    loaded.load_replay_buffer(buffer_file)
    assert isinstance(loaded.replay_buffer, PER)
    assert loaded.success_windows.windows == model.success_windows.windows
    for one in (model, loaded):  # both at the same point of the same environment
        one.set_env(make_env(horizon=5, tolerance=0.8))
        one.set_random_seed(11)
        one.learn(150, reset_num_timesteps=False)
    assert np.isfinite(model.replay_buffer.success_rates).all()
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())
    assert np.array_equal(model.replay_buffer._tree.nodes, loaded.replay_buffer._tree.nodes)
    assert np.array_equal(model.replay_buffer._rows, loaded.replay_buffer._rows)
    assert loaded.success_windows.windows == model.success_windows.windows
    assert np.array_equal(model.replay_buffer.quotas(48), loaded.replay_buffer.quotas(48))


def test_a_model_loaded_without_its_buffer_starts_with_equal_shares():
    model = prioritized_model(collect=0, learning_starts=30, env=make_env(horizon=5, tolerance=0.8))
    model.learn(90)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = MTSAC.load(file, env=make_env(horizon=5), device="cpu")
    assert isinstance(loaded.replay_buffer, PER)
    assert loaded.success_windows.windows == model.success_windows.windows
    assert loaded.replay_buffer.quotas(48).tolist() == [16, 16, 16]
    loaded.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_task_of_any_environment(algorithm):
    model = algorithm(
        "MlpPolicy",
        "Pendulum-v1",
        batch_size=32,
        learning_starts=20,
        replay_buffer_class=PER,
        policy_kwargs=dict(net_arch=[8]),
        device="cpu",
        seed=0,
    )
    model.learn(40)
    buffer = model.replay_buffer
    assert model.success_windows is None
    assert buffer.base_dim == 3
    assert len(np.unique(buffer._tree.leaves[0, :40])) > 10
    assert buffer.sample(32).group_tasks.tolist() == [0]
