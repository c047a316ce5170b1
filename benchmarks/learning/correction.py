"""
Does action correction escape a decoy? TSACSAC against MTSAC on the dense reward and on the sum of dense and sparse reward.

    python -m benchmarks.learning.correction --seeds 5 --jobs 1

A point has to reach a goal, in three tasks that one policy shares. They differ in the dense reward only, which pays at most 10
per step:

    clean   10 times the progress from start to goal
    decoy   grows to 9 on the way and stays there over a plateau; behind it 0, and 10 at the goal: going on costs 9 a step
    cost    the progress minus 5 |a|^2: a step at full speed costs what the progress that it makes pays in 50 steps

The sparse reward is 10 for each step at the goal. A finished run is one line of ``correction.csv`` and is not repeated;
``correction.png`` shows them all. ``--results my_correction.csv`` starts from nothing.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.learning.results import append_result, read_results, tell_of_skipped
from sb3_mtrl import MTSAC, TSACSAC
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy
from sb3_mtrl.common.vec_env import VecTaskAssignment

TASKS = ("clean", "decoy", "cost")
METHODS = ("MTSAC, dense", "MTSAC, dense + sparse", "TSACSAC")
BONUS = 10.0
HORIZON = 50
STEP = 0.1
TOLERANCE = 0.15
DISTANCE = 1.0  # from start to goal
RESULTS = Path(__file__).with_name("correction.csv")


class CorrectionTasksEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A 2-D point that starts near (0, 0) and has to reach (1, 0).

    :param bonus: Paid for each step at the goal, on top of the dense reward
    """

    num_tasks = len(TASKS)
    task_names = TASKS
    observation_space = spaces.Box(-np.inf, np.inf, (2 + len(TASKS),), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    goal = np.array([DISTANCE, 0.0])

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus
        self.assigned_tasks: tuple[int, ...] = tuple(range(self.num_tasks))
        self.task_id = 0
        self._next = 0
        self._steps = 0
        self._position = np.zeros(2)

    def set_tasks(self, task_ids: Sequence[int]) -> None:
        """
        :param task_ids: The tasks to cycle through from the next reset on
        """
        self.assigned_tasks = tuple(task_ids)
        self._next = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode of the next task."""
        super().reset(seed=seed)
        self.task_id = self.assigned_tasks[self._next % len(self.assigned_tasks)]
        self._next += 1
        self._steps = 0
        self._position = self.np_random.uniform(-0.1, 0.1, size=2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move by ``STEP * action`` within a box of 1.5, pay the task's reward."""
        self._position = np.clip(self._position + STEP * action, -1.5, 1.5)
        self._steps += 1
        distance = float(np.linalg.norm(self._position - self.goal))
        success = distance <= TOLERANCE
        reward = dense_reward(TASKS[self.task_id], distance, action) + self.bonus * success
        info = {"success": float(success), "is_success": success}
        return self._observation(), reward, False, self._steps >= HORIZON, info

    def _observation(self) -> np.ndarray:
        return np.concatenate([self._position, np.eye(self.num_tasks)[self.task_id]]).astype(np.float32)


def dense_reward(task: str, distance: float, action: np.ndarray) -> float:
    """
    :param task: The task
    :param distance: Distance to the goal after the step
    :param action: The action of the step
    :return: The dense reward
    """
    progress = max(0.0, 1.0 - distance / DISTANCE)  # 0 at the start, 1 at the goal
    if task == "clean":
        return 10.0 * progress
    if task == "cost":
        return progress - 5.0 * float(np.square(action).sum())
    if distance <= TOLERANCE:
        return 10.0
    # A slope up to the plateau, the plateau, the ground behind it
    return 9.0 * min(1.0, progress / 0.35) if progress <= 0.55 else 0.0


def train(method: str, seed: int, rounds: int, n_envs: int = 15) -> dict[str, Any]:
    """
    :param method: One of ``METHODS``
    :param seed: Seed
    :param rounds: Steps of each sub-environment, and updates
    :param n_envs: Number of sub-environments
    :return: A row of the results: share of 20 episodes that end at the goal and last lambda of each task, CPU seconds
    """
    th.set_num_threads(1)
    start = time.process_time()
    bonus = BONUS if method == "MTSAC, dense + sparse" else 0.0
    env = VecTaskAssignment(DummyVecEnv([lambda: CorrectionTasksEnv(bonus)] * n_envs))
    eval_env = VecTaskAssignment(DummyVecEnv([lambda: Monitor(CorrectionTasksEnv())] * n_envs))
    settings: dict[str, Any] = dict(
        learning_rate=1e-3,
        learning_starts=100 * n_envs,
        batch_size=64 * len(TASKS),
        buffer_size=rounds * n_envs,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=seed,
        device="cpu",
        cpu_tuning=False,  # the networks are small
    )
    if method == "TSACSAC":
        model: MTSAC = TSACSAC("MlpPolicy", env, sparse_budget=0.5, success_bonus=BONUS, **settings)
    else:
        model = MTSAC("MlpPolicy", env, **settings)
    model.learn(rounds * n_envs)
    evaluation = evaluate_multi_task_policy(model, eval_env, n_eval_episodes_per_task=20, seed=seed + 1000)
    lambdas = [round(value, 3) for value in model.multipliers.tolist()] if isinstance(model, TSACSAC) else [""] * len(TASKS)
    return {
        "method": method,
        "seed": seed,
        "rounds": rounds,
        **dict(zip(TASKS, evaluation.success_rates.round(4).tolist(), strict=True)),
        **dict(zip([f"lambda_{task}" for task in TASKS], lambdas, strict=True)),
        "cpu_seconds": round(time.process_time() - start),
    }


def print_table(rows: list[dict[str, str]]) -> None:
    """
    :param rows: Rows of the results
    """
    print(f"{'success at the last step: median (least to most)':<50}" + "".join(f"{task:>22}" for task in TASKS))
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        if not of_method:
            continue
        cells = []
        for task in TASKS:
            rates = sorted(float(row[task]) for row in of_method)
            cells.append(f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})")
        print(f"{f'{method} ({len(of_method)} seeds)':<50}" + "".join(f"{cell:>22}" for cell in cells))


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """
    :param rows: Rows of the results
    :param path: Picture to write
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(TASKS), sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for position, method in enumerate(METHODS):
            rates = [float(row[task]) for row in rows if row["method"] == method]
            if not rates:
                continue
            axis.bar(position, statistics.median(rates), width=0.7, color=f"C{position}", alpha=0.4)
            offsets = np.linspace(-0.25, 0.25, len(rates)) if len(rates) > 1 else [0.0]
            axis.plot(position + np.asarray(offsets), rates, "o", color=f"C{position}", markersize=5)
        axis.set_title(task)
        axis.set_xticks(range(len(METHODS)), [method.replace(", ", "\n").replace(" + ", "\n+ ") for method in METHODS])
        axis.set_ylim(-0.04, 1.04)
    axes[0].set_ylabel("success at the last step\n(dots: seeds, bars: median)")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Make the runs that are missing, print the table and write the picture.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3000, help="steps of each of 15 sub-environments (default: 3000)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name} beside this file")
    args = parser.parse_args(arguments)
    done = {(row["method"], row["seed"], row["rounds"]) for row in read_results(args.results)}
    runs = [(method, seed, args.rounds) for seed in range(args.seeds) for method in METHODS]
    missing = [run for run in runs if tuple(map(str, run)) not in done]
    tell_of_skipped(len(runs) - len(missing), args.results, "--results OTHER.csv")
    # Not forked: torch's threads do not survive it
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, *run) for run in missing]):
            append_result(args.results, future.result())
    rows = [row for row in read_results(args.results) if row["rounds"] == str(args.rounds)]
    print_table(rows)
    plot(rows, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
