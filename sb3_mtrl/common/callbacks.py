import importlib.util
import os
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import CSVOutputFormat, Figure, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization

from sb3_mtrl.common.evaluation import MultiTaskEvaluation, evaluate_multi_task_policy, format_success_rates, task_id_of_step
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.type_aliases import TaskLosses
from sb3_mtrl.common.utils import (
    check_choice,
    check_integer,
    check_number,
    get_num_tasks,
    get_task_names,
    needs_static_shapes,
    restore_generator,
)

# Not a seed that people give to a training, so that the goals of training and evaluation are different draws
DEFAULT_EVAL_SEED = 1_000_000
# Episodes per task and sub-environment after which a task that never comes is taken for missing
MAX_EPISODES_PER_GATE = 20
# More rows than this per quantity would bury the rest of SB3's console table
MAX_TASKS_IN_CONSOLE = 10
# What is left of a longer key in SB3's console table: ``max_length`` of its HumanOutputFormat, less the dots
CONSOLE_KEY_LENGTH = 36 - len("...")
# How a w-reset draws its mixtures, see ``WResetCallback``
SIMPLEX_DRAWS = ("dirichlet", "l1_uniform")


def record_per_task(logger: Logger, prefix: str, values: Mapping[str, float], console: bool = True) -> None:
    """
    Record one value per task as ``<prefix>/<task>``.

    The values always reach TensorBoard, CSV and JSON. SB3's console table shortens long keys and raises an error if
    two become equal ("button-press-topdown-v3" and "button-press-topdown-wall-v3" do), so they are kept out of it then;
    also if there are more than ten tasks.

    :param logger: Logger of the model
    :param prefix: For instance ``"eval/success_rate"``
    :param values: Value by task name
    :param console: Whether the values may be shown in the console at all
    """
    keys = {task: f"{prefix}/{task}" for task in values}
    fits = len(values) <= MAX_TASKS_IN_CONSOLE and not _collide_in_console(list(keys.values()))
    exclude = () if console and fits else ("stdout", "log")
    for task, value in values.items():
        logger.record(keys[task], float(value), exclude=exclude)


def _collide_in_console(keys: list[str]) -> bool:
    """Whether SB3's table could not tell two of the keys apart."""
    indented = ["   " + key.split("/", 1)[1] for key in keys]  # the table shows the part before the slash once, above
    return len({key[:CONSOLE_KEY_LENGTH] for key in indented}) < len(indented)


class TaskSuccessCallback(BaseCallback):
    """
    Log how each task does during training, over the last episodes of that task.

    Records ``rollout/success_rate/<task>`` and ``rollout/ep_rew_mean/<task>``, and over the tasks
    ``rollout/success_rate_task_mean`` (every task weighs the same, unlike SB3's own ``rollout/success_rate``) and
    ``rollout/success_rate_worst_task``. Success is ``info["is_success"]`` at the last step of an episode, the reward is
    what the ``Monitor`` wrapper counted; what the environment does not tell is not recorded.

    :param window_size: Number of last episodes per task to average over, at least 1
    :param verbose: Verbosity level
    :raises ValueError: if ``window_size`` is below 1
    """

    def __init__(self, window_size: int = 100, verbose: int = 0):
        super().__init__(verbose)
        window_size = check_integer("window_size", window_size, 1)
        self.window_size = window_size
        self.task_names: tuple[str, ...] = ()
        self._successes: list[deque[float]] = []
        self._rewards: list[deque[float]] = []

    @property
    def success_rates(self) -> dict[str, float]:
        """Success rate by task, of the tasks that finished an episode and tell of success."""
        return self._means(self._successes)

    @property
    def mean_rewards(self) -> dict[str, float]:
        """Mean return by task, of the tasks that finished an episode."""
        return self._means(self._rewards)

    def _init_callback(self) -> None:
        task_names = get_task_names(self.training_env)
        if task_names == self.task_names:
            return  # learn() was called again: the windows go on
        self.task_names = task_names
        self._successes = [deque() for _ in task_names]
        self._rewards = [deque() for _ in task_names]

    def _on_step(self) -> bool:
        finished = np.flatnonzero(self.locals["dones"])
        for index in finished:
            self._add_episode(self.locals["infos"][index])
        # A dump empties the logger. What it holds next time must not depend on which tasks have finished since.
        if len(finished) > 0 or not self._is_recorded():
            self._record()
        return True

    def _add_episode(self, info: Mapping[str, Any]) -> None:
        task_id = task_id_of_step(info, info.get("terminal_observation"), len(self.task_names))
        if info.get("is_success") is not None:
            self._append(self._successes[task_id], float(info["is_success"]))
        if "episode" in info:
            self._append(self._rewards[task_id], float(info["episode"]["r"]))

    def _append(self, window: deque[float], value: float) -> None:
        # Not left to the deque: one that comes from a checkpoint would keep the window size of before
        window.append(value)
        while len(window) > self.window_size:
            window.popleft()

    def _is_recorded(self) -> bool:
        for prefix, windows in (("success_rate", self._successes), ("ep_rew_mean", self._rewards)):
            for task, window in zip(self.task_names, windows, strict=True):
                if window:
                    return f"rollout/{prefix}/{task}" in self.logger.name_to_value
        return True  # there is nothing to record yet

    def _record(self) -> None:
        record_per_task(self.logger, "rollout/ep_rew_mean", self.mean_rewards)
        success_rates = self.success_rates
        if success_rates:
            record_per_task(self.logger, "rollout/success_rate", success_rates)
            rates = list(success_rates.values())
            self.logger.record("rollout/success_rate_task_mean", float(np.mean(rates)))
            self.logger.record("rollout/success_rate_worst_task", min(rates))

    def _means(self, windows: list[deque[float]]) -> dict[str, float]:
        return {task: float(np.mean(window)) for task, window in zip(self.task_names, windows, strict=True) if window}


class MultiTaskEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` for multi-task environments.

    * Every task is evaluated equally often: ``n_eval_episodes`` is the number over *all* tasks, rounded up to a
      multiple of the number of tasks (see ``evaluate_multi_task_policy`` for which episodes count).
    * The evaluation environment is seeded with the same ``seed`` before each evaluation, so all evaluations
      use the same goals, and the sampling of actions does not touch the random state of the training.
    * The best model is the one with the highest success rate; the higher mean reward decides among equal success rates.
      Where the environment tells nothing of success, the mean reward alone decides, as in SB3.
    * Logged are ``eval/mean_reward``, ``eval/mean_ep_length`` and ``eval/success_rate`` as in SB3, and
      ``eval/success_rate/<task>``, ``eval/mean_reward/<task>``, ``eval/success_rate_task_std`` (over the tasks) and
      ``eval/success_rate_worst_task``.
    * ``evaluations.npz`` holds what SB3 saves (``timesteps``, ``results``, ``ep_lengths``, ``successes``) and
      ``task_ids`` (of the columns of ``results``; task-major, the same column is the same start state in every row),
      ``task_names``, ``task_mean_rewards`` and ``task_success_rates`` (evaluations, T). Where only some episodes told of
      success, ``successes`` and ``task_success_rates`` are NaN for the others; where none ever did, both are left out.
    * A training that is continued (``learn(reset_num_timesteps=False)``) with the same ``log_path`` goes on in the same
      file: evaluations up to the model's ``num_timesteps`` are kept, later ones (made between the
      checkpoint and a crash) are dropped, and only a model better than all in the file replaces ``best_model.zip``.
      Starting at 0 overwrites the file, as SB3 does.

    ``best_mean_reward`` is the highest mean reward of all evaluations, as in SB3, not that of the best model; so the
    stopping callbacks of SB3 that read it work, best under ``callback_after_eval``.

    :param eval_env: The environment used for evaluation
    :param callback_on_new_best: Callback to trigger when there is a new best model
    :param callback_after_eval: Callback to trigger after every evaluation
    :param n_eval_episodes: Number of episodes over all tasks, at least 1; rounded up to a multiple of the number of tasks
    :param eval_freq: Evaluate every ``eval_freq`` calls of the callback (each is one step of all sub-environments)
    :param log_path: Folder of ``evaluations.npz``
    :param best_model_save_path: Folder of ``best_model.zip``
    :param deterministic: Whether to use deterministic actions
    :param render: Whether to render the environment during evaluation
    :param verbose: 0 for no output, 1 for the results of each evaluation
    :param warn: Whether to warn if ``eval_env`` has no ``Monitor`` wrapper
    :param seed: Seed of each evaluation; None never seeds, as SB3's callback
    :raises ValueError: if ``n_eval_episodes`` is below 1
    """

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10000,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
        seed: int | None = DEFAULT_EVAL_SEED,
    ):
        n_eval_episodes = check_integer("n_eval_episodes", n_eval_episodes, 1)
        super().__init__(
            eval_env,
            callback_on_new_best=callback_on_new_best,
            callback_after_eval=callback_after_eval,
            n_eval_episodes=n_eval_episodes,
            eval_freq=eval_freq,
            log_path=log_path,
            best_model_save_path=best_model_save_path,
            deterministic=deterministic,
            render=render,
            verbose=verbose,
            warn=warn,
        )
        self.seed = seed
        self.num_tasks = get_num_tasks(self.eval_env)
        self.task_names = get_task_names(self.eval_env)
        self.n_eval_episodes = -(-n_eval_episodes // self.num_tasks) * self.num_tasks
        if verbose >= 1 and self.n_eval_episodes != n_eval_episodes:
            print(
                f"Evaluating {self.n_eval_episodes} instead of {n_eval_episodes} episodes: "
                f"{self.n_eval_episodes_per_task} of each of the {self.num_tasks} tasks"
            )

        self.last_evaluation: MultiTaskEvaluation | None = None
        self.last_success_rate = float("nan")
        self.last_task_success: dict[str, float] = {}
        self.best_success_rate = -np.inf
        self._best_score = (-np.inf, -np.inf)
        self._task_mean_rewards: list[list[float]] = []
        self._task_success_rates: list[list[float]] = []

    @property
    def n_eval_episodes_per_task(self) -> int:
        """Number of episodes of each task in an evaluation."""
        return self.n_eval_episodes // self.num_tasks

    def _init_callback(self) -> None:
        super()._init_callback()
        num_tasks = get_num_tasks(self.training_env)
        if num_tasks != self.num_tasks:
            raise ValueError(
                f"eval_env must have as many tasks as the training environment ({num_tasks}), got {self.num_tasks}"
            )
        is_continued = self.model.num_timesteps > 0 and not self.evaluations_timesteps
        if is_continued and self.log_path is not None and os.path.exists(f"{self.log_path}.npz"):
            self._load_evaluations(f"{self.log_path}.npz")

    def _on_training_start(self) -> None:
        super()._on_training_start()
        # Only now a training that is resumed has its evaluations
        n_before = len(self.evaluations_results[0]) if self.evaluations_results else self.n_eval_episodes
        if self.log_path is not None and n_before != self.n_eval_episodes:
            raise ValueError(
                f"n_eval_episodes must stay {n_before}, as in the evaluations so far, where these go on in one file, got "
                f"{self.n_eval_episodes}"
            )

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True

        self._sync_normalization()
        evaluation = evaluate_multi_task_policy(
            self.model,
            self.eval_env,
            n_eval_episodes_per_task=self.n_eval_episodes_per_task,
            deterministic=self.deterministic,
            seed=self.seed,
            render=self.render,
            warn=self.warn,
        )
        self._store(evaluation)
        self._report(evaluation)

        continue_training = True
        if self._update_best(evaluation.mean_success, evaluation.mean_reward):
            if self.verbose >= 1:
                print("New best success rate!" if evaluation.has_success else "New best mean reward!")
            if self.best_model_save_path is not None:
                self.model.save(os.path.join(self.best_model_save_path, "best_model"))
            if self.callback_on_new_best is not None:
                continue_training = self.callback_on_new_best.on_step()
        if self.callback is not None:
            continue_training = continue_training and self._on_event()
        return continue_training

    def _sync_normalization(self) -> None:
        if self.model.get_vec_normalize_env() is None:
            return
        try:
            sync_envs_normalization(self.training_env, self.eval_env)
        except AttributeError as error:
            raise AssertionError(
                "training and evaluation environment must be wrapped in the same order for VecNormalize's statistics to be "
                f"copied, got {self.training_env} and {self.eval_env}"
            ) from error

    def _store(self, evaluation: MultiTaskEvaluation) -> None:
        self.last_evaluation = evaluation
        self.last_mean_reward = evaluation.mean_reward
        self.last_success_rate = evaluation.mean_success
        self.last_task_success = {}
        self._is_success_buffer = []
        if evaluation.has_success:
            self.last_task_success = dict(zip(self.task_names, evaluation.success_rates.tolist(), strict=True))
            self._is_success_buffer = evaluation.successes.astype(bool).tolist()
        replay_buffer = getattr(self.model, "replay_buffer", None)
        if isinstance(replay_buffer, TaskPrioritizedReplayBuffer) and replay_buffer.performance_source == "eval":
            if evaluation.has_success:
                replay_buffer.set_task_performance(evaluation.success_rates)
            elif replay_buffer.follows_evaluations:
                warnings.warn(
                    "the evaluation tells nothing of success: the shares of the tasks stay as they are unless you call "
                    "set_task_performance",
                    stacklevel=2,
                )
        if self.log_path is None:
            return
        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(evaluation.rewards.tolist())
        self.evaluations_length.append(evaluation.lengths.tolist())
        self._task_mean_rewards.append(evaluation.mean_rewards.tolist())
        if self.evaluations_successes or not np.isnan(evaluation.successes).all():
            # A row for each evaluation, also for those that told nothing of success, or only of some episodes
            n_missing = len(self.evaluations_timesteps) - 1 - len(self.evaluations_successes)
            self.evaluations_successes += np.full((n_missing, len(evaluation.successes)), np.nan).tolist()
            self._task_success_rates += np.full((n_missing, self.num_tasks), np.nan).tolist()
            self.evaluations_successes.append(self._is_success_buffer or evaluation.successes.tolist())
            self._task_success_rates.append(evaluation.success_rates.tolist())
        self._save_evaluations(evaluation.task_ids)

    def _save_evaluations(self, task_ids: np.ndarray) -> None:
        arrays: dict[str, Any] = {
            "timesteps": self.evaluations_timesteps,
            "results": self.evaluations_results,
            "ep_lengths": self.evaluations_length,
            "task_ids": task_ids,
            "task_names": np.array(self.task_names),
            "task_mean_rewards": self._task_mean_rewards,
        }
        if self.evaluations_successes:
            arrays |= {"successes": self.evaluations_successes, "task_success_rates": self._task_success_rates}
        # In one move: a crash while writing must not cost the evaluations so far
        with open(f"{self.log_path}.tmp", "wb") as file:
            np.savez(file, **arrays)
        os.replace(f"{self.log_path}.tmp", f"{self.log_path}.npz")

    def _load_evaluations(self, path: str) -> None:
        expected_ids = np.repeat(np.arange(self.num_tasks), self.n_eval_episodes_per_task)
        advice = "choose another log_path to start a new record"
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            task_names, task_ids = tuple(arrays["task_names"].tolist()), arrays["task_ids"]
            n_rows = {name: len(arrays[name]) for name in ("timesteps", "results", "ep_lengths", "task_mean_rewards")}
            n_rows |= {name: len(arrays[name]) for name in ("successes", "task_success_rates") if name in arrays}
        except Exception as error:  # numpy raises errors of many kinds for a damaged file
            raise ValueError(f"{path} does not hold the evaluations of a {type(self).__name__}; {advice}") from error
        if len(set(n_rows.values())) > 1:
            raise ValueError(f"{path} must have a row for each evaluation in all arrays, got {n_rows}; {advice}")
        if task_names != self.task_names or not np.array_equal(task_ids, expected_ids):
            raise ValueError(
                f"the evaluations in {path} cannot be continued: each has {len(task_ids)} episodes of the tasks {task_names}, "
                f"those of this callback have {len(expected_ids)} episodes of the tasks {self.task_names}; {advice}"
            )
        unknown = np.full((len(arrays["timesteps"]), 1), np.nan)
        success_rates = arrays.get("successes", unknown).mean(axis=1)
        for success_rate, mean_reward in zip(success_rates, arrays["results"].mean(axis=1), strict=True):
            self._update_best(float(success_rate), float(mean_reward))

        kept = arrays["timesteps"] <= self.model.num_timesteps
        self.evaluations_timesteps = arrays["timesteps"][kept].tolist()
        self.evaluations_results = arrays["results"][kept].tolist()
        self.evaluations_length = arrays["ep_lengths"][kept].tolist()
        self._task_mean_rewards = arrays["task_mean_rewards"][kept].tolist()
        if "successes" in arrays:
            self.evaluations_successes = arrays["successes"][kept].tolist()
            self._task_success_rates = arrays["task_success_rates"][kept].tolist()
        if self.verbose >= 1:
            print(f"Continuing the {len(self.evaluations_timesteps)} evaluations in {path}")

    def _update_best(self, success_rate: float, mean_reward: float) -> bool:
        """
        :return: Whether this is the best evaluation so far
        """
        # NaN compares as false with everything: as a best score it could never be beaten
        score = (
            -np.inf if np.isnan(success_rate) else success_rate,
            -np.inf if np.isnan(mean_reward) else mean_reward,
        )
        self.best_mean_reward = max(self.best_mean_reward, score[1])
        if score <= self._best_score:
            return False
        self._best_score = score
        self.best_success_rate = score[0]
        return True

    def _report(self, evaluation: MultiTaskEvaluation) -> None:
        std_ep_length = np.std(evaluation.lengths)
        if self.verbose >= 1:
            print(
                f"Eval num_timesteps={self.num_timesteps}, "
                f"episode_reward={evaluation.mean_reward:.2f} +/- {evaluation.std_reward:.2f}"
            )
            print(f"Episode length: {evaluation.mean_ep_length:.2f} +/- {std_ep_length:.2f}")
            if evaluation.has_success:
                print(f"Success rate: {100 * evaluation.mean_success:.2f}%")
            if self.num_tasks > 1:
                print(format_success_rates(evaluation))

        self.logger.record("eval/mean_reward", evaluation.mean_reward)
        self.logger.record("eval/mean_ep_length", evaluation.mean_ep_length)
        if evaluation.has_success:
            self.logger.record("eval/success_rate", evaluation.mean_success)
        if self.num_tasks > 1:
            # Printed above already where verbose
            console = self.verbose < 1
            mean_rewards = dict(zip(self.task_names, evaluation.mean_rewards.tolist(), strict=True))
            record_per_task(self.logger, "eval/mean_reward", mean_rewards, console)
            if evaluation.has_success:
                record_per_task(self.logger, "eval/success_rate", self.last_task_success, console)
                self.logger.record("eval/success_rate_task_std", evaluation.success_std)
                self.logger.record("eval/success_rate_worst_task", evaluation.worst_success)
        # Dump log so the evaluation results are printed with the correct timestep
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


def has_multi_task_evaluation(callback: BaseCallback) -> bool:
    """
    :param callback: A callback, which may hold others
    :return: Whether it is or holds a ``MultiTaskEvalCallback`` that evaluates
    """
    if isinstance(callback, MultiTaskEvalCallback):
        return callback.eval_freq > 0
    inner = [*getattr(callback, "callbacks", []), getattr(callback, "callback", None)]
    return any(has_multi_task_evaluation(one) for one in inner if isinstance(one, BaseCallback))


class ProgressFileCallback(BaseCallback):
    """
    Also write all that the logger dumps as ``progress.csv`` (SB3's format "csv"), whatever other outputs there are.

    A file of an earlier training is kept: a training that is continued writes ``progress_<time steps>.csv`` beside it.

    :param folder: Folder of the file
    :param verbose: Verbosity level
    """

    def __init__(self, folder: str, verbose: int = 0):
        super().__init__(verbose)
        self.folder = folder
        self._output: CSVOutputFormat | None = None

    def _on_training_start(self) -> None:  # only now a training that is resumed knows its time steps
        if self._output in self.logger.output_formats:
            return  # learn() was called again with the same logger
        path = os.path.join(self.folder, "progress.csv")
        if os.path.exists(path):
            path = os.path.join(self.folder, f"progress_{self.model.num_timesteps}.csv")
        os.makedirs(self.folder, exist_ok=True)
        self._output = CSVOutputFormat(path)
        self.logger.output_formats.append(self._output)

    def _on_step(self) -> bool:
        return True


class GateWeightsCallback(BaseCallback):
    """
    Play one episode of each task from time to time, and write down which experts the actor listens to.

    For ``CMTASAC``. Each time a file ``gate_weights_<time steps>.npz`` is written, with ``weights`` (T, steps, k; NaN
    after the end of an episode), ``lengths`` (T,) and ``task_names``; with matplotlib (the package's extra ``plots``) a heat
    map beside it and in TensorBoard: experts by tasks, averaged over the episode, and over its steps.

    :param eval_env: Environment with the tasks of the training environment, not the same object
    :param save_path: Folder of the files
    :param eval_freq: Play every ``eval_freq`` calls of the callback (each is one step of all sub-environments), at least 1
    :param seed: Seed of ``eval_env`` before each time; None: no seeding
    :param verbose: Verbosity level: 1 prints the name of each file
    :raises ValueError: for a bad argument, or a model without gate
    """

    model: Any  # a CMTASAC, whose module imports this one

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        save_path: str,
        eval_freq: int = 10_000,
        seed: int | None = DEFAULT_EVAL_SEED,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if eval_freq < 1:
            raise ValueError(f"eval_freq must be at least 1, got {eval_freq}")
        if not isinstance(eval_env, VecEnv):
            gym_env = eval_env
            eval_env = DummyVecEnv([lambda: gym_env])
        self.eval_env = eval_env
        self.save_path = save_path
        self.eval_freq = eval_freq
        self.seed = seed
        self.task_names = get_task_names(eval_env)

    def _init_callback(self) -> None:
        if not hasattr(self.model.policy, "gate_weights"):
            raise ValueError(f"GateWeightsCallback needs a policy with a gate, got {type(self.model.policy).__name__}")
        if len(self.task_names) != get_num_tasks(self.training_env):
            raise ValueError(
                f"eval_env must have as many tasks as the training environment ({get_num_tasks(self.training_env)}), "
                f"got {len(self.task_names)}"
            )
        os.makedirs(self.save_path, exist_ok=True)

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq != 0:
            return True
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        weights, lengths = play_gate_episodes(self.model, self.eval_env, self.seed)
        path = os.path.join(self.save_path, f"gate_weights_{self.num_timesteps}")
        np.savez(f"{path}.npz", weights=weights, lengths=lengths, task_names=self.task_names)
        if self.verbose >= 1:
            print(f"Gate weights: {path}.npz")
        if importlib.util.find_spec("matplotlib") is not None:
            figure = plot_gate_weights(weights, self.task_names)
            figure.savefig(f"{path}.png", dpi=150)
            self.logger.record("eval/gate_weights", Figure(figure, close=False), exclude=("stdout", "log", "json", "csv"))
        return True


def play_gate_episodes(model: Any, env: VecEnv, seed: int | None = DEFAULT_EVAL_SEED) -> tuple[np.ndarray, np.ndarray]:
    """
    Play one episode of each task with deterministic actions, and watch the gate.

    :param model: A ``CMTASAC``
    :param env: Vector environment with the model's tasks
    :param seed: Seed of the environment; None: no seeding
    :return: Gate weights ``(T, steps, k)``, NaN after the end of an episode, and the lengths of the episodes ``(T,)``
    :raises RuntimeError: if a task never comes
    """
    task_names = get_task_names(env)
    num_tasks = len(task_names)
    finished: dict[int, np.ndarray] = {}
    steps: list[list[np.ndarray]] = [[] for _ in range(env.num_envs)]
    n_episodes, max_episodes = 0, MAX_EPISODES_PER_GATE * num_tasks * env.num_envs
    if seed is not None:
        env.seed(seed)
    obs: Any = env.reset()
    state, starts = None, np.ones(env.num_envs, dtype=bool)
    while len(finished) < num_tasks:
        step_weights = model.policy.gate_weights(obs, state, starts)
        actions, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        last_obs = obs
        obs, _, starts, infos = env.step(actions)
        for index, info in enumerate(infos):
            steps[index].append(step_weights[index])
            if starts[index]:
                row = last_obs[index] if isinstance(last_obs, np.ndarray) else None
                finished.setdefault(task_id_of_step(info, row, num_tasks), np.stack(steps[index]))
                steps[index] = []
                n_episodes += 1
        if n_episodes > max_episodes:
            missing = [name for task, name in enumerate(task_names) if task not in finished]
            raise RuntimeError(f"eval_env does not reach the tasks {', '.join(missing)} in {n_episodes} episodes")
    episodes = [finished[task] for task in range(num_tasks)]
    lengths = np.array([len(episode) for episode in episodes])
    weights = np.full((num_tasks, lengths.max(), episodes[0].shape[1]), np.nan, dtype=np.float32)
    for row, episode in zip(weights, episodes, strict=True):
        row[: len(episode)] = episode
    return weights, lengths


def plot_gate_weights(weights: np.ndarray, task_names: Sequence[str]) -> Any:
    """
    :param weights: Gate weights ``(T, steps, k)``, NaN where an episode had ended
    :param task_names: T names
    :return: A matplotlib figure: experts by tasks, averaged over the episode (left) and over its steps (right)
    :raises ImportError: if the package's extra ``plots`` is not installed
    """
    try:
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise ImportError("plot_gate_weights needs matplotlib: pip install sb3-mtrl[plots]") from error
    num_tasks, _, n_experts = weights.shape
    figure = MatplotlibFigure(figsize=(12, 1.5 + 0.35 * num_tasks), layout="constrained")
    mean_axes, step_axes = figure.subplots(1, 2, width_ratios=[1, 3])
    limits = dict(vmin=float(np.nanmin(weights)), vmax=float(np.nanmax(weights)), aspect="auto", interpolation="nearest")
    image = mean_axes.imshow(np.nanmean(weights, axis=1), **limits)
    mean_axes.set(xlabel="expert", title="mean over the episode", xticks=range(n_experts))
    mean_axes.set_yticks(range(num_tasks), task_names)
    # k lines per task
    step_axes.imshow(weights.transpose(0, 2, 1).reshape(num_tasks * n_experts, -1), **limits)
    step_axes.set(xlabel="step", title="over the episode, experts 0 (top) to k - 1 of each task", yticks=[])
    for task in range(1, num_tasks):
        step_axes.axhline(task * n_experts - 0.5, color="white", linewidth=1)
    figure.colorbar(image, ax=step_axes, label="gate weight")
    return figure


class LossMaskoutCallback(BaseCallback):
    """
    Leave a task out of an update in which its loss explodes (loss maskout).

    Paper: PaCo, https://arxiv.org/abs/2210.11653, section 4.2. SB3 calls callbacks between environment steps; this one also
    registers as a guard of the updates (``MTSAC.add_update_guard``), which ask it once the losses are known. A loss that is
    NaN or infinite, or a compositional vector that is, counts as exploding too (where the algorithm was made with
    ``on_nonfinite="raise"``, as ``MTSAC`` is by default, such a loss ends the training instead). Counts are logged as
    ``train/dropped_updates``.

    :param threshold: A task is left out if its mean loss in the batch is above this. With V2 rewards (0 to 10 per step) the
        authors use 3000.
    :param loss: "total": critic, actor and temperature loss, as published, where the actor counts with ``0.5 |dQ/da|^2 +
        alpha log pi`` (the value that the authors' code forms; with ``-Q`` a large value would hide an exploding critic);
        needs ``optimizer_order="joint"``. "critic": the critic loss alone.
    :param verbose: Verbosity level
    :raises ValueError: for a bad argument
    """

    model: Any  # an MTSAC, whose module imports this one

    def __init__(self, threshold: float = 3000.0, loss: str = "total", verbose: int = 0):
        super().__init__(verbose)
        threshold = check_number("threshold", threshold, 0, finite=False)
        check_choice("loss", loss, ("total", "critic"))
        self.threshold = threshold
        self.loss = loss

    def _init_callback(self) -> None:
        if self.loss == "total" and self.model.optimizer_order != "joint":
            raise ValueError(f"loss must be 'critic' with optimizer_order={self.model.optimizer_order!r}, got 'total'")
        self.model.add_update_guard(self)

    def drop_tasks(self, task_losses: TaskLosses) -> th.Tensor:
        """
        :param task_losses: Losses of this update
        :return: (T,) bool, the tasks to leave out
        """
        loss = task_losses.critic
        if self.loss == "total":
            for part in (task_losses.actor, task_losses.ent_coef):
                loss = loss if part is None else loss + part
        dropped = ~(loss <= self.threshold) | ~loss.isfinite()  # NaN compares false
        w = getattr(self.model.policy, "compositional_vectors", None)
        return dropped if w is None else dropped | ~w.detach().isfinite().all(dim=1)

    def after_update(self, dropped: th.Tensor) -> None:
        """
        :param dropped: (T,) bool, unused
        """

    def log_to(self, logger: Logger, task_names: tuple[str, ...]) -> None:
        """
        The algorithm itself logs what was left out.

        :param logger: The algorithm's logger, unused
        :param task_names: Names of the tasks, unused
        """

    def _on_step(self) -> bool:
        return True


class WResetCallback(BaseCallback):
    """
    Give a task that was left out of an update a new compositional vector, a random mixture of the others' (w-reset).

    Paper: PaCo, https://arxiv.org/abs/2210.11653, equation 3: ``w_t = sum_j beta_j w_j`` over the tasks j that did not
    explode, beta on the simplex. It happens after the optimiser step, so with the updated vectors; without another task to
    mix from nothing is reset. Where target critics have a W of their own, its vector is reset, too, and a
    ``TaskPrioritizedReplayBuffer`` takes the task's priorities back to the initial value. The mixtures are drawn from a
    generator of its own: a run without explosions is the same with and without this callback.

    :param simplex: "dirichlet": beta uniform on the simplex, as the paper says; "l1_uniform": uniform numbers divided by their
        sum, as the authors' code does (closer to the centre)
    :param reset_moments: Also zero the optimiser's moments of the vector (the authors' code does not)
    :param seed: Seed of the generator; None: the model's
    :param verbose: Verbosity level
    :raises ValueError: for a bad argument, or a model without compositional vectors
    """

    model: Any  # an MTSAC, whose module imports this one

    def __init__(self, simplex: str = "dirichlet", reset_moments: bool = False, seed: int | None = None, verbose: int = 0):
        super().__init__(verbose)
        check_choice("simplex", simplex, SIMPLEX_DRAWS)
        self.simplex = simplex
        self.reset_moments = reset_moments
        self.seed = seed

    def _init_callback(self) -> None:
        if not hasattr(self.model.policy, "compositional_vectors"):
            raise ValueError(
                f"WResetCallback needs a policy with compositional vectors, got {type(self.model.policy).__name__}"
            )
        self.resets = th.zeros(self.model.num_tasks, device=self.model.device)
        self.generator = th.Generator()  # of the CPU on any device, so that files fit all
        seed = self.model.seed if self.seed is None else self.seed
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.generator_state = self.generator.get_state()  # a tensor, so that models can save and restore it
        self.model.add_update_guard(self)

    def drop_tasks(self, task_losses: TaskLosses) -> th.Tensor:
        """
        :param task_losses: Losses of this update
        :return: (T,) bool, all False: leaving tasks out is ``LossMaskoutCallback``'s part
        """
        return th.zeros_like(task_losses.critic, dtype=th.bool)

    @th.no_grad()
    def after_update(self, dropped: th.Tensor) -> None:
        """
        :param dropped: (T,) bool, the tasks whose vectors are reset
        """
        # Looking at the mask is free on the CPU and would stall a GPU
        if not needs_static_shapes(dropped) and not dropped.any():
            return
        self.tell_buffer(self.reset_vectors(dropped, self.draw()))

    def draw(self) -> th.Tensor:
        """
        :return: U(0, 1) numbers for the mixtures of an update ``(T, T)``
        """
        num_tasks = self.model.num_tasks
        restore_generator(self.generator, self.generator_state)
        draws = th.rand(num_tasks, num_tasks, generator=self.generator)
        self.generator_state = self.generator.get_state()
        return draws.to(self.model.device, non_blocking=True)

    @th.no_grad()
    def reset_vectors(self, dropped: th.Tensor, draws: th.Tensor) -> th.Tensor:
        """
        The part of ``after_update`` on the device, in place.

        :param dropped: (T,) bool, the tasks whose vectors are reset
        :param draws: What ``draw`` returned
        :return: (T,) bool, those that were; a task that is left alone may have had none to mix from
        """
        w = self.model.policy.compositional_vectors
        normal = ~dropped & w.isfinite().all(dim=1)
        mixtures = mix_compositional_vectors(w, normal, draws, self.simplex)
        reset = (dropped & normal.any()).unsqueeze(1)
        w.copy_(th.where(reset, mixtures, w))
        target_w = getattr(self.model.policy, "target_compositional_vectors", None)
        if target_w is not None:
            target_w.copy_(th.where(reset, mixtures, target_w))
        self.resets.add_(reset.squeeze(1))
        for name, moment in self.model.policy.w_optimizer.state[w].items():
            if name.startswith("exp_avg"):
                # A moment that is not finite would spoil the new vector at the next step
                forget = reset if self.reset_moments else reset & ~moment.isfinite()
                moment.copy_(th.where(forget, 0.0, moment))
        return reset.squeeze(1)

    def tell_buffer(self, reset: th.Tensor) -> None:
        """
        The part of ``after_update`` on the host.

        :param reset: (T,) bool, the tasks whose vectors were reset
        """
        replay_buffer = self.model.replay_buffer
        if isinstance(replay_buffer, TaskPrioritizedReplayBuffer):
            for task in reset.nonzero().flatten().tolist():
                replay_buffer.reset_task_priorities(task)

    def log_to(self, logger: Logger, task_names: tuple[str, ...]) -> None:
        """
        Record ``train/w_resets``, the number of resets of each task's vector, and ``train/w_norm``, the length of each vector.

        :param logger: The algorithm's logger
        :param task_names: Names of the tasks
        """
        norms = self.model.policy.compositional_vectors.detach().norm(dim=1)
        for name, values, total in (("w_resets", self.resets, self.resets.sum()), ("w_norm", norms, norms.mean())):
            logger.record(f"train/{name}", total.item())
            if len(task_names) > 1:
                record_per_task(logger, f"train/{name}", dict(zip(task_names, values.tolist(), strict=True)), console=False)

    def _on_step(self) -> bool:
        return True


def mix_compositional_vectors(w: th.Tensor, normal: th.Tensor, uniform_draws: th.Tensor, simplex: str) -> th.Tensor:
    """
    Random convex combinations of the vectors of normal tasks.

    :param w: Compositional vectors ``(T, K)``
    :param normal: (T,) bool, the tasks to combine
    :param uniform_draws: U(0, 1) numbers ``(n, T)``, one row per combination
    :param simplex: "dirichlet" or "l1_uniform", see ``WResetCallback``
    :return: Combinations ``(n, K)``; zeros if no task is normal
    """
    # Exponential draws, normalised, are uniform on the simplex
    weights = -th.log1p(-uniform_draws) if simplex == "dirichlet" else uniform_draws
    weights = th.where(normal, weights, 0.0)
    beta = weights / weights.sum(dim=1, keepdim=True).clamp(min=th.finfo(weights.dtype).tiny)
    return beta @ th.where(normal.unsqueeze(1), w, 0.0)
