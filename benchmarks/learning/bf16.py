"""
Does ``amp="bf16"`` cost learning? MTSAC and PaCoSAC with and without it, on real Meta-World tasks.

    python -m benchmarks.learning.bf16 --steps 40000 --seeds 3

Four easy tasks, the hyperparameters that ``hyperparams/*.yml`` has for them, and the same seeds, initial networks and goals of
evaluations with and without. On a CPU that does not multiply faster in bfloat16 than in float32, the arm "bfloat16 emulated"
runs the same code, but for its products, which are float32's, rounded (``bf16_products.py``). That shows what rounding does
to learning, and nothing of what bfloat16 does to speed. A finished run is a few lines of ``bf16.csv`` and is not repeated;
``bf16.png`` shows them all. ``--results my_bf16.csv`` starts from nothing; a table holds runs of one ``--steps`` only.
"""

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml

from benchmarks.learning.bf16_products import emulated_bf16_products
from benchmarks.learning.results import append_results, tell_of_skipped
from sb3_mtrl import MTSAC, PaCoSAC, make_multi_task_vec_env
from sb3_mtrl.common.callbacks import MultiTaskEvalCallback
from sb3_mtrl.common.cpu_tuning import bfloat16_probe
from sb3_mtrl.common.figures import AXIS_LABELS, new_figure
from sb3_mtrl.common.results import METRICS, RunHistory, group_by_method, read_evaluations, read_tidy_results, stack_histories
from sb3_mtrl.common.utils import constructor_arguments
from sb3_mtrl.zoo.utils import hyperparams_path

ENV_ID = "MetaWorld-Quickstart-v3"
ALGORITHMS: dict[str, type[MTSAC]] = {"MTSAC": MTSAC, "PaCoSAC": PaCoSAC}
ARMS = ("float32", "bfloat16", "bfloat16 emulated")
N_ENVS = 4
N_EVALUATIONS = 8
# Of each task, in each evaluation; no option, as the table does not tell
N_EVAL_EPISODES = 10
RESULTS = Path(__file__).with_name("bf16.csv")


def hyperparameters(algorithm: type[MTSAC]) -> dict[str, Any]:
    """
    :param algorithm: The algorithm
    :return: Arguments of its constructor that its hyperparameter file has for these tasks
    """
    entry = yaml.safe_load(hyperparams_path(algorithm.__name__.lower()).read_text())[ENV_ID]
    kwargs = {name: value for name, value in entry.items() if name in constructor_arguments(algorithm)}
    return {**kwargs, "policy_kwargs": dict(net_arch=[128, 128])}  # text there


def arms_here() -> tuple[str, str]:
    """
    :return: The two arms that this CPU runs
    """
    return "float32", "bfloat16" if bfloat16_probe().speedup >= 1 else "bfloat16 emulated"


def eval_freq(steps: int) -> int:
    """
    :param steps: Environment steps over all tasks
    :return: Steps of all sub-environments between two evaluations
    """
    return max(1, steps // N_EVALUATIONS // N_ENVS)


def evaluation_steps(steps: int) -> list[int]:
    """
    :param steps: Environment steps over all tasks
    :return: Those after which a run is evaluated
    """
    n_steps_per_env = -(-steps // N_ENVS)
    return [n * N_ENVS for n in range(eval_freq(steps), n_steps_per_env + 1, eval_freq(steps))]


def train(algorithm: str, arm: str, seed: int, steps: int, n_eval_episodes_per_task: int) -> RunHistory:
    """
    :param algorithm: Name in ``ALGORITHMS``
    :param arm: One of ``ARMS``
    :param seed: Seed of environments and model
    :param steps: Environment steps over all tasks
    :param n_eval_episodes_per_task: Episodes of the deterministic policy in each evaluation
    :return: The evaluations
    """
    env = make_multi_task_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed)
    eval_env = make_multi_task_vec_env(ENV_ID, n_envs=N_ENVS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "amp='bf16' makes training slower")
        with emulated_bf16_products() if arm == "bfloat16 emulated" else nullcontext():
            model = ALGORITHMS[algorithm](
                env=env,
                amp="none" if arm == "float32" else "bf16",
                seed=seed,
                device="cpu",
                **hyperparameters(ALGORITHMS[algorithm]),
            )
            evaluations = MultiTaskEvalCallback(
                eval_env,
                n_eval_episodes=n_eval_episodes_per_task * model.num_tasks,
                eval_freq=eval_freq(steps),
                log_path=folder,
                verbose=0,
            )
            model.learn(steps, callback=evaluations)
        return read_evaluations(Path(folder) / "evaluations.npz", f"{algorithm}, {arm}", ENV_ID, seed)


def read_histories(path: Path) -> list[RunHistory]:
    """
    :param path: The results file
    :return: The runs in it; none if there is no such file
    """
    return read_tidy_results(path) if path.exists() else []


def print_table(histories: Sequence[RunHistory]) -> None:
    """
    :param histories: Finished runs of the same number of steps
    """
    print(f"{'last evaluation, mean of the tasks: median [lowest, highest] over seeds':<72}{'success':>18}{'return':>22}")
    for method, runs in group_by_method(histories).items():
        success, returns = (np.array([run.scores(metric)[-1].mean() for run in runs]) for metric in METRICS)
        cells = (
            f"{np.median(success):.0%} [{success.min():.0%}, {success.max():.0%}]",
            f"{np.median(returns):.0f} [{returns.min():.0f}, {returns.max():.0f}]",
        )
        print(f"{f'{method} ({len(runs)} seeds)':<72}{cells[0]:>18}{cells[1]:>22}")
    print("mean of tasks and evaluations")
    for metric, unit in zip(METRICS, (".0%", ".0f"), strict=True):
        for algorithm, (by_seed, spread) in differences(histories, metric).items():
            if not by_seed:
                continue
            changes = ", ".join(f"{difference:+{unit}}" for difference in by_seed)
            apart = "one seed" if math.isnan(spread) else f"seeds of one arm: up to {spread:{unit}} apart"
            print(f"{algorithm}, {metric}: bfloat16 minus float32, by seed {changes}; {apart}")


def differences(histories: Sequence[RunHistory], metric: str) -> dict[str, tuple[list[float], float]]:
    """
    What bfloat16 changes beside what another seed changes, in the mean over tasks and evaluations.

    :param histories: Finished runs of the same number of steps
    :param metric: "success" or "return"
    :return: By algorithm: difference of the arms at each seed that both have, and the largest difference of two seeds of one
        arm, NaN where there is one seed
    """
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for run in histories:
        algorithm, _, arm = run.method.partition(", ")
        of_arm = scores.setdefault(algorithm, {"float32": {}}).setdefault(arm, {})
        of_arm[run.seed] = float(run.scores(metric).mean())
    result = {}
    for algorithm, by_arm in scores.items():
        in_float32 = by_arm["float32"]
        by_seed = [
            score - in_float32[seed]
            for arm, of_arm in by_arm.items()
            for seed, score in of_arm.items()
            if arm != "float32" and seed in in_float32
        ]
        spreads = [max(of_arm.values()) - min(of_arm.values()) for of_arm in by_arm.values() if len(of_arm) > 1]
        result[algorithm] = by_seed, max(spreads, default=math.nan)
    return result


def plot(histories: Sequence[RunHistory], path: Path) -> None:
    """
    :param histories: Finished runs
    :param path: Picture to write
    """
    groups = group_by_method(histories)
    names = [name for name in ALGORITHMS if any(method.startswith(f"{name}, ") for method in groups)]
    figure = new_figure(5.5 * len(names), 6.5)
    panels = figure.subplots(len(METRICS), len(names), sharex=True, sharey="row", squeeze=False)
    for column, algorithm in enumerate(names):
        panels[0, column].set_title(f"{algorithm}, mean of {len(histories[0].task_names)} tasks")
        panels[-1, column].set_xlabel("environment steps, all tasks")
        for position, arm in enumerate(ARMS):
            runs = groups.get(f"{algorithm}, {arm}", [])
            for axes, metric in zip(panels[:, column], METRICS, strict=True):
                if runs:
                    steps, scores = stack_histories(runs, metric)
                    curves = scores.mean(axis=1)  # (runs, E)
                    axes.plot(steps, curves.T, color=f"C{position}", alpha=0.35, linewidth=1)
                    axes.plot(
                        steps, curves.mean(axis=0), color=f"C{position}", linewidth=2.5, label=f"{arm}, {len(runs)} seeds"
                    )
    for metric, axes_of_metric in zip(METRICS, panels, strict=True):
        axes_of_metric[0].set_ylabel(f"{AXIS_LABELS[metric]}\n(thin: seeds, thick: their mean)")
        for axes in axes_of_metric:
            axes.grid(alpha=0.3)
    for axes in panels[0]:
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Make the runs that are missing, print the table and draw the curves.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps (default: 40000)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name} beside this file")
    parser.add_argument("--plot-only", action="store_true", help="show the runs that are there")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)  # the networks are small
    arms = () if args.plot_only else arms_here()
    runs = [(algorithm, arm, seed) for seed in range(args.seeds) for algorithm in args.algorithms for arm in arms]
    known = read_histories(args.results)
    other = {int(run.timesteps[-1]) for run in known if run.timesteps.tolist() != evaluation_steps(args.steps)}
    if other and not args.plot_only:
        parser.error(
            f"argument --steps: must be that of the runs in {args.results}, whose last evaluation is at step "
            f"{' or '.join(map(str, sorted(other)))}, got {args.steps}; --results OTHER.csv begins another table"
        )
    done = {(run.method, run.seed) for run in known}
    missing = [(algorithm, arm, seed) for algorithm, arm, seed in runs if (f"{algorithm}, {arm}", seed) not in done]
    tell_of_skipped(len(runs) - len(missing), args.results, "--results OTHER.csv")
    for algorithm, arm, seed in missing:
        start = time.process_time()
        history = train(algorithm, arm, seed, args.steps, N_EVAL_EPISODES)
        append_results(args.results, history.rows())
        print(f"{history.method}, seed {seed}: {time.process_time() - start:.0f} s of CPU time", flush=True)
    histories = read_histories(args.results)
    print_table(histories)
    plot(histories, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
