import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_mtrl.common.evaluation import MultiTaskEvaluation, format_task_table, task_id_of_step
from sb3_mtrl.common.utils import get_num_tasks, get_task_names


class VecTaskReport(VecEnvWrapper):
    """
    Print a table of the episodes of each task when the environment is closed; nothing else is changed.

    :param venv: A multi-task vector environment with ``Monitor`` wrappers
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.num_tasks = get_num_tasks(venv)
        self.task_names = get_task_names(venv)
        # (task id, return, length, success) of each episode
        self.episodes: list[tuple[int, float, int, float]] = []

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for done, info in zip(dones, infos, strict=True):
            if done and "episode" in info:
                task_id = task_id_of_step(info, info.get("terminal_observation"), self.num_tasks)
                success = float(info.get("is_success", np.nan))
                self.episodes.append((task_id, float(info["episode"]["r"]), int(info["episode"]["l"]), success))
        return observations, rewards, dones, infos

    def close(self) -> None:
        if self.episodes:
            print(self.format_report())
            self.episodes.clear()
        super().close()

    def format_report(self) -> str:
        """
        :return: The table of the tasks that had an episode, and how many had none
        """
        task_ids, returns, lengths, successes = (np.array(column) for column in zip(*self.episodes, strict=True))
        visited, rows = np.unique(task_ids, return_inverse=True)
        names = tuple(self.task_names[task_id] for task_id in visited)
        table = format_task_table(MultiTaskEvaluation(names, rows, returns, lengths, successes))
        n_missing = self.num_tasks - len(visited)
        if n_missing == 0:
            return table
        return f"{table}\n{n_missing} of {self.num_tasks} tasks had no complete episode (run more steps to see them)"
