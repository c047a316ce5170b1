"""
Learners that ``benchmarks.speed.run`` starts in processes of their own: ``python -m benchmarks.speed.learners '<JSON>'``.

The JSON holds the ``clock`` (of Python's ``time``) and ``learners``: keyword arguments of ``make_update`` or ``make_loop`` by
name.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.speed.bare import BareMTSAC, MatrixProducts
from benchmarks.speed.measure import serve
from benchmarks.speed.random_tasks import ACTION_DIM, OBS_DIM, RandomTasksEnv
from sb3_mtrl.common.cpu_tuning import fast_matmul, keep_freed_memory
from sb3_mtrl.common.vec_env import VecTaskAssignment, make_multi_task_vec_env
from sb3_mtrl.zoo.algorithms import ALGORITHMS

NET_ARCH = (400, 400, 400)
BARE = {"bare": BareMTSAC, "products": MatrixProducts}


def algorithm_class(name: str) -> type[SAC]:
    """
    :param name: "sb3" for SB3's SAC, or a name of the zoo's table
    """
    return SAC if name == "sb3" else ALGORITHMS[name].algorithm_class  # type: ignore[return-value]


def make_filled_model(
    algorithm: str, num_tasks: int, batch_size: int, kwargs: dict[str, Any], net_arch: tuple[int, ...] = NET_ARCH
) -> SAC:
    """
    :param algorithm: See ``algorithm_class``
    :param num_tasks: Number of tasks T
    :param batch_size: Rows per update
    :param kwargs: Further arguments of the algorithm
    :param net_arch: Widths of the hidden layers
    :return: A model with random transitions to learn from
    """
    model = algorithm_class(algorithm)(
        "MlpPolicy",
        VecTaskAssignment(DummyVecEnv([lambda: RandomTasksEnv(num_tasks) for _ in range(num_tasks)])),
        batch_size=batch_size,
        buffer_size=400 * num_tasks,
        learning_starts=10**9,
        policy_kwargs=dict(net_arch=list(net_arch)),
        seed=0,
        **kwargs,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(300 * num_tasks, log_interval=None)
    return model


def make_update(algorithm: str, num_tasks: int, batch_size: int, n_updates: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    """
    :param algorithm: See ``algorithm_class``, or a name of ``BARE``
    :param num_tasks: Number of tasks T
    :param batch_size: Rows per update
    :param n_updates: Updates per call
    :param kwargs: Further arguments of the algorithm
    :return: Does that many updates of a model of the papers' size on random data
    """
    if algorithm in BARE:
        keep_freed_memory()
        bare = BARE[algorithm](OBS_DIM, ACTION_DIM, num_tasks, batch_size, NET_ARCH)

        def update() -> None:
            with fast_matmul():
                for _ in range(n_updates):
                    bare.update()

        return update
    model = make_filled_model(algorithm, num_tasks, batch_size, kwargs)
    return lambda: model.train(n_updates, batch_size)


def make_loop(
    algorithm: str,
    suite: str,
    batch_size: int,
    vec_env: str,
    env_kwargs: dict[str, Any],
    n_vector_steps: int,
    kwargs: dict[str, Any],
    net_arch: Sequence[int] = NET_ARCH,
    n_threads: int | None = None,
) -> Callable[[], None]:
    """
    :param algorithm: See ``algorithm_class``
    :param suite: Suite of Meta-World with one sub-environment per task
    :param batch_size: Rows per update; one update per step of the vector environment
    :param vec_env: "dummy", "subproc" or "shared"
    :param env_kwargs: Arguments of the environment
    :param n_vector_steps: Steps of the vector environment per call
    :param kwargs: Further arguments of the algorithm
    :param net_arch: Widths of the hidden layers
    :param n_threads: Threads of the learner; None: PyTorch's own choice
    :return: Trains for that many steps of the vector environment
    """
    if n_threads is not None:
        th.set_num_threads(n_threads)
    n_envs = int(suite.removeprefix("MT"))
    model = algorithm_class(algorithm)(
        "MlpPolicy",
        make_multi_task_vec_env(suite, n_envs, seed=0, env_kwargs=env_kwargs, vec_env=vec_env),
        batch_size=batch_size,
        learning_starts=10 * n_envs,
        buffer_size=10_000 * n_envs,
        policy_kwargs=dict(net_arch=list(net_arch)),
        seed=0,
        **kwargs,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(20 * n_envs, log_interval=None)
    return lambda: model.learn(n_vector_steps * n_envs, log_interval=None, reset_num_timesteps=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=json.loads)
    settings = parser.parse_args().settings
    th.manual_seed(0)
    np.random.seed(0)
    variants = {
        name: make_loop(**arguments) if "vec_env" in arguments else make_update(**arguments)
        for name, arguments in settings["learners"].items()
    }
    serve(variants, getattr(time, settings["clock"]))


if __name__ == "__main__":
    main()
