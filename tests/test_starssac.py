"""STARSSAC: equal to MTSAC and PaCoSAC where its switches say so, its gradients, its guards, W and its target, and checks of
arguments. The layers have tests of their own (test_shared_unique.py)."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mtrl import MTSAC, STARSSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.compositional import TaskVectors, forward_groups
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.shared_unique import triplet_losses
from sb3_mtrl.common.vec_env import VecTaskAssignment
from sb3_mtrl.starssac.policies import STARSPolicy
from tests.models import DropTasks, make_env, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv

# No unique features, uniform batches of equal shares: what is left is PaCo's
PLAIN = dict(unique_dim=0, task_priority="uniform", per_alpha=0.0)
# The buffer that this makes, for other algorithms
PLAIN_BUFFER = dict(
    replay_buffer_class=TaskPrioritizedReplayBuffer, replay_buffer_kwargs=dict(task_priority="uniform", alpha=0.0)
)
WIDE = dict(net_arch=[16, 16, 12])


def stars(**kwargs) -> STARSSAC:
    kwargs["policy_kwargs"] = {**WIDE, **kwargs.get("policy_kwargs", {})}
    return make_model(STARSSAC, **kwargs)


def grouped_observations(num_tasks: int = 3, rows: int = 4) -> th.Tensor:
    """``(T, rows, 4 + T)``"""
    one_hot = th.eye(num_tasks).repeat_interleave(rows, dim=0)
    return th.cat([th.randn(num_tasks * rows, 4), one_hot], dim=1).view(num_tasks, rows, -1)


def hold_batch(model: MTSAC, data) -> None:
    model.replay_buffer.sample = lambda batch_size, env=None: data


# ------------------------------------------------------------------ limit cases


def copy_layers(layers, source_layers) -> None:
    """Weights of ordinary networks as the only parameter set."""
    with th.no_grad():
        for layer, (weight, bias) in zip(layers, source_layers, strict=True):
            layer.weight[:, 0], layer.bias[:, 0] = weight, bias


def assert_uniform_in_equal_shares(model: STARSSAC) -> None:
    """Of its own buffer the switches make a MultiTaskReplayBuffer: every task b rows, each as likely, no weights."""
    if model.num_tasks == 1:
        assert type(model.replay_buffer) is type(make_model(MTSAC, env=make_env(1)).replay_buffer)
        return
    data = model.replay_buffer.sample(24)
    assert data.group_tasks.bincount().tolist() == [len(data.group_tasks) // 3] * 3
    assert th.all(data.weights == 1)
    leaves = model.replay_buffer._tree.leaves
    assert all(np.all(ring[:size] == 1) for ring, size in zip(leaves, model.replay_buffer.sizes(), strict=True))


@pytest.mark.parametrize("buffer", [{}, PLAIN_BUFFER], ids=["uniform", "prioritized"])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_one_parameter_set_without_unique_features_is_mtsac(num_tasks, order, buffer):
    """MTSAC's networks without the one-hot, its parameters and batches: 20 updates, equal up to float rounding."""
    env = make_env(num_tasks, n_envs=2)
    policy_kwargs = dict(observe_task=num_tasks == 1, **WIDE)
    mtsac = make_model(MTSAC, env=env, optimizer_order=order, policy_kwargs=policy_kwargs, **buffer)
    model = stars(env=make_env(num_tasks, n_envs=2), optimizer_order=order, n_param_sets=1, max_ent_coef=None, **PLAIN)
    mtsac.learn(120)
    model.learn(120)
    assert_uniform_in_equal_shares(model)
    model.replay_buffer = mtsac.replay_buffer
    copy_layers(model.actor.compositional.layers, mtsac.actor.single_task_layers(0))
    copy_layers(model.critic.compositional.layers, mtsac.critic.single_task_layers(0))
    copy_layers(model.critic_target.compositional.layers, mtsac.critic_target.single_task_layers(0))
    for one in (mtsac, model):
        one.set_random_seed(11)
        one.train(20)
    assert th.all(model.policy.compositional_vectors == 1) and th.all(model.policy.target_compositional_vectors == 1)
    for network in ("actor", "critic", "critic_target"):
        expected_layers = getattr(mtsac, network).single_task_layers(0)
        layers = getattr(model, network).single_task_layers(0)
        for (weight, bias), (expected_weight, expected_bias) in zip(layers, expected_layers, strict=True):
            th.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-6)
            th.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-6)
    th.testing.assert_close(model.log_ent_coef, mtsac.log_ent_coef, rtol=0, atol=1e-7)


@pytest.mark.parametrize("buffer", [{}, PLAIN_BUFFER], ids=["uniform", "prioritized"])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize(
    ("tau", "w_learning_rate", "n_updates"),
    [(0.005, None, 1), (1.0, None, 15), (0.005, 0.0, 15)],
    ids=["one", "copy", "fixed W"],
)
def test_without_unique_features_is_paco(num_tasks, order, tau, w_learning_rate, n_updates, buffer):
    """
    PaCoSAC with the same settings and parameters makes the same updates. Its target critics use the current W, those of STARS
    follow with their own: the two are the same for one update, with tau = 1, or with a W that stays.
    """
    common = dict(optimizer_order=order, tau=tau, w_learning_rate=w_learning_rate, target_entropy=-1.0)
    adam = dict(optimizer_kwargs=dict(eps=1e-7), log_std_bounds=(-10.0, 2.0), **WIDE)
    env = make_env(num_tasks, n_envs=2)
    paco = make_model(PaCoSAC, env=env, maskout_threshold=None, policy_kwargs=adam, **common, **buffer)
    settings = dict(ent_coef_learning_rate=1e-4, warmup_actions="policy", maskout_threshold=None)
    model = stars(env=make_env(num_tasks, n_envs=2), policy_kwargs=adam, **common, **settings, **PLAIN)
    paco.learn(120)
    model.learn(120)
    assert_uniform_in_equal_shares(model)
    model.replay_buffer = paco.replay_buffer
    parameters = parameters_of(paco)
    model.policy.load_state_dict({**parameters, "target_compositional_vectors": parameters["compositional_vectors"]})
    model.ent_coef_optimizer.param_groups[0]["eps"] = 1e-7  # that of PaCo's authors, which PaCoSAC uses here, too
    for one in (paco, model):
        one.set_random_seed(11)
        one.train(n_updates)
    got = parameters_of(model)
    for name, expected in parameters_of(paco).items():
        th.testing.assert_close(got[name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    if w_learning_rate is None:
        assert not th.equal(got["compositional_vectors"], parameters["compositional_vectors"])
    th.testing.assert_close(model.log_ent_coef, paco.log_ent_coef, rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_orders_differ(order):
    """Only in joint order does the actor's step not depend on the critics' one."""
    actors = []
    for frozen_critic in (False, True):
        model = stars(collect=60, optimizer_order=order)
        if frozen_critic:
            model.critic.optimizer.step = lambda: None
        model.set_random_seed(5)
        model.train(1)
        actors.append(th.cat([parameter.flatten() for parameter in model.actor.parameters()]))
    assert th.equal(*actors) == (order == "joint")


def test_without_triplet_loss_nothing_is_drawn_for_it():
    """With ``triplet_coef=0`` the same random numbers are left for the rest as without unique features."""
    states = []
    for kwargs in (PLAIN, dict(triplet_coef=0.0), {}):
        model = stars(collect=60, **kwargs)
        hold_batch(model, model.replay_buffer.sample(24))
        set_random_seed(5)
        model.train(1)
        states.append(th.random.get_rng_state())
    assert th.equal(states[0], states[1]) and not th.equal(states[0], states[2])


# --------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(unique_dim=0),
        dict(n_param_sets=1),
        dict(compositional_head=False),
        dict(policy_kwargs=dict(unique_observes_task=False)),
        dict(policy_kwargs=dict(net_arch=[8], unique_arch=[])),
        dict(policy_kwargs=dict(net_arch=[])),
    ],
)
def test_groups_rows_and_rollouts_are_one_function(kwargs):
    model = stars(**kwargs)
    for parameter in model.policy.parameters():
        th.nn.init.normal_(parameter, std=0.3)
    obs, actions = grouped_observations(), th.rand(12, 2)
    rows = obs.flatten(0, 1)
    many_groups = obs.view(6, 2, -1)  # two groups of each task
    model.policy.set_training_mode(True)
    expected = model.actor.get_action_dist_params(rows)[0]
    expected_q = model.critic.q_values(rows, actions)
    shuffled = [0, 3, 1, 2, 5, 4]
    shuffled_rows = th.arange(12).view(6, 2)[shuffled].flatten()
    for groups, order in ((obs, ...), (many_groups, ...), (many_groups[shuffled], shuffled_rows)):
        th.testing.assert_close(model.actor.get_action_dist_params(groups)[0], expected[order])
        th.testing.assert_close(model.critic.q_values(groups, actions[order]), expected_q[:, order])
    model.policy.set_training_mode(False)
    with th.no_grad():
        th.testing.assert_close(model.actor.get_action_dist_params(rows)[0], expected)
        th.testing.assert_close(model.actor.get_action_dist_params(rows[::4])[0], expected[::4])


def test_groups_compose_once_per_task():
    """However many groups there are, and also where the same task comes again later."""
    model = stars()
    network, w = model.actor.compositional, model.policy.task_vectors()
    sizes = []
    compose = network.compose
    network.compose = lambda w, *args: sizes.append(len(w)) or compose(w, *args)
    model.actor.get_action_dist_params(grouped_observations(rows=12).view(18, 2, -1))
    assert sizes == [3]
    for tasks in ([0, 2, 2, 0, 1], [0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 2, 2], [1, 1, 2, 2]):
        x = th.randn(len(tasks), 2, 4 + 64)
        got = forward_groups(network, x, compose(w), th.tensor(tasks))
        expected = network.forward_composed(x, compose(w[tasks]))
        th.testing.assert_close(got, expected)


def test_equal_shares_are_one_product():
    model = stars()
    network, w = model.actor.compositional, model.policy.task_vectors()
    shapes = []
    forward_composed = network.forward_composed
    network.forward_composed = lambda x, composed: shapes.append(tuple(x.shape[:2])) or forward_composed(x, composed)
    for tasks in ([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2]):
        forward_groups(network, th.randn(6, 2, 4 + 64), network.compose(w), th.tensor(tasks))
    assert shapes == [(3, 4), (1, 2), (1, 4), (1, 6)]


def test_unique_features_are_those_of_state_and_task():
    model = stars()
    assert model.actor.unique_branch.mlp[0].in_features == 4 + 3
    assert model.critic.unique_branch.mlp[0].in_features == 4 + 3  # no action
    assert stars(policy_kwargs=dict(unique_observes_task=False)).actor.unique_branch.mlp[0].in_features == 4
    assert stars(env=make_env(1)).actor.unique_branch.mlp[0].in_features == 4 + 1  # all of the observation, no one-hot
    assert [layer.out_features for layer in model.actor.unique_branch.mlp if hasattr(layer, "out_features")] == [16, 16, 64]
    actors = {id(parameter) for parameter in model.actor.unique_branch.parameters()}
    assert actors.isdisjoint(id(parameter) for parameter in model.critic.parameters())


def test_default_sizes():
    """5 sets of 3 x 400 and 64 unique features: weights counted by hand from the dimensions of MT10."""
    observation_space = spaces.Box(-np.inf, np.inf, (39 + 10,), np.float32)
    policy = STARSPolicy(observation_space, spaces.Box(-1, 1, (4,), np.float32), ConstantSchedule(3e-4), num_tasks=10)
    unique = (49 * 400 + 400) + (400 * 400 + 400) + (400 * 64 + 64)
    actor = 5 * ((39 * 400 + 400) + (400 * 400 + 400) + (464 * 400 + 400) + (400 * 8 + 8)) + unique
    critics = 2 * 5 * ((43 * 400 + 400) + (400 * 400 + 400) + (464 * 400 + 400) + (400 + 1)) + unique
    assert sum(parameter.numel() for parameter in policy.actor.parameters()) == actor
    assert sum(parameter.numel() for parameter in policy.critic.parameters()) == critics


# -------------------------------------------------------------------- gradients


def test_w_is_in_one_optimizer_and_no_network():
    model = stars()
    w, target_w = model.policy.compositional_vectors, model.policy.target_compositional_vectors
    optimizers = [model.actor.optimizer, model.critic.optimizer, model.policy.w_optimizer, model.ent_coef_optimizer]
    owners = [any(p is w for group in one.param_groups for p in group["params"]) for one in optimizers]
    assert owners == [False, False, True, False]
    for network in (model.actor, model.critic, model.critic_target):
        assert all(parameter is not w and parameter is not target_w for parameter in network.parameters())
    assert model.actor.task_vectors.w is model.critic.task_vectors.w is w
    assert model.critic_target.task_vectors.w is target_w


def sac_losses(model: STARSSAC, data, seed: int) -> tuple[th.Tensor, th.Tensor]:
    """Critic loss, and actor loss at the critics as they are, with W and the critics held constant in Q."""
    obs, next_obs = model._observations(data)
    th.manual_seed(seed)
    actions, log_prob = model.actor.action_log_prob(obs)
    td_errors = model._td_errors(data, obs, next_obs, model._ent_coef_per_row(data))
    critic, task_vectors = model.critic, model.critic.task_vectors
    critic.requires_grad_(False).task_vectors = TaskVectors(task_vectors.w.detach(), "identity")
    q_values = th.min(*critic(obs, actions))
    critic.requires_grad_(True).task_vectors = task_vectors
    return 0.5 * td_errors.square().sum(dim=0).mean(), (log_prob.unsqueeze(1) - q_values).mean()  # alpha is 1 at the start


@pytest.mark.parametrize("triplet_coef", [0.0, 0.7])
def test_gradients_of_one_update(triplet_coef):
    """
    Joint order, so that all gradients belong to the same parameters. Expected from the losses as they are defined: W gets that
    of both, without the way through Q; each unique branch that of its side's loss and of the triplet loss.
    """
    model = stars(collect=60, optimizer_order="joint", triplet_coef=triplet_coef, maskout_threshold=None)
    data = model.replay_buffer.sample(24)
    critic_loss, actor_loss = sac_losses(model, data, seed=7)
    w = model.policy.compositional_vectors
    obs = model._observations(data)[0].flatten(0, 1)
    expected = {"w": th.autograd.grad(critic_loss + actor_loss, w, retain_graph=True)[0]}
    for side, loss in (("critic", critic_loss), ("actor", actor_loss)):  # the order in which the update draws triplets
        branch = getattr(model, side).unique_branch
        if triplet_coef > 0:
            triplets, _ = triplet_losses(branch.mlp(obs), data.group_tasks, 3)
            loss = loss + triplet_coef * triplets.mean()
        expected[side] = th.autograd.grad(loss, list(branch.parameters()), retain_graph=True)
    for optimizer in model._all_optimizers():
        optimizer.step = lambda: None
    hold_batch(model, data)
    th.manual_seed(7)
    model.train(1)
    th.testing.assert_close(w.grad, expected["w"], rtol=1e-4, atol=1e-7)
    for side in ("actor", "critic"):
        for parameter, gradient in zip(getattr(model, side).unique_branch.parameters(), expected[side], strict=True):
            th.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_what_trains_the_unique_branch(order):
    changed = {}
    for from_rl in (True, False):
        for triplet_coef in (1e-30, 1.0):  # the first is too small to change a float32
            model = stars(collect=60, optimizer_order=order, unique_from_rl=from_rl, triplet_coef=triplet_coef)
            before = parameters_of(model)
            model.train(1)
            for side in ("actor", "critic"):
                names = [name for name in before if name.startswith(f"{side}.unique_branch")]
                after = parameters_of(model)
                changed[side, from_rl, triplet_coef] = any(not th.equal(after[name], before[name]) for name in names)
    for (_, from_rl, triplet_coef), has_changed in changed.items():
        assert has_changed == (from_rl or triplet_coef == 1.0)


def test_logged_gradient_norms_and_active_triplets():
    """The length of d loss / d embeddings, each loss differentiated by itself."""
    model = stars(collect=60, optimizer_order="joint", triplet_coef=0.5)
    data = model.replay_buffer.sample(24)
    hold_batch(model, data)
    obs = model._observations(data)[0]
    branch = model.critic.unique_branch
    th.manual_seed(7)
    model.actor.action_log_prob(obs)
    td_errors = model._td_errors(data, *model._observations(data), model._ent_coef_per_row(data))
    embeddings = branch._last_embeddings
    losses, active = triplet_losses(embeddings, data.group_tasks, 3)
    (rl,) = th.autograd.grad(0.5 * td_errors.square().sum(dim=0).mean(), embeddings, retain_graph=True)
    (triplet,) = th.autograd.grad(0.5 * losses.mean(), embeddings)
    th.manual_seed(7)
    model.train(1)
    recorded = {}
    model.logger.dump = lambda step: recorded.update(model.logger.name_to_value)
    model.dump_logs()
    assert recorded["train/critic_unique_grad_rl"] == pytest.approx(rl.norm().item(), rel=1e-4)
    assert recorded["train/critic_unique_grad_triplet"] == pytest.approx(triplet.norm().item(), rel=1e-4)
    assert recorded["train/critic_triplets_active"] == pytest.approx(active.item())
    assert recorded["train/critic_triplet_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert 0 < recorded["train/actor_triplets_active"] <= 1 and recorded["train/actor_unique_grad_rl"] > 0


@pytest.mark.parametrize("env_tasks", [1, 3])
def test_a_batch_of_one_task_has_no_triplet_loss(env_tasks):
    """One task at all, or only one that has been seen: the update is that without triplet loss, and nothing is NaN."""
    results = []
    for triplet_coef in (0.0, 1.0):
        model = stars(env=make_env(env_tasks, n_envs=1), collect=15, triplet_coef=triplet_coef)
        data = model.replay_buffer.sample(24)
        assert len(data.observations.view(24, -1)[:, 4:].unique(dim=0)) == 1 or env_tasks == 1
        hold_batch(model, data)
        # The actor's own noise comes before any triplet is drawn, the target's after: the same for both without it
        model._td_errors = lambda data, obs, *_, model=model: model.critic.q_values(obs, data.actions) - data.rewards
        set_random_seed(3)
        model.train(1)
        results.append(parameters_of(model))
    assert all(tensor.isfinite().all() for tensor in results[1].values())
    for name, tensor in results[0].items():
        th.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-7)


# ----------------------------------------------------------------- W and targets


def test_targets_follow_with_all_their_parameters():
    model = stars(collect=60, tau=0.25)
    before = parameters_of(model)
    with th.no_grad():
        for parameter in [*model.critic.parameters(), model.policy.compositional_vectors]:
            parameter.add_(1.0)
    model._update_target_networks()
    after = parameters_of(model)
    targets = [name for name in before if name.startswith("critic_target.") or name.startswith("target_")]
    assert "target_compositional_vectors" in targets and any("unique_branch" in name for name in targets)
    for name in targets:  # equal to their sources before, so 0.75 x + 0.25 (x + 1) = x + 0.25
        th.testing.assert_close(after[name], before[name] + 0.25)


def test_targets_use_their_own_w():
    model = stars()
    obs, actions = grouped_observations(), th.rand(12, 2)
    before = model.critic_target.q_values(obs, actions)
    with th.no_grad():
        model.policy.compositional_vectors.normal_()
    assert th.equal(model.critic_target.q_values(obs, actions), before)
    with th.no_grad():
        model.policy.target_compositional_vectors.copy_(model.policy.compositional_vectors)
    assert th.equal(model.critic_target.q_values(obs, actions), model.critic.q_values(obs, actions))


def explode(model: STARSSAC, task: int, value: float = 1e4) -> None:
    """Rewards of one task that no critic can follow."""
    buffer = model.replay_buffer
    start = task * buffer.capacity_per_task
    buffer._rows[start : start + buffer.capacity_per_task, buffer._columns["reward"]] = value


def updates_with_an_explosion(**kwargs) -> STARSSAC:
    model = stars(collect=60, **kwargs)
    model.set_random_seed(0)
    model.train(2)
    explode(model, 1)
    model.train(1)
    return model


def test_exploding_task_is_masked_and_reset():
    model = updates_with_an_explosion()
    state = model.policy.w_optimizer.state[model.policy.compositional_vectors]
    w, target_w = model.policy.compositional_vectors.detach(), model.policy.target_compositional_vectors
    assert model.dropped_updates.tolist() == model.w_reset_callback.resets.tolist() == [0, 1, 0]
    # A convex combination of the others' vectors as they are after the step
    coefficients = th.linalg.lstsq(w[[0, 2]].T, w[1]).solution
    th.testing.assert_close(coefficients @ w[[0, 2]], w[1], rtol=0, atol=1e-5)
    assert coefficients.sum().item() == pytest.approx(1.0, abs=1e-4) and th.all(coefficients > 0)
    assert th.equal(target_w[1], w[1])
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name][1].abs().max() == 0 and state[name][0].abs().max() > 0
    # All else is that of the same updates without a reset
    without = updates_with_an_explosion(w_reset=False).policy
    assert without.w_optimizer.state[without.compositional_vectors]["exp_avg"][1].abs().max() > 0
    for name, parameter in without.named_parameters():
        rows = [0, 2] if "compositional_vectors" in name else slice(None)
        assert th.equal(dict(model.policy.named_parameters())[name][rows], parameter[rows])


def test_w_reset_takes_the_task_s_priorities_back():
    """Those of the other tasks are what the update made of their errors."""
    model = stars(collect=60)
    model.train(5)
    buffer = model.replay_buffer
    explode(model, 1)
    model.train(1)
    leaves = [ring[:size] for ring, size in zip(buffer._tree.leaves, buffer.sizes(), strict=True)]
    assert np.all(leaves[1] == 1.0) and buffer.highest_priorities[1] == 1.0  # 1 ** alpha
    assert len(np.unique(leaves[0])) > 10 and len(np.unique(leaves[2])) > 10


def test_quotas_reach_the_loss():
    """
    Tasks 0 and 1 solved, task 2 not: rho 0.1, 0.1, 1. In groups of 2 of 24 rows that is 2, 2 and 20 rows, raised to the least
    share of 4: 4, 4, 16. With rows weighed alike, task 2 has two thirds of the temperatures' gradient.
    """
    model = stars(collect=60, replay_buffer_kwargs=dict(rows_per_group=2), per_alpha=0.0)
    model.replay_buffer.set_task_performance(np.array([1.0, 1.0, 0.0]))
    data = model.replay_buffer.sample(24)
    assert data.group_tasks.tolist() == [0] * 2 + [1] * 2 + [2] * 8
    loss = model._ent_coef_losses(th.full((24, 1), 5.0), data, None).mean()
    (gradient,) = th.autograd.grad(loss, model.log_ent_coef)
    th.testing.assert_close(gradient / gradient.sum(), th.tensor([4.0, 4.0, 16.0]) / 24)
    model.train(2)
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())


def test_success_of_training_episodes_moves_the_quotas():
    """One task whose goal is always reached, one whose never is: the quotas part once the windows are told."""

    class UnequalTasksEnv(PointTasksEnv):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            self.tolerance = [100.0, 0.0][self.task_id]
            return obs, info

    env = VecTaskAssignment(DummyVecEnv([lambda: UnequalTasksEnv(2, horizon=5) for _ in range(2)]))
    model = stars(env=env, learning_starts=20, batch_size=64)
    model.learn(20)
    assert model.replay_buffer.quotas(64).tolist() == [32, 32]
    model.learn(100, reset_num_timesteps=False)
    assert model.success_windows.rates.tolist() == [1.0, 0.0]
    assert model.replay_buffer.quotas(64).tolist() == [8, 56]  # 0.1 : 1 is 5.8 : 58.2; the least share is one group of 8


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_actor_batch(order):
    """ "uniform_in_task": other rows for the actor, of the same tasks; the critics' are those of "same"."""
    models = {}
    for actor_batch in ("same", "uniform_in_task"):
        model = models[actor_batch] = stars(collect=60, actor_batch=actor_batch, optimizer_order=order, triplet_coef=0.0)
        model.set_random_seed(3)
        model.seen = {}
        action_log_prob, q_values = model.actor.action_log_prob, model.critic.q_values

        def spy(obs, model=model, action_log_prob=action_log_prob):
            if th.is_grad_enabled():
                model.seen["actor"] = obs
            return action_log_prob(obs)

        def q_spy(obs, actions, frozen=False, model=model, q_values=q_values):
            model.seen["frozen" if frozen else "critic"] = obs
            return q_values(obs, actions, frozen)

        model.actor.action_log_prob, model.critic.q_values = spy, q_spy
        model.train(1)
    same, uniform = (models[name].seen for name in ("same", "uniform_in_task"))
    assert th.equal(same["actor"], same["critic"]) and th.equal(same["critic"], uniform["critic"])
    assert th.equal(uniform["actor"], uniform["frozen"]) and not th.equal(uniform["actor"], uniform["critic"])
    assert th.equal(uniform["actor"][:, :, 4:], uniform["critic"][:, :, 4:])


def test_uniform_buffer_instead():
    model = stars(replay_buffer_class=MultiTaskReplayBuffer, actor_batch="uniform_in_task", learning_starts=20)
    model.learn(60)
    assert type(model.replay_buffer) is MultiTaskReplayBuffer and model.success_windows is None


def test_guards_are_off_without_threshold_and_w_reset_with_one_set():
    assert stars(maskout_threshold=None).update_guards == []
    assert len(stars().update_guards) == 2
    assert stars(w_reset=False).w_reset_callback is None
    assert stars(n_param_sets=1).w_reset_callback is None
    assert stars().update_guards[0].threshold == 1e4


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("compositional_head", [True, False])
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_values_that_are_not_finite_stay_with_their_task(what, compositional_head, order):
    model = stars(collect=60, optimizer_order=order, compositional_head=compositional_head)
    buffer = model.replay_buffer
    buffer._rows[: buffer.capacity_per_task, buffer._columns[what]] = np.nan
    model.train(3)
    assert model.dropped_updates.tolist() == [3, 0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())


@pytest.mark.parametrize("compositional_head", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_vector_that_is_not_finite_or_overflows_is_reset(value, compositional_head):
    model = stars(collect=60, compositional_head=compositional_head)
    with th.no_grad():
        model.policy.compositional_vectors[0] = value
    model.train(1)
    assert model.dropped_updates.tolist() == [1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert model.policy.compositional_vectors[0].abs().max() < 100


@pytest.mark.parametrize(("column", "value"), [("reward", np.nan), ("obs", 0.3), ("obs", 1e38), ("obs", np.nan)])
def test_dropped_tasks_reach_nothing(column, value):
    """With task 1 dropped, its transitions may be anything, also as negatives of the others' triplets: the same update."""
    results = []
    for stored in (0.0, value):
        model = stars(collect=60, maskout_threshold=None, triplet_coef=100.0)
        model.add_update_guard(DropTasks([False, True, False]))
        buffer = model.replay_buffer
        buffer._rows[buffer.capacity_per_task : 2 * buffer.capacity_per_task, buffer._columns[column]] = stored
        model.set_random_seed(5)
        model.train(3)
        results.append(parameters_of(model))
    for name, tensor in results[0].items():
        # Up to rounding: groups without a task are multiplied in another batch
        th.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", [dict(triplet_coef=0.0), dict(env="Pendulum-v1")])
def test_a_unique_branch_that_nothing_trains_is_refused(kwargs):
    with pytest.raises(ValueError, match="unique_from_rl must be True without a triplet loss"):
        stars(unique_from_rl=False, **kwargs)


# -------------------------------------------------------------- export, arguments


def test_branches_of_other_depth_are_not_exported():
    model = stars(policy_kwargs=dict(unique_arch=[8]))
    with pytest.raises(ValueError, match=r"unique_arch must have as many hidden layers as .* to export, got 1"):
        model.export_task_policy(0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_param_sets=0), "n_param_sets must be at least 1, got 0"),
        (dict(w_init="ones"), "w_init must be one of"),
        (dict(w_learning_rate=-1.0), "w_learning_rate must be at least 0 or None, got -1"),
        (dict(unique_dim=-1), "unique_dim must be at least 0, got -1"),
        (dict(triplet_coef=-1.0), "triplet_coef must be at least 0, got -1"),
        (dict(triplet_coef=float("nan")), "triplet_coef must be at least 0 and finite, got nan"),
        (dict(triplet_margin=0.0), "triplet_margin must be above 0, got 0"),
        (dict(maskout_threshold=-1.0), "maskout_threshold must be at least 0 or None, got -1"),
        (dict(w_reset_simplex="gauss"), "w_reset_simplex must be one of 'dirichlet', 'l1_uniform', got 'gauss'"),
        (dict(task_priority="best"), "task_priority must be one of 'linear'"),
        (dict(rho_min=1.5), r"rho_min must be in \[0, 1\], got 1.5"),
        (dict(per_alpha=-0.1), r"per_alpha must be in \[0, 1\], got -0.1"),
        (dict(per_beta=float("nan")), r"per_beta must be in \[0, 1\], got nan"),
        (dict(performance_source="rollout"), "performance_source must be one of 'train', 'eval', got 'rollout'"),
        (dict(performance_window=0), "performance_window must be at least 1, got 0"),
        (dict(actor_batch="other"), "actor_batch must be one of 'same', 'uniform_in_task', got 'other'"),
        (dict(use_sde=True), "use_sde must be False, got True"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        stars(**kwargs)


def test_policy_of_another_algorithm_is_refused():
    with pytest.raises(ValueError, match="policy must be a subclass of STARSPolicy"):
        STARSSAC(PaCoSAC.policy_aliases["MlpPolicy"], make_env())
