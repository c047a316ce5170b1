"""From a trained agent to tables, pictures and videos: the commands ``sb3_mtrl.evaluate``, ``.plot`` and ``.record``."""

import importlib
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import yaml
from scipy import stats
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

import sb3_mtrl.evaluate
import sb3_mtrl.plot
import sb3_mtrl.record
from benchmarks.learning.results import append_results
from sb3_mtrl import MTSAC
from sb3_mtrl.common.evaluation import MultiTaskEvaluation, evaluate_multi_task_policy, wilson_interval
from sb3_mtrl.common.figures import (
    plot_final_scores,
    plot_learning_curves,
    plot_logged_values,
    plot_task_curves,
    project_to_plane,
)
from sb3_mtrl.common.results import (
    RunHistory,
    describe_final_scores,
    final_scores,
    format_final_table,
    group_by_method,
    leave_out_short_runs,
    notes_on_final_scores,
    read_evaluations,
    read_progress,
    read_tidy_results,
    stack_histories,
)
from sb3_mtrl.common.statistics import (
    interquartile_mean,
    run_bootstrap,
    stratified_bootstrap,
    success_interval_over_runs,
)
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize, make_multi_task_vec_env
from sb3_mtrl.envs import MetaWorldMultiTaskEnv
from sb3_mtrl.zoo.runs import TrainedRun, find_run
from tests.test_zoo import ENV_ID, TINY_ENV, TINY_NETS, zoo_train
from tests.tiny_envs import PointTasksEnv

TASKS = ["point-0", "point-1", "point-2"]
EVALUATED = ("--eval-freq", "60", "--eval-episodes", "6")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Agents that ``rl_zoo3.train`` left: two of MTSAC (the second normalised), one of PaCoSAC with K = 2, one of CMTASAC."""
    folder = tmp_path_factory.mktemp("logs")
    for algo, seed, extra in (
        ("mtsac", 1, ()),
        ("mtsac", 2, ("normalize:True",)),
        ("pacosac", 3, ("n_param_sets:2",)),
        ("cmtasac", 4, ("policy_kwargs:dict(net_arch=[8],expert_arch=[8],feature_dim=4,lstm_hidden_dim=4)",)),
    ):
        zoo_train(
            "--algo", algo, *TINY_ENV, *EVALUATED, "-n", "150", "--seed", str(seed), "-f", str(folder), "--save-freq", "60",
            "-params", *TINY_NETS, *extra,
        )  # fmt: skip
    return folder


def command(tool, algo: str, logs: Path, *arguments: str) -> None:
    tool.main(["--algo", algo, *TINY_ENV, "-f", str(logs), *arguments])


# ------------------------------------------------------------------- evaluate


def test_evaluate_writes_what_the_policy_does(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(sb3_mtrl.evaluate, "mtsac", logs, "--exp-id", "1", "--episodes-per-task", "4", "--random-baseline")
    output = capsys.readouterr().out
    assert all(task in output for task in TASKS) and "95% interval" in output and "random policy" in output
    result = json.loads((logs / "mtsac" / f"{ENV_ID}_1" / f"{ENV_ID}.evaluation.json").read_text())
    assert (result["algo"], result["env"], result["exp_id"], result["train_seed"]) == ("mtsac", ENV_ID, 1, 1)
    assert (result["num_timesteps"], result["episodes_per_task"], result["horizon"]) == (150, 4, 20)
    assert list(result["tasks"]) == TASKS and result["random_policy"]["episodes"] == 12
    # The same by hand
    run = find_run(logs, "mtsac", ENV_ID, 1)
    env = run.make_env()
    evaluation = evaluate_multi_task_policy(MTSAC.load(run.model_path), env, 4, seed=result["seed"])
    env.close()
    assert result["mean_reward"] == pytest.approx(evaluation.mean_reward)
    assert result["tasks"]["point-1"]["mean_reward"] == pytest.approx(evaluation.mean_rewards[1])


def test_evaluate_without_unpickling(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are the same; unpickling, and what makes Python objects of YAML, would fail the test."""
    rates = []
    for safe in ([], ["--safe"]):
        if safe:
            for module, name in ((cloudpickle, "loads"), (pickle, "load"), (yaml, "unsafe_load")):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("unpickled"))
        command(sb3_mtrl.evaluate, "mtsac", logs, "--exp-id", "1", "--episodes-per-task", "2", *safe)
        result = json.loads((logs / "mtsac" / f"{ENV_ID}_1" / f"{ENV_ID}.evaluation.json").read_text())
        rates.append([task["mean_reward"] for task in result["tasks"].values()])
    assert rates[0] == rates[1]
    with pytest.raises(SystemExit):
        command(sb3_mtrl.evaluate, "mtsac", logs, "--exp-id", "2", "--safe")
    assert "--safe reads weights and plain numbers only and refused normalize, vecnormalize.pkl" in capsys.readouterr().err
    # A configuration that would run a command
    shutil.copytree(logs / "mtsac" / f"{ENV_ID}_1", tmp_path / "mtsac" / f"{ENV_ID}_1")
    touched = tmp_path / "touched"
    config = tmp_path / "mtsac" / f"{ENV_ID}_1" / ENV_ID / "config.yml"
    config.write_text(f"env_kwargs: !!python/object/apply:os.system ['touch {touched}']\n")
    with pytest.raises(SystemExit):
        command(sb3_mtrl.evaluate, "mtsac", tmp_path, "--safe")
    assert f"refused {config}" in capsys.readouterr().err and not touched.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2]", "just text", "env_kwargs: text", "env_kwargs: [1]", "a: !!timestamp x", "a: !!int x", "a: !!bool x"),
        *("a: !!int ''", "{[1]: 2}", "a: [", "a: !!python/tuple 3", "a: !!python/object/apply:builtins.print [1]"),
        *(
            f"!!python/object/apply:collections.OrderedDict {pairs}"
            for pairs in ("[1, 2]", "[1]", "[[1]]", "[[[[1], 2]]]", "{}")
        ),
    ],
)
@pytest.mark.parametrize("name", ["config.yml", "args.yml"])
def test_malformed_settings_name_the_file(name: str, text: str, tmp_path: Path) -> None:
    settings = tmp_path / ENV_ID
    settings.mkdir()
    (settings / name).write_text(text)
    with pytest.raises(ValueError, match=rf"--safe reads plain values only and refused {settings / name}: "):
        TrainedRun("mtsac", ENV_ID, 1, tmp_path, tmp_path / "model.zip", safe=True).env_kwargs  # noqa: B018


def test_evaluate_several_experiments(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(sb3_mtrl.evaluate, "mtsac", logs, "--exp-id", "1", "2", "--episodes-per-task", "2", "--n-envs", "2")
    model = f"{ENV_ID}.zip"
    assert f"2 runs (experiment 1: {model} after 150 steps, experiment 2: {model} after 150 steps)" in capsys.readouterr().out
    runs = [json.loads((logs / "mtsac" / f"{ENV_ID}_{i}" / f"{ENV_ID}.evaluation.json").read_text()) for i in (1, 2)]
    together = json.loads((logs / "mtsac" / f"{ENV_ID}.evaluation.json").read_text())
    assert together["exp_ids"] == together["train_seeds"] == [1, 2]
    assert together["models"] == [model] * 2 and together["num_timesteps"] == [150] * 2
    assert (together["horizon"], together["episodes_per_task"]) == (20, 2)
    for task in TASKS:
        rates = np.array([run["tasks"][task]["success_rate"] for run in runs])
        assert together["tasks"][task]["success_rate"] == pytest.approx(rates.mean())
        assert together["tasks"][task]["success_interval_95"] == pytest.approx(success_interval_over_runs(rates, 2))


def test_evaluations_of_other_models_are_kept_apart(logs: Path) -> None:
    folder, common = logs / "mtsac", ("--exp-id", "1", "2", "--episodes-per-task", "1")
    command(sb3_mtrl.evaluate, "mtsac", logs, *common)
    of_final = (folder / f"{ENV_ID}.evaluation.json").read_text()
    for flags, name in (
        (["--load-best"], "best_model"),
        (["--load-checkpoint", "120"], "rl_model_120_steps"),
        (["--load-last-checkpoint"], "last_checkpoint"),
    ):
        command(sb3_mtrl.evaluate, "mtsac", logs, *common, *flags)
        together = json.loads((folder / f"{ENV_ID}.{name}.evaluation.json").read_text())
        stem = name if name == "best_model" else "rl_model_120_steps"
        assert together["models"] == [f"{stem}.zip"] * 2 and max(together["num_timesteps"]) <= 120
    assert (folder / f"{ENV_ID}.evaluation.json").read_text() == of_final


@pytest.mark.parametrize("name", ["horizon", "episodes_per_task", "goals_per_task", "goal_seed"])
def test_experiments_evaluated_otherwise_are_not_taken_together(name: str, tmp_path: Path) -> None:
    evaluation = MultiTaskEvaluation(("a", "b"), np.array([0, 1]), np.zeros(2), np.ones(2, dtype=int), np.ones(2))

    def result(exp_id: int, value: int) -> sb3_mtrl.evaluate.EvaluatedRun:
        folder = tmp_path / str(exp_id)
        run = TrainedRun("mtsac", "MetaWorld-MT3-v3", exp_id, folder, folder / "MetaWorld-MT3-v3.zip")
        details = {"model": run.model_path.name, "num_timesteps": exp_id, "train_seed": exp_id, name: value}
        return sb3_mtrl.evaluate.EvaluatedRun(run, evaluation, None, details)

    assert sb3_mtrl.evaluate.aggregate_runs([result(1, 150), result(2, 150)])["num_timesteps"] == [1, 2]
    with pytest.raises(
        ValueError, match=rf"the same {name} to be taken together, got 150 \(experiment 1\), 500 \(experiment 2\)"
    ):
        sb3_mtrl.evaluate.aggregate_runs([result(1, 150), result(2, 500)])


def evaluated_run(folder: Path, exp_id: int, successes: list[float], seed: int | None) -> sb3_mtrl.evaluate.EvaluatedRun:
    """Of two tasks, with as many episodes each."""
    task_ids = np.repeat([0, 1], len(successes) // 2)
    lengths = np.ones(len(successes), dtype=int)
    evaluation = MultiTaskEvaluation(("a", "b"), task_ids, np.zeros(len(successes)), lengths, np.array(successes))
    run = TrainedRun("mtsac", ENV_ID, exp_id, folder, folder / str(exp_id) / f"{ENV_ID}.zip")
    return sb3_mtrl.evaluate.EvaluatedRun(
        run, evaluation, None, {"model": f"{ENV_ID}.zip", "num_timesteps": 9, "train_seed": seed}
    )


def test_interval_of_the_mean_counts_the_episodes_of_all_tasks(tmp_path: Path) -> None:
    results = [evaluated_run(tmp_path, exp_id, [1.0] * 6, exp_id) for exp_id in (1, 2)]
    aggregate = sb3_mtrl.evaluate.aggregate_runs(results)
    # No run or task differs. Wilson's interval of n successes in n episodes is [n / (n + z^2), 1], z = 1.959964
    z_squared = 1.959964**2
    assert aggregate["tasks"]["a"]["success_interval_95"] == pytest.approx([6 / (6 + z_squared), 1])
    assert aggregate["success_interval_95"] == pytest.approx([12 / (12 + z_squared), 1])


def test_a_model_is_one_run(tmp_path: Path) -> None:
    result, other = (evaluated_run(tmp_path, exp_id, [0.0, 1.0], exp_id) for exp_id in (1, 2))
    with pytest.raises(ValueError, match=rf"results must be of different models to be taken together, got .*1/{ENV_ID}.zip 2"):
        sb3_mtrl.evaluate.aggregate_runs([result, other, result])


def test_trainings_with_the_same_seed_are_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def warned(*seeds: int | None) -> list[str]:
        recwarn.clear()
        sb3_mtrl.evaluate.aggregate_runs([evaluated_run(tmp_path, i, [0.0, 1.0], seed) for i, seed in enumerate(seeds, 1)])
        return [str(warning.message) for warning in recwarn]

    assert warned(1, 2) == warned(None, None) == []
    (message,) = warned(7, 1, 7)
    assert message.startswith("the experiments 1, 3 were trained with the same seed (7): they are not independent")


@pytest.mark.parametrize(
    ("train", "evaluated", "is_of_training", "is_of_selection"),
    [
        ({}, {}, True, True),
        ({}, {"goal_seed": 1}, False, False),
        ({"env_kwargs": {"goal_seed": 1}}, {}, True, True),
        ({"eval_env_kwargs": {"goal_seed": 1}}, {}, True, False),
        ({"eval_env_kwargs": {"goal_seed": 1}}, {"goal_seed": 1}, False, True),
        ({"env_kwargs": {"goals": "fixed"}}, {"goals": "fixed"}, True, True),
        ({"env_kwargs": {"goals": "fixed"}}, {"goals": "cycle"}, False, True),
    ],
)
def test_which_goals_the_agent_knows(
    train: dict[str, Any], evaluated: dict[str, Any], is_of_training: bool, is_of_selection: bool, tmp_path: Path
) -> None:
    env_id = "MetaWorld-MT3-v3"
    (tmp_path / env_id).mkdir()
    (tmp_path / env_id / "args.yml").write_text(yaml.safe_dump(train))
    for stem in (env_id, "best_model"):
        run = TrainedRun("mtsac", env_id, 1, tmp_path, tmp_path / f"{stem}.zip")
        known = run.compare_goals(evaluated)
        assert known["goal_seed"] == (evaluated or train.get("env_kwargs", {})).get("goal_seed", 0)
        assert known["train_goal_seed"] == train.get("env_kwargs", {}).get("goal_seed", 0)
        assert known["goals_of_training"] is is_of_training
        assert known["selected_on_these_goals"] is (is_of_selection and stem == "best_model")


@pytest.mark.parametrize(("protocol", "horizon", "n_episodes"), [("paper", 150, 10), ("standard", 500, 50)])
def test_evaluate_on_metaworld(
    protocol: str,
    horizon: int,
    n_episodes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    An untrained agent, "trained" with 7 steps and success at the last step, and for the paper's protocol with another wrapper
    than ``VecTaskAssignment``. The protocol's horizon is the published one, for which 3 steps stand in; the second of them
    succeeds for every other goal of reach.
    """
    protocols = sb3_mtrl.evaluate.PROTOCOLS
    assert protocols[protocol].horizon == horizon
    monkeypatch.setitem(protocols, protocol, replace(protocols[protocol], horizon=3))
    env_id, tasks = "MetaWorld-Custom-v3", ["reach-v3", "door-close-v3"]
    env_kwargs = {"tasks": tasks, "horizon": 7, "success": "last"}
    model = MTSAC("MlpPolicy", make_multi_task_vec_env(env_id, 2, env_kwargs=env_kwargs), buffer_size=100, seed=0)
    folder = tmp_path / "mtsac" / f"{env_id}_1"
    (folder / env_id).mkdir(parents=True)
    wrappers = {"paper": {"vec_env_wrapper": "stable_baselines3.common.vec_env.VecCheckNan"}}
    (folder / env_id / "config.yml").write_text(yaml.safe_dump(wrappers.get(protocol, {})))
    (folder / env_id / "args.yml").write_text(yaml.safe_dump({"env_kwargs": env_kwargs}))
    model.save(folder / env_id)
    model.save(folder / "best_model")
    episodes: list[tuple[int, int]] = []
    build, step = MetaWorldMultiTaskEnv._build, MetaWorldMultiTaskEnv.step

    def build_with_known_success(self: MetaWorldMultiTaskEnv, task_name: str) -> Any:
        env = build(self, task_name)
        own_step = env.step

        def known_step(action: np.ndarray) -> Any:
            *rest, info = own_step(action)
            return *rest, {**info, "success": float(self._elapsed_steps == 1 and task_name == "reach-v3" and self._goal % 2)}

        env.step = known_step
        return env

    def noted_step(self: MetaWorldMultiTaskEnv, action: np.ndarray) -> Any:
        result = step(self, action)
        if result[3]:
            assert self._elapsed_steps == 3
            episodes.append((self.task_id, self._goal))
        return result

    monkeypatch.setattr(MetaWorldMultiTaskEnv, "_build", build_with_known_success)
    monkeypatch.setattr(MetaWorldMultiTaskEnv, "step", noted_step)
    flags = ["--load-best"] if protocol == "standard" else []
    arguments = ["--algo", "mtsac", "--env", env_id, "-f", str(tmp_path), "--protocol", protocol, "--random-baseline", *flags]
    sb3_mtrl.evaluate.main(arguments)

    # The random policy, then the model: every goal of each task once, beginning with the first
    once = [(task, goal) for task in range(2) for goal in range(n_episodes)]
    assert len(episodes) == 2 * len(once)
    assert sorted(episodes[: len(once)]) == sorted(episodes[len(once) :]) == once
    name = f"{'best_model' if flags else env_id}.evaluation-{protocol}.json"
    result = json.loads((folder / name).read_text())
    assert (result["horizon"], result["episodes_per_task"], result["goals_per_task"]) == (3, n_episodes, 50)
    for policy in (result, result["random_policy"]):
        assert policy["mean_ep_length"] == 3
        assert [policy["tasks"][task]["success_rate"] for task in tasks] == [0.5, 0.0]
    assert result["goals_of_training"] is True and result["selected_on_these_goals"] is bool(flags)
    printed = capsys.readouterr().out
    assert "Note: the goals are those of the training" in printed
    assert ("Note: the best model was chosen by its success on goals among these" in printed) is bool(flags)


def test_saved_normalisation_is_used(logs: Path) -> None:
    run = find_run(logs, "mtsac", ENV_ID, 2)
    env = run.make_env()
    assert isinstance(env, VecTaskNormalize) and not env.training and not env.norm_reward
    assert env.num_envs == 3 and env.get_attr("assigned_tasks") == [(0,), (1,), (2,)]
    env.close()


@pytest.mark.parametrize("wrappers", [None, ["VecCheckNan"], ["VecTaskAssignment", "VecCheckNan"]])
def test_every_task_is_played_by_one_sub_environment(wrappers: list[str] | None, tmp_path: Path) -> None:
    """Whatever wrappers the training had."""
    importlib.import_module("tests.tiny_zoo_envs")
    modules = {"VecCheckNan": "stable_baselines3.common.vec_env", "VecTaskAssignment": "sb3_mtrl.common.vec_env"}
    (tmp_path / ENV_ID).mkdir()
    names = wrappers and [f"{modules[name]}.{name}" for name in wrappers]
    (tmp_path / ENV_ID / "config.yml").write_text(yaml.safe_dump({"vec_env_wrapper": names}))
    env = TrainedRun("mtsac", ENV_ID, 1, tmp_path, tmp_path / "model.zip").make_env()
    assert env.get_attr("assigned_tasks") == [(0,), (1,), (2,)]
    found = []
    while isinstance(env, VecEnvWrapper):
        found.append(type(env).__name__)
        env = env.venv
    assert sorted(found) == sorted({*(wrappers or []), "VecTaskAssignment"})
    env.close()


def test_recurrent_policy(logs: Path) -> None:
    command(sb3_mtrl.evaluate, "cmtasac", logs, "--episodes-per-task", "2")
    result = json.loads((logs / "cmtasac" / f"{ENV_ID}_1" / f"{ENV_ID}.evaluation.json").read_text())
    run = find_run(logs, "cmtasac", ENV_ID)
    model, env = run.load_model("cpu"), run.make_env(seed=result["seed"])
    # Task 0's first episode by hand, with the state handed on
    env.seed(result["seed"])
    obs, state, returns = env.reset(), None, []
    for _ in range(2):
        episode_return = np.zeros(3)
        for step in range(20):
            starts = np.full(3, step == 0)
            actions, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
            obs, rewards, _, _ = env.step(actions)
            episode_return += rewards
        returns.append(episode_return)
    env.close()
    expected = np.mean(returns, axis=0)
    assert [result["tasks"][task]["mean_reward"] for task in TASKS] == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_cannot_be_written_is_shown(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for exp_id in (1, 2):
        shutil.copytree(logs / "mtsac" / f"{ENV_ID}_{exp_id}", tmp_path / "mtsac" / f"{ENV_ID}_{exp_id}")
    # Nobody, root included, can write a file where a folder is
    blocked = [tmp_path / "mtsac" / name / f"{ENV_ID}.evaluation.json" for name in (f"{ENV_ID}_1", "")]
    for path in blocked:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises(SystemExit) as stop:
        command(sb3_mtrl.evaluate, "mtsac", tmp_path, "--exp-id", "1", "2", "--episodes-per-task", "1")
    assert stop.value.code == "\n".join(f"Not written: {path}: Is a directory" for path in blocked)
    output = capsys.readouterr().out
    assert "episodes per task: 1" in output and "2 runs (experiment 1: " in output
    assert f"Written: {tmp_path / 'mtsac' / f'{ENV_ID}_2'}" in output


def test_other_goals_are_written_to_another_file(tmp_path: Path) -> None:
    def name(protocol: str | None, goal_seed: int, train_goal_seed: int) -> str:
        details = {"goal_seed": goal_seed, "train_goal_seed": train_goal_seed}
        return sb3_mtrl.evaluate._json_path(tmp_path / "model", protocol, details).name

    assert name(None, 0, 0) == name(None, 1, 1) == "model.evaluation.json"
    assert name(None, 1, 0) == "model.evaluation-goal_seed_1.json"
    assert name("paper", 0, 1) == "model.evaluation-paper-goal_seed_0.json"


@pytest.mark.parametrize("flags", [["--load-best"], ["--load-last-checkpoint"], ["--load-checkpoint", "120"]])
def test_which_model(flags: list[str], logs: Path) -> None:
    command(sb3_mtrl.evaluate, "pacosac", logs, "--episodes-per-task", "1", *flags)
    stem = "best_model" if flags == ["--load-best"] else "rl_model_120_steps"
    result = json.loads((logs / "pacosac" / f"{ENV_ID}_1" / f"{stem}.evaluation.json").read_text())
    assert result["model"] == f"{stem}.zip" and result["num_timesteps"] <= 120


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-f", "nowhere"], "-f/--folder must be a folder with agents of --algo mtsac, but nowhere/mtsac does not exist"),
        (["--exp-id", "7"], "--exp-id must be one of 1, 2 .* got 7"),
        (["--exp-id", "0", "2"], r"argument --exp-id: must name each experiment once .* got 0 2, which are .* 2, 2$"),
        (["--exp-id", "1", "2", "1"], "argument --exp-id: must name each experiment once .* got 1 2 1"),
        (["--env", "Pendulum-v1"], f"no experiment for --env Pendulum-v1 .*there are: {ENV_ID}"),
        (["--env", "Pendulum-v77"], "argument --env: Pendulum-v77 is no registered environment"),
        (["--load-checkpoint", "7"], "No model found for mtsac .*rl_model_7_steps.zip"),
        (["--episodes-per-task", "0"], "argument --episodes-per-task: must be at least 1, got 0"),
        (["--n-envs", "4"], r"n_envs must be at most one per task \(3\), got 4"),
        (["--protocol", "standard"], "protocol='standard' is about Meta-World's environments"),
        (["--protocol", "paper", "--load-best"], "argument --protocol: paper is about the final policy"),
    ],
)
def test_evaluate_refuses(arguments: list[str], message: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(sb3_mtrl.evaluate, "mtsac", logs, *arguments)
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("protocol", "env_kwargs", "message"),
    [
        ("paper", {"horizon": 100}, r"env_kwargs must leave horizon to protocol='paper' \(150\), got 100"),
        (None, {"goals": "random"}, r"env_kwargs must leave goals to an evaluation .* \('cycle'\), got 'random'"),
        ("standard", {"success": "last"}, r"env_kwargs must leave success to an evaluation .* \('any'\), got 'last'"),
    ],
)
def test_what_an_evaluation_settles_is_not_overridden(
    protocol: str | None, env_kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = TrainedRun("mtsac", "MetaWorld-MT3-v3", 1, tmp_path, tmp_path / "MetaWorld-MT3-v3.zip")
    with pytest.raises(ValueError, match=message):
        sb3_mtrl.evaluate.evaluate_run(run, protocol=protocol, env_kwargs=env_kwargs)


def test_success_interval_over_runs() -> None:
    # Equal runs: Wilson's interval over all episodes
    assert success_interval_over_runs(np.ones(3), 10) == pytest.approx(wilson_interval(30, 30))
    # Two runs at 0.4 and 0.6 of many episodes: 0.5 -+ t_{0.975, 1} s / sqrt(2), s = 0.1 sqrt(2), t = 12.706, cut at 0 and 1
    assert success_interval_over_runs(np.array([0.4, 0.6]), 10_000) == (0.0, 1.0)
    # Three runs: t_{0.975, 2} = 4.3027, s = 0.01
    low, high = success_interval_over_runs(np.array([0.49, 0.5, 0.51]), 10**6)
    assert (low, high) == pytest.approx((0.5 - 4.3027 * 0.01 / np.sqrt(3), 0.5 + 4.3027 * 0.01 / np.sqrt(3)), abs=1e-6)
    assert np.isnan(success_interval_over_runs(np.array([np.nan, 1.0]), 5)).all()


# ------------------------------------------------------------------ statistics


def test_interquartile_mean() -> None:
    # Of the 8 sorted scores -50, 0, 1, 2, 3, 5, 6, 100 two are cut off at each end
    assert interquartile_mean(np.array([[6.0, 0, 1, 100], [2, 5, -50, 3]])) == pytest.approx((1 + 2 + 3 + 5) / 4)
    # int(0.25 * 3) = 0: nothing is cut off
    assert interquartile_mean(np.array([1.0, 2, 6])) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="at least one score"):
        interquartile_mean(np.array([]))


def test_unknown_scores_are_no_good_scores() -> None:
    scores = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, np.nan]])
    assert np.isnan(interquartile_mean(scores))
    for bootstrap in (run_bootstrap, stratified_bootstrap):
        # Two resamples may lack the unknown score
        ends = [
            bootstrap(scores, statistic, 2, seed=seed) for statistic in (np.mean, interquartile_mean) for seed in range(20)
        ]
        assert np.isnan(ends).all()
        # Of a statistic for each task only that of the second is unknown
        by_task = bootstrap(scores, lambda sample: sample.mean(axis=0))
        assert np.isnan(by_task).tolist() == [[False, True]] * 2


def test_stratified_bootstrap() -> None:
    generator = np.random.default_rng(3)
    # Tasks of very different levels: resampling within tasks leaves the levels out of the interval
    scores = generator.normal(size=(40, 5)) + 100 * np.arange(5)
    low, high = stratified_bootstrap(scores, np.mean, n_resamples=4000)
    # Normal approximation: the variance of the mean is the mean of the tasks' (population) variances / (runs * tasks)
    half_width = 1.96 * np.sqrt(scores.var(axis=0).mean() / scores.size)
    assert (low, high) == pytest.approx((scores.mean() - half_width, scores.mean() + half_width), abs=0.1 * half_width)
    assert stratified_bootstrap(scores, np.mean, 20).tolist() == stratified_bootstrap(scores, np.mean, 20).tolist()
    # A statistic with a shape of its own, as for curves
    curves = stratified_bootstrap(np.stack([scores, scores + 1], axis=2), lambda sample: sample.mean(axis=(0, 1)), 200)
    assert curves.shape == (2, 2)
    np.testing.assert_allclose(curves[:, 1] - curves[:, 0], 1.0)
    assert np.isnan(stratified_bootstrap(scores[:1], np.mean)).all()
    with pytest.raises(ValueError, match=r"got the shape \(3,\)"):
        stratified_bootstrap(np.zeros(3), np.mean)


def test_run_bootstrap_is_over_whole_runs() -> None:
    generator = np.random.default_rng(4)
    one_task = generator.normal(size=(6, 1))
    # Six runs of five tasks that say the same: as much is known as from one task
    same = run_bootstrap(np.repeat(one_task, 5, axis=1), np.mean)
    np.testing.assert_allclose(same, run_bootstrap(one_task, np.mean))
    # rliable's interval takes them for 30 trainings: narrower by sqrt(5), and by Student's t and the factor of the variance
    width, stratified = same[1] - same[0], np.ptp(stratified_bootstrap(np.repeat(one_task, 5, axis=1), np.mean))
    ratio = np.sqrt(5) * stats.t.ppf(0.975, 5) / 1.96 * np.sqrt(6 / 5)
    assert width / stratified == pytest.approx(ratio, rel=0.1)
    # Tasks that depend on each other in any way: Student's interval of the means of the runs
    scores = 0.5 * one_task + generator.normal(size=(6, 3)) + 100 * np.arange(3)
    low, high = run_bootstrap(scores, np.mean, n_resamples=20_000)
    expected = stats.t.interval(0.95, 5, scores.mean(), stats.sem(scores.mean(axis=1)))
    assert (low, high) == pytest.approx(expected, abs=0.02 * np.ptp(expected))
    curves = run_bootstrap(np.stack([scores, scores + 1], axis=2), lambda sample: sample.mean(axis=(0, 1)), 50)
    np.testing.assert_allclose(curves[:, 1] - curves[:, 0], 1.0)
    assert np.isnan(run_bootstrap(scores[:1], np.mean)).all()
    with pytest.raises(ValueError, match="n_resamples must be at least 2, got 1"):
        run_bootstrap(scores, np.mean, 1)


@pytest.mark.parametrize(("statistic", "n_runs"), [(np.mean, 3), (interquartile_mean, 3), (interquartile_mean, 10)])
def test_95_percent_of_the_intervals_over_runs_hold_the_true_value(statistic: Any, n_runs: int) -> None:
    generator = np.random.default_rng(5)
    # Ten tasks whose scores have a correlation of 0.3, mean 0
    scores = np.sqrt(0.3) * generator.normal(size=(300, n_runs, 1)) + np.sqrt(0.7) * generator.normal(size=(300, n_runs, 10))

    def coverage(bootstrap: Any) -> float:
        ends = np.array([bootstrap(draw, statistic, 100) for draw in scores])
        return float(np.mean((ends[:, 0] < 0) & (ends[:, 1] > 0)))

    # Of 300 draws, 95 % -+ two standard deviations of 1.3 %
    assert coverage(run_bootstrap) == pytest.approx(0.95, abs=0.03)
    # What takes every task for a training of its own is too sure, and more runs do not help
    assert coverage(stratified_bootstrap) < 0.8


# ------------------------------------------------------------------------ plot


def make_history(
    method: str, seed: int, scores: list[list[float]], steps: tuple[int, ...] = (10, 20), episodes: int | None = None
) -> RunHistory:
    """Success rates by evaluation and task; returns are ten times as large."""
    values = np.array(scores)
    return RunHistory(method, "Env-v0", seed, ("left", "right"), np.array(steps), values, 10 * values, episodes)


HISTORIES = [
    make_history("a", 1, [[0.0, 0.2], [0.4, 0.6]]),
    make_history("a", 2, [[0.0, 0.4], [0.8, 0.8], [1.0, 1.0]], steps=(10, 20, 30)),
    make_history("b", 1, [[0.0, 0.0], [0.1, 0.3]], episodes=4),
]


def test_runs_are_compared_at_common_steps() -> None:
    steps, scores = stack_histories(HISTORIES[:2], "success")
    assert steps.tolist() == [10, 20] and scores.shape == (2, 2, 2)
    assert scores[:, :, -1].tolist() == [[0.4, 0.6], [0.8, 0.8]]
    with pytest.raises(ValueError, match="no evaluation at the same step"):
        stack_histories([HISTORIES[0], make_history("a", 3, [[0, 0]], steps=(15,))], "success")
    other_tasks = RunHistory("a", "Env-v0", 4, ("up",), np.array([10]), np.zeros((1, 1)), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="same tasks"):
        stack_histories([HISTORIES[0], other_tasks], "success")


def test_final_scores_and_table() -> None:
    first, second = (final_scores(runs) for runs in (HISTORIES[:2], HISTORIES[2:]))
    # By hand from the values at step 20
    assert (first.step, first.n_runs, first.worst_task) == (20, 2, "left")
    assert first.task_means == pytest.approx([0.6, 0.7]) and first.mean == pytest.approx(0.65)
    # The middle two of 0.4, 0.6, 0.8, 0.8
    assert first.task_std == pytest.approx(0.05) and first.iqm == pytest.approx(0.7)
    # The runs' means 0.5 and 0.8 are too few: t_{0.975, 1} = 12.706 leaves nothing of [0, 1] out
    assert first.mean_interval.tolist() == first.iqm_interval.tolist() == [0, 1]
    # Returns have no such bounds: 6.5 -+ t s / sqrt(2), s = 3 / sqrt(2)
    assert final_scores(HISTORIES[:2], "return", 20_000).mean_interval == pytest.approx(
        [6.5 - 12.706 * 1.5, 6.5 + 12.706 * 1.5], rel=0.02
    )
    # Lowest and highest resamples within the tasks have probability 1/16: 0.4, 0.4, 0.6, 0.6 and 0.8 four times
    assert first.iqm_stratified_interval == pytest.approx([0.5, 0.8])
    assert second.worst_task == "left" and second.worst_mean == pytest.approx(0.1) and second.task_std == pytest.approx(0.1)
    assert np.isnan([second.mean_interval, second.iqm_interval, second.iqm_stratified_interval]).all()
    lines = format_final_table([first, second]).splitlines()
    assert lines[0] == "Last evaluation during the training at step 20"
    intervals = ["65%", "[0%,", "100%]", "70%", "[0%,", "100%]", "[50%,", "80%]"]
    assert lines[4].split() == ["a", "2", "20", "?", *intervals, "5%", "left", "60%"]
    assert lines[5].split() == ["b", "1", "20", "4", "20%", "-", "20%", "-", "-", "10%", "left", "10%"]
    assert lines[-2].split() == ["left", "60%", "10%"]


def test_runs_that_end_early_are_named() -> None:
    long = [make_history("a", seed, [[0.5, 0.5], [0.9, 0.9]], steps=(10, 30)) for seed in (1, 2)]
    aborted = make_history("b", 7, [[0.0, 0.0]], steps=(10,))
    finished = make_history("b", 8, [[0.5, 0.5], [0.8, 0.8]], steps=(10, 30))

    def notes(*histories: RunHistory) -> list[str]:
        finals = [final_scores(runs) for runs in group_by_method(histories).values()]
        return notes_on_final_scores(histories, finals)

    assert notes(*long, finished) == []
    assert notes(*long, aborted, finished) == [
        "b: run 7 ends at step 10; the scores are of step 10, which all its runs share, not 30",
        "the scores are of different steps (a 30, b 10): they do not compare the methods",
    ]
    assert leave_out_short_runs([*long, aborted, finished]) == [*long, finished]
    # Alone it is the longest of its method
    assert leave_out_short_runs([*long, aborted]) == [*long, aborted]
    assert notes(*long, aborted) == ["the scores are of different steps (a 30, b 10): they do not compare the methods"]
    other_steps = make_history("a", 3, [[0.5, 0.5], [0.9, 0.9]], steps=(10, 29))
    assert notes(long[0], other_steps)[0].startswith("a: run 3 ends at step 29; the scores are of step 10")
    # A policy that was not trained is no shorter training
    untrained = make_history("random", 0, [[0.1, 0.1]], steps=(0,))
    assert notes(*long, untrained) == []
    finals = [final_scores(long), final_scores([untrained])]
    assert describe_final_scores(finals) == "Last evaluation during the training at step 30"
    only_last = [final_scores([make_history("a", 1, [[0.9, 0.9]], steps=(30,))]), final_scores([untrained])]
    assert describe_final_scores(only_last) == "One evaluation of each run at step 30"


def test_tidy_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_results(path, [row for history in HISTORIES for row in history.rows()])
    read = read_tidy_results(path)
    assert [(history.method, history.seed) for history in read] == [("a", 1), ("a", 2), ("b", 1)]
    for history, expected in zip(read, HISTORIES, strict=True):
        assert history.task_names == expected.task_names and history.timesteps.tolist() == expected.timesteps.tolist()
        np.testing.assert_allclose(history.success_rates, expected.success_rates)
        np.testing.assert_allclose(history.mean_returns, expected.mean_returns)
    path.write_text("method,seed\n")
    with pytest.raises(ValueError, match="lacks env, step, task, success, return"):
        read_tidy_results(path)


def test_steps_that_do_not_rise_are_of_several_trainings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timesteps must rise, as in one training, got 100 after 100 "):
        make_history("a", 1, [[0, 0]] * 2, steps=(100, 100))
    path = tmp_path / "evaluations.npz"
    np.savez(path, timesteps=[100, 200, 100, 200], results=np.zeros((4, 5)), ep_lengths=np.ones((4, 5)))
    with pytest.raises(ValueError, match=rf"^{path}: timesteps must rise, as in one training, got 100 after 200 "):
        read_evaluations(path, "sac", "Pendulum-v1", 1)


def test_progress_of_a_continued_training(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("time/total_timesteps,train/quota/a,rollout/x\n10,1.5,9\n20,,9\n30,3,9,7\n")
    # Went on from step 20
    (tmp_path / "progress_20.csv").write_text("train/quota/b,train/quota/a,time/total_timesteps\n7,4,30\n8,5,40\n")
    steps, columns = read_progress(tmp_path, ["train/quota"])
    assert steps.tolist() == [10, 20, 30, 40] and list(columns) == ["train/quota/a", "train/quota/b"]
    np.testing.assert_array_equal(columns["train/quota/a"], [1.5, np.nan, 4, 5])
    np.testing.assert_array_equal(columns["train/quota/b"], [np.nan, np.nan, 7, 8])
    with pytest.raises(FileNotFoundError, match=r"no progress.csv in"):
        read_progress(tmp_path / "nowhere", ["train"])


def test_training_writes_progress(logs: Path) -> None:
    steps, columns = read_progress(logs / "pacosac" / f"{ENV_ID}_1", ["eval/success_rate", "train/w_norm"])
    assert {60, 120} <= set(steps.tolist())
    assert {f"train/w_norm/{task}" for task in TASKS} <= set(columns)
    with np.load(logs / "pacosac" / f"{ENV_ID}_1" / "evaluations.npz") as file:
        rates = file["task_success_rates"].mean(axis=1)
    np.testing.assert_allclose(columns["eval/success_rate"][np.isin(steps, [60, 120])], rates)


def test_principal_components() -> None:
    # Points on a line: the first component is the distance along it, the second nothing
    points = np.outer([-3.0, 1.0, 2.0], [0.6, 0.8, 0.0]) + 5
    coordinates, shares = project_to_plane(points)
    np.testing.assert_allclose(coordinates, [[-3, 0], [1, 0], [2, 0]], atol=1e-12)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-12)
    assert project_to_plane(np.array([[1.0], [3.0]]))[0].tolist() == [[-1, 0], [1, 0]]


def assert_pictures(folder: Path, names: set[str]) -> None:
    """The files are there, in both formats, and the PNG shows more than one colour."""
    from PIL import Image

    assert {path.name for path in folder.iterdir()} == {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}
    for name in names:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_plot_draws_all_that_the_runs_hold(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    algos = ["mtsac", "pacosac", "cmtasac"]
    sb3_mtrl.plot.main(["--algo", *algos, *TINY_ENV, "-f", str(logs), "-o", str(tmp_path)])
    output = capsys.readouterr().out
    # Two episodes of each task, as EVALUATED says
    assert re.search(r"^mtsac +2 +120 +2 ", output, re.M) and re.search(r"^cmtasac +1 +120 +2 ", output, re.M)
    training = {f"{algo}_training" for algo in algos}
    assert_pictures(tmp_path, {"curves", "tasks", "final", "pacosac_w", "cmtasac_gate", *training})


def test_plot_of_a_training_that_goes_on(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest experiment has evaluations and a log, and no model yet; beside it is one that has just begun."""
    pytest.importorskip("matplotlib")
    experiments = tmp_path / "pacosac"
    for number, names in (
        ("1", ("evaluations.npz", "progress.csv", f"{ENV_ID}.zip")),
        ("2", ("evaluations.npz", "progress.csv")),
    ):
        (experiments / f"{ENV_ID}_{number}").mkdir(parents=True)
        for name in names:
            shutil.copy(logs / "pacosac" / f"{ENV_ID}_1" / name, experiments / f"{ENV_ID}_{number}")
    (experiments / f"{ENV_ID}_3").mkdir()

    def draw(folder: str, *arguments: str) -> tuple[str, set[str]]:
        output = tmp_path / folder
        sb3_mtrl.plot.main(["--algo", "pacosac", *TINY_ENV, "-f", str(tmp_path), "-o", str(output), *arguments])
        return capsys.readouterr().out, {path.stem for path in output.iterdir()}

    printed, drawn = draw("all")
    assert drawn == {"curves", "tasks", "final", "pacosac_training"}
    assert "No figure w, gate of pacosac: experiment 2 has no model yet" in printed
    assert draw("w", "--exp-id", "1", "--figures", "w")[1] == {"pacosac_w"}
    # Needs neither a model nor evaluations
    (experiments / f"{ENV_ID}_2" / "evaluations.npz").rename(experiments / f"{ENV_ID}_3" / "evaluations.npz")
    assert draw("training", "--exp-id", "2", "--figures", "training")[1] == {"pacosac_training"}


def test_curves_of_the_same_seed_are_warned_of(logs: Path, tmp_path: Path) -> None:
    for exp_id in (1, 2):
        shutil.copytree(logs / "pacosac" / f"{ENV_ID}_1", tmp_path / "pacosac" / f"{ENV_ID}_{exp_id}")
    with pytest.warns(UserWarning, match=r"the experiments 1, 2 were trained with the same seed \(3\)"):
        sb3_mtrl.plot.read_runs(str(tmp_path), ["pacosac"], ENV_ID, None)


def test_plot_leaves_out_short_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "results.csv"
    aborted = make_history("b", 2, [[0.0, 0.0]], steps=(10,))
    append_results(table, [row for history in (HISTORIES[0], HISTORIES[2], aborted) for row in history.rows()])
    arguments = ["--results", str(table), "-o", str(tmp_path), "--figures", "final"]
    sb3_mtrl.plot.main(arguments)
    printed = capsys.readouterr().out
    assert "Last evaluation during the training at steps 10, 20 (not comparable)" in printed and re.search(
        r"^b +2 +10 +\? +0%", printed, re.M
    )
    assert "Note: b: run 2 ends at step 10" in printed and "Note: the scores are of different steps (a 20, b 10)" in printed
    sb3_mtrl.plot.main([*arguments, "--leave-out-short"])
    printed = capsys.readouterr().out
    assert "Left out: b, run 2, which ends at step 10" in printed and re.search(r"^b +1 +20 +\? +20%", printed, re.M)
    assert "Note" not in printed


def test_number_of_episodes_behind_a_score(logs: Path, tmp_path: Path) -> None:
    path = logs / "mtsac" / f"{ENV_ID}_1" / "evaluations.npz"
    assert read_evaluations(path, "mtsac", ENV_ID, 1).episodes_per_task == 2
    # SB3's own EvalCallback writes no tasks
    np.savez(tmp_path / "evaluations.npz", timesteps=[10, 20], results=np.zeros((2, 5)), ep_lengths=np.ones((2, 5)))
    assert read_evaluations(tmp_path / "evaluations.npz", "sac", "Pendulum-v1", 1).episodes_per_task == 5


def test_plot_the_subspace(logs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--figures", "subspace", "--subspace-samples", "4", "-o", str(tmp_path)]
    sb3_mtrl.plot.main(["--algo", "pacosac", *TINY_ENV, "-f", str(logs), *arguments])
    assert_pictures(tmp_path, {"pacosac_subspace"})


def test_figures_show_the_numbers() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plot_learning_curves(HISTORIES).axes
    mean_a, *runs_of_a, mean_b = axes.lines
    assert mean_a.get_xdata().tolist() == [10, 20]
    np.testing.assert_allclose(mean_a.get_ydata(), [0.15, 0.65])
    np.testing.assert_allclose(mean_b.get_ydata(), [0.0, 0.2])
    # Each run to its own end
    for line, expected in zip(runs_of_a, ([0.1, 0.5], [0.2, 0.8, 1.0]), strict=True):
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(axes.collections) == 0  # too few runs for bands
    (axes,) = plot_learning_curves(HISTORIES[2:]).axes
    assert axes.get_legend().get_title().get_text() == "4 episodes of each task per point"
    panels = plot_task_curves(HISTORIES).axes
    np.testing.assert_allclose(panels[1].lines[0].get_ydata(), [0.3, 0.7])
    # The band of a task: Student's t over the runs, t_{0.975, 2} = 4.303, around 0.5 with s = 0.01
    runs = [make_history("a", seed, [[0.0, level]], steps=(10,)) for seed, level in enumerate((0.49, 0.5, 0.51))]
    figure = plot_task_curves(runs, n_resamples=20_000)
    assert figure.legends[0].get_title().get_text() == "bands: 95% intervals over runs"
    (band,) = figure.axes[1].collections
    ends = band.get_datalim(plot_task_curves(runs).axes[1].transData).intervaly
    assert ends == pytest.approx([0.5 - 4.303 * 0.01 / np.sqrt(3), 0.5 + 4.303 * 0.01 / np.sqrt(3)], rel=0.01)
    final = plot_final_scores([final_scores(HISTORIES[:2]), final_scores(HISTORIES[2:])])
    labels = [label.get_text() for label in final.axes[0].get_yticklabels()]
    assert labels == ["a (2 runs)\nstep 20", "b (1 run)\nstep 20, 4 ep. per task"]
    columns = {"train/lambda": np.array([1.0, 2]), "train/lambda/a": np.array([3.0, np.nan]), "train/x": np.ones(2)}
    figure = plot_logged_values(np.array([1, 2]), columns)
    assert [axes.get_ylabel() for axes in figure.axes] == ["train/lambda", "train/x"]
    assert {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines} == {"all tasks": [1, 2], "a": [3]}


def test_plot_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    append_results(tmp_path / "results.csv", [row for history in HISTORIES for row in history.rows()])
    sb3_mtrl.plot.main(["--results", str(tmp_path / "results.csv"), "-o", str(tmp_path / "plots")])
    assert re.search(r"^a +2 +20 +\? +65%", capsys.readouterr().out, re.M)
    assert_pictures(tmp_path / "plots", {"curves", "tasks", "final"})


def test_plot_of_runs_of_which_not_all_tell_of_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "results.csv"
    arguments = ["--results", str(table), "-o", str(tmp_path / "plots"), "--figures", "final", "--metric", "success"]
    append_results(table, make_history("b", 1, [[np.nan, np.nan], [np.nan, np.nan]]).rows())
    with pytest.raises(SystemExit):
        sb3_mtrl.plot.main(arguments)
    assert re.search("--metric must be return for these runs, got success", capsys.readouterr().err)
    append_results(table, make_history("a", 1, [[0.0, 0.5], [0.5, 1.0]]).rows())
    sb3_mtrl.plot.main(arguments)
    printed = capsys.readouterr().out
    assert re.search(r"^a +1 +20 +\? +75%", printed, re.M)
    assert re.search(r"^b +1 +20 +\? +- ", printed, re.M)
    assert "nan" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--algo", "mtsac"], "name trained agents with --algo and --env, or a table with --results"),
        (["--results", "x.csv", "--algo", "mtsac"], "argument --results: leave out"),
        (["--results", "x.csv"], "argument --results: there is no file x.csv"),
        (["--algo", "mtsac", "--env", ENV_ID, "-f", "nowhere"], "-f/--folder must be a folder .* nowhere/mtsac"),
        (["--algo", "mtsac", "--env", ENV_ID, "--exp-id", "9"], "--exp-id 9: no evaluations.npz"),
        (["--algo", "mtsac", "mtsac", "--env", ENV_ID], "--algo must name each one once, got mtsac mtsac"),
        (["--algo", "mtsac", "--env", ENV_ID, "--exp-id", "1", "1"], "--exp-id must name each one once, got 1 1"),
        (["--algo", "mtsac", "--env", ENV_ID, "--subspace-samples", "1"], "--subspace-samples: must be at least 2, got 1"),
    ],
)
def test_plot_refuses(arguments: list[str], message: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sb3_mtrl.plot.main(["-f", str(logs), *arguments])
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


# ---------------------------------------------------------------------- record


class PaintedPointEnv(PointTasksEnv):
    """Frames of one colour: red tells the step, green the task."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(self, render_mode: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self) -> np.ndarray:
        frame = np.zeros((20, 30, 3), dtype=np.uint8)
        frame[..., 0], frame[..., 1] = 10 * self._steps, 100 * self.task_id
        return frame


def test_cells_stand_still_when_their_episode_is_over() -> None:
    class Expert:
        """Walks to the goal in task 0, and the other way in task 1."""

        def predict(self, observation: np.ndarray, state: Any, episode_start: np.ndarray, deterministic: bool) -> Any:
            direction = observation[:, 2:4] - observation[:, :2]
            return np.clip(direction * np.where(observation[:, 4:5] > 0, 5, -5), -1, 1), state

    def make() -> PaintedPointEnv:
        return PaintedPointEnv("rgb_array", num_tasks=2, horizon=12, random_goals=False, terminate_on_success=True)

    env = VecTaskAssignment(DummyVecEnv([make, make]))
    shown = list(sb3_mtrl.record.play_cells(Expert(), env, every=2))
    assert [step for _, _, step in shown] == [0, 2, 4, 6, 8, 10, 12]
    # The goal is 1 away, give or take 0.15 of start and 0.15 of tolerance, in steps of 0.2 along the axis: 4 to 6 steps
    solved_at = shown[-1][1][0]
    assert 4 <= solved_at <= 6 and shown[-1][1][1] is None
    assert all((solved[0] is not None) == (step >= solved_at) for _, solved, step in shown)
    reds = np.array([[frame[0, 0, 0] // 10 for frame in frames] for frames, _, _ in shown])
    np.testing.assert_array_equal(reds[:, 1], [0, 2, 4, 6, 8, 10, 10])
    assert reds[-1, 0] == reds[:, 0].max() < solved_at


def test_grid() -> None:
    frames = [np.full((40, 40, 3), value, dtype=np.uint8) for value in (50, 100, 150)]
    grid = sb3_mtrl.record.draw_grid(frames, ["one", "two", "three"], [True, False, False], cell_size=40, n_columns=2)
    title = 16
    assert grid.shape == (2 * (40 + title), 80, 3) and grid.dtype == np.uint8
    assert [grid[y, x, 0] for y, x in ((30, 20), (30, 60), (90, 20), (90, 60))] == [50, 100, 150, 0]
    assert [tuple(grid[1, x]) for x in (38, 78)] == [sb3_mtrl.record.TITLE_COLOURS[solved] for solved in (True, False)]
    assert grid[:title, :40].max() > 200  # letters


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_record_writes_a_video(suffix: str, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imageio = pytest.importorskip("imageio.v2")
    path = tmp_path / f"grid{suffix}"
    with mock.patch.object(gym.spec(ENV_ID), "entry_point", PaintedPointEnv):
        command(sb3_mtrl.record, "cmtasac", logs, "-o", str(path), "--cell-size", "48", "--every", "5")
    assert f"Written: {path}" in capsys.readouterr().out
    frames = [np.asarray(frame)[..., :3] for frame in imageio.get_reader(path)]
    assert len(frames) == 5  # steps 0, 5, 10, 15, 20
    assert frames[0].shape == (2 * (48 + 16), 2 * 48, 3)
    # The tasks' green, up to compression
    assert [round(int(frames[1][y, x, 1]) / 100) for y, x in ((40, 24), (40, 72), (104, 24))] == [0, 1, 2]


def test_cells_need_tasks_that_can_be_set(tmp_path: Path) -> None:
    pytest.importorskip("imageio.v2")
    importlib.import_module("tests.tiny_zoo_envs")

    class OwnChoiceEnv(PaintedPointEnv):
        """Visits the tasks as it likes."""

        @property
        def set_tasks(self) -> Any:
            raise AttributeError

    (tmp_path / ENV_ID).mkdir()
    (tmp_path / ENV_ID / "config.yml").write_text("{}")
    run = TrainedRun("mtsac", ENV_ID, 1, tmp_path, tmp_path / "model.zip")
    message = rf"must have the method set_tasks\(task_ids\) for each cell to play a task of its own, {ENV_ID} has not"
    with mock.patch.object(gym.spec(ENV_ID), "entry_point", OwnChoiceEnv), pytest.raises(ValueError, match=message):
        sb3_mtrl.record.record_run(run, tmp_path / "grid.gif")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-f", "nowhere"], "-f/--folder must be a folder"),
        (["-o", "grid.avi"], "argument --output: must end with .mp4 or .gif, got grid.avi"),
        (["--cell-size", "41"], "argument --cell-size: must be an even number of at least 16, got 41"),
        (["--every", "0"], "argument --every: must be above 0, got 0"),
    ],
)
def test_record_refuses(arguments: list[str], message: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(sb3_mtrl.record, "mtsac", logs, *arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_runs_of_different_tasks_are_not_compared():
    """The id of a suite of one's own says nothing of its tasks."""

    def history(*task_names: str) -> RunHistory:
        scores = np.zeros((1, len(task_names)))
        return RunHistory("mtsac", "MetaWorld-Custom-v3", 1, task_names, np.array([10]), scores, scores)

    assert list(group_by_method([history("a", "b"), history("a", "b")])) == ["mtsac"]
    with pytest.raises(ValueError, match="histories must be of the same tasks, got a, b / a, c"):
        group_by_method([history("a", "b"), history("a", "c")])
