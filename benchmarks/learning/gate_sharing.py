"""
Which attention should CMTASAC's actor use? The modes of ``gate_sharing``, and no memory at all, on real Meta-World tasks.

    python -m benchmarks.learning.gate_sharing --steps 40000 --seeds 3

Four easy tasks, small networks, the hyperparameters that ``hyperparams/cmtasac.yml`` has for them. Each finished
run is one line of ``gate_sharing.csv``; a run that is there is not repeated. ``--results my_gate_sharing.csv`` starts from
nothing.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from benchmarks.learning.memory import VARIANTS
from benchmarks.learning.results import append_result, read_results, tell_of_skipped
from sb3_mtrl import CMTASAC, make_multi_task_vec_env
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy

ENV_ID = "MetaWorld-Quickstart-v3"
RESULTS = Path(__file__).with_name("gate_sharing.csv")


def train(variant: str, seed: int, steps: int, n_eval_episodes_per_task: int) -> dict[str, Any]:
    """
    :param variant: Name in ``VARIANTS``
    :param seed: Seed of environments and model
    :param steps: Environment steps over all tasks
    :param n_eval_episodes_per_task: Episodes of the deterministic final policy
    :return: A row of the results: the mean over tasks of success rate and return, the success rate of each task, seconds
    """
    start = time.perf_counter()
    model = CMTASAC(
        "MlpPolicy",
        make_multi_task_vec_env(ENV_ID, n_envs=4, seed=seed),
        learning_rate=1e-3,
        buffer_size=200_000,
        learning_starts=1200,
        batch_size=256,
        policy_kwargs=dict(net_arch=[128, 128], log_std_squash="clip"),
        seed=seed,
        device="cpu",
        **VARIANTS[variant],
    ).learn(steps)
    eval_env = make_multi_task_vec_env(ENV_ID, n_envs=4, seed=seed + 1000)
    evaluation = evaluate_multi_task_policy(model, eval_env, n_eval_episodes_per_task, seed=seed + 1000)
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "success": round(evaluation.mean_success, 4),
        "return": round(evaluation.mean_reward, 1),
        **dict(zip(evaluation.task_names, evaluation.success_rates.round(4).tolist(), strict=True)),
        "seconds": round(time.perf_counter() - start),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is missing and print a table.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps (default: 40000)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--eval-episodes", type=int, default=25, help="final episodes per task (default: 25)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name} beside this file")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)  # the networks are small
    runs = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    done = {(row["variant"], row["seed"], row["steps"]) for row in read_results(args.results)}
    missing = [(variant, seed) for variant, seed in runs if (variant, str(seed), str(args.steps)) not in done]
    tell_of_skipped(len(runs) - len(missing), args.results, "--results OTHER.csv")
    for variant, seed in missing:
        append_result(args.results, train(variant, seed, args.steps, args.eval_episodes))
    rows = [row for row in read_results(args.results) if row["steps"] == str(args.steps)]
    print(f"{ENV_ID}, {args.steps} steps: mean success of the tasks, median [lowest, highest] over seeds; mean return")
    for variant in args.variants:
        success = [float(row["success"]) for row in rows if row["variant"] == variant]
        returns = [float(row["return"]) for row in rows if row["variant"] == variant]
        print(
            f"{variant:<10} {np.median(success):4.0%} [{min(success):.0%}, {max(success):.0%}]  "
            f"{np.median(returns):6.0f} [{min(returns):.0f}, {max(returns):.0f}]  ({len(success)} seeds)"
        )


if __name__ == "__main__":
    main()
