import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mtrl.common.row_storage import DeviceCopy, DeviceRows, HostRows, check_storage_device
from sb3_mtrl.common.type_aliases import MultiTaskReplayBufferSamples
from sb3_mtrl.common.utils import check_flag, check_integer, check_that, finite_task_ids
from sb3_mtrl.common.vec_env import VecTaskNormalize

try:
    # Only for the warning about memory, as in SB3
    import psutil
except ImportError:
    psutil = None

# Parts of a stored row
OWN_COLUMNS = ("obs", "next_obs", "action", "reward", "done")
# Rows that leave a device at a time
ROWS_PER_BLOCK = 65_536


class MultiTaskReplayBuffer(ReplayBuffer):
    """
    Replay buffer with one ring per task and task-balanced, task-major batches.

    A transition goes to the ring of the task that its observation announces (the one-hot tail), whatever sub-environment
    it came from; so any number of sub-environments works, and loading with another number does too. The one-hot itself is not
    stored. A transition is one float32 row, so that a batch is one gather.

    A transition that holds a NaN or an infinity is not stored but counted (``refused``, one count per task), nor is one that
    never happened (``info["worker_restarted"]``, see ``SharedMemoryVecEnv``).

    :param buffer_size: Max number of transitions over all tasks; each task gets ``buffer_size // num_tasks``
    :param observation_space: Box of shape ``(n + num_tasks,)``
    :param action_space: Box
    :param device: PyTorch device of the sampled tensors
    :param n_envs: Number of sub-environments that ``add`` receives at a time
    :param optimize_memory_usage: Not supported: successive rows of a ring need not be successive steps
    :param handle_timeout_termination: Store ``done=0`` where an episode was only cut by its time limit
        (``info["TimeLimit.truncated"]``), so that the target bootstraps there
    :param num_tasks: Number of tasks T
    :param task_in_observation: Whether observations end in the task's one-hot. With one task it may be False: then
        ``observation_space`` is any Box of shape ``(n,)``, kept whole.
    :param storage_device: Where the rows lie. None: in main memory, from where each batch is copied to ``device``. A PyTorch
        device: as a tensor there; uniform draws are then made there, too, with its generator instead of NumPy's. Pickles hold
        no device: what they are loaded to lies in main memory (see ``store_on``)
    :param extra_columns: Name and width of further values to keep with each transition, e.g. ``{"success": 1}``.
        ``add`` reads them from its ``extras`` argument or else from each info's entry of that name.
    :raises ValueError: for a bad argument
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        num_tasks: int = 1,
        extra_columns: Mapping[str, int] | None = None,
        task_in_observation: bool = True,
        storage_device: th.device | str | None = None,
    ):
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage must be False with MultiTaskReplayBuffer, got True")
        num_tasks = check_integer("num_tasks", num_tasks, 1)
        buffer_size = check_integer("buffer_size", buffer_size, 1)
        n_envs = check_integer("n_envs", n_envs, 1)
        check_flag("handle_timeout_termination", handle_timeout_termination)
        check_flag("task_in_observation", task_in_observation)
        storage_device = check_storage_device("storage_device", storage_device)
        is_mapping = extra_columns is None or isinstance(extra_columns, Mapping)
        check_that("extra_columns", extra_columns, is_mapping, "a mapping from names to widths or None")
        if num_tasks > 1 and not task_in_observation:
            raise ValueError(f"task_in_observation must be True with num_tasks={num_tasks}, got False")
        one_hot_dim = num_tasks if task_in_observation else 0
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1:
            expected = f"(n + {num_tasks},) with the task's one-hot at its end" if task_in_observation else "(n,)"
            raise ValueError(f"observation_space must be a Box of shape {expected}, got {observation_space}")
        if observation_space.shape[0] <= one_hot_dim:
            raise ValueError(
                f"observation_space must have more than num_tasks={num_tasks} entries, got shape {observation_space.shape}"
            )
        if buffer_size < num_tasks:
            raise ValueError(f"buffer_size must be at least num_tasks={num_tasks}, got {buffer_size}")
        # Not ReplayBuffer.__init__: it would allocate SB3's own arrays
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.num_tasks = num_tasks
        self.task_in_observation = task_in_observation
        self.base_dim = observation_space.shape[0] - one_hot_dim
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.extra_columns = dict(extra_columns or {})
        for name, width in self.extra_columns.items():
            if name in OWN_COLUMNS:
                raise ValueError(f"extra_columns must have other names than {', '.join(OWN_COLUMNS)}, got {name!r}")
            self.extra_columns[name] = check_integer(f"the width of {name!r} in extra_columns", width, 1)

        self.capacity_per_task = buffer_size // num_tasks
        self.buffer_size = self.capacity_per_task * num_tasks
        self._columns = self._layout()
        self._storage = self._make_storage(storage_device)
        # Per task: where the next row goes, and whether the ring has gone round (SB3's names, one entry per task)
        self.pos = np.zeros(num_tasks, dtype=np.int64)  # type: ignore[assignment]
        self.full = np.zeros(num_tasks, dtype=bool)  # type: ignore[assignment]
        #: Number of transitions of each task that were not stored as they were not finite, ``(T,)``
        self.refused = np.zeros(num_tasks, dtype=np.int64)
        #: Task of the last of them and the parts of it that were not finite
        self.last_refused: tuple[int, tuple[str, ...]] | None = None
        # How often each ring went round. With the place it numbers the rows of a task from the first one on.
        self._laps = np.zeros(num_tasks, dtype=np.int64)
        self._warn_if_too_large()

    def _layout(self) -> dict[str, slice]:
        own_widths = (self.base_dim, self.base_dim, self.action_dim, 1, 1)
        widths = {**dict(zip(OWN_COLUMNS, own_widths, strict=True)), **self.extra_columns}
        ends = np.cumsum(list(widths.values())).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}

    @property
    def row_width(self) -> int:
        """Number of float32 values of a row."""
        return next(reversed(self._columns.values())).stop

    def _make_storage(self, storage_device: th.device | None) -> HostRows | DeviceRows:
        if storage_device is None:
            return HostRows(self.buffer_size, self.row_width)
        self._warn_if_too_large_for(storage_device)
        # What draws are made by, as last copied there
        self._group_tasks_on_device = DeviceCopy(storage_device)
        self._sizes_on_device = DeviceCopy(storage_device)
        return DeviceRows(self.buffer_size, self.row_width, storage_device)

    @property
    def storage_device(self) -> th.device | None:
        """Where the rows lie; None: in main memory, as an array."""
        return self._storage.device if isinstance(self._storage, DeviceRows) else None

    def store_on(self, storage_device: th.device | str | None) -> None:
        """
        Move the rows.

        :param storage_device: See the argument of the constructor
        :raises ValueError: if rows cannot be kept there
        """
        storage_device = check_storage_device("storage_device", storage_device)
        if storage_device == self.storage_device:
            return
        former, self._storage = self._storage, self._make_storage(storage_device)
        for task, size in enumerate(self.sizes().tolist()):
            first = task * self.capacity_per_task
            for start in range(first, first + size, ROWS_PER_BLOCK):
                self._storage.put(start, former.read(start, min(start + ROWS_PER_BLOCK, first + size)))

    def take_device_of(self, other: "MultiTaskReplayBuffer") -> None:
        """
        Move the rows to where those of another buffer lie, which this one takes the place of: it is moved to main memory
        first, as a GPU may not have room for both. If that fails both are as they were.

        :param other: The other buffer
        """
        storage_device = other.storage_device
        if storage_device == self.storage_device:
            return
        other.store_on(None)
        try:
            self.store_on(storage_device)
        except Exception:
            other.store_on(storage_device)
            raise

    @property
    def _rows(self) -> Any:
        """All rows ``(buffer_size, row)``, an array or a tensor."""
        return self._storage.rows

    def _warn_if_too_large_for(self, storage_device: th.device) -> None:
        if storage_device.type != "cuda":
            return
        available, needed = th.cuda.mem_get_info(storage_device)[0], 4 * self.buffer_size * self.row_width
        if needed > available:
            warnings.warn(
                f"{storage_device} does not have apparently enough memory to store the complete "
                f"replay buffer {needed / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=4,
            )

    def _warn_if_too_large(self) -> None:
        if psutil is None:
            return
        available = psutil.virtual_memory().available
        if self._n_bytes() > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete "
                f"replay buffer {self._n_bytes() / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=3,
            )

    def _n_bytes(self) -> int:
        return self._storage.host_bytes

    def sizes(self) -> np.ndarray:
        """
        :return: Number of stored transitions of each task, shape ``(T,)``
        """
        return np.where(self.full, self.capacity_per_task, self.pos)

    def size(self) -> int:
        """
        :return: Number of stored transitions over all tasks
        """
        return int(self.sizes().sum())

    def reset(self) -> None:
        """
        Forget all transitions.
        """
        self.pos[:] = 0  # type: ignore[index]
        self.full[:] = False  # type: ignore[index]
        self._laps += 2  # no row of before has the number of one to come, and none that of a place not yet filled

    def add(  # type: ignore[override]
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
        extras: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """
        Store one transition per sub-environment, each in the ring of its task.

        :param obs: Observations, ``(n_envs, n + T)``
        :param next_obs: Observations after the step (of the ended episode where it ended), ``(n_envs, n + T)``
        :param action: Actions, ``(n_envs, n_actions)``
        :param reward: Rewards, ``(n_envs,)``
        :param done: Episode ends, ``(n_envs,)``
        :param infos: Infos, ``n_envs`` of them
        :param extras: Values of extra columns, name -> ``(n_envs, width)``; those missing here are read from the infos
        :raises ValueError: if an observation does not end in a one-hot, or an extra column has no value
        """
        task_ids = np.zeros(self.n_envs, dtype=np.int64)
        if self.task_in_observation:
            told_ids = np.array([info.get("task_id", 0) for info in infos])
            task_ids = finite_task_ids(obs, self.num_tasks, told_ids)
        rows, columns = np.empty((self.n_envs, self.row_width), dtype=np.float32), self._columns
        rows[:, columns["obs"]] = obs[:, : self.base_dim]
        rows[:, columns["next_obs"]] = next_obs[:, : self.base_dim]
        rows[:, columns["action"]] = action.reshape(self.n_envs, self.action_dim)
        rows[:, columns["reward"]] = np.reshape(reward, (-1, 1))
        terminations = np.array(done, dtype=np.float32)
        if self.handle_timeout_termination:
            terminations *= [not info.get("TimeLimit.truncated", False) for info in infos]
        rows[:, columns["done"]] = terminations[:, None]
        for name in self.extra_columns:
            rows[:, columns[name]] = self._extra_values(name, infos, extras)
        kept = np.asarray(np.isfinite(rows).all(axis=1))
        if not kept.all():
            self._refuse(rows[~kept], task_ids[~kept])
        kept = kept & np.array([not info.get("worker_restarted", False) for info in infos])
        self._storage.write(self._take_places(task_ids[kept]), rows[kept])

    def _refuse(self, rows: np.ndarray, task_ids: np.ndarray) -> None:
        self.refused += np.bincount(task_ids, minlength=self.num_tasks)
        parts = [name for name, columns in self._columns.items() if not np.isfinite(rows[-1, columns]).all()]
        self.last_refused = int(task_ids[-1]), tuple(parts)

    def _take_places(self, task_ids: np.ndarray) -> np.ndarray:
        """Next places in the rings of these tasks, ``(n,)``; several rows of one task take successive ones."""
        places = np.empty(len(task_ids), dtype=np.int64)
        for env_index, task_id in enumerate(task_ids.tolist()):
            places[env_index] = task_id * self.capacity_per_task + self.pos[task_id]  # type: ignore[index]
            self.pos[task_id] += 1  # type: ignore[index]
            if self.pos[task_id] == self.capacity_per_task:  # type: ignore[index]
                self.pos[task_id] = 0  # type: ignore[index]
                self.full[task_id] = True  # type: ignore[index]
                self._laps[task_id] += 1
        return places

    def _extra_values(self, name: str, infos: list[dict[str, Any]], extras: Mapping[str, np.ndarray] | None) -> np.ndarray:
        if extras is not None and name in extras:
            values = np.asarray(extras[name])
        elif all(name in info for info in infos):
            values = np.array([info[name] for info in infos])
        else:
            raise ValueError(f"no value for the extra column {name!r}: it is neither in extras nor in every info")
        return values.reshape(self.n_envs, self.extra_columns[name])

    def rows_per_task(self, batch_size: int) -> int:
        """
        :param batch_size: Rows of a batch
        :return: Rows of each task in it
        :raises ValueError: if the batch cannot be shared equally
        """
        if batch_size < 1 or batch_size % self.num_tasks != 0:
            below = batch_size // self.num_tasks * self.num_tasks
            nearest = [size for size in (below, below + self.num_tasks) if size > 0]
            raise ValueError(
                f"batch_size must be a positive multiple of num_tasks={self.num_tasks}, for equal shares, "
                f"got {batch_size} (nearest allowed: {' or '.join(map(str, nearest))})"
            )
        return batch_size // self.num_tasks

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> MultiTaskReplayBufferSamples:  # type: ignore[override]
        """
        Draw equal shares of all tasks, uniformly over each task's ring.

        :param batch_size: Number of transitions, a multiple of ``num_tasks``
        :param env: VecNormalize to normalise observations and rewards with
        :return: The batch, grouped by task
        :raises ValueError: if ``batch_size`` is no multiple of ``num_tasks``, or the buffer is empty
        """
        rows_per_task = self.rows_per_task(batch_size)
        return self.sample_groups(self._group_tasks(self.sizes()), rows_per_task, env)

    def sample_groups(
        self, group_tasks: np.ndarray, rows_per_group: int, env: VecNormalize | None = None
    ) -> MultiTaskReplayBufferSamples:
        """
        Draw groups of given tasks, uniformly over each task's ring.

        :param group_tasks: Task of each group ``(G,)``, none without transitions
        :param rows_per_group: Rows of each group
        :param env: VecNormalize to normalise observations and rewards with
        :return: The batch
        """
        sizes = self.sizes()[group_tasks][:, None]
        if isinstance(self._storage, DeviceRows):
            groups = self._group_tasks_on_device.of(group_tasks)
            # Of so many numbers no remainder is more likely than another by more than one in 10^12
            draws = th.randint(2**62, (len(group_tasks), rows_per_group), device=groups.device)
            rows_in_ring_ = draws.remainder_(self._sizes_on_device.of(sizes))
            return self._gather(rows_in_ring_ + groups.unsqueeze(1) * self.capacity_per_task, groups, env)
        rows_in_ring = np.random.randint(0, sizes, size=(len(group_tasks), rows_per_group))
        return self._get_samples(rows_in_ring + group_tasks[:, None] * self.capacity_per_task, env)

    @staticmethod
    def _group_tasks(sizes: np.ndarray) -> np.ndarray:
        """Task of each group: its own, or one of the others in turn while it has no transitions yet."""
        group_tasks = np.arange(len(sizes))
        empty = sizes == 0
        if empty.any():
            if empty.all():
                raise ValueError("cannot sample from an empty replay buffer")
            group_tasks[empty] = np.resize(np.flatnonzero(~empty), empty.sum())
        return group_tasks

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> MultiTaskReplayBufferSamples:  # type: ignore[override]
        """
        :param batch_inds: Places ``(G, g)``, those of a row in the ring of one task
        :param env: VecNormalize to normalise observations and rewards with
        :return: The batch of ``B = G g`` rows
        """
        group_tasks = batch_inds[:, 0] // self.capacity_per_task
        if isinstance(self._storage, DeviceRows):
            return self._gather(self._storage.upload(batch_inds), self._group_tasks_on_device.of(group_tasks), env)
        rows = self._storage.rows.take(batch_inds.reshape(-1), axis=0)  # (B, row)
        if env is not None:
            self._normalize_rows(rows, np.repeat(group_tasks, batch_inds.shape[1]), env)
        return self._to_samples(th.from_numpy(rows).to(self.device), th.from_numpy(group_tasks).to(self.device))

    def _gather(self, places: th.Tensor, groups: th.Tensor, env: VecNormalize | None) -> MultiTaskReplayBufferSamples:
        """``_get_samples`` for rows on a device: places ``(G, g)`` and the task of each group ``(G,)`` there."""
        assert isinstance(self._storage, DeviceRows)
        rows = self._storage.take(places.flatten())  # (B, row)
        if env is not None:
            self._normalize_on_device(rows, groups.repeat_interleave(places.shape[1], output_size=len(rows)), env)
        return self._to_samples(rows.to(self.device), groups.to(self.device))

    def _to_samples(self, batch: th.Tensor, groups: th.Tensor) -> MultiTaskReplayBufferSamples:
        """
        :param batch: Rows ``(B, row)``
        :param groups: Task of each group ``(G,)``
        :return: The batch
        """
        columns = self._columns
        observations, next_observations = batch[:, columns["obs"]], batch[:, columns["next_obs"]]
        if self.task_in_observation:
            one_hot = th.eye(self.num_tasks, device=self.device)[groups]
            one_hot = one_hot.unsqueeze(1).expand(-1, len(batch) // len(groups), -1).reshape(len(batch), -1)  # (B, T)
            observations = th.cat([observations, one_hot], dim=1)
            next_observations = th.cat([next_observations, one_hot], dim=1)
        return MultiTaskReplayBufferSamples(
            observations=observations,
            actions=batch[:, columns["action"]],
            next_observations=next_observations,
            dones=batch[:, columns["done"]],
            rewards=batch[:, columns["reward"]],
            discounts=None,
            group_tasks=groups,
            extras={name: batch[:, columns[name]] for name in self.extra_columns},
        )

    def _normalize_rows(self, rows: np.ndarray, task_ids: np.ndarray, env: VecNormalize) -> None:
        """Normalise observations and rewards in place; the one-hot is put on only because VecNormalize expects it."""
        columns = self._columns
        one_hot = np.eye(self.num_tasks, dtype=np.float32)[task_ids][:, : self.num_tasks * self.task_in_observation]
        for name in ("obs", "next_obs"):
            obs = np.concatenate([rows[:, columns[name]], one_hot], axis=1)
            rows[:, columns[name]] = np.asarray(self._normalize_obs(obs, env))[:, : self.base_dim]
        rewards = rows[:, columns["reward"]][:, 0]
        if isinstance(env, VecTaskNormalize):
            rewards = env.normalize_reward(rewards, task_ids)
        else:
            rewards = self._normalize_reward(rewards, env)
        rows[:, columns["reward"]] = rewards[:, None]

    def _normalize_on_device(self, rows: th.Tensor, tasks: th.Tensor, env: VecNormalize) -> None:
        """``_normalize_rows`` for rows on a device: the formulas of the environment, in its float64."""
        assert isinstance(self._storage, DeviceRows)
        if type(env) not in (VecNormalize, VecTaskNormalize):  # another one may do anything
            host_rows = rows.cpu().numpy()
            self._normalize_rows(host_rows, tasks.cpu().numpy(), env)
            rows.copy_(th.from_numpy(host_rows))
            return
        columns, keeps_nonfinite = self._columns, isinstance(env, VecTaskNormalize)

        def normalize(column: str, values: th.Tensor, bound: float) -> None:
            own = rows[:, columns[column]]
            clipped = values.clamp(-bound, bound)
            own.copy_(th.where(own.isfinite(), clipped, th.nan) if keeps_nonfinite else clipped)

        if env.norm_obs:
            assert isinstance(env.obs_rms, RunningMeanStd)
            scales = np.sqrt(env.obs_rms.var + env.epsilon)
            mean, scale = self._storage.upload(np.stack([env.obs_rms.mean, scales])[:, : self.base_dim])
            for column in ("obs", "next_obs"):
                normalize(column, (rows[:, columns[column]].double() - mean) / scale, env.clip_obs)
        if env.norm_reward:
            scale = self._storage.upload(np.sqrt(np.atleast_1d(env.ret_rms.var) + env.epsilon)).unsqueeze(1)  # (T or 1, 1)
            scale = scale[tasks] if len(scale) > 1 else scale
            normalize("reward", rows[:, columns["reward"]].double() / scale, env.clip_reward)

    def __getstate__(self) -> dict[str, Any]:
        # Keep only the rows in use: a file as large as the data, not as the capacity
        state = self.__dict__.copy()
        for name in ("_storage", "_group_tasks_on_device", "_sizes_on_device"):
            state.pop(name, None)
        starts = range(0, self.buffer_size, self.capacity_per_task)
        rings = [self._storage.read(start, start + size) for start, size in zip(starts, self.sizes().tolist(), strict=True)]
        state["_rows"] = np.concatenate(rings)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Files of older versions have no counts
        counts = {"refused": np.zeros(state["num_tasks"], dtype=np.int64), "last_refused": None}
        stored_rows = state.pop("_rows")
        self.__dict__.update({**counts, "_laps": state["full"].astype(np.int64), **state})
        self._storage = self._make_storage(None)
        ends = np.cumsum(self.sizes())
        for task, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            self._storage.put(task * self.capacity_per_task, stored_rows[start:end])

    # ------------------------------------------------------------- checkpoints

    def row_numbers(self) -> np.ndarray:
        """
        :return: First and past-the-last number of the rows that each ring holds ``(T, 2)``. The rows of a task are numbered
            in the order in which they came, from the first one on, those that were overwritten included
        """
        ends = self._laps * self.capacity_per_task + self.pos
        return np.stack([ends - self.sizes(), ends], axis=1)

    def row_blocks(self, task: int, start: int, end: int) -> Iterator[np.ndarray]:
        """
        :param task: Task id
        :param start: Number of the first row
        :param end: Past the number of the last row, at most a whole ring further
        :return: These rows in order, in blocks ``(n, row)`` that are not to be written to
        """
        for place, n_rows in self._runs(task, start, end):
            yield self._storage.read(place, place + n_rows)

    def set_rows(self, task: int, start: int, rows: np.ndarray) -> None:
        """
        :param task: Task id
        :param start: Number of the first row
        :param rows: Rows to put in their places ``(n, row)``, at most a whole ring
        """
        n_before = 0
        for place, n_rows in self._runs(task, start, start + len(rows)):
            self._storage.put(place, rows[n_before : n_before + n_rows])
            n_before += n_rows

    def _runs(self, task: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """First place and number of places, of rows that are numbered successively."""
        while start < end:
            slot = start % self.capacity_per_task
            n_rows = min(end - start, self.capacity_per_task - slot, ROWS_PER_BLOCK)
            yield task * self.capacity_per_task + slot, n_rows
            start += n_rows

    def get_checkpoint_state(self) -> dict[str, Any]:
        """
        :return: All that a checkpoint holds of this buffer beside its rows
        """
        arrays = {name: getattr(self, name).copy() for name in ("pos", "full", "_laps", "refused")}
        return {**arrays, "last_refused": self.last_refused}

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        """
        :param state: What ``get_checkpoint_state`` of a buffer of the same shape returned; the rows have to follow
        """
        for name in ("pos", "full", "_laps", "refused"):
            getattr(self, name)[:] = state[name]
        self.last_refused = state["last_refused"]
