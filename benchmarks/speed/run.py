"""
Speed as ratios: ``python -m benchmarks.speed.run`` (``make bench``).

The variants of a table take turns, each round in another order; a ratio is the median over the rounds of the first variant's
time by this one's. Absolute times depend on the machine and on what else it does: quote the ratios. Other people's learners
and ours run in processes of their own, so that what ``cpu_tuning`` sets helps ours only. With ``--cores 1 --clock
process_time`` the figures of updates (``--only``) hold even where other programs run; this clock counts no time of worker
processes, and is refused for whole trainings. Sections of the output that are not measured stay as they are.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

import sb3_mtrl
from benchmarks.speed import prioritized, simulator
from benchmarks.speed.measure import (
    Program,
    Table,
    Variants,
    machine_line,
    memory_of_processes,
    print_table,
    report,
    summarize,
    time_in_turns,
)
from benchmarks.speed.peers import peer_python
from benchmarks.speed.random_tasks import ACTION_DIM, OBS_DIM
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.cpu_tuning import bfloat16_probe
from sb3_mtrl.common.vec_env import make_multi_task_vec_env
from sb3_mtrl.zoo.algorithms import ALGORITHMS

# Sections of whole trainings, whose sub-environments may run in processes of their own
LOOPS = ("loop", "loop_of_small_networks")


class Learners:
    """
    Learners in processes of their own that are timed in turns.

    :param rounds: How often each is timed
    :param seconds: No more rounds for one table after this time
    :param n_cores: Cores of each learner; None: all
    :param clock: "perf_counter" or "process_time"
    """

    def __init__(self, rounds: int, seconds: float, n_cores: int | None, clock: str):
        self.rounds, self.seconds, self.n_cores, self.clock = rounds, seconds, n_cores, clock

    def compare(
        self,
        title: str,
        programs: list[dict[str, dict[str, Any]]],
        units: int,
        sbx: list[int] | None = None,
        skipped: Table | None = None,
        cost_in: str | None = None,
    ) -> Table:
        """
        :param title: Title of the table
        :param programs: For each process the arguments of its learners by name, see ``benchmarks.speed.learners``; what the
            others are compared with is the fastest of those whose name begins with "SB3", or the first one without such
        :param units: Updates or steps per call
        :param sbx: Arguments of SBX's SAC, None: without
        :param skipped: What is not measured, with the reason
        :param cost_in: A learner in whose time the rows tell theirs, too, as ``cost`` and ``cost_quartiles``; None: without
        :return: The table
        """
        names = [name for learners in programs for name in learners]
        commands = [
            [sys.executable, "-m", "benchmarks.speed.learners", json.dumps({"clock": self.clock, "learners": learners})]
            for learners in programs
        ]
        started: list[Program] = []
        variants: Variants = {}
        skipped = dict(skipped or {})
        try:
            for learners, command in zip(programs, commands, strict=True):
                program = Program(command, self.n_cores)
                started.append(program)
                variants.update({name: lambda name=name, program=program: program.call(name) for name in learners})  # type: ignore[misc]
            if sbx is not None:
                try:
                    arguments = [str(argument) for argument in sbx]
                    command = [peer_python("sbx"), "-m", "benchmarks.speed.sbx_learner", *arguments, self.clock]
                    started.append(Program(command, self.n_cores))
                    variants["SBX SAC (JAX)"] = lambda: started[-1].call("update")
                except (RuntimeError, OSError) as e:
                    skipped["SBX SAC (JAX)"] = {"skipped": str(e)}
            seconds = time_in_turns(variants, self.rounds, seconds_at_most=self.seconds)
        finally:
            for program in started:
                program.close()
        stock = [name for name in names if name.startswith("SB3")]
        reference = min(stock or names[:1], key=lambda name: np.median(seconds[name]))
        table = summarize(seconds, units, reference=reference)
        if cost_in is not None:
            for name, row in table.items():
                low, cost, high = np.percentile(seconds[name] / seconds[cost_in], [25, 50, 75])
                row.update(cost=float(cost), cost_quartiles=[float(low), float(high)])
        print_table(title, {**table, **skipped})
        if cost_in is not None:
            print(f"time in updates of {cost_in}:", ", ".join(f"{name} {row['cost']:.2f}" for name, row in table.items()))
        return {**table, **skipped}

    def updates(self, num_tasks: int, batch_size: int, n_updates: int) -> Table:
        """All algorithms of the zoo, and what they are compared with."""

        def learner(algorithm: str, **kwargs: Any) -> dict[str, Any]:
            return dict(algorithm=algorithm, num_tasks=num_tasks, batch_size=batch_size, n_updates=n_updates, kwargs=kwargs)

        ours = {info.algorithm_class.__name__: learner(name) for name, info in ALGORITHMS.items()}
        skipped = {}
        if (speedup := bfloat16_probe().speedup) >= 1:
            ours["MTSAC bfloat16"] = learner("mtsac", amp="bf16")
        else:
            reason = f"this CPU multiplies in bfloat16 at {speedup:.2f} times the speed of float32"
            skipped["MTSAC bfloat16"] = {"skipped": reason}
        ours["PaCoSAC K=20"] = learner("pacosac", n_param_sets=20)
        programs = [
            {"SB3 SAC": learner("sb3")},
            {"bare PyTorch loop": learner("bare")},
            {"its matrix products alone": learner("products")},
            {"MTSAC cpu_tuning=False": learner("mtsac", cpu_tuning=False)},
            ours,
        ]
        title = f"one update: {num_tasks} tasks, batch {batch_size}, 3 x 400"
        return self.compare(title, programs, n_updates, [num_tasks, batch_size, n_updates], skipped, cost_in="MTSAC")

    def scaling(self, title: str, learners: dict[str, dict[str, Any]], n_updates: int = 1) -> Table:
        """Learners of ours in one process."""
        return self.compare(title, [{name: {"n_updates": n_updates, **rest} for name, rest in learners.items()}], n_updates)

    def over_tasks(self) -> Table:
        """128 rows per task, the one dimension that users cannot choose."""
        settings = [(algorithm, num_tasks) for algorithm in ("mtsac", "pacosac") for num_tasks in (1, 3, 10, 25, 50)]
        learners = {
            f"{ALGORITHMS[algorithm].algorithm_class.__name__} T={num_tasks}": dict(
                algorithm=algorithm, num_tasks=num_tasks, batch_size=128 * num_tasks, kwargs={}
            )
            for algorithm, num_tasks in settings
        }
        return self.scaling("one update over T, 128 rows per task", learners)

    def over_param_sets(self) -> Table:
        learners = {
            f"PaCoSAC K={k}": dict(algorithm="pacosac", num_tasks=10, batch_size=1280, kwargs={"n_param_sets": k})
            for k in (1, 5, 10, 20)
        }
        return self.scaling("one update over K: 10 tasks, batch 1280", learners)

    def over_experts(self) -> Table:
        learners = {
            f"CMTASAC k={k}": dict(algorithm="cmtasac", num_tasks=10, batch_size=1280, kwargs={"n_experts": k})
            for k in (1, 3, 6, 12)
        }
        return self.scaling("one update over k: 10 tasks, batch 1280", learners)

    def over_batch(self) -> Table:
        settings = [(algorithm, batch) for algorithm in ("mtsac", "pacosac") for batch in (320, 1280, 5120)]
        learners = {
            f"{ALGORITHMS[algorithm].algorithm_class.__name__} B={batch}": dict(
                algorithm=algorithm, num_tasks=10, batch_size=batch, kwargs={}
            )
            for algorithm, batch in settings
        }
        return self.scaling("one update over the batch: 10 tasks", learners)

    def loops(self) -> Table:
        """Networks and batches of the papers' size: an update is most of the time."""
        return self._loops("3 x 400, 1280 rows", 10, dict(batch_size=1280))

    def loops_of_small_networks(self) -> Table:
        """Of the size that a CPU trains in minutes; more threads than one slow such networks down."""
        settings = dict(batch_size=320, net_arch=(128, 128), n_threads=1)
        return self._loops("2 x 128, 320 rows, one thread", 60, settings)

    def _loops(self, size: str, n_vector_steps: int, settings: dict[str, Any]) -> Table:
        """
        Training on MT10: one update for ten environment steps.

        :param size: What the title says of networks and batches
        :param n_vector_steps: Steps of the vector environment per call
        :param settings: Further arguments of ``benchmarks.speed.learners.make_loop``
        :return: The table
        """

        def loop(algorithm: str, vec_env: str, env_kwargs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            arguments = dict(suite="MT10", n_vector_steps=n_vector_steps, kwargs=kwargs, **settings)
            return dict(algorithm=algorithm, vec_env=vec_env, env_kwargs=env_kwargs, **arguments)

        stock = {"fast": False}  # Meta-World's own simulation
        learners = {
            "SB3 SAC, stock, Dummy": loop("sb3", "dummy", stock),
            "SB3 SAC, stock, Subproc": loop("sb3", "subproc", stock),
            "MTSAC, Dummy": loop("mtsac", "dummy", {}),
            "MTSAC, shared": loop("mtsac", "shared", {}),
            "MTSAC, shared, overlap": loop("mtsac", "shared", {}, overlap=True),
            "PaCoSAC, shared": loop("pacosac", "shared", {}),
            "PaCoSAC, shared, overlap": loop("pacosac", "shared", {}, overlap=True),
        }
        programs = [{name: arguments} for name, arguments in learners.items()]
        return self.compare(f"one environment step of training on MT10: {size}", programs, 10 * n_vector_steps)


def measure_replay(rounds: int, num_tasks: int = 10, batch_size: int = 1280, n_samples: int = 100) -> Table:
    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    plain = ReplayBuffer(100_000, observation_space, action_space, "cpu", n_envs=num_tasks)
    multi_task = MultiTaskReplayBuffer(100_000, observation_space, action_space, "cpu", n_envs=num_tasks, num_tasks=num_tasks)
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        base = rng.normal(size=(num_tasks, OBS_DIM)).astype(np.float32)
        obs = np.concatenate([base, np.eye(num_tasks, dtype=np.float32)], axis=1)
        step = (
            obs,
            obs,
            rng.uniform(-1, 1, (num_tasks, ACTION_DIM)),
            np.ones(num_tasks),
            np.zeros(num_tasks),
            [{}] * num_tasks,
        )
        plain.add(*step)
        multi_task.add(*step)
    variants: Variants = {
        "SB3 ReplayBuffer": lambda: [plain.sample(batch_size) for _ in range(n_samples)],
        "MultiTaskReplayBuffer": lambda: [multi_task.sample(batch_size) for _ in range(n_samples)],
    }
    return report(f"one sample of {batch_size} rows, {num_tasks} tasks", time_in_turns(variants, rounds), n_samples)


def array_bytes(buffer: ReplayBuffer) -> int:
    """
    :param buffer: A replay buffer in main memory
    :return: Bytes of its arrays
    """
    rows = buffer._storage.host_bytes if isinstance(buffer, MultiTaskReplayBuffer) else 0
    return rows + sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray))


def replay_megabytes(num_tasks: int, n_rows: int) -> dict[str, float]:
    """
    :param num_tasks: Number of tasks T, and of sub-environments
    :param n_rows: Transitions
    :return: Megabytes of SB3's replay buffer and of ours, by name
    """
    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    megabytes = {}
    for buffer_class, kwargs in ((ReplayBuffer, {}), (MultiTaskReplayBuffer, {"num_tasks": num_tasks})):
        arguments: tuple[Any, ...] = (observation_space, action_space, "cpu", num_tasks)
        small, large = (array_bytes(buffer_class(n, *arguments, **kwargs)) for n in (1000, 2000))
        # What does not grow with the rows is small
        megabytes[f"{buffer_class.__name__} T={num_tasks}"] = (large - small) / 1000 * n_rows / 1e6
    return megabytes


def env_megabytes(vec_env: str, n_envs: int) -> float:
    """
    :param vec_env: "dummy", "subproc" or "shared"
    :param n_envs: Number of sub-environments on MT10
    :return: Megabytes that they add to this process, those of their own processes included (Linux)
    """
    before = memory_of_processes()
    venv = make_multi_task_vec_env("MT10", n_envs, seed=0, vec_env=vec_env)
    venv.reset()
    megabytes = (memory_of_processes() - before) / 1e6
    venv.close()
    return megabytes


def measure_memory(n_rows: int = 1_000_000, n_envs: Sequence[int] = (1, 10, 20)) -> dict[str, float]:
    """
    :param n_rows: Transitions of the replay buffers
    :param n_envs: Numbers of sub-environments
    :return: Megabytes of replay buffers over T, and of MT10's environments over their number
    """
    megabytes = {}
    for num_tasks in (1, 10, 50):
        megabytes.update(replay_megabytes(num_tasks, n_rows))
    if Path("/proc/self/smaps_rollup").exists():
        for vec_env, n in itertools.product(("dummy", "subproc", "shared"), n_envs):
            # In a new process: memory that this one has from what it did before would be counted as none
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                megabytes[f"MT10, {vec_env}, n_envs={n}"] = pool.submit(env_megabytes, vec_env, n).result()
    print(f"\nmemory, MB ({n_rows} transitions)")
    for name, size in megabytes.items():
        print(f"{name:40s} {size:8.0f}")
    return megabytes


def plot(results: dict[str, Any], path: Path) -> None:
    """
    :param results: What ``main`` writes
    :param path: File of the picture
    """
    from matplotlib.figure import Figure

    bars = [("update", "updates, 10 tasks"), ("update_50_tasks", "updates, 50 tasks"), ("loop", "training on MT10")]
    bars += [("loop_of_small_networks", "training on MT10,\nsmall networks")]
    bars = [(key, title) for key, title in bars if key in results]
    if not bars:
        return
    figure = Figure(figsize=(4.5 * len(bars), 4), layout="constrained")
    for axes, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(bars))), bars, strict=True):
        rows = {name: row for name, row in results[key].items() if "skipped" not in row}
        ratios = [row["speed_ratio"] for row in rows.values()]
        spread = np.abs(np.array([row["ratio_quartiles"] for row in rows.values()]).T - ratios)
        axes.barh(list(rows), ratios, xerr=spread)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        reference = next(name for name, row in rows.items() if row["ratio_quartiles"] == [1, 1])
        axes.set(title=title, xlabel=f"speed by that of\n{reference}")
    machines = sorted({results["conditions"][key]["machine"] for key, _ in bars})
    figure.suptitle("\n".join(textwrap.fill(machine, 70 * len(bars)) for machine in machines), fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=40.0, help="no more rounds for a table after this time")
    parser.add_argument("--cores", type=int, default=None, help="cores of each learner (default: all)")
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections of the results only")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/speed/results.json"))
    args = parser.parse_args()
    learners = Learners(args.rounds, args.seconds, args.cores, args.clock)
    sections = {
        "update": lambda: learners.updates(num_tasks=10, batch_size=1280, n_updates=3),
        "update_50_tasks": lambda: learners.updates(num_tasks=50, batch_size=6400, n_updates=1),
        "over_tasks": learners.over_tasks,
        "over_param_sets": learners.over_param_sets,
        "over_experts": learners.over_experts,
        "over_batch": learners.over_batch,
        "loop": learners.loops,
        "loop_of_small_networks": learners.loops_of_small_networks,
        "replay": lambda: measure_replay(args.rounds),
        "prioritized": lambda: prioritized.measure_replay(args.rounds, num_tasks=10, batch_size=1280),
        "simulator": lambda: simulator.measure(args.rounds),
        "memory": measure_memory,
    }
    if unknown := set(args.only or ()) - set(sections):
        parser.error(f"--only must name sections of {', '.join(sections)}, got {', '.join(sorted(unknown))}")
    uncounted = [name for name in LOOPS if name in (args.only or sections)]
    if args.clock == "process_time" and uncounted:
        parser.error(
            "--clock process_time leaves out the processes of the vector environments: --only must leave out "
            f"{', '.join(LOOPS)}, got {', '.join(uncounted)}"
        )
    cores = "all" if args.cores is None else args.cores
    print(f"sb3_mtrl {sb3_mtrl.__version__}: {machine_line()}; {cores} cores per learner, {args.rounds} rounds, {args.clock}")
    conditions = {
        "machine": machine_line(),
        "threads": th.get_num_threads(),
        "cores_per_learner": args.cores,
        "clock": args.clock,
        "rounds_at_most": args.rounds,
        "date": time.strftime("%Y-%m-%d"),
    }
    # What is not measured now stays, with the conditions that it was measured under
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"conditions": {}}
    for name, measure in sections.items():
        if args.only is None or name in args.only:
            results[name] = measure()
            results["conditions"][name] = conditions
            args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}", end="")
    try:
        plot(results, args.output.with_suffix(".png"))
        print(f" and {args.output.with_suffix('.png')}")
    except ImportError as e:
        print(f"; no picture: {e}")


if __name__ == "__main__":
    main()
