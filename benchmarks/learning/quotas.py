"""
Do the shares of the batch follow the tasks' success? STARSSAC on Meta-World tasks of which one is hard.

    python -m benchmarks.learning.quotas --steps 60000

Closing a drawer and pressing a handle are learned soon, reaching takes longer, and a peg is not inserted into a hole within
such a budget. While a task fails its quota is large, once it is solved it falls to a tenth of that. Writes ``quotas.csv``
(success rate and rows of the batch of each task, over environment steps) and ``quotas.png``.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mtrl import STARSSAC, make_multi_task_vec_env
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer

TASKS = ("drawer-close-v3", "handle-press-v3", "reach-v3", "peg-insert-side-v3")
BATCH_SIZE = 128
FOLDER = Path(__file__).parent


class RecordQuotas(BaseCallback):
    """
    Write down what the replay buffer knows of the tasks and how it shares out the batch.

    :param path: CSV file to write
    :param every: Environment steps between two lines
    """

    def __init__(self, path: Path, every: int = 600):
        super().__init__()
        self.path = path
        self.every = every

    def _on_training_start(self) -> None:
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(["steps", *(f"success/{task}" for task in TASKS), *(f"quota/{task}" for task in TASKS)])

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            buffer = self.model.replay_buffer  # type: ignore[attr-defined]
            assert isinstance(buffer, TaskPrioritizedReplayBuffer)
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow([self.num_timesteps, *buffer.success_rates.round(3), *buffer.quotas(BATCH_SIZE)])
        return True


def train(steps: int, seed: int, path: Path) -> None:
    """
    :param steps: Environment steps over all tasks
    :param seed: Seed of environments and model
    :param path: CSV file to write
    """
    env = make_multi_task_vec_env(
        "MetaWorld-Custom-v3", n_envs=len(TASKS), seed=seed, env_kwargs=dict(tasks=list(TASKS), horizon=150)
    )
    model = STARSSAC(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        buffer_size=200_000,
        learning_starts=1_200,
        batch_size=BATCH_SIZE,
        n_param_sets=3,
        w_init="simplex",
        # Small groups, for shares that follow closely
        replay_buffer_kwargs=dict(rows_per_group=4),
        unique_dim=16,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=seed,
        device="cpu",
    )
    model.learn(steps, callback=RecordQuotas(path))


def plot(path: Path, picture: Path) -> None:
    """
    :param path: CSV file of ``train``
    :param picture: PNG file to write
    """
    from matplotlib.figure import Figure

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([int(row["steps"]) for row in rows])
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, name in zip(axes, ("success", "quota"), strict=True):
        for task in TASKS:
            axis.plot(steps, [float(row[f"{name}/{task}"]) for row in rows], label=task, drawstyle="steps-post")
    axes[0].set(ylabel="success rate, last 20 episodes", ylim=(-0.05, 1.05))
    axes[0].legend(loc="upper center", ncols=2)
    axes[1].set(ylabel=f"rows of a batch of {BATCH_SIZE}", xlabel="environment steps, all tasks", ylim=(0, None))
    figure.suptitle("STARSSAC: quotas of the tasks follow their success rates")
    figure.savefig(picture, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train, write the numbers, draw them.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000, help="environment steps (default: 60000)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: beside this one)")
    parser.add_argument("--plot-only", action="store_true", help="draw the numbers that are there")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)  # the networks are small
    path = args.folder / "quotas.csv"
    if not args.plot_only:
        train(args.steps, args.seed, path)
    plot(path, args.folder / "quotas.png")


if __name__ == "__main__":
    main()
