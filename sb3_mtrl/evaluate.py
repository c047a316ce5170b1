"""
``python -m sb3_mtrl.evaluate``: from a trained agent to a table of success rates with intervals.

    python -m sb3_mtrl.evaluate --algo pacosac --env MetaWorld-MT10-v3 -f logs/
    python -m sb3_mtrl.evaluate --algo pacosac --env MetaWorld-MT10-v3 -f logs/ --exp-id 1 2 3 --random-baseline

Deterministic policy; on Meta-World every task plays its fixed list of 50 goals, each of them once, and an episode counts as
solved if any of its steps succeeds. These are the goals that the training draws from, as in Meta-World's multi-task protocol:
the result tells what was learned, not how it generalises to other goals; ``--env-kwargs goal_seed:1`` plays others. Other
environments play the start states of a fixed seed. The agent is found as ``rl_zoo3.enjoy`` finds it, and its result is written
as JSON beside the model. With several experiments (seeds), their mean per task is shown with an interval, and written beside
their folders.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rl_zoo3.utils import EnvironmentName

import sb3_mtrl
from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED
from sb3_mtrl.common.evaluation import MultiTaskEvaluation, RandomPolicy, evaluate_multi_task_policy, format_task_table
from sb3_mtrl.common.statistics import success_interval_over_runs
from sb3_mtrl.common.utils import get_num_tasks
from sb3_mtrl.zoo.runs import VEC_ENVS, TrainedRun, add_run_arguments, find_runs, warn_of_equal_seeds

DEFAULT_EPISODES_PER_TASK = 50
# More tables side by side than this do not fit on a screen
MAX_RUNS_SIDE_BY_SIDE = 6
# Runs are only taken together that have these in common
COMMON_DETAILS = (
    *("algo", "env", "protocol", "episodes_per_task", "horizon", "goals_per_task", "goal_seed"),
    *("goals_of_training", "selected_on_these_goals", "seed", "deterministic", "sb3_mtrl"),
)


@dataclass(frozen=True)
class Protocol:
    """
    How results are published. Two protocols must not be mixed in one table.

    :param horizon: Steps of an episode
    :param episodes_per_task: Episodes of each task
    :param final_policy: Whether only the policy at the end of the training counts
    """

    horizon: int
    episodes_per_task: int
    final_policy: bool


PROTOCOLS = {
    # Meta-World's maintainers
    "standard": Protocol(horizon=500, episodes_per_task=50, final_policy=False),
    # PaCo's paper
    "paper": Protocol(horizon=150, episodes_per_task=10, final_policy=True),
}


@dataclass(frozen=True)
class EvaluatedRun:
    """
    A run and what its evaluation gave.

    :param run: The run
    :param evaluation: The episodes of the deterministic policy
    :param random: Those of a random policy; None if it was not asked for
    :param details: What was evaluated and how, in types that JSON can hold
    """

    run: TrainedRun
    evaluation: MultiTaskEvaluation
    random: MultiTaskEvaluation | None
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """
        :return: Details and results in types that JSON can hold
        """
        random = {} if self.random is None else {"random_policy": self.random.to_dict()}
        return {**self.details, **self.evaluation.to_dict(), **random}


def evaluate_run(
    run: TrainedRun,
    episodes_per_task: int | None = None,
    protocol: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    n_envs: int | None = None,
    vec_env: str = "dummy",
    device: str = "auto",
    random_baseline: bool = False,
) -> EvaluatedRun:
    """
    Evaluate the deterministic policy of a trained agent on every task's list of goals.

    :param run: The agent
    :param episodes_per_task: Episodes of each task; None: the protocol's, else one per goal of the environment (50 where it
        tells no number)
    :param protocol: "standard" or "paper"; None: the episodes are as long as those of the training
    :param env_kwargs: Arguments of the environment, over those of the training
    :param n_envs: Number of sub-environments, at most one per task (a task's goals are shared out to nobody); None: one
        per task
    :param vec_env: "dummy" or "subproc"
    :param device: PyTorch device
    :param random_baseline: Whether to evaluate a random policy on the same episodes, too
    :return: The result
    :raises ValueError: for a bad argument
    """
    asked_for = dict(env_kwargs or {})
    settled = {} if protocol is None else {"horizon": PROTOCOLS[protocol].horizon}
    env_kwargs = {**asked_for, **settled}
    goal_list = run.goal_list_kwargs(env_kwargs)
    if protocol is not None and not goal_list:
        raise ValueError(f"protocol={protocol!r} is about Meta-World's environments, got {run.env_id}")
    for name, value in {**settled, **goal_list}.items():
        if asked_for.get(name, value) != value:
            settled_by = f"protocol={protocol!r}" if name in settled else "an evaluation on the lists of goals"
            raise ValueError(f"env_kwargs must leave {name} to {settled_by} ({value!r}), got {asked_for[name]!r}")
    env = run.make_env({**env_kwargs, **goal_list}, n_envs, vec_env, DEFAULT_EVAL_SEED)
    try:
        if env.num_envs > get_num_tasks(env):
            raise ValueError(f"n_envs must be at most one per task ({get_num_tasks(env)}), got {env.num_envs}")
        n_goals = env.get_attr("n_goals", indices=0)[0] if env.has_attr("n_goals") else None
        n_episodes = episodes_per_task or _default_episodes(protocol, n_goals)
        if n_goals is not None and n_episodes > n_goals:
            warnings.warn(
                f"{n_episodes} episodes of a task with {n_goals} goals repeat each other: the intervals are too narrow",
                UserWarning,
                stacklevel=2,
            )
        model = run.load_model(device)

        def evaluate(policy: Any) -> MultiTaskEvaluation:
            return evaluate_multi_task_policy(policy, env, n_episodes, seed=DEFAULT_EVAL_SEED)

        random = evaluate(RandomPolicy(env.observation_space, env.action_space)) if random_baseline else None
        return EvaluatedRun(
            run,
            evaluate(model),
            random,
            {
                "algo": run.algo,
                "env": run.env_id,
                "exp_id": run.exp_id,
                "model": run.model_path.name,
                "num_timesteps": model.num_timesteps,
                "train_seed": run.train_args.get("seed"),
                "protocol": protocol,
                "episodes_per_task": n_episodes,
                "goals_per_task": n_goals,
                "horizon": env.get_attr("horizon", indices=0)[0] if env.has_attr("horizon") else None,
                **(run.compare_goals(env_kwargs) if goal_list else {}),
                "seed": DEFAULT_EVAL_SEED,
                "deterministic": True,
                "sb3_mtrl": sb3_mtrl.__version__,
            },
        )
    finally:
        env.close()


def _default_episodes(protocol: str | None, n_goals: int | None) -> int:
    n_episodes = DEFAULT_EPISODES_PER_TASK if protocol is None else PROTOCOLS[protocol].episodes_per_task
    return n_episodes if n_goals is None else min(n_episodes, n_goals)


def aggregate_runs(results: Sequence[EvaluatedRun]) -> dict[str, Any]:
    """
    What several runs say together; every run weighs the same. Those trained with the same seed are warned of.

    :param results: At least one result, of different models, and of the same tasks and numbers of episodes
    :return: What was evaluated and how, number of runs, and for the mean of the tasks and each task: mean, sample standard
        deviation over the runs, lowest and highest success rate, 95 % interval (see ``success_interval_over_runs``); None
        stands for an unknown number
    :raises ValueError: if they are of different tasks, or were not evaluated in the same way, or two are of the same model
    """
    models = [result.run.model_path.resolve() for result in results]
    for model in models:
        if models.count(model) > 1:
            raise ValueError(
                f"results must be of different models to be taken together, got {model} {models.count(model)} times"
            )
    for name in COMMON_DETAILS:
        values = [result.details.get(name) for result in results]
        if any(value != values[0] for value in values):
            each = ", ".join(
                f"{value} (experiment {result.run.exp_id})" for result, value in zip(results, values, strict=True)
            )
            raise ValueError(f"experiments must have the same {name} to be taken together, got {each}")
    evaluations = [result.evaluation for result in results]
    suites = sorted({", ".join(evaluation.task_names) for evaluation in evaluations})
    if len(suites) > 1:
        raise ValueError(f"experiments must have the same tasks to be taken together, got {' / '.join(suites)}")
    exp_ids = [result.run.exp_id for result in results]
    train_seeds = [result.details["train_seed"] for result in results]
    warn_of_equal_seeds(exp_ids, train_seeds)
    n_episodes = int(evaluations[0].episode_counts[0])
    task_names = evaluations[0].task_names
    rates = np.stack([evaluation.success_rates for evaluation in evaluations])  # (runs, T)
    return {
        **{name: results[0].details[name] for name in COMMON_DETAILS if name in results[0].details},
        "runs": len(results),
        "exp_ids": exp_ids,
        "models": [result.details["model"] for result in results],
        "num_timesteps": [result.details["num_timesteps"] for result in results],
        "train_seeds": train_seeds,
        **_summarize(rates.mean(axis=1), n_episodes * len(task_names)),
        "tasks": {name: _summarize(rates[:, task], n_episodes) for task, name in enumerate(task_names)},
    }


def _summarize(rates: np.ndarray, n_episodes: int) -> dict[str, Any]:
    if np.isnan(rates).any():
        return dict.fromkeys(("success_rate", "success_rate_std", "lowest", "highest", "success_interval_95"))
    return {
        "success_rate": float(rates.mean()),
        "success_rate_std": float(rates.std(ddof=1)) if len(rates) > 1 else None,
        "lowest": float(rates.min()),
        "highest": float(rates.max()),
        "success_interval_95": list(success_interval_over_runs(rates, n_episodes)),
    }


def format_aggregate(aggregate: Mapping[str, Any]) -> str:
    """
    :param aggregate: What ``aggregate_runs`` returned
    :return: A table with a row per task, without a line break at its end
    """
    rows = {**aggregate["tasks"], "mean of tasks": aggregate}
    width = max(map(len, rows))
    lines = [f"{'task':<{width}} | success  std of runs  lowest - highest  95% interval"]
    lines += [f"{name:<{width}} | {_format_summary(row)}" for name, row in rows.items()]
    rule = "-" * max(map(len, lines))
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    models = [
        f"experiment {exp_id}: {model} after {steps} steps"
        for exp_id, model, steps in zip(aggregate["exp_ids"], aggregate["models"], aggregate["num_timesteps"], strict=True)
    ]
    return "\n".join([f"{aggregate['runs']} runs ({', '.join(models)})", *lines])


def _format_summary(row: Mapping[str, Any]) -> str:
    if row["success_rate"] is None:
        return f"{'-':>7}"
    std = "-" if row["success_rate_std"] is None else f"{row['success_rate_std']:.1%}"
    spread = f"{row['lowest']:.0%} - {row['highest']:.0%}"
    low, high = row["success_interval_95"]
    return f"{row['success_rate']:>7.0%}  {std:>11}  {spread:>16}  {f'[{100 * low:.0f}, {100 * high:.0f}]':>12}"


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_mtrl.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--exp-id", type=int, nargs="+", default=[0], help="experiments (default: 0, the latest)")
    parser.add_argument(
        "--episodes-per-task", type=int, help="default: one per goal (Meta-World: 50), or what the protocol says"
    )
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        help="standard: 500 steps, 50 episodes per task; paper: 150 steps, 10 episodes per task, final policy (default: the "
        "episodes of the training)",
    )
    parser.add_argument("--random-baseline", action="store_true", help="evaluate a random policy, too")
    parser.add_argument("--n-envs", type=int, help="sub-environments (default: one per task)")
    parser.add_argument("--vec-env", choices=list(VEC_ENVS), default="dummy", help="default: %(default)s")
    args = parser.parse_args(arguments)
    for name in ("episodes_per_task", "n_envs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    is_final = not args.load_best and args.load_checkpoint is None and not args.load_last_checkpoint
    if args.protocol is not None and PROTOCOLS[args.protocol].final_policy and not is_final:
        parser.error(f"argument --protocol: {args.protocol} is about the final policy, leave out --load-...")

    results: list[EvaluatedRun] = []
    failures: list[str] = []

    def write(stem: Path, content: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        path = _json_path(stem, args.protocol, details)
        try:
            path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        except OSError as error:  # what was evaluated is shown all the same
            failures.append(f"Not written: {path}: {error.strerror}")
        else:
            print(f"Written: {path}")

    for index, run in enumerate(find_runs(parser, args, args.exp_id)):
        print(f"Loading {run.model_path}")
        try:
            result = evaluate_run(
                run,
                args.episodes_per_task,
                args.protocol,
                args.env_kwargs,
                args.n_envs,
                args.vec_env,
                args.device,
                # Equal for all runs
                args.random_baseline and index == 0,
            )
        except ValueError as error:
            parser.error(str(error))
        results.append(result)
        write(run.model_path.with_suffix(""), result.to_dict(), result.details)
    aggregate: dict[str, Any] = {}
    if len(results) > 1:
        try:
            aggregate = aggregate_runs(results)
        except ValueError as error:
            parser.error(str(error))
    print(_format_runs(results))
    if aggregate:
        print(format_aggregate(aggregate))
    for note in _notes_on_goals(results[0].details):
        print(f"Note: {note}")
    if aggregate:
        stem = Path(args.folder, args.algo, f"{EnvironmentName(args.env)}{_which_model(args)}")
        write(stem, aggregate, results[0].details)
    if failures:
        sys.exit("\n".join(failures))


def _which_model(args: argparse.Namespace) -> str:
    """What tells the files of other models of the same experiments apart from that of the final ones."""
    if args.load_best:
        return ".best_model"
    if args.load_checkpoint is not None:
        return f".rl_model_{args.load_checkpoint}_steps"
    return ".last_checkpoint" if args.load_last_checkpoint else ""


def _notes_on_goals(details: Mapping[str, Any]) -> list[str]:
    notes = []
    if details.get("goals_of_training") is True:
        notes.append(
            "the goals are those of the training (Meta-World's multi-task protocol): success on other goals is not measured; "
            "--env-kwargs goal_seed:1 plays others"
        )
    if details.get("selected_on_these_goals"):
        notes.append(
            "the best model was chosen by its success on goals among these: its success rate here is too high an estimate of "
            "that on others"
        )
    return notes


def _format_runs(results: Sequence[EvaluatedRun]) -> str:
    if len(results) > MAX_RUNS_SIDE_BY_SIDE:
        return ""
    tables = {f"experiment {result.run.exp_id}": result.evaluation for result in results}
    if results[0].random is not None:
        tables["random policy"] = results[0].random
    return format_task_table(tables, confidence=0.95, show_reward=len(tables) <= 2)


def _json_path(stem: Path, protocol: str | None, details: Mapping[str, Any]) -> Path:
    settings = [protocol] if protocol else []
    if details.get("goal_seed") != details.get("train_goal_seed"):
        settings.append(f"goal_seed_{details['goal_seed']}")
    return stem.with_name(f"{'-'.join([f'{stem.name}.evaluation', *settings])}.json")


if __name__ == "__main__":
    main()
