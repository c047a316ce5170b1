"""
``python -m sb3_mtrl.plot``: learning curves, a final table with intervals, and pictures of the methods, as PNG and SVG.

    python -m sb3_mtrl.plot --algo mtsac pacosac --env MetaWorld-MT10-v3 -f logs/ -o plots/
    python -m sb3_mtrl.plot --results benchmarks/learning/cpu_suite.csv -o plots/

Curves, table and final figure come from the ``evaluations.npz`` that training writes, over all experiments (or those of
``--exp-id``); intervals are 95 % stratified bootstrap intervals over the runs, so one run has none. The pictures of methods
come from the last of these experiments:

* ``w``: PaCo's compositional vectors, and their principal components
* ``subspace``: with K = 2, what policies sampled from the plane between PaCo's two parameter sets can do (it plays episodes)
* ``gate``: CMTA's gate over an episode, from the last ``gate_weights_*.npz``, else it plays one
* ``training``: what was logged during training (``progress.csv``), e.g. STARS' quotas, TSAC's lambda and edit size

Without ``--figures`` all are drawn that apply, but for the subspace.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from rl_zoo3.utils import EnvironmentName

from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED, play_gate_episodes, plot_gate_weights
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy
from sb3_mtrl.common.figures import (
    plot_compositional_vectors,
    plot_final_scores,
    plot_learning_curves,
    plot_logged_values,
    plot_policy_subspace,
    plot_task_curves,
    save_figure,
)
from sb3_mtrl.common.results import (
    METRICS,
    RunHistory,
    final_scores,
    format_final_table,
    group_by_method,
    read_evaluations,
    read_progress,
    read_tidy_results,
)
from sb3_mtrl.zoo import register
from sb3_mtrl.zoo.patches import TRAIN_FOLDER
from sb3_mtrl.zoo.runs import TrainedRun, find_experiments, find_run, import_packages

CURVE_FIGURES = ("curves", "tasks", "final")
METHOD_FIGURES = ("w", "subspace", "gate", "training")
# Beginnings of the logger's keys that say what a method does
LOGGED_COLUMNS = {
    "mtsac": ("train/ent_coef/", "train/critic_loss/"),
    "pacosac": ("train/w_norm", "train/w_resets", "train/dropped_updates"),
    "cmtasac": ("train/contrastive_loss", "train/gate_entropy"),
    "tsacsac": ("train/lambda", "train/edit_size"),
    "starssac": ("train/priority_quota/", "train/priority_success/"),
}


class NotApplicable(Exception):
    """A figure cannot be drawn of this run; the message says why."""


def read_runs(folder: str, algos: Sequence[str], env_id: str, exp_ids: Sequence[int] | None) -> list[RunHistory]:
    """
    :param folder: Folder of all agents
    :param algos: Names of the algorithms in RL Zoo
    :param env_id: Id of the environment
    :param exp_ids: Numbers of the experiments of each algorithm; None: all that have evaluations
    :return: Their histories
    :raises FileNotFoundError: if an experiment or its evaluations are missing
    """
    histories = []
    for algo in algos:
        known = find_experiments(folder, algo, env_id)
        paths = {exp_id: Path(folder, algo, f"{EnvironmentName(env_id)}_{exp_id}", "evaluations.npz") for exp_id in known}
        chosen = [exp_id for exp_id in known if paths[exp_id].is_file()] if exp_ids is None else exp_ids
        for exp_id in chosen:
            if exp_id not in paths or not paths[exp_id].is_file():
                raise FileNotFoundError(
                    f"--exp-id {exp_id}: no evaluations.npz for --algo {algo} --env {env_id} in {folder} (there are {known}); "
                    "training writes it unless --eval-freq is -1"
                )
            histories.append(read_evaluations(paths[exp_id], algo, env_id, exp_id))
        if not chosen:
            raise FileNotFoundError(
                f"no experiment of --algo {algo} --env {env_id} in {folder} has an evaluations.npz; training writes it unless "
                "--eval-freq is -1"
            )
    return histories


def draw_curves(histories: Sequence[RunHistory], figures: Sequence[str], metric: str | None, output: Path) -> list[Path]:
    """
    Draw the figures of learning curves and print the final table.

    :param histories: Runs of one environment
    :param figures: Some of ``CURVE_FIGURES``
    :param metric: "success" or "return"; None: success where the environment tells of it
    :param output: Folder
    :return: The files
    """
    if metric is None:
        metric = "success" if all(history.has_success for history in histories) else "return"
    finals = [final_scores(runs, metric) for runs in group_by_method(histories).values()]
    print(format_final_table(finals, metric))
    draw: dict[str, Callable[[], Any]] = {
        "curves": lambda: plot_learning_curves(histories, metric),
        "tasks": lambda: plot_task_curves(histories, metric),
        "final": lambda: plot_final_scores(finals, metric),
    }
    return [path for name in CURVE_FIGURES if name in figures for path in save_figure(draw[name](), output / name)]


def draw_method(run: TrainedRun, figure: str, args: argparse.Namespace) -> Any:
    """
    :param run: A trained agent
    :param figure: One of ``METHOD_FIGURES``
    :param args: The command line
    :return: The figure
    :raises NotApplicable: if there is nothing to draw
    """
    if figure == "training":
        return _draw_training(run, args.columns or LOGGED_COLUMNS.get(run.algo, ()))
    if figure == "gate" and (weights_path := _latest_gate_weights(run.folder)) is not None:
        with np.load(weights_path) as file:
            return plot_gate_weights(file["weights"], file["task_names"].tolist())
    model: Any = run.load_model("cpu")
    wanted = "gate_weights" if figure == "gate" else "compositional_vectors"
    if not hasattr(model.policy, wanted):
        raise NotApplicable(f"{run.algo} has no {wanted.replace('_', ' ')}")
    if figure == "gate":
        env = run.make_env()
        try:
            return plot_gate_weights(play_gate_episodes(model, env)[0], model.task_names)
        finally:
            env.close()
    if figure == "w":
        w = model.policy.compositional_vectors.detach().numpy()
        return plot_compositional_vectors(w, model.task_names)
    return _draw_subspace(run, model, args.subspace_samples)


def _latest_gate_weights(folder: Path) -> Path | None:
    paths = sorted(folder.rglob("gate_weights_*.npz"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return paths[-1] if paths else None


def _draw_training(run: TrainedRun, prefixes: Sequence[str]) -> Any:
    try:
        steps, columns = read_progress(run.folder, prefixes)
    except FileNotFoundError as error:
        raise NotApplicable(str(error)) from error
    if not prefixes or not columns:
        raise NotApplicable(f"{run.folder} has no logged column that begins with {', '.join(prefixes) or '...'} (--columns)")
    return plot_logged_values(steps, columns, f"{run.algo}, {run.env_id}, experiment {run.exp_id}")


def _draw_subspace(run: TrainedRun, model: Any, n_samples: int) -> Any:
    w = model.policy.compositional_vectors
    if w.shape[1] != 2:
        raise NotApplicable(f"the subspace can be drawn with n_param_sets=2, the agent has {w.shape[1]}")
    own = w.detach().clone()
    angles = 2 * np.pi * np.arange(n_samples) / n_samples
    length = own.norm(dim=1).mean()
    env = run.make_env(run.goal_list_kwargs({}))
    try:
        scores = []
        for angle in angles:
            with th.no_grad():
                w.copy_(length * th.tensor([np.cos(angle), np.sin(angle)], dtype=w.dtype).expand_as(w))
            evaluation = evaluate_multi_task_policy(model, env, 1, seed=DEFAULT_EVAL_SEED)
            scores.append(evaluation.mean_rewards)
    finally:
        env.close()
    returns = np.stack(scores)  # (samples, T)
    # Tasks pay on different scales
    lowest, highest = returns.min(axis=0), returns.max(axis=0)
    scaled = (returns - lowest) / np.maximum(highest - lowest, np.finfo(float).tiny)
    return plot_policy_subspace(angles, scaled, own.numpy(), model.task_names, "return, 0 to 1 within each task")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    register()
    from rl_zoo3.utils import ALGOS

    parser = argparse.ArgumentParser(
        prog="python -m sb3_mtrl.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", nargs="+", choices=list(ALGOS), help="algorithms")
    parser.add_argument("--env", help="environment id")
    parser.add_argument("-f", "--folder", default=TRAIN_FOLDER, help="folder of the trained agents (default: %(default)s)")
    parser.add_argument("--exp-id", type=int, nargs="+", help="experiments (default: all that have evaluations)")
    parser.add_argument("--results", type=Path, help="a table of results (CSV) instead of --algo, --env and -f")
    parser.add_argument("-o", "--output", type=Path, default=Path("plots"), help="folder of the files (default: %(default)s)")
    parser.add_argument("--figures", nargs="+", choices=[*CURVE_FIGURES, *METHOD_FIGURES], help="default: see above")
    parser.add_argument("--metric", choices=METRICS, help="default: success where the environment tells of it")
    parser.add_argument("--columns", nargs="+", metavar="BEGINNING", help="of the logged keys, for the figure 'training'")
    parser.add_argument(
        "--subspace-samples", type=int, default=24, help="directions to sample, each is one episode per task (default: 24)"
    )
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import, which register environments")
    args = parser.parse_args(arguments)
    if args.subspace_samples < 2:
        parser.error(f"argument --subspace-samples: must be at least 2, got {args.subspace_samples}")
    if args.results is None and not (args.algo and args.env):
        parser.error("name trained agents with --algo and --env, or a table with --results")
    if args.results is not None and (args.algo or args.env):
        parser.error("argument --results: leave out --algo and --env")
    import_packages(args.gym_packages)

    figures = args.figures or [*CURVE_FIGURES, *(name for name in METHOD_FIGURES if name != "subspace")]
    try:
        if set(figures) & set(CURVE_FIGURES):
            histories = _read_histories(args)
            for path in draw_curves(histories, figures, args.metric, args.output):
                print(f"Written: {path}")
        if args.results is None:
            for algo in args.algo:
                run = find_run(args.folder, algo, args.env, args.exp_id[-1] if args.exp_id else 0)
                _draw_methods(run, [name for name in METHOD_FIGURES if name in figures], args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))


def _read_histories(args: argparse.Namespace) -> list[RunHistory]:
    if args.results is None:
        return read_runs(args.folder, args.algo, args.env, args.exp_id)
    if not args.results.is_file():
        raise FileNotFoundError(f"argument --results: there is no file {args.results}")
    return read_tidy_results(args.results)


def _draw_methods(run: TrainedRun, figures: Sequence[str], args: argparse.Namespace) -> None:
    for name in figures:
        try:
            figure = draw_method(run, name, args)
        except NotApplicable as reason:
            # Only who asked for it is told
            if args.figures:
                print(f"No figure {name}: {reason}")
            continue
        for path in save_figure(figure, args.output / f"{run.algo}_{name}"):
            print(f"Written: {path}")


if __name__ == "__main__":
    main()
