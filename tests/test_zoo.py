"""RL Zoo: the literal commands as subprocesses, the start-up hook, the hyperparameter files, the manager and tuning."""

import contextlib
import csv
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.utils
import torch as th
import yaml
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mtrl
import sb3_mtrl.train
import sb3_mtrl.zoo
from sb3_mtrl import PaCoSAC
from sb3_mtrl.common.vec_env import SharedMemoryVecEnv, VecTaskAssignment, VecTaskNormalize
from sb3_mtrl.train import merge_arguments
from sb3_mtrl.zoo.algorithms import ALGORITHMS
from sb3_mtrl.zoo.exp_manager import MultiTaskExperimentMixin, MultiTaskTrialEvalCallback
from sb3_mtrl.zoo.report import VecTaskReport
from sb3_mtrl.zoo.utils import hyperparams_path
from tests.tiny_envs import PointTasksEnv

ROOT = Path(__file__).parent.parent
ENV_ID = "PointTasks-v0"  # three tasks, episodes of 20 steps
TINY_ENV = ["--env", ENV_ID, "--gym-packages", "tests.tiny_zoo_envs"]
TINY_NETS = ["policy_kwargs:dict(net_arch=[8])", "batch_size:12"]

# With the hook this was done when RL Zoo was imported above; it changes nothing then
sb3_mtrl.zoo.register()


def run_module(module: str, *arguments: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """``python -m module ...`` in a fresh interpreter, as a user would type it."""
    return run_python("-m", module, *arguments, cwd=cwd, check=check, **env)


def run_python(*arguments: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SB3_MTRL_NO_ZOO_HOOK": "", **env}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def zoo_train(*arguments: str) -> str:
    """``rl_zoo3.train`` in this process, which saves the imports; returns what it printed."""
    train = importlib.import_module("rl_zoo3.train").train
    if ENV_ID in gym.registry:
        del gym.registry[ENV_ID]
    sys.modules.pop("tests.tiny_zoo_envs", None)
    output = io.StringIO()
    with mock.patch.object(sys, "argv", ["train.py", *arguments]), contextlib.redirect_stdout(output):
        train()
    return output.getvalue()


def manager_of(algo: str, env_id: str = ENV_ID, **kwargs) -> rl_zoo3.exp_manager.ExperimentManager:
    importlib.import_module("tests.tiny_zoo_envs")
    return rl_zoo3.exp_manager.ExperimentManager(SimpleNamespace(), algo, env_id, "logs", n_timesteps=100, **kwargs)


def assert_even(path: Path, num_tasks: int) -> None:
    """Every evaluation of evaluations.npz has equally many episodes of each task."""
    with np.load(path) as data:
        assert len(data["timesteps"]) > 0
        counts = np.bincount(data["task_ids"], minlength=num_tasks)
        assert counts.min() == counts.max() > 0
        assert data["results"].shape == (len(data["timesteps"]), counts.sum())


# ------------------------------------------------------- the literal commands


@pytest.mark.expensive
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_train_and_enjoy_metaworld(algo: str, tmp_path: Path) -> None:
    """Real Meta-World tasks, no folders and no files named: what enjoy reads is what train wrote."""
    env_id = "MetaWorld-MT3-short-v3"
    tasks = ("reach-v3", "push-v3", "peg-insert-side-v3")
    arguments = ("--algo", algo, "--env", env_id, "-n", "150", "--eval-freq", "75", "--eval-episodes", "3", "-P")
    trained = run_module("rl_zoo3.train", *arguments, "-params", *TINY_NETS, cwd=tmp_path).stdout

    assert f"hyperparams/{algo}.yml" in trained
    assert "after 150 steps" in trained and all(re.search(rf"^{task} +\|", trained, re.M) for task in tasks)
    folder = tmp_path / "logs" / algo / f"{env_id}_1"
    assert (folder / "best_model.zip").is_file() and (folder / f"{env_id}.zip").is_file()
    assert_even(folder / "evaluations.npz", num_tasks=3)

    enjoyed = run_module("rl_zoo3.enjoy", "--algo", algo, "--env", env_id, "--no-render", "-n", "450", cwd=tmp_path).stdout
    assert "3 Episodes" in enjoyed  # 450 steps of 150
    assert all(re.search(rf"^{task} +\|", enjoyed, re.M) for task in tasks)


@pytest.mark.expensive
def test_tune_literally(tmp_path: Path) -> None:
    arguments = ("--algo", "pacosac", *TINY_ENV, "-n", "90", "-optimize", "--n-trials", "2", "--n-startup-trials", "2")
    tuned = run_module("rl_zoo3.train", *arguments, "--no-optim-plots", cwd=tmp_path).stdout
    assert "Number of finished trials:  2" in tuned
    (report,) = (tmp_path / "logs" / "pacosac").glob("report_*.csv")
    assert len(report.read_text().splitlines()) == 3  # heading and two trials


@pytest.mark.expensive
def test_subproc_save_and_resume(tmp_path: Path) -> None:
    common = ("--algo", "mtsac", *TINY_ENV, "--eval-freq", "-1")
    run_module(
        "rl_zoo3.train", *common, "-n", "120", "--vec-env", "subproc", "--save-replay-buffer",
        "-params", *TINY_NETS, "normalize:True", cwd=tmp_path,
    )  # fmt: skip
    agent = Path("logs") / "mtsac" / f"{ENV_ID}_1" / f"{ENV_ID}.zip"
    resumed = run_module(
        "rl_zoo3.train", *common, "-n", "60", "-i", str(agent), "-params", *TINY_NETS, "normalize:True", cwd=tmp_path
    ).stdout
    assert "Loading replay buffer" in resumed and "no warm-up" in resumed
    assert "Loading saved VecNormalize stats" in resumed
    model = sb3_mtrl.MTSAC.load(tmp_path / "logs" / "mtsac" / f"{ENV_ID}_2" / f"{ENV_ID}.zip")
    # 40 vector steps of 3, of which 4 warm up (120 / 10 = 12 steps, and SB3 starts after them); then 20 without warm-up
    assert model._n_updates == (40 - 4) + 20


def test_ppo_is_what_it_was(tmp_path: Path) -> None:
    """The same training with and without the hook, to the last bit of the evaluations."""
    results = []
    for switch in ("0", "1"):
        folder = tmp_path / switch
        folder.mkdir()
        arguments = ("--algo", "ppo", "--env", "CartPole-v1", "-n", "128", "--eval-freq", "64", "--seed", "3")
        run = run_module(
            "rl_zoo3.train", *arguments, "-params", "n_envs:2", "n_steps:32", cwd=folder, SB3_MTRL_NO_ZOO_HOOK=switch
        )
        assert "rl_zoo3/hyperparams/ppo.yml" in run.stdout and "sb3_mtrl" not in run.stdout + run.stderr
        with np.load(folder / "logs" / "ppo" / "CartPole-v1_1" / "evaluations.npz") as data:
            results.append({name: data[name] for name in data})
    assert results[0].keys() == results[1].keys() == {"timesteps", "results", "ep_lengths"}
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])


def test_default_env_is_refused(tmp_path: Path) -> None:
    """CartPole is RL Zoo's default for --env."""
    run = run_module("rl_zoo3.train", "--algo", "pacosac", cwd=tmp_path, check=False)
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert "continuous actions" in message and "Discrete(2)" in message and "--env MetaWorld-MT10-v3" in message
    assert not (tmp_path / "logs").exists()


# --------------------------------------------------------------- start-up hook


def test_off_switch_and_fallback(tmp_path: Path) -> None:
    off = {"SB3_MTRL_NO_ZOO_HOOK": "1"}
    arguments = ("--algo", "mtsac", *TINY_ENV, "-n", "60", "--eval-freq", "-1", "-params", *TINY_NETS)
    refused = run_module("rl_zoo3.train", *arguments, cwd=tmp_path, check=False, **off)
    assert refused.returncode == 2 and "invalid choice: 'mtsac'" in refused.stderr
    run_module("sb3_mtrl.train", *arguments, cwd=tmp_path, **off)
    enjoy = ("--algo", "mtsac", *TINY_ENV, "--no-render", "-n", "60")
    assert re.search(r"^point-2 +\|", run_module("sb3_mtrl.enjoy", *enjoy, cwd=tmp_path, **off).stdout, re.M)


def test_broken_plugin_does_not_break_the_zoo(tmp_path: Path) -> None:
    package = tmp_path / "broken" / "sb3_mtrl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('half an installation')")
    run = run_module(
        "rl_zoo3.train", "--algo", "ppo", "--env", "CartPole-v1", "-n", "64", "--eval-freq", "-1",
        "-params", "n_envs:1", "n_steps:32", cwd=tmp_path, PYTHONPATH=str(package.parent),
    )  # fmt: skip
    assert "RuntimeWarning: sb3_mtrl could not register itself with rl_zoo3.utils" in run.stderr
    assert "half an installation" in run.stderr
    assert (tmp_path / "logs" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()


HOOK_SCRIPT = """
import importlib, importlib.util, os, pickle, sys, types

# A second plugin of the same making: each finder asks the other
spec = importlib.util.spec_from_file_location("other_hook", {hook!r})
other = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
patched = []
other._patch = lambda module: patched.append(module.__name__)

import _sb3_mtrl_zoo_hook as hook
hook.install()
hook.install()
other.install()
finders = [type(finder) for finder in sys.meta_path]
assert finders.count(hook.ZooFinder) == 1 and finders.count(other.ZooFinder) == 1, finders
assert not {{"sb3_mtrl", "torch", "rl_zoo3"}} & set(sys.modules)

import rl_zoo3
import rl_zoo3.exp_manager as exp_manager
assert patched == ["rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"], patched
assert "pacosac" in rl_zoo3.ALGOS and "pacosac" in exp_manager.HYPERPARAMS_SAMPLER

# Reloading registers again, and the replaced class can still be pickled
importlib.reload(rl_zoo3.utils)
assert "pacosac" in rl_zoo3.utils.ALGOS
manager = exp_manager.ExperimentManager(types.SimpleNamespace(), "ppo", "CartPole-v1", "logs")
assert type(pickle.loads(pickle.dumps(manager))) is exp_manager.ExperimentManager
print("passed")
"""


def test_hook_guards(tmp_path: Path) -> None:
    """Two plugins of this kind, a second install, reload and pickle; nothing heavy is imported before RL Zoo is."""
    script = HOOK_SCRIPT.format(hook=str(ROOT / "startup" / "_sb3_mtrl_zoo_hook.py"))
    assert run_python("-c", script, cwd=tmp_path).stdout.strip() == "passed"


def test_startup_files_name_the_hook() -> None:
    line = (ROOT / "startup" / "sb3_mtrl_zoo.pth").read_text()
    assert line == "import _sb3_mtrl_zoo_hook; _sb3_mtrl_zoo_hook.install()\n"  # PEP 829's form
    module, function = (ROOT / "startup" / "sb3_mtrl_zoo.start").read_text().strip().split(":")
    assert (module, function) == ("_sb3_mtrl_zoo_hook", "install")


# ---------------------------------------------------------------- registration


def test_registration_adds_and_changes_nothing_else() -> None:
    utils, opt = rl_zoo3.utils, rl_zoo3.hyperparams_opt
    for name, entry in ALGORITHMS.items():
        assert utils.ALGOS[name] is entry.algorithm_class
        assert opt.HYPERPARAMS_SAMPLER[name] is entry.sampler and opt.HYPERPARAMS_CONVERTER[name] is entry.converter
    zoo_algorithms = set(utils.ALGOS) - set(ALGORITHMS)
    assert utils.ALGOS["sac"] is SAC and {"a2c", "ppo", "sac", "tqc"} <= zoo_algorithms
    for registry in (opt.HYPERPARAMS_SAMPLER, opt.HYPERPARAMS_CONVERTER):
        assert all(registry[name].__module__ == "rl_zoo3.hyperparams_opt" for name in set(registry) - set(ALGORITHMS))


def test_registration_twice_and_by_a_user() -> None:
    manager, create_test_env = rl_zoo3.exp_manager.ExperimentManager, rl_zoo3.utils.create_test_env
    sb3_mtrl.zoo.register()
    assert rl_zoo3.exp_manager.ExperimentManager is manager and rl_zoo3.utils.create_test_env is create_test_env
    assert rl_zoo3.create_test_env is create_test_env  # the copy in the package, which enjoy imports
    with mock.patch.dict(rl_zoo3.utils.ALGOS, {"pacosac": SAC}):
        sb3_mtrl.zoo.register()
        assert rl_zoo3.utils.ALGOS["pacosac"] is SAC  # who came first stays
    with pytest.raises(ValueError, match=r"module must be one of rl_zoo3\.utils.*got json"):
        sb3_mtrl.zoo.patch(importlib.import_module("json"))


def test_manager_of_other_algorithms_is_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = manager_of("sac", "Pendulum-v1", eval_freq=50, seed=0)
    assert isinstance(manager, MultiTaskExperimentMixin) and not manager.is_multi_task_algorithm
    assert Path(manager.config) == Path(rl_zoo3.exp_manager.__file__).parent / "hyperparams" / "sac.yml"
    manager.create_log_folder()
    manager.create_callbacks()
    (callback,) = manager.callbacks
    assert type(callback) is EvalCallback and callback.n_eval_episodes == 5
    assert pickle.loads(pickle.dumps(manager_of("sac", "Pendulum-v1"))).config == manager.config


@pytest.mark.parametrize(
    ("given", "n_timesteps", "episodes", "freq"),
    [
        # Five of each of the three tasks; RL Zoo's frequency, or a hundredth of the run where that is longer
        ([], 100_000, 15, 25_000),
        ([], 5_000_000, 15, 50_000),
        (["--eval-episodes", "5"], 5_000_000, 5, 50_000),
        (["--eval-ep=7", "--eval-freq", "-1"], 5_000_000, 7, -1),
        (["--eval-freq", "300", "--eval-env-kwargs", "horizon:5"], 5_000_000, 15, 300),
    ],
)
def test_evaluations_of_several_tasks(
    given: list[str], n_timesteps: int, episodes: int, freq: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("tests.tiny_zoo_envs")
    train = importlib.import_module("rl_zoo3.train")

    class Made(Exception):
        pass

    def manager_of_arguments(*arguments: str) -> rl_zoo3.exp_manager.ExperimentManager:
        """The manager that this command line makes; nothing is trained."""
        managers = []

        class Manager(rl_zoo3.exp_manager.ExperimentManager):
            def setup_experiment(self) -> None:
                managers.append(self)
                raise Made

        monkeypatch.setattr(train, "ExperimentManager", Manager)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "-f", str(tmp_path), "-n", str(n_timesteps), *given])
        with pytest.raises(Made):
            train.train()
        manager = managers[0]
        manager._preprocess_hyperparams(manager.read_hyperparameters()[0])
        return manager

    several = manager_of_arguments("--algo", "mtsac", "--env", ENV_ID)
    assert (several.n_eval_episodes, several.eval_freq) == (episodes, freq)
    assert several._evaluation_arguments == ["--eval-episodes", str(episodes), "--eval-freq", str(freq)]
    if not given:
        # RL Zoo's own defaults, for one task and for other algorithms
        for algo in ("mtsac", "sac"):
            single = manager_of_arguments("--algo", algo, "--env", "Pendulum-v1")
            assert (single.n_eval_episodes, single.eval_freq) == (5, 25_000)


def test_evaluations_chosen_in_python_stay() -> None:
    manager = manager_of("mtsac", n_eval_episodes=5, eval_freq=10)
    manager._preprocess_hyperparams(manager.read_hyperparameters()[0])
    assert (manager.n_eval_episodes, manager.eval_freq) == (5, 10)


def test_enjoy_asks_for_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no trained mtsac agent for MetaWorld-MT10-v3.*rl_zoo3.train --algo mtsac"):
        rl_zoo3.utils.get_model_path(0, "rl-trained-agents", "mtsac", "MetaWorld-MT10-v3")
    # Elsewhere, and for other algorithms, RL Zoo's own errors (on which enjoy turns to the hub)
    with pytest.raises(AssertionError):
        rl_zoo3.utils.get_model_path(1, "somewhere", "mtsac", "MetaWorld-MT10-v3")
    with pytest.raises(AssertionError):
        rl_zoo3.utils.get_model_path(1, "rl-trained-agents", "sac", "MetaWorld-MT10-v3")


# -------------------------------------------------------- hyperparameter files

FILES = {algo: yaml.safe_load(hyperparams_path(algo).read_text()) for algo in ALGORITHMS}


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_files_cover_all_environments(algo: str) -> None:
    registered = {env_id for env_id in gym.registry if env_id.startswith("MetaWorld-")}
    assert set(FILES[algo]) == registered | {"default"}


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no hyperparameters for dqn: looked for .*dqn.yml and "):
        hyperparams_path("dqn")


@pytest.mark.parametrize("env_id", [env_id for env_id in FILES["pacosac"] if "fixed" not in env_id])
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_entries_construct(algo: str, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry, with its own numbers but small nets, on an environment with as many tasks and no simulator."""
    suite = re.search(r"MT(\d+)", env_id)
    num_tasks = int(suite.group(1)) if suite else 4
    importlib.import_module("tests.tiny_zoo_envs")
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({ENV_ID: FILES[algo][env_id]}))
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        manager = rl_zoo3.exp_manager.ExperimentManager(
            SimpleNamespace(), algo, ENV_ID, "logs", eval_freq=-1, config=str(config), verbose=0, device="cpu",
            env_kwargs={"num_tasks": num_tasks}, hyperparams={"policy_kwargs": {"net_arch": [8]}, "buffer_size": 1000},
        )  # fmt: skip
        model, _ = manager.setup_experiment()
    assert type(model) is ALGORITHMS[algo].algorithm_class
    assert model.num_tasks == num_tasks and model.n_envs == num_tasks
    rows_per_task = 64 if "Quickstart" in env_id else 128
    assert model.batch_size == (256 if num_tasks == 1 else rows_per_task * num_tasks)
    # One update per vector step: what "one update per T environment steps" of the published set-ups means
    assert model.train_freq.frequency == 1 and model.gradient_steps == 1
    assert model.env.get_attr("assigned_tasks") == [(task,) for task in range(num_tasks)]


def test_presets_have_the_published_numbers() -> None:
    """Meta-World's maintainers' baselines (standard: 500 steps) and the PaCo paper (paper: 150 steps)."""
    standard, paper = FILES["pacosac"]["MetaWorld-MT10-v3"], FILES["pacosac"]["MetaWorld-MT10-short-v3"]
    for entry in (standard, paper):
        assert entry["n_timesteps"] == 2e7 and entry["batch_size"] == 1280 and entry["n_param_sets"] == 5
        assert entry["policy_kwargs"] == "dict(net_arch=[400, 400, 400])" and entry["learning_rate"] == 3e-4
        assert entry["ent_coef_learning_rate"] == 1e-4 and entry["maskout_threshold"] == 3000 and "max_grad_norm" not in entry
    assert (standard["buffer_size"], standard["learning_starts"]) == (10**6, 40_000)
    assert (paper["buffer_size"], paper["learning_starts"]) == (10**7, 15_000)
    mt50 = FILES["pacosac"]["MetaWorld-MT50-v3"]
    assert (mt50["n_timesteps"], mt50["batch_size"], mt50["n_param_sets"]) == (1e8, 6400, 20)
    assert FILES["mtsac"]["MetaWorld-MT50-v3"]["max_grad_norm"] == 1.0


# ------------------------------------------------------------------ the manager


def test_env_kwargs_of_the_file_reach_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RL Zoo 2.9.2 would evaluate with episodes of 20 steps; 7 are asked for. Two environments do not fit 3 tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf.yml").write_text(
        f"{ENV_ID}: {{policy: MlpPolicy, n_timesteps: 60, n_envs: 2, env_kwargs: {{horizon: 7}}, batch_size_per_task: 4}}"
    )
    output = zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-conf", "conf.yml", "--eval-freq", "30", "--n-eval-envs", "2", "--eval-episodes", "5",
        "--eval-env-kwargs", "tolerance:100", "-params", "policy_kwargs:dict(net_arch=[8])",
    )  # fmt: skip
    folder = tmp_path / "logs" / "mtsac" / f"{ENV_ID}_1"
    assert_even(folder / "evaluations.npz", num_tasks=3)
    with np.load(folder / "evaluations.npz") as data:
        assert np.all(data["ep_lengths"] == 7)
        assert np.all(data["successes"])  # within 100 of the goal is everywhere: --eval-env-kwargs came on top
        # Equal seeds before each evaluation: the same columns start from the same states
        assert data["task_ids"].tolist() == [0, 0, 1, 1, 2, 2]  # 5 episodes rounded up
    model = sb3_mtrl.MTSAC.load(folder / f"{ENV_ID}.zip")
    assert model.batch_size == 4 * 3
    assert "mean of tasks" in output


def test_evaluation_has_its_own_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the seed of the training, the evaluation environment starts from the same states."""
    monkeypatch.chdir(tmp_path)
    first_observations = []
    for seed in (0, 1):
        manager = manager_of("mtsac", seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):
            first_observations.append(
                [manager.create_envs(2, eval_env=eval_env, no_log=True).reset() for eval_env in (False, True)]
            )
    assert not np.array_equal(first_observations[0][0], first_observations[1][0])
    np.testing.assert_array_equal(first_observations[0][1], first_observations[1][1])


def test_short_runs_learn_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file warms up for 10000 steps and logs each 5000; a run of 90 has to do both."""
    monkeypatch.chdir(tmp_path)
    output = zoo_train("--algo", "pacosac", *TINY_ENV, "-n", "90", "--eval-freq", "-1", "-params", *TINY_NETS)
    assert "learning_starts=10000 is long for 90 steps, using 9" in output
    assert len(re.findall(r"total_timesteps +\| 90 ", output)) == 1 and "critic_loss" in output
    output = zoo_train(
        "--algo", "pacosac", *TINY_ENV, "-n", "90", "--eval-freq", "-1", "-params", *TINY_NETS, "learning_starts:80"
    )
    assert "is long for" not in output
    assert sb3_mtrl.PaCoSAC.load(f"logs/pacosac/{ENV_ID}_2/{ENV_ID}.zip").learning_starts == 80


def test_normalize_keeps_the_one_hot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-n", "60", "--eval-freq", "30", "-params", *TINY_NETS, "normalize:True", "gamma:0.9"
    )
    folder = tmp_path / "logs" / "mtsac" / f"{ENV_ID}_1" / ENV_ID
    hyperparams, stats_path = rl_zoo3.utils.get_saved_hyperparams(str(folder), test_mode=True)
    env = rl_zoo3.utils.create_test_env(ENV_ID, stats_path=stats_path, should_render=False, hyperparams=hyperparams)
    normalizer = env.venv
    assert isinstance(env, VecTaskReport) and isinstance(normalizer, VecTaskNormalize)
    assert not normalizer.training and not normalizer.norm_reward and normalizer.gamma == 0.9
    assert isinstance(normalizer.venv, VecTaskAssignment)
    obs = env.reset()
    assert obs[0, -3:].tolist() == [1.0, 0.0, 0.0] and not np.allclose(obs, normalizer.get_original_obs())
    env.close()


def test_random_baseline_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-n", "60", "--eval-freq", "40", "-params", *TINY_NETS, "random_baseline:True"
    )
    # Steps 40 (at 39: 13 vector steps of 3) and not 60: the table is of a new evaluation, of the final agent
    assert re.search(r"\| +after 60 steps +\| random policy", output)
    with pytest.raises(ValueError, match="tuning_objective must be one of 'success_rate', 'mean_reward', got 'speed'"):
        zoo_train("--algo", "mtsac", *TINY_ENV, "-n", "60", "-params", "tuning_objective:'speed'")


def test_report_of_enjoy(capsys: pytest.CaptureFixture[str]) -> None:
    """Episodes of two of three tasks, one with a success; single-task environments get no report."""
    importlib.import_module("tests.tiny_zoo_envs")
    env = rl_zoo3.utils.create_test_env(ENV_ID, should_render=False, hyperparams={}, env_kwargs={"tolerance": 1e-9})
    env.reset()
    for _ in range(45):  # two episodes of 20 steps, and 5 steps of the third
        env.step(np.zeros((1, 2), dtype=np.float32))
    env.close()
    env.close()  # VecEnvs may be closed twice; the report comes once
    table = capsys.readouterr().out
    assert table.count("mean of tasks") == 1 and "1 of 3 tasks had no complete episode" in table
    rows = dict(re.findall(r"^(point-\d) +\| +(\d+)%", table, re.M))
    assert rows == {"point-0": "0", "point-1": "0"}  # the point stays at the start, 1 away from the goals
    pendulum = rl_zoo3.utils.create_test_env("Pendulum-v1", should_render=False, hyperparams={})
    assert isinstance(pendulum, DummyVecEnv)
    pendulum.close()


# ----------------------------------------------------------------------- tuning


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_sampler_and_converter_agree(algo: str) -> None:
    """What a trial stores converts to what its sampler returned, and the algorithm takes it."""
    entry = ALGORITHMS[algo]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    manager = manager_of(algo)
    manager.num_tasks = 3
    for index in range(12):
        trial = study.ask()
        sampled = entry.sampler(trial, 2, 3, {})
        assert sampled == entry.converter(trial.params)
        assert sampled["gamma"] == pytest.approx(trial.user_attrs["gamma"]) and 0.97 <= sampled["gamma"] < 1
        assert sampled["batch_size_per_task"] == trial.user_attrs["batch_size_per_task"]
        assert -5 <= sampled["target_entropy"] <= -1  # 2 actions
        resolved = manager._resolve_num_tasks({"batch_size": 7, **sampled})
        assert resolved["batch_size"] == 3 * sampled["batch_size_per_task"] and "batch_size_per_task" not in resolved
        if resolved.get("w_init") == "onehot":
            assert resolved["n_param_sets"] == 3
        if index < 4:
            env = DummyVecEnv([PointTasksEnv])
            entry.algorithm_class("MlpPolicy", env, buffer_size=100, device="cpu", **resolved)


@pytest.mark.parametrize("objective", ["success_rate", "mean_reward"])
def test_objective(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 9 of the goal is everywhere: the success rate is exactly 1, the mean reward 20 steps of 1 - distance."""
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    output = zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-n", "30", "-optimize", "--n-trials", "1", "--n-evaluations", "2", "--no-optim-plots",
        "--optimization-log-path", "optimization", "--env-kwargs", "tolerance:9.0", "--storage", storage, "--study-name", "s",
        "-params", f"tuning_objective:'{objective}'",
    )  # fmt: skip
    trial = optuna.load_study(study_name="s", storage=storage).trials[0]
    path = tmp_path / "optimization" / "trial_0" / "evaluations.npz"
    assert_even(path, num_tasks=3)
    with np.load(path) as data:
        expected = {"success_rate": data["successes"], "mean_reward": data["results"]}[objective].mean(axis=1)
    assert "Number of finished trials:  1" in output
    assert list(trial.intermediate_values.values()) == pytest.approx(expected.tolist())  # what the pruner looks at
    assert trial.value == pytest.approx(expected[-1])
    assert (trial.value == 1.0) == (objective == "success_rate")

    # Number 0 of a study is a trial like any other
    output = zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-n", "30", "--eval-freq", "-1", "--storage", storage, "--study-name", "s",
        "--trial-id", "0", "-params", *TINY_NETS,
    )  # fmt: skip
    model = sb3_mtrl.MTSAC.load(f"logs/mtsac/{ENV_ID}_2/{ENV_ID}.zip")  # the tuning made a folder, too
    assert model.batch_size == 12  # what was asked for on the command line stays
    assert model.tau == trial.params["tau"] and model.target_entropy == trial.params["target_entropy"]


class StubTrial:
    """Prunes at the second report."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return len(self.reports) == 2


def test_pruning_stops_the_trial() -> None:
    env, eval_env = (VecTaskAssignment(DummyVecEnv([PointTasksEnv] * 3)) for _ in range(2))
    trial = StubTrial()
    callback = MultiTaskTrialEvalCallback(eval_env, trial, n_eval_episodes=3, eval_freq=10, verbose=0, warn=False)
    model = sb3_mtrl.MTSAC("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, learning_starts=1000, device="cpu")
    model.learn(300, callback=callback)
    assert callback.is_pruned and model.num_timesteps == 60  # 2 evaluations x 10 vector steps x 3 sub-environments
    assert [step for _, step in trial.reports] == [1, 2]
    assert callback.value == trial.reports[-1][0] == callback.last_success_rate


# ------------------------------------------------------- vector environments


def test_shared_memory_vec_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(MultiTaskExperimentMixin, "_maybe_normalize", lambda self, env, eval_env: made.append(env) or env)
    zoo_train(
        "--algo", "mtsac", *TINY_ENV, "-n", "30", "--eval-freq", "-1", "-params", *TINY_NETS,
        "vec_env:'shared'", "n_workers:2", "worker_timeout:60", "restart_workers:True",
    )  # fmt: skip
    (env,) = made
    assert isinstance(env, VecTaskAssignment)
    assert isinstance(env.venv, SharedMemoryVecEnv)
    assert env.venv.assignment == [[0, 2], [1]]
    assert (env.venv.worker_timeout, env.venv.restart_workers) == (60, True)
    assert env.venv.closed


@pytest.mark.parametrize(
    "hyperparams, message",
    [({"vec_env": "threads"}, "vec_env must be one of"), ({"n_workers": 2}, "n_workers is for vec_env='shared' alone")],
)
def test_wrong_vec_env(hyperparams: dict, message: str) -> None:
    manager = manager_of("mtsac")
    with pytest.raises(ValueError, match=message):
        manager._choose_vec_env(hyperparams.get("vec_env"), n_workers=hyperparams.get("n_workers"))


# ------------------------------------------------------------------------------------------------------------ continuing


def sb3_mtrl_train(*arguments: str) -> str:
    """``sb3_mtrl.train`` in this process."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", ["train.py", *arguments]), contextlib.redirect_stdout(output):
        with mock.patch.object(MultiTaskExperimentMixin, "resume_folder", None):
            sb3_mtrl.train.main()
    return output.getvalue()


@pytest.mark.parametrize("arguments", [["--help"], ["--algo", "mtsac", "-h", "--resume"]])
def test_help_tells_of_resume(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["train.py", *arguments]), pytest.raises(SystemExit) as ended:
        sb3_mtrl.train.main()
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "--resume [EXP_ID]" in output and "--save-freq" in output.split("RL Zoo's arguments:")[1]


def test_resume_goes_on_with_the_last_experiment(tmp_path: Path) -> None:
    def folder(name: str) -> list[str]:
        return ["--algo", "pacosac", "--env", ENV_ID, "-f", str(tmp_path / name)]

    arguments = ["--gym-packages", "tests.tiny_zoo_envs", "-n", "240", "--save-freq", "60", "--eval-freq", "90"]
    arguments += ["--eval-episodes", "3", "--num-threads", "1", "-params", *TINY_NETS, "learning_starts:20", "normalize:True"]
    importlib.import_module("tests.tiny_zoo_envs")
    zoo_train(*folder("whole"), "--seed", "3", *arguments)
    n_updates = 0
    update = PaCoSAC.train

    def failing_train(model: PaCoSAC, *args: int, **kwargs: int) -> None:
        nonlocal n_updates
        n_updates += 1
        if n_updates == 60:
            raise MemoryError
        update(model, *args, **kwargs)

    with mock.patch.object(PaCoSAC, "train", failing_train), pytest.raises(MemoryError):
        zoo_train(*folder("stopped"), "--seed", "3", *arguments)
    experiment = tmp_path / "stopped" / "pacosac" / f"{ENV_ID}_1"
    assert [path.name[18:] for path in sorted((experiment / "checkpoints").glob("checkpoint_*"))] == [
        "60_steps",
        "120_steps",
        "180_steps",
    ]
    # A later experiment without checkpoints is none to go on with
    (tmp_path / "stopped" / "pacosac" / f"{ENV_ID}_2").mkdir()
    config = (experiment / ENV_ID / "args.yml").read_text()
    output = sb3_mtrl_train(*folder("stopped"), "--resume")
    assert "Going on from" in output and f"Log path: {experiment}" in output and "Seed: 3" in output
    assert (experiment / ENV_ID / "args.yml").read_text() == config

    expected = tmp_path / "whole" / "pacosac" / f"{ENV_ID}_1"
    models = [PaCoSAC.load(path / f"{ENV_ID}.zip", device="cpu") for path in (expected, experiment)]
    assert models[0].num_timesteps == models[1].num_timesteps == 240
    for one, other in zip(*(model.get_parameters()["policy"].values() for model in models), strict=True):
        assert th.equal(one, other)
    assert_even(experiment / "evaluations.npz", 3)
    with np.load(expected / "evaluations.npz") as one, np.load(experiment / "evaluations.npz") as other:
        assert one["results"].tolist() == other["results"].tolist()
    for name in ("0.monitor.csv", "1.monitor.csv", "2.monitor.csv"):
        rows = [[line.split(",")[0] for line in (path / name).read_text().splitlines()[2:]] for path in (expected, experiment)]
        assert rows[0] == rows[1] and len(rows[0]) == 4  # 80 steps each, of episodes of 20

    with pytest.raises(FileNotFoundError, match=f"no experiment of --algo mtsac --env {ENV_ID} in .* has a checkpoint"):
        (tmp_path / "stopped" / "mtsac" / f"{ENV_ID}_1").mkdir(parents=True)
        sb3_mtrl_train("--algo", "mtsac", *folder("stopped")[2:], "--resume")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Folder of an experiment that was stopped at 225 of 240 steps, with a checkpoint at 150."""
    return stop_training(tmp_path)


def stop_training(folder: Path, *extra: str) -> Path:
    importlib.import_module("tests.tiny_zoo_envs")
    arguments = ["--gym-packages", "tests.tiny_zoo_envs", "-n", "240", "--save-freq", "150", "--eval-freq", "90", *extra]
    arguments += ["--eval-episodes", "3", "--num-threads", "1", "--seed", "3", "-params", *TINY_NETS, "learning_starts:20"]
    with crash_at(225):
        zoo_train("--algo", "mtsac", "--env", ENV_ID, "-f", str(folder), *arguments)
    return folder


@contextlib.contextmanager
def crash_at(steps: int) -> Iterator[None]:
    update = sb3_mtrl.MTSAC.train

    def failing_train(model: sb3_mtrl.MTSAC, *args: int, **kwargs: int) -> None:
        if model.num_timesteps >= steps:
            raise MemoryError
        update(model, *args, **kwargs)

    with mock.patch.object(sb3_mtrl.MTSAC, "train", failing_train), pytest.raises(MemoryError):
        yield


def resume(folder: Path, *arguments: str) -> str:
    return sb3_mtrl_train("--algo", "mtsac", "--env", ENV_ID, "-f", str(folder), *arguments)


def test_arguments_given_again_stay_and_hyperparameters_come_from_the_experiment(stopped: Path, monkeypatch) -> None:
    experiment = stopped / "mtsac" / f"{ENV_ID}_1"
    (stopped / "mtsac" / f"{ENV_ID}_2").mkdir()
    with crash_at(320):
        resume(stopped, "--resume", "1", "-n", "360", "-params", "tau:0.125")
    # Another file of hyperparameters is none of a training that goes on
    monkeypatch.setattr("sb3_mtrl.zoo.exp_manager.hyperparams_path", lambda algo: stopped / "other.yml")
    output = resume(stopped, "--resume")
    assert f"Resuming experiment {experiment} (newer, but without checkpoint: {ENV_ID}_2)" in output
    model = sb3_mtrl.MTSAC.load(experiment / f"{ENV_ID}.zip", device="cpu")
    assert model.num_timesteps == 360 and model.tau == 0.125
    assert model.learning_starts == 20 and model.policy_kwargs["net_arch"] == [8]
    assert "- n_timesteps\n    - 360\n" in (experiment / ENV_ID / "args.yml").read_text()
    assert "- tau\n    - 0.125\n" in (experiment / ENV_ID / "config.yml").read_text()
    with pytest.warns(UserWarning, match="has made its 360 of -n 360 steps: a larger -n"):
        resume(stopped, "--resume=1")
    with pytest.raises(FileNotFoundError, match="no experiment 2 of --algo mtsac"):
        resume(stopped, "--resume", "2")


def test_arguments_that_do_not_fit_are_not_kept(stopped: Path) -> None:
    saved = stopped / "mtsac" / f"{ENV_ID}_1" / ENV_ID
    before = {path.name: path.read_text() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="is of another training"):
        resume(stopped, "--resume", "-params", "policy_kwargs:dict(net_arch=[16])")
    assert {path.name: path.read_text() for path in saved.iterdir()} == before


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_rows_that_come_again_are_written_once(vec_env: str, tmp_path: Path) -> None:
    experiment = stop_training(tmp_path, "--vec-env", vec_env) / "mtsac" / f"{ENV_ID}_1"
    monitors = sorted(experiment.glob("*.monitor.csv"))
    # Up to the crash 75 steps each, in episodes of 20; the checkpoint has 50
    assert [len(path.read_text().splitlines()) - 2 for path in monitors] == [3, 3, 3]
    resume(tmp_path, "--resume")
    # 80 steps each; of the workers' environments the state is not known, so a third episode begins anew at 50
    n_episodes = {"dummy": 4, "subproc": 3}[vec_env]
    assert [len(path.read_text().splitlines()) - 2 for path in monitors] == [n_episodes] * 3
    steps = []
    for name in ("progress.csv", "progress_150.csv"):
        with (experiment / name).open() as file:
            steps += [int(row["time/total_timesteps"]) for row in csv.DictReader(file)]
    assert 180 in steps and steps == sorted(set(steps))


def test_merged_arguments() -> None:
    before = [
        "--env",
        "E",
        "-n",
        "10",
        "--gym-packages",
        "a",
        "b",
        "--hyperparams",
        "x:1",
        "y:dict(z=-1)",
        "-conf",
        "c.yml",
        "-P",
    ]
    again = ["--eval-freq", "-1", "-n", "20", "-params", "x:-2", "--env-kwargs=k:1"]
    assert merge_arguments(before, again) == [
        *("--env", "E", "--gym-packages", "a", "b", "-P", "--eval-freq", "-1", "-n", "20"),
        *("-params", "x:-2", "y:dict(z=-1)", "--env-kwargs", "k:1"),
    ]
    assert merge_arguments(merge_arguments(before, again), again) == merge_arguments(before, again)
