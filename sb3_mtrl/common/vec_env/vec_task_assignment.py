from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_mtrl.common.utils import check_integer, get_num_tasks


def split_tasks(num_tasks: int, n_envs: int, index: int) -> list[int]:
    """
    The tasks of one sub-environment. Every task is given to at least one of them, and as evenly as ``n_envs`` allows:
    with ``n_envs == num_tasks`` sub-environment i *is* task i.

    :param num_tasks: Number of tasks T
    :param n_envs: Number of sub-environments
    :param index: Which sub-environment, in [0, n_envs)
    :return: Its task ids
    :raises ValueError: if there is no task or no such sub-environment
    """
    num_tasks = check_integer("num_tasks", num_tasks, 1)
    n_envs = check_integer("n_envs", n_envs, 1)
    index = check_integer("index", index, 0, n_envs - 1)
    if n_envs >= num_tasks:
        return [index % num_tasks]
    return list(range(index, num_tasks, n_envs))


class VecTaskAssignment(VecEnvWrapper):
    """
    Gives each sub-environment its share of the tasks (see :func:`split_tasks`), from the next reset on.

    Without it each sub-environment visits all tasks in turn, and has to hold the simulation of every one of them.

    :param venv: Vector environment, of one or more sub-environments that have ``num_tasks`` and ``set_tasks(task_ids)``
    :raises ValueError: if the sub-environments have no ``set_tasks``
    """

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        # Ask first: calling a missing method ends the worker of a SubprocVecEnv
        if not (venv.has_attr("set_tasks") and venv.has_attr("num_tasks")):
            raise ValueError(
                "VecTaskAssignment needs sub-environments with the attribute num_tasks and the method set_tasks(task_ids), "
                "as the environments MetaWorld-...-v3 have; these have not, use them without VecTaskAssignment"
            )
        num_tasks = get_num_tasks(venv)
        self.task_assignment = [split_tasks(num_tasks, self.num_envs, index) for index in range(self.num_envs)]
        for index, task_ids in enumerate(self.task_assignment):
            venv.env_method("set_tasks", task_ids, indices=index)

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()
