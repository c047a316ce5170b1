"""Results files of the learning benchmarks: one line per finished run, so that a benchmark continues where it stopped."""

import csv
import fcntl
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_results(path: Path) -> list[dict[str, str]]:
    """
    :param path: The results file
    :return: Its rows; none if there is no such file
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_result(path: Path, row: dict[str, Any]) -> None:
    """
    :param path: The results file, made if it is not there
    :param row: A row for its end
    """
    append_results(path, [row])


def append_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """
    :param path: The results file, made if it is not there
    :param rows: Rows for its end, at least one, with the same columns
    :raises ValueError: if the file has other columns
    :raises OSError: if the rows cannot be written; the file is as it was
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    elif (columns := _columns(path)) != list(rows[0]):
        raise ValueError(f"{path} has the columns {', '.join(columns)}, the new rows have {', '.join(rows[0])}")
    writer.writerows(rows)
    data = text.getvalue().encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        n_written = file.write(data)  # in one piece: a crash must not leave half of them
        if n_written < len(data):
            file.truncate(end)
            raise OSError(f"{path}: {n_written} of {len(data)} bytes could be written, and were taken back (disk full?)")


def _columns(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file))


def tell_of_skipped(n_runs: int, path: Path, how_to_repeat: str) -> None:
    """
    Say on the standard error that runs are not repeated, and why.

    :param n_runs: Number of runs that the results file holds; nothing is said of none
    :param path: The results file
    :param how_to_repeat: Options that train them from nothing
    """
    if n_runs:
        print(f"Runs that {path} holds already: {n_runs}. Not repeated; from nothing: {how_to_repeat}", file=sys.stderr)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """
    Wait until no other process is in this context with the same file.

    :param path: The results file, made (empty) if it is not there
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
