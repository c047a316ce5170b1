"""
Does CMTASAC remember? A cue is shown at the first step of an episode only, and the best action depends on it to the end.

    python -m benchmarks.learning.memory --steps 20000 --seeds 3

A policy without memory can do no better than action 0 after the first step: a mean squared error of ``TARGET ** 2`` = 0.25.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl import CMTASAC

TARGET = 0.5
VARIANTS: dict[str, dict[str, Any]] = {
    "full": dict(gate_sharing="full"),
    "actor": dict(gate_sharing="actor"),
    "released": dict(gate_sharing="released"),
    "no memory": dict(use_temporal=False),
}


class CueEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    The observation is the cue (-1 or 1) at the first step and 0 afterwards, and 1 at the first step only. The reward is
    ``-(a - TARGET * cue) ** 2``.

    :param horizon: Steps of an episode
    """

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, horizon: int = 5) -> None:
        self.horizon = horizon
        self.cue = 1.0
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a new cue and show it."""
        super().reset(seed=seed)
        self.cue = float(self.np_random.choice([-1.0, 1.0]))
        self._steps = 0
        return np.array([self.cue, 1.0], dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay for the distance to what the cue asked for; show nothing."""
        self._steps += 1
        reward = -((float(action[0]) - TARGET * self.cue) ** 2)
        return np.zeros(2, dtype=np.float32), reward, False, self._steps >= self.horizon, {}


def error_after_the_cue(model: CMTASAC, horizon: int) -> float:
    """
    :param model: The model
    :param horizon: Steps of an episode
    :return: Mean squared error of the deterministic actions, over the steps that do not show the cue and both cues
    """
    cues = np.array([-1.0, 1.0])
    state, errors = None, []
    for step in range(horizon):
        obs = np.stack([cues, np.ones(2)], axis=1) * (step == 0)
        actions, state = model.predict(obs.astype(np.float32), state=state, deterministic=True)
        errors.append((actions[:, 0] - TARGET * cues) ** 2)
    return float(np.mean(errors[1:]))


def train(variant: str, seed: int, steps: int, horizon: int = 5, n_envs: int = 4) -> float:
    """
    :param variant: Name in ``VARIANTS``
    :param seed: Seed
    :param steps: Environment steps
    :param horizon: Steps of an episode
    :param n_envs: Number of sub-environments
    :return: The error after the cue, see ``error_after_the_cue``
    """
    model = CMTASAC(
        "MlpPolicy",
        DummyVecEnv([lambda: CueEnv(horizon)] * n_envs),
        learning_rate=2e-3,
        learning_starts=400,
        batch_size=128,
        gamma=0.5,
        policy_kwargs=dict(net_arch=[32], expert_arch=[16], feature_dim=16, lstm_hidden_dim=16, task_embedding_dim=4),
        seed=seed,
        device="cpu",
        **VARIANTS[variant],
    )
    model.learn(steps)
    return error_after_the_cue(model, horizon)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train every variant with every seed and print a table.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps (default: 20000)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--horizon", type=int, default=5, help="steps of an episode (default: 5)")
    args = parser.parse_args(arguments)
    print(
        f"mean squared error after the cue, {args.steps} steps, horizon {args.horizon} (best without memory: {TARGET**2:.3f})"
    )
    for variant in VARIANTS:
        errors = [train(variant, seed, args.steps, args.horizon) for seed in range(args.seeds)]
        print(f"{variant:<10} {np.mean(errors):.3f}  seeds: {', '.join(f'{error:.3f}' for error in errors)}", flush=True)


if __name__ == "__main__":
    main()
