"""The speed measurements: how they time, and what they make of it."""

import numpy as np
import pytest

from benchmarks.speed.measure import machine_line, print_table, summarize, time_in_turns


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
