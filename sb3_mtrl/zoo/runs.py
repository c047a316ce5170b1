"""Find what ``rl_zoo3.train`` wrote, the way ``rl_zoo3.enjoy`` does, and load it: for evaluations, pictures and videos."""

import argparse
import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from rl_zoo3.utils import EnvironmentName
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, is_vecenv_wrapped

from sb3_mtrl.common.safe_load import MALFORMED
from sb3_mtrl.common.utils import check_that
from sb3_mtrl.common.vec_env import VecTaskAssignment, preload_worker_imports
from sb3_mtrl.envs import MetaWorldMultiTaskEnv
from sb3_mtrl.zoo import register
from sb3_mtrl.zoo.algorithms import ALGORITHMS
from sb3_mtrl.zoo.patches import TRAIN_FOLDER
from sb3_mtrl.zoo.utils import TASK_ASSIGNMENT

# RL Zoo's name for the best model of the evaluations
BEST_MODEL = "best_model"
VEC_ENVS: dict[str, type[DummyVecEnv] | type[SubprocVecEnv]] = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}


@dataclass(frozen=True)
class TrainedRun:
    """
    A trained agent, as ``find_run`` found it.

    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_id: Number of the experiment; -1 where the folder has none
    :param folder: Folder of the experiment
    :param model_path: File of the model
    :param safe: Whether to read weights and plain numbers only: nothing in the folder is unpickled, and no code that it names
        is imported
    """

    algo: str
    env_id: str
    exp_id: int
    folder: Path
    model_path: Path
    safe: bool = False

    @property
    def train_args(self) -> dict[str, Any]:
        """The command line of the training, as it was saved; empty if it was not."""
        return read_train_args(self.folder, self.env_id, self.safe)

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment that the agent was trained on."""
        hyperparams = self._saved_hyperparams
        return {**(hyperparams.get("env_kwargs") or {}), **(self.train_args.get("env_kwargs") or {})}

    @property
    def _saved_hyperparams(self) -> dict[str, Any]:
        return _read_yaml(self.folder / EnvironmentName(self.env_id) / "config.yml", self.safe)

    def load_model(self, device: th.device | str = "auto") -> BaseAlgorithm:
        """
        :param device: Device of the networks
        :return: The model, without an environment
        :raises ValueError: if ``safe`` refuses something
        """
        from rl_zoo3.utils import ALGOS

        safe: dict[str, Any] = {"safe": True} if self.safe else {}
        if self.safe and self.algo not in ALGORITHMS:
            raise ValueError(f"--safe needs an algorithm of this package ({', '.join(ALGORITHMS)}), got {self.algo}")
        # Schedules may be pickled functions of another Python; nothing is trained here
        custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
        return ALGOS[self.algo].load(self.model_path, custom_objects=custom_objects, device=device, **safe)

    def make_env(
        self,
        env_kwargs: Mapping[str, Any] | None = None,
        n_envs: int | None = None,
        vec_env: str = "dummy",
        seed: int = 0,
    ) -> VecEnv:
        """
        The environment of the training: its arguments, its wrappers, and its normalisation, which does not change any more.

        :param env_kwargs: Arguments of the environment, over those of the training
        :param n_envs: Number of sub-environments, at least 1; None: one per task
        :param vec_env: "dummy" or "subproc"
        :param seed: Seed of the first reset
        :return: The vector environment; tasks are shared out to the sub-environments (of one per task, the i-th plays task i)
            if these have ``set_tasks``, whatever wrappers the training had
        """
        from rl_zoo3.utils import create_test_env, get_saved_hyperparams

        from sb3_mtrl.zoo.report import VecTaskReport

        kwargs = {**self.env_kwargs, **(env_kwargs or {})}
        env = gym.spec(self.env_id).make(**kwargs)
        num_tasks, shares_tasks = int(getattr(env.unwrapped, "num_tasks", 1)), hasattr(env.unwrapped, "set_tasks")
        env.close()
        settings_folder = self.folder / EnvironmentName(self.env_id)
        hyperparams: dict[str, Any] = {}
        stats_path: str | None = None
        if self.safe:
            self._check_settings(settings_folder)
        else:
            hyperparams, stats_path = get_saved_hyperparams(str(settings_folder), test_mode=True)
        hyperparams.pop("env_kwargs", None)
        wrappers = hyperparams.pop("vec_env_wrapper", None) or (TASK_ASSIGNMENT if shares_tasks else None)
        if wrappers is not None:  # RL Zoo fails at a None
            hyperparams["vec_env_wrapper"] = wrappers
        if vec_env == "subproc":
            preload_worker_imports()
        venv = create_test_env(
            self.env_id,
            n_envs=num_tasks if n_envs is None else n_envs,
            stats_path=stats_path,
            seed=seed,
            should_render=False,
            hyperparams=hyperparams,
            env_kwargs=kwargs,
            vec_env_cls=VEC_ENVS[vec_env],
        )
        # Its table, printed on closing, is for enjoy
        venv = venv.venv if isinstance(venv, VecTaskReport) else venv
        if shares_tasks and not is_vecenv_wrapped(venv, VecTaskAssignment):
            # Each sub-environment would visit all tasks, and begin each one's list of goals anew
            venv = VecTaskAssignment(venv)
        return venv

    def _check_settings(self, folder: Path) -> None:
        """Refuse what would have to be unpickled or imported to make the environment of the training."""
        saved = self._saved_hyperparams
        refused = [name for name in ("env_wrapper", "frame_stack", "normalize") if saved.get(name)]
        if saved.get("vec_env_wrapper") not in (None, TASK_ASSIGNMENT):
            refused.append("vec_env_wrapper")
        if (folder / "vecnormalize.pkl").exists():
            refused.append("vecnormalize.pkl")
        if refused:
            raise ValueError(f"--safe reads weights and plain numbers only and refused {', '.join(refused)} of {folder}")

    def goal_list_kwargs(self, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """
        Arguments that make a Meta-World environment visit each task's list of goals in turn and count success at any step.

        :param env_kwargs: Arguments of the environment, over those of the training
        :return: The arguments to add; none for other environments, and no list for those with a single goal
        """
        env = gym.spec(self.env_id).make(**{**self.env_kwargs, **env_kwargs}).unwrapped
        if not isinstance(env, MetaWorldMultiTaskEnv):
            return {}
        return {"goals": "fixed" if env.goals == "fixed" else "cycle", "success": "any"}

    def compare_goals(self, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """
        What the agent has seen of the goals of an evaluation on Meta-World.

        :param env_kwargs: Arguments of the environment, over those of the training
        :return: ``goal_seed`` of the evaluation; ``train_goal_seed``, that of the training; ``goals_of_training``, whether the
            goals of the evaluation are among those that the training draws from; ``selected_on_these_goals``, whether the
            model was chosen by evaluations on goals among these
        """

        def goals(*overrides: Mapping[str, Any]) -> tuple[int, bool]:
            kwargs = {key: value for override in (self.env_kwargs, *overrides) for key, value in override.items()}
            env: Any = gym.spec(self.env_id).make(**kwargs).unwrapped
            return env.goal_seed, env.goals == "fixed"

        seed, is_first_alone = goals(env_kwargs)
        train_seed, trains_on_first_alone = goals()
        selection_seed, _ = goals(self.train_args.get("eval_env_kwargs") or {})
        return {
            "goal_seed": seed,
            "train_goal_seed": train_seed,
            "goals_of_training": seed == train_seed and (is_first_alone or not trains_on_first_alone),
            "selected_on_these_goals": self.model_path.stem == BEST_MODEL and seed == selection_seed,
        }


def read_train_args(folder: Path, env_id: str, safe: bool = False) -> dict[str, Any]:
    """
    :param folder: Folder of the experiment
    :param env_id: Id of the environment
    :param safe: Whether to read plain values only
    :return: The command line of the training, as it was saved; empty if it was not
    :raises ValueError: if ``safe`` refuses something
    """
    return _read_yaml(folder / EnvironmentName(env_id) / "args.yml", safe)


def warn_of_equal_seeds(exp_ids: Sequence[int], seeds: Sequence[int | None]) -> None:
    """
    Warn of trainings of one method with the same seed: they are no independent runs.

    :param exp_ids: Numbers of the experiments
    :param seeds: Seed of the training of each; None where it is not known
    """
    for seed in sorted({seed for seed in seeds if seed is not None}):
        same = [str(exp_id) for exp_id, other in zip(exp_ids, seeds, strict=True) if other == seed]
        if len(same) > 1:
            warnings.warn(
                f"the experiments {', '.join(same)} were trained with the same seed ({seed}): they are not independent, and "
                "intervals over them are too narrow",
                UserWarning,
                stacklevel=3,
            )


def experiment_folder(folder: str | Path, algo: str, env_id: str, exp_id: int) -> Path:
    """
    :param folder: Folder of all agents (``-f`` of RL Zoo)
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_id: Number of the experiment
    :return: Folder of the experiment
    """
    return Path(folder, algo, f"{EnvironmentName(env_id)}_{exp_id}")


def find_experiments(folder: str | Path, algo: str, env_id: str) -> list[int]:
    """
    :param folder: Folder of all agents (``-f`` of RL Zoo)
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :return: Numbers of the experiments, in rising order
    :raises FileNotFoundError: if there is none
    """
    name = EnvironmentName(env_id)
    pattern = re.compile(re.escape(name) + r"_(\d+)")
    found = Path(folder, algo)
    if not found.is_dir():
        raise FileNotFoundError(f"-f/--folder must be a folder with agents of --algo {algo}, but {found} does not exist")
    exp_ids = [int(match.group(1)) for path in found.iterdir() if path.is_dir() and (match := pattern.fullmatch(path.name))]
    if not exp_ids:
        others = ", ".join(sorted({path.name.rpartition("_")[0] or path.name for path in found.iterdir() if path.is_dir()}))
        raise FileNotFoundError(f"no experiment for --env {env_id} in {found} (there are: {others or 'none'})")
    return sorted(exp_ids)


def find_run(
    folder: str | Path,
    algo: str,
    env_id: str,
    exp_id: int = 0,
    load_best: bool = False,
    load_checkpoint: int | None = None,
    load_last_checkpoint: bool = False,
    safe: bool = False,
) -> TrainedRun:
    """
    :param folder: Folder of all agents (``-f`` of RL Zoo)
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_id: Number of the experiment; 0: the latest; -1: the agent lies in the algorithm's folder itself
    :param load_best: Take the best model of the evaluations instead of the last
    :param load_checkpoint: Take the checkpoint of this time step
    :param load_last_checkpoint: Take the last checkpoint
    :param safe: Whether to read weights and plain numbers only
    :return: The run
    :raises FileNotFoundError: if there is no such experiment or no such model
    """
    from rl_zoo3.utils import get_model_path

    if exp_id != -1:
        exp_ids = find_experiments(folder, algo, env_id)
        exp_id = exp_id or exp_ids[-1]
        if exp_id not in exp_ids:
            raise FileNotFoundError(
                f"--exp-id must be one of {', '.join(map(str, exp_ids))} for --algo {algo} --env {env_id} in {folder}, "
                f"got {exp_id}"
            )
    try:
        _, model_path, log_path = get_model_path(
            exp_id,
            str(folder),
            algo,
            EnvironmentName(env_id),
            load_best,
            load_checkpoint,  # type: ignore[arg-type]  # declared as a str, used as a number
            load_last_checkpoint,
        )
    except (AssertionError, ValueError) as error:
        raise FileNotFoundError(f"{error} (-f/--folder, --exp-id or the flags --load-... name another one)") from error
    return TrainedRun(algo, env_id, exp_id, Path(log_path), Path(model_path), safe)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the arguments that name trained agents; they are those of ``rl_zoo3.enjoy``, but for ``-f``, which is where
    ``rl_zoo3.train`` writes.

    :param parser: The parser
    """
    register()
    from rl_zoo3.utils import ALGOS, StoreDict

    parser.add_argument("--algo", required=True, choices=list(ALGOS), help="algorithm")
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("-f", "--folder", default=TRAIN_FOLDER, help="folder of the trained agents (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--load-best", action="store_true", help="best model of the evaluations instead of the last")
    which.add_argument("--load-checkpoint", type=int, metavar="STEPS", help="checkpoint of this time step")
    which.add_argument("--load-last-checkpoint", action="store_true", help="last checkpoint")
    parser.add_argument(
        "--safe",
        action="store_true",
        help="unpickle nothing: weights and plain numbers alone are read, of agents that come from somebody else",
    )
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={}, help="over those of the training")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import, which register environments")
    parser.add_argument("--device", default="auto", help="PyTorch device (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=-1, help="threads of PyTorch (default: PyTorch's own)")


def import_packages(modules: Sequence[str]) -> None:
    """
    :param modules: Names of modules, which register environments when they are imported
    """
    for module in modules:
        importlib.import_module(module)


def find_runs(parser: argparse.ArgumentParser, args: argparse.Namespace, exp_ids: Sequence[int]) -> list[TrainedRun]:
    """
    The runs that a command line names. What is missing or named twice ends the program with a message.

    :param parser: The parser
    :param args: What it parsed, with the arguments of ``add_run_arguments``
    :param exp_ids: Numbers of the experiments, see ``find_run``
    :return: The runs
    """
    import_packages(args.gym_packages)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    if args.env not in gym.registry:
        parser.error(
            f"argument --env: {args.env} is no registered environment (--gym-packages names modules that register some)"
        )
    flags = (args.load_best, args.load_checkpoint, args.load_last_checkpoint, args.safe)
    try:
        runs = [find_run(args.folder, args.algo, args.env, exp_id, *flags) for exp_id in exp_ids]
    except FileNotFoundError as error:
        parser.error(str(error))
    found = [run.exp_id for run in runs]
    if len(set(found)) < len(found):
        parser.error(
            f"argument --exp-id: must name each experiment once (0 is the latest), got {' '.join(map(str, exp_ids))}, which "
            f"are the experiments {', '.join(map(str, found))}"
        )
    return runs


class PlainLoader(yaml.SafeLoader):
    """Reads what RL Zoo saves, ordered dictionaries and tuples of plain values, and no other Python objects."""


def _construct_ordered_dict(loader: PlainLoader, node: yaml.SequenceNode) -> dict[str, Any]:
    (pairs,) = loader.construct_sequence(node, deep=True) or [[]]
    return dict(pairs)


def _construct_tuple(loader: PlainLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


PlainLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _construct_ordered_dict)
PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def _read_yaml(path: Path, safe: bool) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if safe:
        try:
            settings = dict(yaml.load(path.read_text(), Loader=PlainLoader) or {})
            check_that(
                "env_kwargs", settings.get("env_kwargs"), isinstance(settings.get("env_kwargs") or {}, dict), "a mapping"
            )
            return settings
        except (yaml.YAMLError, *MALFORMED) as error:
            raise ValueError(f"--safe reads plain values only and refused {path}: {error}") from error
    # RL Zoo saves ordered dictionaries, which are Python objects; models are pickles anyway
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader) or {})
