"""
Bad input is refused where it is given: every argument of the five algorithms, of their policies, buffers and environments,
and every key of the hyperparameter files, with values of all kinds. Either 50 steps of training work, and leave finite
parameters, or there is a ValueError or TypeError at construction that names the argument.
"""

import contextlib
import importlib
import inspect
import io
import math
import re
import tempfile
import typing
import warnings
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rl_zoo3.exp_manager
import torch as th
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from torch import nn

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import TaskSuccessCallback
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.vec_env import VecTaskNormalize, make_multi_task_vec_env
from sb3_mtrl.zoo.algorithms import ALGORITHMS as ZOO_ALGORITHMS
from sb3_mtrl.zoo.checks import check_hyperparams
from sb3_mtrl.zoo.utils import hyperparams_path
from tests.models import ALGORITHMS, NUM_TASKS, make_env
from tests.test_properties import share_of_examples
from tests.test_zoo import ENV_ID

N_STEPS = 50
# No value so large that it would only cost memory or time
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 24, -1, -5, 0.0, 0.3, 1.0, 2.5, -0.5, 1e-12, math.nan, math.inf, -math.inf),
    *("", "auto", "auto_0.5", "auto_-1", "autoo", "nonsense", "1", "uniform", "normal", "MlpPolicy", "cpu", "cuda:x"),
    *([], [8], [0], [-3], [1.5], (), (1, "step"), (0, "step"), (1, "episode"), (1, "hour"), (0.2, 0.3, 0.4), (-1.0, 1.0)),
    *({}, {"nonsense": 1}, {"obs": 2}, {"h": 0}, {"pi": [8]}, {"pi": [8], "qf": [4]}, {1: 2}),
    *(np.array([1.0, 2.0]), np.float32(0.5), np.int64(3), th.ones(2), object(), int, nn.Tanh, ReplayBuffer),
    *(MultiTaskReplayBuffer, TaskPrioritizedReplayBuffer, NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)), len),
]
POLICY_SIZES = {
    MTSAC: {},
    PaCoSAC: {},
    CMTASAC: dict(expert_arch=[4], feature_dim=4, lstm_hidden_dim=4, task_embedding_dim=4, task_encoder_arch=[4]),
    TSACSAC: {},
    STARSSAC: dict(unique_arch=[4]),
}
BASE = dict(batch_size=12, buffer_size=120, learning_starts=9, device="cpu", seed=0)


def arguments_of(function: Callable, *left_out: str) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", *left_out)]


def mutations_of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One argument at a time, or two."""
    one = st.tuples(st.sampled_from(names), st.sampled_from(range(len(VALUES))))
    return st.lists(one, min_size=1, max_size=2, unique_by=lambda pair: pair[0]).map(
        lambda pairs: {name: VALUES[index] for name, index in pairs}
    )


def train_or_refuse(make: Callable[[], Any], mutation: dict[str, Any]) -> None:
    """
    :param make: Makes the model
    :param mutation: The arguments that may be bad; a key of a dictionary among them may be named in its place
    """
    names = [*mutation, *(str(key) for value in mutation.values() if isinstance(value, dict) for key in value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = make()
        except (ValueError, TypeError) as error:
            assert_names_one(error, names)
            return
        if is_number_above(mutation.get("learning_rate"), 1):
            return  # a legal way to diverge
        model.learn(N_STEPS)
    assert model.num_timesteps >= N_STEPS
    assert all(parameter.isfinite().all() for parameter in model.policy.state_dict().values()), mutation


def assert_names_one(error: Exception, names: list[str]) -> None:
    assert any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names), f"none of {names} is named: {error}"


def is_number_above(value: Any, bound: float) -> bool:
    return isinstance(value, Real) and value > bound


def make_fuzzed(algorithm: type[MTSAC], **kwargs: Any) -> MTSAC:
    settings = {"policy": "MlpPolicy", "env": make_env(horizon=7), **BASE, **kwargs}
    if "policy_kwargs" not in kwargs:
        settings["policy_kwargs"] = {"net_arch": [8], **POLICY_SIZES[algorithm]}
    return algorithm(**settings)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_algorithm_arguments(algorithm, data):
    # Full-size networks, as policy_kwargs=None would build, only take their time
    names = arguments_of(algorithm, "env", "_init_setup_model", "tensorboard_log", "policy_kwargs")
    mutation = data.draw(mutations_of(names))
    train_or_refuse(lambda: make_fuzzed(algorithm, **mutation), mutation)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@share_of_examples(2)
@given(data=st.data())
def test_policy_arguments(algorithm, data):
    names = arguments_of(
        algorithm.policy_aliases["MlpPolicy"], "observation_space", "action_space", "lr_schedule", "args", "kwargs"
    )
    mutation = data.draw(mutations_of([*names, "nonsense"]))
    policy_kwargs = {"net_arch": [8], **POLICY_SIZES[algorithm], **mutation}
    train_or_refuse(lambda: make_fuzzed(algorithm, policy_kwargs=policy_kwargs), mutation)


@pytest.mark.parametrize("buffer_class", [MultiTaskReplayBuffer, TaskPrioritizedReplayBuffer])
@share_of_examples(2)
@given(data=st.data(), algorithm=st.sampled_from(ALGORITHMS))
def test_buffer_arguments(buffer_class, data, algorithm):
    passed = ("buffer_size", "observation_space", "action_space", "device", "n_envs", "optimize_memory_usage")
    mutation = data.draw(mutations_of([*arguments_of(buffer_class, *passed), "nonsense"]))
    # Where two arguments do not fit, one of the algorithm's may be named
    train_or_refuse(
        lambda: make_fuzzed(algorithm, replay_buffer_class=buffer_class, replay_buffer_kwargs=mutation),
        {**mutation, "batch_size": None},
    )


@share_of_examples(2)
@given(mutation=mutations_of([*arguments_of(make_multi_task_vec_env, "monitor_dir"), "nonsense"]), n_envs=st.integers(1, 2))
def test_environment_makers(mutation, n_envs):
    def make() -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # of a folder, which they name
            make_multi_task_vec_env(**{"env_id": "MT3", "n_envs": n_envs, **mutation}).close()

    if callable(mutation.get("env_id")) or callable(mutation.get("wrapper_class")):
        return  # any callable may make an environment: what it does is its own affair
    construct_or_refuse(make, mutation)


@share_of_examples(2)
@given(mutation=mutations_of([*arguments_of(VecTaskNormalize, "venv", "norm_obs_keys"), "nonsense"]))
def test_normalisation_arguments(mutation):
    def make() -> None:
        env = VecTaskNormalize(make_env(), **mutation)
        env.reset()
        obs, rewards, _, _ = env.step(np.zeros((NUM_TASKS, 2), np.float32))
        assert np.isfinite(obs).all() and np.isfinite(rewards).all()

    construct_or_refuse(make, mutation)


def construct_or_refuse(make: Callable[[], None], mutation: dict[str, Any]) -> None:
    names = [*mutation, *(str(key) for value in mutation.values() if isinstance(value, dict) for key in value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make()
        except (ValueError, TypeError) as error:
            assert_names_one(error, names)


# --------------------------------------------------------------- hyperparameter files

YAML_VALUES: list[Any] = [
    *(None, True, 0, 1, 24, -1, 0.3, 2.5, math.nan, math.inf, "", "nonsense", "lin_0.001", "lin_x", "auto", "num_tasks"),
    *("dict(net_arch=[8", "dict(net_arch=[no_such_name])", "dict(net_arch=[8])", "no.such.Module", "sb3_mtrl.NoSuchClass"),
    *([], [1, "step"], [1, 2, 3], ["nonsense"], {}, {"nonsense": 1}, {"a": 1, "b": 2}),
]
SMALL = dict(
    n_envs=3,
    buffer_size=300,
    learning_starts=9,
    batch_size=12,
    policy_kwargs="dict(net_arch=[8])",
    callback=["sb3_mtrl.common.callbacks.TaskSuccessCallback"],
)


def misspell(key: str, place: int) -> str:
    return key[: place % len(key)] + key[place % len(key) + 1 :]


@pytest.mark.parametrize("algo", list(ZOO_ALGORITHMS))
@share_of_examples(2)
@given(data=st.data())
def test_hyperparameter_files(algo, data):
    """Mutated copies of the files that come with the package, in RL Zoo's experiment manager."""
    content = yaml.safe_load(hyperparams_path(algo).read_text())
    entry = {**content[data.draw(st.sampled_from(sorted(content)))], **SMALL, "n_timesteps": N_STEPS}
    entry.pop("monitor_kwargs", None)  # of the infos of Meta-World
    extra = ["normalize", "vec_env", "n_workers", "env_kwargs", "noise_type", "env_wrapper", "frame_stack"]
    key = data.draw(st.sampled_from([*entry, *extra, "batch_size_per_task"]))
    kind = data.draw(st.sampled_from(["remove", "replace", "replace", "misspell"]))
    names = [key]
    if key == "batch_size_per_task":
        del entry["batch_size"]
    if kind == "remove":
        entry.pop(key, None)
    elif kind == "replace":
        entry[key] = data.draw(st.sampled_from(YAML_VALUES))
        # The arguments in a dictionary, or in the code of one
        names += entry[key] if isinstance(entry[key], dict) else re.findall(r"(\w+)=", str(entry[key]))
    else:
        names.append(misspell(key, data.draw(st.integers(0, 20))))
        entry[names[-1]] = entry.pop(key, 1)
    if {"n_envs", "vec_env", "n_workers"} & {*names} and kind == "replace" and entry[key] == 24:
        return  # many processes only take their time
    if is_number_above(entry.get("learning_rate"), 1):
        return  # a legal way to diverge
    refuse_or_train_file(algo, {ENV_ID: entry}, names)


def setup_file(folder: Path, algo: str, content: Any, **hyperparams: Any) -> tuple[Any, Any]:
    """The manager and the model that a hyperparameter file, with what is given by ``-params``, makes."""
    path = folder / "hyperparams.yml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    importlib.import_module("tests.tiny_zoo_envs")
    manager = rl_zoo3.exp_manager.ExperimentManager(
        SimpleNamespace(),
        algo,
        ENV_ID,
        str(folder),
        n_timesteps=N_STEPS,
        config=str(path),
        hyperparams=hyperparams,
        eval_freq=-1,
        log_interval=-1,  # as rl_zoo3.train has it
        device="cpu",
    )
    model, _ = manager.setup_experiment()
    return manager, model


def refuse_or_train_file(algo: str, content: Any, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            manager, model = setup_file(Path(folder), algo, content)
        except (ValueError, TypeError) as error:
            assert_names_one(error, names)
            return
        manager.learn(model)
        assert model.num_timesteps >= N_STEPS


# ------------------------------------------------------------- what this has found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(target_update_interval=0), "target_update_interval must be at least 1, got 0"),  # a division in the first update
        (dict(stats_window_size=0), "stats_window_size must be at least 1, got 0"),
        (dict(gradient_steps=1.5), "gradient_steps must be an integer and at least -1, got 1.5"),
        (dict(buffer_size=1e3), "buffer_size must be an integer and at least 1, got 1000.0"),
        (dict(train_freq=(1, "episode")), "train_freq must be in steps with 3 sub-environments, got"),  # an assertion in learn
        (dict(train_freq=0), "train_freq must be at least 1, got 0"),
        (dict(action_noise="normal"), "action_noise must be an ActionNoise or None, got 'normal'"),
        (dict(tau=1.5), r"tau must be in \[0, 1\], got 1.5"),  # trained on, further away from the target each time
        (dict(gamma=math.nan), r"gamma must be in \[0, 1\], got nan"),
        (dict(ent_coef=-1), r"ent_coef \(if not 'auto'\) must be at least 0, got -1"),
        (dict(ent_coef="autoo"), r"ent_coef \(if not 'auto'\) must be a number and at least 0, got 'autoo'"),  # was "auto"
        (dict(ent_coef="auto_-1"), "the start of ent_coef, behind 'auto_', must be above 0, got -1.0"),
        (dict(target_entropy=math.inf), "target_entropy .* must be finite, got inf"),
        (dict(learning_rate=math.inf), "learning_rate must be at least 0 and finite, got inf"),
        (dict(learning_rate=len), "learning_rate must be a number or a function of the remaining progress, got"),
        (dict(min_ent_coef=0.5, max_ent_coef=0.1), "min_ent_coef must be at most max_ent_coef=0.1, got 0.5"),
        (dict(use_sde="no"), "use_sde must be True or False, got 'no'"),  # was True
        (dict(device="gpu"), "device must be 'auto' or a device of PyTorch, got 'gpu'"),
        (dict(policy=None), r"policy must be .*'MlpPolicy'.*, got None"),
        (
            dict(train_freq=[1, "step"]),
            r"train_freq must be an integer or a tuple like \(1, 'step'\) or \(1, 'episode'\), got \[",
        ),
        (dict(learning_starts=math.nan), "learning_starts must be finite, got nan"),
        (dict(replay_buffer_class="MultiTaskReplayBuffer"), "replay_buffer_class must be a subclass of ReplayBuffer or None"),
        (dict(replay_buffer_kwargs={1: 2}), "replay_buffer_kwargs must be a dict from names of arguments to values or None"),
        (dict(policy_kwargs=dict(net_arch=[0])), "each layer width in net_arch must be at least 1, got 0"),
        (dict(policy_kwargs=dict(activation_fn=int)), "activation_fn must be a subclass of Module, got <class 'int'>"),
        (dict(policy_kwargs=dict(net_arch=[8], n_critics=0)), "n_critics must be at least 1, got 0"),
        (dict(policy_kwargs=dict(net_arch={"pi": [8]})), "net_arch must be a list, or a dict of the lists 'pi' and 'qf'"),
    ],
)
def test_refused_at_construction(algorithm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_fuzzed(algorithm, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(learning_starts=-1),
        dict(max_ent_coef=math.inf),
        dict(use_sde=True, policy_kwargs=dict(net_arch=[8], clip_mean=-1.0)),
        dict(policy_kwargs=dict(net_arch={"pi": [8], "qf": [8], "vf": [8]})),
        dict(
            replay_buffer_class=TaskPrioritizedReplayBuffer,
            replay_buffer_kwargs=dict(task_priority="softmax", temperature=math.inf),
        ),
    ],
)
def test_values_with_a_meaning_are_taken(kwargs):
    model = make_fuzzed(MTSAC, **kwargs)
    if model.replay_buffer_kwargs:
        model.replay_buffer.set_task_performance(np.array([0.0, 0.5, 1.0]))
    model.learn(N_STEPS)
    assert model.num_timesteps >= N_STEPS
    if model.replay_buffer_kwargs:
        # exp((1 - rate) / inf) is 1 for every task
        np.testing.assert_allclose(model.replay_buffer.task_priorities, 1 / NUM_TASKS)


INTEGERS = dict(
    buffer_size=120,
    learning_starts=9,
    batch_size=12,
    train_freq=2,
    gradient_steps=1,
    n_steps=1,
    target_update_interval=1,
    sde_sample_freq=-1,
    num_tasks=NUM_TASKS,
    stats_window_size=5,
    verbose=0,
    seed=1,
    n_param_sets=2,
    n_experts=2,
    unique_dim=4,
    performance_window=3,
)


@pytest.mark.parametrize("convert", [np.int64, np.array])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numbers_of_numpy_are_numbers(algorithm, convert, tmp_path):
    """Every integer argument, and some others."""
    parameters = inspect.signature(algorithm).parameters.values()
    names = [p.name for p in parameters if p.annotation is int or int in typing.get_args(p.annotation)]
    integers = {name: convert(INTEGERS[name]) for name in names}
    model = make_fuzzed(algorithm, learning_rate=np.float32(1e-3), tau=convert(1), target_entropy=convert(-2), **integers)
    model.learn(N_STEPS, TaskSuccessCallback(convert(3)))
    attributes = {**vars(model), "train_freq": model.train_freq.frequency, "stats_window_size": model._stats_window_size}
    assert {name: type(attributes[name]) for name in names} == dict.fromkeys(names, int)
    # NumPy's would have been pickled
    model.save(tmp_path / "model.zip")
    assert algorithm.load(tmp_path / "model.zip", safe=True, learning_rate=1e-3, device="cpu").seed == 1


@pytest.mark.parametrize("convert", [np.int64, np.array])
def test_numbers_of_numpy_are_numbers_of_buffers(convert):
    names = ("performance_window", "rows_per_group", "min_rows_per_task", "num_tasks")
    settings = dict(zip(names, map(convert, (3, 2, 2, NUM_TASKS)), strict=True))
    model = make_fuzzed(MTSAC, replay_buffer_class=TaskPrioritizedReplayBuffer, replay_buffer_kwargs=settings)
    model.learn(N_STEPS)
    assert all(type(getattr(model.replay_buffer, name)) is int for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bufer_size": 300}, "'bufer_size' is no hyperparameter of MTSAC, did you mean 'buffer_size'?"),
        ({"seed": 1}, "seed must be given on the command line, not among the hyperparameters, got 1"),
        ({"n_timesteps": "lots"}, "n_timesteps must be a number and above 0, got 'lots'"),
        ({"n_envs": 0}, "n_envs must be at least 1, got 0"),
        ({"learning_rate": "lin0.1"}, "learning_rate must be a number or 'lin_<number>', got 'lin0.1'"),
        (
            {"batch_size": None, "batch_size_per_task": "8"},
            "batch_size_per_task must be an integer and at least 1 or None, got '8'",
        ),
        ({"policy_kwargs": "dict(net_arch=[8"}, "policy_kwargs must be Python code that RL Zoo can evaluate"),
        ({"normalize": "dict("}, "normalize must be Python code that RL Zoo can evaluate"),
        ({"policy_kwargs": "dict(net_arch=[1 // 0])"}, "policy_kwargs must be Python code that RL Zoo can evaluate: integer"),
        ({"policy_kwargs": "dict(net_arch=[eight])"}, "policy_kwargs must be Python code that RL Zoo can evaluate: name"),
        ({"batch_size_per_task": 8}, "only one of batch_size and batch_size_per_task must be given in the entry"),
        ({"learning_rate": "lin_1_2"}, "learning_rate must be a number or 'lin_<number>', got 'lin_1_2'"),
        ({"learning_rate": True}, "learning_rate must be a number and at least 0, got True"),
        ({"noise_std": 0.1}, "noise_std must not be given without noise_type, got 0.1"),
        ({"noise_type": None, "noise_std": 0.1}, "noise_type must be one of 'normal', 'ornstein-uhlenbeck', got None"),
        ({"noise_type": "normal", "noise_std": [0.1, -0.1]}, "noise_std must be at least 0, got -0.1"),
        ({"vec_env_wrapper": [None]}, "vec_env_wrapper must be names of classes, got None"),
        ({"callback": ["sb3_mtrl.common.callbacks"]}, "callback must be names of classes, got 'sb3_mtrl.common.callbacks'"),
        ({"tuning_objective": ["success_rate"]}, "tuning_objective must be one of 'success_rate', 'mean_reward', got ['"),
        ({"policy": "no.such.Policy"}, "policy must name classes that can be imported, got 'no.such.Policy'"),
        ({"callback": ["TaskSuccessCallback"]}, "callback must be names of classes with their module"),
        ({"callback": [{"a.B": {}, "c.D": {}}]}, "callback must be classes, each as 'name' or as 'name: {argument: value}'"),
        ({"vec_env_wrapper": "sb3_mtrl.NoSuchClass"}, "vec_env_wrapper must name classes that can be imported"),
        ({"noise_type": "normal"}, "noise_std must be given with noise_type, got only noise_type='normal'"),
        ({"env_kwargs": None}, "env_kwargs must be a mapping, got None"),
    ],
)
def test_refused_hyperparameters(changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        setup_file(tmp_path, "mtsac", {ENV_ID: {"policy": "MlpPolicy", "n_timesteps": 50, **SMALL, **changes}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("PointTasks-v0: [", "must be YAML, got"),
        ("- 1\n- 2", "must be a mapping from environments to hyperparameters, got [1, 2]"),
        ("PointTasks-v0:", "the entry 'PointTasks-v0' of"),
        ("PointTasks-v0: {n_timesteps: 50}", "policy must be among the hyperparameters, got only n_timesteps"),
    ],
)
def test_refused_hyperparameter_files(content, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        setup_file(tmp_path, "mtsac", content)


FILE: dict[str, Any] = {"policy": "MlpPolicy", "n_timesteps": 50, **SMALL}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize": None},
        {"monitor_kwargs": None},
        {"learning_rate": "linear_0.001"},
        {"noise_type": "normal", "noise_std": [0.1, 0.2]},  # of the two actions
        {"learning_starts": -1},
        {"batch_size_per_task": None},
        {"callback": None, "env_wrapper": None},
    ],
)
def test_accepted_hyperparameters(changes, tmp_path):
    manager, model = setup_file(tmp_path, "mtsac", {ENV_ID: {**FILE, **changes}})
    manager.learn(model)
    assert model.num_timesteps >= N_STEPS and model.batch_size == 12


def test_the_batch_size_of_the_command_line_wins(tmp_path):
    """The file names the one kind, the command line the other."""
    assert setup_file(tmp_path, "mtsac", {ENV_ID: FILE}, batch_size_per_task=5)[1].batch_size == 5 * NUM_TASKS
    per_task = {name: value for name, value in FILE.items() if name != "batch_size"} | {"batch_size_per_task": 8}
    assert setup_file(tmp_path, "mtsac", {ENV_ID: per_task}, batch_size=18)[1].batch_size == 18
    with pytest.raises(ValueError, match="only one of batch_size and batch_size_per_task must be given in -params, got"):
        setup_file(tmp_path, "mtsac", {ENV_ID: FILE}, batch_size=12, batch_size_per_task=4)


class BrokenCallback(BaseCallback):
    def __init__(self) -> None:
        raise NameError("no_such_sensor")

    def _on_step(self) -> bool:
        return True


def test_errors_of_callbacks_are_not_blamed_on_other_keys(tmp_path):
    with pytest.raises(NameError, match="no_such_sensor"):
        setup_file(tmp_path, "mtsac", {ENV_ID: {**FILE, "callback": ["tests.test_fuzz.BrokenCallback"]}})


class OwnMTSAC(MTSAC):
    """A subclass that takes an argument of its own, and passes on the others."""

    def __init__(self, *args: Any, own_argument: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_argument = own_argument


def test_arguments_of_a_plugged_in_subclass(tmp_path, monkeypatch):
    monkeypatch.setitem(ALGOS, "mtsac", OwnMTSAC)
    _, model = setup_file(tmp_path, "mtsac", {ENV_ID: {**FILE, "own_argument": 3, "tau": 0.1}})
    assert (model.own_argument, model.tau) == (3, 0.1)
    with pytest.raises(ValueError, match="'taus' is no hyperparameter of OwnMTSAC, did you mean 'tau'"):
        setup_file(tmp_path, "mtsac", {ENV_ID: {**FILE, "taus": 0.1}})


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        # As RL Zoo has it: it takes classes for wrappers alone, and objects for callbacks alone
        ("policy", "MlpPolicy", MTSAC.policy_aliases["MlpPolicy"]),
        ("vec_env_wrapper", VecTaskNormalize, TaskSuccessCallback()),
        ("callback", TaskSuccessCallback(), TaskSuccessCallback),
    ],
)
def test_classes_and_objects_in_hyperparameters(key, good, bad):
    check_hyperparams(MTSAC, {**FILE, key: good})
    with pytest.raises(ValueError, match=f"{key} must be .*name"):
        check_hyperparams(MTSAC, {**FILE, key: bad})
