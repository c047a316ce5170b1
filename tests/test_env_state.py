"""States of environments of all kinds; expected are the numbers of the environment that went on without a copy."""

import threading
import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_mtrl import MTSAC
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.vec_env.state import (
    StateNotAvailable,
    get_env_state,
    get_vec_env_state,
    set_env_state,
    set_vec_env_state,
)
from tests.models import make_env, make_model


class Counter:
    def __init__(self):
        self.count = 0


class CounterEnv(gym.Env):
    """Its names are those of attributes that wrappers have."""

    observation_space = gym.spaces.Box(-99, 99, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.env = Counter()
        self.spec, self.t_start, self.results_writer = None, 0, "nobody"

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.env.count = self.t_start = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.env.count += 1
        self.t_start += 2
        return np.array([self.env.count + self.t_start], np.float32), 0.0, False, False, {}


class Looking(gym.Wrapper):
    """Sees the innermost environment past the wrappers between, directly and from an object of its own."""

    def __init__(self, env):
        super().__init__(env)
        self.base = env.unwrapped
        self.method = env.unwrapped.__str__
        self.all = [self, env]

    def step(self, action):
        _, *rest = self.env.step(action)
        return np.array([self.base.env.count], np.float32), *rest


@pytest.mark.parametrize("make", [CounterEnv, lambda: Looking(Monitor(CounterEnv()))], ids=["adapter", "second reference"])
def test_attributes_with_any_name_and_references(make):
    env, copy = make(), make()
    env.reset()
    copy.reset()
    for _ in range(5):
        env.step(env.action_space.sample())
    set_env_state(copy, get_env_state(env))
    for _ in range(3):
        assert env.step(None)[0] == copy.step(None)[0]
    assert copy.unwrapped.results_writer == "nobody"
    if isinstance(copy, Looking):
        assert copy.base is copy.unwrapped and copy.method.__self__ is copy.unwrapped and copy.all == [copy, copy.env]


class Holding(gym.Env):
    """Neither a wrapper nor the environment itself."""

    def __init__(self, inner):
        self.inner = [inner]


def test_other_environments_inside():
    env, copy = Holding(CounterEnv()), Holding(CounterEnv())
    env.inner[0].reset()
    for _ in range(4):
        env.inner[0].step(None)
    set_env_state(copy, get_env_state(env))
    assert copy.inner[0].step(None)[0] == 5 + 10
    # EzPickle would copy it without what happened since it was made
    with pytest.raises(StateNotAvailable, match="Holding cannot be pickled: it holds another environment, a HalfCheetahEnv"):
        get_env_state(Holding(gym.make("HalfCheetah-v5").unwrapped))


@pytest.mark.parametrize("env_id", ["Ant-v5", "HalfCheetah-v5"])
def test_mujoco_goes_on_in_the_middle_of_an_episode(env_id):
    env, copy = gym.make(env_id), gym.make(env_id)
    env.reset(seed=1)
    copy.reset(seed=2)
    env.unwrapped.model.body_mass[1] *= 1.5  # as a randomisation of the dynamics does
    env.unwrapped.model.opt.gravity[2] = -8
    env.unwrapped.model.opt.viscosity = 0.1
    env.unwrapped.torso = env.unwrapped.data.xpos[1]
    copy.unwrapped.torso = copy.unwrapped.data.xpos[1]
    env.action_space.seed(3)
    for _ in range(20):
        env.step(env.action_space.sample())
    set_env_state(copy, get_env_state(env))
    for _ in range(30):
        action = env.action_space.sample()
        (obs, reward, *_, info), (copied_obs, copied_reward, *_, copied_info) = env.step(action), copy.step(action)
        assert obs.tolist() == copied_obs.tolist() and reward == copied_reward and info == copied_info
        assert copy.unwrapped.torso.tolist() == env.unwrapped.torso.tolist()  # the view is that of its own simulation


class Locked(VecEnvWrapper):
    def __init__(self, venv):
        super().__init__(venv)
        self.lock = threading.Lock()

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


class Recording(Locked):
    """Refers to what it wraps once more, as SB3's VecVideoRecorder does."""

    def __init__(self, venv):
        super().__init__(venv)
        del self.lock
        self.env, self.n_recorded = venv, 0


def test_a_wrapper_without_state_is_a_reason_and_costs_no_other():
    env, copy = (Locked(VecNormalize(DummyVecEnv([CounterEnv]))) for _ in range(2))
    env.reset()
    for _ in range(3):
        env.step(np.zeros((1, 1)))
    state = get_vec_env_state(env)
    assert "the state of Locked cannot be pickled" in state["reason"]
    set_vec_env_state(copy, state)
    assert copy.venv.obs_rms.count == env.venv.obs_rms.count > 3
    assert copy.unwrapped.envs[0].env.count == 3


def test_a_vector_wrapper_with_a_second_reference():
    env, copy = (Recording(VecNormalize(DummyVecEnv([CounterEnv]))) for _ in range(2))
    env.n_recorded = 7
    state = get_vec_env_state(env)
    assert state["reason"] is None
    set_vec_env_state(copy, state)
    assert copy.env is copy.venv and copy.n_recorded == 7


def test_learning_with_a_wrapper_without_state_warns(tmp_path):
    for total in (60, 90):
        model = make_model(MTSAC, Locked(make_env()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(total, callback=[MultiTaskCheckpointCallback(5, tmp_path, resume="auto")])
        assert any("the state of Locked cannot be pickled" in str(entry.message) for entry in caught)
        assert model.num_timesteps == total
