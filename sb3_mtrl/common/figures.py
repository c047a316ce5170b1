"""Pictures of trainings and methods. They need matplotlib, which the package's extra ``plots`` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_mtrl.common.results import (
    FinalScores,
    RunHistory,
    describe_final_scores,
    group_by_method,
    interval_over_runs,
    lowest_episodes_per_task,
    stack_histories,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS_LABELS = {"success": "success rate", "return": "mean return"}
# So many runs are drawn one by one, too
MAX_SINGLE_RUNS = 5
# The interval of two runs is twelve times as wide as the two are apart: it would cover a whole panel
MIN_BAND_RUNS = 3


def new_figure(width: float, height: float) -> "Figure":
    """
    :param width: Width in inches
    :param height: Height in inches
    :return: A figure that belongs to no window
    :raises ImportError: if the package's extra ``plots`` is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install sb3-mtrl[plots]") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """
    Write a figure as PNG and as SVG.

    :param figure: The figure
    :param path: Path without ending
    :return: The two files
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".svg")]
    for file in paths:
        # Without the date, so that equal pictures are equal files
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return paths


def plot_learning_curves(histories: Sequence[RunHistory], metric: str = "success", n_resamples: int = 500) -> "Figure":
    """
    :param histories: Runs of one environment
    :param metric: "success" or "return"
    :param n_resamples: Resamples of the bootstrap
    :return: The mean over tasks and runs of each method, with its 95 % interval over whole runs; the mean over tasks of each
        run, where there are few
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for runs in group_by_method(histories).values():
        _draw_curve(axes, runs, metric, slice(None), n_resamples)
    axes.set_title(f"{histories[0].env}, mean of {len(histories[0].task_names)} tasks")
    _finish_curve_axes(axes, metric)
    axes.legend(title=_describe_curves(histories), title_fontsize="small", fontsize="small")
    return figure


def plot_task_curves(histories: Sequence[RunHistory], metric: str = "success", n_resamples: int = 500) -> "Figure":
    """
    :param histories: Runs of one environment
    :param metric: "success" or "return"
    :param n_resamples: Resamples of the bootstrap
    :return: A panel per task, with the mean over runs of each method and its 95 % interval; each run, where there are few
    """
    task_names = histories[0].task_names
    n_columns = min(5, len(task_names))
    n_rows = -(-len(task_names) // n_columns)
    figure = new_figure(3.2 * n_columns, 2.6 * n_rows + 0.5)
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=metric == "success", squeeze=False).ravel()
    for runs in group_by_method(histories).values():
        for task, axes in enumerate(panels[: len(task_names)]):
            _draw_curve(axes, runs, metric, slice(task, task + 1), n_resamples)
    for axes, name in zip(panels, task_names, strict=False):
        axes.set_title(name, fontsize="medium")
        _finish_curve_axes(axes, metric)
        if metric == "success":  # on one scale
            axes.label_outer()
    for axes in panels[len(task_names) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, title=_describe_curves(histories))
    return figure


def plot_final_scores(finals: Sequence[FinalScores], metric: str = "success") -> "Figure":
    """
    :param finals: Final scores of each method
    :param metric: "success" or "return"
    :return: Interquartile mean and mean with their intervals over whole runs, spread over the tasks, and worst task, a row per
        method
    """
    figure = new_figure(11, 1.6 + 0.45 * len(finals))
    panels = figure.subplots(1, 4, sharey=True)
    rows = np.arange(len(finals))
    for axes, name in zip(panels[:2], ("iqm", "mean"), strict=True):
        values = np.array([getattr(final, name) for final in finals])
        ends = np.array([getattr(final, f"{name}_interval") for final in finals])  # (methods, 2)
        margins = np.abs(np.where(np.isnan(ends), values[:, None], ends) - values[:, None])
        axes.errorbar(values, rows, xerr=margins.T, fmt="o", capsize=4)
    panels[2].barh(rows, [final.task_std for final in finals])
    panels[3].barh(rows, [final.worst_mean for final in finals])
    for row, final in enumerate(finals):
        panels[3].annotate(f" {final.worst_task}", (0, row), va="center", fontsize="small")
    titles = ("IQM, 95% over runs", "mean, 95% over runs", "std over tasks", "worst task")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=AXIS_LABELS[metric])
        axes.grid(axis="x", alpha=0.3)
    if metric == "success":
        for axes in panels[[0, 1, 3]]:
            axes.set_xlim(-0.02, 1.02)
    panels[0].set_yticks(rows, [_final_label(final) for final in finals])
    panels[0].invert_yaxis()
    figure.suptitle(describe_final_scores(finals), fontsize="medium")
    return figure


def project_to_plane(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Principal components, the sign of each such that its largest entry is positive.

    :param vectors: Vectors ``(n, d)``
    :return: Coordinates in the plane of the first two ``(n, 2)``, and the shares of the variance they explain ``(2,)``; zeros
        where there are fewer than two dimensions
    """
    centred = vectors - vectors.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
    coordinates = centred @ (directions * signs[:, None]).T
    shares = lengths**2 / max(float((lengths**2).sum()), np.finfo(float).tiny)
    missing = max(0, 2 - coordinates.shape[1])
    return np.pad(coordinates, ((0, 0), (0, missing)))[:, :2], np.pad(shares, (0, missing))[:2]


def plot_compositional_vectors(w: np.ndarray, task_names: Sequence[str]) -> "Figure":
    """
    As in figure 3 of PaCo's paper, https://arxiv.org/abs/2210.11653.

    :param w: Compositional vectors ``(T, K)``
    :param task_names: T names
    :return: Their first two principal components, and the vectors themselves
    """
    figure = new_figure(11, max(4.0, 1.0 + 0.3 * len(task_names)))
    plane, matrix = figure.subplots(1, 2)
    points, shares = project_to_plane(w)
    plane.scatter(*points.T, c=np.arange(len(points)), cmap="tab20")
    middle = (points[:, 0].min() + points[:, 0].max()) / 2
    for point, name in zip(points, task_names, strict=True):
        # Towards the middle, where there is room
        plane.annotate(f" {name} ", point, fontsize="small", va="center", ha="right" if point[0] > middle else "left")
    plane.set(
        title="compositional vectors: principal components",
        xlabel=f"first ({shares[0]:.0%} of the variance)",
        ylabel=f"second ({shares[1]:.0%})",
    )
    limit = float(np.abs(w).max())
    image = matrix.imshow(w, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    matrix.set(title="W", xlabel="parameter set", xticks=range(w.shape[1]))
    matrix.set_yticks(range(len(task_names)), task_names)
    figure.colorbar(image, ax=matrix)
    return figure


def plot_policy_subspace(
    angles: np.ndarray, scores: np.ndarray, w: np.ndarray, task_names: Sequence[str], label: str = AXIS_LABELS["success"]
) -> "Figure":
    """
    What the policies of the plane between two parameter sets can do, cf. figure 4 of PaCo's paper.

    :param angles: Directions of the sampled vectors, radians ``(n,)``
    :param scores: Score of each sample on each task ``(n, T)``
    :param w: Compositional vectors of the tasks ``(T, 2)``
    :param task_names: T names
    :param label: What the scores are
    :return: The score by direction, a row per task; a cross marks the direction of the task's own vector
    """
    figure = new_figure(9, 1.6 + 0.35 * len(task_names))
    axes = figure.subplots()
    half_step = np.pi / len(angles)
    extent = (np.degrees(angles[0] - half_step), np.degrees(angles[-1] + half_step), len(task_names) - 0.5, -0.5)
    image = axes.imshow(scores.T, aspect="auto", interpolation="nearest", extent=extent)
    lowest = extent[0]
    own = (np.degrees(np.arctan2(w[:, 1], w[:, 0])) - lowest) % 360 + lowest
    axes.scatter(own, np.arange(len(task_names)), marker="x", color="red", label="the task's own vector")
    axes.set(title="policies sampled from the subspace, K = 2", xlabel="direction of w, degrees")
    axes.set_yticks(range(len(task_names)), task_names)
    figure.colorbar(image, ax=axes, label=label)
    figure.legend(loc="outside lower right")
    return figure


def plot_logged_values(steps: np.ndarray, columns: Mapping[str, np.ndarray], title: str = "") -> "Figure":
    """
    :param steps: Environment steps ``(rows,)``
    :param columns: Logged values by key ``(rows,)``, NaN where there is none, e.g. of ``train/lambda/reach-v3``
    :param title: Title
    :return: A panel per quantity (the key without its last part, where several keys share that) with a line per task
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    parents = {key for key in columns if any(other.startswith(f"{key}/") for other in columns)}
    for key, values in columns.items():
        quantity, _, task = key.rpartition("/")
        is_of_task = key.count("/") >= 2
        name, line = (quantity, task) if is_of_task else (key, "all tasks" if key in parents else key.partition("/")[2])
        panels.setdefault(name, {})[line] = values
    figure = new_figure(8, 0.4 + 3 * len(panels))
    for axes, (quantity, lines) in zip(figure.subplots(len(panels), 1, squeeze=False).ravel(), panels.items(), strict=True):
        colours = _colours(len(lines))
        for (line, values), colour in zip(lines.items(), colours, strict=True):
            known = ~np.isnan(values)
            style = dict(color="black", linestyle="--") if line == "all tasks" else dict(color=colour)
            axes.plot(steps[known], values[known], label=line, **style)
        axes.set(xlabel="environment steps", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    return figure


def _mean_over_runs_and_tasks(scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=(0, 1))


def _draw_curve(axes: Any, runs: Sequence[RunHistory], metric: str, tasks: slice, n_resamples: int) -> None:
    steps, scores = stack_histories(runs, metric)
    scores = scores[:, tasks]
    label = f"{runs[0].method} ({_count_runs(len(runs))})"
    (line,) = axes.plot(steps, _mean_over_runs_and_tasks(scores), label=label, marker="." if len(steps) < 30 else None)
    if len(runs) == 1:
        return
    if len(runs) >= MIN_BAND_RUNS:
        low, high = interval_over_runs(scores, _mean_over_runs_and_tasks, metric, n_resamples)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if len(runs) <= MAX_SINGLE_RUNS:
        for run in runs:  # each to its own end
            mean = run.scores(metric)[:, tasks].mean(axis=1)
            axes.plot(run.timesteps, mean, color=line.get_color(), linewidth=0.6, alpha=0.6)


def _describe_curves(histories: Sequence[RunHistory]) -> str:
    n_episodes = lowest_episodes_per_task(histories)
    has_bands = any(len(runs) >= MIN_BAND_RUNS for runs in group_by_method(histories).values())
    parts = [
        *([] if n_episodes is None else [f"{n_episodes} episode{'s' if n_episodes > 1 else ''} of each task per point"]),
        *(["bands: 95% intervals over runs"] if has_bands else []),
    ]
    return "; ".join(parts)


def _final_label(final: FinalScores) -> str:
    episodes = "" if final.episodes_per_task is None else f", {final.episodes_per_task} ep. per task"
    return f"{final.method} ({_count_runs(final.n_runs)})\nstep {final.step}{episodes}"


def _finish_curve_axes(axes: Any, metric: str) -> None:
    axes.set(xlabel="environment steps", ylabel=AXIS_LABELS[metric])
    axes.grid(alpha=0.3)
    if metric == "success":
        axes.set_ylim(-0.02, 1.02)


def _count_runs(n_runs: int) -> str:
    return f"{n_runs} run{'s' if n_runs > 1 else ''}"


def _colours(n_lines: int) -> Any:
    from matplotlib import colormaps

    # Qualitative colours while there are enough of them
    return colormaps["tab20"](np.arange(n_lines)) if n_lines <= 20 else colormaps["viridis"](np.linspace(0, 1, n_lines))
