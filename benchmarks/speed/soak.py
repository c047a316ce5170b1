"""
Does memory stay flat? Training, evaluation, saving and loading, over and over in one process, with all algorithms in turn.

    python -m benchmarks.speed.soak --hours 2

A turn is one algorithm on real Meta-World tasks with a replay buffer that wraps around, worker processes that start and end,
an evaluation environment, log files, a saved and loaded model. After each turn a line of ``soak.csv`` says what the process
holds: proportional memory of it and of what it left running, open files, threads and child processes. ``soak.png`` draws it.
The slope is that of a line through all rounds but the first, in which caches fill and libraries are loaded. Linux only.
"""

import argparse
import csv
import gc
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.logger import configure

from benchmarks.speed.measure import machine_line, memory_of_processes, process_tree
from sb3_mtrl import make_multi_task_vec_env
from sb3_mtrl.common.callbacks import MultiTaskEvalCallback, TaskSuccessCallback
from sb3_mtrl.zoo.algorithms import ALGORITHMS

FOLDER = Path(__file__).parent
TASKS = ("reach-v3", "drawer-close-v3", "button-press-topdown-v3", "door-close-v3")
COLUMNS = ("seconds", "turn", "algorithm", "steps", "megabytes", "files", "threads", "children")


def train_once(algorithm: str, steps: int, seed: int, folder: Path) -> None:
    """
    :param algorithm: Name of the algorithm in RL Zoo
    :param steps: Environment steps over all tasks
    :param seed: Seed of environments and model
    :param folder: Folder for logs and models
    """
    algorithm_class = ALGORITHMS[algorithm].algorithm_class
    env_kwargs = dict(tasks=list(TASKS), horizon=150)
    arguments = ("MetaWorld-Custom-v3", len(TASKS), seed)
    env = make_multi_task_vec_env(*arguments, env_kwargs=env_kwargs, vec_env="shared", n_workers=2)
    eval_env = make_multi_task_vec_env(*arguments, env_kwargs=env_kwargs)
    model = algorithm_class(
        "MlpPolicy",
        env,
        buffer_size=steps // 4,
        learning_starts=600,
        batch_size=64,
        gradient_steps=1,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=seed,
        device="cpu",
    )
    model.set_logger(configure(str(folder / algorithm), ["csv"]))
    evaluation = MultiTaskEvalCallback(
        eval_env, n_eval_episodes=len(TASKS), eval_freq=steps // len(TASKS) // 2, verbose=0, log_path=str(folder / algorithm)
    )
    model.learn(steps, callback=[TaskSuccessCallback(), evaluation])
    path = folder / f"{algorithm}.zip"
    model.save(path)
    algorithm_class.load(path, env=env).learn(4 * len(TASKS))
    env.close()
    eval_env.close()


def soak(seconds: float, steps: int, path: Path) -> None:
    """
    :param seconds: No new turn begins after this time
    :param steps: Environment steps of a turn
    :param path: CSV file to write, a line per turn
    """
    start = time.monotonic()
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    turn = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - start < seconds:
            algorithm = list(ALGORITHMS)[turn % len(ALGORITHMS)]
            train_once(algorithm, steps, turn, Path(folder))
            gc.collect()
            row = (
                round(time.monotonic() - start),
                turn,
                algorithm,
                steps,
                round(memory_of_processes() / 1e6, 1),
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                len(process_tree()) - 1,
            )
            with path.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(", ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)), flush=True)
            turn += 1


def plot(path: Path, picture: Path) -> None:
    """
    :param path: CSV file of ``soak``
    :param picture: PNG file to write
    """
    from matplotlib.figure import Figure

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    hours, megabytes = (np.array([float(row[name]) for row in rows]) for name in ("seconds", "megabytes"))
    hours /= 3600
    late = slice(len(ALGORITHMS), None)
    slope, level = np.polyfit(hours[late], megabytes[late], 1)
    summary = f"{len(rows)} turns in {hours[-1]:.1f} h, {np.median(megabytes[late]):.0f} MB, {slope:+.1f} MB per hour"
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for algorithm in ALGORITHMS:
        own = np.array([row["algorithm"] == algorithm for row in rows])
        axes.plot(hours[own], megabytes[own], "o", markersize=3, label=algorithm)
    axes.plot(hours[late], level + slope * hours[late], color="black", linewidth=0.8)
    axes.set(xlabel="hours", ylabel="MB after a turn", ylim=(0, None), title=summary)
    axes.legend(ncols=len(ALGORITHMS), loc="lower center")
    figure.savefig(picture, dpi=120)
    print(summary)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="no new turn begins after this time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6_000, help="environment steps of a turn (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: beside this one)")
    parser.add_argument("--plot-only", action="store_true", help="draw the numbers that are there")
    args = parser.parse_args(arguments)
    path = args.folder / "soak.csv"
    if not args.plot_only:
        print(machine_line())
        th.set_num_threads(1)  # the networks are small
        soak(3600 * args.hours, args.steps, path)
    plot(path, args.folder / "soak.png")


if __name__ == "__main__":
    main()
