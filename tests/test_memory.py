"""A cue at the first step of an episode that the best actions depend on to the end: what CMTASAC's memory is for."""

import pytest

from benchmarks.learning.memory import TARGET, CueEnv, error_after_the_cue, main, train
from sb3_mtrl import CMTASAC
from tests.models import make_model


def test_without_memory_the_error_has_a_floor():
    """After the cue both episodes look alike, and ((a - t)^2 + (a + t)^2) / 2 >= t^2 for every action a."""
    for seed in range(3):
        model = make_model(CMTASAC, env=CueEnv(), use_temporal=False, seed=seed)
        assert error_after_the_cue(model, horizon=5) >= TARGET**2 - 1e-6


@pytest.mark.expensive
def test_the_shared_attention_remembers_the_cue():
    assert train("full", seed=0, steps=4000) < 0.5 * TARGET**2


def test_table(capsys):
    main(["--steps", "8", "--seeds", "1", "--horizon", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:]] == ["full", "actor", "released", "no memory"]
