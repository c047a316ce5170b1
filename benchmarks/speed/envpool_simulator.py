"""
EnvPool's Meta-World (PyPI ``envpool``) for ``benchmarks.speed.simulator``, started there in an environment of its own.

One pool with one thread per task, as a pool holds environments of one task only. It takes the number of steps per call and the
names of tasks as EnvPool writes them; without arguments it only imports.
"""

import sys
import time

import envpool
import numpy as np

from benchmarks.speed.measure import serve

NO_END = 10**9


def main(n_steps: int, task_names: list[str]) -> None:
    pools = [
        envpool.make_gymnasium(
            f"MetaWorld/{name}",
            num_envs=1,
            num_threads=1,
            max_episode_steps=NO_END,
            partially_observable=False,
            seed=0,
        )
        for name in task_names
    ]
    actions = np.random.default_rng(0).uniform(-1, 1, (n_steps, 1, 4)).astype(np.float32)
    for pool in pools:
        pool.reset()

    def step() -> None:
        for action in actions:
            for pool in pools:
                pool.send(action)
            for pool in pools:
                pool.recv()

    def reset() -> None:
        for pool in pools:
            pool.reset()

    # The time of all threads
    serve({"step": step, "reset": reset}, time.process_time)


if __name__ == "__main__" and len(sys.argv) > 1:
    main(int(sys.argv[1]), sys.argv[2:])
