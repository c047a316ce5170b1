"""
What the speed measurements share: variants that take turns, programs of their own that do so too, medians with their spread,
and a line on the machine.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Variants = dict[str, Callable[[], Any]]
Table = dict[str, dict[str, Any]]


def time_in_turns(
    variants: Variants, rounds: int, clock: Callable[[], Any] = time.perf_counter, seconds_at_most: float | None = None
) -> dict[str, np.ndarray]:
    """
    Time variants in one process, each round in another order, after a call of each to warm up.

    :param variants: What to time, by name. One that returns a float has timed itself: so many seconds
    :param rounds: How often
    :param clock: ``time.perf_counter`` for what a user waits for; ``time.process_time`` repeats better where other programs
        run, but counts the time of all threads and none of child processes. It may return an array: several clocks at once
    :param seconds_at_most: End after the round (the third at the earliest) in which this much time has gone by; None: do all
    :return: Seconds of each round, ``(rounds,)`` or ``(rounds, clocks)``, by name
    """
    seconds: dict[str, list[Any]] = {name: [] for name in variants}
    names = list(variants)
    for variant in variants.values():
        variant()
    begin = time.perf_counter()
    for round_index in range(rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            own = variants[name]()
            seconds[name].append(own if isinstance(own, float) else clock() - start)
        if seconds_at_most is not None and round_index >= 2 and time.perf_counter() - begin > seconds_at_most:
            break
    return {name: np.array(values) for name, values in seconds.items()}


def summarize(seconds: dict[str, np.ndarray], units: int | dict[str, int] = 1, reference: str | None = None) -> Table:
    """
    :param seconds: What ``time_in_turns`` returned
    :param units: How many units one call did, of all variants or of each by name
    :param reference: The variant that the others are compared with; None: the first
    :return: For each variant ``median_ms`` and ``quartiles_ms`` of a unit, ``speed_ratio`` (the median over the rounds of the
        reference's time by this one's), its quartiles ``ratio_quartiles``, and ``rounds``
    """
    units = units if isinstance(units, dict) else dict.fromkeys(seconds, units)
    reference = next(iter(seconds)) if reference is None else reference
    reference_times = seconds[reference] / units[reference]
    table = {}
    for name, values in seconds.items():
        times = values / units[name]
        low, median, high = np.percentile(times * 1e3, [25, 50, 75])
        ratio_low, ratio, ratio_high = np.percentile(reference_times / times, [25, 50, 75])
        table[name] = {
            "median_ms": float(median),
            "quartiles_ms": [float(low), float(high)],
            "speed_ratio": float(ratio),
            "ratio_quartiles": [float(ratio_low), float(ratio_high)],
            "rounds": len(values),
        }
    return table


def print_table(title: str, table: Table) -> Table:
    """
    :param title: Its title
    :param table: What ``summarize`` returned; a variant that is not measured has ``skipped``, the reason, instead
    :return: The same table
    """
    width = max([34, *(len(name) for name in table)])
    print(f"\n{title}")
    print(f"{'':{width}s} {'median ms':>10s} {'quartiles':>19s} {'per second':>11s} {'speed ratio':>12s} {'quartiles':>11s}")
    for name, row in table.items():
        if "skipped" in row:
            print(f"{name:{width}s} skipped: {row['skipped']}")
            continue
        low, high = row["quartiles_ms"]
        ratio_low, ratio_high = row["ratio_quartiles"]
        print(
            f"{name:{width}s} {row['median_ms']:10.3f} {low:9.3f}-{high:9.3f} {1e3 / row['median_ms']:11.1f} "
            f"{row['speed_ratio']:12.2f} {ratio_low:5.2f}-{ratio_high:5.2f}"
        )
    return table


def report(title: str, seconds: dict[str, np.ndarray], units: int | dict[str, int] = 1) -> Table:
    """
    Print the table of one comparison and return it, see ``summarize``.
    """
    return print_table(title, summarize(seconds, units))


class Program:
    """
    A program that times variants when asked, in a process of its own: nothing that another variant sets can help it.

    :param command: What to start; it calls ``serve``
    :param n_cores: Number of cores that it may use; None: all (a limit needs Linux)
    :raises RuntimeError: if it does not start, with the end of what it wrote to stderr
    """

    def __init__(self, command: Sequence[str], n_cores: int | None = None):
        environment = dict(os.environ)
        if n_cores is not None:
            cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:n_cores])
            command = ["taskset", "--cpu-list", cores, *command]
            environment["OMP_NUM_THREADS"] = str(n_cores)
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last_lines = self._errors.read().strip().splitlines()[-3:]
            raise RuntimeError(f"the program ended with code {self._process.returncode}: {' | '.join(last_lines)}")
        return line.strip()

    def call(self, name: str) -> float:
        """
        :param name: The variant
        :return: Seconds that its call took
        """
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def serve(variants: dict[str, Callable[[], Any]], clock: Callable[[], float] = time.perf_counter) -> None:
    """
    The side of the program: read names of variants, call them and write how long that took, until the input ends.

    :param variants: What can be called. One that returns a float has timed itself
    :param clock: The clock
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what the variants print is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = clock()
        own = variants[line.strip()]()
        print(own if isinstance(own, float) else clock() - start, file=answers, flush=True)


def process_tree() -> list[int]:
    """
    :return: Process ids of this process and of those below it (Linux only)
    """
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
    tree = [os.getpid()]
    for pid in tree:  # it grows while it is read
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def memory_of_processes() -> int:
    """
    :return: Bytes of this process and of those below it; pages that they share count once (Linux only)
    """
    total = 0
    for pid in process_tree():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
    return total


def machine_line() -> str:
    """
    :return: Processor, number of cores that this process may use, its load, and the versions that decide about speed
    """
    import torch as th

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
        known = set(next((line for line in lines if line.startswith("flags")), "").split())
        flags = ", " + next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in known), "no AVX2")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = th.cuda.get_device_name() if th.cuda.is_available() else "no GPU"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor}{flags}, {cores} cores, {device}{load}, {platform.system()}, Python {platform.python_version()}, "
        f"torch {th.__version__}, numpy {np.__version__}"
    )
