"""
Speed of the Meta-World environments: ``python -m benchmarks.speed.simulator``.

* one step and one reset, Meta-World's own code against the fast one and EnvPool's simulation in C++ (installed below
  ``.cache``, left out where that fails), means over MT10, in CPU time of the process; "physics alone" is what remains if
  everything but MuJoCo's step and forward pass is left out;
* one environment step in the vector environments on MT10, in wall-clock time, which needs a quiet machine, and in CPU time of
  this process and its workers (Linux).

How is said in ``benchmarks.speed.measure``. Quote the ratios and the load average, not the times.
"""

import argparse
import json
import multiprocessing as mp
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

import sb3_mtrl
from benchmarks.speed.measure import (
    Program,
    Table,
    Variants,
    machine_line,
    print_table,
    report,
    summarize,
    time_in_turns,
)
from benchmarks.speed.peers import peer_python
from sb3_mtrl.common.vec_env import make_multi_task_vec_env
from sb3_mtrl.envs import MetaWorldMultiTaskEnv, list_tasks
from sb3_mtrl.envs.metaworld import N_GOALS

TASKS = list_tasks("MT10")
NO_END = 10**9
N_STEPS = 100  # of each task per call, in CPU time


@contextmanager
def start_envpool() -> Iterator[Program | str]:
    """EnvPool's program, or the reason why there is none."""
    # "button-press-topdown-v3" is "ButtonPressTopdown-v3" there
    names = ["".join(word.capitalize() for word in name.split("-")[:-1]) + "-v3" for name in TASKS]
    try:
        program = Program([peer_python("envpool"), "-m", "benchmarks.speed.envpool_simulator", str(N_STEPS), *names])
    except (RuntimeError, OSError) as e:
        yield str(e)
        return
    try:
        yield program
    finally:
        program.close()


def report_with_envpool(title: str, variants: Variants, rounds: int, units: int, envpool: Program | str, call: str) -> Table:
    """Time variants of this process and a call of EnvPool's program in turns."""
    skipped: Table = {}
    if isinstance(envpool, Program):
        variants = {**variants, "EnvPool": lambda: envpool.call(call)}
    else:
        skipped["EnvPool"] = {"skipped": envpool}
    table = summarize(time_in_turns(variants, rounds, time.process_time), units)
    return print_table(title, {**table, **skipped})


def random_actions(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 4)).astype(np.float32)


def cpu_time() -> float:
    """CPU time of this process and its workers."""
    total = time.process_time()
    for process in mp.active_children():
        total += int(Path(f"/proc/{process.pid}/schedstat").read_text(encoding="ascii").split()[0]) * 1e-9
    return total


def wall_and_cpu_time() -> np.ndarray:
    return np.array([time.perf_counter(), cpu_time() if sys.platform == "linux" else np.nan])


def make_envs(fast: bool, goals: str = "fixed") -> list[MetaWorldMultiTaskEnv]:
    envs = [MetaWorldMultiTaskEnv(task_name, fast=fast, goals=goals, horizon=NO_END) for task_name in TASKS]
    for env in envs:
        env.reset(seed=0)
    return envs


def step_physics(env: MetaWorldMultiTaskEnv, actions: np.ndarray) -> None:
    """What of a step cannot be left out."""
    simulation: Any = env._env
    for action in actions:
        simulation.set_xyz_action(action[:3])
        simulation.data.ctrl[:] = action[3], -action[3]
        mujoco.mj_step(simulation.model, simulation.data, nstep=simulation.frame_skip)
        mujoco.mj_forward(simulation.model, simulation.data)


def measure_steps(rounds: int, envpool: Program | str) -> Table:
    actions = random_actions(N_STEPS)

    def step_all(envs: list[MetaWorldMultiTaskEnv]) -> None:
        for env in envs:
            for action in actions:
                env.step(action)

    stock, fast, physics = make_envs(False), make_envs(True), make_envs(True)
    variants: Variants = {
        "fast=False": lambda: step_all(stock),
        "fast=True": lambda: step_all(fast),
        "physics alone": lambda: [step_physics(env, actions) for env in physics],
    }
    return report_with_envpool("one step, mean over MT10", variants, rounds, N_STEPS * len(TASKS), envpool, "step")


def measure_resets(rounds: int, envpool: Program | str) -> Table:
    """
    To goals that were visited before, as nearly all of them are in a training; and to new ones, as EnvPool draws one each
    time. For Meta-World's own code they are the same.
    """
    stock, fast, fast_to_new_goals = make_envs(False), make_envs(True), make_envs(True, goals="cycle")
    variants: Variants = {
        "fast=False": lambda: [env.reset() for env in stock],
        "fast=True": lambda: [env.reset() for env in fast],
        "fast=True, new goal": lambda: [env.reset() for env in fast_to_new_goals],
    }
    # So many goals are left after those of make_envs and of the first, untimed call
    rounds = min(rounds, N_GOALS - 2)
    return report_with_envpool("one reset, mean over MT10", variants, rounds, len(TASKS), envpool, "reset")


def measure_vec_envs(rounds: int, n_steps: int = 50, n_workers: int | None = None) -> dict[str, Any]:
    """Steps without resets; one sub-environment per task."""
    actions = random_actions(n_steps, len(TASKS))
    venvs = {}
    for fast in (False, True):
        for kind in ("dummy", "subproc", "shared"):
            venvs[f"{kind}, fast={fast}"] = make_multi_task_vec_env(
                "MT10",
                n_envs=len(TASKS),
                seed=0,
                env_kwargs={"fast": fast, "horizon": NO_END},
                vec_env=kind,
                n_workers=n_workers if kind == "shared" else None,
            )

    def step(venv: Any) -> None:
        for vector_action in actions:
            venv.step(vector_action)

    try:
        for venv in venvs.values():
            venv.reset()
        variants: Variants = {name: lambda venv=venv: step(venv) for name, venv in venvs.items()}  # type: ignore[misc]
        seconds = time_in_turns(variants, rounds, wall_and_cpu_time)
    finally:
        for venv in venvs.values():
            venv.close()
    tables = {}
    for column, clock in enumerate(("wall", "CPU")):
        one_clock = {name: values[:, column] for name, values in seconds.items()}
        tables[clock] = report(f"one environment step in a vector of MT10, {clock} time", one_clock, n_steps * len(TASKS))
    return tables


def measure(rounds: int, n_workers: int | None = None) -> dict[str, Any]:
    """
    :param rounds: Rounds of each table
    :param n_workers: Workers of the shared-memory vector environment; None for the number of cores
    :return: All tables
    """
    with start_envpool() as envpool:
        tables = {"step": measure_steps(rounds, envpool), "reset": measure_resets(rounds, envpool)}
    return {**tables, "vec_env": measure_vec_envs(rounds, n_workers=n_workers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=None, help="of the shared-memory vector environment (default: cores)")
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this JSON file")
    args = parser.parse_args()
    machine = f"{machine_line()}, MuJoCo {mujoco.__version__}"
    print(f"sb3_mtrl {sb3_mtrl.__version__}, {machine}, {args.rounds} rounds")
    results = {
        "machine": machine,
        "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"),
        **measure(args.rounds, args.workers),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
