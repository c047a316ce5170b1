"""Results files of the learning benchmarks: one line per finished run, so that a benchmark continues where it stopped."""

import csv
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
    """
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
