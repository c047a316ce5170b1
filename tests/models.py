"""Small models on small environments, and a guard, for the tests."""

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.type_aliases import TaskLosses
from sb3_mtrl.common.vec_env import VecTaskAssignment
from tests.tiny_envs import PointTasksEnv

NUM_TASKS = 3
ALGORITHMS = [MTSAC, PaCoSAC, CMTASAC, TSACSAC, STARSSAC]


def make_env(num_tasks: int = NUM_TASKS, n_envs: int | None = None, **kwargs) -> VecTaskAssignment:
    n_envs = num_tasks if n_envs is None else n_envs
    return VecTaskAssignment(DummyVecEnv([lambda: PointTasksEnv(num_tasks, **kwargs) for _ in range(n_envs)]))


def make_model(algorithm: type[MTSAC] = MTSAC, env=None, collect: int = 0, **kwargs) -> MTSAC:
    settings = dict(seed=0, batch_size=24, learning_starts=10_000, device="cpu")
    settings.update(kwargs)
    settings["policy_kwargs"] = {"net_arch": [16, 16], **settings.get("policy_kwargs", {})}
    model = algorithm("MlpPolicy", env if env is not None else make_env(), **settings)
    if collect:
        model.learn(collect)
    return model


def parameters_of(model: SAC) -> dict[str, th.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.policy.state_dict().items()}


class DropTasks:
    """A guard that always drops the same tasks."""

    def __init__(self, dropped: list[bool]):
        self.dropped = th.tensor(dropped)
        self.seen: list[TaskLosses] = []
        self.after: list[th.Tensor] = []

    def drop_tasks(self, task_losses: TaskLosses) -> th.Tensor:
        self.seen.append(task_losses)
        return self.dropped

    def after_update(self, dropped: th.Tensor) -> None:
        self.after.append(dropped)

    def log_to(self, logger: Logger, task_names: tuple[str, ...]) -> None:
        pass
