"""Several processes on one study, in a journal file and in PostgreSQL; one of them is killed in the middle of a trial."""

import glob
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

import sb3_mtrl.zoo
from sb3_mtrl.zoo import trials
from sb3_mtrl.zoo.trials import PROCESS, fail_lost_trials, is_surplus, note_process, open_storage

ROOT = Path(__file__).parent.parent

# Here, trials are also begun and ended by hand
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")

sb3_mtrl.zoo.register()


def find_postgresql() -> Path | None:
    """Folder of the programs of a PostgreSQL server: Debian keeps them off the path."""
    for folder in [
        *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True),
        os.path.dirname(shutil.which("initdb") or ""),
    ]:
        if folder and all(Path(folder, name).exists() for name in ("initdb", "pg_ctl", "postgres")):
            return Path(folder)
    return None


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URL of a server of the tests' own, on the loopback interface; it is gone afterwards."""
    programs = find_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the package's extra postgresql is not installed")
    # The server refuses to run as root
    as_user: dict[str, Any] = {"user": "nobody"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="sb3_mtrl_postgresql_"))
    if as_user:
        shutil.chown(folder, "nobody")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"

    def run(program: str, *arguments: str) -> None:
        command = [programs / program, "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, timeout=60, cwd=folder, stdout=subprocess.DEVNULL, **as_user)

    try:
        run("initdb", "--auth=trust", "--username=optuna", "--no-sync", "--encoding=UTF8", "--no-locale")
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", settings, "start")
        yield f"postgresql+psycopg://optuna@127.0.0.1:{port}/postgres"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            run("pg_ctl", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("postgresql") if request.param == "postgresql" else str(tmp_path / "study.log")


def open_study(storage: str, name: str) -> optuna.Study:
    return optuna.create_study(storage=open_storage(storage), study_name=name, load_if_exists=True, direction="maximize")


def wait_for(condition: Any, timeout: float = 240.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return result


@pytest.fixture
def start_process() -> Iterator[Any]:
    """Starts RL Zoo's literal command for a study, and ends it if it has not ended."""
    started: list[subprocess.Popen[str]] = []

    def start(storage: str, name: str, folder: Path, n_timesteps: int, *env: str) -> subprocess.Popen[str]:
        arguments = (
            *("--algo", "mtsac", "--gym-packages", "tests.tiny_zoo_envs", "-n", str(n_timesteps)),
            *(env or ("--env", "PointTasks-v0")),
            *("-optimize", "--storage", storage, "--study-name", name, "--max-total-trials", "3", "--no-optim-plots"),
            *("-params", "policy_kwargs:dict(net_arch=[8])", "batch_size:12", "learning_starts:10"),
        )
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "rl_zoo3.train", *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=folder, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.expensive
def test_a_killed_process_costs_its_trial_only(storage: str, tmp_path: Path, start_process: Any) -> None:
    """
    One process has a trial that would never end, and is killed in it while another one has begun. Three trials are asked for
    of both together: three are finished besides the one that failed.
    """
    study = open_study(storage, "killed")
    victim = start_process(storage, "killed", tmp_path, n_timesteps=10_000_000)
    wait_for(lambda: study.trials and study.trials[0].user_attrs.get(PROCESS))
    assert study.trials[0].user_attrs[PROCESS]["pid"] == victim.pid
    # The survivor must not finish before the kill: two short trials and the running one would be all three
    release = tmp_path / "release"
    held_env = ("--env", "HeldPointTasks-v0", "--env-kwargs", f"release:{str(release)!r}")
    survivor = start_process(storage, "killed", tmp_path, 200, *held_env)
    wait_for(lambda: len(study.trials) > 1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    release.touch()
    output, _ = survivor.communicate(timeout=300)
    assert survivor.returncode == 0, output[-3000:]

    states = [trial.state for trial in study.trials]
    finished = [state for state in states if state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert states[0] == TrialState.FAIL and len(states) == 4 and len(finished) == 3
    assert {trial.user_attrs[PROCESS]["pid"] for trial in study.trials[1:]} == {survivor.pid}


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_trials_whose_process_is_known_to_be_gone_are_failed(storage: str) -> None:
    study = open_study(storage, "lost")
    own, dead, elsewhere, reused, untold = (study.ask() for _ in range(5))
    note_process(own)
    noted = study.trials[own.number].user_attrs[PROCESS]
    assert noted["pid"] == os.getpid() and noted["started"]
    dead.set_user_attr(PROCESS, {**noted, "pid": dead_process()})
    elsewhere.set_user_attr(PROCESS, {**noted, "machine": "another", "pid": dead_process()})
    reused.set_user_attr(PROCESS, {**noted, "started": "before"})  # the number went to another process
    assert fail_lost_trials(study) == [dead.number, reused.number]
    assert fail_lost_trials(study) == []
    running = [trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))]
    assert running == [own.number, elsewhere.number, untold.number]
    study.tell(own, 1.0)
    assert study.best_trial.number == own.number


@pytest.mark.parametrize(("start", "is_gone"), [(None, False), ("", True), ("5", False), ("6", True)])
@pytest.mark.parametrize("kill_error", [None, PermissionError])
def test_what_cannot_be_read_is_not_taken_for_gone(
    start: str | None, is_gone: bool, kill_error: type[OSError] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: the system hides when the process was started; "": it has ended, but its parent has not asked for it yet."""

    def kill(pid: int, signal_number: int) -> None:
        assert signal_number == 0
        if kill_error is not None:
            raise kill_error

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(trials, "_start_of", lambda pid: start)
    assert trials._is_gone(1, "5") is is_gone


def test_processes_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = trials._start_of(process.pid)
    assert started and not trials._is_gone(process.pid, started)
    process.stdin.close()  # type: ignore[union-attr]
    wait_for(lambda: trials._is_gone(process.pid, started))  # a zombie
    process.wait()
    monkeypatch.setattr(trials, "_start_of", lambda pid: None)
    assert trials._is_gone(process.pid, started)


def test_a_heartbeat_waits_for_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "HEARTBEAT_TRIES", 2)
    study = open_study(f"sqlite:///{tmp_path / 'study.db'}?timeout=0.1", "locked")
    trial = study.ask()
    lock = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.warns(UserWarning, match="heartbeat could not be written.*locked"):
        study._storage.record_heartbeat(trial._trial_id)
    lock.execute("ROLLBACK")
    study._storage.record_heartbeat(trial._trial_id)
    assert lock.execute("SELECT count(*) FROM trial_heartbeats").fetchone() == (1,)
    lock.close()


def test_a_stopped_process_keeps_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that is long past means nothing where the process is seen to live."""
    monkeypatch.setattr(trials, "HEARTBEAT_INTERVAL", 1)
    study = open_study(f"sqlite:///{tmp_path / 'study.db'}", "stopped")
    own, elsewhere = study.ask(), study.ask()
    for trial in (own, elsewhere):
        note_process(trial)
        study._storage.record_heartbeat(trial._trial_id)
    elsewhere.set_user_attr(PROCESS, {**study.trials[own.number].user_attrs[PROCESS], "machine": "another"})
    time.sleep(4.1)  # longer than twice the interval; SQLite's clock has whole seconds
    fail_lost_trials(study)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.FAIL]
    study.tell(own, 1.0)


def test_the_number_of_a_trial_decides_who_is_one_too_many(storage: str) -> None:
    study = open_study(storage, "surplus")
    first, second, third = (study.ask() for _ in range(3))
    assert [is_surplus(trial, 2) for trial in (first, second, third)] == [False, False, True]
    study.tell(first, state=TrialState.FAIL)
    assert not is_surplus(third, 2)
    study.tell(second, 0.5)
    fourth = study.ask()
    assert not is_surplus(third, 2) and is_surplus(fourth, 2)


def test_a_database_has_a_heartbeat(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another machine ran: nothing is known of its process."""
    monkeypatch.setattr(trials, "HEARTBEAT_INTERVAL", 1)
    study = open_study(postgresql, "heartbeat")
    stale = study.ask()
    study._storage.record_heartbeat(stale._trial_id)
    fail_lost_trials(study)
    assert study.trials[stale.number].state == TrialState.RUNNING
    time.sleep(3.1)  # longer than twice the interval
    fail_lost_trials(study)
    assert study.trials[stale.number].state == TrialState.FAIL


def make_manager(storage: str, folder: Path, **kwargs: Any) -> Any:
    import importlib

    importlib.import_module("tests.tiny_zoo_envs")
    from rl_zoo3.exp_manager import ExperimentManager

    manager = ExperimentManager(
        SimpleNamespace(), "mtsac", "PointTasks-v0", str(folder), n_timesteps=60, storage=storage, study_name="manager",
        optimize_hyperparameters=True, no_optim_plots=True, n_startup_trials=1, **kwargs,
    )  # fmt: skip
    manager.objectives = []

    def run_trial(trial: optuna.Trial) -> float:
        manager.objectives.append(trial.number)
        return float(trial.number)

    manager._run_trial = run_trial
    manager._hyperparams, manager.verbose = {}, 0
    return manager


def test_max_total_trials_counts_over_runs_and_not_twice(storage: str, tmp_path: Path) -> None:
    study = open_study(storage, "manager")
    lost = study.ask()
    note_process(lost)
    lost.set_user_attr(PROCESS, {**study.trials[0].user_attrs[PROCESS], "pid": dead_process()})
    first = make_manager(storage, tmp_path, max_total_trials=2)
    first.hyperparameters_optimization()
    assert first.objectives == [1, 2]
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    second = make_manager(storage, tmp_path, max_total_trials=2)
    second.hyperparameters_optimization()
    assert second.objectives == []
    # Without a common limit each process makes its own number
    third = make_manager(storage, tmp_path, n_trials=2)
    third.hyperparameters_optimization()
    assert third.objectives == [3, 4]


def test_a_trial_that_is_one_too_many_is_not_run(storage: str, tmp_path: Path) -> None:
    """As when two processes see at once that one trial is left."""
    study = open_study(storage, "manager-2")
    note_process(study.ask())
    manager = make_manager(storage, tmp_path, max_total_trials=1)
    study.optimize(manager.objective, n_trials=5)
    assert manager.objectives == []
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.FAIL]


def test_a_storage_out_of_reach_does_not_cost_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(study: optuna.Study) -> None:
        raise StorageInternalError("out of reach")

    storage = str(tmp_path / "study.log")
    study = open_study(storage, "out-of-reach")
    manager = make_manager(storage, tmp_path, n_trials=1)
    monkeypatch.setattr(trials, "fail_lost_trials", fail)
    with pytest.warns(UserWarning, match="could not look for trials.*out of reach") as warned:
        study.optimize(manager.objective, n_trials=2)
    assert len([warning for warning in warned if "out of reach" in str(warning.message)]) == 4
    assert [trial.value for trial in study.trials] == [0.0, 1.0]

    def prune(trial: optuna.Trial) -> float:
        raise optuna.TrialPruned

    manager._run_trial = prune
    with pytest.warns(UserWarning, match="out of reach"):
        study.optimize(manager.objective, n_trials=1)
    assert study.trials[-1].state == TrialState.PRUNED
