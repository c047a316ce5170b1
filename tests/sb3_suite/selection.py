"""Runs beside SB3's tests: a green run has to mean that there was something to run."""

import pytest

import sb3_mtrl
from tests.sb3_suite import variants
from tests.sb3_suite.deselected import DESELECTED
from tests.sb3_suite.rebind import SELECTION

# SB3 2.9.2 has 108 tests that concern SAC; another release of the supported range may have a few less.
MIN_SAC_TESTS = 100


def test_enough_of_sb3s_tests_are_selected(request: pytest.FixtureRequest) -> None:
    selection = request.config.stash[SELECTION]
    # What is left out by name was counted on purpose.
    n_found = selection.n_selected + selection.n_left_out
    assert n_found >= MIN_SAC_TESTS, f"{n_found} of SB3's tests concern SAC, expected at least {MIN_SAC_TESTS}"


def test_every_deselected_test_exists(request: pytest.FixtureRequest) -> None:
    assert request.config.stash[SELECTION].stale == []


def test_deselected_algorithms_exist() -> None:
    assert {entry.algo for entry in DESELECTED} <= {*sb3_mtrl.__all__, *vars(variants)}
