"""
``python -m sb3_mtrl.plot``: learning curves, a final table with intervals, and pictures of the methods, as PNG and SVG.

    python -m sb3_mtrl.plot --algo mtsac pacosac --env MetaWorld-MT10-v3 -f logs/ -o plots/
    python -m sb3_mtrl.plot --results benchmarks/learning/cpu_suite.csv -o plots/

Curves, table and final figure come from the ``evaluations.npz`` that training writes, over all experiments (or those of
``--exp-id``). One training learns all tasks, so the 95 % intervals are over whole runs, and one run has none; beside them the
table has rliable's stratified bootstrap interval, which takes every task of a run for a training of its own. The scores of a
method are those of the last step that all its runs share. Runs that end early are named; ``--leave-out-short`` leaves them
out.

The pictures of methods come from the last of these experiments, which may still be running:

* ``w``: PaCo's compositional vectors, and their principal components
* ``subspace``: with K = 2, what policies sampled from the plane between PaCo's two parameter sets can do (it plays episodes)
* ``gate``: CMTA's gate over an episode, from the last ``gate_weights_*.npz``, else it plays one
* ``training``: what was logged during training (``progress.csv``), e.g. STARS' quotas, TSAC's lambda and edit size

Without ``--figures`` all are drawn that apply, but for the subspace. ``--results`` reads a table of the grid runner instead:
of the evaluations during the training, or (``--figures final``) the ``..._final.csv`` of those on all goals after it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

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
    leave_out_short_runs,
    notes_on_final_scores,
    read_evaluations,
    read_progress,
    read_tidy_results,
)
from sb3_mtrl.zoo import register
from sb3_mtrl.zoo.patches import TRAIN_FOLDER
from sb3_mtrl.zoo.runs import (
    TrainedRun,
    experiment_folder,
    find_experiments,
    find_run,
    import_packages,
    read_train_args,
    warn_of_equal_seeds,
)

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


@dataclass(frozen=True)
class Experiment:
    """
    An experiment that may not be finished, and may have no model yet.

    :param folder: Folder of all agents
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_id: Number of the experiment
    """

    folder: str
    algo: str
    env_id: str
    exp_id: int

    @property
    def path(self) -> Path:
        """Folder of the experiment."""
        return experiment_folder(self.folder, self.algo, self.env_id, self.exp_id)

    def has_evaluations(self) -> bool:
        """Whether its training has written evaluations."""
        return (self.path / "evaluations.npz").is_file()

    @property
    def train_seed(self) -> int | None:
        """Seed of its training; None where it is not known."""
        try:
            return read_train_args(self.path, self.env_id, safe=True).get("seed")
        except ValueError:  # not worth running code that comes with the curves
            return None

    def find_model(self) -> TrainedRun:
        """
        :return: The agent at the end of the training
        :raises FileNotFoundError: if there is none yet
        """
        return find_run(self.folder, self.algo, self.env_id, self.exp_id)


def read_runs(folder: str, algos: Sequence[str], env_id: str, exp_ids: Sequence[int] | None) -> list[RunHistory]:
    """
    Read the evaluations of several trainings. Those of one algorithm with the same seed are warned of.

    :param folder: Folder of all agents
    :param algos: Names of the algorithms in RL Zoo
    :param env_id: Id of the environment
    :param exp_ids: Numbers of the experiments of each algorithm; None: all that have evaluations
    :return: Their histories
    :raises FileNotFoundError: if an experiment or its evaluations are missing
    :raises ValueError: if an algorithm or an experiment is named twice, or a file does not hold evaluations of one training
    """
    for flag, names in (("--algo", algos), ("--exp-id", exp_ids or ())):
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} must name each one once, got {' '.join(map(str, names))}")
    histories = []
    for algo in algos:
        known = [Experiment(folder, algo, env_id, exp_id) for exp_id in find_experiments(folder, algo, env_id)]
        evaluated = {experiment.exp_id: experiment for experiment in known if experiment.has_evaluations()}
        chosen = list(evaluated) if exp_ids is None else exp_ids
        for exp_id in chosen:
            if exp_id not in evaluated:
                raise FileNotFoundError(
                    f"--exp-id {exp_id}: no evaluations.npz for --algo {algo} --env {env_id} in {folder} (there are "
                    f"{[experiment.exp_id for experiment in known]}); training writes it unless --eval-freq is -1"
                )
            histories.append(read_evaluations(evaluated[exp_id].path / "evaluations.npz", algo, env_id, exp_id))
        if not evaluated:
            raise FileNotFoundError(
                f"no experiment of --algo {algo} --env {env_id} in {folder} has an evaluations.npz; training writes it unless "
                "--eval-freq is -1 (--figures training draws what was logged before the first evaluation)"
            )
        warn_of_equal_seeds(chosen, [evaluated[exp_id].train_seed for exp_id in chosen])
    return histories


def last_experiment(folder: str, algo: str, env_id: str, exp_ids: Sequence[int] | None) -> Experiment:
    """
    :param folder: Folder of all agents
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_ids: Numbers of the experiments of each algorithm; None: all
    :return: The last of them; of all, the last that has evaluations, or the last if none has
    :raises FileNotFoundError: if there is no such experiment
    """
    known = find_experiments(folder, algo, env_id)
    if exp_ids is not None:
        if exp_ids[-1] not in known:
            raise FileNotFoundError(f"--exp-id {exp_ids[-1]}: no such experiment of --algo {algo} (there are {known})")
        return Experiment(folder, algo, env_id, exp_ids[-1])
    experiments = [Experiment(folder, algo, env_id, exp_id) for exp_id in known]
    return next((experiment for experiment in reversed(experiments) if experiment.has_evaluations()), experiments[-1])


def draw_curves(histories: Sequence[RunHistory], figures: Sequence[str], metric: str | None, output: Path) -> list[Path]:
    """
    Draw the figures of learning curves and print the final table.

    :param histories: Runs of one environment
    :param figures: Some of ``CURVE_FIGURES``
    :param metric: "success" or "return"; None: success where the environment tells of it
    :param output: Folder
    :return: The files
    :raises ValueError: for the metric "success" if no evaluation tells of it
    """
    if metric is None:
        metric = "success" if all(history.has_success for history in histories) else "return"
    if metric == "success" and all(np.isnan(history.success_rates).all() for history in histories):
        raise ValueError("--metric must be return for these runs, got success (none of their evaluations tells of it)")
    finals = [final_scores(runs, metric) for runs in group_by_method(histories).values()]
    print(format_final_table(finals, metric))
    for note in notes_on_final_scores(histories, finals):
        print(f"Note: {note}")
    draw: dict[str, Callable[[], Any]] = {
        "curves": lambda: plot_learning_curves(histories, metric),
        "tasks": lambda: plot_task_curves(histories, metric),
        "final": lambda: plot_final_scores(finals, metric),
    }
    return [path for name in CURVE_FIGURES if name in figures for path in save_figure(draw[name](), output / name)]


def draw_method(experiment: Experiment, figure: str, args: argparse.Namespace) -> Any:
    """
    :param experiment: An experiment
    :param figure: One of ``METHOD_FIGURES``
    :param args: The command line
    :return: The figure
    :raises NotApplicable: if there is nothing to draw
    :raises FileNotFoundError: if the figure needs a model, and there is none yet
    """
    if figure == "training":
        return _draw_training(experiment, args.columns or LOGGED_COLUMNS.get(experiment.algo, ()))
    if figure == "gate" and (weights_path := _latest_gate_weights(experiment.path)) is not None:
        with np.load(weights_path) as file:
            return plot_gate_weights(file["weights"], file["task_names"].tolist())
    run = experiment.find_model()
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


def _draw_training(experiment: Experiment, prefixes: Sequence[str]) -> Any:
    try:
        steps, columns = read_progress(experiment.path, prefixes)
    except FileNotFoundError as error:
        raise NotApplicable(str(error)) from error
    if not prefixes or not columns:
        raise NotApplicable(
            f"{experiment.path} has no logged column that begins with {', '.join(prefixes) or '...'} (--columns)"
        )
    return plot_logged_values(steps, columns, f"{experiment.algo}, {experiment.env_id}, experiment {experiment.exp_id}")


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
    parser.add_argument(
        "--leave-out-short", action="store_true", help="leave out runs that end before the longest run of their method"
    )
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
                experiment = last_experiment(args.folder, algo, args.env, args.exp_id)
                _draw_methods(experiment, [name for name in METHOD_FIGURES if name in figures], args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))


def _read_histories(args: argparse.Namespace) -> list[RunHistory]:
    if args.results is None:
        histories = read_runs(args.folder, args.algo, args.env, args.exp_id)
    elif args.results.is_file():
        histories = read_tidy_results(args.results)
    else:
        raise FileNotFoundError(f"argument --results: there is no file {args.results}")
    if not args.leave_out_short:
        return histories
    kept = leave_out_short_runs(histories)
    for history in histories:
        if history not in kept:
            print(f"Left out: {history.method}, run {history.seed}, which ends at step {history.timesteps[-1]}")
    return kept


def _draw_methods(experiment: Experiment, figures: Sequence[str], args: argparse.Namespace) -> None:
    without_model = []
    for name in figures:
        try:
            figure = draw_method(experiment, name, args)
        except NotApplicable as reason:
            # Only who asked for it is told
            if args.figures:
                print(f"No figure {name}: {reason}")
            continue
        except FileNotFoundError:
            without_model.append(name)
            continue
        for path in save_figure(figure, args.output / f"{experiment.algo}_{name}"):
            print(f"Written: {path}")
    if without_model:
        names = ", ".join(without_model)
        print(
            f"No figure {names} of {experiment.algo}: experiment {experiment.exp_id} has no model yet (--exp-id names another)"
        )


if __name__ == "__main__":
    main()
