from sb3_mtrl.common.vec_env.make import make_multi_task_vec_env, preload_worker_imports
from sb3_mtrl.common.vec_env.shared_memory_vec_env import SharedMemoryVecEnv, WorkerTraceback, balance_assignment
from sb3_mtrl.common.vec_env.update_while_stepping import UpdateWhileStepping
from sb3_mtrl.common.vec_env.vec_task_assignment import VecTaskAssignment, split_tasks
from sb3_mtrl.common.vec_env.vec_task_normalize import TaskMeanStd, VecTaskNormalize

__all__ = [
    "SharedMemoryVecEnv",
    "TaskMeanStd",
    "UpdateWhileStepping",
    "VecTaskAssignment",
    "VecTaskNormalize",
    "WorkerTraceback",
    "balance_assignment",
    "make_multi_task_vec_env",
    "preload_worker_imports",
    "split_tasks",
]
