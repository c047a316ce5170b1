"""
Studies that several processes work on at once: trials whose process is gone are marked as failed, and none counts twice.

A trial that was running when its process was killed stays "running" for Optuna. It would count towards ``--max-total-trials``
for ever. So each trial notes its process; whoever begins or ends a trial, or opens the study, fails the trials of processes
of the same machine that are no more. What other machines run is told by the heartbeat of a database; a journal file has none,
so that there a trial lost on another machine is failed when a process begins on that machine.
"""

import contextlib
import os
import socket
import subprocess
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

# User attribute of a trial
PROCESS = "process"
# Seconds; a trial is stale after twice as long
HEARTBEAT_INTERVAL = 60
# How often a heartbeat is tried, a second apart
HEARTBEAT_TRIES = 3
# Those that RL Zoo counts towards --max-total-trials
COUNTED_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class HeartbeatStorage(optuna.storages.RDBStorage):
    """
    A database in which each process writes down that it still runs its trial.

    :param url: URL of the database
    """

    def __init__(self, url: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(url, heartbeat_interval=HEARTBEAT_INTERVAL)

    def record_heartbeat(self, trial_id: int) -> None:
        """
        Write down that a trial still runs. A database that is locked or away for a while must not end the thread that does
        this: the next heartbeat may find it again.

        :param trial_id: Id of the trial
        """
        for tries_left in reversed(range(HEARTBEAT_TRIES)):
            try:
                return super().record_heartbeat(trial_id)
            except StorageInternalError as error:
                if tries_left:
                    time.sleep(1)
                else:
                    warnings.warn(f"a heartbeat could not be written: {error.__cause__ or error}", stacklevel=2)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """
        Trials without heartbeat. A process of this machine that lives may have been stopped, or kept from the database: its
        trial goes on.
        """
        return [trial_id for trial_id in super()._get_stale_trial_ids(study_id) if not _runs_here(self.get_trial(trial_id))]

    def endswith(self, suffix: str) -> bool:
        """
        RL Zoo takes its ``storage`` for a string, and asks it for the ending of a journal file.

        :param suffix: The ending, unused
        :return: False
        """
        return False


def open_storage(storage: str) -> Any:
    """
    :param storage: URL of a database, or a journal file ``*.log``
    :return: The storage
    """
    if not storage.endswith(".log"):
        return HeartbeatStorage(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


@cache
def _machine() -> str:
    """Name of what process ids are counted in: the machine since it was started, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """When a process was started, in the system's own terms; "" if it has ended; None if the system does not tell."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return None  # hidden (mount option hidepid)
    # The same text in every process
    env = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    started = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, env=env)
    return started.stdout.strip() or None


def _is_gone(pid: int, started: str | None) -> bool:
    """Whether it is certain that a process of this machine has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's: it lives, or its number went to another process
    start = _start_of(pid)
    return start is not None and started is not None and start != started


def _is_of_this_machine(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(PROCESS, {}).get("machine") == _machine()


def _runs_here(trial: FrozenTrial) -> bool:
    return _is_of_this_machine(trial) and not is_lost(trial)


def note_process(trial: optuna.Trial) -> None:
    """
    Write down which process runs a trial.

    :param trial: The trial, running in this process
    """
    trial.set_user_attr(PROCESS, {"machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())})


def is_lost(trial: FrozenTrial) -> bool:
    """
    :param trial: A running trial
    :return: Whether it is known that its process is no more
    """
    if not _is_of_this_machine(trial):
        return False
    process = trial.user_attrs[PROCESS]
    return _is_gone(process["pid"], process["started"])


def fail_lost_trials(study: optuna.Study) -> list[int]:
    """
    Mark the running trials whose process is no more as failed.

    :param study: The study
    :return: Numbers of the trials that were marked by this call (stale heartbeats not among them)
    """
    failed = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_lost(trial):
            with contextlib.suppress(UpdateFinishedTrialError):  # another process was faster
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                failed.append(trial.number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    return failed


def try_to_fail_lost_trials(study: optuna.Study) -> None:
    """
    ``fail_lost_trials`` for the middle of a trial, whose result matters more than what became of others: a storage that
    cannot be reached is a warning.

    :param study: The study
    """
    try:
        fail_lost_trials(study)
    except (StorageInternalError, OSError) as error:
        warnings.warn(f"could not look for trials whose process is gone: {error.__cause__ or error}", stacklevel=2)


def is_surplus(trial: optuna.Trial, max_total_trials: int) -> bool:
    """
    Whether a trial that has just begun is one too many. Several processes may each have seen that one was left; the
    numbers of trials, which the storage gives, decide.

    :param trial: The trial
    :param max_total_trials: Number of trials of all processes
    :return: Whether that many of the trials up to this one count without it
    """
    counted = trial.study.get_trials(deepcopy=False, states=COUNTED_STATES)
    return sum(other.number < trial.number for other in counted) >= max_total_trials
