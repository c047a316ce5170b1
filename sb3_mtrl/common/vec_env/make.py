import difflib
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_mtrl.common.utils import check_choice, check_integer, check_kwargs, check_that
from sb3_mtrl.common.vec_env.shared_memory_vec_env import SharedMemoryVecEnv
from sb3_mtrl.common.vec_env.vec_task_assignment import VecTaskAssignment

VEC_ENVS: dict[str, type[VecEnv]] = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv, "shared": SharedMemoryVecEnv}


def preload_worker_imports() -> None:
    """
    Let the workers of a ``SubprocVecEnv`` or ``SharedMemoryVecEnv`` inherit the imports of this package, instead of each
    repeating them: PyTorch and MuJoCo take seconds and 150 MiB per worker otherwise.

    It counts for workers of the start method "forkserver" (SB3's choice where it exists) and must be called before the first
    of them starts. It replaces what ``multiprocessing.set_forkserver_preload`` was given before.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["__main__", "sb3_mtrl", "metaworld"])


def make_multi_task_vec_env(
    env_id: str | Callable[..., gym.Env] = "MT10",
    n_envs: int = 1,
    seed: int | None = None,
    start_index: int = 0,
    monitor_dir: str | None = None,
    wrapper_class: Callable[[gym.Env], gym.Env] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    vec_env_cls: type[VecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    vec_env: str | None = None,
    n_workers: int | None = None,
    worker_timeout: float | None = None,
    restart_workers: bool | None = None,
) -> VecTaskAssignment:
    """
    SB3's ``make_vec_env`` for multi-task environments: the tasks are shared out among the sub-environments.

    :param env_id: ``"MT10"`` (short for ``"MetaWorld-MT10-v3"``; also ``"MT10-short"``), any registered id, or a callable that
        returns an environment
    :param n_envs: Number of sub-environments, at least 1. With as many as there are tasks each has a task of its own
    :param seed: Seed of the first reset; sub-environment i gets ``seed + i``
    :param start_index: Added to the index of a sub-environment in its seed and in the name of its monitor file
    :param monitor_dir: Folder of the monitor files; None writes none
    :param wrapper_class: Wrapper of each sub-environment, outside of ``Monitor``
    :param env_kwargs: Arguments of the environment
    :param vec_env_cls: Class of the vector environment, instead of ``vec_env``
    :param vec_env_kwargs: Arguments of the vector environment
    :param monitor_kwargs: Arguments of ``Monitor``. Meta-World's files carry ``is_success`` and ``task_name`` unless
        ``info_keywords`` is given
    :param wrapper_kwargs: Arguments of ``wrapper_class``
    :param vec_env: ``"dummy"`` (default): all sub-environments in this process. ``"subproc"``: one process each.
        ``"shared"``: a few processes with several each, which work at the same time (:class:`SharedMemoryVecEnv`): for more
        processor time in all than ``"dummy"`` takes, and less than ``"subproc"``. What that gains depends on the cores that
        are free, on two it may be nothing: see ``docs/speed.md``. See also :func:`preload_worker_imports`, which is called
        here
    :param n_workers: Number of processes of ``"shared"``; None for the number of cores
    :param worker_timeout: Seconds that a process of ``"shared"`` has for a reply; None for its default, 600
    :param restart_workers: Whether ``"shared"`` replaces a process that ended, does not reply or raised an exception, and goes
        on; None for its default, False: an error
    :return: The vector environment, in a :class:`VecTaskAssignment`
    :raises ValueError: if an argument is none of these, the id or the kind of vector environment is unknown, ``vec_env`` and
        ``vec_env_cls`` are both given, arguments of the processes are given without ``"shared"``, or the environment does not
        take tasks
    :raises TypeError: if ``env_kwargs``, ``vec_env_kwargs``, ``monitor_kwargs`` or ``wrapper_kwargs`` name unknown arguments
    :raises OSError: if ``monitor_dir`` cannot be made or written to
    """
    n_envs = check_integer("n_envs", n_envs, 1)
    seed = check_integer("seed", seed, 0, 2**32 - 1, or_none=True)
    start_index = check_integer("start_index", start_index, 0)
    n_workers = check_integer("n_workers", n_workers, 1, or_none=True)
    for name, kwargs in (
        ("env_kwargs", env_kwargs),
        ("vec_env_kwargs", vec_env_kwargs),
        ("monitor_kwargs", monitor_kwargs),
        ("wrapper_kwargs", wrapper_kwargs),
    ):
        check_kwargs(name, kwargs)
    check_that("env_id", env_id, isinstance(env_id, str) or callable(env_id), "an id or a callable")
    is_folder = monitor_dir is None or isinstance(monitor_dir, (str, os.PathLike))
    check_that("monitor_dir", monitor_dir, is_folder, "a folder or None")
    check_that("wrapper_class", wrapper_class, wrapper_class is None or callable(wrapper_class), "a wrapper or None")
    is_vec_env_class = vec_env_cls is None or (isinstance(vec_env_cls, type) and issubclass(vec_env_cls, VecEnv))
    check_that("vec_env_cls", vec_env_cls, is_vec_env_class, "a class of vector environments or None")
    env_kwargs = dict(env_kwargs or {})
    monitor_kwargs = dict(monitor_kwargs or {})
    if isinstance(env_id, str):
        spec = _find_spec(env_id)
        # A spec instead of the id: worker processes have not registered our ids
        env_id = partial(gym.make, spec)
        env_kwargs.setdefault("render_mode", "rgb_array")
        if spec.id.startswith("MetaWorld-"):
            monitor_kwargs.setdefault("info_keywords", ("is_success", "task_name"))
    if vec_env is not None and vec_env_cls is not None:
        raise ValueError(f"vec_env and vec_env_cls exclude each other, got {vec_env!r} and {vec_env_cls.__name__}")
    if vec_env_cls is None:
        vec_env_cls = resolve_vec_env("dummy" if vec_env is None else vec_env)
    vec_env_kwargs = add_worker_arguments(
        vec_env_cls, vec_env_kwargs, n_workers=n_workers, worker_timeout=worker_timeout, restart_workers=restart_workers
    )
    if issubclass(vec_env_cls, (SubprocVecEnv, SharedMemoryVecEnv)):
        preload_worker_imports()
    venv = make_vec_env(
        env_id,
        n_envs=n_envs,
        seed=None if seed is None else int(seed),
        start_index=start_index,
        monitor_dir=monitor_dir,
        wrapper_class=wrapper_class,
        env_kwargs=env_kwargs,
        vec_env_cls=vec_env_cls,  # type: ignore[arg-type]
        vec_env_kwargs=vec_env_kwargs,
        monitor_kwargs=monitor_kwargs,
        wrapper_kwargs=wrapper_kwargs,
    )
    try:
        return VecTaskAssignment(venv)
    except ValueError:
        venv.close()
        raise


def resolve_vec_env(name: str) -> type[VecEnv]:
    """
    :param name: ``"dummy"``, ``"subproc"`` or ``"shared"``
    :return: The class of vector environments that this stands for
    :raises ValueError: if it is none of these
    """
    check_choice("vec_env", name, tuple(VEC_ENVS))
    return VEC_ENVS[name]


def add_worker_arguments(
    vec_env_cls: type[VecEnv], vec_env_kwargs: dict[str, Any] | None = None, **worker_arguments: Any
) -> dict[str, Any]:
    """
    :param vec_env_cls: Class of the vector environment
    :param vec_env_kwargs: Its arguments
    :param worker_arguments: Arguments about its workers, of which None is left to the class
    :return: All its arguments
    :raises ValueError: if the class has no workers that these arguments are about
    """
    given = {name: value for name, value in worker_arguments.items() if value is not None}
    if given and not issubclass(vec_env_cls, SharedMemoryVecEnv):
        name, value = next(iter(given.items()))
        raise ValueError(f"{name} is for vec_env='shared' alone, got {name}={value} for {vec_env_cls.__name__}")
    return {**(vec_env_kwargs or {}), **given}


def _find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    import sb3_mtrl.envs  # noqa: F401  registers the Meta-World ids

    short_for = f"MetaWorld-{env_id}-v3"
    if short_for in gym.registry:
        return gym.spec(short_for)
    if env_id in gym.registry or ":" in env_id:
        try:
            return gym.spec(env_id)
        except (gym.error.Error, ImportError) as error:
            raise ValueError(f"env_id must be a registered environment, got {env_id!r}: {error}") from error
    meta_world_ids = sorted(name for name in gym.registry if name.startswith("MetaWorld-"))
    (nearest,) = difflib.get_close_matches(env_id, meta_world_ids, n=1, cutoff=0.0)
    raise ValueError(
        f"env_id must be a registered environment, got {env_id!r}; did you mean {nearest!r}? "
        f"The Meta-World ids are {', '.join(meta_world_ids)}"
    )
