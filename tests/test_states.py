"""A policy of CMTA whose recurrent state is watched, or taken away."""

import numpy as np
import pytest

from benchmarks.learning import states
from sb3_mtrl import CMTASAC, make_multi_task_vec_env
from tests.tiny_envs import PointTasksEnv

N_ENVS = 3


def make_model() -> CMTASAC:
    env = make_multi_task_vec_env(PointTasksEnv, n_envs=N_ENVS)
    return CMTASAC("MlpPolicy", env, buffer_size=90, batch_size=3, policy_kwargs={"net_arch": [8]}, seed=0)


@pytest.mark.parametrize("with_memory", [True, False])
def test_actions_and_largest_cell(with_memory):
    """Beside `predict` called by hand, in two episodes of which the second is shorter."""
    model = make_model()
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(7, N_ENVS, 7)).astype(np.float32)
    starts = np.zeros((7, N_ENVS), dtype=bool)
    starts[[0, 4]] = True
    watcher = states.StateWatcher(model, with_memory)
    state, known, largest = None, None, np.zeros(4)
    for index, (obs, start) in enumerate(zip(observations, starts, strict=True)):
        actions, state = watcher.predict(obs, state, start, deterministic=True)
        known = known if with_memory and not start[0] else None
        expected, known = model.predict(obs, known, deterministic=True)
        assert np.array_equal(actions, expected)
        step = index % 4
        largest[step] = max(largest[step], np.abs(known[1]).max())
    assert np.array_equal(watcher.largest_cell[:4], largest) and largest.min() > 0
    assert not watcher.largest_cell[4:].any()


def test_table_of_a_model(tmp_path, monkeypatch, capsys):
    env = make_multi_task_vec_env("MetaWorld-Custom-v3", n_envs=1, env_kwargs={"tasks": ["reach-v3"]})
    CMTASAC("MlpPolicy", env, buffer_size=100, batch_size=4, policy_kwargs={"net_arch": [8]}, seed=0).save(tmp_path / "model")
    states.main([str(tmp_path / "model.zip"), "--tasks", "reach-v3", "--episodes", "1"])
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["|", "with", "memory", "|", "without"]
    assert last.startswith("largest entry of the LSTM's cell: 0.") and last.endswith("after step 500")


def test_number_of_tasks_is_checked(tmp_path, capsys):
    make_model().save(tmp_path / "model")
    with pytest.raises(SystemExit):
        states.main([str(tmp_path / "model.zip"), "--tasks", "reach-v3"])
    assert "must be the 3 tasks of the model, got 1" in capsys.readouterr().err
