"""
Checkpoints of a training with a full replay buffer as ratios: ``python -m benchmarks.speed.checkpoint``; how is said in
``benchmarks.speed.measure``. The clock is that of a user who waits, and the disk is part of it: other disks, other ratios.

Compared with what SB3 offers for the same purpose, ``save`` and ``save_replay_buffer``, which write the whole buffer each
time, without checksums and without waiting for the disk (as ``CheckpointCallback(save_replay_buffer=True)`` does).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mtrl
from benchmarks.speed.measure import Variants, machine_line, print_table, summarize, time_in_turns
from benchmarks.speed.prioritized import fill
from benchmarks.speed.random_tasks import RandomTasksEnv
from sb3_mtrl import MTSAC, STARSSAC, PaCoSAC
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.checkpoint_store import ROWS, CheckpointStore
from sb3_mtrl.common.vec_env import VecTaskAssignment

NUM_TASKS = 10


def size_mb(folder: Path) -> float:
    """
    :param folder: A folder
    :return: Size of the files in it and below
    """
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure(algorithm: type[MTSAC], n_rows: int, n_new_rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    def make_model() -> MTSAC:
        env = VecTaskAssignment(DummyVecEnv([lambda: RandomTasksEnv(NUM_TASKS)] * NUM_TASKS))
        return algorithm("MlpPolicy", env, buffer_size=n_rows, learning_starts=n_rows, seed=0, device="cpu")

    model = make_model()
    callback = MultiTaskCheckpointCallback(1_000_000, folder / "ours", keep=1)
    model.learn(NUM_TASKS, callback=callback)
    fill(model.replay_buffer)  # type: ignore[arg-type]
    model.learn(NUM_TASKS, callback=callback)
    sizes: dict[str, float] = {}
    env_step = model.env.step(np.zeros((NUM_TASKS, 4), dtype=np.float32))  # type: ignore[union-attr]

    def timed(save: Callable[[], Any]) -> float:
        start = time.perf_counter()
        save()
        return time.perf_counter() - start

    def save_with_sb3() -> None:
        target = folder / "sb3"
        target.mkdir(exist_ok=True)
        model.save(target / "model.zip")
        model.save_replay_buffer(target / "replay_buffer.pkl")
        sizes["SB3: save and save_replay_buffer"] = size_mb(target)

    def save_all() -> float:
        shutil.rmtree(folder / "ours")
        callback._store = CheckpointStore(folder / "ours", 1)
        seconds = timed(lambda: callback._save(at_rollout_start=True))
        sizes["checkpoint, all rows"] = size_mb(folder / "ours")
        return seconds

    def save_new() -> float:
        obs, rewards, dones, infos = env_step
        for _ in range(n_new_rows // NUM_TASKS):
            model.replay_buffer.add(obs, obs, np.zeros((NUM_TASKS, 4)), rewards, dones, infos)  # type: ignore[union-attr, arg-type]
        before = size_mb(folder / "ours")
        seconds = timed(lambda: callback._save(at_rollout_start=True))
        checkpoint = Path(str(model.last_checkpoint))
        # Its rows are in the folder beside it
        rows = max((folder / "ours" / ROWS).iterdir()).stat().st_size / 1e6
        assert size_mb(folder / "ours") > before
        sizes[f"checkpoint, {n_new_rows} new rows"] = size_mb(checkpoint) + rows
        return seconds

    def restore() -> float:
        new_model = make_model()
        resume = MultiTaskCheckpointCallback(1_000_000, folder / "ours", keep=1, resume="auto")
        new_model.learn(0, callback=[])
        resume.init_callback(new_model)
        return timed(lambda: resume.start_training(resume))

    def load_with_sb3() -> None:
        algorithm.load(folder / "sb3" / "model.zip", device="cpu").load_replay_buffer(folder / "sb3" / "replay_buffer.pkl")

    variants: Variants = {
        "SB3: save and save_replay_buffer": save_with_sb3,
        "checkpoint, all rows": save_all,
        f"checkpoint, {n_new_rows} new rows": save_new,
    }
    title = f"{algorithm.__name__}, {n_rows} transitions"
    table = print_table(f"{title}: saving", summarize(time_in_turns(variants, rounds)))
    for name, size in sizes.items():
        table[name]["MB"] = round(size, 1)
        print(f"{name:40s} {size:8.1f} MB")
    loading = time_in_turns({"SB3: load and load_replay_buffer": load_with_sb3, "resume": restore}, max(rounds // 2, 1))
    return {"saving": table, "loading": print_table(f"{title}: loading", summarize(loading))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions in the buffer (default: %(default)s)")
    parser.add_argument(
        "--new-rows", type=int, default=10_000, help="of them since the last checkpoint (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/speed/checkpoint.json"))
    args = parser.parse_args()
    th.set_num_threads(1)
    machine = machine_line()
    print(f"sb3_mtrl {sb3_mtrl.__version__}, {machine}, {args.rounds} rounds")
    results: dict[str, Any] = {"machine": machine, "rounds": args.rounds, "date": time.strftime("%Y-%m-%d")}
    for algorithm in (PaCoSAC, STARSSAC):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results[algorithm.__name__] = measure(algorithm, args.rows, args.new_rows, args.rounds, Path(folder))
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
