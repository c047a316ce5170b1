"""NaN and infinities of one task: what they reach, what is counted, and what is said of them."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_mtrl import MTSAC, PaCoSAC
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.checkpoint_store import read_checkpoint
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.utils import NonFiniteError, are_within, finite_task_ids, fuse, have_finite_gradients, is_fused
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize, make_multi_task_vec_env
from tests.models import ALGORITHMS, NUM_TASKS, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv

BAD_TASK = 1
FIRST_BAD_STEP = 4  # of an episode of 20


class BrokenTasksEnv(PointTasksEnv):
    """From its fourth step on, an episode of task 1 goes wrong."""

    def __init__(self, fault: str | None = None, value: float = np.nan, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault, self.value = fault, value

    def step(self, action):
        assert np.isfinite(action).all()
        obs, reward, terminated, truncated, info = super().step(action)
        if self.task_id == BAD_TASK and self._steps >= FIRST_BAD_STEP:
            if self.fault == "reward":
                reward = self.value
            elif self.fault == "observation":
                obs[0] = self.value
            elif self.fault == "whole observation":
                obs[:] = self.value
        return obs, reward, terminated, truncated, info


def broken_env(fault: str | None, value: float = np.nan, **kwargs: Any) -> VecTaskAssignment:
    return VecTaskAssignment(DummyVecEnv([lambda: BrokenTasksEnv(fault, value, **kwargs) for _ in range(NUM_TASKS)]))


def logged(model: MTSAC) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    model.logger.dump = lambda step: recorded.update(model.logger.name_to_value)
    model.dump_logs()
    return recorded


def set_column(model: MTSAC, task: int, column: str, value: float) -> None:
    buffer = model.replay_buffer
    ring = slice(task * buffer.capacity_per_task, (task + 1) * buffer.capacity_per_task)
    buffer._rows[ring, buffer._columns[column]] = value


# ------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fault, value", [("reward", np.nan), ("observation", np.inf), ("whole observation", np.nan)])
def test_masked_rollouts_leave_the_others_alone(algorithm, fault, value):
    """
    48 vector steps are two episodes of 20 and 8 steps. Of task 1 only what is finite is stored: 3 steps of an episode with a
    broken reward; and 3 steps with broken observations, too, as the fourth one ends in one.
    """
    env = broken_env(fault, value)
    model = make_model(algorithm, env, learning_starts=120, on_nonfinite="mask")
    with pytest.warns(UserWarning, match=r"not finite was left out: transitions of the tasks point-1 \(39\)"):
        model.learn(3 * 48, log_interval=None).dump_logs()
    assert model.replay_buffer.sizes().tolist() == [48, 9, 48]
    assert model.replay_buffer.refused.tolist() == [0, 39, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    recorded = logged(model)
    assert recorded["train/refused_transitions"] == recorded["train/refused_transitions/point-1"] == 39
    assert "train/dropped_updates" not in recorded or recorded["train/dropped_updates"] == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fault, what", [("reward", "the reward"), ("observation", "the observation")])
def test_a_raised_error_names_task_step_and_checkpoint(algorithm, fault, what, tmp_path):
    model = make_model(algorithm, broken_env(fault), learning_starts=6, on_nonfinite="raise")
    # Four vector steps of three sub-environments; the updates are those after steps 3 (9 is above 6) and before 4
    message = rf"{what} is not finite, task point-1, at time step 12 after 1 updates;.*checkpoint: (\S+)\. "
    with pytest.raises(NonFiniteError, match=message) as caught:
        model.learn(300, callback=MultiTaskCheckpointCallback(2, tmp_path))
    path = re.search(message, str(caught.value)).group(1)
    assert read_checkpoint(Path(path)).path.parent == tmp_path
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert model.replay_buffer.sizes()[BAD_TASK] == 3


def test_a_first_observation_that_is_not_finite_is_named_before_acting():
    class BrokenReset(PointTasksEnv):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            obs[0] = np.nan if self.task_id == BAD_TASK else obs[0]
            return obs, info

    env = VecTaskAssignment(DummyVecEnv([BrokenReset] * NUM_TASKS))
    with pytest.raises(NonFiniteError, match=r"the observation is not finite, task point-1, at time step 0 .*: none"):
        make_model(MTSAC, env).learn(30)


def test_a_task_that_no_observation_told_is_unknown():
    class BrokenReset(PointTasksEnv):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return np.where(self.task_id == BAD_TASK, np.nan, obs).astype(np.float32), info

    env = VecTaskAssignment(DummyVecEnv([BrokenReset] * NUM_TASKS))
    with pytest.raises(NonFiniteError, match=r"the observation is not finite, task unknown, at time step 0 "):
        make_model(MTSAC, env).learn(30)
    # Later the infos tell it; nothing is counted for another task
    model = make_model(MTSAC, env, on_nonfinite="mask")
    model.learn(30)
    assert model.replay_buffer.refused.tolist() == [0, 1, 0]


def test_defaults_are_those_of_the_published_maskout():
    defaults = {algorithm.__name__: make_model(algorithm).on_nonfinite for algorithm in ALGORITHMS}
    assert defaults == {"MTSAC": "raise", "CMTASAC": "raise", "TSACSAC": "raise", "PaCoSAC": "mask", "STARSSAC": "mask"}
    with pytest.raises(ValueError, match="on_nonfinite must be one of 'mask', 'raise', got 'ignore'"):
        make_model(on_nonfinite="ignore")


@pytest.mark.parametrize("fault, value", [("reward", np.inf), ("observation", -np.inf), ("whole observation", np.nan)])
def test_running_statistics_are_those_of_what_is_finite(fault, value):
    """Against the same steps of the same environment without the fault, from which the faulty ones are taken out."""
    statistics = []
    for broken in (True, False):
        env = VecTaskNormalize(broken_env(fault if broken else None, value))
        env.seed(0)
        observations, rewards = [env.reset()], []
        rng = np.random.default_rng(0)
        for _ in range(6):
            obs, reward, _, _ = env.step(rng.uniform(-1, 1, (NUM_TASKS, 2)).astype(np.float32))
            observations.append(env.get_original_obs())
            rewards.append(env.get_original_reward())
        statistics.append((env, np.stack(observations[1:]), np.stack(rewards), obs, reward))
    env, _, _, last_obs, last_reward = statistics[0]
    _, observations, rewards, _, _ = statistics[1]
    if fault == "reward":
        # Returns by hand; the faulty ones, from the fourth step on, are left out
        returns = np.zeros(3)
        for reward in rewards[:3, BAD_TASK]:
            returns = np.append(returns[1:], 0.99 * returns[-1] + reward)
        assert env.ret_rms.count[BAD_TASK] == pytest.approx(3, abs=1e-3)
        assert env.ret_rms.mean[BAD_TASK] == pytest.approx(returns.mean(), rel=1e-3)
        assert np.isnan(last_reward[BAD_TASK]) and np.isfinite(last_reward[[0, 2]]).all()
    else:
        kept = np.ones((6, NUM_TASKS), dtype=bool)
        kept[FIRST_BAD_STEP - 1 :, BAD_TASK] = False
        assert env.obs_rms.count == pytest.approx(3 + kept.sum(), abs=1e-3)  # and the first observations
        assert np.isnan(last_obs[BAD_TASK, 0]) and np.isfinite(last_obs[[0, 2]]).all()
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.ret_rms.var).all()
    assert np.isfinite(env.returns).all()


class NoTasksEnv(gym.Env):
    """Counts its steps; the second one has a NaN in the observation, the third one an infinite reward."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.array([self.steps, np.nan if self.steps == 2 else 0], dtype=np.float32)
        return obs, np.inf if self.steps == 3 else 1.0, False, False, {}


def test_statistics_of_environments_without_tasks_stay_finite():
    env = VecTaskNormalize(DummyVecEnv([NoTasksEnv]), gamma=0.5)
    env.reset()
    for _ in range(4):
        env.step(np.zeros((1, 1)))
    # By hand: observations 0, 1, 3 and 4 without the second step; returns 1, 1.5 and, the infinite reward taken for 0 in what
    # follows it, 0.5 * 0.75 + 1
    assert env.obs_rms.mean[0] == pytest.approx(2.0, rel=1e-3)
    assert env.ret_rms.mean == pytest.approx((1 + 1.5 + 1.375) / 3, rel=1e-3)


def test_one_task_with_the_buffer_of_sb3():
    """That buffer takes what it is given: an update whose batch holds a row that is not finite is left out as a whole."""
    with pytest.raises(NonFiniteError, match=r"the observation is not finite, task task-0, at time step 2 "):
        make_model(MTSAC, NoTasksEnv(), learning_starts=0).learn(10)
    model = make_model(MTSAC, NoTasksEnv(), learning_starts=0, on_nonfinite="mask")
    model.learn(10)
    assert type(model.replay_buffer) is ReplayBuffer
    assert 0 < model.dropped_updates.item() <= model._n_updates
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())


def test_task_ids_of_broken_observations():
    obs = np.array([[0.5, 0, 1], [np.nan, np.nan, np.nan], [np.nan, 1, 0]])
    assert finite_task_ids(obs, 2, np.array([0, 1, 1])).tolist() == [1, 1, 0]


# -------------------------------------------------------------------- updates


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("column, what", [("reward", "the loss .critic"), ("obs", "an observation, action or extra column")])
def test_a_bad_batch_is_named_before_any_step(algorithm, column, what):
    model = make_model(algorithm, collect=60, on_nonfinite="raise")
    model.train(1)
    set_column(model, 2, column, np.nan)
    before, before_ent_coef = parameters_of(model), model.log_ent_coef.detach().clone()
    with pytest.raises(NonFiniteError, match=rf"{what}.*not finite, task point-2, at time step 60 after 1 updates"):
        model.train(1)
    after = parameters_of(model)
    assert all(th.equal(after[name], before[name]) for name in before)
    assert th.equal(model.log_ent_coef, before_ent_coef)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("column", ["reward", "obs"])
def test_a_bad_batch_is_masked_without_guards(algorithm, column):
    kwargs = {"maskout_threshold": None} if algorithm.__name__ in ("PaCoSAC", "STARSSAC") else {}
    model = make_model(algorithm, collect=60, on_nonfinite="mask", **kwargs)
    set_column(model, 2, column, np.inf)
    before = parameters_of(model)
    model.train(2)
    assert model.dropped_updates.tolist() == [0, 0, 2]
    after = parameters_of(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not th.equal(after[name], before[name]) for name in before)
    assert logged(model)["train/dropped_updates/point-2"] == 2


@pytest.mark.parametrize("column", ["reward", "obs"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_looking_the_batch_is_masked_in_both_modes(algorithm, column):
    """As on a GPU, whose values are read once a call of ``train``."""
    models = {}
    for mode in ("mask", "raise"):
        model = models[mode] = make_model(algorithm, collect=60, on_nonfinite=mode)
        model._may_look = False
        set_column(model, 2, column, np.nan)
    models["mask"].train(2)
    with pytest.raises(
        NonFiniteError, match=r"a loss, or the batch that it is of, is not finite, task point-2, at time step 60"
    ):
        models["raise"].train(2)
    for model in models.values():
        assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
        assert model.dropped_updates.tolist() == [0, 0, 2]


def test_without_looking_a_bad_gradient_changes_nothing():
    models = {mode: steep_model(mode, is_steep=False, ent_coef=0.1) for mode in ("mask", "raise")}
    before = {}
    for mode, model in models.items():
        model._may_look = False
        model.train(3)  # Adam's moments would go on moving the parameters
        before[mode] = parameters_of(model)
        make_steep(model)
    models["mask"].train(1)
    with pytest.raises(NonFiniteError, match="a gradient is not finite, task unknown"):
        models["raise"].train(1)
    for mode, model in models.items():
        assert model.skipped_steps == 2  # actor and critics
        after = parameters_of(model)
        assert all(th.equal(after[name], before[mode][name]) for name in after if not name.startswith("critic_target"))


def test_without_looking_what_was_left_out_before_stops_nothing():
    model = make_model(collect=60, on_nonfinite="raise")
    model._may_look = False
    model.skipped_steps.fill_(4)  # as of a file
    model.train(1)
    rows = model.replay_buffer._rows.copy()
    set_column(model, 2, "reward", np.nan)
    with pytest.raises(NonFiniteError, match="task point-2"):
        model.train(1)
    model.replay_buffer._rows[:] = rows
    model.train(1)


def test_a_fused_optimizer_goes_on_from_any_state():
    """As where a model that was saved on a CPU goes on on a GPU; equal steps to those of the formula, up to rounding."""
    parameters = [nn.Parameter(th.ones(3)) for _ in range(2)]
    optimizers = [th.optim.Adam([parameter], lr=0.1) for parameter in parameters]
    for n in range(4):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = th.tensor([1.0, -2.0, 0.5]) * (n + 1)
            optimizer.step()
        fuse(optimizers[1])
        assert is_fused(optimizers[1]) and not is_fused(optimizers[0])
        th.testing.assert_close(parameters[1].detach(), parameters[0].detach())
    for told in ({"foreach": True}, {"fused": False}):
        fuse(optimizer := th.optim.Adam([parameters[0]], **told))
        assert not is_fused(optimizer)


class Steep(nn.Module):
    """The identity; its gradient is NaN where the input is large."""

    is_steep = True

    def forward(self, x: th.Tensor) -> th.Tensor:
        y = x.clone()
        if y.requires_grad and self.is_steep:
            y.register_hook(lambda gradient: th.where(x.detach().abs() > 1e3, th.nan, gradient))
        return y


def make_steep(model: MTSAC, tasks: Sequence[int] = (BAD_TASK,)) -> None:
    for task in tasks:
        set_column(model, task, "obs", 1e5)
        set_column(model, task, "next_obs", 1e5)


def steep_model(on_nonfinite: str, algorithm: type[MTSAC] = MTSAC, is_steep: bool = True, **kwargs: Any) -> MTSAC:
    model = make_model(
        algorithm, collect=60, on_nonfinite=on_nonfinite, policy_kwargs=dict(activation_fn=Steep, net_arch=[8]), **kwargs
    )
    if is_steep:
        make_steep(model)
    return model


def count_steps(model: MTSAC) -> dict[str, int]:
    """How often each optimiser steps from now on."""
    counts = {"ent_coef": 0, "critic": 0, "actor": 0}

    def count(name: str, optimizer: th.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *args: counts.update({name: counts[name] + 1}))

    count("ent_coef", model.ent_coef_optimizer)
    count("critic", model.critic.optimizer)
    count("actor", model.actor.optimizer)
    return counts


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_gradients_of_one_task_do_not_reach_the_others(order):
    model = steep_model("mask", optimizer_order=order)
    before = parameters_of(model)
    counts = count_steps(model)
    with pytest.warns(UserWarning, match=r"such an update takes 5 passes instead of one") as caught:
        model.train(2)
    assert sum("passes" in str(warning.message) for warning in caught) == 1
    assert model.dropped_updates.tolist() == [0, 2, 0]
    after = parameters_of(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    # The other tasks go on learning: every network has moved
    for part in ("actor.", "critic."):
        assert any(not th.equal(after[name], before[name]) for name in before if name.startswith(part))
    # Each optimiser has stepped once an update, in the first pass or in the last
    assert counts == {"ent_coef": 2, "critic": 2, "actor": 2}
    assert model.skipped_steps == 0 and model._n_summed_updates == 2


def test_the_last_pass_is_logged():
    """The critic loss of the task at fault is that of zeros in the last pass, and about 1e10 squared in the first."""
    model = steep_model("mask")
    set_column(model, BAD_TASK, "reward", 0.0)
    model.train(1)
    assert model._train_sums["critic_loss"][BAD_TASK] < 1e3
    assert model._train_sums["ent_coef"].max() < 1.1  # of one pass, as the coefficients begin at 1


def test_priorities_are_told_once(monkeypatch):
    model = steep_model("mask", replay_buffer_class=TaskPrioritizedReplayBuffer)
    told = []
    monkeypatch.setattr(model.replay_buffer, "update_priorities", lambda indices, sizes: told.append(sizes))
    model.train(1)
    (sizes,) = told
    assert sizes.isnan().sum() == 8 and (sizes.isfinite() | sizes.isnan()).all()  # 24 rows of three tasks, one is left out


def test_steps_that_no_pass_makes_are_counted():
    model = steep_model("mask", is_steep=False)
    make_steep(model, range(NUM_TASKS))
    counts = count_steps(model)
    model.train(1)
    assert counts == {"ent_coef": 1, "critic": 0, "actor": 0}
    with pytest.warns(UserWarning, match=r"left out: steps of optimisers \(2\); train"):
        recorded = logged(model)
    assert model.skipped_steps == 2 == recorded["train/skipped_steps"]


@pytest.mark.parametrize(
    "refused, n_skipped, what",
    [
        ([0, 3, 1], 0, "transitions of the tasks point-1 (3), point-2 (1); train"),
        ([0, 0, 0], 2, "steps of optimisers (2); train"),
        ([2, 0, 0], 1, "transitions of the tasks point-0 (2) and steps of optimisers (1); train"),
    ],
)
def test_warning_names_what_was_left_out_once(refused, n_skipped, what):
    model = make_model(collect=6, on_nonfinite="mask")
    model.replay_buffer.refused[:] = refused
    model.skipped_steps.fill_(n_skipped)
    with pytest.warns(UserWarning, match=re.escape(f"what was not finite was left out: {what}")):
        logged(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged(model)


@pytest.mark.parametrize("fault, stepped", [("critic", ["ent_coef"]), ("actor", ["ent_coef", "critic"])])
def test_what_has_stepped_before_a_bad_gradient(fault, stepped):
    """Temperatures, critics, actor: what comes before the fault steps, with finite gradients, and nothing after it."""
    model = steep_model("raise")
    other = {"critic": model.actor, "actor": model.critic}[fault]
    layers = [module for module in other.modules() if isinstance(module, Steep)]
    assert layers
    for module in layers:
        module.is_steep = False
    before, before_ent_coef = parameters_of(model), model.log_ent_coef.detach().clone()
    counts = count_steps(model)
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite, task point-1, at time step 60"):
        model.train(1)
    assert [name for name in counts if counts[name] == 1] == stepped
    after = parameters_of(model)
    changed = {name.split(".")[0] for name in after if not th.equal(after[name], before[name])}
    assert changed == {name for name in stepped if name != "ent_coef"}
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not th.equal(model.log_ent_coef, before_ent_coef) and model.log_ent_coef.isfinite().all()


def test_gradients_that_are_not_finite_are_named():
    model = steep_model("raise")
    before = parameters_of(model)
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite, task point-1, at time step 60"):
        model.train(1)
    after = parameters_of(model)
    assert all(th.equal(after[name], before[name]) for name in before)


def test_have_finite_gradients():
    parameters = [nn.Parameter(th.zeros(2)), nn.Parameter(th.zeros(1))]
    optimizer = th.optim.Adam(parameters)
    assert have_finite_gradients(optimizer) is None
    parameters[0].grad = th.tensor([1e38, -1e38])
    assert have_finite_gradients(optimizer)
    for bad in ([np.inf, -np.inf], [np.nan, 0]):
        parameters[0].grad = th.tensor(bad, dtype=th.float32)
        assert not have_finite_gradients(optimizer)


def test_are_within():
    assert are_within([th.tensor([-1.0, 2.0]), th.zeros(1)], 2.5)
    for value in (3.0, -3.0, np.inf, -np.inf, np.nan):
        assert not are_within([th.zeros(1), th.tensor([0.0, value])], 2.5)


def test_masking_changes_nothing_while_all_is_finite():
    models = [make_model(collect=60, on_nonfinite=mode) for mode in ("mask", "raise")]
    for model in models:
        model.set_random_seed(3)
        model.train(5)
    for name, tensor in parameters_of(models[0]).items():
        assert th.equal(parameters_of(models[1])[name], tensor), name


def test_counts_are_saved(tmp_path):
    model = steep_model("mask", is_steep=False)
    make_steep(model, range(NUM_TASKS))
    model.train(1)
    model.save(tmp_path / "model")
    loaded = MTSAC.load(tmp_path / "model")
    assert loaded.skipped_steps == model.skipped_steps > 0
    assert loaded.dropped_updates.tolist() == [1, 1, 1]


# ------------------------------------------------------------------ Meta-World


class SpoiltWrapper(gym.Wrapper):
    """The simulation of task 1 is spoilt from its fourth step on."""

    def reset(self, **kwargs):
        self.steps = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        if self.unwrapped.task_id == BAD_TASK and self.steps >= FIRST_BAD_STEP:
            obs[:4], reward = np.nan, np.nan
        return obs, reward, terminated, truncated, info


@pytest.mark.expensive
@pytest.mark.parametrize("algorithm", [PaCoSAC, MTSAC])
def test_a_spoilt_simulation_of_metaworld(algorithm):
    env = make_multi_task_vec_env(
        "MT3", seed=0, n_envs=3, env_kwargs={"horizon": 20}, wrapper_class=SpoiltWrapper, vec_env="dummy"
    )
    model = make_model(algorithm, VecTaskNormalize(env), learning_starts=15, batch_size=12)
    if algorithm is MTSAC:
        with pytest.raises(NonFiniteError, match=r"task push-v3, at time step 12 .*Last good checkpoint: none"):
            model.learn(90)
        return
    model.learn(90)
    # Thirty steps of each; of task 1 three in each of its two episodes
    assert model.replay_buffer.sizes().tolist() == [30, 6, 30]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert np.isfinite(env.get_attr("task_id")).all() and np.isfinite(model.get_vec_normalize_env().obs_rms.mean).all()
