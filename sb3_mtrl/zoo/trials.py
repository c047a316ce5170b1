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
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

# User attribute of a trial
PROCESS = "process"
# Seconds; a trial is stale after twice as long
HEARTBEAT_INTERVAL = 60
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
    """When a process was started, in the system's own terms; None if it is no more."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    started = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return started.stdout.strip() or None


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
    process = trial.user_attrs.get(PROCESS)
    return process is not None and process["machine"] == _machine() and _start_of(process["pid"]) != process["started"]


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
