import contextlib
import mmap
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_mtrl.common.cpu_tuning import available_cores

CLOSE_TIMEOUT = 10.0  # seconds that a worker has to close its environments
ALIVE_CHECK_INTERVAL = 1.0  # seconds without a reply until the workers are looked after
ALIGNMENT = 64


def balance_assignment(costs: Sequence[float], n_workers: int) -> list[list[int]]:
    """
    Share out sub-environments so that the workers have about equally much to do: from the most expensive one to the
    cheapest, each goes to the worker that has least so far. A vector step takes as long as its slowest worker.

    :param costs: Cost of a step of each sub-environment, in any unit
    :param n_workers: Number of workers, at least 1
    :return: For each worker the indices of its sub-environments; workers that would get none are left out
    :raises ValueError: if there is nothing to share out, a cost is not positive, or there is no worker
    """
    if n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, got {n_workers}")
    if len(costs) == 0 or not all(cost > 0 for cost in costs):
        raise ValueError(f"costs must be positive numbers, one per sub-environment, got {costs!r}")
    groups: list[list[int]] = [[] for _ in range(min(n_workers, len(costs)))]
    loads = [0.0] * len(groups)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        worker = loads.index(min(loads))
        groups[worker].append(index)
        loads[worker] += costs[index]
    return [sorted(group) for group in groups]


class WorkerTraceback(Exception):
    """Cause of an exception that was raised in a worker: where it happened, and the worker's traceback."""


class Failure(NamedTuple):
    """
    An exception on its way from a worker.

    ``exception`` is None if it cannot be pickled.
    """

    where: str
    exception: Exception | None
    summary: str
    traceback: str

    def reraise(self) -> None:
        """:raises Exception: the worker's exception, or a ``RuntimeError`` in its place"""
        cause = WorkerTraceback(f"{self.where}\n\n{self.traceback}")
        raise self.exception or RuntimeError(f"{self.where}: {self.summary}") from cause


class SharedArrays:
    """
    What a step takes and gives, in memory that the workers share with the main process.

    :param n_envs: Number of sub-environments
    :param observation_space: Observation space of one of them
    :param action_space: Action space of one of them; actions without a fixed shape have no array
    """

    def __init__(self, n_envs: int, observation_space: spaces.Space, action_space: spaces.Space):
        keys, shapes, dtypes = obs_space_info(observation_space)
        fields: dict[Any, tuple[tuple[int, ...], Any]] = {("obs", key): (shapes[key], dtypes[key]) for key in keys}
        if action_space.shape is not None:
            fields["actions"] = (action_space.shape, action_space.dtype)
        fields.update(rewards=((), np.float32), dones=((), np.bool_), truncations=((), np.bool_))
        self._layout: dict[Any, tuple[int, tuple[int, ...], Any]] = {}
        self.size = 0
        for name, (shape, dtype) in fields.items():
            full_shape = (n_envs, *shape)
            self._layout[name] = (self.size, full_shape, dtype)
            n_bytes = int(np.prod(full_shape)) * np.dtype(dtype).itemsize
            self.size += -(-n_bytes // ALIGNMENT) * ALIGNMENT

    def attach(self, path: str) -> None:
        """
        :param path: A file of ``size`` bytes, which may be removed as soon as all have attached
        """
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), self.size)
        arrays = {
            name: np.ndarray(shape, dtype, buffer=memory, offset=offset)
            for name, (offset, shape, dtype) in self._layout.items()
        }
        self.obs = {name[1]: array for name, array in arrays.items() if isinstance(name, tuple)}
        self.actions = arrays.get("actions")
        self.rewards, self.dones, self.truncations = arrays["rewards"], arrays["dones"], arrays["truncations"]


def _make_shared_file() -> Any:
    # In memory, where the system has such a place
    return tempfile.NamedTemporaryFile(prefix="sb3_mtrl_", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


class EnvHost:
    """
    The sub-environments of one worker. The methods without an underscore are the requests that the main process can make.

    :param env_fns: Functions that make them, by index of the sub-environment
    """

    def __init__(self, env_fns: dict[int, Callable[[], gym.Env]]):
        self.envs: dict[int, gym.Env] = {}
        self.arrays: SharedArrays
        self.env_fns = env_fns
        self._at = min(env_fns)  # the sub-environment that is worked on, for error messages

    def make(self) -> list[tuple[spaces.Space, spaces.Space]]:
        for index, env_fn in self.env_fns.items():
            self._at = index
            self.envs[index] = _patch_env(env_fn())
        return [(env.observation_space, env.action_space) for env in self.envs.values()]

    def attach(self, arrays: SharedArrays, path: str) -> None:
        self.arrays = arrays
        arrays.attach(path)

    def step(self, actions: dict[int, Any] | None) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
        """Infos that are not empty, and infos of resets, both by index of the sub-environment."""
        arrays = self.arrays
        infos: dict[int, dict[str, Any]] = {}
        reset_infos: dict[int, dict[str, Any]] = {}
        for index, env in self.envs.items():
            self._at = index
            # A copy: environments may keep their last action
            action = arrays.actions[index].copy() if actions is None else actions[index]  # type: ignore[index]
            obs, arrays.rewards[index], terminated, truncated, info = env.step(action)
            done = terminated or truncated
            arrays.dones[index] = done
            arrays.truncations[index] = truncated and not terminated
            if done:
                info["terminal_observation"] = obs
                obs, reset_infos[index] = env.reset()
            if info:
                infos[index] = info
            self._save_obs(index, obs)
        return infos, reset_infos

    def reset(self, arguments: dict[int, tuple[int | None, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
        reset_infos = {}
        for index, (seed, options) in arguments.items():
            self._at = index
            maybe_options = {"options": options} if options else {}
            obs, reset_infos[index] = self.envs[index].reset(seed=seed, **maybe_options)
            self._save_obs(index, obs)
        return reset_infos

    def render(self, indices: list[int]) -> list[Any]:
        return [env.render() for env in self._visit(indices)]

    def env_method(self, indices: list[int], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return [env.get_wrapper_attr(name)(*args, **kwargs) for env in self._visit(indices)]

    def get_attr(self, indices: list[int], name: str) -> list[Any]:
        return [env.get_wrapper_attr(name) for env in self._visit(indices)]

    def has_attr(self, indices: list[int], name: str) -> list[bool]:
        return [env.has_wrapper_attr(name) for env in self._visit(indices)]

    def set_attr(self, indices: list[int], name: str, value: Any) -> list[None]:
        for env in self._visit(indices):
            setattr(env, name, value)
        return [None] * len(indices)

    def is_wrapped(self, indices: list[int], wrapper_class: type[gym.Wrapper]) -> list[bool]:
        return [is_wrapped(env, wrapper_class) for env in self._visit(indices)]

    def close(self) -> None:
        for env in self._visit(list(self.envs)):
            env.close()

    def _visit(self, indices: list[int]) -> Iterable[gym.Env]:
        for index in indices:
            self._at = index
            yield self.envs[index]

    def _save_obs(self, index: int, obs: Any) -> None:
        for key, array in self.arrays.obs.items():
            array[index] = obs if key is None else obs[key]

    def _failure(self, request: str, error: Exception) -> Failure:
        where = f"in {request}() of sub-environment {self._at}"
        env = self.envs.get(self._at)
        # Multi-task environments say which task it was
        with contextlib.suppress(Exception):
            unwrapped: Any = env.unwrapped  # type: ignore[union-attr]
            where += f", task {unwrapped.task_names[unwrapped.task_id]!r}"
        exception: Exception | None = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            exception = None
        return Failure(where, exception, f"{type(error).__name__}: {error}", traceback.format_exc())


def _work(connection: Connection, parent_connection: Connection, env_fns: CloudpickleWrapper) -> None:
    """Main function of a worker: answer requests until the main process says "close" or is gone."""
    parent_connection.close()
    host = EnvHost(env_fns.var)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            message, request = connection.recv_bytes(), "unpickle"
            try:
                request, arguments = pickle.loads(message)
                if request == "close":
                    break
                reply = pickle.dumps(getattr(host, request)(*arguments), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                reply = pickle.dumps(host._failure(request, error), pickle.HIGHEST_PROTOCOL)
            connection.send_bytes(reply)
    host.close()


class SharedMemoryVecEnv(VecEnv):
    """
    Several sub-environments in each of a few worker processes.

    SB3's ``SubprocVecEnv`` has one process per sub-environment and sends everything through pipes: with more processes than
    cores most of its time goes into switching between them. Here there are as many workers as cores, and observations,
    actions, rewards and ends of episodes lie in shared memory; only infos that hold something are sent. What it returns is
    what ``DummyVecEnv`` returns, for equal seeds.

    An exception in a sub-environment is raised here, too; its cause names the sub-environment (and its task) and holds the
    worker's traceback. The workers remain usable. If a worker dies, the next call says which one and how.

    :param env_fns: Functions that make the sub-environments
    :param n_workers: Number of workers; None for the number of cores, at most one per sub-environment
    :param assignment: For each worker the indices of its sub-environments, instead of ``n_workers``; see
        :func:`balance_assignment`. None deals them out in turn
    :param start_method: How processes start, as in ``SubprocVecEnv``: "forkserver" (default where available), "spawn", "fork"
    :raises ValueError: if an argument is none of these, or the sub-environments have different spaces
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        n_workers: int | None = None,
        assignment: Sequence[Sequence[int]] | None = None,
        start_method: str | None = None,
    ):
        self.assignment = self._check_assignment(len(env_fns), n_workers, assignment)
        self.waiting = False
        self.closed = False
        self._step_replies: dict[int, Any] | None = None
        self._death: str | None = None
        self._worker_of = {index: worker for worker, group in enumerate(self.assignment) for index in group}
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        try:
            self._start(env_fns, start_method)
            observation_space, action_space = self._find_spaces()
            self._arrays = SharedArrays(len(env_fns), observation_space, action_space)
            with _make_shared_file() as file:
                file.truncate(self._arrays.size)
                self._request_all("attach", (self._arrays, file.name))
                self._arrays.attach(file.name)
            super().__init__(len(env_fns), observation_space, action_space)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check_assignment(n_envs: int, n_workers: int | None, assignment: Sequence[Sequence[int]] | None) -> list[list[int]]:
        if n_envs == 0:
            raise ValueError("env_fns must hold at least one function, got none")
        if assignment is None:
            return balance_assignment([1.0] * n_envs, available_cores() if n_workers is None else n_workers)
        groups = [[int(index) for index in group] for group in assignment]
        if sorted(index for group in groups for index in group) != list(range(n_envs)) or not all(groups):
            raise ValueError(
                f"assignment must give each of the {n_envs} sub-environments to one worker, and each worker at least one, "
                f"got {assignment!r}"
            )
        if n_workers not in (None, len(groups)):
            raise ValueError(f"n_workers must be None or the number of groups in assignment, {len(groups)}, got {n_workers}")
        return groups

    def _start(self, env_fns: Sequence[Callable[[], gym.Env]], start_method: str | None) -> None:
        methods = mp.get_all_start_methods()
        if start_method is None:
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        if start_method not in methods:
            raise ValueError(f"start_method must be one of {', '.join(methods)}, got {start_method!r}")
        context = mp.get_context(start_method)
        for group in self.assignment:
            connection, worker_connection = context.Pipe()
            own_env_fns = CloudpickleWrapper({index: env_fns[index] for index in group})
            process = context.Process(  # type: ignore[attr-defined]
                target=_work, args=(worker_connection, connection, own_env_fns), daemon=True
            )
            process.start()
            worker_connection.close()
            self._connections.append(connection)
            self._processes.append(process)

    def _find_spaces(self) -> tuple[spaces.Space, spaces.Space]:
        replies = self._request_all("make", ())
        found: dict[int, Any] = {}
        for worker, pairs in replies.items():
            found.update(zip(self.assignment[worker], pairs, strict=True))
        for index, pair in found.items():
            if pair != found[0]:
                raise ValueError(f"sub-environments must have equal spaces, number 0 has {found[0]}, number {index} {pair}")
        return found[0]

    # ------------------------------------------------------------ talking to workers

    def _send(self, request: str, arguments: dict[int, tuple[Any, ...]]) -> None:
        """Make a request of some workers, with its arguments by worker."""
        # All at first: if one cannot be pickled, no worker must be left with a request whose reply no one reads
        messages = {
            worker: pickle.dumps((request, worker_arguments), pickle.HIGHEST_PROTOCOL)
            for worker, worker_arguments in arguments.items()
        }
        with self._unusable_if_interrupted():
            for worker, message in messages.items():
                try:
                    self._connections[worker].send_bytes(message)
                except BrokenPipeError:
                    self._raise_death(worker)

    @contextlib.contextmanager
    def _unusable_if_interrupted(self) -> Iterator[None]:
        """Half a conversation cannot be taken up again: the next reply would be taken for that to another request."""
        try:
            yield
        except BaseException as e:
            self._death = (
                self._death or f"talking to the workers was interrupted by {type(e).__name__}; make a new environment"
            )
            raise

    def _receive(self, workers: Iterable[int]) -> dict[int, Any]:
        """Replies by worker, failures among them. A worker that ends instead of replying is noticed by its process."""
        with self._unusable_if_interrupted():
            return self._receive_all(workers)

    def _receive_all(self, workers: Iterable[int]) -> dict[int, Any]:
        replies: dict[int, Any] = {}
        pending: dict[Any, int] = {self._connections[worker]: worker for worker in workers}
        sentinels: dict[Any, int] = {self._processes[worker].sentinel: worker for worker in pending.values()}
        while pending:
            if not (all_ready := wait([*pending, *sentinels], ALIVE_CHECK_INTERVAL)):
                # A child of a worker's own may keep its pipe and its sentinel open
                for connection, silent in pending.items():
                    if not self._processes[silent].is_alive() and not connection.poll():
                        self._raise_death(silent)
            for ready in all_ready:
                worker = pending.get(ready, sentinels.get(ready))
                if worker is None:  # it replied and ended, both at once
                    continue
                connection = self._connections[worker]
                if ready is not connection and not connection.poll():
                    self._raise_death(worker)
                try:
                    replies[worker] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._raise_death(worker)
                del pending[connection], sentinels[self._processes[worker].sentinel]
        return replies

    def _request(self, request: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """
        :param request: Method of ``EnvHost``
        :param arguments: Its arguments by worker
        :return: What it returned, by worker
        """
        self._check_open()
        self._finish_step()
        self._send(request, arguments)
        return self._check_replies(self._receive(arguments))

    def _request_all(self, request: str, arguments: tuple[Any, ...]) -> dict[int, Any]:
        return self._request(request, dict.fromkeys(range(len(self.assignment)), arguments))

    def _request_envs(self, request: str, indices: VecEnvIndices, *arguments: Any) -> list[Any]:
        """What a request that each sub-environment answers for itself returned, in the order of the indices."""
        wanted = list(self._get_indices(indices))
        groups: dict[int, list[int]] = {}
        for index in wanted:
            groups.setdefault(self._worker_of[range(self.num_envs)[index]], []).append(range(self.num_envs)[index])
        replies = self._request(request, {worker: (group, *arguments) for worker, group in groups.items()})
        remaining = {worker: iter(results) for worker, results in replies.items()}
        return [next(remaining[self._worker_of[range(self.num_envs)[index]]]) for index in wanted]

    @staticmethod
    def _check_replies(replies: dict[int, Any]) -> dict[int, Any]:
        for worker in sorted(replies):
            if isinstance(replies[worker], Failure):
                replies[worker].reraise()
        return replies

    def _finish_step(self) -> None:
        """Other requests may come between ``step_async`` and ``step_wait``: the results of the step are put aside."""
        if self.waiting and self._step_replies is None:
            self._step_replies = self._receive(range(len(self.assignment)))

    def _check_open(self) -> None:
        if self._death is not None:
            raise RuntimeError(self._death)
        if self.closed:
            raise RuntimeError("this SharedMemoryVecEnv was closed")

    def _raise_death(self, worker: int) -> None:
        process = self._processes[worker]
        if process.is_alive():  # its pipe was closed a moment before its end
            process.join(CLOSE_TIMEOUT)
        self._death = (
            f"worker {worker} (process {process.pid}), which had the sub-environments {self.assignment[worker]}, ended with "
            f"exit code {process.exitcode}; a negative one is the signal that ended it, -9 often means: out of memory"
        )
        raise RuntimeError(self._death)

    # ------------------------------------------------------------- SB3's VecEnv

    def step_async(self, actions: np.ndarray) -> None:
        self._check_open()
        if self.waiting:
            raise RuntimeError("step_async() was called twice without step_wait()")
        if len(actions) != self.num_envs:
            raise ValueError(f"actions must hold one action per sub-environment ({self.num_envs}), got {len(actions)}")
        shared = self._arrays.actions
        fits = shared is not None and isinstance(actions, np.ndarray)
        fits = fits and (actions.shape, actions.dtype) == (shared.shape, shared.dtype)  # type: ignore[union-attr]
        if fits:
            shared[:] = actions  # type: ignore[index]
        groups = enumerate(self.assignment)
        self._send(
            "step", {worker: (None if fits else {index: actions[index] for index in group},) for worker, group in groups}
        )
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        self._check_open()
        if not self.waiting:
            raise RuntimeError("step_wait() was called without step_async()")
        self._finish_step()
        replies, self._step_replies, self.waiting = self._step_replies, None, False
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for worker_infos, worker_reset_infos in self._check_replies(replies or {}).values():
            for index, info in worker_infos.items():
                infos[index] = info
            for index, info in worker_reset_infos.items():
                self.reset_infos[index] = info
        for info, truncated in zip(infos, self._arrays.truncations.tolist(), strict=True):
            info["TimeLimit.truncated"] = truncated
        return self._copy_obs(), self._arrays.rewards.copy(), self._arrays.dones.copy(), infos

    def reset(self) -> VecEnvObs:
        self._check_open()
        self._finish_step()
        self._step_replies, self.waiting = None, False
        arguments = {
            worker: ({index: (self._seeds[index], self._options[index]) for index in group},)
            for worker, group in enumerate(self.assignment)
        }
        for worker_reset_infos in self._request("reset", arguments).values():
            for index, info in worker_reset_infos.items():
                self.reset_infos[index] = info
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return self._copy_obs()

    def _copy_obs(self) -> VecEnvObs:
        return dict_to_obs(self.observation_space, {key: array.copy() for key, array in self._arrays.obs.items()})

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(pickle.dumps(("close", ())))
            # A worker that is busy with a reply that no one waits for gives up
            connection.close()
        for process in self._processes:
            if process.is_alive():
                process.join(CLOSE_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode}, but this method assumes it is `rgb_array` to obtain images.",
                stacklevel=2,
            )
            return [None for _ in range(self.num_envs)]
        return self._request_envs("render", None)

    def has_attr(self, attr_name: str) -> bool:
        return all(self._request_envs("has_attr", None, attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._request_envs("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._request_envs("set_attr", indices, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return self._request_envs("env_method", indices, method_name, method_args, method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._request_envs("is_wrapped", indices, wrapper_class)
