"""
Kill trainings at random moments, start them again, and compare them with one that was left alone.

    python -m tests.kill_and_resume                               # 20 kills for each of the five algorithms
    python -m tests.kill_and_resume --kills 5 --algo pacosac
    python -m tests.kill_and_resume --kills 4 --together          # all algorithms in one process after the other: faster

Each training is a process of its own on real Meta-World tasks, with tiny networks. It is killed by SIGKILL, at moments that
are spread evenly over its time, or while it writes a checkpoint, and started again by the same command, which goes on from the
newest checkpoint. A training that comes to its end before all kills were made is started anew. What counts in the end: all
parameters, optimisers, the replay buffer, all attributes of model and callbacks, all generators, and the steps that the
environment makes next. Environments are restored in the middle of their episodes, none is begun anew.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ALGORITHMS = ("mtsac", "pacosac", "cmtasac", "tsacsac", "starssac")
TASKS = ("reach-v3", "push-v3", "drawer-close-v3")
TOTAL_TIMESTEPS, N_ENVS, SAVE_FREQ = 360, 2, 8
# Share of the kills that come while a checkpoint is written, as far as it can be hit
SHARE_IN_WRITING = 0.4
TRAINING, FINISHED = "training", "finished"


# ------------------------------------------------------------------------------------------------------- one training


def train(folder: Path, algo: str) -> None:
    """
    Train from the newest checkpoint in the folder, or from the beginning, and write down what came of it.

    :param folder: Folder of the training
    :param algo: Name of the algorithm in RL Zoo
    """
    import numpy as np
    import torch as th
    from stable_baselines3.common.callbacks import CallbackList
    from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

    from sb3_mtrl import make_multi_task_vec_env
    from sb3_mtrl.common.callbacks import MultiTaskEvalCallback, TaskSuccessCallback
    from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
    from sb3_mtrl.common.vec_env import VecTaskNormalize
    from sb3_mtrl.zoo.algorithms import ALGORITHMS as ZOO_ALGORITHMS
    from tests.fingerprint import fingerprint

    th.set_num_threads(1)
    env_kwargs = dict(tasks=list(TASKS), horizon=25)
    # Two sub-environments for three tasks: one has to change between its two
    env: Any = make_multi_task_vec_env("MetaWorld-Custom-v3", n_envs=N_ENVS, env_kwargs=env_kwargs)
    eval_env: Any = make_multi_task_vec_env("MetaWorld-Custom-v3", n_envs=1, env_kwargs=env_kwargs, seed=7)
    kwargs: dict[str, Any] = {}
    noise = np.zeros(4), np.full(4, 0.1)
    if algo == "mtsac":
        env, eval_env = VecTaskNormalize(env), VecTaskNormalize(eval_env, training=False, norm_reward=False)
        kwargs.update(action_noise=OrnsteinUhlenbeckActionNoise(*noise), learning_rate=lambda progress: 1e-3 * progress)
    elif algo == "pacosac":
        kwargs.update(maskout_threshold=5.0, ent_coef_learning_rate=1e-2)  # explodes, and is reset, now and then
    elif algo == "cmtasac":
        kwargs.update(policy_kwargs=dict(lstm_hidden_dim=8), train_freq=4, gradient_steps=3)
    elif algo == "tsacsac":
        kwargs.update(sparse_reward="first_success", sparse_budget=0.01, action_noise=NormalActionNoise(*noise))
    elif algo == "starssac":
        kwargs.update(buffer_size=210, gradient_steps=2)  # its rings go round
    kwargs["policy_kwargs"] = {"net_arch": [16, 16], **kwargs.get("policy_kwargs", {})}
    model = ZOO_ALGORITHMS[algo].algorithm_class(
        "MlpPolicy", env, batch_size=24, learning_starts=40, seed=0, device="cpu", **kwargs
    )
    callback = CallbackList(
        [
            TaskSuccessCallback(window_size=5),
            # Without a seed of its own the evaluation's environment goes on from one evaluation to the next
            MultiTaskEvalCallback(eval_env, n_eval_episodes=3, eval_freq=50, log_path=str(folder), seed=None, verbose=0),
            MultiTaskCheckpointCallback(SAVE_FREQ, folder / "checkpoints", resume="auto"),
        ]
    )
    print(TRAINING, flush=True)
    model.learn(TOTAL_TIMESTEPS, callback=callback)
    result = fingerprint(model, callback)
    with np.load(folder / "evaluations.npz") as evaluations:
        result["evaluations.npz"] = repr({name: evaluations[name].tolist() for name in evaluations})
    (folder / "result.json").write_text(json.dumps(result))


# ------------------------------------------------------------------------------------------------ killing and comparing


class Life(NamedTuple):
    """What became of one process."""

    seconds: float  # of training
    was_killed: bool
    was_writing: bool  # when it was killed


def live(folder: Path, algos: Sequence[str], kill_after: float | None = None, in_writing: bool = False) -> Life:
    """
    Start a training, and maybe kill it.

    :param folder: Folder of the trainings
    :param algos: Algorithms, one after the other
    :param kill_after: Seconds of training; None: never
    :param in_writing: Then wait until a checkpoint is being written, and kill it there
    :return: What became of it
    :raises RuntimeError: if it ends with an error
    """
    command = [sys.executable, "-m", "tests.kill_and_resume", "--train", str(folder), "--algo", *algos]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it trains
            start = time.perf_counter()
            if kill_after is not None:
                try:
                    process.wait(kill_after)
                except subprocess.TimeoutExpired:
                    if in_writing:
                        stop_in_writing(process, folder)
                    process.kill()
            process.wait()
            seconds = time.perf_counter() - start
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        if process.returncode not in (0, -9):
            raise RuntimeError(f"the training ended with {process.returncode}:\n{errors.read()}")
    return Life(seconds, process.returncode == -9, process.returncode == -9 and bool(unfinished_checkpoints(folder)))


def stop_in_writing(process: subprocess.Popen[str], folder: Path) -> None:
    """
    Stop a training while it writes a checkpoint, or return when it has ended.

    :param process: The training
    :param folder: Folder of the trainings
    """
    while process.poll() is None:
        if unfinished_checkpoints(folder):
            time.sleep(random.uniform(0, 0.01))
            process.send_signal(signal.SIGSTOP)
            if unfinished_checkpoints(folder):
                return
            process.send_signal(signal.SIGCONT)  # too late for this one
        time.sleep(0.0005)


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """
    :param folder: Folder of the trainings
    :return: Checkpoints that are being written
    """
    return list(folder.glob("*/checkpoints/.writing_*"))


def read_results(folder: Path, algos: Sequence[str]) -> dict[str, dict[str, str]]:
    """
    :param folder: Folder of the trainings
    :param algos: Algorithms
    :return: What came of each
    """
    return {algo: json.loads((folder / algo / "result.json").read_text()) for algo in algos}


def kill_and_resume(algos: Sequence[str], n_kills: int, folder: Path) -> bool:
    """
    Compare trainings that were killed with trainings that were not, and print what came of it.

    :param algos: Algorithms, trained one after the other in each process
    :param n_kills: Number of kills
    :param folder: Folder to work in
    :return: Whether they ended alike
    """
    from tests.fingerprint import differences

    reference = live(folder / "reference", algos)
    expected = read_results(folder / "reference", algos)
    kills = kills_in_writing = n_trainings = 0
    all_differences: dict[str, list[str]] = {algo: [] for algo in algos}
    while kills < n_kills or n_trainings == 0:
        run_folder = folder / f"killed_{n_trainings}"
        while True:
            kill_after = random.uniform(0, 2 * reference.seconds / max(n_kills, 1)) if kills < n_kills else None
            life = live(run_folder, algos, kill_after, random.random() < SHARE_IN_WRITING)
            if not life.was_killed:
                break
            kills += 1
            kills_in_writing += life.was_writing
        n_trainings += 1
        for algo, result in read_results(run_folder, algos).items():
            all_differences[algo] += differences(expected[algo], result)
        shutil.rmtree(run_folder)
    for algo in algos:
        n_parts, differing = len(expected[algo]), all_differences[algo]
        outcome = f"DIFFERENT: {', '.join(differing[:5])}, ..." if differing else f"all {n_parts} parts equal"
        print(
            f"{algo:9} {kills} kills ({kills_in_writing} in writing a checkpoint), {n_trainings} trainings: {outcome}",
            flush=True,
        )
    return not any(all_differences.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: Command line, see the top of this file
    :return: Exit status: 0 if all trainings ended alike
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each training (default: %(default)s)")
    parser.add_argument("--algo", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="algorithms (default: all)")
    parser.add_argument("--together", action="store_true", help="train all algorithms in one process after the other")
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.train is not None:
        for algo in args.algo:
            (args.train / algo).mkdir(parents=True, exist_ok=True)
            train(args.train / algo, algo)
        return 0
    random.seed(args.seed)
    groups = [args.algo] if args.together else [[algo] for algo in args.algo]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [kill_and_resume(group, args.kills, Path(folder, str(index))) for index, group in enumerate(groups)]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
