import contextlib
import mmap
import multiprocessing as mp
import os
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common import monitor
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_mtrl.common.cpu_tuning import available_cores
from sb3_mtrl.common.utils import check_flag, check_number
from sb3_mtrl.common.vec_env.state import get_env_state, set_env_state

CLOSE_TIMEOUT = 10.0  # seconds that the workers have to close their environments
WORKER_TIMEOUT = 600.0  # seconds that a worker has for a reply
# A worker that was replaced so many times within so many steps has a fault that a new process does not mend
MAX_RESTARTS, RESTART_WINDOW = 3, 1000
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


class Loss(NamedTuple):
    """The end of a worker that was to reply: what is said of it, and the exception that it had raised, if any."""

    message: str
    failure: Failure | None = None

    def reraise(self) -> None:
        """:raises Exception: the worker's exception, or a ``RuntimeError`` with the message"""
        if self.failure is not None:
            self.failure.reraise()
        raise RuntimeError(self.message)


class SharedArrays:
    """
    What a step takes and gives, in memory that the workers share with the main process; and for the message about a worker
    that is gone, which sub-environment it was working on, and the task of each of them (-1: unknown).

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
        fields.update(is_busy=((), np.bool_), tasks=((), np.int64))
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
        self.is_busy, self.tasks = arrays["is_busy"], arrays["tasks"]
        self._arrays = arrays

    def copy_from(self, other: "SharedArrays") -> None:
        """
        :param other: Arrays of the same kind, attached
        """
        for name, array in self._arrays.items():
            array[...] = other._arrays[name]


def _make_shared_file() -> Any:
    # In memory, where the system has such a place
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.NamedTemporaryFile(prefix=f"sb3_mtrl_{os.getpid()}_", dir=folder)


class AppendingResultsWriter(monitor.ResultsWriter):
    """Writes below what a file holds, whatever it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "override_existing": False})


class EnvHost:
    """
    The sub-environments of one worker. The methods without an underscore are the requests that the main process can make.

    :param env_fns: Functions that make them, by index of the sub-environment
    :param is_replacement: Whether they were made before, by a worker that is gone
    """

    def __init__(self, env_fns: dict[int, Callable[[], gym.Env]], is_replacement: bool = False):
        self.envs: dict[int, gym.Env] = {}
        self.arrays: SharedArrays
        self.env_fns = env_fns
        self.is_replacement = is_replacement
        self._at = min(env_fns)  # the sub-environment that is worked on, for error messages

    def make(self) -> list[tuple[spaces.Space, spaces.Space]]:
        if self.is_replacement:  # what Monitor has written of the episodes so far stays
            monitor.ResultsWriter = AppendingResultsWriter  # type: ignore[misc]
        for index, env_fn in self.env_fns.items():
            self._at = index
            self.envs[index] = _patch_env(env_fn())
        return [(env.observation_space, env.action_space) for env in self.envs.values()]

    def task_names(self) -> dict[int, tuple[str, ...]]:
        """Names of the tasks of each sub-environment that tells them."""
        names: dict[int, tuple[str, ...]] = {}
        for index, env in self.envs.items():
            with contextlib.suppress(Exception):
                names[index] = tuple(map(str, env.unwrapped.task_names))  # type: ignore[attr-defined]
        return names

    def attach(self, arrays: SharedArrays, path: str) -> None:
        self.arrays = arrays
        arrays.attach(path)

    def step(self, actions: dict[int, Any] | None) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
        """Infos that are not empty, and infos of resets, both by index of the sub-environment."""
        arrays = self.arrays
        infos: dict[int, dict[str, Any]] = {}
        reset_infos: dict[int, dict[str, Any]] = {}
        for index, env in self.envs.items():
            self._start_on(index)
            # A copy: environments may keep their last action
            action = arrays.actions[index].copy() if actions is None else actions[index]  # type: ignore[index]
            obs, arrays.rewards[index], terminated, truncated, info = env.step(action)
            done = terminated or truncated
            arrays.dones[index] = done
            arrays.truncations[index] = truncated and not terminated
            if done:
                info["terminal_observation"] = obs
                obs, reset_infos[index] = env.reset()
                self._note_task(index)
            if info:
                infos[index] = info
            self._save_obs(index, obs)
            arrays.is_busy[index] = False
        return infos, reset_infos

    def _start_on(self, index: int) -> None:
        self._at = index
        self.arrays.is_busy[index] = True

    def _note_task(self, index: int) -> None:
        with contextlib.suppress(TypeError, ValueError):
            self.arrays.tasks[index] = getattr(self.envs[index].unwrapped, "task_id", -1)

    def reset(self, arguments: dict[int, tuple[int | None, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
        reset_infos = {}
        for index, (seed, options) in arguments.items():
            self._start_on(index)
            maybe_options = {"options": options} if options else {}
            obs, reset_infos[index] = self.envs[index].reset(seed=seed, **maybe_options)
            self._note_task(index)
            self._save_obs(index, obs)
            self.arrays.is_busy[index] = False
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

    def get_env_state(self, indices: list[int]) -> list[bytes]:
        return [get_env_state(env) for env in self._visit(indices)]

    def set_env_state(self, indices: list[int], states: dict[int, bytes]) -> list[None]:
        for index, env in zip(indices, self._visit(indices), strict=True):
            set_env_state(env, states[index])
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


def _work(
    connection: Connection, parent_connection: Connection, env_fns: CloudpickleWrapper, is_replacement: bool = False
) -> None:
    """Main function of a worker: answer requests until the main process says "close" or is gone."""
    parent_connection.close()
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    host = EnvHost(env_fns.var, is_replacement)
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


def _end_with_main_process() -> None:
    """Also if an environment does not return from its step, and hence no request is read any more."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(CLOSE_TIMEOUT)  # in which the environments are closed otherwise
        os._exit(1)


def _kill(processes: list[Any]) -> None:
    """For the end of the main process: ``multiprocessing`` would wait for a worker that does not listen."""
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


class SharedMemoryVecEnv(VecEnv):
    """
    Several sub-environments in each of a few worker processes.

    SB3's ``SubprocVecEnv`` has one process per sub-environment and sends everything through pipes: with more processes than
    cores most of its time goes into switching between them. Here there are as many workers as cores, and observations,
    actions, rewards and ends of episodes lie in shared memory; only infos that hold something are sent. What it returns is
    what ``DummyVecEnv`` returns, for equal seeds.

    An exception in a sub-environment is raised here, too; its cause names the sub-environment (and its task) and holds the
    worker's traceback. The workers remain usable. If a worker dies or does not answer in time, the call says which one, how,
    and on what sub-environment and task; workers end with the main process, whatever ended it.

    With ``restart_workers`` such a worker, and one whose sub-environment raises an exception in a step or a reset, is replaced
    with a warning. The episodes of all its sub-environments end there: the step returns ``done``, reward 0, the last
    observation known as ``terminal_observation``, and the infos ``TimeLimit.truncated`` and ``worker_restarted``. Their next
    episodes are seeded from the last seed, the sub-environment and the number of its restarts, so that equal faults give
    equal runs, and no episode comes twice. Attributes that were set, and methods whose name begins with ``set_``, are set and
    called again (as they were last); whatever else the environments remembered is lost, e.g. where they were in a list of
    goals, which begins anew. A worker that has to be replaced a fourth time within 1000 steps is an error, and so is one that
    is lost before its first reset is done. The step that never happened is not stored in a ``MultiTaskReplayBuffer``; SB3's
    own buffers (``ReplayBuffer``, ``NStepReplayBuffer``, those of dictionaries and HER) take a step of all sub-environments
    at once, and store it as one with reward 0 that stays where it is and ends in a timeout.

    :param env_fns: Functions that make the sub-environments
    :param n_workers: Number of workers; None for the number of cores, at most one per sub-environment
    :param assignment: For each worker the indices of its sub-environments, instead of ``n_workers``; see
        :func:`balance_assignment`. None deals them out in turn
    :param start_method: How processes start, as in ``SubprocVecEnv``: "forkserver" (default where available), "spawn", "fork"
    :param worker_timeout: Seconds that a worker has for a reply (in the longest case it makes or resets all its
        sub-environments) before it is killed; infinity: it may take for ever
    :param restart_workers: Whether to replace a worker that is lost and to go on; else its loss is an error
    :raises ValueError: if an argument is none of these, or the sub-environments have different spaces
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        n_workers: int | None = None,
        assignment: Sequence[Sequence[int]] | None = None,
        start_method: str | None = None,
        worker_timeout: float = WORKER_TIMEOUT,
        restart_workers: bool = False,
    ):
        worker_timeout = check_number("worker_timeout", worker_timeout, above=0, finite=False)
        check_flag("restart_workers", restart_workers)
        self.assignment = self._check_assignment(len(env_fns), n_workers, assignment)
        self.worker_timeout = worker_timeout
        self.restart_workers = restart_workers
        #: Number of workers that were replaced
        self.n_restarts = 0
        self._env_fns = list(env_fns)
        self._task_names: dict[int, tuple[str, ...]] = {}
        self._n_steps = 0
        # What a replaced sub-environment needs: the last seed, how often it was replaced, what was set on it
        self._last_seeds: list[int | None] = [None] * len(env_fns)
        self._env_restarts = [0] * len(env_fns)
        self._settings: dict[int, dict[tuple[str, str], tuple[Any, ...]]] = {index: {} for index in range(len(env_fns))}
        self._restart_steps: dict[int, list[int]] = {}
        # Workers that were replaced since the last step: their sub-environments are reset, and do not take the next step
        self._replaced: set[int] = set()
        # Workers that the step under way did not reach
        self._step_losses: dict[int, Loss] = {}
        # Observations that were returned last, by key
        self._last_obs: dict[Any, np.ndarray] | None = None
        # Whether what was said to the workers so far is enough to replace one; not so those that are just starting
        self._is_ready = False
        self._starting: set[int] = set()
        #: Which sub-environments the last step lost with their workers, (n_envs,) bool
        self.lost_steps = np.zeros(len(env_fns), dtype=bool)
        self.waiting = False
        self.closed = False
        self._step_replies: dict[int, Any] | None = None
        self._death: str | None = None
        self._worker_of = {index: worker for worker, group in enumerate(self.assignment) for index in group}
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        # Before multiprocessing looks after its children, and when this object is forgotten without close()
        self._finalizer = Finalize(self, _kill, (self._processes,), exitpriority=10)
        try:
            self._start(start_method)
            observation_space, action_space = self._find_spaces()
            self._make_arrays = partial(SharedArrays, len(env_fns), observation_space, action_space)
            self._share_arrays()
            self._arrays.tasks[:] = -1
            for names in self._request_all("task_names", ()).values():
                self._task_names.update(names)
            self._is_ready = True
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

    def _start(self, start_method: str | None) -> None:
        methods = mp.get_all_start_methods()
        if start_method is None:
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        if start_method not in methods:
            raise ValueError(f"start_method must be one of {', '.join(methods)}, got {start_method!r}")
        self._context = mp.get_context(start_method)
        for worker in range(len(self.assignment)):
            connection, process = self._start_worker(worker)
            self._connections.append(connection)
            self._processes.append(process)

    def _start_worker(self, worker: int, is_replacement: bool = False) -> tuple[Connection, Any]:
        connection, worker_connection = self._context.Pipe()
        own_env_fns = CloudpickleWrapper({index: self._env_fns[index] for index in self.assignment[worker]})
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_work, args=(worker_connection, connection, own_env_fns, is_replacement), daemon=True
        )
        process.start()
        worker_connection.close()
        return connection, process

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

    def _send(self, request: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Loss]:
        """Make a request of some workers, with its arguments by worker; returned are those that were gone already."""
        # All at first: if one cannot be pickled, no worker must be left with a request whose reply no one reads
        messages = {
            worker: pickle.dumps((request, worker_arguments), pickle.HIGHEST_PROTOCOL)
            for worker, worker_arguments in arguments.items()
        }
        lost = {}
        with self._unusable_if_interrupted():
            for worker, message in messages.items():
                try:
                    self._connections[worker].send_bytes(message)
                except BrokenPipeError:
                    lost[worker] = self._lose(worker)
        return lost

    @contextlib.contextmanager
    def _unusable_if_interrupted(self, what: str = "talking to the workers") -> Iterator[None]:
        """Half a conversation cannot be taken up again: the next reply would be taken for that to another request."""
        try:
            yield
        except BaseException as e:
            if self._death is None:
                cause = type(e).__name__ + (f" ({e})" if str(e) else "")
                self._death = f"{what} was interrupted by {cause}; make a new environment"
            raise

    def _receive(self, workers: Iterable[int]) -> dict[int, Any]:
        """Replies by worker, failures and losses among them. A worker that ends instead of replying is noticed."""
        with self._unusable_if_interrupted():
            return self._receive_all(workers)

    def _receive_all(self, workers: Iterable[int]) -> dict[int, Any]:
        replies: dict[int, Any] = {}
        pending: dict[Any, int] = {self._connections[worker]: worker for worker in workers}
        sentinels: dict[Any, int] = {self._processes[worker].sentinel: worker for worker in pending.values()}
        # Counted in short waits: the time in which this process itself was stopped is not the workers' fault
        interval, waited = min(ALIVE_CHECK_INTERVAL, self.worker_timeout), 0.0
        while pending:
            all_ready = wait([*pending, *sentinels], interval)
            gone = []
            if not all_ready:
                waited += interval
                # A child of a worker's own may keep its pipe and its sentinel open
                gone = [
                    (connection, worker)
                    for connection, worker in pending.items()
                    if waited >= self.worker_timeout or (not self._processes[worker].is_alive() and not connection.poll())
                ]
            for ready in all_ready:
                worker = pending.get(ready, sentinels.get(ready))
                if worker is None or worker in replies:  # it replied and ended, both at once
                    continue
                connection = self._connections[worker]
                if ready is not connection and not connection.poll():
                    gone.append((connection, worker))
                    continue
                try:
                    replies[worker] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    gone.append((connection, worker))
                    continue
                waited = 0.0
                del pending[connection], sentinels[self._processes[worker].sentinel]
            for connection, worker in gone:
                if worker in pending.values():
                    del pending[connection], sentinels[self._processes[worker].sentinel]
                    replies[worker] = self._lose(worker, is_silent=waited >= self.worker_timeout)
        return replies

    def _request(self, request: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """
        :param request: Method of ``EnvHost``
        :param arguments: Its arguments by worker
        :return: What it returned, by worker
        """
        self._check_open()
        self._finish_step()
        replies = self._converse(request, arguments)
        while lost := self._lost(replies, also_failed=request == "reset"):
            # Also of those that were lost meanwhile: what they had replied is no longer true
            replaced = [worker for worker in self._replace(lost) if worker in arguments]
            replies.update(self._converse(request, {worker: arguments[worker] for worker in replaced}))
        return self._check_replies(replies)

    def _converse(self, request: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        lost = self._send(request, arguments)
        return {**lost, **self._receive([worker for worker in arguments if worker not in lost])}

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
            waiting_for = [worker for worker in range(len(self.assignment)) if worker not in self._step_losses]
            waiting_for = [worker for worker in waiting_for if worker not in self._replaced]
            self._step_replies = {**self._step_losses, **self._receive(waiting_for)}
            self._replace(self._lost(self._step_replies, also_failed=True))

    def _check_open(self) -> None:
        if self._death is not None:
            raise RuntimeError(self._death)
        if self.closed:
            raise RuntimeError("this SharedMemoryVecEnv was closed")

    def _lose(self, worker: int, is_silent: bool = False) -> Loss:
        """
        :param worker: A worker that has ended, or that does not reply in time
        :param is_silent: The latter
        :return: What is to be said of it
        :raises RuntimeError: if it is not to be replaced
        """
        process = self._processes[worker]
        if is_silent:
            fate = f"did not answer for {self.worker_timeout:g} s (worker_timeout) and was killed"
            process.kill()
        if process.is_alive():  # its pipe was closed a moment before its end
            process.join(CLOSE_TIMEOUT)
        if not is_silent:
            fate = f"ended with exit code {process.exitcode}"
        message = f"{self._name(worker, process)}, {fate}"
        is_new = not self._is_ready or worker in self._starting
        busy = [index for index in self.assignment[worker] if not is_new and self._arrays.is_busy[index]]
        if busy:
            message += f"; it was working on {self._name_env(busy[0])}"
        if not is_silent:
            message += ". A negative exit code is the signal that ended it, -9 often means: out of memory"
        if not self.restart_workers or is_new:
            self._death = message
            raise RuntimeError(message)
        return Loss(message)

    def _name(self, worker: int, process: Any) -> str:
        return f"worker {worker} (process {process.pid}), which had the sub-environments {self.assignment[worker]}"

    def _name_env(self, index: int) -> str:
        task, names = int(self._arrays.tasks[index]), self._task_names.get(index, ())
        return f"sub-environment {index}" + (f", task {names[task]!r}" if 0 <= task < len(names) else "")

    # ----------------------------------------------------------- replacing workers

    def _lost(self, replies: dict[int, Any], also_failed: bool) -> dict[int, Loss]:
        """Workers to be replaced: those that are gone and, if asked for, those that sent an exception."""
        lost = {worker: reply for worker, reply in replies.items() if isinstance(reply, Loss)}
        for worker, reply in replies.items():
            if isinstance(reply, Failure) and also_failed and self.restart_workers and self._is_ready:
                name = self._name(worker, self._processes[worker])
                lost[worker] = Loss(f"{name}, raised {reply.summary} {reply.where}", reply)
        return lost

    def _replace(self, lost: dict[int, Loss]) -> list[int]:
        """
        Start workers anew; their sub-environments begin new episodes.

        :param lost: The workers
        :return: Those that were replaced: others may be lost meanwhile
        """
        if not lost:
            return []
        with self._unusable_if_interrupted("replacing a worker"):
            while lost:
                self._starting.update(lost)  # one of these that fails at once is an error
                for worker, loss in lost.items():
                    self._count_restart(worker, loss)
                    self._processes[worker].kill()
                    self._processes[worker].join()
                    self._connections[worker].close()
                    self._connections[worker], self._processes[worker] = self._start_worker(worker, is_replacement=True)
                self._check_replies(self._converse("make", dict.fromkeys(lost, ())))
                lost = self._share_arrays()
            replaced = sorted(self._starting)
            for worker in replaced:
                self._restore(worker)
            self._replaced.update(replaced)
            self._starting.clear()
        return replaced

    def _count_restart(self, worker: int, loss: Loss) -> None:
        steps = self._restart_steps.setdefault(worker, [])
        if sum(self._n_steps - step < RESTART_WINDOW for step in steps) >= MAX_RESTARTS:
            times = f"it had been replaced {MAX_RESTARTS} times within {RESTART_WINDOW} steps before"
            self._death = f"{loss.message}; {times}"
            loss._replace(message=self._death).reraise()
        steps.append(self._n_steps)
        self.n_restarts += 1
        warnings.warn(
            f"{loss.message}; it is replaced, and the episodes of its sub-environments end here (replacement number "
            f"{self.n_restarts} of this environment)",
            stacklevel=2,
        )

    def _share_arrays(self) -> dict[int, Loss]:
        """
        Move to other shared memory, with the workers: the file of the first is gone.

        :return: Workers that are gone; with any, the memory stays the one of before
        """
        arrays, before = self._make_arrays(), getattr(self, "_arrays", None)
        with _make_shared_file() as file:
            file.truncate(arrays.size)
            replies = self._converse("attach", dict.fromkeys(range(len(self.assignment)), (arrays, file.name)))
            if lost := self._lost(replies, also_failed=False):
                return lost
            self._check_replies(replies)
            arrays.attach(file.name)
        if before is not None:
            arrays.copy_from(before)
        arrays.is_busy[:] = False
        self._arrays = arrays
        return {}

    def _restore(self, worker: int) -> None:
        """Bring the sub-environments of a new worker to where a new episode begins."""
        for index in self.assignment[worker]:
            for (request, name), arguments in self._settings[index].items():
                self._check_replies(self._converse(request, {worker: ([index], name, *arguments)}))
            self._env_restarts[index] += 1
        seeds: dict[int, tuple[int | None, dict[str, Any]]] = {
            index: (self._restart_seed(index), {}) for index in self.assignment[worker]
        }
        (reset_infos,) = self._check_replies(self._converse("reset", {worker: (seeds,)})).values()
        for index, info in reset_infos.items():
            self.reset_infos[index] = info

    def _restart_seed(self, index: int) -> int | None:
        seed = self._last_seeds[index]
        if seed is None:
            return None
        sequence = np.random.SeedSequence((seed, index, self._env_restarts[index]))
        return int(sequence.generate_state(1)[0] >> 1)

    def _remember(self, request: str, name: str, arguments: tuple[Any, ...], indices: VecEnvIndices) -> None:
        for index in self._get_indices(indices):
            settings = self._settings[range(self.num_envs)[index]]
            settings.pop((request, name), None)  # in the order of the last calls
            settings[request, name] = arguments

    def _end_episode(self, index: int, info: dict[str, Any]) -> None:
        """What a step returns for a sub-environment whose worker was replaced."""
        assert self._last_obs is not None
        row = {key: array[index].copy() for key, array in self._last_obs.items()}
        info.update(terminal_observation=dict_to_obs(self.observation_space, row), worker_restarted=True)
        self._arrays.rewards[index], self._arrays.dones[index], self._arrays.truncations[index] = 0.0, True, True

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
        groups = [(worker, group) for worker, group in enumerate(self.assignment) if worker not in self._replaced]
        self._step_losses = self._send(
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
        self._n_steps += 1
        kept = {worker: reply for worker, reply in (replies or {}).items() if worker not in self._replaced}
        self.lost_steps[:] = False
        for worker in sorted(self._replaced):
            for index in self.assignment[worker]:
                self._end_episode(index, infos[index])
                self.lost_steps[index] = True
        self._replaced.clear()
        for worker_infos, worker_reset_infos in self._check_replies(kept).values():
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
        for index, seed in enumerate(self._seeds):
            self._last_seeds[index] = self._last_seeds[index] if seed is None else seed
        for worker_reset_infos in self._request("reset", arguments).values():
            for index, info in worker_reset_infos.items():
                self.reset_infos[index] = info
        self._replaced.clear()
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return self._copy_obs()

    def _copy_obs(self) -> VecEnvObs:
        if self.restart_workers:
            self._last_obs = {key: array.copy() for key, array in self._arrays.obs.items()}
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
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for process in self._processes:
            if process.is_alive():
                process.join(max(deadline - time.monotonic(), 0.0))
        _kill(self._processes)
        self._finalizer.cancel()

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
        self._remember("set_attr", attr_name, (value,), indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        results = self._request_envs("env_method", indices, method_name, method_args, method_kwargs)
        if method_name.startswith("set_"):
            self._remember("env_method", method_name, (method_args, method_kwargs), indices)
        return results

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._request_envs("is_wrapped", indices, wrapper_class)

    def get_env_states(self) -> list[bytes]:
        """
        :return: State of each sub-environment with its wrappers, for ``set_env_states``
        :raises StateNotAvailable: if one cannot be pickled
        """
        return self._request_envs("get_env_state", None)

    def set_env_states(self, states: Sequence[bytes]) -> None:
        """
        Let the sub-environments go on from where those of another ``SharedMemoryVecEnv`` were.

        :param states: State of each of them
        :raises ValueError: if they are wrapped otherwise
        """
        self._request_envs("set_env_state", None, dict(enumerate(states)))
