"""Loading without unpickling: the same policy, nothing that a file's author could run, and names of what is refused."""

import base64
import importlib
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_mtrl import CMTASAC, MTSAC, TSACSAC
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.safe_load import space_from_plain, space_to_plain
from tests.models import ALGORITHMS, make_env, make_model, parameters_of

RUNS: list[str] = []


def run(what: str) -> None:
    RUNS.append(what)


class Bomb:
    """Calls ``run`` when it is unpickled."""

    def __init__(self, what: str):
        self.what = what

    def __reduce__(self):
        return run, (self.what,)


@pytest.fixture(autouse=True)
def nothing_ran():
    RUNS.clear()
    pickle.loads(pickle.dumps(Bomb("the bomb works")))
    assert RUNS.pop() == "the bomb works"
    yield
    assert RUNS == []


def changed(path: Path, data: dict[str, Any] | None = None, files: dict[str, bytes] | None = None) -> Path:
    """A copy of a model file with other entries in its JSON, or other files in it."""
    target = path.with_name("changed.zip")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), **(data or {})}).encode()
            archive.writestr(name, (files or {}).get(name, content))
    return target


def bomb_entry(what: str) -> dict[str, str]:
    return {":type:": "harmless", ":serialized:": base64.b64encode(cloudpickle.dumps(Bomb(what))).decode()}


def trained(algorithm: type[MTSAC], path: Path, **kwargs: Any) -> MTSAC:
    model = make_model(algorithm, learning_starts=12, **kwargs)
    model.learn(60)
    model.save(path)
    return model


@pytest.mark.parametrize("with_env", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_safe_load_predicts_the_same_actions(algorithm, with_env, tmp_path):
    model = trained(algorithm, tmp_path / "model.zip", train_freq=(2, "step"))
    loaded = algorithm.load(tmp_path / "model", env=make_env() if with_env else None, safe=True)
    obs = np.stack([model.observation_space.sample() for _ in range(4)])
    obs[:, -3:] = np.eye(3)[[0, 1, 2, 0]]
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space
    assert loaded.train_freq == TrainFreq(2, TrainFrequencyUnit.STEP)
    assert type(loaded.replay_buffer) is type(model.replay_buffer)
    assert type(loaded.policy) is type(model.policy)
    assert loaded.num_timesteps == model.num_timesteps and loaded._n_updates == model._n_updates
    for name, optimizer_state in model.get_parameters().items():
        assert str(loaded.get_parameters()[name]) == str(optimizer_state), name
    if with_env:
        loaded.learn(30, reset_num_timesteps=False)
        assert loaded.num_timesteps == 90


def test_kinds_of_policy_and_buffer_are_told_by_name(tmp_path):
    trained(TSACSAC, tmp_path / "a.zip", base="paco")
    assert type(TSACSAC.load(tmp_path / "a.zip", safe=True).policy).__name__ == "PaCoTSACPolicy"
    trained(MTSAC, tmp_path / "b.zip", replay_buffer_class=TaskPrioritizedReplayBuffer)
    assert isinstance(MTSAC.load(tmp_path / "b.zip", safe=True).replay_buffer, TaskPrioritizedReplayBuffer)
    model = make_model(MTSAC, "Pendulum-v1")
    model.save(tmp_path / "c.zip")
    assert type(MTSAC.load(tmp_path / "c.zip", safe=True).replay_buffer) is type(model.replay_buffer)


def test_from_an_open_file(tmp_path):
    model = make_model()
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = MTSAC.load(file, safe=True)
    assert all(th.equal(value, parameters_of(model)[name]) for name, value in parameters_of(loaded).items())


@pytest.mark.parametrize("name", ["policy_class", "lr_schedule", "_last_obs", "action_noise", "observation_space"])
def test_pickles_that_are_replaced_are_not_read(name, tmp_path):
    make_model().save(tmp_path / "model.zip")
    path = changed(tmp_path / "model.zip", {name: bomb_entry(name)})
    if name == "action_noise":
        with pytest.warns(UserWarning, match="left out the action noise"):
            MTSAC.load(path, safe=True)
    else:
        MTSAC.load(path, safe=True)
    # The same file runs code without safe=True, so the bombs are live
    with pytest.raises(Exception):  # noqa: B017  (what a bomb leaves behind is no policy, no space, ...)
        MTSAC.load(path).learn(10)
    assert RUNS and RUNS[0] == name
    RUNS.clear()


@pytest.mark.parametrize("name", ["policy_kwargs", "learning_rate", "plain_settings", "something_new"])
def test_other_pickles_are_refused_by_name(name, tmp_path):
    make_model().save(tmp_path / "model.zip")
    path = changed(tmp_path / "model.zip", {name: bomb_entry(name)})
    with pytest.raises(ValueError, match=rf"safe=True reads weights and numbers only and refused .*{name}.* of .*changed.zip"):
        MTSAC.load(path, safe=True)


def test_tensors_that_are_no_tensors_are_refused(tmp_path):
    make_model().save(tmp_path / "model.zip")
    for name in ("policy.pth", "pytorch_variables.pth", "actor.optimizer.pth"):
        bomb = io.BytesIO()
        th.save(Bomb(name), bomb)
        path = changed(tmp_path / "model.zip", files={name: bomb.getvalue()})
        with pytest.raises(ValueError, match="holds more than tensors"):
            MTSAC.load(path, safe=True)
        # SB3's way to load weights alone refuses them, too
        with pytest.raises(pickle.UnpicklingError):
            make_model().set_parameters(path)


@pytest.fixture
def bomb_module(tmp_path, monkeypatch):
    """Name of a module whose import leaves a file behind, which this makes sure of at the end."""
    mark = tmp_path / "imported"
    (tmp_path / "bomb_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "bomb_module"
    assert not mark.exists() and "bomb_module" not in sys.modules
    importlib.import_module("bomb_module")
    assert mark.exists()
    del sys.modules["bomb_module"]


@pytest.mark.parametrize(
    "name",
    [
        *("env", "eval_env", "_logger", "logger", "replay_buffer", "_vec_normalize_env", "rollout_buffer_class", "device"),
        *("actor", "policy", "policy_aliases", "predict", "__class__", "__dict__", "something_new"),
    ],
)
def test_plain_names_that_models_do_not_save_are_refused(name, bomb_module, tmp_path):
    make_model().save(tmp_path / "model.zip")
    for value in (f"{bomb_module}:Foo-v0", f"{bomb_module}.Foo", 3, {"class": f"{bomb_module}.Foo"}):
        with pytest.raises(ValueError, match=f"refused {name} of .*changed.zip"):
            MTSAC.load(changed(tmp_path / "model.zip", {name: value}), safe=True)


def test_a_plain_name_of_an_environment_runs_code_without_safe(tmp_path, monkeypatch):
    """So that the test above refuses what is dangerous."""
    make_model().save(tmp_path / "model.zip")
    (tmp_path / "live_bomb_module.py").write_text("raise InterruptedError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InterruptedError, match="imported"):
        MTSAC.load(changed(tmp_path / "model.zip", {"env": "live_bomb_module:Foo-v0"}))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_plain_string_of_a_file_is_imported(algorithm, bomb_module, tmp_path):
    """In the place of each entry of a file: replaced by a value made here, or refused."""
    make_model(algorithm).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = list(json.loads(archive.read("data")))
    replaced = []
    for name in names:
        path = changed(tmp_path / "model.zip", {name: f"{bomb_module}:Foo-v0"})
        try:
            loaded = algorithm.load(path, env=make_env(), safe=True)
        except ValueError as error:
            assert name in str(error)
        else:
            assert bomb_module not in str(getattr(loaded, name))
            replaced.append(name)
    assert {"tensorboard_log", "lr_schedule", "policy_class", "observation_space", "train_freq"} <= set(replaced)
    assert not {"n_heads", "policy_kwargs", "replay_buffer_kwargs", "task_names", "seed", "gamma"} & set(replaced)


def test_where_to_log_is_not_for_the_file_to_say(tmp_path):
    make_model(tensorboard_log=str(tmp_path / "of the file")).save(tmp_path / "model.zip")
    assert MTSAC.load(tmp_path / "model.zip", safe=True).tensorboard_log is None
    own = str(tmp_path / "own")
    assert MTSAC.load(tmp_path / "model.zip", safe=True, tensorboard_log=own).tensorboard_log == own


@pytest.mark.parametrize(
    ("name", "value"),
    [("on_nonfinite", "ignore"), ("gamma", "0.9"), ("n_envs", 0), ("num_timesteps", float("nan")), ("task_names", [1])],
)
def test_plain_values_that_no_model_has_are_refused(name, value, tmp_path):
    make_model().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=f"changed.zip: .*{name} must be"):
        MTSAC.load(changed(tmp_path / "model.zip", {name: value}), safe=True)


BOX = {"shape": [7], "dtype": "float32", "low": -1.0, "high": 1.0}


@pytest.mark.parametrize(
    "plain",
    [
        {"observation_space": value}
        for value in (
            *(3, "Box", [], {}, {"dict": 3}, {"dict": {"a": None}}),
            *({**BOX, "shape": "ab"}, {**BOX, "shape": [-1]}, {**BOX, "dtype": "no_type"}, {**BOX, "dtype": "O"}),
            *({**BOX, "low": "a"}, {**BOX, "low": [1, 2]}, {**BOX, "dtype": None}),
        )
    ]
    + [{"train_freq": value} for value in (3, [1], [1, "year"], ["a", "step"], [0, "step"], {"a": 1})]
    + [{"policy_class": ["MlpPolicy"]}, {"replay_buffer_class": {}}],
)
def test_malformed_descriptions_name_the_file(plain, tmp_path):
    make_model().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"safe=True .* of .*changed.zip"):
        MTSAC.load(changed(tmp_path / "model.zip", {"plain_settings": plain}), safe=True)


def test_damaged_files_are_named(tmp_path):
    make_model().save(tmp_path / "model.zip")
    content = (tmp_path / "model.zip").read_bytes()
    for name, cut in (("half.zip", len(content) // 2), ("empty.zip", 0)):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(ValueError, match=f"whole model file, got .*{name}"):
            MTSAC.load(tmp_path / name, safe=True)
    with pytest.raises(FileNotFoundError):
        MTSAC.load(tmp_path / "none", safe=True)


def test_what_is_refused_can_be_given(tmp_path):
    model = make_model(learning_rate=lambda progress: 1e-3 * progress, policy_kwargs=dict(activation_fn=th.nn.Tanh))
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="refused learning_rate, policy_kwargs"):
        MTSAC.load(tmp_path / "model.zip", safe=True)
    loaded = MTSAC.load(tmp_path / "model.zip", safe=True, learning_rate=1e-4, policy_kwargs=model.policy_kwargs)
    assert loaded.lr_schedule(0.5) == 1e-4
    obs = model.observation_space.sample()
    obs[-3:] = [1, 0, 0]
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_files_without_plain_descriptions_need_more_arguments(tmp_path):
    model = make_model()
    model.save(tmp_path / "model.zip")
    path = changed(tmp_path / "model.zip", {"plain_settings": None})
    with pytest.raises(
        ValueError, match="refused action_space, observation_space, policy_class, replay_buffer_class, train_freq"
    ):
        MTSAC.load(path, safe=True)
    loaded = MTSAC.load(
        path,
        env=make_env(),
        safe=True,
        policy_class=type(model.policy),
        replay_buffer_class=model.replay_buffer_class,
        train_freq=model.train_freq,
    )
    assert all(th.equal(value, parameters_of(model)[name]) for name, value in parameters_of(loaded).items())


def test_another_environment_is_still_refused(tmp_path):
    make_model(CMTASAC).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="env must have the model's num_tasks=3, got one with num_tasks=2"):
        CMTASAC.load(tmp_path / "model.zip", env=make_env(2), safe=True)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([-0.1, 2], np.float32), np.array([1 / 3, np.inf], np.float32)),
        spaces.Box(0, 255, (4, 4, 1), np.uint8),
        spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 1, (1,), np.float64)}),
    ],
)
def test_plain_spaces(space):
    plain = json.loads(json.dumps(space_to_plain(space)))
    assert space_from_plain(plain) == space
    assert space_to_plain(spaces.Discrete(3)) is space_to_plain(spaces.Dict({"a": spaces.Discrete(3)})) is None
