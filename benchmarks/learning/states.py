"""
What does the recurrent state do to CMTA's policy? A trained CMTASAC with its memory, and without it.

    python -m benchmarks.learning.states logs/cpu_suite/cmtasac/MetaWorld-Custom-v3_1/MetaWorld-Custom-v3.zip \\
        --tasks reach-v3 drawer-close-v3 button-press-topdown-v3 window-open-v3 door-close-v3

Without: at every step the policy acts as at the first of an episode. The LSTM learns from single steps, on states that its
former weights made, and no loss bounds its cell; how large that gets over an episode is printed below the table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th

from sb3_mtrl import CMTASAC, make_multi_task_vec_env
from sb3_mtrl.cmtasac.policies import RecurrentState
from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy, format_task_table

STEPS = (1, 50, 150, 300, 500)


class StateWatcher:
    """
    A policy whose recurrent state is looked at, or taken away.

    :param model: A model with temporal attention
    :param with_memory: Whether the state goes from step to step
    """

    def __init__(self, model: CMTASAC, with_memory: bool):
        self.model = model
        self.with_memory = with_memory
        # Largest entry of the cell after each step of an episode
        self.largest_cell = np.zeros(max(STEPS))
        self._step = np.zeros(0, dtype=int)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, RecurrentState | None]:
        """
        :param observation: See ``CMTAPolicy.predict``
        :param state: See ``CMTAPolicy.predict``; not looked at without memory
        :param episode_start: Where an episode begins ``(n_envs,)``
        :param deterministic: Whether to return deterministic actions
        :return: The actions and the state after them
        """
        actions, state = self.model.predict(observation, state if self.with_memory else None, episode_start, deterministic)
        assert state is not None and episode_start is not None
        self._step = np.where(episode_start, 0, self._step + 1) if len(self._step) else np.zeros(len(episode_start), dtype=int)
        is_watched = self._step < len(self.largest_cell)
        np.maximum.at(self.largest_cell, self._step[is_watched], np.abs(state[1][0]).max(axis=1)[is_watched])
        return actions, state


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Print success and return of each task with and without memory.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="zip file of a CMTASAC with temporal attention")
    parser.add_argument("--tasks", nargs="+", required=True, help="the tasks that it knows, in their order")
    parser.add_argument("--episodes", type=int, default=50, help="of each task, one per goal (default: %(default)s)")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)  # batches of a few rows
    model = CMTASAC.load(args.model, device="cpu")
    if model.num_tasks != len(args.tasks):
        parser.error(f"argument --tasks: must be the {model.num_tasks} tasks of the model, got {len(args.tasks)}")
    evaluations = {}
    for name, with_memory in (("with memory", True), ("without", False)):
        env_kwargs = {"tasks": args.tasks, "goals": "cycle"}
        env = make_multi_task_vec_env("MetaWorld-Custom-v3", len(args.tasks), env_kwargs=env_kwargs)
        watcher = StateWatcher(model, with_memory)
        evaluations[name] = evaluate_multi_task_policy(watcher, env, args.episodes, seed=DEFAULT_EVAL_SEED)
        env.close()
        if with_memory:
            sizes = ", ".join(f"{watcher.largest_cell[step - 1]:.1f} after step {step}" for step in STEPS)
    print(format_task_table(evaluations))
    print(f"largest entry of the LSTM's cell: {sizes}")


if __name__ == "__main__":
    main()
