"""The speed measurements: how they time, and what they make of it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch as th
from torch.profiler import record_function

from benchmarks.speed import gpu, peers, prioritized, run, simulator
from benchmarks.speed.bare import BareMTSAC, MatrixProducts
from benchmarks.speed.measure import Program, machine_line, print_table, summarize, time_in_turns
from sb3_mtrl.mtsac.policies import sample_squashed_gaussian
from sb3_mtrl.zoo.algorithms import ALGORITHMS


class Clock:
    """A clock that variants wind forward."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_variants_take_turns_in_rotating_order():
    clock, calls = Clock(), []

    def variant(name: str, seconds: float):
        calls.append(name)
        clock.now += seconds

    variants = {"a": lambda: variant("a", 2.0), "b": lambda: variant("b", 0.5), "c": lambda: variant("c", 1.0)}
    seconds = time_in_turns(variants, rounds=4, clock=clock)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # one warm-up, then four rounds
    assert {name: values.tolist() for name, values in seconds.items()} == {"a": [2.0] * 4, "b": [0.5] * 4, "c": [1.0] * 4}


def test_a_time_limit_ends_after_three_rounds_at_the_earliest():
    assert len(time_in_turns({"a": lambda: None}, rounds=9, seconds_at_most=0.0)["a"]) == 3
    assert len(time_in_turns({"a": lambda: None}, rounds=2, seconds_at_most=0.0)["a"]) == 2


def test_ratios_are_taken_round_by_round():
    # Both slow down threefold in the last round, as they do when another program runs; by hand: 4/2, 4/1, 12/3 -> median 4
    seconds = {"reference": np.array([4.0, 4.0, 12.0]), "fast": np.array([2.0, 1.0, 3.0])}
    table = summarize(seconds)
    assert table["fast"]["speed_ratio"] == pytest.approx(4.0)
    assert table["fast"]["ratio_quartiles"] == pytest.approx([3.0, 4.0])
    assert table["fast"]["median_ms"] == pytest.approx(2000.0)
    assert table["reference"]["speed_ratio"] == pytest.approx(1.0)
    # A call of the fast one did two units: half the time each, twice the ratio
    assert summarize(seconds, {"reference": 1, "fast": 2})["fast"]["speed_ratio"] == pytest.approx(8.0)
    assert summarize(seconds, reference="fast")["reference"]["speed_ratio"] == pytest.approx(0.25)


def test_table_names_what_was_skipped(capsys):
    table = summarize({"plain": np.array([0.5, 0.5])})
    table["other"] = {"skipped": "not installed"}
    assert print_table("title", table) is table
    title, _, plain, other = capsys.readouterr().out.splitlines()[1:]
    assert title == "title"
    assert plain.split()[:2] == ["plain", "500.000"]
    assert other.split() == ["other", "skipped:", "not", "installed"]


def test_machine_line_names_the_versions():
    assert f"numpy {np.__version__}" in machine_line()


SERVER = """
import sys
from benchmarks.speed.measure import serve

def fail():
    raise ValueError("out of order")

clock = iter(range(9)).__next__
serve({"own": lambda: (print("chatter"), 0.25)[1], "clocked": clock, "fail": fail}, clock)
"""


def test_a_program_times_itself_and_says_why_it_ended():
    program = Program([sys.executable, "-c", SERVER])
    try:
        # `time_in_turns` takes the seconds that the variant returns
        seconds = time_in_turns({"own": lambda: program.call("own")}, rounds=2)
        assert seconds["own"].tolist() == [0.25, 0.25]
        # The clock says 3 and 5 around the call, which looks at it, too (`own` looked three times before)
        assert program.call("clocked") == 2.0
        with pytest.raises(RuntimeError, match=r"ended with code 1: .*ValueError: out of order"):
            program.call("fail")
    finally:
        program.close()


def test_learners_are_compared_with_the_first_one():
    def learner(algorithm: str, **kwargs) -> dict:
        return dict(algorithm=algorithm, num_tasks=2, batch_size=8, n_updates=1, kwargs=kwargs)

    learners = run.Learners(rounds=1, seconds=60.0, n_cores=None, clock="process_time")
    table = learners.compare(
        "title", [{"SB3 SAC": learner("sb3")}, {"bare": learner("bare"), "MTSAC": learner("mtsac", cpu_tuning=False)}], units=1
    )
    assert list(table) == ["SB3 SAC", "bare", "MTSAC"]
    assert table["SB3 SAC"]["speed_ratio"] == 1.0 and all(row["median_ms"] > 0 for row in table.values())


class Answering:
    """A program whose variants take the times of a list, one after the other."""

    times: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, command, n_cores=None):
        self.times = {name: list(values) for name, values in Answering.times.items()}

    def call(self, name: str) -> float:
        return self.times[name].pop(0)

    def close(self):
        pass


def test_learners_are_compared_round_by_round(monkeypatch):
    monkeypatch.setattr(run, "Program", Answering)
    # The first call warms up. Everything takes three times as long in the second round
    times = {
        "SB3, a": [9.0, 6.0, 18.0, 6.0],
        "SB3, b": [9.0, 4.0, 12.0, 4.0],
        "MTSAC": [9.0, 2.0, 6.0, 2.0],
        "X": [9.0, 8.0, 24.0, 6.0],
    }
    monkeypatch.setattr(Answering, "times", times)
    programs = [{"SB3, a": {}, "SB3, b": {}}, {"MTSAC": {}, "X": {}}]
    learners = run.Learners(3, 100.0, None, "perf_counter")
    table = learners.compare("title", programs, 1, skipped={"Y": {"skipped": "why"}}, cost_in="MTSAC")
    assert table["SB3, b"]["speed_ratio"] == 1  # the faster of SB3's
    assert table["MTSAC"]["speed_ratio"] == 2
    assert table["X"]["cost"] == 4 and table["X"]["cost_quartiles"] == [3.5, 4]  # of 8 / 2, 24 / 6, 6 / 2
    assert table["Y"] == {"skipped": "why"}


def test_every_algorithm_of_the_zoo_is_measured(monkeypatch):
    seen = {}

    def compare(self, title, programs, units, sbx=None, skipped=None, cost_in=None):
        seen.update({name: learner for learners in programs for name, learner in learners.items()})
        return {name: {"speed_ratio": 1.0} for name in seen}

    monkeypatch.setattr(run.Learners, "compare", compare)
    run.Learners(1, 1.0, None, "perf_counter").updates(num_tasks=2, batch_size=8, n_updates=1)
    assert set(ALGORITHMS) <= {learner["algorithm"] for learner in seen.values()}


def test_matrix_products_of_an_update():
    products = MatrixProducts(obs_dim=39, action_dim=4, num_tasks=10, batch_size=1280, net_arch=(400, 400, 400))
    # By hand, multiplications of a row: actor 49-400-400-400-8, two critics 53-400-400-400-1
    actor, actor_first = 49 * 400 + 2 * 400 * 400 + 400 * 8, 49 * 400
    critics, critics_first = 2 * (53 * 400 + 2 * 400 * 400 + 400), 2 * 53 * 400
    forward, to_weights = 2 * actor + 3 * critics, actor + critics
    to_inputs = (actor - actor_first) + (2 * critics - critics_first)
    assert products.flop == 2 * 1280 * (forward + to_weights + to_inputs)
    products.update()
    left, right, result = products.products[-1]
    np.testing.assert_allclose(result.numpy(), (left @ right).numpy(), rtol=1e-5)


def test_the_bare_loop_learns():
    """Its critics come to the value of a reward of 1 for one step: the targets are 1 where all rows are the last."""
    th.manual_seed(0)
    loop = BareMTSAC(obs_dim=3, action_dim=2, num_tasks=2, batch_size=64, net_arch=(32,))
    loop.rows[..., -2:] = 1.0  # reward, done
    loop.critic_optimizer.param_groups[0]["lr"] = 3e-3
    for _ in range(600):
        loop.update()
    values = loop.critics(th.cat([th.zeros(64, 3), loop.one_hot], dim=1), th.zeros(64, 2))
    th.testing.assert_close(values, th.ones(2, 64, 1), rtol=0, atol=0.1)


def test_the_bare_loop_samples_as_mtsac_does():
    loop = BareMTSAC(obs_dim=3, action_dim=2, num_tasks=2, batch_size=8, net_arch=(16,))
    obs = th.randn(8, 5)
    th.manual_seed(1)
    actions, log_prob = loop.sample_actions(obs)
    th.manual_seed(1)
    mean, log_std = loop.actor(obs).chunk(2, dim=1)
    expected_actions, expected_log_prob = sample_squashed_gaussian(mean, log_std.clamp(-20, 2))
    th.testing.assert_close(actions, expected_actions)
    th.testing.assert_close(log_prob.squeeze(1), expected_log_prob)


def test_results_are_written(monkeypatch, tmp_path, capsys):
    output = tmp_path / "results.json"
    monkeypatch.setattr(run, "measure_replay", lambda rounds: {"rows": rounds})
    for rounds in (2, 3):
        monkeypatch.setattr(sys, "argv", ["run", "--only", "replay", "--rounds", str(rounds), "--output", str(output)])
        run.main()
        results = json.loads(output.read_text())
        assert results["replay"] == {"rows": rounds} and results["conditions"]["replay"]["rounds_at_most"] == rounds
        assert set(results) == {"conditions", "replay"}
    # Other sections stay, and so does what they were measured under
    monkeypatch.setattr(run, "measure_memory", lambda: {"megabytes": 1})
    monkeypatch.setattr(sys, "argv", ["run", "--only", "memory", "--rounds", "4", "--output", str(output)])
    run.main()
    results = json.loads(output.read_text())
    assert results["replay"] == {"rows": 3} and results["memory"] == {"megabytes": 1}
    assert {name: values["rounds_at_most"] for name, values in results["conditions"].items()} == {"replay": 3, "memory": 4}
    monkeypatch.setattr(sys, "argv", ["run", "--only", "nothing"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--only must name sections of update, " in capsys.readouterr().err


@pytest.mark.parametrize("only", [[], ["--only", "update", "loop_of_small_networks"]])
def test_cpu_time_of_one_process_is_refused_for_whole_trainings(only, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.Learners, "compare", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["run", "--clock", "process_time", *only, "--output", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit):
        run.main()
    error = " ".join(capsys.readouterr().err.split())
    got = "loop_of_small_networks" if only else "loop, loop_of_small_networks"
    assert f"--only must leave out loop, loop_of_small_networks, got {got}" in error


def test_memory_counts_what_rows_take():
    # A million rows of float32. SB3's: twice 39 numbers and T tasks, 4 actions, reward, done and time limit (with one task 87
    # numbers); ours leave the tasks out, which belong to the ring of a row
    assert run.replay_megabytes(1, 10**6)["ReplayBuffer T=1"] == pytest.approx(4 * (2 * (39 + 1) + 4 + 3))
    for num_tasks in (1, 10):
        megabytes = run.replay_megabytes(num_tasks, 10**6)[f"MultiTaskReplayBuffer T={num_tasks}"]
        assert megabytes == pytest.approx(4 * (2 * 39 + 4 + 2), rel=0.01)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"speed_ratio": 2.0, "ratio_quartiles": [1.5, 2.5]}
    conditions = {"update": {"machine": "a machine"}, "loop": {"machine": "another"}}
    reference = {"speed_ratio": 1.0, "ratio_quartiles": [1.0, 1.0]}
    tables = {"update": {"a": reference, "b": {"skipped": "why"}}, "loop": {"c": row, "d": reference}}
    run.plot({"conditions": conditions, **tables}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ---------------------------------------------------------------- other libraries


def test_a_library_that_cannot_be_installed_is_skipped_with_the_reason(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "pip", stderr="Collecting envpool\nERROR: no matching distribution\n")

    monkeypatch.setattr(peers, "CACHE", tmp_path)
    monkeypatch.setattr(peers.venv, "create", fail)
    reason = "envpool>=1.2 cannot be installed: ERROR: no matching distribution"
    with simulator.start_envpool() as envpool:
        assert envpool == reason
        table = simulator.report_with_envpool("steps", {"ours": lambda: None}, 2, 1, envpool, "step")
    assert table["EnvPool"] == {"skipped": reason}
    assert table["ours"]["rounds"] == 2
    assert f"skipped: {reason}" in capsys.readouterr().out


def test_resets_to_new_goals_are_simulated(monkeypatch):
    from sb3_mtrl.envs.fast_metaworld import FastSawyerMixin

    simulated = []
    reset_from_scratch = FastSawyerMixin._reset_from_scratch
    monkeypatch.setattr(
        FastSawyerMixin, "_reset_from_scratch", lambda self: simulated.append(self) or reset_from_scratch(self)
    )
    monkeypatch.setattr(simulator, "TASKS", ("reach-v3",))
    table = simulator.measure_resets(3, "not wanted")
    assert [name for name, row in table.items() if "skipped" not in row] == ["fast=False", "fast=True", "fast=True, new goal"]
    # Once to the goal that is visited again and again; else in make_envs, in the untimed call and in three rounds
    assert sorted(simulated.count(env) for env in set(simulated)) == [1, 5]


@pytest.mark.skipif(th.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_measurements_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "benchmarks.speed.gpu needs a GPU, and PyTorch finds no CUDA device\n"


def test_gpu_measurements_run_on_a_cpu(monkeypatch, tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--algorithms", "mtsac", "--output", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert gpu.main() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    equality = results["equality"]["mtsac"]
    assert list(equality) == ["host replay", "resident replay", "two kinds of update"]
    for row in equality.values():
        assert row["max_difference"] <= 1e-6 < row["max_change"] and row["is_equal"]
    assert [row["n_updates"] for row in equality.values()] == [5, 5, 4]
    rows = results["updates"]["T=2 B=8"]["mtsac"]
    assert list(rows) == ["eager", "graph", "graph, resident replay"]
    assert all(row["kernels"] > 100 and row["updates_per_second"] > 0 for row in rows.values())
    assert "GFLOP" in capsys.readouterr().out


def test_gpu_measurements_go_on_behind_an_algorithm_that_fails(monkeypatch, tmp_path, capsys):
    """One raises in the middle, one is not equal: what there is by then is written each time, and the exit code is 1."""
    path, written = tmp_path / "results.json", []

    def compare(self, algorithm, case):
        written.append(path.exists())
        share = 0.5 if algorithm == "pacosac" and case == "resident replay" else 0.0
        return {"n_updates": 1, "max_difference": share, "max_change": 1.0, "share_of_change": share, "is_equal": share == 0}

    def measure(self, algorithm, num_tasks, batch_size):
        if algorithm == "mtsac":
            raise RuntimeError("no memory")
        return {"eager": {}}

    monkeypatch.setattr(gpu.gc, "collect", lambda: None)  # of all tests, it takes its time
    monkeypatch.setattr(gpu.Measurement, "compare", compare)
    monkeypatch.setattr(gpu.Measurement, "measure", measure)
    algorithms = ["mtsac", "pacosac", "starssac"]
    arguments = ["--device", "cpu", "--tiny", "--algorithms", *algorithms, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert gpu.main() == 1
    results, output = json.loads(path.read_text()), capsys.readouterr()
    assert list(results["equality"]) == algorithms and list(results["updates"]["T=2 B=8"]) == ["pacosac", "starssac"]
    assert written == [False] * 3 + [True] * 6
    assert "failed: mtsac, pacosac\n" in output.err and "RuntimeError: no memory" in output.err
    assert output.out.count("NOT EQUAL") == 1


def test_updates_that_differ_are_noticed(monkeypatch):
    measurement = gpu.Measurement("cpu", tiny=True, rounds=1)
    make_model = measurement.make_model

    def with_other_updates(algorithm, num_tasks, batch_size, graph, resident, **kwargs):
        return make_model(algorithm, num_tasks, batch_size, graph, resident, tau=0.5 if graph else 0.005, **kwargs)

    monkeypatch.setattr(measurement, "make_model", with_other_updates)
    row = measurement.compare("mtsac", "host replay")
    assert row["share_of_change"] > gpu.TOLERANCE and not row["is_equal"]


def test_names_of_parts_are_no_kernels():
    model = gpu.Measurement("cpu", tiny=True, rounds=1).make_model("mtsac", 2, 8, graph=False, resident=False)
    counts = []
    for is_named in (False, True):

        def train(gradient_steps, is_named=is_named):
            with record_function("all of it") if is_named else nullcontext():
                th.zeros(2).add_(1)

        model.train = train
        counts.append(gpu.Measurement.count_kernels(SimpleNamespace(device="cpu", synchronize=lambda: None), model))
    assert counts[0] == counts[1] > 0


def test_operations_and_bytes_of_an_update():
    """By hand, for T = 2, 39 + 2 observed, 4 actions, one hidden layer of 8, batch 8, two critics."""
    measurement = gpu.Measurement("cpu", tiny=True, rounds=1)
    model = measurement.make_model("mtsac", 2, 8, graph=False, resident=False)
    actor, actor_first, critics, critics_first = 41 * 8 + 8 * 8, 41 * 8, 2 * (45 * 8 + 8), 2 * 45 * 8
    forward, to_weights = 2 * actor + 3 * critics, actor + critics
    to_inputs = (actor - actor_first) + (2 * critics - critics_first)
    assert gpu.count_flop(model) == 2 * 8 * (forward + to_weights + to_inputs)
    n_actor, n_critics = actor + 8 + 8, critics + 2 * (8 + 1)
    n_learned = n_actor + n_critics + 2  # two entropy coefficients
    assert gpu.count_bytes(model) == 4 * (10 * n_learned + 4 * n_critics + 8 * (2 * 39 + 4 + 2))


def test_replay_table_has_rows_for_both_buffers():
    table = prioritized.measure_replay(rounds=1, num_tasks=2, batch_size=8, rows_per_task=50, n_calls=1)
    names = {"sample, plain", "sample, prioritized", "update_priorities", "sample + update_priorities", "add, plain"}
    assert names <= set(table)
