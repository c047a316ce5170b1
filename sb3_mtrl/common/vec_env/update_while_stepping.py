import time
from collections.abc import Callable

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class UpdateWhileStepping(VecEnvWrapper):
    """
    Calls a function between ``step_async`` and ``step_wait``, while sub-environments in other processes step.

    :param venv: Vector environment; only with workers (e.g. ``SubprocVecEnv``) anything happens at the same time
    :param update: What to call
    """

    def __init__(self, venv: VecEnv, update: Callable[[], None]):
        super().__init__(venv)
        self.update = update
        self.is_slower = False  # whether the last step had to be waited for longer than its update took

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        start = time.perf_counter()
        try:
            self.update()
        finally:  # the workers have made their step in any case, and their answer must not be taken for that to a later call
            updated = time.perf_counter()
            transitions = self.venv.step_wait()
        self.is_slower = time.perf_counter() - updated > updated - start
        return transitions
