"""The documents' tables of measurements are those that the committed results give."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import report

TIDY = "method,env,seed,step,task,success,return\n"


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_documents_say_what_the_results_say(name: str):
    text = (report.ROOT / name).read_text(encoding="utf-8")
    assert "made by python -m benchmarks.report" in text
    assert report.refresh(text) == text, "run python -m benchmarks.report"


def test_refresh_replaces_what_is_between_the_marks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(report.TABLES, "conditions", lambda: "new\n")
    text = "a\n<!-- conditions: made by python -m benchmarks.report -->\nold\n<!-- end of conditions -->\nb\n"
    fresh = report.refresh(text)
    assert "old" not in fresh and "\nnew\n" in fresh
    assert fresh.startswith("a\n<!-- conditions: ") and fresh.endswith("<!-- end of conditions -->\nb\n")
    assert report.refresh(fresh) == fresh


@pytest.mark.parametrize(
    "text",
    [
        "<!-- conditions: made by python -m benchmarks.report -->\nold\n",
        "<!-- conditions: made by python -m benchmarks.report -->\nold\n<!-- end of updates -->\n",
        "<!-- no-table: made by python -m benchmarks.report -->\n<!-- end of no-table -->\n",
    ],
)
def test_bad_marks_are_refused(text: str):
    with pytest.raises(ValueError, match="blocks must be closed and named after conditions, updates"):
        report.refresh(text)


def test_check_tells_of_stale_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", ("a.md",))
    monkeypatch.setitem(report.TABLES, "conditions", lambda: "new\n")
    document = tmp_path / "a.md"
    document.write_text("<!-- conditions: made by python -m benchmarks.report -->\n<!-- end of conditions -->")
    before = document.read_text()
    with pytest.raises(SystemExit, match="1"):
        report.main(["--check"])
    assert document.read_text() == before
    report.main([])
    assert "new" in document.read_text()
    report.main(["--check"])
    assert capsys.readouterr().out.splitlines() == ["stale: a.md", "rewritten: a.md", "stale: none"]


def cells(table: str, first: str) -> list[str]:
    """The other cells of the row whose first cell is given."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_cpu_suite_takes_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "LEARNING", tmp_path)
    preset = {"cpu_suite": {"methods": {"mtsac": {}, "pacosac": {}}, "seeds": [1, 2]}}
    (tmp_path / "presets.yml").write_text(yaml.safe_dump(preset))
    finals = [
        *("random,E,0,0,a-v3,0,2", "random,E,0,0,b-v3,0.1,4"),
        *("mtsac,E,1,9,a-v3,0.2,0", "mtsac,E,1,9,b-v3,1,0", "mtsac,E,2,9,a-v3,0.4,0", "mtsac,E,2,9,b-v3,0.4,0"),
    ]
    (tmp_path / "cpu_suite_final.csv").write_text(TIDY + "\n".join(finals) + "\n")
    # A third run is still training
    curves = ["mtsac,E,3,0,a-v3,1,6", "mtsac,E,3,0,b-v3,1,6"]
    # Of seven evaluations the last five count: 0, 0, 0, 0 and 1 in both tasks of seed 1, all 1 in those of seed 2
    curves += [
        f"mtsac,E,{seed},{step},{task}-v3,{float(seed == 2 or step in (0, 1, 6))},{seed * step}"
        for seed in (1, 2)
        for step in range(7)
        for task in "ab"
    ]
    (tmp_path / "cpu_suite.csv").write_text(TIDY + "\n".join(curves) + "\n")
    (tmp_path / "cpu_suite_runs.csv").write_text(
        "method,env,seed,steps,seconds,dropped_updates,w_resets\nmtsac,E,1,9,60,20,3\n"
    )
    table = report.cpu_suite()
    assert cells(table, "random policy") == ["", "0%", "10%", "5%", ""]
    assert cells(table, "MTSAC") == [
        "2",
        "30% (20% to 40%)",
        "70% (40% to 100%)",
        "50% (40% to 60%)",
        "60% (20% to 100%)",
    ]
    assert cells(report.cpu_suite_runs(), "MTSAC") == ["1", "1", "20", "3"]
    # Returns of the steps 2 to 6: their mean is 4, and twice that with seed 2
    assert cells(report.cpu_suite_returns(), "random policy") == ["2", "4"]
    assert cells(report.cpu_suite_returns(), "MTSAC") == ["6 (4 to 8)", "6 (4 to 8)"]


def test_stability_shows_the_counts_of_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "LEARNING", tmp_path)
    (tmp_path / "presets.yml").write_text(yaml.safe_dump({"stability": {"methods": {"vanilla": {}, "maskout": {}}}}))
    finals = ["random,E,0,0,a-v3,0.1,4", "maskout,E,2,9,a-v3,0.4,0", "maskout,E,1,9,a-v3,0.2,0", "vanilla,E,1,9,a-v3,0,0"]
    (tmp_path / "stability_final.csv").write_text(TIDY + "\n".join(finals) + "\n")
    # The last five evaluations of the maskout's two seeds: all 1 and all 0 in success, 6 and 10 in return
    curves = [
        f"maskout,E,{seed},{step},a-v3,{2 - seed},{2 + 4 * seed if step else 99}" for seed in (1, 2) for step in range(6)
    ]
    curves += [f"vanilla,E,1,{step},a-v3,0.5,3" for step in range(6)]
    (tmp_path / "stability.csv").write_text(TIDY + "\n".join(curves) + "\n")
    (tmp_path / "stability_runs.csv").write_text(
        "method,env,seed,steps,seconds,dropped_updates,w_resets\nmaskout,E,2,9,60,7,0\nmaskout,E,1,9,60,20,0\nvanilla,E,1,9,60,,\n"
    )
    table = report.stability()
    assert cells(table, "random policy") == ["", "10%", "", "", "", ""]
    assert cells(table, "neither") == ["1", "0%", "50%", "3", "-", "-"]
    assert cells(table, "loss maskout") == ["2", "30% (20% to 40%)", "50% (0% to 100%)", "8 (6 to 10)", "20, 7", "0, 0"]


def test_updates_are_told_in_those_of_mtsac(monkeypatch: pytest.MonkeyPatch):
    def row(ms: float) -> dict[str, object]:
        cost = dict(cost=ms / 6, cost_quartiles=[ms / 8, ms / 4])
        return {"median_ms": ms, "speed_ratio": 12 / ms, "ratio_quartiles": [11 / ms, 13 / ms], **cost}

    table = {name: row(6) for name in report.LEARNERS}
    table |= {"SB3 SAC": row(12), "TSACSAC": row(24), "SBX SAC (JAX)": {"skipped": "why"}}
    monkeypatch.setattr(report, "speed", lambda: {"update": table, "update_50_tasks": table})
    text = report.updates()
    assert cells(text, "TSACSAC")[:3] == ["24", "0.50 (0.46 to 0.54)", "4.00 (3.00 to 6.00)"]
    assert cells(text, "SB3 `SAC`")[:3] == ["12", "1", "2.00 (1.50 to 3.00)"]
    assert cells(text, "SBX `SAC` (JAX)")[:3] == ["-", "-", "-"]
    short = report.updates_in_short()
    assert cells(short, "PaCoSAC / CMTASAC") == ["6 / 6", "2.00 / 2.00"]
    assert cells(short, "TSACSAC / STARSSAC") == ["24 / 6", "0.50 / 2.00"]


def test_rows_of_the_replay_table_name_their_clock():
    rows = [line for line in report.replay().splitlines() if "000 rows" in line or "update_priorities" in line]
    assert [re.search(r"\((\w+) time\) \|", row)[1] for row in rows] == ["wall", "wall", "CPU", "CPU", "CPU"]


def test_over_seeds():
    assert report.over_seeds(np.array([0.5]), ".0%") == "50%"
    assert report.over_seeds(np.array([0.25, 0.75, 0.5]), ".0%") == "50% (25% to 75%)"
    assert report.over_seeds(np.array([1.0, 1.0, 0.999]), ".0%") == "100%"
