"""
The updates of all algorithms on a GPU: ``python -m benchmarks.speed.gpu``.

For each algorithm, first the update as one CUDA graph is compared with the same update started kernel by kernel, over 100
updates with equal random numbers, in three cases: with the replay buffer in main memory, with it on the GPU, and with target
networks that follow every second update, which makes two graphs. A GPU adds in any order, so that they may differ by rounding:
they are equal if the norm of the difference of all parameters is at most 1 % of that of their change. Then three ways to
update are timed in turns: kernel by kernel ("eager"), as a graph, and as a graph with the replay buffer on the GPU, at T = 10
(batch 1280) and T = 50 (batch 6400), with the number of kernels per update and the share of two lower bounds: the matrix
products of the update at the speed of one large product, and the bytes of parameters, gradients and moments at the speed of
one large copy, both measured in the same run.

Each timed update is one call of ``train``, as in a training with one update per step. ``on_nonfinite`` is "mask" everywhere:
with "raise", each call of ``train`` waits for the GPU once.

Results are written after each algorithm, and one that fails does not keep those after it from being tried (a capture that
fails may, as it can leave PyTorch unable to go on). Exit code 1: an algorithm failed, or its graph is not equal. Exit code 2:
there is no GPU. ``--device cpu --tiny`` runs the same code, uncaptured, on tiny networks: to test it, not to measure.
"""

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.learners import NET_ARCH, make_filled_model
from benchmarks.speed.measure import machine_line, print_table, summarize, time_in_turns
from sb3_mtrl import MTSAC
from sb3_mtrl.mtsac.static_update import StaticUpdate
from sb3_mtrl.zoo.algorithms import ALGORITHMS

SIZES = ((10, 1280), (50, 6400))  # tasks, batch
N_EQUAL_UPDATES = 100
WAYS = {"eager": (False, False), "graph": (True, False), "graph, resident replay": (True, True)}
# Cases of the comparison: whether the replay buffer is on the device, and how many updates target networks follow
CASES = {"host replay": (False, 1), "resident replay": (True, 1), "two kinds of update": (False, 2)}
# Largest norm of the difference of all parameters, as a share of that of their change
TOLERANCE = 0.01
# A float32 holds it exactly, so that both ways to update use the same
LEARNING_RATE = 2**-11


class Measurement:
    """
    :param device: "cuda", or "cpu" to test this program
    :param tiny: Whether networks, batches and numbers of rounds are tiny
    :param rounds: How often each way to update is timed
    """

    def __init__(self, device: str, tiny: bool, rounds: int):
        self.device = device
        self.sizes = ((2, 8),) if tiny else SIZES
        self.net_arch = (8,) if tiny else NET_ARCH
        self.rounds = 1 if tiny else rounds
        self.n_updates = 2 if tiny else 100
        self.n_equal_updates = 5 if tiny else N_EQUAL_UPDATES
        self.matrix_size = 64 if tiny else 8192
        self.flop_per_second = self._flop_per_second()
        self.bytes_per_second = self._bytes_per_second()

    def synchronize(self) -> None:
        if self.device == "cuda":
            th.cuda.synchronize()

    def make_model(
        self, algorithm: str, num_tasks: int, batch_size: int, graph: bool, resident: bool, **other_kwargs: Any
    ) -> MTSAC:
        """
        :param algorithm: Name in the zoo's table
        :param num_tasks: Number of tasks T
        :param batch_size: Rows per update
        :param graph: Whether updates are one graph
        :param resident: Whether the replay buffer is on the device
        :param other_kwargs: Further arguments of the algorithm
        """
        kwargs: dict[str, Any] = dict(device=self.device, on_nonfinite="mask", learning_rate=LEARNING_RATE, **other_kwargs)
        if self.device == "cuda":
            kwargs.update(cuda_graph=graph, replay_device="cuda" if resident else "cpu")
        elif resident:
            kwargs["replay_buffer_kwargs"] = dict(storage_device="cpu")
        model = make_filled_model(algorithm, num_tasks, batch_size, kwargs, self.net_arch)
        assert isinstance(model, MTSAC)
        if self.device == "cpu":
            model._may_look = False
            model._static_update = StaticUpdate(model) if graph else None
        return model

    def compare(self, algorithm: str, case: str) -> dict[str, Any]:
        """
        :param algorithm: Name in the zoo's table
        :param case: One of ``CASES``
        :return: The largest difference of a parameter after updates with and without a graph, the largest change of one, the
            norm of all differences as a share of that of all changes, and whether this is within the tolerance
        """
        resident, interval = CASES[case]
        kwargs: dict[str, Any] = {"target_update_interval": interval}
        if algorithm == "starssac":
            kwargs["per_alpha"] = 0.0  # priorities would make other batches of other roundings
        states = []
        for graph in (False, True):
            model = self.make_model(algorithm, *self.sizes[0], graph, resident, **kwargs)
            before = parameter_vector(model)
            model.set_random_seed(1)
            for _ in range(self.n_equal_updates // interval):
                model.train(interval)
            states.append(parameter_vector(model))
        difference, change = states[1] - states[0], states[0] - before
        share = (difference.norm() / change.norm()).item()
        return {
            "n_updates": self.n_equal_updates // interval * interval,
            "max_difference": difference.abs().max().item(),
            "max_change": change.abs().max().item(),
            "share_of_change": share,
            "is_equal": share <= TOLERANCE,  # not so if it is NaN
        }

    def measure(self, algorithm: str, num_tasks: int, batch_size: int) -> dict[str, dict[str, Any]]:
        """
        :param algorithm: Name in the zoo's table
        :param num_tasks: Number of tasks T
        :param batch_size: Rows per update
        :return: The table of ``summarize`` for the ways to update, with ``updates_per_second``, ``kernels``, and the shares
            of the lower bounds
        """
        models = {name: self.make_model(algorithm, num_tasks, batch_size, *way) for name, way in WAYS.items()}

        def timed(model: MTSAC) -> Callable[[], None]:
            def update() -> None:
                for _ in range(self.n_updates):
                    model.train(1)
                self.synchronize()

            return update

        table = summarize(time_in_turns({name: timed(model) for name, model in models.items()}, self.rounds), self.n_updates)
        flop, n_bytes = count_flop(models["eager"]), count_bytes(models["eager"])
        bounds = {"flop": flop / self.flop_per_second, "bytes": n_bytes / self.bytes_per_second}
        for name, row in table.items():
            row["updates_per_second"] = 1e3 / row["median_ms"]
            row["kernels"] = self.count_kernels(models[name])
            for bound, seconds in bounds.items():
                row[f"share_of_{bound}_bound"] = 1e3 * seconds / row["median_ms"]
        print_table(f"{algorithm}, T = {num_tasks}, batch {batch_size}", table)
        counted = "kernels" if self.device == "cuda" else "operators"
        for name, row in table.items():
            print(
                f"{name:34s} {row['kernels']} {counted} per update, {row['share_of_flop_bound']:.1%} of the bound of "
                f"{flop / 1e9:.2f} GFLOP, {row['share_of_bytes_bound']:.1%} of that of {n_bytes / 1e6:.1f} MB"
            )
        return table

    def count_kernels(self, model: MTSAC) -> int:
        """
        :param model: A model that has made some updates
        :return: Kernels, copies and fills that the device runs in an update; on a CPU, operators of PyTorch
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        with profile(activities=activities) as profiled:
            model.train(1)
            self.synchronize()
        wanted = DeviceType.CUDA if self.device == "cuda" else DeviceType.CPU
        # The names that PyTorch gives to parts of a program, e.g. to a step, are events, too
        return sum(event.device_type == wanted and not event.is_user_annotation for event in profiled.events())

    def _flop_per_second(self) -> float:
        """Speed of one large product of float32 matrices, in the precision that the updates have."""
        left = th.rand(self.matrix_size, self.matrix_size, device=self.device)
        right, result = th.rand_like(left), th.empty_like(left)
        return 2 * self.matrix_size**3 / self._fastest(lambda: th.mm(left, right, out=result))

    def _bytes_per_second(self) -> float:
        """Speed of one large copy, what is read and what is written together."""
        source = th.zeros(4 * self.matrix_size**2, device=self.device)
        target = th.empty_like(source)
        return 2 * source.nbytes / self._fastest(lambda: target.copy_(source))

    def _fastest(self, call: Callable[[], Any], n_calls: int = 10) -> float:
        def calls() -> None:
            for _ in range(n_calls):
                call()
            self.synchronize()

        return float(np.min(time_in_turns({"": calls}, rounds=5)[""])) / n_calls


def parameter_vector(model: MTSAC) -> th.Tensor:
    """
    :param model: A model
    :return: All that its policy's file would hold, in one tensor
    """
    return th.cat([tensor.detach().double().flatten() for tensor in model.policy.state_dict().values()])


def count_flop(model: MTSAC) -> int:
    """
    :param model: A model
    :return: Floating point operations of the matrix products of an update
    """
    counter = FlopCounterMode(display=False)
    with counter:
        model.train(1)
    return counter.get_total_flops()


def count_bytes(model: MTSAC) -> int:
    """
    What an update has to move if everything else stays in caches: each learned parameter is read going forward and backward,
    its gradient written, and the optimiser reads parameter, gradient and two moments and writes all but the gradient; the
    target networks are read once, and their update reads them and the parameters and writes them; the batch is read once.

    :param model: A model
    :return: Bytes of an update
    """
    groups = [group for optimizer in model._stepping_optimizers() for group in optimizer.param_groups]
    n_learned = sum(parameter.numel() for group in groups for parameter in group["params"])
    targets = [name for name in model.policy.state_dict() if name.split(".")[0].endswith("_target")]
    n_targets = sum(model.policy.state_dict()[name].numel() for name in targets)
    assert model.batch_size is not None
    return 4 * (10 * n_learned + 4 * n_targets + model.batch_size * model.replay_buffer.row_width)  # type: ignore[union-attr]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help='"cpu": to test this program')
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to test this program")
    parser.add_argument("--rounds", type=int, default=7, help="how often each way to update is timed")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=tuple(ALGORITHMS))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not th.cuda.is_available():
        print("benchmarks.speed.gpu needs a GPU, and PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    measurement = Measurement(arguments.device, arguments.tiny, arguments.rounds)
    results: dict[str, Any] = {"machine": machine_line(), "device": arguments.device, "tiny": arguments.tiny}
    print(results["machine"])
    results.update(flop_per_second=measurement.flop_per_second, bytes_per_second=measurement.bytes_per_second)
    tflops, gigabytes = measurement.flop_per_second / 1e12, measurement.bytes_per_second / 1e9
    print(f"one large product: {tflops:.2f} TFLOP/s, one large copy: {gigabytes:.1f} GB/s")
    results.update(equality={}, updates={f"T={num_tasks} B={batch_size}": {} for num_tasks, batch_size in measurement.sizes})
    failed = []
    for algorithm in arguments.algorithms:
        try:
            if not run_algorithm(measurement, algorithm, results):
                failed.append(algorithm)
        except Exception:
            traceback.print_exc()
            failed.append(algorithm)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_algorithm(measurement: Measurement, algorithm: str, results: dict[str, Any]) -> bool:
    """
    All of one algorithm.

    :param measurement: What compares and measures
    :param algorithm: Name in the zoo's table
    :param results: Where the results go
    :return: Whether updates with and without a graph were equal in all cases
    """
    rows = results["equality"][algorithm] = {}
    for case in CASES:
        row = rows[case] = measurement.compare(algorithm, case)
        gc.collect()  # models with guards are in cycles with them
        print(
            f"{algorithm}, {case}: graph and eager differ by at most {row['max_difference']:.2e} after {row['n_updates']} "
            f"updates (largest change of a parameter: {row['max_change']:.2e}), by {row['share_of_change']:.2e} of the norm "
            f"of all changes: {'equal' if row['is_equal'] else 'NOT EQUAL'}"
        )
    for num_tasks, batch_size in measurement.sizes:
        table = measurement.measure(algorithm, num_tasks, batch_size)
        results["updates"][f"T={num_tasks} B={batch_size}"][algorithm] = table
        gc.collect()
    return all(row["is_equal"] for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
