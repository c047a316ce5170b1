"""From a trained agent to tables, pictures and videos: the commands ``sb3_mtrl.evaluate``, ``.plot`` and ``.record``."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import sb3_mtrl.evaluate
from sb3_mtrl import MTSAC
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy, wilson_interval
from sb3_mtrl.common.statistics import success_interval_over_runs
from sb3_mtrl.common.vec_env import VecTaskNormalize
from sb3_mtrl.zoo.runs import find_run
from tests.test_zoo import ENV_ID, TINY_ENV, TINY_NETS, zoo_train

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


def test_evaluate_several_experiments(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(sb3_mtrl.evaluate, "mtsac", logs, "--exp-id", "1", "2", "--episodes-per-task", "2", "--n-envs", "2")
    assert "2 runs" in capsys.readouterr().out
    runs = [json.loads((logs / "mtsac" / f"{ENV_ID}_{i}" / f"{ENV_ID}.evaluation.json").read_text()) for i in (1, 2)]
    together = json.loads((logs / "mtsac" / f"{ENV_ID}.evaluation.json").read_text())
    assert together["exp_ids"] == [1, 2]
    for task in TASKS:
        rates = np.array([run["tasks"][task]["success_rate"] for run in runs])
        assert together["tasks"][task]["success_rate"] == pytest.approx(rates.mean())
        assert together["tasks"][task]["success_interval_95"] == pytest.approx(success_interval_over_runs(rates, 2))


def test_saved_normalisation_is_used(logs: Path) -> None:
    run = find_run(logs, "mtsac", ENV_ID, 2)
    env = run.make_env()
    assert isinstance(env, VecTaskNormalize) and not env.training and not env.norm_reward
    assert env.num_envs == 3 and env.get_attr("assigned_tasks") == [(0,), (1,), (2,)]
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


def test_success_interval_over_runs() -> None:
    # Equal runs: Wilson's interval over all episodes
    assert success_interval_over_runs(np.ones(3), 10) == pytest.approx(wilson_interval(30, 30))
    # Two runs at 0.4 and 0.6 of many episodes: 0.5 -+ t_{0.975, 1} s / sqrt(2), s = 0.1 sqrt(2), t = 12.706, cut at 0 and 1
    assert success_interval_over_runs(np.array([0.4, 0.6]), 10_000) == (0.0, 1.0)
    # Three runs: t_{0.975, 2} = 4.3027, s = 0.01
    low, high = success_interval_over_runs(np.array([0.49, 0.5, 0.51]), 10**6)
    assert (low, high) == pytest.approx((0.5 - 4.3027 * 0.01 / np.sqrt(3), 0.5 + 4.3027 * 0.01 / np.sqrt(3)), abs=1e-6)
    assert np.isnan(success_interval_over_runs(np.array([np.nan, 1.0]), 5)).all()
