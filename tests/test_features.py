"""What is read from CMTA's features: by a regression of which the errors are known."""

import numpy as np
import pytest

from benchmarks.learning import features
from sb3_mtrl import CMTASAC, make_multi_task_vec_env


def test_errors_of_the_regression():
    """A linear function is read exactly; of noise nothing but its mean, so that the error is its standard deviation, 2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    values = np.column_stack([x @ [1.0, -2.0, 0.5] + 3.0, rng.normal(scale=2.0, size=len(x))])
    linear, noise = features.read_error(x, values, np.arange(len(x)) % 5 < 3)
    assert linear < 1e-3
    assert noise == pytest.approx(2.0, rel=0.05)


def test_a_goal_that_is_recognised_is_not_read():
    """
    Features that tell which of 20 goals it is, and nothing of where it is: the error on goals that the regression does not
    know is about their standard deviation, 1, however often each of them comes.
    """
    rng = np.random.default_rng(0)
    goals, goal_ids = rng.normal(size=(20, 3)), rng.integers(20, size=2000)
    is_train = features.split_by_goal(goals[goal_ids])
    assert len(set(goal_ids[is_train])) == 12 and not set(goal_ids[is_train]) & set(goal_ids[~is_train])
    assert 0.5 < features.read_error(np.eye(20)[goal_ids], goals[goal_ids], is_train).mean() < 2


def test_table_of_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "N_EPISODES", 25)
    env = make_multi_task_vec_env("MetaWorld-Custom-v3", n_envs=2, env_kwargs={"tasks": ["door-close-v3", features.TASK]})
    model = CMTASAC("MlpPolicy", env, buffer_size=100, batch_size=4, policy_kwargs={"net_arch": [8]}, seed=0)
    model.save(tmp_path / "model")
    features.main([str(tmp_path / "model.zip"), "--task-id", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[5] == "a success is within 5.0 cm of the goal: compare the norm"
    spread, of_observation = (np.array(line.split()[-8:], dtype=float) for line in (lines[1], lines[2]))
    # The goal is part of the observation, of which the test shows others
    assert lines[2].startswith("error, from the observation itself") and (of_observation[:4] < 0.2 * spread[:4]).all()


def test_norm_of_an_error():
    """Of errors (1, 2, 2) and (2, 3, 6): 3 and 7."""
    assert features.with_norms(np.array([1.0, 2, 2, 2, 3, 6])).tolist() == [1, 2, 2, 3, 2, 3, 6, 7]
