"""
What speed on a CPU needs of the whole process: how float32 products are computed, how freed memory is kept, and on how many
threads.
"""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch as th

# Relative L2 error of a product: float32 by any library comes to a few 1e-7, bfloat16 to 2e-3
MAX_MATMUL_ERROR = 2e-6
# Known gains are 2 or about 1, so that equal runs decide equally on one CPU, however busy it is
MIN_MATMUL_SPEEDUP = 1.5

# Of glibc's malloc.h: parameter of mallopt, values of which the first that is taken counts, and the environment variable that
# sets it before a program starts
_MALLOC_OPTIONS = (
    # Freed activations and gradients are reused instead of being given back and faulted in again, page by page. Replay buffers
    # are larger as a rule, and still go back. Before version 2.35 glibc refuses more than 32 MiB.
    (-3, (1 << 28, 1 << 25), "MALLOC_MMAP_THRESHOLD_"),
    (-1, ((1 << 31) - 1,), "MALLOC_TRIM_THRESHOLD_"),
    (-2, (1 << 26,), "MALLOC_TOP_PAD_"),
)

# What `use_onednn` was told; None: the probe decides
_choice: bool | None = None

# PyTorch's own choice, by which an explicit one is told: later calls of `th.set_num_threads` change the number
_THREADS_AT_IMPORT = th.get_num_threads()


class MatmulProbe(NamedTuple):
    """
    What a comparison of two ways to multiply float32 matrices found.

    :param speedup: Time of the plain way by that of the other
    :param error: Relative L2 error of the other way against float64
    """

    speedup: float
    error: float

    @property
    def is_exact(self) -> bool:
        return self.error < MAX_MATMUL_ERROR

    @property
    def is_worth_it(self) -> bool:
        return self.is_exact and self.speedup >= MIN_MATMUL_SPEEDUP


def _matmul_backend() -> Any:
    """PyTorch's switch for float32 products on the CPU; None before PyTorch 2.9, without oneDNN, or if the user turned it."""
    backend = getattr(th.backends.mkldnn, "matmul", None)
    if backend is None or not th.backends.mkldnn.is_available():
        return None
    return backend if backend.fp32_precision in ("none", "ieee") else None


@contextmanager
def _onednn_matmul() -> Iterator[None]:
    """
    Send float32 products on the CPU to oneDNN.

    The switch allows oneDNN to round to bfloat16; CPUs without matrix units (AMX) for that compute in float32 nevertheless,
    and with AVX-512 on an AMD processor twice as fast as MKL. GPUs are not concerned.
    """
    backend = _matmul_backend()
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def probe_matmul(
    plain: Callable[[th.Tensor, th.Tensor], th.Tensor],
    other: Callable[[th.Tensor, th.Tensor], th.Tensor],
    rounds: int = 7,
) -> MatmulProbe:
    """
    Compare two ways to multiply on one hidden layer of Meta-World's size, (1280, 400) by (400, 400).

    :param plain: The first way
    :param other: The second way
    :param rounds: How often each is timed, in turns; the fastest counts
    :return: Speedup and error of the second
    """
    rng = np.random.default_rng(0)  # leaves PyTorch's generator alone
    a, b = (th.as_tensor(rng.standard_normal(shape, dtype=np.float32)) for shape in ((1280, 400), (400, 400)))
    exact = a.double() @ b.double()
    error = (other(a, b).double() - exact).norm() / exact.norm()
    plain(a, b)
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for multiply, times in zip((plain, other), seconds, strict=True):
            start = time.perf_counter()
            multiply(a, b)
            times.append(time.perf_counter() - start)
    return MatmulProbe(min(seconds[0]) / min(seconds[1]), error.item())


@cache
def onednn_probe() -> MatmulProbe | None:
    """
    :return: What oneDNN makes of float32 products on this CPU, measured once per process; None where it cannot be chosen
    """
    if _matmul_backend() is None:
        return None

    def by_onednn(a: th.Tensor, b: th.Tensor) -> th.Tensor:
        with _onednn_matmul():
            return a @ b

    return probe_matmul(th.matmul, by_onednn)


@cache
def bfloat16_probe() -> MatmulProbe:
    """
    :return: What bfloat16 makes of products on this CPU, measured once per process
    """
    return probe_matmul(th.matmul, lambda a, b: a.bfloat16() @ b.bfloat16())


def uses_onednn() -> bool:
    """
    :return: Whether ``fast_matmul`` sends float32 products to oneDNN: what the probe says, unless ``use_onednn`` was called
    """
    if _choice is not None:
        return _choice
    probe = onednn_probe()
    return probe is not None and probe.is_worth_it


def use_onednn(choice: bool) -> bool:
    """
    Decide as another process did, so that a training that goes on rounds as it did; for the rest of this process.

    :param choice: What ``uses_onednn`` returned there
    :return: Whether that is possible here
    """
    global _choice
    if choice and _matmul_backend() is None:
        return False
    _choice = choice
    return True


@contextmanager
def fast_matmul() -> Iterator[None]:
    """
    Compute float32 products on the CPU by oneDNN where that is as exact as float32 is and faster; as before afterwards.
    """
    if not uses_onednn() or _matmul_backend() is None:
        yield
        return
    with _onednn_matmul():
        yield


@cache
def keep_freed_memory() -> bool:
    """
    Let glibc keep freed memory for the next update; for the rest of the process, it cannot be undone.

    :return: Whether it was set: not without glibc, not where the user set one of the options by ``MALLOC_*_`` or
        ``GLIBC_TUNABLES``, and not where glibc refuses the first of them, without which the others would do harm
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for _, _, name in _MALLOC_OPTIONS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(any(mallopt(option, value) == 1 for value in values) for option, values, _ in _MALLOC_OPTIONS)


def available_cores() -> int:
    """
    :return: Number of cores that this process may use
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def learner_threads(n_busy_workers: int) -> Iterator[None]:
    """
    Leave cores to processes that work while the learner computes: threads that wait for each other on a core that is taken
    are many times slower than fewer threads. As before afterwards.

    The number of threads is only brought down, and not at all if it is the user's: set by ``OMP_NUM_THREADS`` or
    ``MKL_NUM_THREADS``, or by ``torch.set_num_threads`` after this package was imported.

    :param n_busy_workers: How many processes
    """
    before = th.get_num_threads()
    wanted = max(1, available_cores() - n_busy_workers)
    is_own_choice = before != _THREADS_AT_IMPORT or "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if is_own_choice or wanted >= before:
        yield
        return
    th.set_num_threads(wanted)
    try:
        yield
    finally:
        if th.get_num_threads() == wanted:  # else somebody chose another number meanwhile
            th.set_num_threads(before)


def tune_process(verbose: int = 0) -> None:
    """
    Set what holds for the rest of the process, and say what training will set and restore.

    :param verbose: 1 or more: print a line on it
    """
    keeps_memory = keep_freed_memory()
    if verbose >= 1:
        by_onednn = uses_onednn() and _matmul_backend() is not None
        print(tuning_line(onednn_probe(), by_onednn, _choice is not None, keeps_memory))


def tuning_line(probe: MatmulProbe | None, by_onednn: bool, is_as_before: bool, keeps_memory: bool) -> str:
    """
    :param probe: What ``onednn_probe`` returned
    :param by_onednn: Whether float32 products are sent to oneDNN
    :param is_as_before: Whether a checkpoint decided so, and not the probe
    :param keeps_memory: What ``keep_freed_memory`` returned
    :return: One line on what is set
    """
    matmul = "float32 products by oneDNN" if by_onednn else "float32 products as they are"
    if probe is not None:
        if not by_onednn:
            matmul += ", not by oneDNN"
        if is_as_before:
            matmul += ", as the checkpoint says"
        matmul += f" ({probe.speedup:.2f} times as fast, relative error {probe.error:.0e})"
    memory = "glibc keeps freed memory" if keeps_memory else "malloc as it is"
    threads = th.get_num_threads()
    return f"CPU tuning: {matmul}; {memory}; {threads} thread{'s' if threads > 1 else ''}"
