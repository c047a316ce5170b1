"""
Speed as ratios: ``python -m benchmarks.speed.run`` (``make bench``).

The variants of a table take turns, each round in another order, in one process; a ratio is the median over the rounds of the
first variant's time by this one's. Absolute times depend on the machine and on what else it does: quote the ratios.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mtrl
from benchmarks.speed.measure import Table, Variants, machine_line, print_table, summarize, time_in_turns
from sb3_mtrl import MTSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.vec_env import VecTaskAssignment
from sb3_mtrl.envs import MetaWorldMultiTaskEnv, list_tasks

OBS_DIM, ACTION_DIM = 39, 4


class RandomTasksEnv(gym.Env[np.ndarray, np.ndarray]):
    """Random observations of Meta-World's shape: something to fill a replay buffer with, at no cost."""

    def __init__(self, num_tasks: int):
        self.num_tasks = num_tasks
        self.task_names = tuple(f"task-{task_id}" for task_id in range(num_tasks))
        self.assigned_tasks = tuple(range(num_tasks))
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

    def set_tasks(self, task_ids: list[int]) -> None:
        self.assigned_tasks = tuple(task_ids)

    def _observation(self) -> np.ndarray:
        one_hot = np.eye(self.num_tasks)[self.assigned_tasks[0]]
        return np.concatenate([self.np_random.normal(size=OBS_DIM), one_hot]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observation(), float(self.np_random.uniform(0, 10)), False, False, {}


def report(title: str, seconds: dict[str, np.ndarray], per_call: int = 1) -> Table:
    """Print the table of one comparison and return it."""
    return print_table(title, summarize(seconds, per_call))


def make_model(algorithm: type[SAC], num_tasks: int, batch_size: int, **kwargs: Any) -> SAC:
    """
    :return: A model of the paper's size with a filled replay buffer
    """
    env = VecTaskAssignment(DummyVecEnv([lambda: RandomTasksEnv(num_tasks) for _ in range(num_tasks)]))
    model = algorithm(
        "MlpPolicy",
        env,
        batch_size=batch_size,
        buffer_size=400 * num_tasks,
        learning_starts=10**9,
        policy_kwargs=dict(net_arch=[400, 400, 400]),
        seed=0,
        **kwargs,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model.learn(300 * num_tasks, log_interval=None)


def measure_updates(rounds: int, num_tasks: int = 10, batch_size: int = 1280, n_updates: int = 3) -> dict[str, Any]:
    models = {
        "SB3 SAC": make_model(SAC, num_tasks, batch_size),
        "MTSAC": make_model(MTSAC, num_tasks, batch_size),
        "MTSAC per-task heads": make_model(MTSAC, num_tasks, batch_size, n_heads="per_task"),
        "PaCoSAC K=5": make_model(PaCoSAC, num_tasks, batch_size),
        "PaCoSAC K=5 without guards": make_model(PaCoSAC, num_tasks, batch_size, maskout_threshold=None, w_reset=False),
    }
    variants: Variants = {
        name: lambda model=model: model.train(n_updates, batch_size)
        for name, model in models.items()  # type: ignore[misc]
    }
    title = f"one gradient update: {num_tasks} tasks, batch {batch_size}, 3 x 400"
    return report(title, time_in_turns(variants, rounds), n_updates)


def measure_replay(rounds: int, num_tasks: int = 10, batch_size: int = 1280, n_samples: int = 100) -> dict[str, Any]:
    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    plain = ReplayBuffer(100_000, observation_space, action_space, "cpu", n_envs=num_tasks)
    multi_task = MultiTaskReplayBuffer(100_000, observation_space, action_space, "cpu", n_envs=num_tasks, num_tasks=num_tasks)
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        base = rng.normal(size=(num_tasks, OBS_DIM)).astype(np.float32)
        obs = np.concatenate([base, np.eye(num_tasks, dtype=np.float32)], axis=1)
        step = (
            obs,
            obs,
            rng.uniform(-1, 1, (num_tasks, ACTION_DIM)),
            np.ones(num_tasks),
            np.zeros(num_tasks),
            [{}] * num_tasks,
        )
        plain.add(*step)
        multi_task.add(*step)
    variants: Variants = {
        "SB3 ReplayBuffer": lambda: [plain.sample(batch_size) for _ in range(n_samples)],
        "MultiTaskReplayBuffer": lambda: [multi_task.sample(batch_size) for _ in range(n_samples)],
    }
    return report(f"one sample of {batch_size} rows, {num_tasks} tasks", time_in_turns(variants, rounds), n_samples)


def measure_env(rounds: int, n_steps: int = 100) -> dict[str, Any]:
    """Means over the tasks of MT10, without resets; random actions from the same seed."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    names = list_tasks("MT10")
    ours, raw = [], []
    for task_name in names:
        env = MetaWorldMultiTaskEnv(task_name, horizon=10**9)
        env.reset(seed=0)
        ours.append(env)
        plain = ALL_V3_ENVIRONMENTS[task_name]()
        plain._freeze_rand_vec, plain._set_task_called, plain.max_path_length = False, True, 10**9
        plain.reset()
        raw.append(plain)
    actions = np.random.default_rng(0).uniform(-1, 1, (n_steps, ACTION_DIM)).astype(np.float32)

    def step_all(envs: list[Any]) -> None:
        for env in envs:
            for action in actions:
                env.step(action)

    variants: Variants = {"Meta-World": lambda: step_all(raw), "MetaWorldMultiTaskEnv": lambda: step_all(ours)}
    return report("one environment step, mean over MT10", time_in_turns(variants, rounds), n_steps * len(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: PyTorch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/speed/results.json"))
    args = parser.parse_args()
    if args.threads is not None:
        th.set_num_threads(args.threads)
    machine = f"{machine_line()}, {th.get_num_threads()} threads of PyTorch"
    print(f"sb3_mtrl {sb3_mtrl.__version__}, {machine}, {args.rounds} rounds")
    results = {
        "machine": machine,
        "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "update": measure_updates(args.rounds),
        "update_50_tasks": measure_updates(max(3, args.rounds // 2), num_tasks=50, batch_size=6400, n_updates=1),
        "replay": measure_replay(args.rounds),
        "env": measure_env(args.rounds),
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
