"""
Prioritized replay as ratios: ``python -m benchmarks.speed.prioritized``; how is said in ``benchmarks.speed.measure``.

Two questions: what a prioritized batch costs beside a uniform one, and how unequal shares of the tasks are best brought to
layers with parameters of each task (PaCo's), where the shapes should not change from batch to batch. The clock counts the
process's own time on one thread, which other programs disturb least; cached memory they still share.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

import sb3_mtrl
from benchmarks.speed.measure import Variants, machine_line, print_table, summarize, time_in_turns
from benchmarks.speed.random_tasks import ACTION_DIM, OBS_DIM
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.compositional import forward_groups
from sb3_mtrl.common.cpu_tuning import fast_matmul, keep_freed_memory
from sb3_mtrl.common.prioritized import SumTree, TaskPrioritizedReplayBuffer, apportion
from sb3_mtrl.common.torch_layers import CompositionalLinear, CompositionalMLP


def fill(buffer: MultiTaskReplayBuffer) -> None:
    """Fill every ring with rows of random content; directly, since a million calls of ``add`` would take minutes."""
    rng = np.random.default_rng(0)
    for start in range(0, buffer.buffer_size, 100_000):
        rows = buffer._rows[start : start + 100_000]
        rows[:] = rng.normal(size=rows.shape)
    buffer.full[:] = True
    buffer._laps[:] = 1
    if isinstance(buffer, TaskPrioritizedReplayBuffer):
        buffer._tree.leaves[:, : buffer.capacity_per_task] = rng.exponential(size=(buffer.num_tasks, buffer.capacity_per_task))
        buffer._tree.rebuild()


def measure_replay(
    rounds: int, num_tasks: int, batch_size: int, rows_per_task: int = 100_000, n_calls: int = 20
) -> dict[str, Any]:
    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    settings: tuple[Any, ...] = (num_tasks * rows_per_task, observation_space, action_space, "cpu", num_tasks)
    prioritized = TaskPrioritizedReplayBuffer(*settings, num_tasks=num_tasks)
    fill(prioritized)
    plain = MultiTaskReplayBuffer(*settings, num_tasks=num_tasks)
    plain._storage = prioritized._storage  # the same memory: there may be no room for two
    plain.full[:] = True
    plain._laps[:] = 1
    errors = np.random.default_rng(1).exponential(size=batch_size)
    base = np.zeros((num_tasks, OBS_DIM), dtype=np.float32)
    obs = np.concatenate([base, np.eye(num_tasks, dtype=np.float32)], axis=1)
    step = (obs, obs, np.zeros((num_tasks, ACTION_DIM)), np.ones(num_tasks), np.zeros(num_tasks), [{}] * num_tasks)

    def sample_and_update() -> None:
        for _ in range(n_calls):
            prioritized.update_priorities(prioritized.sample(batch_size).indices, errors)  # type: ignore[arg-type]

    def repeat(function: Any, *args: Any) -> Any:
        return lambda: [function(*args) for _ in range(n_calls)]

    indices = prioritized.sample(batch_size).indices
    variants: Variants = {
        "sample, plain": repeat(plain.sample, batch_size),
        "sample, prioritized": repeat(prioritized.sample, batch_size),
        "update_priorities": repeat(prioritized.update_priorities, indices, errors),
        "sample + update_priorities": sample_and_update,
        "add, plain": repeat(plain.add, *step),
        "add, prioritized": repeat(prioritized.add, *step),
    }
    title = f"batch of {batch_size} rows from {num_tasks} x {rows_per_task}"
    table: dict[str, Any] = {**print_table(title, summarize(time_in_turns(variants, rounds, time.process_time), n_calls))}
    table["memory_mb"] = {
        "rows": prioritized._rows.nbytes / 1e6,
        "priorities": prioritized._tree.nodes.nbytes / 1e6,
    }
    print(f"memory: {table['memory_mb']['rows']:.0f} MB of rows, {table['memory_mb']['priorities']:.0f} MB of priorities")
    return table


class CompositionalForms:
    """
    A compositional network with two critics' worth of parameters, trained on a batch whose tasks have unequal numbers of rows.

    :param quotas: Rows of each task ``(T,)``
    :param net_arch: Widths of its hidden layers
    :param n_param_sets: Number of parameter sets K
    """

    def __init__(self, quotas: np.ndarray, net_arch: Sequence[int] = (400, 400, 400), n_param_sets: int = 5):
        th.manual_seed(0)
        dims = [OBS_DIM + ACTION_DIM, *net_arch, 1]
        layers = [CompositionalLinear(dims[i], dims[i + 1], n_param_sets, n_networks=2) for i in range(len(dims) - 1)]
        self.network = CompositionalMLP(layers)
        self.w = th.nn.Parameter(th.randn(len(quotas), n_param_sets) / n_param_sets)
        self.quotas = quotas
        self.task_ids = th.from_numpy(np.repeat(np.arange(len(quotas)), quotas))
        self.x = th.randn(int(quotas.sum()), dims[0])

    def step(self, outputs: th.Tensor) -> th.Tensor:
        """Backward from one mean over the batch, whatever the form of the outputs."""
        for parameter in (self.w, *self.network.parameters()):
            parameter.grad = None
        loss = outputs.square().sum() / (2 * len(self.x))
        loss.backward()
        return loss.detach()

    def padded(self) -> th.Tensor:
        longest = int(self.quotas.max())
        x = self.x.new_zeros(len(self.quotas), longest, self.x.shape[1])
        keep = th.arange(longest) < th.from_numpy(self.quotas)[:, None]
        x[keep] = self.x
        outputs = self.network.forward_composed(x, self.network.compose(self.w))
        return self.step(outputs[:, keep])

    def task_by_task(self) -> th.Tensor:
        composed = self.network.compose(self.w)
        outputs = []
        for task, rows in enumerate(self.x.split(self.quotas.tolist())):
            of_task = [(weight[:, task : task + 1], bias[:, task : task + 1]) for weight, bias in composed]
            outputs.append(self.network.forward_composed(rows.unsqueeze(0), of_task)[:, 0])
        return self.step(th.cat(outputs, dim=1))

    def groups_indexed(self, rows_per_group: int) -> th.Tensor:
        group_tasks = self.task_ids[::rows_per_group]
        composed = [(weight[:, group_tasks], bias[:, group_tasks]) for weight, bias in self.network.compose(self.w)]
        return self.step(self.network.forward_composed(self.x.view(len(group_tasks), rows_per_group, -1), composed))

    def groups_composed(self, rows_per_group: int) -> th.Tensor:
        group_tasks = self.task_ids[::rows_per_group]
        composed = self.network.compose(self.w[group_tasks])
        return self.step(self.network.forward_composed(self.x.view(len(group_tasks), rows_per_group, -1), composed))

    def groups_in_runs(self, rows_per_group: int) -> th.Tensor:
        """The form that PaCo's layers use: groups of one task are joined again (on a GPU they are indexed)."""
        group_tasks = self.task_ids[::rows_per_group]
        x = self.x.view(len(group_tasks), rows_per_group, -1)
        return self.step(forward_groups(self.network, x, self.network.compose(self.w), group_tasks))

    def mixed(self) -> th.Tensor:
        return self.step(self.network.forward_mixed(self.x, self.w[self.task_ids]))


def measure_unequal_quotas(
    rounds: int, num_tasks: int, batch_size: int, net_arch: Sequence[int], group_sizes: Sequence[int]
) -> dict[str, Any]:
    """Equal shares, and those of one task at 0 among solved ones, in the largest groups: every form gets the same rows."""
    rho = np.array([1.0] + [0.1] * (num_tasks - 1))
    largest = max(group_sizes)
    hard = largest * apportion(rho / rho.sum(), batch_size // largest, np.ones(num_tasks, dtype=np.int64))
    tables = {}
    for name, quotas in (("equal", np.full(num_tasks, batch_size // num_tasks)), ("one_hard_task", hard)):
        forms = CompositionalForms(quotas, net_arch)
        variants: Variants = {"one loop pass per task": forms.task_by_task, "padded to the longest": forms.padded}
        for size in group_sizes:
            variants[f"groups of {size}, in runs"] = lambda size=size, forms=forms: forms.groups_in_runs(size)  # type: ignore[misc]
            variants[f"groups of {size}, indexed"] = lambda size=size, forms=forms: forms.groups_indexed(size)  # type: ignore[misc]
            variants[f"groups of {size}, composed"] = lambda size=size, forms=forms: forms.groups_composed(size)  # type: ignore[misc]
        variants["K outputs mixed"] = forms.mixed
        with fast_matmul():
            losses = [float(variant()) for variant in variants.values()]
            np.testing.assert_allclose(losses, losses[0], rtol=1e-4)  # they are one function
            seconds = time_in_turns(variants, rounds, time.process_time)
        layers = " x ".join(map(str, net_arch))
        title = f"forward + backward, 2 critics, K = 5, {layers}, rows of the tasks {quotas.tolist()}"
        tables[name] = {"quotas": quotas.tolist(), **print_table(title, summarize(seconds))}
    return tables


def measure_drift(n_updates: int = 10_000_000, batch_size: int = 1280) -> dict[str, float]:
    """Update many priorities of eight orders of magnitude, and compare the sums with exact ones."""
    rng = np.random.default_rng(0)
    tree = SumTree(10, 100_000)
    tree.leaves[:, :100_000] = 1.0
    tree.rebuild()
    for _ in range(n_updates // batch_size):
        priorities = 10 ** rng.uniform(-6, 3, batch_size)
        tree.set(rng.integers(0, 10, batch_size), rng.integers(0, 100_000, batch_size), priorities**0.6)
    exact = tree.leaves.astype(np.longdouble).sum(axis=1)
    relative = float(np.max(np.abs(tree.totals - exact) / exact))
    updated = tree.nodes.copy()
    tree.rebuild()
    differing = int(np.count_nonzero(updated != tree.nodes))
    print(f"\nafter {n_updates} updates: largest relative error {relative:.1e}, {differing} nodes differ from a rebuilt tree")
    return {"n_updates": n_updates, "largest_relative_error": relative, "nodes_that_differ": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/speed/prioritized.json"))
    args = parser.parse_args()
    th.set_num_threads(1)
    keep_freed_memory()  # as a training does
    machine = machine_line()
    print(f"sb3_mtrl {sb3_mtrl.__version__}, {machine}, {args.rounds} rounds")
    results = {
        "machine": machine,
        "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "replay_10_tasks": measure_replay(args.rounds, 10, 1280),
        "replay_50_tasks": measure_replay(args.rounds, 50, 6400, n_calls=10),
        "unequal_quotas": measure_unequal_quotas(args.rounds, 10, 1280, (400, 400, 400), (16, 32, 64)),
        "unequal_quotas_small": measure_unequal_quotas(args.rounds, 5, 320, (128, 128), (4, 8, 16)),
        "drift": measure_drift(),
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
