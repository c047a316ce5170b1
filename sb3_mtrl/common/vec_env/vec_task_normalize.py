import pickle
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_mtrl.common.utils import check_flag, check_number, finite_task_ids, get_num_tasks


class TaskMeanStd(RunningMeanStd):
    """
    Running mean and variance of one number for each of several tasks: ``mean``, ``var`` and ``count`` have shape (num_tasks,).

    :param num_tasks: Number of tasks T
    :param epsilon: Weight of the initial mean 0 and variance 1, as in SB3
    """

    def __init__(self, num_tasks: int, epsilon: float = 1e-4):
        super().__init__(epsilon, shape=(num_tasks,))
        self.count: np.ndarray = np.full(num_tasks, epsilon)  # type: ignore[assignment]

    def copy(self) -> "TaskMeanStd":
        """
        :return: A copy that shares nothing with this object
        """
        new_object = TaskMeanStd(len(self.mean))
        new_object.mean, new_object.var, new_object.count = self.mean.copy(), self.var.copy(), self.count.copy()
        return new_object

    def update_tasks(self, values: np.ndarray, task_ids: np.ndarray) -> None:
        """
        Take in new values, each into the statistics of its task.

        :param values: Values, shape (B,)
        :param task_ids: Tasks of the values, shape (B,)
        """
        num_tasks = len(self.mean)
        counts = np.bincount(task_ids, minlength=num_tasks)  # (T,)
        seen = counts > 0
        safe_counts = np.maximum(counts, 1)
        batch_mean = np.bincount(task_ids, weights=values, minlength=num_tasks) / safe_counts
        batch_var = np.bincount(task_ids, weights=np.square(values - batch_mean[task_ids]), minlength=num_tasks) / safe_counts
        mean, var = self.mean, self.var
        self.update_from_moments(batch_mean, batch_var, counts)  # type: ignore[arg-type]
        # Rounding must not wear down the variance of the tasks that are not in this batch
        self.mean, self.var = np.where(seen, self.mean, mean), np.where(seen, self.var, var)


class FiniteMeanStd(RunningMeanStd):
    """Running mean and variance of vectors that leaves out those with a NaN or an infinity."""

    def update(self, arr: np.ndarray) -> None:
        """
        :param arr: Vectors, shape (B, ...)
        """
        finite = np.isfinite(arr)
        if not finite.all():
            arr = arr[finite.all(axis=tuple(range(1, arr.ndim)))]
        if len(arr) > 0:
            super().update(arr)


class OneHotTailMeanStd(FiniteMeanStd):
    """
    Running mean and variance of observations that keeps mean 0 and variance 1 for the one-hot at their end.

    :param shape: Shape of an observation, (n + num_tasks,)
    :param num_tasks: Length of the one-hot
    """

    def __init__(self, shape: tuple[int, ...], num_tasks: int):
        super().__init__(shape=shape)
        self.num_tasks = num_tasks

    def copy(self) -> "OneHotTailMeanStd":
        """
        :return: A copy that shares nothing with this object
        """
        new_object = OneHotTailMeanStd(self.mean.shape, self.num_tasks)
        new_object.mean, new_object.var, new_object.count = self.mean.copy(), self.var.copy(), float(self.count)
        return new_object

    def update_from_moments(self, batch_mean: np.ndarray, batch_var: np.ndarray, batch_count: float) -> None:
        super().update_from_moments(batch_mean, batch_var, batch_count)
        self.mean[-self.num_tasks :] = 0.0
        self.var[-self.num_tasks :] = 1.0


class VecTaskNormalize(VecNormalize):
    """
    SB3's ``VecNormalize`` for environments with several tasks. The observation is normalised by statistics that the tasks
    share, but its one-hot is left alone; rewards are scaled by the returns of their own task, so that a task with large
    rewards does not drown the others.

    The task is read from the observation. On environments that name no tasks this is ``VecNormalize``, number for number.

    A NaN or an infinity in the observation or the reward of one sub-environment reaches no statistics, and stays one (NaN)
    when it is normalised, instead of being clipped to a number that looks like the others. The steps that
    ``SharedMemoryVecEnv`` loses with a worker are left out of the returns.

    :param venv: The vector environment to wrap
    :param training: Whether to update the statistics
    :param norm_obs: Whether to normalise observations
    :param norm_reward: Whether to normalise rewards
    :param clip_obs: Largest absolute value of a normalised observation (not of its one-hot)
    :param clip_reward: Largest absolute value of a normalised reward
    :param gamma: Discount factor
    :param epsilon: Added to variances, to avoid division by zero
    :param norm_obs_keys: As in ``VecNormalize``, for dictionary observations; these need an environment without tasks
    :raises ValueError: for a bad argument, or if the environment has tasks and its observation is no vector that ends with
        their one-hot
    """

    ret_rms: RunningMeanStd

    def __init__(
        self,
        venv: VecEnv,
        training: bool = True,
        norm_obs: bool = True,
        norm_reward: bool = True,
        clip_obs: float = 10.0,
        clip_reward: float = 10.0,
        gamma: float = 0.99,
        epsilon: float = 1e-8,
        norm_obs_keys: list[str] | None = None,
    ):
        for name, flag in (("training", training), ("norm_obs", norm_obs), ("norm_reward", norm_reward)):
            check_flag(name, flag)
        clip_obs = check_number("clip_obs", clip_obs, above=0, finite=False)
        clip_reward = check_number("clip_reward", clip_reward, above=0, finite=False)
        gamma = check_number("gamma", gamma, 0, at_most=1)
        epsilon = check_number("epsilon", epsilon, above=0)
        # 0 stands for an environment that names no tasks, and hence has no one-hot
        self.one_hot_dim = get_num_tasks(venv) if venv.has_attr("num_tasks") else 0
        self._check_one_hot(venv.observation_space)
        super().__init__(venv, training, norm_obs, norm_reward, clip_obs, clip_reward, gamma, epsilon, norm_obs_keys)
        self._task_ids: np.ndarray | None = None  # (n_envs,), None before the first reset
        if self.one_hot_dim > 0:
            self.ret_rms = TaskMeanStd(self.one_hot_dim)
        if self.norm_obs and isinstance(self.obs_rms, RunningMeanStd):
            self.obs_rms = FiniteMeanStd(shape=self.observation_space.shape)  # type: ignore[assignment, arg-type]
            if self.one_hot_dim > 0:
                self.obs_rms = OneHotTailMeanStd(self.observation_space.shape, self.one_hot_dim)  # type: ignore[assignment, arg-type]

    def _check_one_hot(self, observation_space: spaces.Space) -> None:
        if self.one_hot_dim == 0:
            return
        shape = observation_space.shape if isinstance(observation_space, spaces.Box) else None
        if shape is None or len(shape) != 1 or shape[0] < self.one_hot_dim:
            raise ValueError(
                f"VecTaskNormalize needs a vector observation that ends with the one-hot of the {self.one_hot_dim} tasks, "
                f"got the observation space {observation_space}"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Like the returns, the current tasks belong to the environment that is left behind
        state["_task_ids"] = None
        return state

    def set_venv(self, venv: VecEnv) -> None:
        """
        Wrap another vector environment, after loading.

        :param venv: The vector environment
        :raises ValueError: if it has another number of tasks than the statistics
        """
        one_hot_dim = get_num_tasks(venv) if venv.has_attr("num_tasks") else 0
        if one_hot_dim != self.one_hot_dim:
            raise ValueError(
                f"these normalisation statistics are for {self.one_hot_dim} tasks, the environment has {one_hot_dim} "
                "(0: it names none)"
            )
        super().set_venv(venv)

    def reset(self) -> np.ndarray | dict[str, np.ndarray]:
        """
        Reset all environments.

        :return: First observations, normalised
        """
        obs = super().reset()
        self._read_task_ids()
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        # SB3's step still needs the tasks of the step that ends here: those of finished episodes change with it
        step_return = super().step_wait()
        self._read_task_ids()
        return step_return

    def _read_task_ids(self) -> None:
        if self.one_hot_dim > 0:
            assert isinstance(self.old_obs, np.ndarray)
            before = np.zeros(self.num_envs, dtype=np.int64) if self._task_ids is None else self._task_ids
            self._task_ids = finite_task_ids(self.old_obs, self.one_hot_dim, before)

    def _update_reward(self, reward: np.ndarray) -> None:
        finite = np.isfinite(reward)
        self.returns = self.returns * self.gamma + np.where(finite, reward, 0.0)
        kept = finite & ~getattr(self.unwrapped, "lost_steps", np.zeros_like(finite))
        if isinstance(self.ret_rms, TaskMeanStd):
            self.ret_rms.update_tasks(self.returns[kept], self._current_tasks()[kept])
        elif kept.any():
            self.ret_rms.update(self.returns[kept])

    def _normalize_obs(self, obs: np.ndarray, obs_rms: RunningMeanStd) -> np.ndarray:
        normalized = super()._normalize_obs(obs, obs_rms)
        self._copy_one_hot(obs, normalized)
        return _keep_nonfinite(obs, normalized)

    def _unnormalize_obs(self, obs: np.ndarray, obs_rms: RunningMeanStd) -> np.ndarray:
        unnormalized = super()._unnormalize_obs(obs, obs_rms)
        self._copy_one_hot(obs, unnormalized)
        return unnormalized

    def _copy_one_hot(self, source: np.ndarray, target: np.ndarray) -> None:
        """Epsilon and ``clip_obs`` would otherwise still touch it."""
        if self.one_hot_dim > 0:
            target[..., -self.one_hot_dim :] = source[..., -self.one_hot_dim :]

    def normalize_reward(self, reward: np.ndarray, task_ids: np.ndarray | None = None) -> np.ndarray:
        """
        Normalise rewards by the returns of their tasks. Calling this method does not update statistics.

        :param reward: Rewards, shape (B,), or (B, 1) as in a replay buffer
        :param task_ids: Tasks of the rewards, shape (B,). None: the tasks that the sub-environments are on now
            (B is then the number of sub-environments)
        :return: Normalised rewards, float32, in the shape of ``reward``
        :raises ValueError: if ``task_ids`` is needed and missing, of another length, or out of range
        """
        if self.norm_reward:
            scale = np.sqrt(self._return_variance(reward, task_ids) + self.epsilon)
            reward = _keep_nonfinite(reward, np.clip(reward / scale, -self.clip_reward, self.clip_reward))
        return reward.astype(np.float32)

    def unnormalize_reward(self, reward: np.ndarray, task_ids: np.ndarray | None = None) -> np.ndarray:
        """
        Undo :meth:`normalize_reward`, up to its clipping.

        :param reward: Normalised rewards, shape (B,) or (B, 1)
        :param task_ids: Tasks of the rewards, shape (B,); None: the tasks that the sub-environments are on now
        :return: Rewards
        :raises ValueError: as :meth:`normalize_reward`
        """
        if self.norm_reward:
            return reward * np.sqrt(self._return_variance(reward, task_ids) + self.epsilon)
        return reward

    def _return_variance(self, reward: np.ndarray, task_ids: np.ndarray | None) -> np.ndarray:
        """Variance of the returns of each reward's task, in a shape that broadcasts to ``reward``."""
        if self.one_hot_dim <= 1:
            return self.ret_rms.var
        if task_ids is None:
            task_ids = self._current_tasks()
            if reward.shape != task_ids.shape:
                raise ValueError(
                    f"rewards of shape {reward.shape} are not one per sub-environment ({self.num_envs}): pass task_ids, "
                    "as MultiTaskReplayBuffer does, or use norm_reward=False"
                )
        task_ids = np.asarray(task_ids)
        if task_ids.ndim != 1 or reward.shape[:1] != task_ids.shape:
            raise ValueError(f"task_ids must have shape {reward.shape[:1]}, one per reward, got {task_ids.shape}")
        if task_ids.size > 0 and not (0 <= task_ids.min() and task_ids.max() < self.one_hot_dim):
            raise ValueError(f"task_ids must be from 0 to {self.one_hot_dim - 1}, got {np.unique(task_ids).tolist()}")
        return self.ret_rms.var[task_ids].reshape(task_ids.shape + (1,) * (reward.ndim - 1))

    def _current_tasks(self) -> np.ndarray:
        if self._task_ids is None:
            raise ValueError("the tasks of the sub-environments are known after reset(); call it first, or pass task_ids")
        return self._task_ids

    @staticmethod
    def load(load_path: str, venv: VecEnv) -> "VecTaskNormalize":
        """
        Load a saved object.

        :param load_path: Where it was saved
        :param venv: The vector environment to wrap
        :return: The wrapper, with the statistics of the file
        :raises ValueError: if the file holds something else, or statistics of another number of tasks
        """
        with open(load_path, "rb") as file_handler:
            vec_normalize = pickle.load(file_handler)
        if not isinstance(vec_normalize, VecTaskNormalize):
            raise ValueError(f"{load_path} must hold a VecTaskNormalize, got {type(vec_normalize).__name__}")
        vec_normalize.set_venv(venv)
        return vec_normalize


def _keep_nonfinite(values: np.ndarray, normalized: np.ndarray) -> np.ndarray:
    """The normalised values, NaN where the values were not finite: clipping would hide an infinity."""
    finite = np.isfinite(values)
    return normalized if finite.all() else np.where(finite, normalized, np.nan)
