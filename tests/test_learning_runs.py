"""The grid runner of ``benchmarks/learning``: commands, stop and resume, tables."""

import contextlib
import itertools
import json
import math
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from benchmarks.learning import gate_sharing, run
from benchmarks.learning.results import append_results, locked, read_results
from sb3_mtrl import PaCoSAC
from sb3_mtrl.common.evaluation import MultiTaskEvaluation, evaluate_multi_task_policy
from sb3_mtrl.common.results import read_progress, read_tidy_results
from sb3_mtrl.common.utils import constructor_arguments
from sb3_mtrl.evaluate import Protocol
from sb3_mtrl.zoo.algorithms import ALGORITHMS
from sb3_mtrl.zoo.utils import hyperparams_path

PRESET = {
    "env": "PointTasks-v0",
    "env_kwargs": {"num_tasks": 2, "horizon": 10},
    "gym_packages": ["tests.tiny_zoo_envs"],
    "steps": 240,
    "hyperparams": {
        "n_envs": 2, "learning_starts": 40, "buffer_size": 400, "batch_size": 16, "policy_kwargs": "dict(net_arch=[8])"
    },
    "methods": {"mtsac": {}, "paco_without_reset": {"algo": "pacosac", "hyperparams": {"w_reset": False, "n_param_sets": 2}}},
    "seeds": [1, 2],
    "eval_freq": 80,
    "eval_episodes": 2,
    "checkpoint_freq": 60,
}  # fmt: skip


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    path = tmp_path / "presets.yml"
    path.write_text(yaml.safe_dump({"tiny": PRESET}))
    return path


def arguments(presets: Path, *more: str) -> list[str]:
    folders = ["--folder", str(presets.parent / "logs"), "--results", str(presets.parent / "results")]
    return ["--preset", "tiny", "--presets", str(presets), *folders, *more]


def cell(presets: Path, method: str, seed: int = 1) -> run.Cell:
    return run.Cell("tiny", method, seed, PRESET, presets.parent / "logs")


def test_run_resumes_and_is_collected_once(presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paco = cell(presets, "paco_without_reset")
    main = arguments(presets, "--run", "paco_without_reset", "1")

    class StopAt(run.ResumeCheckpointCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 130:
                signal.raise_signal(signal.SIGTERM)
            return super()._on_step()

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    commits = iter(["first", "second"])
    software = run.describe_software()
    monkeypatch.setattr(run, "describe_software", lambda: {**software, "commit": next(commits)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ResumeCheckpointCallback", StopAt)
        run.main(main)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not paco.is_finished and paco.history().timesteps.tolist() == [80]
    checkpoint = run.find_checkpoint(paco.run_folder)
    assert json.loads((checkpoint / "state.json").read_text())["num_timesteps"] == 130
    model = PaCoSAC.load(checkpoint / "model.zip")
    model.load_replay_buffer(checkpoint / "replay_buffer.pkl")
    # 65 vector steps, of which those up to 40 time steps warm up; SB3 asks its callbacks before it stores and learns the step
    assert model.replay_buffer.size() == 2 * 64 and model._n_updates == 65 - 20 - 1

    run.main(main)
    assert paco.is_finished and run.find_checkpoint(paco.run_folder) is None
    # At the same steps as without the stop, and all but one of the updates
    assert paco.history().timesteps.tolist() == [80, 160, 240]
    assert {path.name for path in paco.run_folder.glob("progress*")} == {"progress.csv", "progress_130.csv"}
    final = PaCoSAC.load(paco.run_folder / "PointTasks-v0.zip")
    assert final.num_timesteps == 240 and final._n_updates == 120 - 20 - 1

    results = presets.parent / "results"
    for _ in range(2):
        run.main(arguments(presets, "--collect"))
    rows = read_results(results / "tiny.csv")
    assert [(row["step"], row["task"]) for row in rows] == [
        (str(step), task) for step in (80, 160, 240) for task in ("point-0", "point-1")
    ]
    assert {(row["method"], row["env"], row["seed"]) for row in rows} == {("paco_without_reset", "PointTasks-v0", "1")}
    with np.load(paco.run_folder / "evaluations.npz") as file:
        expected = file["task_mean_rewards"].ravel()
    np.testing.assert_allclose([float(row["return"]) for row in rows], expected, atol=1e-3)
    assert len(read_results(results / "tiny_final.csv")) == 2
    (summary,) = read_results(results / "tiny_runs.csv")
    assert summary["steps"] == "240" and summary["dropped_updates"] == "0" and int(summary["seconds"]) >= 0
    assert {name: summary[name] for name in run.SOFTWARE} == {**software, "commit": "first then second"}

    # A crash before the last of the three tables: the next one completes them
    tables = {path: path.read_text() for path in results.glob("*.csv")}
    (results / "tiny_runs.csv").unlink()
    (results / "tiny_final.csv").write_text("")
    assert run.collect([paco], results) == 1
    assert {path: path.read_text() for path in results.glob("*.csv")} == tables

    # Another process collects between the look at the tables and their lock
    @contextlib.contextmanager
    def locked_second(path: Path) -> Iterator[None]:
        run.locked = locked
        assert run.collect([paco], results) == 1
        with locked(path):
            yield

    for path in tables:
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "locked", locked_second)
        assert run.collect([paco], results) == 0
    assert {path: path.read_text() for path in results.glob("*.csv")} == tables


def test_a_killed_run_goes_on_from_its_checkpoint(presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 50, after the only checkpoint at 30, which is within the warm-up of 40."""
    settings = {**PRESET, "steps": 80, "eval_freq": 40, "checkpoint_freq": 30, "methods": {"pacosac": {}}}
    paco = run.Cell("tiny", "pacosac", 1, settings, presets.parent / "logs")
    run.import_packages(PRESET["gym_packages"])

    class Killed(run.ResumeCheckpointCallback):
        def _on_step(self) -> bool:
            goes_on = super()._on_step()
            counts = {20: (2, 3), 50: (7, 9)}.get(self.num_timesteps)
            if counts is not None:
                self.model.dropped_updates[0], self.model.w_reset_callback.resets[1] = counts
                self.model.dump_logs()
            if self.num_timesteps == 50:
                raise RuntimeError("killed")
            return goes_on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ResumeCheckpointCallback", Killed)
        patch.setattr(signal, "signal", lambda *_: None)  # no end of the training puts the handlers back
        with pytest.raises(RuntimeError, match="killed"):
            run.train(paco, "cpu")
    assert read_progress(paco.run_folder, run.COUNTS)[0].tolist() == [20, 40, 50]
    assert run.train(paco, "cpu")
    steps, columns = read_progress(paco.run_folder, run.COUNTS)
    assert steps.tolist() == [20, 40, 80]
    assert np.nanmax(columns["train/dropped_updates"]) == 2 and np.nanmax(columns["train/w_resets"]) == 3
    # One for each of 40 vector steps, but for the 20 of the warm-up
    assert PaCoSAC.load(paco.run_folder / "PointTasks-v0.zip")._n_updates == 20
    assert run.collect([paco], presets.parent / "results") == 1
    (summary,) = read_results(presets.parent / "results" / "tiny_runs.csv")
    assert (summary["dropped_updates"], summary["w_resets"]) == ("2", "3")


def test_rows_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    def steps_in_files() -> dict[str, list[str]]:
        return {path.name: path.read_text().split()[1:] for path in tmp_path.glob("*")}

    for begun_at, rows in {"": "10 30 50", "_20": "30 50 70", "_60": "70 90", "_80": "90"}.items():
        text = "\n".join(["time/total_timesteps", *rows.split()])
        (tmp_path / f"progress{begun_at}.csv").write_text(f"{text}\n")
    run.forget_lost_training(tmp_path, 60)
    assert steps_in_files() == {"progress.csv": ["10", "30", "50"], "progress_20.csv": ["30", "50"]}
    run.forget_lost_training(tmp_path, 30)
    assert steps_in_files() == {"progress.csv": ["10", "30"], "progress_20.csv": ["30"]}
    run.forget_lost_training(tmp_path, 0)
    assert not any(tmp_path.iterdir())


def test_the_last_count_counts(presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that lost training left, later ones and (by a run that began anew beside it) those at the same step."""
    item = cell(presets, "mtsac")
    finish(item)
    for name, rows in {"progress": "100,9\n240,7", "progress_0": "100,1\n240,3\n240,"}.items():
        (item.run_folder / f"{name}.csv").write_text(f"time/total_timesteps,train/w_resets\n{rows}\n")
    paths = [item.run_folder / f"progress{begun_at}.csv" for begun_at in ("_0", "")]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(paths))  # as some file systems list them
    assert run.collect([item], tmp_path / "results") == 1
    (row,) = read_results(tmp_path / "results" / "tiny_runs.csv")
    assert row["w_resets"] == "3"


class Model:
    """What a checkpoint asks of a model."""

    num_timesteps = 5

    def save(self, path: Path) -> None:
        path.write_text("model")

    def save_replay_buffer(self, path: Path) -> None:
        path.write_text("buffer")


def test_a_crash_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    class Crashing(Model):
        def save_replay_buffer(self, path: Path) -> None:
            raise OSError("disk full")

    assert run.find_checkpoint(tmp_path) is None
    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(Crashing(), tmp_path, 1.0, [])
    assert run.find_checkpoint(tmp_path) is None
    for _ in range(2):
        run.save_checkpoint(Model(), tmp_path, 1.0, [])
    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(Crashing(), tmp_path, 2.0, [])
    state = json.loads((run.find_checkpoint(tmp_path) / "state.json").read_text())
    assert state == {"num_timesteps": 5, "seconds": 1.0, "software": []}
    # Between the two moves
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert run.find_checkpoint(tmp_path) == tmp_path / "checkpoint.old"
    run.save_checkpoint(Model(), tmp_path, 3.0, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("first_moment", range(10))
def test_a_kill_at_any_moment_leaves_a_checkpoint(first_moment: int, tmp_path: Path) -> None:
    """
    Two processes in turn are killed before one of their operations on files (there are nine at most), or half through it if it
    removes a folder.
    """

    class Killed(BaseException):
        pass

    def kill_at(moment: int, patch: pytest.MonkeyPatch) -> None:
        operations = itertools.count()

        def killing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Path, *args: Any, **kwargs: Any) -> Any:
                if next(operations) == moment:
                    if function is shutil.rmtree and path.exists():
                        next(path.iterdir()).unlink()
                    raise Killed
                return function(path, *args, **kwargs)

            return call

        for owner, name in ((shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text"), (Path, "rename")):
            patch.setattr(owner, name, killing(getattr(owner, name)))

    def save(folder: Path, step: int) -> None:
        model = Model()
        model.num_timesteps = step
        run.save_checkpoint(model, folder, 0.0, [])

    def saved_step(folder: Path) -> int:
        checkpoint = run.find_checkpoint(folder)
        assert sorted(path.name for path in checkpoint.iterdir()) == ["model.zip", "replay_buffer.pkl", "state.json"]
        return json.loads((checkpoint / "state.json").read_text())["num_timesteps"]

    for second_moment in range(10):
        folder = tmp_path / str(second_moment)
        save(folder, 1)
        before = 1
        for step, moment in ((2, first_moment), (3, second_moment)):
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                kill_at(moment, patch)
                save(folder, step)
            assert saved_step(folder) in (before, step)
            before = saved_step(folder)
        save(folder, 4)
        assert saved_step(folder) == 4 and [path.name for path in folder.iterdir()] == ["checkpoint"]


def test_a_file_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "finished.json"
    write_text = Path.write_text

    def write_half(self: Path, text: str) -> int:
        write_text(self, text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        run.write_whole(path, "whole")
    assert not path.exists()
    monkeypatch.undo()
    run.write_whole(path, "whole")
    assert path.read_text() == "whole" and [*tmp_path.iterdir()] == [path]


def finish(item: run.Cell, **more: Any) -> None:
    """Leave behind what a finished training does."""
    item.run_folder.mkdir(parents=True)
    (item.run_folder / "progress.csv").write_text("time/total_timesteps,train/w_resets\n240,3\n")
    np.savez(
        item.run_folder / "evaluations.npz",
        timesteps=[240], task_names=["point-0"], task_mean_rewards=[[1.0]], task_success_rates=[[0.5]], task_ids=[0, 0],
        results=[[1.0, 1.0]],
    )  # fmt: skip
    final = {"tasks": {"point-0": {"success_rate": 0.5, "mean_reward": 1.0}}}
    (item.run_folder / "finished.json").write_text(json.dumps({"steps": 240, "seconds": 7, "final": final, **more}))


def test_what_an_evaluation_does_not_know(presets: Path, tmp_path: Path) -> None:
    item = cell(presets, "mtsac")
    rows = {"point-0": {"success_rate": None, "mean_reward": 1.5}, "point-1": {"success_rate": None, "mean_reward": None}}
    finish(item, final={"tasks": rows})
    assert run.collect([item], tmp_path / "results") == 1
    table = tmp_path / "results" / "tiny_final.csv"
    assert [(row["success"], row["return"]) for row in read_results(table)] == [("nan", "1.5"), ("nan", "nan")]
    (history,) = read_tidy_results(table)
    assert not history.has_success and history.mean_returns[0, 0] == 1.5 and math.isnan(history.mean_returns[0, 1])


def test_a_finished_run_is_not_trained_again(
    presets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []
    monkeypatch.setattr(run, "train", lambda item, device: trained.append(item.method))
    finished = cell(presets, "mtsac")
    finish(finished)
    run.main(arguments(presets, "--run", "mtsac", "1"))
    assert not trained and f"{finished.run_folder} is finished: nothing to do" in capsys.readouterr().err
    run.main(arguments(presets, "--run", "mtsac", "2"))
    assert trained == ["mtsac"]


@pytest.mark.parametrize(
    "sittings, expected",
    [
        (None, ("", "")),  # of before it was kept
        ([], ("", "")),
        ([("", "2.0")], ("", "2.0")),  # no repository
        ([("a", "2.0"), ("a", "2.0")], ("a", "2.0")),
        ([("", ""), ("a+changes", "2.1")], ("unknown then a+changes", "unknown then 2.1")),
    ],
)
def test_software_in_the_table(
    sittings: list[tuple[str, str]] | None, expected: tuple[str, str], presets: Path, tmp_path: Path
) -> None:
    item = cell(presets, "mtsac")
    named = [{"commit": commit, "torch": torch, "metaworld": "", "sb3_mtrl": ""} for commit, torch in sittings or []]
    finish(item, **({} if sittings is None else {"software": named}))
    assert run.collect([item], tmp_path / "results") == 1
    (row,) = read_results(tmp_path / "results" / "tiny_runs.csv")
    assert (row["commit"], row["torch"]) == expected and row["w_resets"] == "3"


def test_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sb3_mtrl" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(run.sb3_mtrl, "__file__", str(package))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert run.describe_software()["commit"] == ""
    git("init")
    (tmp_path / "README").touch()
    git("add", "README")
    git("commit", "-m", "something else")
    assert run.describe_software()["commit"] == ""  # the repository of something else
    git("add", ".")
    git("commit", "-m", "the package")
    commit = git("rev-parse", "HEAD")[:10]
    assert run.describe_software()["commit"] == commit
    (tmp_path / "table.csv").touch()  # a run writes such files, they are no code
    assert run.describe_software()["commit"] == commit
    package.write_text("changed")
    assert run.describe_software()["commit"] == f"{commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert run.describe_software()["commit"] == ""


def test_runs_in_a_table_are_named_and_can_be_repeated(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(cell(presets, "mtsac"))
    run.main(arguments(presets, "--collect", "--methods", "mtsac"))
    assert "Not repeated" not in capsys.readouterr().err
    emit = arguments(presets, "--emit", "--methods", "mtsac", "--folder", str(presets.parent / "other_logs"))
    run.main(emit)
    out, err = capsys.readouterr()
    assert f"Runs that {presets.parent / 'results' / 'tiny_runs.csv'} holds already: 1. Not repeated" in err
    assert [line.split()[-1] for line in out.splitlines()] == ["2"]
    run.main([*emit, "--results", str(presets.parent / "other_results")])
    out, err = capsys.readouterr()
    assert "Not repeated" not in err
    assert [line.split()[-1] for line in out.splitlines()] == ["1", "2"]


def test_a_small_benchmark_names_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(variant: str, seed: int, steps: int, n_eval_episodes_per_task: int) -> dict[str, Any]:
        trained.append((variant, seed))
        return {"variant": variant, "seed": seed, "steps": steps, "success": 0.5, "return": 1.0}

    monkeypatch.setattr(gate_sharing, "train", train)
    variant = next(iter(gate_sharing.VARIANTS))
    path = tmp_path / "table.csv"
    gate_sharing.main(["--variants", variant, "--seeds", "1", "--results", str(path)])
    assert "Not repeated" not in capsys.readouterr().err
    gate_sharing.main(["--variants", variant, "--seeds", "2", "--results", str(path)])
    assert trained == [(variant, 0), (variant, 1)]
    err = capsys.readouterr().err
    assert f"Runs that {path} holds already: 1. Not repeated; from nothing: --results OTHER.csv" in err


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    append_results(tmp_path / "table.csv", [{"method": "a", "seed": 1}])
    with pytest.raises(ValueError, match="has the columns method, seed, the new rows have method, seed, commit"):
        append_results(tmp_path / "table.csv", [{"method": "a", "seed": 2, "commit": "b"}])
    assert len(read_results(tmp_path / "table.csv")) == 1


def test_rows_that_are_written_in_part_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    row = {"method": "a" * 100, "seed": 1}
    append_results(path, [row])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # as a full disk does
        with pytest.raises(OSError, match=r"table.csv: 20 of 104 bytes could be written, and were taken back"):
            append_results(path, [row])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_results(path, [row])
    assert read_results(path) == [{"method": "a" * 100, "seed": "1"}] * 2


def test_random_policy_of_two_processes(presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.import_packages(PRESET["gym_packages"])
    results = presets.parent / "results"
    locked_files = []

    @contextlib.contextmanager
    def locked_second(path: Path) -> Iterator[None]:
        locked_files.append(path.name)
        monkeypatch.setattr(run, "locked", locked)
        assert run.evaluate_random_policy("tiny", PRESET, results) == 2
        with locked(path):
            yield

    monkeypatch.setattr(run, "locked", locked_second)
    assert run.evaluate_random_policy("tiny", PRESET, results) == 0
    assert locked_files == ["tiny_runs.csv"] and len(read_results(results / "tiny_final.csv")) == 2


@pytest.mark.parametrize("protocol", [None, "paper"])
def test_random_policy(protocol: str | None, presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.import_packages(PRESET["gym_packages"])
    settings, num_tasks, n_episodes = PRESET, 2, PRESET["eval_episodes"]
    if protocol is not None:
        settings = {**PRESET, "env": "MetaWorld-Custom-v3", "env_kwargs": {"tasks": ["reach-v3"]}, "protocol": protocol}
        num_tasks, n_episodes = 1, 3
        monkeypatch.setitem(run.PROTOCOLS, protocol, Protocol(horizon=5, episodes_per_task=3, final_policy=True))
    evaluations = []

    def evaluate(*args: Any, **kwargs: Any) -> MultiTaskEvaluation:
        evaluations.append(evaluate_multi_task_policy(*args, **kwargs))
        return evaluations[-1]

    monkeypatch.setattr(run, "evaluate_multi_task_policy", evaluate)
    results = presets.parent / "results"
    assert run.evaluate_random_policy("tiny", settings, results) == num_tasks
    assert run.evaluate_random_policy("tiny", settings, results) == 0
    (evaluation,) = evaluations
    assert evaluation.episode_counts.tolist() == [n_episodes] * num_tasks
    assert evaluation.to_dict()["mean_ep_length"] == (5 if protocol else PRESET["env_kwargs"]["horizon"])
    rows = read_results(results / "tiny_final.csv")
    assert [(row["method"], row["seed"], row["step"], row["task"]) for row in rows] == [
        ("random", "0", "0", task) for task in evaluation.task_names
    ]
    np.testing.assert_allclose([float(row["return"]) for row in rows], evaluation.mean_rewards, atol=1e-3)


def test_emitted_commands(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = cell(presets, "mtsac", 2)
    finished.run_folder.mkdir(parents=True)
    run.main(arguments(presets, "--emit", "--methods", "mtsac"))
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[-2:] for command in commands] == [["mtsac", "1"], ["mtsac", "2"]]
    assert all(command[1:3] == ["-m", "benchmarks.learning.run"] for command in commands)
    assert not any((presets.parent / "results").glob("*"))


@pytest.mark.expensive
def test_processes_stop_on_request_and_go_on(presets: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learning.run", *arguments(presets, "--seeds", "1", "--status-seconds", "0.2")]
    process = subprocess.Popen([*command, "--jobs", "2"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    cells = [cell(presets, method) for method in PRESET["methods"]]
    deadline = time.monotonic() + 240
    while not all((item.run_folder / "evaluations.npz").exists() for item in cells) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    assert "mtsac seed 1: started" in output
    stopped = [item for item in cells if not item.is_finished]
    assert all(run.find_checkpoint(item.run_folder) is not None for item in stopped)
    again = subprocess.run([*command, "--jobs", "2"], check=True, capture_output=True, text=True, timeout=480).stdout
    assert all(item.is_finished for item in cells)
    assert all(f"{item.method} seed 1: finished, 240 of 240 steps (100%)" in again for item in stopped)
    assert {row["method"] for row in read_results(presets.parent / "results" / "tiny_runs.csv")} == set(PRESET["methods"])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "ppo"], "methods must be some of mtsac, paco_without_reset, got ppo"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--jobs", "0"], "argument --jobs: must be at least 1, got 0"),
        (["--presets", "nowhere.yml"], "argument --presets: there is no file nowhere.yml"),
        (["--preset", "huge"], "argument --preset: must be one of tiny, got huge"),
    ],
)
def test_refusals(more: list[str], message: str, presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments(presets, *more))
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_presets_name_what_exists() -> None:
    presets = run.load_presets(run.HERE / "presets.yml")
    assert set(presets) == {"cpu_suite", "clipping", "cmta_reach", "stability", "mt10", "mt50", "mt10_paper", "mt50_paper"}
    for name, settings in presets.items():
        for method, details in settings["methods"].items():
            item = run.Cell(name, method, 1, settings, Path("logs"))
            assert settings.get("base", item.env) in yaml.safe_load(hyperparams_path(item.algo).read_text())
            assert "n_timesteps" not in item.hyperparams
            own = set(details.get("hyperparams", {}))
            assert own <= constructor_arguments(ALGORITHMS[item.algo].algorithm_class)
        assert settings["eval_env_kwargs"] == {"goals": "cycle"}
        # One table must not mix the protocols: the id says how long the episodes of the training are
        env = gym.spec(settings["env"]).make(**settings.get("env_kwargs", {}))
        assert env.unwrapped.horizon == run.PROTOCOLS[settings["protocol"]].horizon


def test_clipping_differs_from_the_suite_in_clipping_alone() -> None:
    presets = run.load_presets(run.HERE / "presets.yml")
    suite, ablation = presets["cpu_suite"], presets["clipping"]
    assert {**ablation, "methods": {}} == {**suite, "methods": {}}
    for method in ablation["methods"]:
        changed = run.Cell("clipping", method, 1, ablation, Path("logs"))
        original = run.Cell("cpu_suite", changed.algo, 1, suite, Path("logs"))
        assert (changed.hyperparams.get("max_grad_norm") is None) == (original.hyperparams.get("max_grad_norm") is not None)
        assert {**changed.hyperparams, "max_grad_norm": 0} == {**original.hyperparams, "max_grad_norm": 0}
