"""The learning comparison of bfloat16: its emulated products against PyTorch's own, and its table."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.learning import bf16
from benchmarks.learning.bf16_products import PRODUCTS, emulated_bf16_products
from sb3_mtrl import MTSAC, PaCoSAC
from sb3_mtrl.common.cpu_tuning import MatmulProbe
from sb3_mtrl.common.results import RunHistory
from tests.models import make_model, parameters_of

# Spacing of bfloat16, relative to a number: 8 significant bits
SPACING = 2.0**-7

needs_get_kernel = pytest.mark.skipif(not hasattr(th.library, "get_kernel"), reason="PyTorch before 2.9")

CASES = {
    "mm": (lambda a, b: a @ b, (64, 96), (96, 32)),
    "mm, transposed": (lambda a, b: a.t() @ b.t(), (96, 64), (32, 96)),
    "matmul": (th.matmul, (3, 64, 96), (96, 32)),
    "linear": (F.linear, (64, 96), (32, 96), (32,)),
    "linear, batched": (F.linear, (2, 64, 96), (32, 96), (32,)),
    "addmm": (lambda c, a, b: th.addmm(c, a, b, beta=0.5, alpha=2.0), (64, 32), (64, 96), (96, 32)),
    "bmm": (th.bmm, (3, 64, 96), (3, 96, 32)),
    "baddbmm": (th.baddbmm, (3, 1, 32), (3, 64, 96), (3, 96, 32)),
    "baddbmm, small": (th.baddbmm, (3, 1, 4), (3, 4, 5), (3, 5, 4)),
    "einsum": (lambda a, b: th.einsum("nbi,ntio->nbto", a, b), (2, 12, 16), (2, 3, 16, 8)),
}


def outputs_and_gradients(function, shapes, dtype):
    th.manual_seed(0)
    operands = [th.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    output = function(*operands)
    return [output.detach(), *th.autograd.grad(output, operands, th.randn(output.shape).to(dtype))]


@needs_get_kernel
@pytest.mark.parametrize("case", list(CASES))
def test_products_are_those_of_pytorch(case):
    """PyTorch's own kernels are the expected numbers: another order of the float32 sum may round to the neighbour at most."""
    function, *shapes = CASES[case]
    expected = outputs_and_gradients(function, shapes, th.bfloat16)
    with emulated_bf16_products() as counts:
        got = outputs_and_gradients(function, shapes, th.bfloat16)
    # The output, and the gradients of both factors
    assert sum(counts.values()) == 3
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == th.bfloat16
        th.testing.assert_close(one, other, rtol=SPACING, atol=1e-4)
        assert (one != other).float().mean() < 0.01


@needs_get_kernel
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("case", list(CASES))
def test_other_types_are_left_alone(case, dtype):
    function, *shapes = CASES[case]
    expected = outputs_and_gradients(function, shapes, dtype)
    with emulated_bf16_products() as counts:
        got = outputs_and_gradients(function, shapes, dtype)
    assert not any(counts.values())
    assert all(th.equal(one, other) for one, other in zip(got, expected, strict=True))


@needs_get_kernel
def test_it_ends_with_an_exception():
    a = th.randn(8, 8).bfloat16()
    with pytest.raises(RuntimeError, match="in a training"), emulated_bf16_products() as counts:
        a @ a
        raise RuntimeError("in a training")
    a @ a
    assert counts["mm"] == 1


class CountProducts(TorchDispatchMode):
    """Counts whatever PyTorch computes of two tensors in bfloat16, unless entry by entry, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        operands = [arg for arg in args if isinstance(arg, th.Tensor) and arg.dtype == th.bfloat16 and arg.dim() > 0]
        if len(operands) > 1 and th.Tag.pointwise not in function.tags:
            name = function.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return output


def change(algorithm, amp):
    """
    Makes a model, and then the change by three updates. Plain gradient descent: Adam's first steps would blow rounding errors
    up to full steps.
    """
    policy_kwargs = dict(net_arch=[64, 64], optimizer_class=th.optim.SGD)
    model = make_model(algorithm, collect=60, amp=amp, policy_kwargs=policy_kwargs)
    before = parameters_of(model)
    yield
    model.set_random_seed(1)
    model.train(3)
    after = parameters_of(model)
    yield th.cat([(after[name] - before[name]).flatten().double() for name in sorted(before)])


@needs_get_kernel
@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC])
def test_updates_are_those_of_pytorch(algorithm, monkeypatch):
    """Updates by PyTorch's own kernels are the expected ones; the scale is how far bfloat16 is from float32."""
    monkeypatch.setattr("sb3_mtrl.mtsac.mtsac.bfloat16_probe", lambda: MatmulProbe(1.0, 2e-3))  # which takes seconds
    in_float32, by_pytorch, emulated = (change(algorithm, amp) for amp in ("none", "bf16", "bf16"))
    for model in (in_float32, by_pytorch, emulated):
        next(model)
    exact, expected = next(in_float32), next(by_pytorch)
    with emulated_bf16_products() as counts, CountProducts() as all_products:
        got = next(emulated)
    assert (got - expected).norm() < 0.2 * (exact - expected).norm()
    # Each product is emulated, in the backward passes, too
    assert {name: n for name, n in counts.items() if n} == all_products.counts
    assert set(all_products.counts) <= set(PRODUCTS)


def history(method: str, seed: int, success: list[float], returns: list[float]) -> RunHistory:
    """Two tasks at two evaluations; the second task has half of the first's scores."""
    shares = np.array([1.0, 0.5])
    return RunHistory(
        method, bf16.ENV_ID, seed, ("a", "b"), np.array([8, 16]), np.outer(success, shares), np.outer(returns, shares)
    )


HISTORIES = [
    history("MTSAC, float32", 0, [0.0, 0.4], [0.0, 400.0]),
    history("MTSAC, bfloat16 emulated", 0, [0.4, 0.8], [0.0, 800.0]),
    history("MTSAC, float32", 1, [0.0, 0.8], [0.0, 1200.0]),
    history("MTSAC, bfloat16 emulated", 1, [0.0, 0.8], [0.0, 800.0]),
    history("PaCoSAC, float32", 0, [0.0, 1.0], [0.0, 100.0]),
]


def test_differences():
    """By hand: the mean of a run is 3 / 8 of the sum of its two numbers, and two runs of one seed are compared."""
    by_seed, spread = bf16.differences(HISTORIES, "success")["MTSAC"]
    assert by_seed == pytest.approx([0.3, 0.0]) and spread == pytest.approx(0.15)
    by_seed, spread = bf16.differences(HISTORIES, "return")["MTSAC"]
    assert by_seed == pytest.approx([150.0, -150.0]) and spread == pytest.approx(300.0)
    by_seed, spread = bf16.differences(HISTORIES, "success")["PaCoSAC"]
    assert by_seed == [] and np.isnan(spread)


def test_only_missing_runs_are_made(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    made = []

    def train(algorithm, arm, seed, steps, n_eval_episodes_per_task):
        made.append((algorithm, arm, seed))
        return next(run for run in HISTORIES if (run.method, run.seed) == (f"{algorithm}, {arm}", seed))

    monkeypatch.setattr(bf16, "train", train)
    monkeypatch.setattr(bf16, "arms_here", lambda: ("float32", "bfloat16 emulated"))
    monkeypatch.setattr(bf16, "N_EVALUATIONS", 2)
    results = tmp_path / "bf16.csv"
    arguments = ["--results", str(results), "--algorithms", "MTSAC", "--steps", "16", "--seeds"]
    bf16.main([*arguments, "1"])
    bf16.main([*arguments, "2"])
    assert made == [("MTSAC", arm, seed) for seed in (0, 1) for arm in ("float32", "bfloat16 emulated")]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    bf16.main([*arguments, "2", "--plot-only"])
    table = capsys.readouterr().out
    # The last evaluation of seeds 0 and 1, 3 / 4 of 0.4 and 0.8
    assert "MTSAC, float32 (2 seeds)" in table and "45% [30%, 60%]" in table
    assert "MTSAC, success: bfloat16 minus float32, by seed +30%, +0%; seeds of one arm: up to 15% apart" in table
    assert len(made) == 4

    table = results.read_text()
    for steps in ("24", "40000"):
        with pytest.raises(SystemExit):
            bf16.main([*arguments, "3", "--steps", steps])
        assert f"whose last evaluation is at step 16, got {steps}; --results OTHER.csv" in capsys.readouterr().err
    bf16.main([*arguments, "2", "--steps", "24", "--plot-only"])
    assert len(made) == 4 and results.read_text() == table


def test_the_table_in_the_repository_can_be_gone_on_with():
    """By the defaults: 40000 steps, eight evaluations."""
    histories = bf16.read_histories(bf16.RESULTS)
    assert histories
    for run in histories:
        assert run.timesteps.tolist() == bf16.evaluation_steps(40_000) == [5000 * n for n in range(1, 9)]


@pytest.mark.parametrize("algorithm", list(bf16.ALGORITHMS))
def test_training_has_the_hyperparameters_of_the_zoo(algorithm, monkeypatch):
    """Of ``hyperparams/*.yml``, read there by eye; a run of a few steps evaluates once."""
    monkeypatch.setattr(bf16, "N_EVALUATIONS", 1)
    made = []
    setup = MTSAC._setup_model
    monkeypatch.setattr(MTSAC, "_setup_model", lambda model: (made.append(model), setup(model)))
    run = bf16.train(algorithm, "float32", 0, 600, 1)
    (model,) = made
    assert (model.amp, model.batch_size, model.learning_rate, model.learning_starts) == ("none", 256, 1e-3, 1200)
    assert model.policy.net_arch == [128, 128]
    assert run.timesteps.tolist() == bf16.evaluation_steps(600) == [600] and run.method == f"{algorithm}, float32"
    assert run.scores("return").shape == (1, 4)
