"""GateWeightsCallback: what it plays and writes."""

import numpy as np
import pytest

from sb3_mtrl import CMTASAC, MTSAC
from sb3_mtrl.common.callbacks import GateWeightsCallback, plot_gate_weights
from tests.models import NUM_TASKS, make_env, make_model, parameters_of


def test_one_episode_per_task_and_its_weights(tmp_path):
    model = make_model(CMTASAC, n_experts=4)
    callback = GateWeightsCallback(make_env(n_envs=2, horizon=6), str(tmp_path), eval_freq=5)
    model.learn(21, callback=callback)  # 7 calls
    (path,) = tmp_path.glob("*.npz")
    assert path.name == "gate_weights_15.npz"
    with np.load(path) as file:
        weights = file["weights"]
        assert file["task_names"].tolist() == list(model.task_names)
        assert file["lengths"].tolist() == [6, 6, 6]
    assert weights.shape == (NUM_TASKS, 6, 4)
    np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)
    # The same numbers by hand: the first episode of task 0 is that of the first sub-environment
    env = make_env(n_envs=2, horizon=6)
    env.seed(callback.seed)
    obs, state = env.reset(), None
    for step in range(6):
        np.testing.assert_allclose(weights[0, step], model.policy.gate_weights(obs, state)[0], atol=1e-6)
        actions, state = model.predict(obs, state=state, deterministic=True)
        obs = env.step(actions)[0]
    assert not np.allclose(weights[:, 0], weights[:, -1])  # it does change over an episode


def test_training_does_not_notice(tmp_path):
    parameters = []
    for callback in (None, GateWeightsCallback(make_env(), str(tmp_path), eval_freq=5)):
        model = make_model(CMTASAC, learning_starts=20)
        model.learn(60, callback=callback)
        parameters.append(parameters_of(model))
    assert all((tensor == parameters[0][name]).all() for name, tensor in parameters[1].items())


def test_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    weights = np.full((2, 5, 3), 1 / 3, dtype=np.float32)
    weights[1, 3:] = np.nan
    figure = plot_gate_weights(weights, ("left", "right"))
    mean_axes, step_axes = figure.axes[:2]
    assert [label.get_text() for label in mean_axes.get_yticklabels()] == ["left", "right"]
    np.testing.assert_allclose(mean_axes.images[0].get_array(), 1 / 3)
    assert step_axes.images[0].get_array().shape == (6, 5)
    model = make_model(CMTASAC)
    model.learn(15, callback=GateWeightsCallback(make_env(), str(tmp_path), eval_freq=5))
    assert (tmp_path / "gate_weights_15.png").stat().st_size > 0


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match="eval_freq must be at least 1, got 0"):
        GateWeightsCallback(make_env(), str(tmp_path), eval_freq=0)
    with pytest.raises(ValueError, match="needs a policy with a gate, got MTSACPolicy"):
        make_model(MTSAC).learn(3, callback=GateWeightsCallback(make_env(), str(tmp_path)))
    with pytest.raises(ValueError, match=r"as many tasks as the training environment \(3\), got 2"):
        make_model(CMTASAC).learn(3, callback=GateWeightsCallback(make_env(2), str(tmp_path)))
    env = make_env()
    env.env_method("set_tasks", [0])
    with pytest.raises(RuntimeError, match="does not reach the tasks point-1, point-2"):
        make_model(CMTASAC).learn(3, callback=GateWeightsCallback(env, str(tmp_path), eval_freq=1))
