"""Prioritized replay of several tasks: which transitions of a task are drawn, and how many of each task."""

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples
from sb3_mtrl.common.utils import check_choice, check_integer, check_number

TASK_PRIORITIES = ("linear", "softmax", "rank", "uniform")
PER_STYLES = ("schaul", "alf")
PERFORMANCE_SOURCES = ("train", "eval")
# Priority of a transition before any of its task has been learned from
INITIAL_PRIORITY = 1.0
# Largest group by default. Where a network copies or composes its parameters for each group (forms "indexed" and "composed"
# in benchmarks/speed/prioritized.json), groups of 32 take 1.5 times as long as groups of 64, which follow the shares coarsely,
# and groups of 16 more than twice as long. PaCo's layers do so on a GPU only: on a CPU they join the groups of a task again
# ("in runs"), and groups of 16, 32 and 64 take the same time.
MAX_ROWS_PER_GROUP = 32


class SumTree:
    """
    A binary tree of sums for each of T tasks, in one array, so that one walk serves the rows of all tasks.

    The array is one heap with T roots: these are at T to 2T - 1, the children of node i at 2i and 2i + 1, and the leaves of
    task t from (T + t) L on. A parent is always computed from its two children, never by adding differences: errors do not
    add up, and at any time every node is what building the tree anew would give, to the bit.

    :param num_tasks: Number of tasks T
    :param capacity: Number of leaves that each task needs; L is the next power of two
    """

    def __init__(self, num_tasks: int, capacity: int):
        self.num_tasks = num_tasks
        self.n_leaves = self.leaves_for(capacity)
        self.nodes = np.zeros(2 * num_tasks * self.n_leaves, dtype=np.float64)

    @staticmethod
    def leaves_for(capacity: int) -> int:
        """
        :param capacity: Number of leaves needed
        :return: The next power of two L
        """
        return 1 << (capacity - 1).bit_length()

    @property
    def totals(self) -> np.ndarray:
        """Sum of each task's leaves, a view ``(T,)``."""
        return self.nodes[self.num_tasks : 2 * self.num_tasks]

    @property
    def leaves(self) -> np.ndarray:
        """All leaves, a view ``(T, L)``; after a change of them call ``rebuild``."""
        return self.nodes[self.num_tasks * self.n_leaves :].reshape(self.num_tasks, self.n_leaves)

    def get(self, task_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """
        :param task_ids: Task of each row ``(n,)``
        :param slots: Leaf of each row ``(n,)``
        :return: Their values ``(n,)``
        """
        return self.leaves[task_ids, slots]

    def set(self, task_ids: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        """
        Change leaves and the sums above them; of several values for one leaf the last one stays.

        :param task_ids: Task of each row ``(n,)``
        :param slots: Leaf of each row ``(n,)``
        :param values: New values ``(n,)``
        """
        if len(slots) == 0:
            return
        node = (self.num_tasks + task_ids) * self.n_leaves + slots
        self.nodes[node] = values
        siblings = self.nodes.reshape(-1, 2)
        # Computing a parent once for each of its rows is harmless; near the roots, where rows outnumber nodes, a whole level
        # is computed instead
        level_start = self.num_tasks * self.n_leaves >> 1
        while level_start >= self.num_tasks and level_start > len(node):
            node >>= 1
            pairs = siblings.take(node, axis=0)
            self.nodes[node] = pairs[:, 0] + pairs[:, 1]
            level_start >>= 1
        self._rebuild_from(level_start)

    def fill(self, task: int, n_leaves: int, value: float) -> None:
        """
        Give the first leaves of a task one value.

        :param task: Task id
        :param n_leaves: How many leaves
        :param value: Their value
        """
        self.leaves[task, :n_leaves] = value
        start, size = (self.num_tasks + task) * self.n_leaves, self.n_leaves
        while size > 1:
            children = self.nodes[start : start + size]
            start, size = start >> 1, size >> 1
            np.add(children[::2], children[1::2], out=self.nodes[start : start + size])

    def rebuild(self) -> None:
        """
        Compute all sums from the leaves.
        """
        self._rebuild_from(self.num_tasks * self.n_leaves >> 1)

    def _rebuild_from(self, level_start: int) -> None:
        while level_start >= self.num_tasks:
            children = self.nodes[2 * level_start : 4 * level_start]
            np.add(children[::2], children[1::2], out=self.nodes[level_start : 2 * level_start])
            level_start >>= 1

    def find(self, task_ids: np.ndarray, masses: np.ndarray) -> np.ndarray:
        """
        The leaf of each task at which the running sum of its leaves passes a mass.

        :param task_ids: Task of each row ``(n,)``
        :param masses: Masses in [0, total of the task) ``(n,)``
        :return: Leaves ``(n,)``
        """
        node, masses = self.num_tasks + task_ids, masses.copy()
        for _ in range(self.n_leaves.bit_length() - 1):
            node <<= 1
            left_sums = self.nodes.take(node)
            goes_right = masses >= left_sums
            left_sums *= goes_right
            masses -= left_sums
            node += goes_right
        return node & (self.n_leaves - 1)


class SuccessWindows:
    """
    Success of the last training episodes of each task.

    :param num_tasks: Number of tasks T
    :param window_size: Number of last episodes per task
    """

    def __init__(self, num_tasks: int, window_size: int):
        self.windows: list[deque[float]] = [deque(maxlen=window_size) for _ in range(num_tasks)]
        self.start_episodes(0)

    def start_episodes(self, n_envs: int) -> None:
        """
        Forget the unfinished episodes, as when the environment was reset.

        :param n_envs: Number of sub-environments
        """
        self._solved = np.zeros(n_envs)
        self._counts = np.ones(n_envs, dtype=bool)

    def take_over(self, other: "SuccessWindows") -> None:
        """
        Go on from the last episodes of other windows.

        :param other: Windows of the same tasks, of any size
        """
        for window, kept in zip(self.windows, other.windows, strict=True):
            window.extend(kept)

    @property
    def rates(self) -> np.ndarray:
        """Success rate of each task ``(T,)``, NaN before its first episode."""
        return np.array([np.mean(window) if window else np.nan for window in self.windows])

    def add_step(self, task_ids: np.ndarray, dones: np.ndarray, infos: Sequence[Mapping[str, Any]], is_warm_up: bool) -> bool:
        """
        :param task_ids: Task of each sub-environment ``(n_envs,)``; -1: unknown, its episode is left out
        :param dones: Episode ends ``(n_envs,)``
        :param infos: Infos; an episode is solved if ``is_success`` was true at any of its steps, and left out if its last
            info has no ``is_success``
        :param is_warm_up: Whether the actions were those of the warm-up; an episode with such steps is left out
        :return: Whether a window changed
        """
        if is_warm_up:
            self._counts[:] = False
        np.maximum(self._solved, [float(info.get("is_success") or 0) for info in infos], out=self._solved)
        changed = False
        for index in np.flatnonzero(dones).tolist():
            if infos[index].get("worker_restarted"):
                pass  # the episode was cut off with its worker
            elif infos[index].get("is_success") is None:
                warnings.warn("the infos have no is_success: the shares of the tasks in a batch stay equal", stacklevel=2)
            elif self._counts[index] and task_ids[index] >= 0:
                self.windows[task_ids[index]].append(float(self._solved[index] > 0))
                changed = True
            self._solved[index], self._counts[index] = 0.0, True
        return changed


class _Shares(NamedTuple):
    """How a batch is shared out: what ``sample`` needs, computed once for as long as the shares stay."""

    key: tuple[int, bytes]  # batch size, and which rings hold something
    group_tasks: np.ndarray  # (G,) task of each group, ascending
    row_tasks: np.ndarray  # (B,) task of each row
    strata: np.ndarray  # (B,) how many rows of its task come before a row
    n_rows: np.ndarray  # (B,) number of rows of its task
    starts: np.ndarray  # first row of each task that is in the batch


class TaskPrioritizedReplayBuffer(MultiTaskReplayBuffer):
    """
    Prioritized replay per task, and more transitions of the tasks that do worse (task-aware prioritized sampling).

    Papers: Prioritized Experience Replay, https://arxiv.org/abs/1511.05952 (the proportional variant), and STARS,
    https://arxiv.org/abs/2406.00761, whose abstract names a buffer per task, priorities by TD error and a number of samples
    per task that follows its performance. The formulas that it leaves open are ours.

    Within task t, transition i has priority ``p_i = min(|delta_i| + eps, max_priority)`` and is drawn with probability
    ``p_i^alpha / sum_k p_k^alpha``; new ones get the highest priority that the task has had, 1 at the start. Draws are
    stratified: one in each of n_t equal parts of the task's sum. Importance weights ``(N P(i))^-beta``, divided by their
    maximum over the task's rows in the batch, are for the critic loss alone. There are none between tasks: the shift towards
    weak tasks is the purpose. (The maximum of more rows is larger, though, so that weights take back a part of the shift.)

    The share of task t is ``rho_t / sum_j rho_j`` with, by default, ``rho_t = clip(1 - success rate of t, rho_min, rho_max)``;
    it is rounded to whole groups of rows by largest remainders, where equal tasks take turns. Shares are equal until
    ``set_task_performance`` has told the success rate of every task and every ring holds something; a task without transitions
    leaves its rows to the others.

    ``MTSAC`` and its subclasses do what an algorithm has to: weigh the critic loss, ``update_priorities``, ``anneal_beta`` and
    ``set_task_performance``. On a GPU the TD errors come back to the CPU once an update, which waits for the device (and so
    does a w-reset, to reset priorities). With one task it is a plain prioritized buffer. The parameters not listed are those
    of ``MultiTaskReplayBuffer``.

    :param alpha: Exponent of priorities in [0, 1]; 0: uniform draws within a task
    :param beta: Exponent of the importance weights at the start, in [0, 1]
    :param beta_end: Its value at the end of training
    :param eps: Added to every absolute TD error, above 0
    :param max_priority: Highest priority, so that an exploding task does not draw a few rows only
    :param task_priority: "linear": see above; "softmax": ``rho = exp((1 - success rate) / temperature)``; "rank":
        ``rho = 1 / sqrt(rank)``, where rank 1 is the lowest success rate and equals share their mean rank; "uniform": equal
        shares
    :param rho_min: Lowest rho of "linear", so that solved tasks are not forgotten
    :param rho_max: Highest rho of "linear"
    :param temperature: Temperature of "softmax"; infinity: equal shares
    :param min_rows_per_task: Rows in a batch that every task with transitions has at least, rounded up to whole groups
    :param rows_per_group: Rows g of a group, a divisor of ``batch_size / num_tasks``; None: the largest one up to 32 and up to
        a quarter of an equal share. Small groups follow the shares closely, large ones are faster where networks have
        parameters of each task. With one task a batch is one group.
    :param per_style: "schaul": as above. "alf": as ALF, which PaCo is built on: |delta| is the root of the sum of the critics'
        squared errors instead of their mean size, and weights are not divided by their maximum (its exponents: ``alpha=0.7``,
        ``beta_end=0.4``)
    :param performance_source: Where success rates come from: "train", episodes of the training environment after
        ``learning_starts``, or "eval", the evaluations of a ``MultiTaskEvalCallback``
    :param performance_window: Number of last training episodes per task
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        num_tasks: int = 1,
        extra_columns: Mapping[str, int] | None = None,
        task_in_observation: bool = True,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_end: float = 1.0,
        eps: float = 1e-6,
        max_priority: float = 1e3,
        task_priority: str = "linear",
        rho_min: float = 0.1,
        rho_max: float = 1.0,
        temperature: float = 0.5,
        min_rows_per_task: int = 4,
        rows_per_group: int | None = None,
        per_style: str = "schaul",
        performance_source: str = "train",
        performance_window: int = 20,
        storage_device: th.device | str | None = None,
    ):
        alpha = check_number("alpha", alpha, 0, at_most=1)
        beta = check_number("beta", beta, 0, at_most=1)
        beta_end = check_number("beta_end", beta_end, 0, at_most=1)
        eps = check_number("eps", eps, above=0)
        max_priority = check_number("max_priority", max_priority)
        if not eps < max_priority:
            raise ValueError(f"max_priority must be finite and above eps={eps}, got {max_priority}")
        rho_min = check_number("rho_min", rho_min, finite=False)
        rho_max = check_number("rho_max", rho_max, finite=False)
        if not 0 <= rho_min <= rho_max or not 0 < rho_max < math.inf:
            raise ValueError(
                f"rho_min and rho_max must satisfy 0 <= rho_min <= rho_max and 0 < rho_max, got {rho_min}, {rho_max}"
            )
        temperature = check_number("temperature", temperature, above=0, finite=False)
        check_choice("task_priority", task_priority, TASK_PRIORITIES)
        check_choice("per_style", per_style, PER_STYLES)
        check_choice("performance_source", performance_source, PERFORMANCE_SOURCES)
        min_rows_per_task = check_integer("min_rows_per_task", min_rows_per_task, 1)
        rows_per_group = check_integer("rows_per_group", rows_per_group, 1, or_none=True)
        performance_window = check_integer("performance_window", performance_window, 1)
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs,
            optimize_memory_usage,
            handle_timeout_termination,
            num_tasks,
            extra_columns,
            task_in_observation,
            storage_device,
        )
        self.alpha = alpha
        self.initial_beta = beta
        self.beta = beta
        self.beta_end = beta_end
        self.eps = eps
        self.max_priority = max_priority
        self.task_priority = task_priority
        self.rho_min, self.rho_max = rho_min, rho_max
        self.temperature = temperature
        self.min_rows_per_task = min_rows_per_task
        self.rows_per_group = rows_per_group
        self.per_style = per_style
        self.performance_source = performance_source
        self.performance_window = performance_window

        self._tree = SumTree(num_tasks, self.capacity_per_task)
        #: Highest priority that each task has had, ``(T,)``
        self.highest_priorities = np.full(num_tasks, min(INITIAL_PRIORITY, max_priority))
        #: Success rates last told, ``(T,)``, NaN where unknown
        self.success_rates = np.full(num_tasks, np.nan)
        # Which of equal tasks is the first to get more; from 0 on when success rates have been told
        self._first_task = -1
        self._shares: _Shares | None = None

    def _n_bytes(self) -> int:
        n_nodes = 2 * SumTree.leaves_for(self.capacity_per_task) * self.num_tasks
        return super()._n_bytes() + n_nodes * np.dtype(np.float64).itemsize

    @property
    def follows_evaluations(self) -> bool:
        """Whether evaluations change the shares of the tasks."""
        return self.performance_source == "eval" and self.task_priority != "uniform" and self.num_tasks > 1

    def settings(self) -> dict[str, Any]:
        """
        :return: The arguments that say what is drawn, by name
        """
        names = (
            *("alpha", "beta_end", "eps", "max_priority", "task_priority", "rho_min", "rho_max", "temperature"),
            *("min_rows_per_task", "rows_per_group", "per_style", "performance_source", "performance_window"),
        )
        return {"beta": self.initial_beta, **{name: getattr(self, name) for name in names}}

    # ------------------------------------------------------------------ storage

    def reset(self) -> None:
        """
        Forget all transitions and their priorities; success rates stay.
        """
        super().reset()
        self._tree.leaves[:] = 0
        self._tree.rebuild()
        self.highest_priorities[:] = min(INITIAL_PRIORITY, self.max_priority)

    def _take_places(self, task_ids: np.ndarray) -> np.ndarray:
        places = super()._take_places(task_ids)
        self._tree.set(task_ids, places % self.capacity_per_task, self.highest_priorities[task_ids] ** self.alpha)
        return places

    def _row_numbers(self, task_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """How many rows of its task had been stored before the row that is in a place now."""
        is_older = slots >= self.pos[task_ids]  # type: ignore[index]
        return (self._laps[task_ids] - is_older) * self.capacity_per_task + slots

    # ----------------------------------------------------------------- sampling

    def rows_per_task(self, batch_size: int) -> int:
        """
        :param batch_size: Rows of a batch
        :return: Rows of each task in it, where shares are equal
        :raises ValueError: if the batch cannot be shared equally, in whole groups and with room for each task's least share
        """
        rows_per_task = super().rows_per_task(batch_size)
        if self.num_tasks == 1:
            return rows_per_task
        if self.rows_per_group is not None and rows_per_task % self.rows_per_group != 0:
            raise ValueError(
                f"rows_per_group must divide batch_size / num_tasks = {rows_per_task} or be None, got {self.rows_per_group}"
            )
        least = self._least_groups(batch_size) * self.group_size(batch_size)
        if least > rows_per_task:
            raise ValueError(
                f"min_rows_per_task must be at most batch_size / num_tasks = {rows_per_task}, got {self.min_rows_per_task}"
            )
        return rows_per_task

    def group_size(self, batch_size: int) -> int:
        """
        :param batch_size: Rows of a batch
        :return: Rows g of each of its groups
        """
        if self.num_tasks == 1:
            return batch_size
        rows_per_task = batch_size // self.num_tasks
        if self.rows_per_group is not None:
            return self.rows_per_group
        largest = max(1, min(rows_per_task // 4, MAX_ROWS_PER_GROUP))
        return max(size for size in range(1, largest + 1) if rows_per_task % size == 0)

    def _least_groups(self, batch_size: int) -> int:
        return -(-self.min_rows_per_task // self.group_size(batch_size))

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> MultiTaskReplayBufferSamples:  # type: ignore[override]
        """
        Draw each task's share by priority.

        :param batch_size: Number of transitions, a multiple of ``num_tasks``
        :param env: VecNormalize to normalise observations and rewards with
        :return: The batch, grouped by task, with ``indices`` and ``weights``
        :raises ValueError: for a bad ``batch_size``, or if the buffer is empty
        """
        shares = self._current_shares(batch_size)
        totals, sizes = self._tree.totals, self.sizes()
        masses = (shares.strata + np.random.random_sample(batch_size)) / shares.n_rows * totals[shares.row_tasks]
        # Rounding may pass the last leaf in use
        slots = np.minimum(self._tree.find(shares.row_tasks, masses), sizes[shares.row_tasks] - 1)
        places = shares.row_tasks * self.capacity_per_task + slots
        samples = self._get_samples(places.reshape(len(shares.group_tasks), -1), env)
        weights = th.from_numpy(self._importance_weights(shares, slots, sizes).astype(np.float32)).to(self.device)
        return samples._replace(
            indices=self._row_numbers(shares.row_tasks, slots) * self.num_tasks + shares.row_tasks,
            weights=weights.unsqueeze(1),
        )

    def _importance_weights(self, shares: _Shares, slots: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        leaves = self._tree.get(shares.row_tasks, slots)
        if self.per_style == "alf":
            references = self._tree.totals / np.maximum(sizes, 1)  # the sum over N: the mean
        else:
            # N and the sum cancel in the division by the maximum, which belongs to the lowest priority
            references = np.zeros(self.num_tasks)
            references[shares.row_tasks[shares.starts]] = np.minimum.reduceat(leaves, shares.starts)
        return (leaves / references[shares.row_tasks]) ** -self.beta

    def _current_shares(self, batch_size: int) -> _Shares:
        is_filled = self.sizes() > 0
        key = (batch_size, is_filled.tobytes())
        if self._shares is None or self._shares.key != key:
            if not is_filled.any():
                raise ValueError("cannot sample from an empty replay buffer")
            quotas = self.quotas(batch_size)
            row_tasks = np.repeat(np.arange(self.num_tasks), quotas)
            ends = np.cumsum(quotas)
            self._shares = _Shares(
                key=key,
                group_tasks=row_tasks[:: self.group_size(batch_size)],
                row_tasks=row_tasks,
                strata=np.arange(batch_size) - (ends - quotas)[row_tasks],
                n_rows=quotas[row_tasks],
                starts=(ends - quotas)[quotas > 0],
            )
        return self._shares

    # --------------------------------------------------------------- priorities

    def anneal_beta(self, progress_remaining: float) -> None:
        """
        Set the exponent of the importance weights on the line from ``beta`` to ``beta_end``.

        :param progress_remaining: From 1 (start of training) to 0 (end), as SB3's schedules count
        """
        self.beta = self.beta_end + (self.initial_beta - self.beta_end) * min(max(progress_remaining, 0.0), 1.0)

    def update_priorities(self, indices: np.ndarray, td_errors: np.ndarray | th.Tensor) -> None:
        """
        Tell the TD errors of rows that were learned from.

        Rows that have been overwritten since they were sampled are left out, and errors that are NaN or infinite: their rows
        keep their priority. Of several errors of one row the last one counts.

        :param indices: ``indices`` of the samples, ``(n,)``
        :param td_errors: TD errors, ``(n,)`` or ``(n, 1)``, of either sign
        :raises ValueError: if there is not one error for each index
        """
        if isinstance(td_errors, th.Tensor):
            td_errors = td_errors.detach().cpu().numpy()
        errors = np.abs(np.asarray(td_errors, dtype=np.float64)).reshape(-1)
        if indices.shape != errors.shape:
            raise ValueError(f"td_errors must hold one error for each of the {len(indices)} indices, got {errors.size}")
        numbers, task_ids = np.divmod(indices, self.num_tasks)
        slots = numbers % self.capacity_per_task
        kept = (numbers == self._row_numbers(task_ids, slots)) & np.isfinite(errors)
        task_ids, slots = task_ids[kept], slots[kept]
        priorities = np.minimum(errors[kept] + self.eps, self.max_priority)
        np.maximum.at(self.highest_priorities, task_ids, priorities)
        self._tree.set(task_ids, slots, priorities**self.alpha)

    def td_error_sizes(self, td_errors: th.Tensor) -> th.Tensor:
        """
        :param td_errors: Errors of all critics ``(n_critics, B, 1)``
        :return: What ``update_priorities`` takes as the size of each row's error ``(B, 1)``
        """
        if self.per_style == "alf":
            return td_errors.square().sum(dim=0).sqrt()
        return td_errors.abs().mean(dim=0)

    def reset_task_priorities(self, task: int) -> None:
        """
        Give all transitions of a task the priority of new ones at the start of training, as when what it learned was lost.

        :param task: Task id
        :raises ValueError: for an unknown task
        """
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be between 0 and {self.num_tasks - 1}, got {task}")
        self.highest_priorities[task] = min(INITIAL_PRIORITY, self.max_priority)
        self._tree.fill(task, self.sizes()[task], self.highest_priorities[task] ** self.alpha)

    def set_task_performance(self, success_rates: np.ndarray) -> None:
        """
        Tell how the tasks do.

        :param success_rates: Success rate of each task ``(T,)`` in [0, 1], NaN where unknown
        :raises ValueError: if they are not such rates
        """
        success_rates = np.array(success_rates, dtype=np.float64)
        if success_rates.shape != (self.num_tasks,) or np.any((success_rates < 0) | (success_rates > 1)):
            raise ValueError(f"success_rates must be {self.num_tasks} rates in [0, 1] or NaN, got {success_rates.tolist()}")
        self.success_rates = success_rates
        self._first_task = (self._first_task + 1) % self.num_tasks
        self._shares = None

    @property
    def task_priorities(self) -> np.ndarray:
        """The share that each task is meant to have ``(T,)``; sums to 1."""
        is_filled = self.sizes() > 0
        if is_filled.all() and np.isfinite(self.success_rates).all():
            rho = self._rho()
        else:
            rho = np.where(is_filled, 1.0, 0.0)
        if not rho.any():
            rho = np.ones(self.num_tasks)
        return rho / rho.sum()

    def _rho(self) -> np.ndarray:
        lacking = 1 - self.success_rates
        if self.task_priority == "linear":
            return lacking.clip(self.rho_min, self.rho_max)
        if self.task_priority == "softmax":
            return np.exp((lacking - lacking.max()) / self.temperature)
        if self.task_priority == "rank":
            _, rank_of, counts = np.unique(-lacking, return_inverse=True, return_counts=True)
            return 1 / np.sqrt((np.cumsum(counts) - (counts - 1) / 2)[rank_of])
        return np.ones(self.num_tasks)

    def quotas(self, batch_size: int) -> np.ndarray:
        """
        :param batch_size: Rows of a batch
        :return: Rows of each task in it ``(T,)``, whole groups; their sum is the batch size
        :raises ValueError: for a bad ``batch_size``
        """
        self.rows_per_task(batch_size)
        if self.num_tasks == 1:
            return np.array([batch_size])
        group_size = self.group_size(batch_size)
        has_share = self.sizes() > 0
        if not has_share.any():
            has_share[:] = True
        floors = np.where(has_share, self._least_groups(batch_size), 0)
        # Tasks that do equally well take turns with the groups that cannot be shared equally
        order = np.roll(np.arange(self.num_tasks), -self._first_task)
        quotas = np.empty(self.num_tasks, dtype=np.int64)
        quotas[order] = group_size * apportion(self.task_priorities[order], batch_size // group_size, floors[order])
        return quotas

    # ------------------------------------------------------------------- saving

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_tree"] = self._leaves_in_use()
        state["_shares"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tree = SumTree(self.num_tasks, self.capacity_per_task)
        self._set_leaves(state["_tree"])

    def _leaves_in_use(self) -> list[np.ndarray]:
        return [leaves[:size].copy() for leaves, size in zip(self._tree.leaves, self.sizes(), strict=True)]

    def _set_leaves(self, stored_leaves: list[np.ndarray]) -> None:
        self._tree.leaves[:] = 0
        for leaves, stored in zip(self._tree.leaves, stored_leaves, strict=True):
            leaves[: len(stored)] = stored
        self._tree.rebuild()

    def get_checkpoint_state(self) -> dict[str, Any]:
        """
        :return: All that a checkpoint holds of this buffer beside its rows
        """
        names = ("highest_priorities", "success_rates", "beta", "_first_task")
        own_state = {name: copy.copy(getattr(self, name)) for name in names}
        return {**super().get_checkpoint_state(), **own_state, "leaves": self._leaves_in_use()}

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        """
        :param state: What ``get_checkpoint_state`` of a buffer of the same shape returned; the rows have to follow
        """
        super().set_checkpoint_state(state)
        self.highest_priorities[:] = state["highest_priorities"]
        self.success_rates, self.beta = state["success_rates"], state["beta"]
        self._first_task = state["_first_task"]
        self._set_leaves(state["leaves"])
        self._shares = None


def apportion(shares: np.ndarray, n_seats: int, floors: np.ndarray) -> np.ndarray:
    """
    Share out whole seats by largest remainders, of equal ones the first; who would get less than the floor gets the floor.

    :param shares: Shares ``(T,)`` that sum to 1
    :param n_seats: Seats to share out
    :param floors: Seats that each gets at least ``(T,)``, at most ``n_seats`` together
    :return: Seats ``(T,)``, ``n_seats`` together
    """
    seats = np.zeros(len(shares), dtype=np.int64)
    at_floor = shares <= 0
    while True:
        seats[at_floor] = floors[at_floor]
        free = ~at_floor
        n_free = n_seats - seats[at_floor].sum()
        exact = shares[free] / shares[free].sum() * n_free
        rounded = np.floor(exact + 1e-9).astype(np.int64)  # 3 must not become 2.9999
        remainder_order = np.argsort(rounded - exact, kind="stable")
        rounded[remainder_order[: n_free - rounded.sum()]] += 1
        seats[free] = rounded
        too_few = free & (seats < floors)
        if not too_few.any():
            return seats
        at_floor |= too_few
