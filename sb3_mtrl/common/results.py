"""Learning curves of finished and running trainings: reading them, putting several together, and their final table."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sb3_mtrl.common.statistics import interquartile_mean, stratified_bootstrap
from sb3_mtrl.common.utils import check_choice

METRICS = ("success", "return")
TIDY_COLUMNS = ("method", "env", "seed", "step", "task", "success", "return")


@dataclass(frozen=True, eq=False)
class RunHistory:
    """
    The evaluations of one training. ``E`` is their number, ``T`` the number of tasks.

    :param method: Name of the algorithm
    :param env: Id of the environment
    :param seed: Seed of the training, or number of the experiment: what tells its runs apart
    :param task_names: Names of the tasks
    :param timesteps: Environment steps over all tasks at each evaluation ``(E,)``, rising
    :param success_rates: Success rates ``(E, T)``, NaN where the environment tells nothing of success
    :param mean_returns: Mean returns ``(E, T)``
    :raises ValueError: if the shapes do not fit or there is no evaluation
    """

    method: str
    env: str
    seed: int
    task_names: tuple[str, ...]
    timesteps: np.ndarray
    success_rates: np.ndarray
    mean_returns: np.ndarray

    def __post_init__(self) -> None:
        expected = (len(self.timesteps), len(self.task_names))
        for name in ("success_rates", "mean_returns"):
            shape = np.shape(getattr(self, name))
            if shape != expected:
                raise ValueError(f"{name} must have the shape (evaluations, tasks) = {expected}, got {shape}")
        if 0 in expected:
            raise ValueError(f"a history must hold at least one evaluation of one task, got {expected}")

    @property
    def has_success(self) -> bool:
        """Whether the environment tells of success."""
        return not bool(np.isnan(self.success_rates).any())

    def scores(self, metric: str) -> np.ndarray:
        """
        :param metric: "success" or "return"
        :return: The values ``(E, T)``
        """
        check_choice("metric", metric, METRICS)
        return self.success_rates if metric == "success" else self.mean_returns

    def rows(self) -> list[dict[str, Any]]:
        """
        :return: A row per evaluation and task, with the columns ``TIDY_COLUMNS``
        """
        return [
            dict(
                zip(
                    TIDY_COLUMNS,
                    (
                        self.method,
                        self.env,
                        self.seed,
                        int(step),
                        task,
                        round(float(success), 4),
                        round(float(mean_return), 3),
                    ),
                    strict=True,
                )
            )
            for step, successes, returns in zip(self.timesteps, self.success_rates, self.mean_returns, strict=True)
            for task, success, mean_return in zip(self.task_names, successes, returns, strict=True)
        ]


def read_evaluations(path: str | Path, method: str, env: str, seed: int) -> RunHistory:
    """
    Read what ``MultiTaskEvalCallback`` (or SB3's ``EvalCallback``, then as a single task "all") wrote during a training.

    :param path: ``evaluations.npz``
    :param method: Name of the algorithm
    :param env: Id of the environment
    :param seed: What tells the runs of this algorithm apart
    :return: The history
    :raises ValueError: if the file holds no evaluations
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        timesteps, results = arrays["timesteps"], arrays["results"]
    except Exception as error:  # numpy raises errors of many kinds for a damaged file
        raise ValueError(f"{path} does not hold the evaluations of a training") from error
    if "task_mean_rewards" in arrays:
        task_names = tuple(arrays["task_names"].tolist())
        returns, successes = arrays["task_mean_rewards"], arrays.get("task_success_rates")
    else:
        task_names = ("all",)
        returns = results.mean(axis=1, keepdims=True)
        successes = arrays["successes"].mean(axis=1, keepdims=True) if "successes" in arrays else None
    if successes is None:
        successes = np.full(np.shape(returns), np.nan)
    return RunHistory(method, env, seed, task_names, timesteps, np.asarray(successes, dtype=np.float64), np.asarray(returns))


def read_tidy_results(path: str | Path) -> list[RunHistory]:
    """
    Read a table of several trainings, a row per method, environment, seed, step and task.

    :param path: CSV file with the columns ``TIDY_COLUMNS``
    :return: A history per method, environment and seed, in the order of the file
    :raises ValueError: if a column is missing, or a run has not the same tasks at each step
    """
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in TIDY_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must have the columns {', '.join(TIDY_COLUMNS)}, it lacks {', '.join(missing)}")
        rows = list(reader)
    runs: dict[tuple[str, str, int], dict[int, dict[str, tuple[float, float]]]] = {}
    for row in rows:
        run = runs.setdefault((row["method"], row["env"], int(row["seed"])), {})
        run.setdefault(int(row["step"]), {})[row["task"]] = (float(row["success"]), float(row["return"]))
    return [_history_of(key, by_step, path) for key, by_step in runs.items()]


def _history_of(
    key: tuple[str, str, int], by_step: Mapping[int, Mapping[str, tuple[float, float]]], path: str | Path
) -> RunHistory:
    task_names = tuple(next(iter(by_step.values())))
    steps = sorted(by_step)
    if any(set(by_step[step]) != set(task_names) for step in steps):
        raise ValueError(f"{path}: every step of {key} must have the same tasks")
    values = np.array([[by_step[step][task] for task in task_names] for step in steps])  # (E, T, 2)
    return RunHistory(*key, task_names, np.array(steps), values[..., 0], values[..., 1])


def stack_histories(histories: Sequence[RunHistory], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """
    :param histories: Runs of the same tasks, at least one
    :param metric: "success" or "return"
    :return: The steps at which every run was evaluated ``(E,)``, and the scores ``(runs, T, E)``
    :raises ValueError: if the tasks differ, or no step is common to all
    """
    task_names = histories[0].task_names
    for history in histories:
        if history.task_names != task_names:
            raise ValueError(f"runs must have the same tasks to be put together, got {task_names} and {history.task_names}")
    steps = np.array(sorted(set.intersection(*(set(history.timesteps.tolist()) for history in histories))))
    if len(steps) == 0:
        raise ValueError(f"{len(histories)} runs of {histories[0].method} have no evaluation at the same step")
    scores = [history.scores(metric)[np.searchsorted(history.timesteps, steps)].T for history in histories]
    return steps, np.stack(scores)


def group_by_method(histories: Sequence[RunHistory]) -> dict[str, list[RunHistory]]:
    """
    :param histories: Runs of one environment
    :return: The runs of each method, in order of appearance
    :raises ValueError: if there is none, or they are of several environments or different tasks
    """
    environments = sorted({history.env for history in histories})
    if len(environments) != 1:
        raise ValueError(f"histories must be of one environment, got {', '.join(environments) or 'none'}")
    suites = sorted({", ".join(history.task_names) for history in histories})
    if len(suites) > 1:
        raise ValueError(f"histories must be of the same tasks, got {' / '.join(suites)}")
    groups: dict[str, list[RunHistory]] = {}
    for history in histories:
        groups.setdefault(history.method, []).append(history)
    return groups


@dataclass(frozen=True, eq=False)
class FinalScores:
    """
    What the last common evaluation of a method's runs says.

    :param method: Name of the algorithm
    :param n_runs: Number of runs
    :param step: Environment steps at that evaluation
    :param task_names: T names
    :param task_means: Mean over the runs of each task ``(T,)``
    :param mean: Mean over runs and tasks
    :param mean_interval: 95 % stratified bootstrap interval ``(2,)``; NaN for a single run
    :param iqm: Interquartile mean over runs and tasks
    :param iqm_interval: Its interval ``(2,)``
    :param task_std: Standard deviation (population) of ``task_means``
    :param worst_task: Name of the task with the lowest mean
    """

    method: str
    n_runs: int
    step: int
    task_names: tuple[str, ...]
    task_means: np.ndarray
    mean: float
    mean_interval: np.ndarray
    iqm: float
    iqm_interval: np.ndarray
    task_std: float
    worst_task: str

    @property
    def worst_mean(self) -> float:
        """Mean over the runs of the worst task."""
        return float(self.task_means.min())


def final_scores(histories: Sequence[RunHistory], metric: str = "success", n_resamples: int = 2000) -> FinalScores:
    """
    :param histories: Runs of one method and the same tasks
    :param metric: "success" or "return"
    :param n_resamples: Resamples of the bootstrap
    :return: Their final scores
    """
    steps, scores = stack_histories(histories, metric)
    final = scores[:, :, -1]  # (runs, T)
    task_means = final.mean(axis=0)
    interval: Callable[..., np.ndarray] = partial(stratified_bootstrap, final, n_resamples=n_resamples)
    return FinalScores(
        method=histories[0].method,
        n_runs=len(histories),
        step=int(steps[-1]),
        task_names=histories[0].task_names,
        task_means=task_means,
        mean=float(final.mean()),
        mean_interval=interval(np.mean),
        iqm=interquartile_mean(final),
        iqm_interval=interval(interquartile_mean),
        task_std=float(task_means.std()),
        worst_task=histories[0].task_names[int(task_means.argmin())],
    )


def format_final_table(finals: Sequence[FinalScores], metric: str = "success") -> str:
    """
    :param finals: Final scores of each method, of the same tasks
    :param metric: "success" (shown in percent) or "return"
    :return: A plain-text table with a row per method, and below one with a row per task; without a line break at its end
    """
    show = "{:.0%}".format if metric == "success" else "{:.1f}".format

    def interval(ends: np.ndarray) -> str:
        return "-" if np.isnan(ends).any() else f"[{show(ends[0])}, {show(ends[1])}]"

    rows = [("method", "runs", "steps", "mean", "95% interval", "IQM", "95% interval", "std of tasks", "worst task")]
    for final in finals:
        worst = f"{final.worst_task} {show(final.worst_mean)}"
        numbers = (show(final.mean), interval(final.mean_interval), show(final.iqm), interval(final.iqm_interval))
        rows.append((final.method, str(final.n_runs), str(final.step), *numbers, show(final.task_std), worst))
    task_rows = [("task", *(final.method for final in finals))]
    task_rows += [
        (name, *(show(final.task_means[task]) for final in finals)) for task, name in enumerate(finals[0].task_names)
    ]
    return "\n".join([*_align_rows(rows), "", *_align_rows(task_rows)])


def _align_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def read_progress(folder: str | Path, prefixes: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    Read what the logger wrote in CSV during a training (``progress.csv``; a training that was continued has several).

    :param folder: Folder of the experiment
    :param prefixes: Beginnings of the columns to read, e.g. ``("train/lambda", "train/edit_size")``
    :return: Environment steps ``(rows,)``, and the values of each column that begins so ``(rows,)``, NaN where there is none
    :raises FileNotFoundError: if there is no such file
    """
    paths = sorted(Path(folder).glob("progress*.csv"), key=lambda path: int("0" + re.sub(r"\D", "", path.stem)))
    if not paths:
        raise FileNotFoundError(f"no progress.csv in {folder}")
    rows: dict[int, dict[str, float]] = {}
    columns: dict[str, None] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if not row.get("time/total_timesteps"):
                    continue  # a line that is being written
                # A column that is new gives earlier rows no value
                values = {
                    name: float(value) for name, value in row.items() if name and value and name.startswith(tuple(prefixes))
                }
                rows.setdefault(int(float(row["time/total_timesteps"])), {}).update(values)
                columns.update(dict.fromkeys(values))
    steps = sorted(rows)
    return np.array(steps), {name: np.array([rows[step].get(name, np.nan) for step in steps]) for name in columns}
