"""What `cpu_tuning` sets of the process, and that it is set back."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch as th

from sb3_mtrl import MTSAC
from sb3_mtrl.common import cpu_tuning
from sb3_mtrl.common.cpu_tuning import (
    MatmulProbe,
    fast_matmul,
    keep_freed_memory,
    learner_threads,
    onednn_probe,
    probe_matmul,
    tuning_line,
)
from tests.models import ALGORITHMS, make_model, parameters_of

GOOD_PROBE = MatmulProbe(speedup=2.0, error=3e-7)

needs_switch = pytest.mark.skipif(cpu_tuning._matmul_backend() is None, reason="PyTorch before 2.9 or without oneDNN")


@pytest.fixture
def onednn_is_good(monkeypatch):
    monkeypatch.setattr(cpu_tuning, "onednn_probe", lambda: GOOD_PROBE)


@pytest.fixture
def own_threads(monkeypatch):
    """Four threads as if PyTorch had chosen them, on four cores; the real number afterwards."""
    before = th.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_tuning, "available_cores", lambda: 4)
    monkeypatch.setattr(cpu_tuning, "_THREADS_AT_IMPORT", 4)
    th.set_num_threads(4)
    yield
    th.set_num_threads(before)


def precision() -> str:
    return th.backends.mkldnn.matmul.fp32_precision


# ---------------------------------------------------------------------- products


def slowly(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    time.sleep(0.3)  # much longer than a product takes on a busy machine
    return a @ b


def in_bfloat16(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return a.bfloat16().float() @ b.bfloat16().float()


def test_probe_takes_a_faster_exact_path():
    probe = probe_matmul(slowly, th.matmul, rounds=2)
    assert probe.is_exact and probe.is_worth_it and probe.speedup > 1.5


def test_probe_rejects_an_inexact_path():
    # bfloat16 has 8 significant bits: rounding errors of 2^-9 at most, 2^-9 / sqrt(3) on average, in both factors
    probe = probe_matmul(slowly, in_bfloat16, rounds=2)
    assert 5e-4 < probe.error < 4e-3
    assert probe.speedup > 1.5 and not probe.is_worth_it


def test_probe_rejects_a_slower_path():
    probe = probe_matmul(th.matmul, slowly, rounds=2)
    assert probe.is_exact and probe.speedup < 1 and not probe.is_worth_it


def test_probe_rejects_a_path_that_gains_too_little_or_is_not_finite():
    assert not MatmulProbe(speedup=1.1, error=3e-7).is_worth_it
    assert not MatmulProbe(speedup=2.0, error=float("nan")).is_worth_it


def test_probe_is_made_once_and_leaves_the_generator_alone():
    th.manual_seed(0)
    expected = th.rand(3)
    th.manual_seed(0)
    onednn_probe.cache_clear()
    first = onednn_probe()
    assert onednn_probe() is first
    assert th.equal(th.rand(3), expected)


@needs_switch
def test_products_are_switched_inside_only(onednn_is_good):
    before = precision()
    with fast_matmul():
        assert precision() == "bf16"
    assert precision() == before
    with pytest.raises(RuntimeError, match="out"), fast_matmul():
        raise RuntimeError("out")
    assert precision() == before


@needs_switch
@pytest.mark.parametrize("probe", [None, MatmulProbe(2.0, 2e-3), MatmulProbe(1.0, 3e-7)])
def test_products_stay_where_the_probe_says_so(monkeypatch, probe):
    monkeypatch.setattr(cpu_tuning, "onednn_probe", lambda: probe)
    before = precision()
    with fast_matmul():
        assert precision() == before


@needs_switch
def test_the_users_own_choice_stays(onednn_is_good):
    before = precision()
    th.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        with fast_matmul():
            assert precision() == "tf32"
    finally:
        th.backends.mkldnn.matmul.fp32_precision = before


@needs_switch
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_switches_and_restores(monkeypatch, onednn_is_good, algorithm):
    seen = []

    def remember(update):
        return lambda *args: (seen.append(precision()), update(*args))[1]

    before = precision()
    for tunes in (True, False):
        model = make_model(algorithm, collect=60, cpu_tuning=tunes)
        for name in ("_joint_update", "_sequential_update"):
            monkeypatch.setattr(model, name, remember(getattr(model, name)))
        model.train(2)
    assert seen == ["bf16", "bf16", before, before]
    assert precision() == before

    def fail(*args):
        raise RuntimeError("in the update")

    model.cpu_tuning = True
    for name in ("_joint_update", "_sequential_update"):
        monkeypatch.setattr(model, name, fail)
    with pytest.raises(RuntimeError, match="in the update"):
        model.train(1)
    assert precision() == before


@needs_switch
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_update_is_the_same(onednn_is_good, algorithm):
    """Only if this CPU's oneDNN computes in float32 (no AMX), which the real probe knows, and computes at all."""
    onednn_probe.cache_clear()
    if not onednn_probe().is_exact:
        pytest.skip("this CPU's oneDNN rounds")
    batch, weights = th.rand(240, 64), th.rand(64, 64)
    with fast_matmul():
        switched = batch @ weights
    if th.equal(switched, batch @ weights):
        pytest.skip("the switch changes no bit of a product on this CPU (oneDNN needs AVX-512 for it): nothing to compare")
    parameters = []
    for tunes in (True, False):
        model = make_model(algorithm, collect=60, cpu_tuning=tunes, batch_size=240, policy_kwargs=dict(net_arch=[64, 64]))
        th.manual_seed(1)
        model.train(3)
        parameters.append(parameters_of(model))
    tuned, plain = parameters
    for name, value in plain.items():
        th.testing.assert_close(tuned[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ----------------------------------------------------------------------- threads


@pytest.mark.parametrize(["n_busy_workers", "expected"], [(0, 4), (1, 3), (3, 1), (4, 1), (50, 1)])
def test_threads_leave_cores_to_busy_workers(own_threads, n_busy_workers, expected):
    with learner_threads(n_busy_workers):
        assert th.get_num_threads() == expected
    assert th.get_num_threads() == 4


def test_threads_are_restored_after_an_exception(own_threads):
    with pytest.raises(RuntimeError, match="out"), learner_threads(3):
        raise RuntimeError("out")
    assert th.get_num_threads() == 4


def test_threads_that_the_user_chose_stay(own_threads, monkeypatch):
    th.set_num_threads(3)
    with learner_threads(3):
        assert th.get_num_threads() == 3
    th.set_num_threads(4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "4")
            with learner_threads(3):
                assert th.get_num_threads() == 4


def test_threads_chosen_during_training_stay(own_threads):
    with learner_threads(3):
        th.set_num_threads(2)
    assert th.get_num_threads() == 2


# ------------------------------------------------------------------------ memory

PAGE_FAULTS = """
import resource, sys
import numpy as np
from sb3_mtrl.common.cpu_tuning import keep_freed_memory

if sys.argv[1] == "keep before 2.35":
    import ctypes
    from types import SimpleNamespace
    mallopt = ctypes.CDLL(None).mallopt
    refusing = lambda option, value: 0 if option == -3 and value > 1 << 25 else mallopt(option, value)
    ctypes.CDLL = lambda name: SimpleNamespace(mallopt=refusing)
if sys.argv[1].startswith("keep"):
    assert keep_freed_memory()
    assert keep_freed_memory()
for repeat in range(12):
    if repeat == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(1 << 21) for _ in range(2)]  # 16 MiB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run_python(code: str, *args: str, **env: str) -> str:
    environment = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(cpu_tuning.platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_kept():
    # 10 repeats of 32 MiB are 81,920 pages of 4 KiB (160 of 2 MiB), faulted in again if the memory was given back; with a
    # fixed threshold, because glibc's own adapts to the first blocks freed
    kept = int(run_python(PAGE_FAULTS, "keep"))
    kept_by_old_glibc = int(run_python(PAGE_FAULTS, "keep before 2.35"))
    given_back = int(run_python(PAGE_FAULTS, "plain", MALLOC_MMAP_THRESHOLD_="131072"))
    assert max(kept, kept_by_old_glibc) < 100 < given_back


@pytest.mark.parametrize(
    ["largest_threshold", "expected"],
    [
        (1 << 30, [(-3, 1 << 28), (-1, (1 << 31) - 1), (-2, 1 << 26)]),
        # HEAP_MAX_SIZE / 2 in glibc's malloc.c before 2.35
        (1 << 25, [(-3, 1 << 28), (-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 26)]),
        # The others alone would end glibc's own adaptation of the threshold
        (0, [(-3, 1 << 28), (-3, 1 << 25)]),
    ],
)
def test_a_threshold_that_glibc_takes(monkeypatch, largest_threshold, expected):
    calls = []

    def mallopt(option: int, value: int) -> int:
        calls.append((option, value))
        return int(option != -3 or value <= largest_threshold)

    monkeypatch.setattr(cpu_tuning.platform, "libc_ver", lambda: ("glibc", "2.31"))
    for name in ("GLIBC_TUNABLES", *(name for *_, name in cpu_tuning._MALLOC_OPTIONS)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu_tuning.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory.__wrapped__() is (largest_threshold > 0)
    assert calls == expected


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}], ids=["env", "tunables"]
)
def test_memory_settings_of_the_user_stay(setting):
    code = "from sb3_mtrl.common.cpu_tuning import keep_freed_memory; print(keep_freed_memory())"
    assert run_python(code, **setting) == "False"


# ------------------------------------------------------------------- as a whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_false_leaves_the_process_alone(monkeypatch, algorithm):
    def forbidden(*args, **kwargs):
        raise AssertionError("cpu_tuning=False touched the process")

    for name in ("keep_freed_memory", "onednn_probe", "learner_threads", "_onednn_matmul"):
        monkeypatch.setattr(cpu_tuning, name, forbidden)
    threads = th.get_num_threads()
    model = make_model(algorithm, cpu_tuning=False, learning_starts=10, verbose=1)
    model.learn(60)
    assert model._n_updates > 0
    assert th.get_num_threads() == threads


def test_learning_says_what_is_set_in_one_line(capsys):
    make_model(verbose=1, learning_starts=10).learn(30)
    assert capsys.readouterr().out.count("CPU tuning: ") == 1
    make_model(verbose=1, learning_starts=10, cpu_tuning=False).learn(30)
    make_model(verbose=0, learning_starts=10).learn(30)
    assert "CPU tuning: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ["probe", "by_onednn", "is_as_before", "keeps_memory", "parts"],
    [
        (GOOD_PROBE, True, False, True, ["by oneDNN (2.00 times as fast, relative error 3e-07)", "glibc keeps"]),
        (MatmulProbe(2.0, 2e-3), False, False, False, ["not by oneDNN (2.00 times as fast, relative", "malloc as it is"]),
        (MatmulProbe(1.0, 3e-7), True, True, True, ["products by oneDNN, as the checkpoint says (1.00 times"]),
        (GOOD_PROBE, False, True, True, ["as they are, not by oneDNN, as the checkpoint says (2.00 times"]),
        (None, False, False, False, ["float32 products as they are;"]),
    ],
)
def test_line(probe, by_onednn, is_as_before, keeps_memory, parts):
    line = tuning_line(probe, by_onednn, is_as_before, keeps_memory)
    assert all(part in line for part in parts) and "\n" not in line
    assert f"{th.get_num_threads()} thread" in line


def test_cpu_tuning_is_saved(tmp_path):
    make_model(cpu_tuning=False).save(tmp_path / "model")
    assert MTSAC.load(tmp_path / "model").cpu_tuning is False
