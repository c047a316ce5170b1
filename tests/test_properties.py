"""
Properties that hold for any input, tried with inputs that hypothesis draws: the buffers beside a model made of Python lists,
layers beside explicit loops over tasks, statistics beside scipy and plain definitions, samplers.
"""

import math
import pickle
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scipy import stats
from torch import nn

from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.compositional import CompositionCache, TaskVectors, forward_groups
from sb3_mtrl.common.evaluation import wilson_interval
from sb3_mtrl.common.prioritized import TASK_PRIORITIES, SuccessWindows, SumTree, TaskPrioritizedReplayBuffer, apportion
from sb3_mtrl.common.shared_unique import SharedUniqueMLP, sample_triplets
from sb3_mtrl.common.statistics import interquartile_mean, stratified_bootstrap, success_interval_over_runs
from sb3_mtrl.common.torch_layers import CompositionalLinear, CompositionalMLP, ExpertMixtureExtractor, Experts, TaskHeads
from sb3_mtrl.common.utils import check_choice, check_number
from sb3_mtrl.common.vec_env import TaskMeanStd, VecTaskNormalize, split_tasks
from sb3_mtrl.zoo.algorithms import ALGORITHMS as ZOO_ALGORITHMS
from sb3_mtrl.zoo.exp_manager import MultiTaskExperimentMixin
from tests.models import make_env

BASE_DIM = 3
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
SEEDS = st.integers(0, 2**32 - 1)


def share_of_examples(divisor: int) -> settings:
    """Fewer examples for tests whose examples take long; hypothesis' profile says how many there are else."""
    return settings(max_examples=max(2, settings.default.max_examples // divisor))


# ---------------------------------------------------------------------- buffers


class BufferMachine(RuleBasedStateMachine):
    """
    A buffer beside a list of the rows of each task, in the order in which they came.

    Rows are numbered: number n is the first entry of its observation, and all its other values follow from n and the task.
    """

    prioritized = False

    @initialize(
        num_tasks=st.integers(1, 4),
        capacity=st.integers(1, 9),
        surplus=st.integers(0, 3),
        n_envs=st.integers(1, 5),
        n_columns=st.integers(0, 2),
        handles_timeouts=st.booleans(),
        data=st.data(),
    )
    def make(self, num_tasks, capacity, surplus, n_envs, n_columns, handles_timeouts, data) -> None:
        self.num_tasks, self.capacity, self.n_envs = num_tasks, capacity, n_envs
        self.columns = {f"column_{index}": index + 1 for index in range(n_columns)}
        self.handles_timeouts = handles_timeouts
        self.settings = self.draw_settings(data) if self.prioritized else {}
        self.buffer = (TaskPrioritizedReplayBuffer if self.prioritized else MultiTaskReplayBuffer)(
            num_tasks * capacity + min(surplus, num_tasks - 1),
            spaces.Box(-np.inf, np.inf, (BASE_DIM + num_tasks,), np.float32),
            spaces.Box(-1, 1, (2,), np.float32),
            device="cpu",
            n_envs=n_envs,
            handle_timeout_termination=handles_timeouts,
            num_tasks=num_tasks,
            extra_columns=self.columns,
            **self.settings,
        )
        self.n_rows = 0
        self.rows: list[list[int]] = [[] for _ in range(num_tasks)]  # numbers of all rows since the last reset
        self.dones: dict[int, float] = {}
        self.start_priorities()

    def draw_settings(self, data: Any) -> dict[str, Any]:
        return {}

    def start_priorities(self) -> None:
        pass

    def kept(self, task: int) -> list[int]:
        return self.rows[task][-self.capacity :]

    def values_of(self, number: int, task: int) -> dict[str, np.ndarray]:
        one_hot = np.eye(self.num_tasks)[task]
        return {
            "observations": np.array([number, task, 0.5 * number, *one_hot]),
            "next_observations": np.array([number + 0.5, task, -number, *one_hot]),
            "actions": np.array([number % 7, number % 5]) / 7,
            "rewards": np.array([3.0 * number - task]),
            "dones": np.array([self.dones[number]]),
            **{name: np.arange(width) + number for name, width in self.columns.items()},
        }

    @rule(data=st.data())
    def add(self, data: Any) -> None:
        tasks = data.draw(st.lists(st.integers(0, self.num_tasks - 1), min_size=self.n_envs, max_size=self.n_envs))
        dones = data.draw(st.lists(st.booleans(), min_size=self.n_envs, max_size=self.n_envs))
        truncations = data.draw(st.lists(st.booleans(), min_size=self.n_envs, max_size=self.n_envs))
        in_extras = data.draw(st.booleans())
        numbers = list(range(self.n_rows, self.n_rows + self.n_envs))
        self.n_rows += self.n_envs
        for number, task, done, truncated in zip(numbers, tasks, dones, truncations, strict=True):
            self.dones[number] = float(done and not (truncated and self.handles_timeouts))
            self.rows[task].append(number)
            self.row_came(number, task)
        parts = [self.values_of(number, task) for number, task in zip(numbers, tasks, strict=True)]
        columns = {name: np.stack([part[name] for part in parts]).astype(np.float32) for name in parts[0]}
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": truncated} for truncated in truncations]
        extras = {name: columns[name] for name in self.columns}
        if not in_extras:
            infos = [{**info, **{name: extras[name][index] for name in extras}} for index, info in enumerate(infos)]
        self.buffer.add(
            columns["observations"],
            columns["next_observations"],
            columns["actions"],
            columns["rewards"][:, 0],
            np.array(dones),
            infos,
            extras if in_extras else None,
        )

    def row_came(self, number: int, task: int) -> None:
        pass

    @rule(rows_per_task=st.integers(1, 9))
    def sample(self, rows_per_task: int) -> None:
        batch_size = rows_per_task * self.num_tasks
        if not any(self.rows):
            with pytest.raises(ValueError, match="empty"):
                self.buffer.sample(batch_size)
            return
        self.check_batch(self.buffer.sample(batch_size), batch_size)

    def check_batch(self, batch: Any, batch_size: int) -> None:
        filled = [task for task in range(self.num_tasks) if self.rows[task]]
        group_tasks = batch.group_tasks.tolist()
        assert len(group_tasks) == self.num_tasks and set(group_tasks) == set(filled)
        assert all(group_tasks[task] == task for task in filled)
        self.check_rows(batch, batch_size)

    def check_rows(self, batch: Any, batch_size: int) -> list[tuple[int, int]]:
        """All values of each row are those of one stored row, of the task of its group; returns (number, task) of each."""
        group_tasks = batch.group_tasks.tolist()
        tasks = np.repeat(group_tasks, batch_size // len(group_tasks)).tolist()
        assert len(tasks) == batch_size == len(batch.observations)
        numbers = batch.observations[:, 0].long().tolist()
        values = {**batch._asdict(), **batch.extras}
        for index, (number, task) in enumerate(zip(numbers, tasks, strict=True)):
            assert number in self.kept(task)
            for name, expected in self.values_of(number, task).items():
                assert np.array_equal(values[name][index].numpy(), expected.astype(np.float32)), name
        return list(zip(numbers, tasks, strict=True))

    @rule()
    def save_and_load(self) -> None:
        self.buffer = pickle.loads(pickle.dumps(self.buffer))

    @rule()
    def reset(self) -> None:
        self.buffer.reset()
        self.rows = [[] for _ in range(self.num_tasks)]
        self.start_priorities()

    @rule(batch_size=st.integers(-3, 30))
    def refuse_unequal_shares(self, batch_size: int) -> None:
        if any(self.rows) and (batch_size < 1 or batch_size % self.num_tasks):
            with pytest.raises(ValueError, match="batch_size must be a positive multiple"):
                self.buffer.sample(batch_size)

    @invariant()
    def holds_the_last_rows_of_each_task(self) -> None:
        assert self.buffer.sizes().tolist() == [len(self.kept(task)) for task in range(self.num_tasks)]
        assert self.buffer.size() == sum(len(self.kept(task)) for task in range(self.num_tasks))
        rings = self.buffer._rows.reshape(self.num_tasks, self.capacity, -1)
        for task in range(self.num_tasks):
            # A ring holds row i of its task at place i modulo its length
            kept = {index % self.capacity: number for index, number in enumerate(self.rows[task])}
            assert rings[task, : len(kept), 0].tolist() == [kept[place] for place in range(len(kept))]


class PrioritizedBufferMachine(BufferMachine):
    """The same with priorities: the value of each leaf, the draws and the importance weights are computed from the list."""

    prioritized = True

    def draw_settings(self, data: Any) -> dict[str, Any]:
        return dict(
            alpha=data.draw(st.sampled_from([0.0, 0.6, 1.0])),
            beta=data.draw(st.sampled_from([0.0, 0.4, 1.0])),
            eps=data.draw(st.sampled_from([1e-6, 0.5])),
            max_priority=data.draw(st.sampled_from([0.75, 1e3])),
            task_priority=data.draw(st.sampled_from(TASK_PRIORITIES)),
            per_style=data.draw(st.sampled_from(["schaul", "alf"])),
            min_rows_per_task=1,
        )

    def start_priorities(self) -> None:
        self.start = min(1.0, self.settings["max_priority"])
        self.highest = [self.start] * self.num_tasks
        self.priorities: dict[int, float] = {}
        self.success_rates: np.ndarray | None = getattr(self, "success_rates", None)  # a reset keeps them
        if not hasattr(self, "indices"):
            self.indices: dict[int, tuple[int, int]] = {}  # index that a sample gave -> (number, task)

    def row_came(self, number: int, task: int) -> None:
        self.priorities[number] = self.highest[task]

    def masses(self, task: int) -> np.ndarray:
        return np.array([self.priorities[number] ** self.settings["alpha"] for number in self.kept(task)])

    def check_batch(self, batch: Any, batch_size: int) -> None:
        rows = self.check_rows(batch, batch_size)
        for index, row in zip(batch.indices.tolist(), rows, strict=True):
            assert self.indices.setdefault(index, row) == row  # an index means one row for ever
        counts = np.bincount([task for _, task in rows], minlength=self.num_tasks)
        assert counts.tolist() == self.buffer.quotas(batch_size).tolist()
        filled = [task for task in range(self.num_tasks) if self.rows[task]]
        assert all((counts[task] > 0) == (task in filled) for task in range(self.num_tasks))
        weights = batch.weights[:, 0].numpy()
        for task in filled:
            numbers = [number for number, its_task in rows if its_task == task]
            masses, kept = self.masses(task), self.kept(task)
            for number, probability in zip(kept, masses / masses.sum(), strict=True):
                # One draw in each of n equal parts: a row covers n P of them, and touches at most one more at either end
                expected = len(numbers) * probability
                assert math.floor(expected - 1e-6) - 1 <= numbers.count(number) <= math.ceil(expected + 1e-6) + 1
            probabilities = np.array([masses[kept.index(number)] for number in numbers]) / masses.sum()
            expected_weights = (len(kept) * probabilities) ** -self.settings["beta"]
            if self.settings["per_style"] == "schaul":
                expected_weights /= expected_weights.max()
            own = [weight for weight, (_, its_task) in zip(weights, rows, strict=True) if its_task == task]
            np.testing.assert_allclose(own, expected_weights, rtol=1e-5)

    @precondition(lambda self: self.indices)
    @rule(data=st.data())
    def update_priorities(self, data: Any) -> None:
        """Errors of rows that were sampled at some time: some were overwritten, or forgotten by a reset."""
        indices = data.draw(st.lists(st.sampled_from(sorted(self.indices)), min_size=1, max_size=12))
        error = st.one_of(st.floats(-1e4, 1e4), st.just(math.nan), st.just(math.inf))
        errors = data.draw(st.lists(error, min_size=len(indices), max_size=len(indices)))
        self.buffer.update_priorities(np.array(indices), np.array(errors))
        for index, error in zip(indices, errors, strict=True):
            number, task = self.indices[index]
            if number in self.kept(task) and math.isfinite(error):
                priority = min(abs(error) + self.settings["eps"], self.settings["max_priority"])
                self.priorities[number] = priority
                self.highest[task] = max(self.highest[task], priority)

    @rule(data=st.data())
    def tell_performance(self, data: Any) -> None:
        rate = st.one_of(st.floats(0, 1), st.just(math.nan))
        self.success_rates = np.array(data.draw(st.lists(rate, min_size=self.num_tasks, max_size=self.num_tasks)))
        self.buffer.set_task_performance(self.success_rates)

    @rule(data=st.data())
    def reset_task(self, data: Any) -> None:
        task = data.draw(st.integers(0, self.num_tasks - 1))
        self.buffer.reset_task_priorities(task)
        self.highest[task] = self.start
        self.priorities.update(dict.fromkeys(self.kept(task), self.start))

    @invariant()
    def leaves_are_the_priorities(self) -> None:
        assert self.buffer.highest_priorities.tolist() == self.highest
        for task in range(self.num_tasks):
            kept = {index % self.capacity: number for index, number in enumerate(self.rows[task])}
            expected = [self.priorities[kept[place]] ** self.settings["alpha"] for place in range(len(kept))]
            # numpy's power is not Python's to the last bit
            np.testing.assert_allclose(self.buffer._tree.leaves[task, : len(kept)], expected, rtol=1e-14)
            assert not self.buffer._tree.leaves[task, len(kept) :].any()
            assert self.buffer._tree.totals[task] == pytest.approx(sum(expected), rel=1e-12)

    @invariant()
    def shares_are_equal_until_all_is_known(self) -> None:
        if not any(self.rows):
            return
        shares = self.buffer.task_priorities
        assert shares.sum() == pytest.approx(1)
        is_known = self.success_rates is not None and np.isfinite(self.success_rates).all()
        if not (is_known and all(self.rows)):
            filled = np.array([len(rows) > 0 for rows in self.rows])
            np.testing.assert_allclose(shares, filled / filled.sum())


TestBuffer = BufferMachine.TestCase
TestPrioritizedBuffer = PrioritizedBufferMachine.TestCase
TestBuffer.settings = TestPrioritizedBuffer.settings = settings(stateful_step_count=30)


@given(num_tasks=st.integers(1, 5), capacity=st.integers(1, 70), data=st.data())
def test_sum_tree_holds_plain_sums(num_tasks, capacity, data):
    """Any changes of leaves, several for one leaf among them, beside an array of leaves."""
    tree, leaves = SumTree(num_tasks, capacity), np.zeros((num_tasks, capacity))
    rows = st.lists(
        st.tuples(st.integers(0, num_tasks - 1), st.integers(0, capacity - 1), st.floats(1e-6, 1e3)), max_size=3 * capacity
    )
    for changes in data.draw(st.lists(rows, max_size=4)):
        task_ids, slots = (np.array([change[axis] for change in changes], dtype=np.int64) for axis in (0, 1))
        tree.set(task_ids, slots, np.array([change[2] for change in changes]))
        for task, slot, value in changes:
            leaves[task, slot] = value
        if data.draw(st.booleans()):
            task, n_leaves = data.draw(st.integers(0, num_tasks - 1)), data.draw(st.integers(0, capacity))
            tree.fill(task, n_leaves, 2.0)
            leaves[task, :n_leaves] = 2.0
    assert np.array_equal(tree.leaves[:, :capacity], leaves) and not tree.leaves[:, capacity:].any()
    np.testing.assert_allclose(tree.totals, leaves.sum(axis=1), rtol=1e-12)
    updated = tree.nodes.copy()
    tree.rebuild()
    assert np.array_equal(updated[num_tasks:], tree.nodes[num_tasks:])
    for task in np.flatnonzero(leaves.any(axis=1)):
        # The mass in the middle of a leaf finds this leaf
        middles = np.cumsum(leaves[task]) - leaves[task] / 2
        used = np.flatnonzero(leaves[task] > 1e-9 * leaves[task].sum())
        assert tree.find(np.full(len(used), task), middles[used]).tolist() == used.tolist()


# ------------------------------------------------------------------------ quotas


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=12), n_seats=st.integers(0, 300), data=st.data())
def test_apportion_by_largest_remainders(weights, n_seats, data):
    shares = np.array(weights) / sum(weights)
    n_tasks = len(shares)
    least = data.draw(st.integers(0, n_seats // n_tasks))
    floors = np.full(n_tasks, least)
    seats = apportion(shares, n_seats, floors)
    assert seats.sum() == n_seats and np.all(seats >= floors)
    # Who has the larger share does not get less; equal shares differ by one seat at most
    for first in range(n_tasks):
        for second in range(n_tasks):
            if shares[first] > shares[second] + 1e-6:
                assert seats[first] >= seats[second]
            if shares[first] == shares[second]:
                assert abs(seats[first] - seats[second]) <= 1
    exact = [Fraction(weight * n_seats, sum(weights)) for weight in weights]
    if all(share >= least for share in exact):  # nobody has to give up a seat for another one's floor
        assert all(count in (math.floor(share), math.ceil(share)) for count, share in zip(seats, exact, strict=True))
        rounded_up = [share % 1 for count, share in zip(seats, exact, strict=True) if count > share]
        rounded_down = [share % 1 for count, share in zip(seats, exact, strict=True) if count < share]
        assert not rounded_up or not rounded_down or min(rounded_up) >= max(rounded_down)


@given(
    rates=st.lists(st.floats(0, 1), min_size=2, max_size=8),
    rows_per_task=st.integers(1, 40),
    task_priority=st.sampled_from(TASK_PRIORITIES),
    min_rows=st.integers(1, 8),
    rows_per_group=st.sampled_from([None, 1, 2, 5]),
    rho_min=st.floats(0, 1),
)
def test_quotas_are_whole_groups_and_favour_weak_tasks(rates, rows_per_task, task_priority, min_rows, rows_per_group, rho_min):
    num_tasks = len(rates)
    buffer = TaskPrioritizedReplayBuffer(
        num_tasks,
        spaces.Box(-1, 1, (BASE_DIM + num_tasks,), np.float32),
        spaces.Box(-1, 1, (1,), np.float32),
        device="cpu",
        n_envs=num_tasks,
        num_tasks=num_tasks,
        task_priority=task_priority,
        min_rows_per_task=min_rows,
        rows_per_group=rows_per_group,
        rho_min=rho_min,
    )
    obs = np.concatenate([np.zeros((num_tasks, BASE_DIM)), np.eye(num_tasks)], axis=1)
    zeros = np.zeros(num_tasks)
    buffer.add(obs, obs, zeros[:, None], zeros, zeros, [{}] * num_tasks)
    buffer.set_task_performance(np.array(rates))
    batch_size = rows_per_task * num_tasks
    group = buffer.group_size(batch_size)
    if (rows_per_group and rows_per_task % rows_per_group) or -(-min_rows // group) * group > rows_per_task:
        with pytest.raises(ValueError, match=r"rows_per_group must divide|min_rows_per_task must be at most"):
            buffer.quotas(batch_size)
        return
    quotas = buffer.quotas(batch_size)
    assert quotas.sum() == batch_size and np.all(quotas >= min_rows) and np.all(quotas % group == 0)
    for first in range(num_tasks):
        for second in range(num_tasks):
            if rates[first] < rates[second] - 1e-6 and task_priority != "uniform":
                # Equal shares (of the clipped, say) may differ by one group
                assert quotas[first] >= quotas[second] - group


@given(
    window_size=st.integers(1, 5),
    num_tasks=st.integers(1, 3),
    n_envs=st.integers(1, 3),
    n_warm_up=st.integers(0, 10),
    data=st.data(),
)
def test_success_windows_hold_the_last_whole_episodes(window_size, num_tasks, n_envs, n_warm_up, data):
    """Beside a list of what happened, cut into episodes afterwards."""
    windows = SuccessWindows(num_tasks, window_size)
    windows.start_episodes(n_envs)
    episodes: dict[int, list[float]] = defaultdict(list)
    running: list[list[tuple[bool, bool]]] = [[] for _ in range(n_envs)]
    tasks = data.draw(st.lists(st.integers(0, num_tasks - 1), min_size=n_envs, max_size=n_envs))
    for step in range(data.draw(st.integers(0, 30))):
        flags = data.draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=n_envs, max_size=n_envs))
        infos = [{"is_success": success} for success, _ in flags]
        windows.add_step(np.array(tasks), np.array([done for _, done in flags]), infos, step < n_warm_up)
        for index, (success, done) in enumerate(flags):
            running[index].append((success, step < n_warm_up))
            if done:
                if not any(is_warm_up for _, is_warm_up in running[index]):
                    episodes[tasks[index]].append(float(any(success for success, _ in running[index])))
                running[index] = []
                tasks[index] = (tasks[index] + 1) % num_tasks
    expected = [episodes[task][-window_size:] for task in range(num_tasks)]
    assert [list(window) for window in windows.windows] == expected
    np.testing.assert_equal(windows.rates, [np.mean(window) if window else np.nan for window in expected])


# ------------------------------------------------------------ vector environments


@given(num_tasks=st.integers(1, 60), n_envs=st.integers(1, 60))
def test_tasks_are_shared_out_evenly_and_completely(num_tasks, n_envs):
    shares = [split_tasks(num_tasks, n_envs, index) for index in range(n_envs)]
    counts = np.bincount(np.concatenate(shares), minlength=num_tasks)
    assert len(counts) == num_tasks and counts.min() >= 1
    assert counts.max() - counts.min() <= 1  # of sub-environments for each task
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert all(len(set(share)) == len(share) for share in shares)
    if num_tasks == n_envs:
        assert shares == [[index] for index in range(n_envs)]


@given(num_tasks=st.integers(1, 4), data=st.data())
def test_task_statistics_are_those_of_the_values_of_each_task(num_tasks, data):
    """Beside the mean and variance of all values at once, with the prior (mean 0, variance 1) as 1e-4 of a value."""
    running, values = TaskMeanStd(num_tasks), defaultdict(list)
    batches = st.lists(st.tuples(st.integers(0, num_tasks - 1), st.floats(-1e3, 1e3)), max_size=6)
    for batch in data.draw(st.lists(batches, max_size=8)):
        task_ids = np.array([task for task, _ in batch], dtype=np.int64)
        running.update_tasks(np.array([value for _, value in batch]), task_ids)
        for task, value in batch:
            values[task].append(value)
    for task in range(num_tasks):
        own, prior = np.array(values[task]), 1e-4
        total = len(own) + prior
        mean = own.sum() / total
        var = (prior * (1 + mean**2) + np.square(own - mean).sum()) / total
        assert running.count[task] == pytest.approx(total)
        assert running.mean[task] == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert running.var[task] == pytest.approx(var, rel=1e-6, abs=1e-9)


@given(
    num_tasks=st.integers(1, 4),
    n_envs=st.integers(1, 4),
    n_steps=st.integers(1, 40),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    seed=SEEDS,
)
def test_normalisation_is_that_of_all_that_was_seen(num_tasks, n_envs, n_steps, gamma, seed):
    env = VecTaskNormalize(make_env(num_tasks, n_envs, horizon=7), gamma=gamma, clip_obs=1e3, clip_reward=1e3)
    env.seed(seed % 10_000)
    generator = np.random.default_rng(seed)
    env.reset()
    seen = [env.get_original_obs()]
    returns, per_task = np.zeros(n_envs), defaultdict(list)
    for _ in range(n_steps):
        tasks = seen[-1][:, 4:].argmax(axis=1)
        obs, rewards, dones, _ = env.step(generator.uniform(-1, 1, (n_envs, 2)).astype(np.float32))
        seen.append(env.get_original_obs())
        assert np.array_equal(obs[:, 4:], seen[-1][:, 4:])
        returns = returns * gamma + env.get_original_reward()
        for task, value in zip(tasks, returns, strict=True):
            per_task[task].append(value)
        returns[dones] = 0
    rows, prior = np.concatenate(seen)[:, :4].astype(np.float64), 1e-4
    mean = rows.sum(axis=0) / (len(rows) + prior)
    var = (prior * (1 + mean**2) + np.square(rows - mean).sum(axis=0)) / (len(rows) + prior)
    np.testing.assert_allclose(obs[:, :4], (seen[-1][:, :4] - mean) / np.sqrt(var + 1e-8), rtol=1e-3, atol=1e-3)
    for task, values in per_task.items():
        own = np.array(values)
        total = len(own) + prior
        task_mean = own.sum() / total
        task_var = (prior * (1 + task_mean**2) + np.square(own - task_mean).sum()) / total
        assert env.ret_rms.var[task] == pytest.approx(task_var, rel=1e-4)
    np.testing.assert_allclose(
        rewards, env.get_original_reward() / np.sqrt(env.ret_rms.var[tasks] + 1e-8), rtol=1e-4, atol=1e-6
    )


# ------------------------------------------------------------------------- layers


def randomize(module: nn.Module) -> nn.Module:
    """Double precision and other numbers in each parameter set: they start equal."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def apply_sets(layers: Any, w: th.Tensor, x: th.Tensor, network: int, activate: Any = th.relu) -> th.Tensor:
    """One row through the layers of one network, all parameters summed explicitly: theta = sum_k w_k phi_k."""
    for index, layer in enumerate(layers):
        weight = sum(w[k] * layer.weight[network, k] for k in range(len(w)))
        bias = sum(w[k] * layer.bias[network, k] for k in range(len(w)))
        x = x @ weight + bias
        x = activate(x) if index < len(layers) - 1 else x
    return x


@given(
    num_tasks=st.integers(1, 4),
    n_sets=st.integers(1, 4),
    n_networks=st.integers(1, 2),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    tasks=st.lists(st.integers(0, 3), min_size=0, max_size=9),
    group_size=st.integers(1, 3),
    seed=SEEDS,
)
def test_compositional_networks_compose_explicitly(num_tasks, n_sets, n_networks, widths, tasks, group_size, seed):
    """Rows in any order, groups of any tasks (none of some, several of others) and cached parameters: always one function."""
    th.manual_seed(seed)
    tasks = [task % num_tasks for task in tasks]
    mlp = randomize(
        CompositionalMLP([CompositionalLinear(widths[i], widths[i + 1], n_sets, n_networks) for i in range(len(widths) - 1)])
    )
    w = nn.Parameter(th.randn(num_tasks, n_sets, dtype=th.float64))
    vectors = TaskVectors(w, "identity")
    x = th.randn(len(tasks) * group_size, widths[0], dtype=th.float64)
    row_tasks = np.repeat(tasks, group_size).astype(int).tolist()
    expected = th.zeros(n_networks, len(x), widths[-1], dtype=th.float64)
    for network in range(n_networks):
        for row, task in enumerate(row_tasks):
            expected[network, row] = apply_sets(mlp.layers, w[task], x[row], network)
    one_hot = th.eye(num_tasks, dtype=th.float64)[row_tasks]
    with th.no_grad():
        th.testing.assert_close(vectors.forward(mlp, x, one_hot, None), expected)
        order = th.randperm(len(x))
        th.testing.assert_close(vectors.forward(mlp, x[order], one_hot[order], None), expected[:, order])
        # Other names of the tasks change nothing
        names = th.randperm(num_tasks)
        renamed = TaskVectors(nn.Parameter(w[names]), "identity")
        th.testing.assert_close(renamed.forward(mlp, x, one_hot[:, names], None), expected)
        if tasks:
            for frozen in (False, True):
                output = vectors.forward(mlp, x, one_hot, len(tasks), frozen)
                th.testing.assert_close(output.reshape(expected.shape), expected)
            groups = x.view(len(tasks), group_size, -1)
            output = forward_groups(mlp, groups, mlp.compose(vectors()), th.tensor(tasks))
            th.testing.assert_close(output.reshape(expected.shape), expected)
        if tasks and n_networks == 1:
            output = CompositionCache().forward(mlp, vectors, x, one_hot)
            th.testing.assert_close(output.reshape(expected.shape), expected)


@given(
    num_tasks=st.integers(1, 4),
    n_sets=st.integers(1, 3),
    net_arch=st.lists(st.integers(1, 4), max_size=4),
    unique_dim=st.integers(0, 3),
    compositional_head=st.booleans(),
    group_tasks=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    group_size=st.integers(1, 3),
    seed=SEEDS,
)
def test_shared_unique_networks_equal_a_loop(
    num_tasks, n_sets, net_arch, unique_dim, compositional_head, group_tasks, group_size, seed
):
    th.manual_seed(seed)
    group_tasks = [task % num_tasks for task in group_tasks]
    mlp = randomize(SharedUniqueMLP(3, 2, net_arch, n_sets, unique_dim, 2, compositional_head))
    w = th.randn(num_tasks, n_sets, dtype=th.float64)
    x = th.randn(len(group_tasks) * group_size, 3 + unique_dim, dtype=th.float64)
    row_tasks = np.repeat(group_tasks, group_size).tolist()
    n_shared = min(2, len(net_arch))
    expected = th.zeros(2, len(x), 2, dtype=th.float64)
    for network in range(2):
        for row, task in enumerate(row_tasks):
            y = x[row, :3]
            for index, layer in enumerate(mlp.layers):
                y = th.cat([y, x[row, 3:]]) if index == n_shared else y
                own_w = w[task] if index < n_shared or compositional_head else th.ones(1, dtype=th.float64)
                y = apply_sets([layer], own_w, y, network)
                y = th.relu(y) if index < len(net_arch) else y
            expected[network, row] = y
    one_hot = th.eye(num_tasks, dtype=th.float64)[row_tasks]
    with th.no_grad():
        th.testing.assert_close(mlp.forward_mixed(x, one_hot @ w), expected)
        output = forward_groups(mlp, x.view(len(group_tasks), group_size, -1), mlp.compose(w), th.tensor(group_tasks))
    th.testing.assert_close(output.reshape(expected.shape), expected)


@given(
    n_experts=st.integers(1, 5),
    net_arch=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    n_rows=st.integers(0, 6),
    seed=SEEDS,
)
def test_expert_mixtures_equal_a_loop(n_experts, net_arch, n_rows, seed):
    th.manual_seed(seed)
    experts = randomize(Experts(3, 2, n_experts, net_arch))
    x, gate = th.randn(n_rows, 3).double(), th.rand(n_rows, n_experts).double()
    outputs = []
    for expert in range(n_experts):
        y = x
        for index, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
            y = y @ weight[expert] + bias[expert]
            y = th.relu(y) if index < len(net_arch) else y
        outputs.append(y)
    with th.no_grad():
        th.testing.assert_close(experts(x), th.stack(outputs))
        expected = sum(gate[:, expert, None] * outputs[expert] for expert in range(n_experts))
        th.testing.assert_close(experts.mix(x, gate), expected)
        order = th.randperm(n_rows)
        th.testing.assert_close(experts.mix(x[order], gate[order]), expected[order])


@given(num_tasks=st.integers(1, 5), n_experts=st.integers(1, 4), tasks=st.lists(st.integers(0, 4), max_size=6), seed=SEEDS)
def test_renaming_tasks_renames_what_the_mixture_of_experts_says(num_tasks, n_experts, tasks, seed):
    th.manual_seed(seed)
    space = spaces.Box(-1, 1, (2 + num_tasks,), np.float64)
    extractor = ExpertMixtureExtractor(space, num_tasks, n_experts, (3,), 2, 2, (3,)).double()
    one_hot = th.eye(num_tasks, dtype=th.float64)[[task % num_tasks for task in tasks]]
    base = th.randn(len(tasks), 2, dtype=th.float64)
    names = th.randperm(num_tasks)
    with th.no_grad():
        before = extractor(th.cat([base, one_hot], dim=1))
        extractor.task_encoder.embeddings.copy_(extractor.task_encoder.embeddings[names].clone())
        th.testing.assert_close(extractor(th.cat([base, one_hot[:, names]], dim=1)), before)


@given(
    num_tasks=st.integers(1, 4),
    n_networks=st.integers(1, 3),
    group_tasks=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    group_size=st.integers(1, 3),
    seed=SEEDS,
)
def test_task_heads_equal_a_loop(num_tasks, n_networks, group_tasks, group_size, seed):
    th.manual_seed(seed)
    heads = randomize(TaskHeads(3, 2, num_tasks, n_networks))
    row_tasks = np.repeat([task % num_tasks for task in group_tasks], group_size).tolist()
    x = th.randn(n_networks, len(row_tasks), 3).double()
    one_hot = th.eye(num_tasks, dtype=th.float64)[row_tasks]
    rows = [x[:, row, None] @ heads.weight[:, task] + heads.bias[:, task] for row, task in enumerate(row_tasks)]
    expected = th.cat(rows, dim=1)
    th.testing.assert_close(heads(x, one_hot), expected)
    th.testing.assert_close(heads(x, one_hot, len(group_tasks)), expected)


@given(
    num_tasks=st.integers(1, 5),
    group_tasks=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    group_size=st.integers(1, 4),
    seed=SEEDS,
)
def test_triplets_are_another_row_of_the_task_and_a_row_of_another(num_tasks, group_tasks, group_size, seed):
    th.manual_seed(seed)
    group_tasks = [task % num_tasks for task in group_tasks]
    row_tasks = np.repeat(group_tasks, group_size)
    triplets = sample_triplets(th.tensor(group_tasks), len(row_tasks), num_tasks)
    for row, task in enumerate(row_tasks):
        n_same = int((row_tasks == task).sum())
        assert bool(triplets.valid[row]) == (1 < n_same < len(row_tasks))
        if triplets.valid[row]:
            positive, negative = int(triplets.positives[row]), int(triplets.negatives[row])
            assert positive != row and row_tasks[positive] == task != row_tasks[negative]


# --------------------------------------------------------------------- statistics


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_interquartile_mean_is_scipys_trimmed_mean(scores):
    assert interquartile_mean(np.array(scores)) == pytest.approx(stats.trim_mean(scores, 0.25), rel=1e-9, abs=1e-6)


@given(n_episodes=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.floats(0.01, 0.999))
def test_wilson_interval_is_scipys(n_episodes, share, confidence):
    n_successes = round(share * n_episodes)
    expected = stats.binomtest(n_successes, n_episodes).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(n_successes, n_episodes, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= n_successes / n_episodes + 1e-12 and n_successes / n_episodes - 1e-12 <= high <= 1


@given(
    runs=st.integers(2, 5),
    tasks=st.integers(1, 4),
    scale=st.floats(0.01, 100),
    shift=st.floats(-100, 100),
    confidence=st.floats(0.5, 0.99),
    seed=SEEDS,
)
def test_bootstrap_intervals(runs, tasks, scale, shift, confidence, seed):
    scores = np.random.default_rng(seed).normal(size=(runs, tasks))

    def interval(array: np.ndarray, level: float = confidence) -> np.ndarray:
        return stratified_bootstrap(array, np.mean, n_resamples=60, confidence=level, seed=1)

    low, high = interval(scores)
    # No resample leaves the range of the runs of each task; what all runs agree on has no spread
    assert scores.min(axis=0).mean() - 1e-12 <= low <= high <= scores.max(axis=0).mean() + 1e-12
    np.testing.assert_allclose(interval(np.broadcast_to(scores[:1], scores.shape)), scores[0].mean(), atol=1e-12)
    # In other units it is the same interval, and a higher level has the wider one
    np.testing.assert_allclose(interval(scale * scores + shift), scale * np.array([low, high]) + shift, rtol=1e-9, atol=1e-9)
    wider = interval(scores, (1 + confidence) / 2)
    assert wider[0] <= low and wider[1] >= high
    # The same resamples, drawn and averaged in a loop
    generator = np.random.default_rng(1)
    means = []
    for _ in range(60):
        rows = generator.integers(runs, size=(runs, tasks))
        means.append(np.mean([[scores[rows[run, task], task] for task in range(tasks)] for run in range(runs)]))
    tail = (1 - confidence) / 2
    np.testing.assert_allclose([low, high], np.quantile(means, [tail, 1 - tail]), rtol=1e-12, atol=1e-12)


@given(successes=st.lists(st.integers(0, 20), min_size=1, max_size=6), confidence=st.floats(0.5, 0.99))
def test_interval_over_runs_is_the_wider_of_two(successes, confidence):
    rates = np.array(successes) / 20
    low, high = success_interval_over_runs(rates, 20, confidence)
    wilson = stats.binomtest(sum(successes), 20 * len(rates)).proportion_ci(confidence, method="wilson")
    ends = [wilson.low, wilson.high]
    if len(rates) > 1 and rates.std() > 0:
        student = stats.t.interval(confidence, len(rates) - 1, rates.mean(), stats.sem(rates))
        ends = [min(wilson.low, student[0]), max(wilson.high, student[1])]
    assert (low, high) == pytest.approx((max(0, ends[0]), min(1, ends[1])), abs=1e-9)


# ------------------------------------------------------------ samplers, arguments


class DrawingTrial:
    """What the samplers use of an Optuna trial; hypothesis draws."""

    def __init__(self, data: Any):
        self.data = data
        self.params: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        assert low < high and (low > 0 or not log)
        return self.params.setdefault(name, self.data.draw(st.floats(low, high), label=name))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.params.setdefault(name, self.data.draw(st.integers(low, high), label=name))

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.params.setdefault(name, self.data.draw(st.sampled_from(choices), label=name))

    def set_user_attr(self, name: str, value: Any) -> None:
        pass


@pytest.mark.parametrize("algo", list(ZOO_ALGORITHMS))
@share_of_examples(6)
@given(num_tasks=st.integers(1, 4), data=st.data())
def test_whatever_is_sampled_makes_a_model(algo, num_tasks, data):
    entry, trial = ZOO_ALGORITHMS[algo], DrawingTrial(data)
    hyperparams = entry.sampler(trial, 2, num_tasks, {"num_tasks": num_tasks})
    assert hyperparams == entry.converter(trial.params)  # what --trial-id makes of the trial
    resolved = MultiTaskExperimentMixin._resolve_num_tasks(SimpleNamespace(num_tasks=num_tasks), hyperparams)
    env = make_env(num_tasks)
    model = entry.algorithm_class("MlpPolicy", env, buffer_size=64, device="cpu", **resolved)
    assert model.batch_size == hyperparams["batch_size_per_task"] * num_tasks
    actions, _ = model.predict(env.reset())
    assert actions.shape == (num_tasks, 2) and np.isfinite(actions).all()


@given(
    value=st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(), st.lists(st.integers())), data=st.data()
)
def test_number_checks_let_through_what_they_say(value, data):
    """Beside the definition, spelt out with comparisons of numbers alone."""
    at_least, above = (data.draw(st.one_of(st.none(), st.integers(-5, 5))) for _ in range(2))
    at_most = data.draw(st.one_of(st.none(), st.integers(-5, 5))) if (at_least is None) != (above is None) else None
    or_none, integer, finite = (data.draw(st.booleans()) for _ in range(3))
    is_number = type(value) is int or (type(value) is float and not integer and not math.isnan(value))
    is_right = (value is None and or_none) or (
        is_number
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (not finite or abs(value) < math.inf)
    )
    arguments = (at_least, above, at_most, or_none, integer, finite)
    if is_right:
        check_number("argument", value, *arguments)
    else:
        with pytest.raises(ValueError, match=r"^argument must be .+, got "):
            check_number("argument", value, *arguments)


@pytest.mark.parametrize("value", [np.array(["a", "b"]), th.ones(2), ["a"], {}, None, 1.5])
def test_a_choice_may_be_anything_but_what_is_allowed(value):
    with pytest.raises(ValueError, match="argument must be one of 'a', 'b', got"):
        check_choice("argument", value, ("a", "b"))
