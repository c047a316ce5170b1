"""
Train a grid of methods and seeds, as far as it is not done yet; see ``presets.yml`` for the grids.

    python -m benchmarks.learning.run --preset cpu_suite --jobs 2       # start, or go on: what no table holds yet
    python -m benchmarks.learning.run --preset cpu_suite --results my_results --folder my_logs      # all of it, from nothing
    python -m benchmarks.learning.run --preset mt10 --emit              # a command for each run, for any scheduler
    python -m benchmarks.learning.run --preset mt10 --collect           # results of runs that finished elsewhere
    python -m benchmarks.learning.run --preset cpu_suite --random       # what a random policy reaches on the same goals
    python -m sb3_mtrl.plot --results benchmarks/learning/cpu_suite.csv

Each run is a process of its own, which writes where ``rl_zoo3.train -f`` would (``<folder>/<preset>``, the number of the
experiment is the seed), so that ``sb3_mtrl.evaluate``, ``.plot`` and ``.record`` find it. One line per running process tells
where it is. Ctrl-C (or SIGTERM) lets each run write a checkpoint and end; a run that is killed loses what came after its last
checkpoint. A run that goes on has its networks, optimisers, replay buffer and evaluations back. It lacks the transition and
the update of the checkpoint's own step, and begins new episodes with other random numbers: it is not the run that it would
have been without the stop.

When a run is finished, its policy is evaluated on all goals, and three tables get its rows: ``<preset>.csv`` (the curves:
method, env, seed, step, task, success, return), ``<preset>_final.csv`` (the same columns, all goals) and
``<preset>_runs.csv`` (seconds, how many updates were dropped and vectors reset, the commit of the code and versions of
packages). What is in the last of them is not trained again, also if the table came with the repository and the training was on
another machine: ``--results`` with a folder of your own repeats it.
``python -m benchmarks.report`` brings them into README.md.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from rl_zoo3.utils import EnvironmentName
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

import sb3_mtrl
from benchmarks.learning.results import append_results, locked, read_results, tell_of_skipped
from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED
from sb3_mtrl.common.evaluation import RandomPolicy, evaluate_multi_task_policy
from sb3_mtrl.common.results import RunHistory, read_evaluations, read_progress
from sb3_mtrl.common.vec_env import make_multi_task_vec_env
from sb3_mtrl.evaluate import PROTOCOLS, evaluate_run
from sb3_mtrl.zoo import register
from sb3_mtrl.zoo.algorithms import ALGORITHMS
from sb3_mtrl.zoo.exp_manager import cut_table
from sb3_mtrl.zoo.runs import find_run, import_packages
from sb3_mtrl.zoo.utils import hyperparams_path

HERE = Path(__file__).parent
COUNTS = ("train/dropped_updates", "train/w_resets")
# What a run was made with, see ``describe_software``
SOFTWARE = ("commit", "torch", "metaworld", "sb3_mtrl")
# Name of the random policy in the tables
RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Cell:
    """
    One training of a grid.

    :param preset: Name of the preset
    :param method: Name of the method
    :param seed: Seed
    :param settings: The preset's entry
    :param folder: Folder of all trainings
    """

    preset: str
    method: str
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def algo(self) -> str:
        """Name of the algorithm in RL Zoo."""
        return self.settings["methods"][self.method].get("algo", self.method)

    @property
    def env(self) -> str:
        """Id of the environment."""
        return self.settings["env"]

    @property
    def log_folder(self) -> Path:
        """What ``-f`` is for RL Zoo; a method that is a variant of an algorithm has one of its own."""
        folder = self.folder / self.preset
        return folder if self.method == self.algo else folder / self.method

    @property
    def run_folder(self) -> Path:
        """Folder of the experiment."""
        return self.log_folder / self.algo / f"{EnvironmentName(self.env)}_{self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether the training has come to its end."""
        return (self.run_folder / "finished.json").is_file()

    @property
    def hyperparams(self) -> dict[str, Any]:
        """What is laid over the entry of the environment in the algorithm's hyperparameter file."""
        base = {}
        if "base" in self.settings:
            base = dict(yaml.safe_load(hyperparams_path(self.algo).read_text())[self.settings["base"]])
            base.pop("n_timesteps")
        return {**base, **self.settings.get("hyperparams", {}), **self.settings["methods"][self.method].get("hyperparams", {})}

    def history(self) -> RunHistory:
        """The evaluations so far."""
        return read_evaluations(self.run_folder / "evaluations.npz", self.method, self.env, self.seed)


class ResumeCheckpointCallback(BaseCallback):
    """
    Keep one checkpoint that a training can go on from, and stop on request after writing it.

    :param folder: Folder of the run
    :param freq: Environment steps between checkpoints
    :param seconds_before: Seconds that earlier sittings took
    :param software: What each sitting was made with, this one last
    """

    def __init__(self, folder: Path, freq: int, seconds_before: float, software: list[dict[str, str]]):
        super().__init__()
        self.folder = folder
        self.freq = freq
        self.seconds_before = seconds_before
        self.software = software
        self.stop_requested = False
        self.was_stopped = False

    @property
    def seconds(self) -> float:
        """Seconds of training in all sittings."""
        return self.seconds_before + time.perf_counter() - self.start

    def _init_callback(self) -> None:
        self.start = time.perf_counter()
        self.next_step = self.model.num_timesteps + self.freq
        self.handlers = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_training_end(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request_stop(self, number: int, frame: Any) -> None:
        self.stop_requested = True

    def _on_step(self) -> bool:
        if self.stop_requested or self.num_timesteps >= self.next_step:
            save_checkpoint(self.model, self.folder, self.seconds, self.software)
            self.next_step = self.num_timesteps + self.freq
        self.was_stopped = self.stop_requested
        return not self.was_stopped


def save_checkpoint(model: BaseAlgorithm, folder: Path, seconds: float, software: list[dict[str, str]]) -> None:
    """
    Replace the checkpoint. A crash at any time leaves one, the old or the new, where ``find_checkpoint`` looks.

    :param model: The model
    :param folder: Folder of the run
    :param seconds: Seconds that the training took so far
    :param software: What each sitting was made with
    """
    new, current, old = (folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save(new / "model.zip")
    model.save_replay_buffer(new / "replay_buffer.pkl")  # type: ignore[attr-defined]
    state = {"num_timesteps": model.num_timesteps, "seconds": seconds, "software": software}
    (new / "state.json").write_text(json.dumps(state))
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)  # there is one if a crash came before the last line, see below
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """
    :param folder: Folder of a run
    :return: Folder of its checkpoint, the old one if a crash came between the two moves; None if there is none
    """
    return next((path for path in (folder / "checkpoint", folder / "checkpoint.old") if path.is_dir()), None)


def write_whole(path: Path, text: str) -> None:
    """
    Write a file that is there as a whole or not at all.

    :param path: The file
    :param text: What it is to hold
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def forget_lost_training(folder: Path, num_timesteps: int) -> None:
    """
    Take out of the tables of the logger what came after the checkpoint, which comes again: its counts are not of this run.

    :param folder: Folder of a run
    :param num_timesteps: Environment steps of its checkpoint, 0 if it begins anew
    """
    for path in folder.glob("progress*.csv"):
        if int(path.stem.partition("_")[2] or 0) >= num_timesteps:
            path.unlink()  # begun there or later
        else:
            cut_table(path, 1, lambda row: float(row.get("time/total_timesteps") or 0) <= num_timesteps)


def describe_software() -> dict[str, str]:
    """
    :return: Versions, and the commit of the code (with "+changes" if a file of code or settings differs from it); empty where
        the code is not in a repository of its own, or git is not there
    """
    root = Path(sb3_mtrl.__file__).parents[1]
    versions = {"torch": th.__version__, "metaworld": version("metaworld"), "sb3_mtrl": sb3_mtrl.__version__}
    try:
        _git(root, "ls-files", "--error-unmatch", "sb3_mtrl/__init__.py")  # not a copy within the repository of something else
        commit = _git(root, "rev-parse", "--short=10", "HEAD")
        is_changed = _git(root, "status", "--porcelain", "--", "*.py", "*.yml")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", **versions}
    return {"commit": f"{commit}+changes" if is_changed else commit, **versions}


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def load_presets(path: Path) -> dict[str, dict[str, Any]]:
    """
    :param path: YAML file, see ``presets.yml``
    :return: The presets
    """
    return yaml.safe_load(path.read_text())


def train(cell: Cell, device: str = "auto") -> bool:
    """
    Train a run from its beginning or its checkpoint, and evaluate it when it is finished.

    :param cell: The run
    :param device: PyTorch device
    :return: Whether it is finished
    """
    register()
    from rl_zoo3.exp_manager import ExperimentManager

    settings, checkpoint = cell.settings, find_checkpoint(cell.run_folder)
    state: dict[str, Any] = {"num_timesteps": 0, "seconds": 0.0, "software": []}
    if checkpoint is not None:
        # A checkpoint of before "software" was written does not know its own
        state = {"software": [dict.fromkeys(SOFTWARE, "")], **json.loads((checkpoint / "state.json").read_text())}
    software = [*state["software"], describe_software()]
    env_kwargs = settings.get("env_kwargs", {})
    probe = gym.spec(cell.env).make(**env_kwargs)
    num_tasks = int(getattr(probe.unwrapped, "num_tasks", 1))
    probe.close()
    manager = ExperimentManager(
        argparse.Namespace(algo=cell.algo, env=cell.env, seed=cell.seed, env_kwargs=env_kwargs, preset=cell.preset),
        cell.algo,
        cell.env,
        str(cell.log_folder),
        n_timesteps=settings["steps"],
        eval_freq=settings["eval_freq"],
        n_eval_episodes=settings["eval_episodes"] * num_tasks,
        n_eval_envs=num_tasks,
        hyperparams=cell.hyperparams,
        env_kwargs=dict(env_kwargs),
        eval_env_kwargs=settings.get("eval_env_kwargs"),
        trained_agent="" if checkpoint is None else str(checkpoint / "model.zip"),
        # Else the same numbers would be drawn again
        seed=cell.seed + state["num_timesteps"],
        log_interval=-2,
        verbose=0,
        device=device,
    )
    manager.save_path = str(cell.run_folder)
    manager.params_path = str(cell.run_folder / EnvironmentName(cell.env))
    model, _ = manager.setup_experiment()
    if manager.normalize:
        raise ValueError(f"{cell.method}: normalize is not supported here, checkpoints do not hold its statistics")
    if checkpoint is not None:
        # The manager takes a replay buffer that is not empty for the end of the warm-up
        model.learning_starts = manager._hyperparams["learning_starts"]
    forget_lost_training(cell.run_folder, state["num_timesteps"])
    checkpoints = ResumeCheckpointCallback(cell.run_folder, settings["checkpoint_freq"], state["seconds"], software)
    for callback in manager.callbacks:
        # Evaluations are at the same steps in all runs
        callback.n_calls = state["num_timesteps"] // manager.n_envs
    # The checkpoint is the last callback: it is to hold the evaluation of its step
    model.learn(
        settings["steps"] - state["num_timesteps"],
        callback=[*manager.callbacks, checkpoints],
        log_interval=None,
        reset_num_timesteps=checkpoint is None,
    )
    model.dump_logs()
    model.env.close()
    manager.eval_callback.eval_env.close()
    if checkpoints.was_stopped:
        return False
    save_checkpoint(model, cell.run_folder, checkpoints.seconds, software)  # the evaluation may be stopped
    model.save(cell.run_folder / f"{EnvironmentName(cell.env)}.zip")
    run = find_run(cell.log_folder, cell.algo, cell.env, cell.seed)
    result = evaluate_run(run, protocol=settings.get("protocol"), device=device)
    finished = {
        "steps": model.num_timesteps,
        "seconds": round(checkpoints.seconds),
        "software": software,
        "final": result.to_dict(),
    }
    write_whole(cell.run_folder / "finished.json", json.dumps(finished, indent=2) + "\n")
    shutil.rmtree(cell.run_folder / "checkpoint", ignore_errors=True)
    return True


def collect(cells: Sequence[Cell], results: Path) -> int:
    """
    Append the rows of finished runs that the tables do not hold; several processes may do so at a time.

    :param cells: The grid
    :param results: Folder of the tables
    :return: Number of runs that were added
    """
    n_added = 0
    for cell in cells:
        if not cell.is_finished or is_collected(cell, results):
            continue
        finished = json.loads((cell.run_folder / "finished.json").read_text())
        key, steps = {"method": cell.method, "env": cell.env, "seed": cell.seed}, finished["steps"]
        final = _final_rows({**key, "step": steps}, finished["final"])
        counts = _last_counts(cell.run_folder)
        summary = {**key, "steps": steps, "seconds": finished["seconds"], **counts, **_join_software(finished)}
        runs_path = results / f"{cell.preset}_runs.csv"
        # The last of the three says that the run is in the tables: a crash may have left the others with it
        tables = {f"{cell.preset}.csv": cell.history().rows(), f"{cell.preset}_final.csv": final, runs_path.name: [summary]}
        with locked(runs_path):
            n_added += not is_collected(cell, results)
            for name, rows in tables.items():
                if not holds_run(results / name, cell.method, cell.env, cell.seed):
                    append_results(results / name, rows)
    return n_added


def _final_rows(key: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per task of an evaluation's ``to_dict``, NaN for what it does not know."""
    known = {
        task: [math.nan if row[name] is None else row[name] for name in ("success_rate", "mean_reward")]
        for task, row in evaluation["tasks"].items()
    }
    return [{**key, "task": task, "success": success, "return": round(reward, 3)} for task, (success, reward) in known.items()]


def _last_counts(folder: Path) -> dict[str, int | str]:
    """What the last row counts that counts at all, rows of evaluations do not; a run that goes on goes on counting."""
    _, columns = read_progress(folder, COUNTS)
    known = {name: values[np.isfinite(values)] for name, values in columns.items()}
    return {name.rpartition("/")[2]: int(known[name][-1]) if len(known.get(name, ())) else "" for name in COUNTS}


def _join_software(finished: dict[str, Any]) -> dict[str, str]:
    """What a run was made with: several values if it went on with other software, empty where nothing is known."""
    values = {name: dict.fromkeys(sitting[name] for sitting in finished.get("software", [])) for name in SOFTWARE}
    return {name: " then ".join(value or "unknown" for value in known) if any(known) else "" for name, known in values.items()}


def evaluate_random_policy(preset: str, settings: dict[str, Any], results: Path) -> int:
    """
    Append what a random policy reaches on the goals of the last evaluations to ``<preset>_final.csv``, as the method
    "random" with no steps, if it is not there. Without a protocol the episodes are those of the evaluations in training.

    :param preset: Name of the preset
    :param settings: Its entry
    :param results: Folder of the tables
    :return: Number of rows that were added
    """
    path = results / f"{preset}_final.csv"
    key = {"method": RANDOM, "env": settings["env"], "seed": 0}
    if holds_run(path, **key):
        return 0
    env_kwargs = {**settings.get("env_kwargs", {}), **(settings.get("eval_env_kwargs") or {})}
    n_episodes = settings["eval_episodes"]
    if "protocol" in settings:
        protocol = PROTOCOLS[settings["protocol"]]
        env_kwargs.update(goals="cycle", success="any", horizon=protocol.horizon)
        n_episodes = protocol.episodes_per_task
    make_env = gym.spec(settings["env"]).make  # given an id, SB3 would ask for rendering, which not every environment knows
    num_tasks = make_env(**env_kwargs).unwrapped.num_tasks  # type: ignore[attr-defined]
    env = make_multi_task_vec_env(make_env, num_tasks, seed=DEFAULT_EVAL_SEED, env_kwargs=env_kwargs)
    policy = RandomPolicy(env.observation_space, env.action_space)
    evaluation = evaluate_multi_task_policy(policy, env, n_episodes, seed=DEFAULT_EVAL_SEED)
    env.close()
    rows = _final_rows({**key, "step": 0}, evaluation.to_dict())
    with locked(results / f"{preset}_runs.csv"):  # as ``collect`` does
        if holds_run(path, **key):
            return 0
        append_results(path, rows)
    return len(rows)


def is_collected(cell: Cell, results: Path) -> bool:
    """
    :param cell: A run
    :param results: Folder of the tables
    :return: Whether its rows are in the tables
    """
    return holds_run(results / f"{cell.preset}_runs.csv", cell.method, cell.env, cell.seed)


def holds_run(path: Path, method: str, env: str, seed: int) -> bool:
    """
    :param path: A table
    :param method: Name of the method
    :param env: Id of the environment
    :param seed: Seed
    :return: Whether the table holds rows of this run
    """
    key = (method, env, str(seed))
    return any((row["method"], row["env"], row["seed"]) == key for row in read_results(path))


def status_line(cell: Cell, state: str) -> str:
    """
    :param cell: A run
    :param state: What its process does
    :return: Where it is
    """
    try:
        steps, columns = read_progress(cell.run_folder, ("time/fps", "eval/success_rate"))
        step = int(steps[-1])
    except (FileNotFoundError, IndexError, ValueError):  # nothing logged yet, or the file is just being written
        return f"{cell.method} seed {cell.seed}: {state}"
    success = columns.get("eval/success_rate")
    known = [] if success is None else success[success == success]
    last = f", success rate {known[-1]:.0%}" if len(known) else ""
    total = cell.settings["steps"]
    return f"{cell.method} seed {cell.seed}: {state}, {step} of {total} steps ({step / total:.0%}){last}"


def run_command(cell: Cell, args: argparse.Namespace) -> list[str]:
    """
    :param cell: A run
    :param args: The command line
    :return: The command that trains it
    """
    options = ["--preset", cell.preset, "--presets", args.presets, "--folder", args.folder, "--device", args.device]
    options += ["--num-threads", args.num_threads, "--run", cell.method, cell.seed]
    return [sys.executable, "-m", "benchmarks.learning.run", *map(str, options)]


def start_process(cell: Cell, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """
    :param cell: A run
    :param args: The command line
    :return: The process that trains it; what it prints is added to ``output.log`` in the folder of the run
    """
    cell.run_folder.mkdir(parents=True, exist_ok=True)
    with (cell.run_folder / "output.log").open("ab") as log:
        # In a session of its own: Ctrl-C reaches it once, through this process
        return subprocess.Popen(run_command(cell, args), stdout=log, stderr=log, start_new_session=True)


def train_all(cells: Sequence[Cell], args: argparse.Namespace) -> int:
    """
    Train runs in several processes, and report where they are. Stopped with Ctrl-C or SIGTERM, it stops them and waits.

    :param cells: Runs to train
    :param args: The command line
    :return: Number of runs that failed
    """
    n_failed = 0
    waiting = list(cells)
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    next_status = time.monotonic()
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                cell = waiting.pop(0)
                running[cell] = start_process(cell, args)
                print(status_line(cell, "started"), flush=True)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                code = running.pop(cell).returncode
                n_failed += not cell.is_finished
                failed = f"failed with exit status {code}, see {cell.run_folder / 'output.log'}"
                print(status_line(cell, "finished" if cell.is_finished else failed), flush=True)
                collect([cell], args.results)
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + args.status_seconds
                for cell in running:
                    print(status_line(cell, "running"), flush=True)
            time.sleep(min(1.0, args.status_seconds))
    except KeyboardInterrupt:
        print(f"Stopping {len(running)} runs: each writes a checkpoint", flush=True)
        for process in running.values():
            process.terminate()
        for cell, process in running.items():
            process.wait()
            print(status_line(cell, "stopped"), flush=True)
        collect(list(running), args.results)
    except BaseException:
        for process in running.values():  # no run is left without someone who looks after it
            process.terminate()
        raise
    return n_failed


def _raise_keyboard_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, help="name of a grid")
    parser.add_argument("--presets", type=Path, default=HERE / "presets.yml", help="file of the grids")
    parser.add_argument("--methods", nargs="+", help="default: all of the grid")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all of the grid")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("logs"), help="of the trainings (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the tables (default: beside this file)")
    parser.add_argument("--device", default="auto", help="PyTorch device (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of PyTorch in each process (default: %(default)s)")
    parser.add_argument("--status-seconds", type=float, default=30.0, help="between two reports (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--emit", action="store_true", help="print the command of each run that is not finished, start none")
    what.add_argument("--collect", action="store_true", help="write the results of finished runs into the tables, start none")
    what.add_argument("--random", action="store_true", help="write what a random policy reaches into the tables, start no run")
    what.add_argument("--run", nargs=2, metavar=("METHOD", "SEED"), help="train this run in this process")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {args.jobs}")
    if not args.presets.is_file():
        parser.error(f"argument --presets: there is no file {args.presets}")
    presets = load_presets(args.presets)
    if args.preset not in presets:
        parser.error(f"argument --preset: must be one of {', '.join(presets)}, got {args.preset}")
    settings = presets[args.preset]
    import_packages(settings.get("gym_packages", []))
    cells = _cells(parser, args, settings)

    if args.run:
        th.set_num_threads(args.num_threads)
        (cell,) = cells
        cell.run_folder.mkdir(parents=True, exist_ok=True)
        with (cell.run_folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"another process trains {cell.run_folder}")
            if cell.is_finished:
                print(f"{cell.run_folder} is finished: nothing to do", file=sys.stderr)
            else:
                train(cell, args.device)
        return
    if args.random:
        n_rows = evaluate_random_policy(args.preset, settings, args.results)
        print(f"{n_rows} rows of the random policy added to the tables", file=sys.stderr)
        return
    n_added = collect(cells, args.results)
    if not args.collect:
        n_collected = sum(is_collected(cell, args.results) for cell in cells)
        table = args.results / f"{args.preset}_runs.csv"
        tell_of_skipped(n_collected, table, "--results OTHER_FOLDER --folder OTHER_LOGS")
    todo = [cell for cell in cells if not cell.is_finished and not is_collected(cell, args.results)]
    counts = f"{len(cells) - len(todo)} finished ({n_added} added to the tables), {len(todo)} to do"
    print(f"{len(cells)} runs: {counts}", file=sys.stderr)
    if args.emit:
        for cell in todo:
            print(shlex.join(run_command(cell, args)))
    elif not args.collect:
        n_failed = train_all(todo, args)
        if n_failed:
            sys.exit(f"{n_failed} runs failed")


def _cells(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: dict[str, Any]) -> list[Cell]:
    """The runs that the command line names, seed by seed: a grid that is stopped early has compared all methods."""
    methods, seeds = args.methods or list(settings["methods"]), args.seeds or settings["seeds"]
    if args.run:
        if not args.run[1].isdigit():
            parser.error(f"argument --run: SEED must be a whole number, got {args.run[1]}")
        methods, seeds = args.run[:1], [int(args.run[1])]
    unknown = [name for name in methods if name not in settings["methods"]]
    if unknown:
        parser.error(f"methods must be some of {', '.join(settings['methods'])}, got {', '.join(unknown)}")
    if min(seeds) < 1:
        parser.error(f"seeds must be at least 1 (they are the numbers of the experiments), got {min(seeds)}")
    cells = [Cell(args.preset, method, seed, settings, args.folder) for seed in seeds for method in methods]
    missing = sorted({cell.algo for cell in cells} - set(ALGORITHMS))
    if missing:
        known = ", ".join(ALGORITHMS)
        parser.error(f"there is no algorithm {', '.join(missing)} (there are {known}): leave it out with --methods")
    return cells


if __name__ == "__main__":
    main()
