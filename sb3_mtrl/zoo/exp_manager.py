"""
RL Zoo's experiment manager for multi-task algorithms. For every other algorithm it is the manager it was.

What it adds for ours:

* The hyperparameters come from ``hyperparams/<algo>.yml`` of this package (``-conf`` still wins). Keys beyond RL Zoo's:
  ``batch_size_per_task`` (instead of ``batch_size``), ``vec_env`` with ``n_workers``, ``worker_timeout`` and
  ``restart_workers``, ``random_baseline`` and ``tuning_objective`` (all below); the value ``num_tasks`` stands for the number
  of tasks (``n_envs: num_tasks``).
* ``vec_env: shared`` simulates in ``n_workers`` processes (default: one per core) with shared memory; one that does not reply
  for ``worker_timeout`` seconds (600) is an error, or replaced if ``restart_workers: true``; ``dummy`` and
  ``subproc`` are what they are for ``--vec-env``, which is overruled. ``-params "vec_env:'shared'"`` on the command line.
* ``env_kwargs`` of the file reach the evaluation environment; ``--eval-env-kwargs`` is laid over them.
* Sub-environments share the tasks out (``VecTaskAssignment``), also where no ``vec_env_wrapper`` asks for it.
* Evaluation visits every task equally often, on goals that stay the same during the run and belong to a seed of their own.
  Without ``--eval-episodes`` it plays five episodes of each task (RL Zoo: five in all, hardly more than one of each), and
  without ``--eval-freq`` long runs have a hundred evaluations (RL Zoo: one per 25000 steps, which would cost more than they
  tell).
* ``normalize`` builds ``VecTaskNormalize`` for multi-task environments, which leaves the one-hot of the task alone.
* A run that is short for its warm-up (``-n`` below ten times ``learning_starts``) warms up for a tenth of it, else ``-n 6000``
  would never update a network. ``-params learning_starts:...`` is taken as it is.
* A run that continues with its replay buffer (``-i``, after ``--save-replay-buffer``) does not warm up again.
* ``--save-freq`` also writes checkpoints into ``checkpoints`` in the folder of the run, of which the last three are kept:
  ``python -m sb3_mtrl.train --resume`` goes on from them exactly. RL Zoo's own files stay, for ``enjoy --load-checkpoint``.
* What is logged is also written to ``progress.csv`` in the folder of the run, for plots.
* A table of the tasks is printed at the end of a training, from the last evaluation (so not with ``--eval-freq -1``);
  ``-params random_baseline:True`` puts a random policy beside it.

``-optimize`` maximises the success rate, averaged over the tasks, where the environment reports ``is_success``, and else the
mean reward; pruning looks at the same number. ``-params "tuning_objective:'mean_reward'"`` asks for the mean reward in any
case. Several processes may work on one study (``--storage``, ``--study-name``): a trial whose process was killed is marked as
failed by the others, and ``--max-total-trials`` counts each trial once.
"""

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pprint import pprint
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import optuna
import yaml
from gymnasium import spaces
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, get_callback_list
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, LogEveryNTimesteps
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED, MultiTaskEvalCallback, ProgressFileCallback
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.evaluation import MultiTaskEvaluation, RandomPolicy, evaluate_multi_task_policy, format_task_table
from sb3_mtrl.common.vec_env import VecTaskNormalize, preload_worker_imports
from sb3_mtrl.common.vec_env.make import add_worker_arguments, resolve_vec_env
from sb3_mtrl.zoo.algorithms import ALGORITHMS
from sb3_mtrl.zoo.checks import CODE_KEYS, TUNING_OBJECTIVES, check_batch_size, check_config_file, check_hyperparams
from sb3_mtrl.zoo.trials import fail_lost_trials, is_surplus, note_process, open_storage, try_to_fail_lost_trials
from sb3_mtrl.zoo.utils import ARGUMENTS_FILE, CHECKPOINT_FOLDER, TASK_ASSIGNMENT, hyperparams_path

if TYPE_CHECKING:
    from rl_zoo3.exp_manager import ExperimentManager
else:
    # The mixin is put before RL Zoo's class when that one was loaded, see sb3_mtrl.zoo.patches
    ExperimentManager = object

# Where --eval-episodes and --eval-freq are not given
DEFAULT_EVAL_EPISODES_PER_TASK = 5
DEFAULT_MAX_EVALUATIONS = 100
WORKER_ARGUMENTS = ("n_workers", "worker_timeout", "restart_workers")


class MultiTaskTrialEvalCallback(MultiTaskEvalCallback):
    """
    Evaluate a trial on every task, report the objective to Optuna and stop the trial if it is to be pruned.

    :param eval_env: The environment to evaluate on
    :param trial: The trial
    :param objective: "success_rate" (mean reward where the environment reports no success) or "mean_reward"
    :param kwargs: Further arguments of ``MultiTaskEvalCallback``
    """

    def __init__(self, eval_env: VecEnv, trial: optuna.Trial, objective: str = "success_rate", **kwargs: Any) -> None:
        super().__init__(eval_env, **kwargs)
        self.trial = trial
        self.objective = objective
        self.value = float("-inf")
        self.eval_idx = 0
        self.is_pruned = False

    def _on_step(self) -> bool:
        continue_training = super()._on_step()
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.eval_idx += 1
            by_success = self.objective == "success_rate" and bool(self.last_task_success)
            self.value = self.last_success_rate if by_success else self.last_mean_reward
            self.trial.report(self.value, self.eval_idx)
            if self.trial.should_prune():
                self.is_pruned = True
                return False
        return continue_training


class GoOnCallback(BaseCallback):
    """
    When an experiment is resumed, and its checkpoint is restored: keep the arguments that it now has for the next time, and
    take out of its tables what came after the checkpoint, which comes again.

    :param manager: The manager of the experiment
    """

    def __init__(self, manager: "MultiTaskExperimentMixin"):
        super().__init__()
        self.manager = manager

    def _on_training_start(self) -> None:
        if self.manager.resume_folder is None:
            return
        steps, total = self.model.num_timesteps, self.manager.n_timesteps
        if steps >= total:
            warnings.warn(f"the experiment has made its {steps} of -n {total} steps: a larger -n trains it on", stacklevel=2)
        self.manager.save_config_again()
        folder = Path(self.manager.save_path)
        for path in folder.glob("progress_*.csv"):
            if int(path.stem.partition("_")[2]) >= steps:
                path.unlink()  # begun at a checkpoint that is not the newest one any more
        for path in folder.glob("progress*.csv"):
            cut_table(path, 1, lambda row: float(row.get("time/total_timesteps") or 0) <= steps)
        for path in folder.glob("*.monitor.csv"):
            # Workers cannot be asked for their files; they append to them, wherever their end is now
            length = 0

            def came_before(row: dict[str, str]) -> bool:
                nonlocal length
                length += int(row["l"])
                return length <= steps // self.training_env.num_envs

            cut_table(path, 2, came_before)

    def _on_step(self) -> bool:
        return True


def cut_table(path: Path, n_header_lines: int, keep: Callable[[dict[str, str]], bool]) -> None:
    """
    End a table before the first row that is not to be kept.

    :param path: A CSV file
    :param n_header_lines: Number of lines up to the names of the columns, which are in the last of them
    :param keep: Whether to keep a row, given by names of columns
    """
    with path.open("r+", newline="") as file:
        lines = [file.readline() for _ in range(n_header_lines)]
        end = file.tell()
        columns = next(csv.reader(lines[-1:]), [])
        while line := file.readline():
            row = next(csv.reader([line]))
            if not line.endswith("\n") or len(row) != len(columns) or not keep(dict(zip(columns, row, strict=True))):
                file.truncate(end)  # a row that was cut off by the stop, or one of later
                return
            end = file.tell()


def _is_given(option: str) -> bool:
    return any(argument.startswith(option) for argument in sys.argv[1:])


class MultiTaskExperimentMixin(ExperimentManager):
    """
    Placed before RL Zoo's ``ExperimentManager``, it acts where ``algo`` is one of ours. The parameters are those of
    ``ExperimentManager``.
    """

    #: Folder of the experiment that is to be continued, see ``sb3_mtrl.train``; None for a new one
    resume_folder: ClassVar[str | None] = None

    def __init__(self, args: Any, algo: str, *rest: Any, **kwargs: Any) -> None:
        super().__init__(args, algo, *rest, **kwargs)
        if self.resume_folder is not None:
            self.save_path = self.resume_folder
            self.params_path = os.path.join(self.save_path, self.env_name)
        self.is_multi_task_algorithm = algo in ALGORITHMS
        self.num_tasks = 1
        self.tuning_objective = TUNING_OBJECTIVES[0]
        self.random_baseline = False
        self.eval_callback: MultiTaskEvalCallback | None = None
        self._saved_hyperparams: dict[str, Any] = {}
        self._evaluation_arguments: list[str] = []
        if self.is_multi_task_algorithm and kwargs.get("config") is None:
            self.config = str(hyperparams_path(algo))

    # ---------------------------------------------------------- hyperparameters

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        goes_on = self.resume_folder is not None and self.args.conf_file is None
        if self.is_multi_task_algorithm and self.config.endswith((".yml", ".yaml")) and not goes_on:
            check_config_file(Path(self.config), self.env_name.gym_id)
        hyperparams, saved_hyperparams = self._read_saved_hyperparameters() if goes_on else super().read_hyperparameters()
        if self.is_multi_task_algorithm:
            if self.storage and self.study_name and self.trial_id == 0 and not goes_on:
                # RL Zoo takes number 0 for "no trial"
                trial = self.load_trial(self.storage, self.study_name, 0)
                trial.update(self.custom_hyperparams or {})
                hyperparams.update(trial)
                saved_hyperparams.update(trial)
            check_batch_size("-params", self.custom_hyperparams or {})
            check_hyperparams(ALGOS[self.algo], hyperparams)
            shares_tasks = self._probe_env(hyperparams.get("env_kwargs") or self.env_kwargs)
            if shares_tasks and "vec_env_wrapper" not in hyperparams:
                # Into the saved ones, too: enjoy reads them
                hyperparams["vec_env_wrapper"] = saved_hyperparams["vec_env_wrapper"] = TASK_ASSIGNMENT
            if "batch_size" in (self.custom_hyperparams or {}):
                hyperparams.pop("batch_size_per_task", None)
            hyperparams = self._resolve_num_tasks(hyperparams)
        return hyperparams, saved_hyperparams

    def _read_saved_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those that the experiment to be continued was started with; the file that they came from may have changed since."""
        path = Path(self.params_path, "config.yml")
        print(f"Loading hyperparameters from: {path}")
        # With types of Python; checkpoints are no safer
        hyperparams = dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))
        hyperparams.update(self.custom_hyperparams or {})
        if "env_kwargs" in hyperparams and self.env_kwargs:
            hyperparams["env_kwargs"] = self.env_kwargs
        saved_hyperparams = OrderedDict(sorted(hyperparams.items()))
        pprint(saved_hyperparams)
        return hyperparams, saved_hyperparams

    def _probe_env(self, env_kwargs: dict[str, Any]) -> bool:
        """
        Learn the number of tasks, and refuse an environment that no run could use before any folder is made for the run.

        :return: Whether the tasks can be shared out to the sub-environments
        """
        env_id = self.env_name.gym_id
        env = gym.spec(env_id).make(**env_kwargs)
        try:
            if not isinstance(env.action_space, spaces.Box):
                raise ValueError(
                    f"{self.algo} needs an environment with continuous actions (a Box action space), {env_id} has "
                    f"{env.action_space}: pass another one, e.g. --env MetaWorld-MT10-v3"
                )
            self.num_tasks = int(getattr(env.unwrapped, "num_tasks", 1))
            return hasattr(env.unwrapped, "set_tasks")
        finally:
            env.close()

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        if not self.is_multi_task_algorithm:
            return super()._preprocess_hyperparams(hyperparams)
        self.tuning_objective = hyperparams.pop("tuning_objective", self.tuning_objective)
        self.random_baseline = hyperparams.pop("random_baseline", self.random_baseline)
        worker_arguments = {name: hyperparams.pop(name, None) for name in WORKER_ARGUMENTS}
        self._choose_vec_env(hyperparams.pop("vec_env", None), **worker_arguments)
        code = [key for key in CODE_KEYS if isinstance(hyperparams.get(key), str)]
        try:
            processed = super()._preprocess_hyperparams(hyperparams)
        except Exception as error:
            # The code of a string is in no file. Other errors, e.g. of a callback's constructor, speak for themselves
            if not code or traceback.extract_tb(error.__traceback__)[-1].filename != "<string>":
                raise
            raise ValueError(f"{' and '.join(code)} must be Python code that RL Zoo can evaluate: {error}") from error
        # RL Zoo settles this before it reads the file
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        self._shorten_warm_up(processed[0])
        self._choose_evaluations()
        if self.log_interval == -1 and any(isinstance(callback, LogEveryNTimesteps) for callback in processed[2]):
            # SB3 counts episodes: sub-environments that end together would write as many logs for one time step
            self.log_interval = -2
        return processed

    def _choose_vec_env(self, name: str | None, **worker_arguments: Any) -> None:
        if name is not None:
            self.vec_env_class = resolve_vec_env(name)
            if name != "dummy":
                preload_worker_imports()
        self.vec_env_kwargs = add_worker_arguments(
            self.vec_env_class,  # type: ignore[arg-type]
            self.vec_env_kwargs,
            **worker_arguments,
        )

    def _shorten_warm_up(self, hyperparams: dict[str, Any]) -> None:
        if "learning_starts" not in hyperparams or "learning_starts" in (self.custom_hyperparams or {}):
            return
        longest = self.n_timesteps // 10
        if hyperparams["learning_starts"] > longest:
            print(f"learning_starts={hyperparams['learning_starts']} is long for {self.n_timesteps} steps, using {longest}")
            hyperparams["learning_starts"] = longest

    def _choose_evaluations(self) -> None:
        """Defaults for several tasks. Whoever makes a manager in Python, without RL Zoo's command line, has chosen."""
        if self.num_tasks == 1 or not hasattr(self.args, "eval_episodes"):
            return
        # The shortest beginnings that argparse takes for these options
        if not _is_given("--eval-ep"):
            self.n_eval_episodes = DEFAULT_EVAL_EPISODES_PER_TASK * self.num_tasks
        if not _is_given("--eval-f"):
            self.eval_freq = max(self.eval_freq, self.n_timesteps // DEFAULT_MAX_EVALUATIONS)
        # With a longer -n, too, a training that goes on keeps them
        self._evaluation_arguments = ["--eval-episodes", str(self.n_eval_episodes), "--eval-freq", str(self.eval_freq)]
        if self.eval_freq > 0 and not self.optimize_hyperparameters:
            print(f"Evaluating {self.n_eval_episodes} episodes of {self.num_tasks} tasks every {self.eval_freq} steps")

    def _resolve_num_tasks(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        """Replace what is given per task or as "num_tasks" by the number it means for this environment."""
        resolved = {key: self.num_tasks if value == "num_tasks" else value for key, value in hyperparams.items()}
        batch_size_per_task = resolved.pop("batch_size_per_task", None)
        if batch_size_per_task is not None:
            resolved["batch_size"] = batch_size_per_task * self.num_tasks
        return resolved

    # ------------------------------------------------------------- environments

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        if self.resume_folder is not None:
            self.monitor_kwargs = {**(self.monitor_kwargs or {}), "override_existing": False}  # its files go on
        env = super().create_envs(n_envs, eval_env, no_log)
        if self.is_multi_task_algorithm and eval_env:
            env.seed(DEFAULT_EVAL_SEED)
        return env

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        has_tasks = self.is_multi_task_algorithm and env.has_attr("num_tasks")
        # Statistics of a run to be continued keep the class they were saved with
        stats_path = Path(self.trained_agent).parent / self.env_name / "vecnormalize.pkl"
        if not (has_tasks and self.normalize) or stats_path.exists():
            return super()._maybe_normalize(env, eval_env)
        kwargs = dict(self.normalize_kwargs)
        if eval_env:
            kwargs.update(training=False, norm_reward=False)
        if self.verbose > 0:
            print(f"Normalization per task activated: {kwargs}")
        return VecTaskNormalize(env, **kwargs)

    # ----------------------------------------------------------------- training

    def create_callbacks(self) -> None:
        n_specified = len(self.callbacks)
        super().create_callbacks()
        if not self.is_multi_task_algorithm:
            return
        if self.save_freq > 0 and not self.optimize_hyperparameters:
            # RL Zoo has made calls of time steps
            self.callbacks.append(
                MultiTaskCheckpointCallback(
                    self.save_freq, os.path.join(self.save_path, CHECKPOINT_FOLDER), resume="auto", verbose=self.verbose
                )
            )
        self.callbacks.append(GoOnCallback(self))
        self.callbacks.append(ProgressFileCallback(self.save_path))
        for index, callback in enumerate(self.callbacks[n_specified:], n_specified):
            if type(callback) is EvalCallback:
                self.callbacks[index] = self.eval_callback = MultiTaskEvalCallback(
                    callback.eval_env,
                    callback_on_new_best=callback.callback_on_new_best,
                    best_model_save_path=callback.best_model_save_path,
                    n_eval_episodes=callback.n_eval_episodes,
                    log_path=self.save_path,
                    eval_freq=callback.eval_freq,
                    deterministic=callback.deterministic,
                )

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.resume_folder is not None:
            self._saved_hyperparams = saved_hyperparams
            print(f"Log path: {self.save_path}")
            return  # it is there; a checkpoint that does not fit to new arguments must not leave them behind
        self._write_config(saved_hyperparams)

    def save_config_again(self) -> None:
        """
        Save hyperparameters and arguments of an experiment that goes on, each file as a whole or not at all.
        """
        own_path = self.params_path
        with tempfile.TemporaryDirectory(dir=own_path) as folder:
            self.params_path = folder
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # it says what was said
                    self._write_config(self._saved_hyperparams)
            finally:
                self.params_path = own_path
            for path in Path(folder).iterdir():
                os.replace(path, Path(own_path, path.name))

    def _write_config(self, saved_hyperparams: dict[str, Any]) -> None:
        super()._save_config(saved_hyperparams)
        if self.is_multi_task_algorithm:
            arguments = [*sys.argv[1:], "--seed", str(self.seed), *self._evaluation_arguments]
            (Path(self.params_path) / ARGUMENTS_FILE).write_text(json.dumps(arguments))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        if self.is_multi_task_algorithm and isinstance(model, OffPolicyAlgorithm):
            if model.replay_buffer is not None and model.replay_buffer.size() > 0:
                print("The replay buffer was restored: no warm-up (learning_starts=0)")
                model.learning_starts = 0
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        super().learn(model)
        if self.is_multi_task_algorithm:
            self._log_rest(model)
        if self.eval_callback is not None:
            if self.eval_callback.eval_env.has_attr("num_tasks"):
                self._print_task_table(model, self.eval_callback)
            self.eval_callback.eval_env.close()

    def _log_rest(self, model: BaseAlgorithm) -> None:
        """Log what came after the last full interval, which is everything if the run was shorter than one."""
        for callback in self.callbacks:
            if isinstance(callback, LogEveryNTimesteps) and callback.last_time_trigger < model.num_timesteps:
                model.dump_logs()

    def _print_task_table(self, model: BaseAlgorithm, callback: MultiTaskEvalCallback) -> None:
        def evaluate(predictor: PolicyPredictor) -> MultiTaskEvaluation:
            return evaluate_multi_task_policy(
                predictor,
                callback.eval_env,
                n_eval_episodes_per_task=callback.n_eval_episodes_per_task,
                deterministic=callback.deterministic,
                seed=callback.seed,
                warn=False,
            )

        evaluation = callback.last_evaluation
        if evaluation is None or callback.evaluations_timesteps[-1] != model.num_timesteps:
            if model.get_vec_normalize_env() is not None:
                sync_envs_normalization(callback.training_env, callback.eval_env)
            evaluation = evaluate(model)
        evaluations = {f"after {model.num_timesteps} steps": evaluation}
        if self.random_baseline:
            env = callback.eval_env
            evaluations["random policy"] = evaluate(RandomPolicy(env.observation_space, env.action_space, callback.seed))
        print(format_task_table(evaluations))

    # ------------------------------------------------------------------- tuning

    def hyperparameters_optimization(self) -> None:
        if self.is_multi_task_algorithm and self.storage is not None:
            storage = open_storage(self.storage)
            if not self.storage.endswith(".log"):
                self.storage = storage  # RL Zoo would open it without heartbeat
            if self.study_name is not None:
                study = optuna.create_study(
                    storage=storage, study_name=self.study_name, load_if_exists=True, direction="maximize"
                )
                if lost := fail_lost_trials(study):
                    print(f"Trials whose process is gone, marked as failed: {', '.join(map(str, lost))}")
        super().hyperparameters_optimization()

    def objective(self, trial: optuna.Trial) -> float:
        if not self.is_multi_task_algorithm:
            return super().objective(trial)
        note_process(trial)
        try_to_fail_lost_trials(trial.study)
        if self.max_total_trials is not None and is_surplus(trial, self.max_total_trials):
            print(f"Trial {trial.number} is left out: the study has its {self.max_total_trials} trials")
            trial.study.stop()
            return float("nan")  # which fails it
        try:
            return self._run_trial(trial)
        finally:
            # Before RL Zoo counts the trials of the study, to decide whether to go on
            try_to_fail_lost_trials(trial.study)

    def _run_trial(self, trial: optuna.Trial) -> float:
        sampled_hyperparams = HYPERPARAMS_SAMPLER[self.algo](
            trial,
            self.n_actions,
            self.n_envs,
            {"using_her_replay_buffer": False, "her_kwargs": {}, "num_tasks": self.num_tasks},
        )
        hyperparams = self._resolve_num_tasks({**self._hyperparams, **sampled_hyperparams})
        env = self.create_envs(self.n_envs, no_log=True)
        eval_env = self.create_envs(self.n_eval_envs, eval_env=True)
        try:
            # RL Zoo does not seed trials either: equal hyperparameters are to be tried with different seeds
            model = ALGOS[self.algo](
                env=env, seed=None, verbose=self.verbose if self.verbose >= 2 else 0, device=self.device, **hyperparams
            )
            eval_callback = self._trial_eval_callback(trial, eval_env)
            callbacks: list[BaseCallback] = [*get_callback_list({"callback": self.specified_callbacks}), eval_callback]
            try:
                model.learn(self.n_timesteps, callback=callbacks)
            except (AssertionError, ValueError) as error:
                # Hyperparameters that lead to NaN are bad ones, not an end of the study
                print(f"Trial {trial.number} pruned: {error}\nSampled hyperparameters: {sampled_hyperparams}")
                raise optuna.TrialPruned() from error
        finally:
            env.close()
            eval_env.close()
        if eval_callback.is_pruned:
            raise optuna.TrialPruned()
        return eval_callback.value

    def _trial_eval_callback(self, trial: optuna.Trial, eval_env: VecEnv) -> MultiTaskTrialEvalCallback:
        path = None
        if self.optimization_log_path is not None:
            path = os.path.join(self.optimization_log_path, f"trial_{trial.number}")
        return MultiTaskTrialEvalCallback(
            eval_env,
            trial,
            self.tuning_objective,
            best_model_save_path=path,
            log_path=path,
            n_eval_episodes=self.n_eval_episodes,
            eval_freq=max(self.n_timesteps // self.n_evaluations // self.n_envs, 1),
            deterministic=self.deterministic_eval,
            verbose=0,
        )
