"""The picture of the quotas: drawn from numbers that are there, without training."""

import csv
from pathlib import Path

import pytest

from benchmarks.learning import quotas


def test_plot_only_draws_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    with (tmp_path / "quotas.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["steps", *(f"{name}/{task}" for name in ("success", "quota") for task in quotas.TASKS)])
        writer.writerow([600, *["nan"] * 4, *[32] * 4])  # success is not known before the windows are told
        writer.writerow([1200, 1.0, 0.5, 0.0, 0.0, 4, 24, 48, 52])
    quotas.main(["--folder", str(tmp_path), "--plot-only"])
    assert (tmp_path / "quotas.png").read_bytes().startswith(b"\x89PNG")
