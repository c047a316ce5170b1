"""Learning curves of finished and running trainings: reading them, putting several together, and their final table."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sb3_mtrl.common.statistics import interquartile_mean, run_bootstrap, stratified_bootstrap
from sb3_mtrl.common.utils import check_choice

METRICS = ("success", "return")
TIDY_COLUMNS = ("method", "env", "seed", "step", "task", "success", "return")
# Of the table of final scores
LEGEND = (
    "episodes: of each task, behind the score of a run (?: the table of results does not tell)",
    "95% (runs): whole runs resampled, with Student's t for their number; few runs say little, one run says nothing",
    "95% (stratified): rliable's interval of the IQM, which takes every (run, task) for a training of its own. Where one run",
    "    learns all tasks, it is too narrow",
)


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
    :param episodes_per_task: Number of episodes behind each rate and return; None where it is not known
    :raises ValueError: if the shapes do not fit, there is no evaluation, or the steps do not rise
    """

    method: str
    env: str
    seed: int
    task_names: tuple[str, ...]
    timesteps: np.ndarray
    success_rates: np.ndarray
    mean_returns: np.ndarray
    episodes_per_task: int | None = None

    def __post_init__(self) -> None:
        expected = (len(self.timesteps), len(self.task_names))
        for name in ("success_rates", "mean_returns"):
            shape = np.shape(getattr(self, name))
            if shape != expected:
                raise ValueError(f"{name} must have the shape (evaluations, tasks) = {expected}, got {shape}")
        if 0 in expected:
            raise ValueError(f"a history must hold at least one evaluation of one task, got {expected}")
        for before, after in pairwise(np.asarray(self.timesteps).tolist()):
            if after <= before:
                raise ValueError(
                    f"timesteps must rise, as in one training, got {after} after {before} (a callback that is used for a "
                    "second learn() from step 0 writes both trainings into one file)"
                )

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
    :raises ValueError: if the file does not hold the evaluations of one training
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
        n_episodes = int(np.bincount(arrays["task_ids"], minlength=len(task_names)).min())
    else:
        task_names = ("all",)
        returns = results.mean(axis=1, keepdims=True)
        successes = arrays["successes"].mean(axis=1, keepdims=True) if "successes" in arrays else None
        n_episodes = results.shape[1]
    if successes is None:
        successes = np.full(np.shape(returns), np.nan)
    successes = np.asarray(successes, dtype=np.float64)
    try:
        return RunHistory(method, env, seed, task_names, timesteps, successes, np.asarray(returns), n_episodes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def leave_out_short_runs(histories: Sequence[RunHistory]) -> list[RunHistory]:
    """
    :param histories: Runs of one environment
    :return: Those that go as far as the longest run of their method
    """
    last_steps = {method: max(map(_last_step, runs)) for method, runs in group_by_method(histories).items()}
    return [history for history in histories if _last_step(history) == last_steps[history.method]]


def _last_step(history: RunHistory) -> int:
    return int(history.timesteps[-1])


@dataclass(frozen=True, eq=False)
class FinalScores:
    """
    What the last common evaluation of a method's runs says.

    :param method: Name of the algorithm
    :param n_runs: Number of runs
    :param step: Environment steps at that evaluation
    :param n_evaluations: Number of evaluations of the longest run
    :param episodes_per_task: Number of episodes behind the score of a run on a task, the lowest of the runs; None where it is
        not known
    :param task_names: T names
    :param task_means: Mean over the runs of each task ``(T,)``
    :param mean: Mean over runs and tasks
    :param mean_interval: 95 % interval over whole runs (``run_bootstrap``) ``(2,)``; NaN for a single run
    :param iqm: Interquartile mean over runs and tasks
    :param iqm_interval: Its interval over whole runs ``(2,)``
    :param iqm_stratified_interval: Its interval if every score were a training of its own (``stratified_bootstrap``) ``(2,)``
    :param task_std: Standard deviation (population) of ``task_means``
    :param worst_task: Name of the task with the lowest mean
    """

    method: str
    n_runs: int
    step: int
    n_evaluations: int
    episodes_per_task: int | None
    task_names: tuple[str, ...]
    task_means: np.ndarray
    mean: float
    mean_interval: np.ndarray
    iqm: float
    iqm_interval: np.ndarray
    iqm_stratified_interval: np.ndarray
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
    :param n_resamples: Resamples of the bootstraps
    :return: Their final scores
    """
    steps, scores = stack_histories(histories, metric)
    final = scores[:, :, -1]  # (runs, T)
    task_means = final.mean(axis=0)
    return FinalScores(
        method=histories[0].method,
        n_runs=len(histories),
        step=int(steps[-1]),
        n_evaluations=max(len(history.timesteps) for history in histories),
        episodes_per_task=lowest_episodes_per_task(histories),
        task_names=histories[0].task_names,
        task_means=task_means,
        mean=float(final.mean()),
        mean_interval=interval_over_runs(final, np.mean, metric, n_resamples),
        iqm=interquartile_mean(final),
        iqm_interval=interval_over_runs(final, interquartile_mean, metric, n_resamples),
        iqm_stratified_interval=stratified_bootstrap(final, interquartile_mean, n_resamples),
        task_std=float(task_means.std()),
        worst_task=histories[0].task_names[int(task_means.argmin())],
    )


def interval_over_runs(
    scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray | float], metric: str, n_resamples: int
) -> np.ndarray:
    """
    :param scores: Scores ``(runs, T, ...)``
    :param statistic: Function of such an array
    :param metric: "success" or "return"
    :param n_resamples: Resamples of the bootstrap
    :return: 95 % interval of ``run_bootstrap``; that of a success rate ends at 0 and 1
    """
    interval = run_bootstrap(scores, statistic, n_resamples)
    return np.clip(interval, 0.0, 1.0) if metric == "success" else interval


def lowest_episodes_per_task(histories: Sequence[RunHistory]) -> int | None:
    """
    :param histories: Runs
    :return: The lowest number of episodes behind a score; None if that of a run is not known
    """
    numbers = [history.episodes_per_task for history in histories if history.episodes_per_task is not None]
    return min(numbers) if len(numbers) == len(histories) else None


def describe_final_scores(finals: Sequence[FinalScores]) -> str:
    """
    :param finals: Final scores of each method
    :return: A line that tells which evaluations these scores are
    """
    is_curve = any(final.n_evaluations > 1 for final in finals)
    steps = sorted({final.step for final in finals if final.step > 0})  # at 0 there was no training
    at = ""
    if steps:
        at = f" at step {steps[0]}" if len(steps) == 1 else f" at steps {', '.join(map(str, steps))} (not comparable)"
    return f"{'Last evaluation during the training' if is_curve else 'One evaluation of each run'}{at}"


def notes_on_final_scores(histories: Sequence[RunHistory], finals: Sequence[FinalScores]) -> list[str]:
    """
    What keeps final scores from being compared.

    :param histories: Runs of one environment
    :param finals: Final scores of each method
    :return: A line for each method whose runs end at different steps, and one if the scores are of different steps
    """
    notes = []
    groups = group_by_method(histories)
    for final in finals:
        runs = groups[final.method]
        longest = max(map(_last_step, runs))
        if final.step < longest:
            ends = ", ".join(f"run {run.seed} ends at step {_last_step(run)}" for run in runs if _last_step(run) < longest)
            why = ends or "its runs were not evaluated at the same steps"
            notes.append(
                f"{final.method}: {why}; the scores are of step {final.step}, which all its runs share, not {longest}"
            )
    trained = {final.method: final.step for final in finals if final.step > 0}
    if len(set(trained.values())) > 1:
        steps = ", ".join(f"{method} {step}" for method, step in trained.items())
        notes.append(f"the scores are of different steps ({steps}): they do not compare the methods")
    return notes


def format_final_table(finals: Sequence[FinalScores], metric: str = "success") -> str:
    """
    :param finals: Final scores of each method, of the same tasks
    :param metric: "success" (shown in percent) or "return"
    :return: A plain-text table with a row per method, what its intervals are, and below one with a row per task; without a
        line break at its end
    """

    def show(value: float) -> str:
        if np.isnan(value):
            return "-"
        return f"{value:.0%}" if metric == "success" else f"{value:.1f}"

    def interval(ends: np.ndarray) -> str:
        return "-" if np.isnan(ends).any() else f"[{show(ends[0])}, {show(ends[1])}]"

    head = ("method", "runs", "steps", "episodes", "mean", "95% (runs)", "IQM", "95% (runs)", "95% (stratified)")
    rows = [(*head, "std of tasks", "worst task")]
    for final in finals:
        numbers = (
            *("?" if final.episodes_per_task is None else str(final.episodes_per_task), show(final.mean)),
            *(interval(final.mean_interval), show(final.iqm), interval(final.iqm_interval)),
            *(interval(final.iqm_stratified_interval), show(final.task_std), f"{final.worst_task} {show(final.worst_mean)}"),
        )
        rows.append((final.method, str(final.n_runs), str(final.step), *numbers))
    task_rows = [("task", *(final.method for final in finals))]
    task_rows += [
        (name, *(show(final.task_means[task]) for final in finals)) for task, name in enumerate(finals[0].task_names)
    ]
    return "\n".join([describe_final_scores(finals), "", *_align_rows(rows), *LEGEND, "", *_align_rows(task_rows)])


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
    # progress.csv before progress_0.csv
    paths = sorted(Path(folder).glob("progress*.csv"), key=lambda path: int(re.sub(r"\D", "", path.stem) or -1))
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
