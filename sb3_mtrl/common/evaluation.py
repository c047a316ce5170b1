import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from statistics import NormalDist
from textwrap import fill
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.utils import is_vectorized_observation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, is_vecenv_wrapped

from sb3_mtrl.common.utils import check_integer, get_num_tasks, get_task_names, task_ids_from_observation

# A sub-environment that chooses its tasks at random misses one of T tasks in 20 * T episodes with probability exp(-20)
MAX_UNCOUNTED_EPISODES_PER_TASK = 20


@dataclass(frozen=True, eq=False)
class MultiTaskEvaluation:
    """
    Result of an evaluation: the episodes, and what they say per task and over all tasks.

    Episodes are in task-major order. ``T`` is the number of tasks, ``E`` the number of episodes.

    :param task_names: Names of all tasks, in the order of the one-hot
    :param task_ids: Task of each episode, shape ``(E,)``
    :param rewards: Undiscounted return of each episode, shape ``(E,)``
    :param lengths: Number of steps of each episode, shape ``(E,)``
    :param successes: ``info["is_success"]`` at the last step of each episode (0 or 1), shape ``(E,)``; NaN where the
        environment does not tell
    :raises ValueError: if there are no tasks, the shapes differ, or a task id is not in ``[0, T)``
    """

    task_names: tuple[str, ...]
    task_ids: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray

    def __post_init__(self) -> None:
        if len(self.task_names) == 0:
            raise ValueError("task_names must hold at least one name, got none")
        shapes = [np.shape(array) for array in (self.task_ids, self.rewards, self.lengths, self.successes)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1:
            raise ValueError(f"task_ids, rewards, lengths and successes must be vectors of one length, got shapes {shapes}")
        ids = np.asarray(self.task_ids)
        if np.any((ids < 0) | (ids >= len(self.task_names))):
            raise ValueError(f"task_ids must be in [0, {len(self.task_names)}), got {sorted(set(ids.tolist()))}")

    @property
    def num_tasks(self) -> int:
        return len(self.task_names)

    @property
    def episode_counts(self) -> np.ndarray:
        """Number of episodes of each task, shape ``(T,)``."""
        return np.bincount(self.task_ids, minlength=self.num_tasks)

    @property
    def has_success(self) -> bool:
        """Whether the environment told of every episode if it was a success."""
        return len(self.successes) > 0 and not bool(np.isnan(self.successes).any())

    @property
    def success_rates(self) -> np.ndarray:
        """Share of successful episodes of each task, shape ``(T,)``; NaN where unknown."""
        return self._per_task(self.successes, np.mean)

    @property
    def mean_rewards(self) -> np.ndarray:
        """Mean return of each task, shape ``(T,)``; NaN for a task without episodes."""
        return self._per_task(self.rewards, np.mean)

    @property
    def std_rewards(self) -> np.ndarray:
        """Standard deviation (population) of the return within each task, shape ``(T,)``."""
        return self._per_task(self.rewards, np.std)

    @property
    def mean_success(self) -> float:
        """Success rate over all episodes; NaN where unknown. Every task weighs the same when the evaluation was even."""
        # Over episodes and not over tasks: a sum of zeros and ones is exact, so that equal results compare as equal
        return _mean(self.successes)

    @property
    def success_std(self) -> float:
        """Standard deviation (population) of the success rate over the tasks; NaN where unknown."""
        return float(np.std(self.success_rates))

    @property
    def worst_task(self) -> str | None:
        """The task with the lowest success rate, ties broken by the lower mean return; None where success is unknown."""
        worst = self._worst_task_id()
        return None if worst is None else self.task_names[worst]

    @property
    def worst_success(self) -> float:
        """Success rate of the worst task; NaN where unknown."""
        worst = self._worst_task_id()
        return float("nan") if worst is None else float(self.success_rates[worst])

    @property
    def mean_reward(self) -> float:
        """Mean return over all episodes."""
        return _mean(self.rewards)

    @property
    def std_reward(self) -> float:
        """Standard deviation (population) of the return over all episodes."""
        return float(np.std(self.rewards)) if len(self.rewards) else float("nan")

    @property
    def mean_ep_length(self) -> float:
        """Mean number of steps over all episodes."""
        return _mean(self.lengths)

    def success_intervals(self, confidence: float = 0.95) -> np.ndarray:
        """
        Wilson score interval of the success rate of each task.

        :param confidence: Confidence level, in (0, 1)
        :return: Lower and upper ends, shape ``(T, 2)``; NaN where unknown
        """
        counts = self.episode_counts
        return np.array(
            [
                wilson_interval(rate * count, int(count), confidence) if np.isfinite(rate) else (np.nan, np.nan)
                for rate, count in zip(self.success_rates, counts, strict=True)
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """
        :return: The summary in plain Python types that JSON can hold: None stands for an unknown number
        """
        intervals = self.success_intervals()
        columns = (self.episode_counts, self.success_rates, intervals, self.mean_rewards, self.std_rewards)
        tasks = {
            name: {
                "episodes": int(count),
                "success_rate": _json_number(rate),
                "success_interval_95": None if np.isnan(interval).any() else [float(end) for end in interval],
                "mean_reward": _json_number(mean_reward),
                "std_reward": _json_number(std_reward),
            }
            for name, count, rate, interval, mean_reward, std_reward in zip(self.task_names, *columns, strict=True)
        }
        return {
            "episodes": len(self.task_ids),
            "success_rate": _json_number(self.mean_success),
            "success_rate_task_std": _json_number(self.success_std),
            "worst_task": self.worst_task,
            "mean_reward": _json_number(self.mean_reward),
            "std_reward": _json_number(self.std_reward),
            "mean_ep_length": _json_number(self.mean_ep_length),
            "tasks": tasks,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """
        :param indent: Indentation of the text; None puts it on one line
        :return: ``to_dict()`` as JSON
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _per_task(self, values: np.ndarray, reduce: Any) -> np.ndarray:
        groups = [np.asarray(values, dtype=np.float64)[self.task_ids == task_id] for task_id in range(self.num_tasks)]
        return np.array([reduce(group) if len(group) else np.nan for group in groups])

    def _worst_task_id(self) -> int | None:
        rates = self.success_rates
        if np.isnan(rates).any():
            return None
        return int(np.lexsort((self.mean_rewards, rates))[0])


def wilson_interval(n_successes: float, n_episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a success rate; unlike the normal approximation it holds for few episodes and for rates of 0 or 1.

    :param n_successes: Number of successes, in ``[0, n_episodes]``
    :param n_episodes: Number of episodes, at least 1
    :param confidence: Confidence level, in (0, 1)
    :return: Lower and upper end, in [0, 1]
    :raises ValueError: if an argument is out of its range
    """
    n_episodes = check_integer("n_episodes", n_episodes, 1)
    if not 0 <= n_successes <= n_episodes:
        raise ValueError(f"n_successes must be in [0, n_episodes={n_episodes}], got {n_successes}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = n_successes / n_episodes
    shrink = 1.0 + z**2 / n_episodes
    centre = (rate + z**2 / (2 * n_episodes)) / shrink
    half_width = z / shrink * np.sqrt(rate * (1.0 - rate) / n_episodes + z**2 / (4 * n_episodes**2))
    # The ends are exact at rates of 0 and 1; rounding must not push them outside
    return max(0.0, float(centre - half_width)), min(1.0, float(centre + half_width))


class RandomPolicy:
    """
    A policy that samples the action space uniformly: the baseline of a table. It has a generator of its own.

    :param observation_space: Observation space of one environment
    :param action_space: Action space of one environment
    :param seed: Seed of the generator
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, seed: int | None = 0):
        self.observation_space = observation_space
        self.action_space = deepcopy(action_space)
        self.action_space.seed(seed)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Sample actions; the arguments are those of every SB3 policy.

        :param observation: One observation or a batch of them; only the batch size matters
        :param state: Returned as it is
        :param episode_start: Not used
        :param deterministic: Not used
        :return: One action or a batch of them, and the state
        """
        if not is_vectorized_observation(observation, self.observation_space):  # type: ignore[arg-type]
            return np.asarray(self.action_space.sample()), state
        batch_size = len(next(iter(observation.values())) if isinstance(observation, dict) else observation)
        return np.stack([self.action_space.sample() for _ in range(batch_size)]), state


@dataclass(frozen=True)
class _Episode:
    """A finished episode that counts; the fields up to ``index`` are its place in the result."""

    task_id: int
    env_id: int
    index: int
    reward: float
    length: int
    success: float


class _Quotas:
    """
    Which episodes of which sub-environment count.

    Where the sub-environments tell their ``assigned_tasks``, each of them owes a fixed number of episodes of each of its
    tasks, so what is counted depends neither on the policy nor on the lengths of episodes. Otherwise the first
    episodes of a task to *start* anywhere count: whether an episode counts is known before its length is.

    :param env: The vector environment
    :param num_tasks: Number of tasks T
    :param n_episodes_per_task: Episodes of each task
    :param task_names: For messages
    """

    def __init__(self, env: VecEnv, num_tasks: int, n_episodes_per_task: int, task_names: tuple[str, ...]):
        self.task_names = task_names
        assigned_tasks = _assigned_tasks(env, num_tasks)
        if assigned_tasks is None:
            self.rows = np.zeros(env.num_envs, dtype=np.int64)  # one common row
            self.remaining = np.full((1, num_tasks), n_episodes_per_task)
        else:
            self.rows = np.arange(env.num_envs)
            self.remaining = self._split(assigned_tasks, num_tasks, n_episodes_per_task)
        self.uncounted = np.zeros(len(self.remaining), dtype=np.int64)
        self.max_uncounted = MAX_UNCOUNTED_EPISODES_PER_TASK * num_tasks * (env.num_envs // len(self.remaining))

    def _split(self, assigned_tasks: list[tuple[int, ...]], num_tasks: int, n_episodes_per_task: int) -> np.ndarray:
        quotas = np.zeros((len(assigned_tasks), num_tasks), dtype=np.int64)
        missing = []
        for task_id in range(num_tasks):
            owners = [env_id for env_id, tasks in enumerate(assigned_tasks) if task_id in tasks]
            if not owners:
                missing.append(self.task_names[task_id])
            for rank, env_id in enumerate(owners):
                # SB3's division of n episodes over sub-environments; the task's id decides who takes the remainder
                quotas[env_id, task_id] = (n_episodes_per_task + (rank + task_id) % len(owners)) // len(owners)
        if missing:
            raise ValueError(
                "every task must be assigned to a sub-environment of the evaluation environment, "
                f"got none for {', '.join(missing)} (assigned tasks: {assigned_tasks})"
            )
        return quotas

    def take(self, env_id: int, task_id: int) -> bool:
        """Whether the episode that has just started counts; if so it is taken off the quota."""
        row = self.rows[env_id]
        if self.remaining[row, task_id] > 0:
            self.remaining[row, task_id] -= 1
            self.uncounted[row] = 0
            return True
        self.uncounted[row] += 1
        if self.remaining[row].any() and self.uncounted[row] > self.max_uncounted:
            names = ", ".join(self.task_names[task] for task in np.flatnonzero(self.remaining[row]))
            raise RuntimeError(
                f"the evaluation environment does not reach the tasks {names}: none of its last "
                f"{self.max_uncounted} episodes was one of them"
            )
        return False

    def give_back(self, env_id: int, task_id: int) -> None:
        """An episode that counted did not come to its end."""
        self.remaining[self.rows[env_id], task_id] += 1

    @property
    def exhausted(self) -> bool:
        return not self.remaining.any()


def evaluate_multi_task_policy(
    model: PolicyPredictor,
    env: gym.Env | VecEnv,
    n_eval_episodes_per_task: int = 10,
    deterministic: bool = True,
    seed: int | None = None,
    render: bool = False,
    warn: bool = True,
) -> MultiTaskEvaluation:
    """
    Evaluate a policy on every task evenly: exactly ``n_eval_episodes_per_task`` episodes of each task, whatever
    the number of sub-environments and whatever the lengths of the episodes.

    Which episodes count is settled before they are played. Each sub-environment owes a fixed number of
    episodes of each of its ``assigned_tasks`` (for one task this is SB3's own division, see
    ``stable_baselines3.common.evaluation.evaluate_policy``), so short episodes are not preferred and, with a seed, the same
    start states are used for every policy. Sub-environments that do not tell their ``assigned_tasks``
    share one quota per task, which the first episodes to start fill up.

    An episode's task is ``info["task_id"]``, or else the one-hot tail of the observation. Its success is
    ``info["is_success"]`` at its last step. Returns and lengths are those of the ``Monitor`` wrapper where there is one.

    :param model: Anything with SB3's ``predict``: an algorithm, a policy or ``RandomPolicy``. Recurrent state and episode
        starts are passed to it.
    :param env: Environment or vector environment; one without ``num_tasks`` has a single task
    :param n_eval_episodes_per_task: Episodes of each task, at least 1
    :param deterministic: Whether to use deterministic actions
    :param seed: Seed of the environments and of the actions' sampling; the global random state of torch is put back
        afterwards. None draws fresh numbers.
    :param render: Whether to render the environment after each step
    :param warn: Whether to warn if there is no ``Monitor`` wrapper
    :return: The evaluation
    :raises ValueError: if ``n_eval_episodes_per_task`` is below 1, a task is assigned to no sub-environment, or the task
        of an episode cannot be told
    :raises RuntimeError: if a task never comes
    """
    if n_eval_episodes_per_task < 1:
        raise ValueError(f"n_eval_episodes_per_task must be at least 1, got {n_eval_episodes_per_task}")
    if not isinstance(env, VecEnv):
        gym_env = env
        env = DummyVecEnv([lambda: gym_env])
    is_monitored = _is_monitored(env)
    if warn and not is_monitored:
        warnings.warn(
            "The evaluation environment has no Monitor wrapper: wrappers that change rewards or the lengths of episodes "
            "will show in the results",
            UserWarning,
            stacklevel=2,
        )
    num_tasks, task_names = get_num_tasks(env), get_task_names(env)
    quotas = _Quotas(env, num_tasks, n_eval_episodes_per_task, task_names)
    if seed is not None:
        env.seed(seed)
    with _torch_seed(seed):
        episodes = _play(model, env, num_tasks, quotas, deterministic, render, is_monitored)
    episodes.sort(key=lambda episode: (episode.task_id, episode.env_id, episode.index))
    return MultiTaskEvaluation(
        task_names=task_names,
        task_ids=np.array([episode.task_id for episode in episodes], dtype=np.int64),
        rewards=np.array([episode.reward for episode in episodes], dtype=np.float64),
        lengths=np.array([episode.length for episode in episodes], dtype=np.int64),
        successes=np.array([episode.success for episode in episodes], dtype=np.float64),
    )


def _play(
    model: PolicyPredictor,
    env: VecEnv,
    num_tasks: int,
    quotas: _Quotas,
    deterministic: bool,
    render: bool,
    is_monitored: bool,
) -> list[_Episode]:
    n_envs = env.num_envs
    episodes: list[_Episode] = []
    task_ids = np.zeros(n_envs, dtype=np.int64)
    counted = np.zeros(n_envs, dtype=bool)
    starting = np.ones(n_envs, dtype=bool)  # differs from episode_starts where a "done" does not end the episode
    returns, lengths, indices = np.zeros(n_envs), np.zeros(n_envs, dtype=np.int64), np.zeros(n_envs, dtype=np.int64)

    observations = env.reset()
    states = None
    episode_starts = np.ones(n_envs, dtype=bool)
    while counted.any() or not quotas.exhausted:
        actions, states = model.predict(
            observations,  # type: ignore[arg-type]
            state=states,
            episode_start=episode_starts,
            deterministic=deterministic,
        )
        new_observations, rewards, dones, infos = env.step(actions)
        returns += rewards
        lengths += 1
        for i, (done, info) in enumerate(zip(dones, infos, strict=True)):
            if starting[i]:
                task_ids[i] = task_id_of_step(info, _row(observations, i), num_tasks)
                counted[i] = quotas.take(i, int(task_ids[i]))
            is_lost = info.get("worker_restarted", False)  # with its worker, see SharedMemoryVecEnv: another one is played
            if is_lost and counted[i]:
                quotas.give_back(i, int(task_ids[i]))
                counted[i] = False
            # A wrapper may send "done" before the true end (a life lost in Atari); Monitor knows the true end
            starting[i] = ("episode" in info or is_lost) if (done and is_monitored) else done
            if not starting[i]:
                continue
            if counted[i]:
                episode_return = info["episode"]["r"] if is_monitored else returns[i]
                episode_length = info["episode"]["l"] if is_monitored else lengths[i]
                success = info.get("is_success")
                episodes.append(
                    _Episode(
                        task_id=int(task_ids[i]),
                        env_id=i,
                        index=int(indices[i]),
                        reward=float(episode_return),
                        length=int(episode_length),
                        success=float("nan") if success is None else float(success),
                    )
                )
            counted[i] = False
            returns[i], lengths[i] = 0.0, 0
            indices[i] += 1
        observations = new_observations
        episode_starts = dones
        if render:
            env.render()
    return episodes


def task_id_of_step(info: Mapping[str, Any], observation: Any, num_tasks: int) -> int:
    """
    The task that a step belongs to.

    :param info: Info of the step; its ``task_id`` is taken where it has one
    :param observation: An observation of the same episode, the one-hot at its end; only read if the info has no ``task_id``
    :param num_tasks: Number of tasks T
    :return: The task id, in ``[0, num_tasks)``
    :raises ValueError: if neither tells the task
    """
    if num_tasks == 1:
        return 0
    if "task_id" in info:
        task_id = int(info["task_id"])
        if not 0 <= task_id < num_tasks:
            raise ValueError(f"info['task_id'] must be in [0, {num_tasks}), got {task_id}")
        return task_id
    if not isinstance(observation, np.ndarray) or observation.ndim != 1 or len(observation) <= num_tasks:
        raise ValueError(
            "the task of a step is neither in info['task_id'] nor in a one-hot at the end of the observation, "
            f"got an info with the keys {sorted(info)}"
        )
    return int(task_ids_from_observation(observation, num_tasks))


def format_task_table(
    evaluations: MultiTaskEvaluation | Mapping[str, MultiTaskEvaluation],
    confidence: float | None = None,
    show_reward: bool = True,
) -> str:
    """
    A plain-text table with a row per task; several evaluations of the same tasks stand side by side.

    :param evaluations: One evaluation, or evaluations by column title, e.g. ``{"trained": ..., "random policy": ...}``
    :param confidence: Confidence level of the Wilson intervals to show beside the success rates, e.g. 0.95; None for none
    :param show_reward: Whether to show the mean return and its standard deviation
    :return: The table, without a line break at its end
    :raises ValueError: if there is no evaluation, or they are of different tasks
    """
    by_title = {"": evaluations} if isinstance(evaluations, MultiTaskEvaluation) else dict(evaluations)
    if not by_title:
        raise ValueError("evaluations must hold at least one evaluation, got none")
    task_names = next(iter(by_title.values())).task_names
    for title, evaluation in by_title.items():
        if evaluation.task_names != task_names:
            raise ValueError(f"evaluations must be of the same tasks {task_names}, got {evaluation.task_names} for {title!r}")

    columns = [_align(["", "task", *task_names, "mean of tasks"], left=True)]
    for title, evaluation in by_title.items():
        columns.append(_task_columns(title, evaluation, confidence, show_reward))
    lines = [" | ".join(row).rstrip() for row in zip(*columns, strict=True)]
    if not any(by_title):
        lines = lines[1:]  # no titles
    rule = "-" * max(len(line) for line in lines)
    lines = [*lines[: -len(task_names) - 1], rule, *lines[-len(task_names) - 1 : -1], rule, lines[-1]]
    lines += [_footer(title, evaluation) for title, evaluation in by_title.items()]
    return "\n".join(lines)


def format_success_rates(evaluation: MultiTaskEvaluation, width: int = 100) -> str:
    """
    The success rates of all tasks in as few lines as possible; mean returns where success is unknown.

    :param evaluation: The evaluation
    :param width: Length of a line
    :return: The text, without a line break at its end
    """
    values = [_percent(rate) for rate in evaluation.success_rates]
    if not evaluation.has_success:
        values = [_number(reward) for reward in evaluation.mean_rewards]
    # No-break spaces keep a name and its value on one line
    entries = [f"{name}\u00a0{value}" for name, value in zip(evaluation.task_names, values, strict=True)]
    text = fill(", ".join(entries), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return text.replace("\u00a0", " ")


def _task_columns(title: str, evaluation: MultiTaskEvaluation, confidence: float | None, show_reward: bool) -> list[str]:
    """The lines of one evaluation: title, heading, a line per task, means; all of one width."""
    success = [_percent(rate) for rate in (*evaluation.success_rates, evaluation.mean_success)]
    columns = [_align(["success", *success])]
    if confidence is not None:
        intervals = [_interval(interval) for interval in evaluation.success_intervals(confidence)]
        # No interval for the mean: the tasks' rates differ, so its episodes are not draws of one rate
        columns.append(_align([f"{100 * confidence:g}% interval", *intervals, ""]))
    if show_reward:
        rewards = [_number(reward) for reward in (*evaluation.mean_rewards, evaluation.mean_reward)]
        columns.append(_align(["reward", *rewards]))
        columns.append(_align(["std", *(_number(std) for std in evaluation.std_rewards), ""]))
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    return _align([title, *lines], left=True)


def _footer(title: str, evaluation: MultiTaskEvaluation) -> str:
    low, high = evaluation.episode_counts.min(), evaluation.episode_counts.max()
    text = f"episodes per task: {low}" if low == high else f"episodes per task: {low} to {high}"
    if evaluation.num_tasks > 1 and evaluation.has_success:
        text += f", worst task: {evaluation.worst_task} ({_percent(evaluation.worst_success)})"
    return f"{title}: {text}" if title else text


def _align(cells: Sequence[str], left: bool = False) -> list[str]:
    width = max(len(cell) for cell in cells)
    return [cell.ljust(width) if left else cell.rjust(width) for cell in cells]


def _percent(rate: float) -> str:
    return "-" if np.isnan(rate) else f"{100 * rate:.0f}%"


def _interval(interval: np.ndarray) -> str:
    return "-" if np.isnan(interval).any() else f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1f}"


def _json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _row(observations: Any, index: int) -> Any:
    return observations[index] if isinstance(observations, np.ndarray) else None


def _is_monitored(env: VecEnv) -> bool:
    return is_vecenv_wrapped(env, VecMonitor) or all(env.env_is_wrapped(Monitor))


def _assigned_tasks(env: VecEnv, num_tasks: int) -> list[tuple[int, ...]] | None:
    """The tasks of each sub-environment; None where they do not tell."""
    if num_tasks == 1:
        return [(0,)] * env.num_envs
    if not env.has_attr("assigned_tasks"):
        return None
    return [tuple(int(task_id) for task_id in tasks) for tasks in env.get_attr("assigned_tasks")]


@contextmanager
def _torch_seed(seed: int | None) -> Iterator[None]:
    """Seed torch for the sampling of actions, and put its random state back: training must not notice an evaluation."""
    if seed is None:
        yield
        return
    devices = range(th.cuda.device_count()) if th.cuda.is_available() and th.cuda.is_initialized() else ()
    with th.random.fork_rng(devices=devices):
        th.manual_seed(seed)
        yield
