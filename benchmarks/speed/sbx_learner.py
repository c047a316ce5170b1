"""
SBX's SAC for ``benchmarks.speed.run``, which starts it in a virtual environment of its own (JAX, PyPI ``sbx-rl``).

It takes the number of tasks, the batch size, the number of updates per call and the clock; without arguments it only imports.
"""

import sys
import time

import jax
from sbx import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.speed.measure import serve
from benchmarks.speed.random_tasks import RandomTasksEnv


def main(num_tasks: int, batch_size: int, n_updates: int, clock: str) -> None:
    model = SAC(
        "MlpPolicy",
        DummyVecEnv([lambda: RandomTasksEnv(num_tasks) for _ in range(num_tasks)]),
        batch_size=batch_size,
        buffer_size=400 * num_tasks,
        learning_starts=10**9,
        policy_kwargs=dict(net_arch=[400, 400, 400]),
        seed=0,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(300 * num_tasks, log_interval=None)

    def update() -> None:
        model.train(n_updates, batch_size)
        jax.block_until_ready((model.policy.qf_state.params, model.policy.actor_state.params))

    serve({"update": update}, getattr(time, clock))


if __name__ == "__main__" and len(sys.argv) > 1:
    main(*map(int, sys.argv[1:4]), sys.argv[4])  # type: ignore[misc]
