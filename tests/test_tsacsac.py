"""TSACSAC: how the action is formed, who trains what, lambda, its limit case, and the checks of its set-up."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.nn import functional as F

from sb3_mtrl import MTSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.callbacks import LossMaskoutCallback, WResetCallback
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize
from sb3_mtrl.mtsac.policies import MTSACPolicy
from sb3_mtrl.tsacsac.policies import PaCoTSACPolicy, attach_proposals, edit_actions
from sb3_mtrl.tsacsac.tsacsac import LAMBDA_FLOOR, SPARSE_REWARD, inverse_softplus
from tests.models import NUM_TASKS, DropTasks, make_env, make_model, parameters_of

BASES = ["mtsac", "paco"]


def make_tsac(env=None, **kwargs) -> TSACSAC:
    return make_model(TSACSAC, env=env, **kwargs)


def fill_sparse_rewards(model: TSACSAC, seed: int = 0) -> None:
    """Random play of a few steps never succeeds: give the stored transitions sparse rewards that say something."""
    buffer = model.replay_buffer
    rewards = buffer._rows[:, buffer._columns[SPARSE_REWARD]]
    rewards[:] = 10.0 * np.random.default_rng(seed).integers(0, 2, size=rewards.shape)


def state_of(model: TSACSAC) -> dict[str, th.Tensor]:
    """Everything that learns."""
    more = {"log_ent_coef": model.log_ent_coef, "log_edit_ent_coef": model.log_edit_ent_coef, "lambda": model.raw_lambda}
    return {**parameters_of(model), **{name: tensor.detach().clone() for name, tensor in more.items()}}


def make_ready(**kwargs) -> TSACSAC:
    """A model past its warm-up, with some transitions that lambda does not know."""
    model = make_tsac(collect=30, learning_starts=0, gradient_steps=0, **kwargs)
    model._fresh_rewards[:] = 0
    return model


def step_with_success(model: TSACSAC, success: list[float], n_steps: int = 1) -> None:
    """Tell the model of steps, one per sub-environment, that ended so, and let it update lambda."""
    rewards = np.zeros(model.n_envs)
    infos = [{"success": value} for value in success]
    for _ in range(n_steps):
        model._store_transition(
            model.replay_buffer, np.zeros((model.n_envs, 2)), model._last_obs, rewards, rewards.astype(bool), infos
        )
        model.train(1)


# ------------------------------------------------------------------ the action


def test_edit_by_hand():
    """clip(a_hat + 2 da): 0.2 + 2 * 0.1 = 0.4; 0.2 - 2 * 1 is clipped to -1; no edit, no change; -1 + 2 * 1 = 1 is reached."""
    proposals = th.tensor([[0.2, 0.2, 0.7, -1.0]])
    edits = th.tensor([[0.1, -1.0, 0.0, 1.0]], requires_grad=True)
    actions = edit_actions(proposals, edits)
    th.testing.assert_close(actions, th.tensor([[0.4, -1.0, 0.7, 1.0]]))
    (gradient,) = th.autograd.grad(actions.sum(), edits)
    th.testing.assert_close(gradient[0, :3], th.tensor([2.0, 0.0, 2.0]))


def test_proposals_stand_before_the_one_hot():
    obs = th.tensor([[1.0, 2.0, 0.0, 1.0]])
    proposals = th.tensor([[0.3, 0.4]])
    assert th.equal(attach_proposals(obs, proposals, 2), th.tensor([[1.0, 2.0, 0.3, 0.4, 0.0, 1.0]]))
    assert th.equal(attach_proposals(obs, proposals, 1), th.tensor([[1.0, 2.0, 0.0, 1.0, 0.3, 0.4]]))
    grouped = attach_proposals(obs.view(1, 1, -1), proposals, 2)
    assert grouped.shape == (1, 1, 6) and th.equal(grouped[0], attach_proposals(obs, proposals, 2))


class ScaledActions(gym.Env):
    """Actions between 0 and 4, any observation."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Box(0.0, 4.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {"success": False}


@pytest.mark.parametrize("base", BASES)
def test_predict_returns_the_corrected_action(base):
    """h(tanh mu, tanh mu') in SB3's scaled space, unscaled last."""
    model = make_tsac(env=DummyVecEnv([ScaledActions]), base=base)
    with th.no_grad():  # a new editor hardly edits
        model.editor.mu.bias[:] = th.tensor([0.5, -2.0])
    obs = th.randn(5, 3)
    with th.no_grad():
        a_hat = th.tanh(model.actor.get_action_dist_params(obs)[0])
        da = th.tanh(model.editor.get_action_dist_params(th.cat([obs, a_hat], dim=1))[0])
    expected = np.clip(a_hat + 2 * da, -1, 1).numpy()
    assert np.abs(expected - a_hat.numpy()).min() > 0.5
    actions, _ = model.predict(obs.numpy(), deterministic=True)
    np.testing.assert_allclose(actions, 2 + 2 * expected, atol=1e-5)


@pytest.mark.parametrize(("n_heads", "base"), [("shared", "mtsac"), ("per_task", "mtsac"), ("shared", "paco")])
def test_a_new_editor_hardly_edits(n_heads, base):
    model = make_tsac(n_heads=n_heads, base=base)
    obs = th.cat([th.randn(6, 4), th.eye(3).repeat(2, 1)], dim=1)
    with th.no_grad():
        edits = model.editor(attach_proposals(obs, th.rand(6, 2), 3), deterministic=True)
    assert edits.abs().max() < 0.01


def test_stored_actions_are_the_executed_ones():
    model = make_tsac(warmup_actions="policy")
    executed = []
    step_async = model.env.step_async
    model.env.step_async = lambda actions: (executed.append(actions.copy()), step_async(actions))[1]
    model.learn(30)
    buffer = model.replay_buffer
    stored = buffer._rows.reshape(3, buffer.capacity_per_task, -1)[:, :10, buffer._columns["action"]]
    np.testing.assert_allclose(stored.transpose(1, 0, 2), np.array(executed), atol=1e-6)


# ------------------------------------------------------------ the limit: MTSAC


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_zero_edit_and_lambda_zero_is_the_base_method(base, num_tasks):
    """Given the same noise the shared policy, the dense critics, W and the temperatures get MTSAC's (PaCoSAC's) updates."""
    common = dict(ent_coef_learning_rate=1e-3, learning_rate=1e-3, warmup_actions="uniform", target_entropy=-2.0)
    if base == "paco":
        other = dict(maskout_threshold=None, optimizer_order="sequential", min_ent_coef=None, max_ent_coef=None)
        algorithm, tsac_kwargs = PaCoSAC, dict(base="paco")
    else:
        algorithm, other, tsac_kwargs = MTSAC, {}, {}
    if num_tasks == 1:  # SB3's buffer draws its batches in another way
        other.update(replay_buffer_class=MultiTaskReplayBuffer, replay_buffer_kwargs=dict(task_in_observation=False))
    expected = make_model(algorithm, env=make_env(num_tasks, n_envs=2), **common, **other)
    model = make_tsac(env=make_env(num_tasks, n_envs=2), lambda_init=0.0, **common, **tsac_kwargs)

    def no_edits(obs: th.Tensor, proposals: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return th.zeros_like(proposals), th.zeros(len(proposals))

    model.policy.sample_edits = no_edits
    for one in (expected, model):
        one.learn(120)
        one.set_random_seed(11)
        one.train(20)
    assert model.multipliers.tolist() == [0] * num_tasks
    parameters, expected_parameters = parameters_of(model), parameters_of(expected)
    assert set(expected_parameters) < set(parameters)
    for name, tensor in expected_parameters.items():
        assert th.allclose(parameters[name], tensor, rtol=0, atol=2e-6), name
    assert not th.equal(model.log_ent_coef, th.zeros(num_tasks))
    th.testing.assert_close(model.log_ent_coef, expected.log_ent_coef, rtol=0, atol=1e-6)


# ------------------------------------------------------------ who trains what


def one_update(model: TSACSAC, batch: object) -> None:
    """The gradients of one update, without any step."""
    optimizers = [*model._all_optimizers(), model.editor.optimizer, model.sparse_critic.optimizer, model.lambda_optimizer]
    for optimizer in optimizers:
        optimizer.step = lambda: None
    model.replay_buffer.sample = lambda batch_size, env: batch
    th.manual_seed(7)
    model.train(1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(action_distance="l2"),
        dict(sp_value_on="proposed", normalize_lagrange=False),
        dict(entropy_in_target=False, lambda_mode="shared", lambda_init=3.0),
    ],
)
def test_gradients_of_one_update_equal_the_losses_written_out(base, kwargs):
    """Sections of the method one by one, with plain autograd: psi frozen for phi's loss, a_hat detached for psi's."""
    model = make_tsac(base=base, collect=60, gamma=0.9, **kwargs)
    fill_sparse_rewards(model)
    with th.no_grad():
        model.editor.mu.bias[:] = th.tensor([0.2, -0.1])
        model.log_ent_coef[:] = th.tensor([0.1, -0.5, 0.3])
        model.log_edit_ent_coef[:] = th.tensor([-0.4, 0.2, 0.1])
    batch = model.replay_buffer.sample(24)
    obs, next_obs = batch.observations.view(3, 8, -1), batch.next_observations.view(3, 8, -1)
    rows = th.arange(3).repeat_interleave(8)
    alpha, beta = model.log_ent_coef.detach().exp()[rows, None], model.log_edit_ent_coef.detach().exp()[rows, None]

    def min_q(critic, at, actions):
        return critic.q_values(at, actions).min(dim=0).values

    th.manual_seed(7)  # in the order of the update: a_hat, a_hat', da', da
    a_hat, log_phi = model.actor.action_log_prob(obs)
    with th.no_grad():
        next_a_hat, next_log_phi = model.actor.action_log_prob(next_obs)
        next_da, _ = model.policy.sample_edits(next_obs, next_a_hat)
        next_a = (next_a_hat + 2 * next_da).clamp(-1, 1)
        entropy = alpha * next_log_phi[:, None] if model.entropy_in_target else 0.0
        y_d = batch.rewards + 0.9 * (1 - batch.dones) * (min_q(model.critic_target, next_obs, next_a) - entropy)
        y_s = batch.extras[SPARSE_REWARD] + 0.9 * (1 - batch.dones) * min_q(model.sparse_critic_target, next_obs, next_a)
    noise = th.get_rng_state()
    losses = {
        "critic": sum(0.5 * F.mse_loss(q, y_d) for q in model.critic(obs, batch.actions)),
        "sparse_critic": sum(0.5 * F.mse_loss(q, y_s) for q in model.sparse_critic(obs, batch.actions)),
    }
    # phi: psi gets no gradient, but hands it on to a_hat
    da, _ = model.policy.sample_edits(obs, a_hat)
    a = (a_hat + 2 * da).clamp(-1, 1)
    sp_value = min_q(model.critic, obs, a if model.sp_value_on == "edited" else a_hat)
    losses["actor"] = (alpha * log_phi[:, None] - sp_value).mean()
    # psi: the proposal is a constant
    th.set_rng_state(noise)
    fixed = a_hat.detach()
    da, log_psi = model.policy.sample_edits(obs, fixed)
    a = (fixed + 2 * da).clamp(-1, 1)
    if model.action_distance == "hinge":
        distance = F.relu(min_q(model.critic, obs, fixed).detach() - min_q(model.critic, obs, a))
    else:
        distance = (a - fixed).square().mean(dim=1, keepdim=True)
    lambda_ = model.lambda_init
    w_d, w_s = (1 / (1 + lambda_), lambda_ / (1 + lambda_)) if model.normalize_lagrange else (1.0, lambda_)
    losses["editor"] = (beta * log_psi[:, None] + w_d * distance - w_s * min_q(model.sparse_critic, obs, a)).mean()

    networks = {name: list(getattr(model, name).parameters()) for name in losses}
    expected = {name: th.autograd.grad(loss, networks[name], retain_graph=True) for name, loss in losses.items()}
    if base == "paco":
        w = model.policy.compositional_vectors
        # W belongs to the policy and to the critics; what reaches it through the critics from the actor's loss does not count
        (from_critics,) = th.autograd.grad(losses["critic"], w, retain_graph=True)
        free_a_hat = a_hat.detach().requires_grad_()
        th.set_rng_state(noise)
        da, _ = model.policy.sample_edits(obs, free_a_hat)
        value = min_q(model.critic, obs, (free_a_hat + 2 * da).clamp(-1, 1) if model.sp_value_on == "edited" else free_a_hat)
        (g,) = th.autograd.grad(value.mean(), free_a_hat)
        (from_actor,) = th.autograd.grad((alpha * log_phi[:, None]).mean() - (g * a_hat).sum(), w, retain_graph=True)
        expected_w = from_critics + from_actor
    one_update(model, batch)
    for name, gradients in expected.items():
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients), name
        for parameter, gradient in zip(networks[name], gradients, strict=True):
            assert th.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name
    if base == "paco":
        th.testing.assert_close(w.grad, expected_w, rtol=1e-4, atol=1e-6)
    # d L / d log alpha = - mean over the batch of (log pi + target entropy), of the task's rows
    gap = (log_psi.detach() + model.edit_target_entropy).view(3, 8).sum(dim=1) / 24
    th.testing.assert_close(model.log_edit_ent_coef.grad, -gap, rtol=1e-4, atol=1e-6)


def test_the_shared_policy_s_step_leaves_the_editor_alone_and_vice_versa():
    model = make_tsac(collect=60)
    fill_sparse_rewards(model)
    groups = {name: list(getattr(model, name).parameters()) for name in ("actor", "editor", "critic", "sparse_critic")}
    gradients: dict[str, dict[str, list]] = {}

    def watch(name: str) -> None:
        def snapshot() -> dict[str, list]:
            return {
                group: [None if tensor.grad is None else tensor.grad.clone() for tensor in tensors]
                for group, tensors in groups.items()
            }

        step = getattr(model, name).optimizer.step
        getattr(model, name).optimizer.step = lambda: (gradients.update({name: snapshot()}), step())[1]

    watch("actor")
    watch("editor")
    model.train(1)
    assert all(gradient is None for gradient in gradients["actor"]["editor"])
    assert any(gradient.any() for gradient in gradients["editor"]["editor"])
    for group in ("actor", "critic", "sparse_critic"):  # neither policy's loss reaches them but phi's own
        for at_actor_step, at_editor_step in zip(gradients["actor"][group], gradients["editor"][group], strict=True):
            assert th.equal(at_actor_step, at_editor_step)


def test_the_shared_policy_learns_through_the_edit():
    """d a / d a_hat = 1 + 2 d da / d a_hat: an editor that undoes the proposal leaves nothing to gain from the dense value."""
    model = make_tsac(collect=60, ent_coef=0.0, policy_kwargs=dict(net_arch=dict(pi=[], qf=[16])))
    n_base = 4

    def actor_gradient(slope: float) -> float:
        editor = model.editor
        with th.no_grad():
            editor.mu.weight.zero_()
            editor.mu.weight[:, n_base : n_base + 2] = slope * th.eye(2)
            editor.mu.bias.zero_()
            editor.log_std.weight.zero_()
            editor.log_std.bias.fill_(-20)
            model.actor.mu.weight.mul_(0.01)  # proposals near 0, where tanh is straight
            model.actor.mu.bias.zero_()
            model.actor.log_std.weight.zero_()
            model.actor.log_std.bias.fill_(-20)
        batch = model.replay_buffer.__class__.sample(model.replay_buffer, 24)
        one_update(model, batch)
        return model.actor.mu.weight.grad.norm().item()

    assert actor_gradient(0.0) > 1e-2
    assert actor_gradient(-0.5) < 1e-3 * actor_gradient(0.0)


@pytest.mark.parametrize("base", BASES)
def test_everything_learns_in_its_own_optimizer(base):
    model = make_tsac(base=base, collect=60)
    optimizers = [*model._all_optimizers(), model.editor.optimizer, model.sparse_critic.optimizer, model.lambda_optimizer]
    held = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    targets = {*model.critic_target.parameters(), *model.sparse_critic_target.parameters()}
    assert set(held) == {
        id(parameter)
        for parameter in (*model.policy.parameters(), model.log_ent_coef, model.log_edit_ent_coef, model.raw_lambda)
        if not any(parameter is target for target in targets)
    }
    before = state_of(model)
    model._fresh_rewards += 1
    model.train(3)
    changed = {name for name, tensor in state_of(model).items() if not th.equal(tensor, before[name])}
    assert changed == set(before)


def test_target_critics_follow():
    model = make_tsac(tau=0.25)
    with th.no_grad():
        for parameter in model.sparse_critic.parameters():
            parameter += 1
    before = [parameter.clone() for parameter in model.sparse_critic_target.parameters()]
    model._update_target_networks()
    for target, old in zip(model.sparse_critic_target.parameters(), before, strict=True):
        th.testing.assert_close(target, old + 0.25)


def test_hinge_is_zero_without_edit_and_for_an_edit_that_improves():
    model = make_tsac()
    proposal, value, value_grad = th.rand(5, 2) - 0.5, th.randn(5, 1), th.ones(5, 2)

    def hinge(edited_value: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return model._distances(proposal, proposal, edited_value, value, value_grad)

    for edited_value in (value, value + 0.5):
        assert not any(part.any() for part in hinge(edited_value))
    distance, gradient = hinge(value - 2.0)
    th.testing.assert_close(distance, th.full((5, 1), 2.0))
    th.testing.assert_close(gradient, -value_grad)


def test_l2_distance_by_hand():
    """((0.3)^2 + (-0.4)^2) / 2 = 0.125, with gradient 2 / 2 (0.3, -0.4)"""
    model = make_tsac(action_distance="l2")
    distance, gradient = model._distances(
        th.tensor([[0.5, 0.1]]), th.tensor([[0.2, 0.5]]), th.zeros(1, 1), None, th.zeros(1, 2)
    )
    assert distance.item() == pytest.approx(0.125)
    th.testing.assert_close(gradient, th.tensor([[0.3, -0.4]]))


# ---------------------------------------------------------------------- lambda


def test_inverse_softplus():
    for value in (1e-3, 1.0, 10.0, 1e4):
        assert F.softplus(th.tensor(inverse_softplus(value), dtype=th.float64)).item() == pytest.approx(value, rel=1e-9)
    assert F.softplus(th.tensor(inverse_softplus(0.0))).item() == 0


def test_lambda_rises_while_the_budget_is_missed_and_falls_when_it_is_exceeded():
    model = make_ready(sparse_budget=[0.5, 0.5, 1.0])
    assert model.multipliers.tolist() == pytest.approx([1, 1, 1])
    step_with_success(model, [0.0, 1.0, 1.0])
    first = model.raw_lambda.detach().clone()
    # Adam's first step is of the size of its learning rate; a budget that is met exactly moves nothing
    start = inverse_softplus(1.0)
    np.testing.assert_allclose(first.numpy() - start, [0.01, -0.01, 0.0], atol=1e-5)
    step_with_success(model, [0.0, 1.0, 1.0], n_steps=100)
    assert model.multipliers[0] > 1.5 and model.multipliers[1] < 0.6 and model.multipliers[2] == pytest.approx(1)


def test_lambda_follows_the_mean_of_the_fresh_steps():
    """Gradient of softplus(raw) (mean - C) at lambda 1: sigmoid(ln(e - 1)) = 1 - 1/e; means 0.25, 0.5, 1 of 4 steps, C 0.4."""
    model = make_ready(sparse_budget=0.4)
    model._fresh_rewards[:] = [[1.0, 2.0, 4.0], [4.0, 4.0, 4.0]]
    model.train(1)
    expected = (1 - 1 / math.e) * np.array([0.25 - 0.4, 0.5 - 0.4, 1.0 - 0.4])
    np.testing.assert_allclose(model.raw_lambda.grad.numpy(), expected, atol=1e-6)


def test_shared_lambda_follows_the_mean_over_tasks():
    model = make_ready(sparse_budget=0.4, lambda_mode="shared")
    model._fresh_rewards[:] = [[1.0, 2.0, 4.0], [4.0, 4.0, 4.0]]
    model.train(1)
    expected = (1 - 1 / math.e) * (0.25 + 0.5 + 1.0 - 3 * 0.4)
    np.testing.assert_allclose(model.raw_lambda.grad.numpy(), [expected], atol=1e-6)
    assert model.multipliers.shape == (3,) and model.raw_lambda.shape == (1,)


def test_lambda_respects_its_cap():
    model = make_ready(lambda_max=1.5, lambda_learning_rate=1.0)
    step_with_success(model, [0.0, 0.0, 0.0], n_steps=5)
    assert model.multipliers.tolist() == pytest.approx([1.5] * 3)
    free = make_ready(lambda_max=None, lambda_learning_rate=1.0)
    step_with_success(free, [0.0, 0.0, 0.0], n_steps=5)
    assert free.multipliers.min() > 4


def test_lambda_rises_again_after_long_success():
    """Without a floor it came to 1e-10: there softplus has a slope of 1e-10, nothing beside Adam's epsilon of 1e-8."""
    model = make_ready(lambda_learning_rate=0.1)
    with th.no_grad():
        model.raw_lambda.fill_(inverse_softplus(1e-10))
    step_with_success(model, [1.0, 1.0, 1.0])
    assert model.multipliers.tolist() == pytest.approx([LAMBDA_FLOOR] * 3, rel=1e-3)
    step_with_success(model, [0.0, 1.0, 1.0], n_steps=150)
    assert model.multipliers[0] > 1 > model.multipliers[1:].max()
    never = make_ready(lambda_init=0.0, lambda_learning_rate=0.1)
    step_with_success(never, [0.0, 0.0, 0.0])
    assert never.multipliers.tolist() == [0, 0, 0]


def test_lambda_is_frozen_until_learning_starts_and_does_not_see_the_warm_up():
    model = make_tsac(learning_starts=60, sparse_budget=0.5)
    seen = []
    train = model.train
    model.train = lambda *args, **kwargs: (seen.append(model._fresh_rewards.copy()), train(*args, **kwargs))[1]
    model.learn(60)
    assert model._n_updates == 0 and model.multipliers.tolist() == pytest.approx([1, 1, 1])
    assert not model._fresh_rewards.any()
    model.learn(30, reset_num_timesteps=False)
    assert len(seen) == 10
    for sums in seen:  # one step of each sub-environment since the last update
        assert sums[1].tolist() == [1, 1, 1]
    assert np.all(model.multipliers.numpy() > 1)


def test_lambda_rises_also_where_updates_wait_for_the_next_step():
    models = [make_tsac(learning_starts=30, sparse_budget=0.5, overlap=overlap).learn(60) for overlap in (False, True)]
    # No success in either: ten steps of lambda on gaps of -0.5 each
    assert models[1].multipliers.tolist() == pytest.approx(models[0].multipliers.tolist())
    assert models[1].multipliers.min() > 1


def test_one_step_of_lambda_per_rollout():
    model = make_ready()
    model._fresh_rewards[1] = 1
    model.train(5)
    assert model.lambda_optimizer.state[model.raw_lambda]["step"] == 1
    model.train(2)  # nothing fresh
    assert model.lambda_optimizer.state[model.raw_lambda]["step"] == 1


def test_no_schedule_touches_lambda_s_learning_rate():
    model = make_tsac(learning_starts=20, learning_rate=lambda remaining: 1e-3 * remaining)
    model.learn(60)
    assert model.lambda_optimizer.param_groups[0]["lr"] == 1e-2
    rates = {optimizer.param_groups[0]["lr"] for optimizer in model._scheduled_optimizers()}
    (rate,) = rates
    assert rate < 1e-4
    assert [group["lr"] for group in model.ent_coef_optimizer.param_groups] == [rate, rate]


@pytest.mark.parametrize("normalize", [True, False])
def test_reward_weights_by_hand(normalize):
    model = make_tsac(collect=30, normalize_lagrange=normalize)
    with th.no_grad():
        model.raw_lambda[:] = th.tensor([inverse_softplus(value) for value in (1.0, 3.0, 9.0)])
    dense, sparse = model._reward_weights(model.replay_buffer.sample(3))
    expected = ([0.5, 0.25, 0.1], [0.5, 0.75, 0.9]) if normalize else ([1, 1, 1], [1, 3, 9])
    np.testing.assert_allclose(dense.squeeze(1).numpy(), expected[0], atol=1e-6)
    np.testing.assert_allclose(sparse.squeeze(1).numpy(), expected[1], atol=1e-5)


def test_bounds_of_entropy_coefficients_hold_for_both():
    model = make_tsac(collect=30, min_ent_coef=0.5, max_ent_coef=2.0)
    with th.no_grad():
        model.log_ent_coef[:] = model.log_edit_ent_coef[:] = th.tensor([-5.0, 0.0, 5.0])
    batch = model.replay_buffer.sample(3)
    for rows in (model._ent_coef_per_row(batch), model._edit_ent_coef_per_row(batch)):
        np.testing.assert_allclose(rows.squeeze(1)[:2].numpy(), [0.5, 1.0], atol=1e-6)
    model.train(1)
    assert max(model.log_ent_coef.max(), model.log_edit_ent_coef.max()) <= math.log(2) + 1e-6


def test_fixed_entropy_coefficient_serves_both():
    model = make_tsac(collect=60, ent_coef=0.2)
    assert model.log_edit_ent_coef is None
    assert model._edit_ent_coef_per_row(model.replay_buffer.sample(3)).item() == pytest.approx(0.2)
    model.train(2)


# -------------------------------------------------------------- sparse rewards


def stored_rows(model: TSACSAC, name: str, task: int) -> np.ndarray:
    buffer = model.replay_buffer
    rows = buffer._rows.reshape(buffer.num_tasks, buffer.capacity_per_task, -1)[task, : buffer.sizes()[task]]
    return rows[:, buffer._columns[name]]


@pytest.mark.parametrize("sparse_reward", ["success", "first_success", "neg"])
def test_sparse_rewards_belong_to_their_transition_across_auto_resets(sparse_reward):
    """
    Success is that the true next observation (position, goal) is within the tolerance: read from the stored next
    observations, which at an episode's last step are not the ones that the reset returns.
    """
    horizon, tolerance = 5, 0.95
    env = make_env(horizon=horizon, tolerance=tolerance)
    model = make_tsac(
        env=env,
        sparse_reward=sparse_reward,
        success_bonus=4.0,
        sparse_budget=None if sparse_reward != "first_success" else 0.1,
    )
    model.learn(3 * horizon * 20)
    for task in range(NUM_TASKS):
        next_obs = stored_rows(model, "next_obs", task)
        success = np.linalg.norm(next_obs[:, :2] - next_obs[:, 2:4], axis=1) <= tolerance
        assert 0.05 < success.mean() < 0.95 and success[horizon - 1 :: horizon].any()
        expected = success.astype(float)
        if sparse_reward == "neg":
            expected = success - 1.0
        elif sparse_reward == "first_success":
            episodes = success.reshape(-1, horizon)
            expected = (episodes & (episodes.cumsum(axis=1) == 1)).reshape(-1)
        np.testing.assert_allclose(stored_rows(model, SPARSE_REWARD, task)[:, 0], 4.0 * expected, atol=1e-6)


def test_normalised_rewards_leave_the_sparse_reward_and_lambda_alone():
    env = VecTaskNormalize(make_env(horizon=5, tolerance=0.95), norm_reward=True)
    model = make_tsac(env=env, learning_starts=30)
    seen = []
    update = model._update_lambda
    model._update_lambda = lambda dropped: (seen.append(model._fresh_rewards.copy()), update(dropped))[1]
    model.learn(150)
    batch = model.replay_buffer.sample(240, env=model.get_vec_normalize_env())
    raw = model.replay_buffer.sample(240)
    assert set(batch.extras[SPARSE_REWARD].unique().tolist()) == {0.0, 10.0}
    assert abs(batch.rewards.std() / raw.rewards.std() - 1) > 0.1  # the dense ones are normalised
    assert set(np.stack(seen)[:, 0].ravel().tolist()) == {0.0, 1.0}


def test_missing_success_counts_as_zero_and_is_warned_about_once():
    with pytest.warns(UserWarning, match="infos hold no 'success'") as warned:
        model = TSACSAC(
            "MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=16, policy_kwargs=dict(net_arch=[8]), device="cpu"
        )
        model.learn(40)
        model.learn(40)
    assert sum("infos hold no 'success'" in str(warning.message) for warning in warned) == 1
    assert not stored_rows(model, SPARSE_REWARD, 0).any()
    assert model.replay_buffer.sample(4).observations.shape == (4, 3)  # no one-hot
    assert model.multipliers.item() > 1
    model.predict(np.zeros(3, dtype=np.float32), deterministic=True)


# ----------------------------------------------------------------------- guards


@pytest.mark.parametrize("base", BASES)
def test_dropped_tasks_contribute_to_no_loss(base):
    """With task 1 dropped, its rewards of both kinds may be anything: the update is the same."""
    results = []
    for spoil in (False, True):
        model = make_tsac(base=base, collect=60, learning_starts=0, gradient_steps=0, on_nonfinite="mask")
        fill_sparse_rewards(model)
        guard = DropTasks([False, True, False])
        model.add_update_guard(guard)
        if spoil:
            buffer = model.replay_buffer
            task_rows = buffer._rows[buffer.capacity_per_task : 2 * buffer.capacity_per_task]
            task_rows[:, buffer._columns["reward"]] = np.nan
            task_rows[:, buffer._columns[SPARSE_REWARD]] = 1e30
        model.set_random_seed(5)
        for _ in range(3):
            model._fresh_rewards[1] = 1
            model.train(1)
        assert model.dropped_updates.tolist() == [0, 3, 0]
        assert spoil == (not guard.seen[0].critic[1].isfinite().item())
        results.append(state_of(model))
    for name, expected in results[0].items():
        assert th.equal(results[1][name], expected), name
    multipliers = model.multipliers
    assert multipliers[1] == pytest.approx(1) and multipliers[0] > 1.01


def test_no_step_is_made_when_all_tasks_are_dropped():
    model = make_tsac(collect=60, learning_starts=0, gradient_steps=0)
    model._fresh_rewards[1] = 1
    model.train(2)  # moments that would move the parameters even without a gradient
    before = state_of(model)
    model.add_update_guard(DropTasks([True, True, True]))
    model._fresh_rewards[1] = 1
    model.train(1)
    after = state_of(model)
    assert all(th.equal(after[name], before[name]) for name in before if "critic_target" not in name)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("column", ["obs", "reward", SPARSE_REWARD])
def test_values_that_are_not_finite_stay_with_their_task(base, column):
    model = make_tsac(base=base, collect=60, on_nonfinite="mask")
    LossMaskoutCallback(loss="critic").init_callback(model)
    buffer = model.replay_buffer
    buffer._rows[: buffer.capacity_per_task, buffer._columns[column]] = np.inf
    model.train(2)
    assert model.dropped_updates.tolist() == [2, 0, 0]
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())


def test_a_spoilt_compositional_vector_is_reset():
    model = make_tsac(base="paco", collect=60, on_nonfinite="mask")
    LossMaskoutCallback(loss="critic").init_callback(model)
    WResetCallback().init_callback(model)
    with th.no_grad():
        model.policy.compositional_vectors[0] = np.inf
    model.train(1)
    assert model.dropped_updates.tolist() == [1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())


# ------------------------------------------------------------------------ set-up


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(base="cmta"), "base must be one of 'mtsac', 'paco', got 'cmta'"),
        (dict(sparse_reward="dense"), "sparse_reward must be one of 'success', 'first_success', 'neg', got 'dense'"),
        (dict(lambda_mode="none"), "lambda_mode must be one of 'per_task', 'shared', got 'none'"),
        (dict(action_distance="l1"), "action_distance must be one of 'hinge', 'l2', got 'l1'"),
        (dict(sp_value_on="both"), "sp_value_on must be one of 'edited', 'proposed', got 'both'"),
        (dict(success_bonus=0.0), "success_bonus must be above 0, got 0.0"),
        (dict(success_bonus=float("nan")), "success_bonus must be above 0 and finite, got nan"),
        (dict(lambda_init=-1.0), "lambda_init must be at least 0, got -1.0"),
        (dict(lambda_max=0.0, lambda_init=0.0), "lambda_max must be at least 1e-06 or None, got 0.0"),
        (dict(lambda_max=0.5), "lambda_max must be at least lambda_init=1.0 or None, got 0.5"),
        (dict(lambda_learning_rate=-1e-3), "lambda_learning_rate must be at least 0, got -0.001"),
        (dict(sparse_budget=1.5), r"sparse_budget must be in \[0, 1\] with sparse_reward='success', got 1.5"),
        (dict(sparse_budget=float("nan")), r"sparse_budget must be in \[0, 1\]"),
        (dict(sparse_budget=[0.5, 0.5]), "sparse_budget must be a number or one for each of num_tasks=3 tasks"),
        (
            dict(sparse_reward="neg", sparse_budget=0.5),
            r"sparse_budget must be in \[-1, 0\] with sparse_reward='neg', got 0.5",
        ),
        (dict(sparse_reward="first_success"), "sparse_budget must be given with sparse_reward='first_success', got None"),
        (dict(base="paco", n_heads="per_task"), "n_heads must be 'shared' with base='paco', got 'per_task'"),
        (dict(use_sde=True), "use_sde must be False, got True"),
        (dict(base="paco", use_sde=True), "use_sde must be False, got True"),
        (dict(n_steps=3), "n_steps must be 1"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage must be False"),
        (dict(replay_buffer_class=ReplayBuffer), "replay_buffer_class must be None, MultiTaskReplayBuffer or a subclass"),
        (dict(replay_buffer_kwargs=dict(extra_columns={"success": 1})), "replay_buffer_kwargs must not set extra_columns"),
        (dict(edit_target_entropy="low"), r"edit_target_entropy \(if not 'auto'\) must be a number, got 'low'"),
    ],
)
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_bad_arguments_are_refused_at_construction(num_tasks, kwargs, message):
    message = message.replace("num_tasks=3", f"num_tasks={num_tasks}")
    with pytest.raises(ValueError, match=message):
        make_tsac(env=make_env(num_tasks), **kwargs)


def test_policies_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"policy must be a subclass of TSACPolicy or one of .* got .*MTSACPolicy"):
        TSACSAC(MTSACPolicy, make_env())
    with pytest.raises(ValueError, match="policy must be a subclass of TSACPolicy with base='mtsac', got PaCoTSACPolicy"):
        TSACSAC(PaCoTSACPolicy, make_env())
    with pytest.raises(ValueError, match=r"policy must be 'MlpPolicy' or a subclass .* got 'CnnPolicy'"):
        TSACSAC("CnnPolicy", make_env())
    assert TSACSAC(PaCoTSACPolicy, make_env(), base="paco", device="cpu").base == "paco"


def test_defaults_and_budgets():
    model = make_tsac()
    assert model.target_entropy == -2 and model.edit_target_entropy == pytest.approx(-2 * (1 + math.log(2)))
    assert model._budgets.tolist() == [0.5] * 3
    assert make_tsac(sparse_reward="neg")._budgets.tolist() == [-0.5] * 3
    assert make_tsac(sparse_budget=(0.1, 0.2, 0.3))._budgets.tolist() == pytest.approx([0.1, 0.2, 0.3])
    # H(2 da) = H(da) + n ln 2 is the usual target entropy
    assert model.edit_target_entropy + 2 * math.log(2) == pytest.approx(-2)
    assert make_tsac(base="paco", policy_kwargs=dict(n_param_sets=2)).policy.compositional_vectors.shape == (3, 2)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_heads="per_task"),
        dict(policy_kwargs=dict(observe_task=False)),
        dict(policy_kwargs=dict(share_features_extractor=True)),
        dict(policy_kwargs=dict(n_critics=3)),
        dict(base="paco", policy_kwargs=dict(structure="actor_only")),
        dict(base="paco", policy_kwargs=dict(structure="output_only", w_learning_rate=1e-4)),
        dict(max_grad_norm=0.5),
        dict(train_freq=4, gradient_steps=2),
        dict(replay_buffer_class=TaskPrioritizedReplayBuffer),
        dict(env="two"),
    ],
)
def test_options_train(kwargs):
    if kwargs.get("env") == "two":
        kwargs = dict(env=make_env(n_envs=2))
    model = make_tsac(learning_starts=30, **kwargs)
    model.learn(120)
    assert model._n_updates > 0
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())


def test_values_in_the_logger():
    model = make_tsac(learning_starts=30, lambda_learning_rate=0.0, env=make_env(horizon=5, tolerance=0.95))
    model.learn(90, log_interval=None)
    recorded: dict[str, float] = {}
    record = model.logger.record
    model.logger.record = lambda key, value, exclude=None: (recorded.update({key: value}), record(key, value, exclude))
    model.dump_logs()
    for task in range(3):
        name = f"point-{task}"
        share = stored_rows(model, SPARSE_REWARD, task).mean() / 10
        assert recorded[f"rollout/success_fraction/{name}"] == pytest.approx(share, abs=1e-6)
        assert recorded[f"train/lambda/{name}"] == pytest.approx(1, abs=1e-5)
        assert 0 < recorded[f"train/edit_size/{name}"] <= 2 and 0 <= recorded[f"train/clipped_fraction/{name}"] <= 1
        assert recorded[f"train/edit_distance/{name}"] >= 0
        for value in ("edit_ent_coef", "ent_coef", "sparse_critic_loss"):
            assert recorded[f"train/{value}/{name}"] > 0
        assert np.isfinite(recorded[f"train/edit_loss/{name}"])
    assert model._train_sums == {} and not model._logged_success.any()


def test_export_says_why_it_is_not_possible():
    with pytest.raises(ValueError, match="cannot be exported"):
        make_tsac().export_task_policy(0)


# ------------------------------------------------------------ save, load, resume


@pytest.mark.parametrize("kwargs", [{}, dict(base="paco"), dict(lambda_mode="shared", sparse_budget=[0.1, 0.2, 0.3])])
def test_a_loaded_model_acts_and_trains_alike(kwargs, tmp_path):
    model = make_tsac(learning_starts=20, **kwargs)
    model.learn(90)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = TSACSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert type(loaded.policy) is type(model.policy)
    assert loaded.editor is loaded.policy.editor and loaded.sparse_critic_target is loaded.policy.sparse_critic_target
    assert th.equal(loaded.multipliers, model.multipliers) and loaded.multipliers[0] != 1
    assert th.equal(loaded._budgets, model._budgets)
    obs = np.concatenate([np.random.default_rng(0).normal(size=(6, 4)), np.tile(np.eye(3), (2, 1))], axis=1).astype(np.float32)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    for one in (model, loaded):  # moments of all optimisers, lambda's too
        one.set_logger(model.logger)
        one.set_random_seed(7)
        for _ in range(3):
            one._fresh_rewards[1] = 1
            one.train(1)
    expected = state_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in state_of(loaded).items())
    loaded.learn(30, reset_num_timesteps=False)


def test_steps_that_lambda_has_not_seen_are_saved(tmp_path):
    model = make_tsac(learning_starts=0, gradient_steps=0)
    model.learn(30)
    model._fresh_rewards[0] = [3, 1, 2]
    assert model._fresh_rewards[1].tolist() == [10, 10, 10]
    model.save(tmp_path / "model.zip")
    loaded = TSACSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    assert np.array_equal(loaded._fresh_rewards, model._fresh_rewards)


def test_episodes_that_were_solved_are_remembered_where_the_environment_goes_on(tmp_path):
    env = make_env(horizon=100, tolerance=10.0)  # every step is in success
    model = make_tsac(env=env, sparse_reward="first_success", sparse_budget=0.01)
    model.learn(30)
    assert [stored_rows(model, SPARSE_REWARD, task).sum() for task in range(3)] == [10.0] * 3
    model.save(tmp_path / "model.zip")
    going_on = TSACSAC.load(tmp_path / "model.zip", env=env, device="cpu", force_reset=False)
    going_on.learn(30, reset_num_timesteps=False)
    assert [stored_rows(going_on, SPARSE_REWARD, task).sum() for task in range(3)] == [0.0] * 3
    restarted = TSACSAC.load(tmp_path / "model.zip", env=make_env(horizon=100, tolerance=10.0, n_envs=2), device="cpu")
    restarted.learn(20, reset_num_timesteps=False)
    assert sum(stored_rows(restarted, SPARSE_REWARD, task).sum() for task in range(3)) == 20.0


def test_lambda_learning_rate_given_at_loading_counts(tmp_path):
    make_tsac(learning_starts=20).learn(60).save(tmp_path / "model.zip")
    loaded = TSACSAC.load(tmp_path / "model.zip", env=make_env(), lambda_learning_rate=0.5, device="cpu")
    loaded.learn(30)
    assert loaded.lambda_optimizer.param_groups[0]["lr"] == 0.5


def test_replay_buffers_without_sparse_rewards_are_refused(tmp_path):
    make_model(MTSAC, collect=30).save_replay_buffer(tmp_path / "buffer.pkl")
    model = make_tsac(collect=30)
    own_buffer = model.replay_buffer
    with pytest.raises(ValueError, match="path must name a replay buffer with the column 'sparse_reward'"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is own_buffer


# --------------------------------------------------------------------- learning


class DivertedTaskEnv(gym.Env):
    """The dense reward is best at -0.5, success is above 0.3; with several tasks the signs alternate."""

    num_tasks = 2
    task_names = ("right", "left")
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.assigned_tasks: tuple[int, ...] = (0, 1)
        self.task_id, self._next, self._steps = 0, 0, 0

    def set_tasks(self, task_ids) -> None:
        self.assigned_tasks = tuple(task_ids)
        self._next = 0

    def _observation(self) -> np.ndarray:
        return np.concatenate([[1.0], np.eye(2)[self.task_id]]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task_id = self.assigned_tasks[self._next % len(self.assigned_tasks)]
        self._next += 1
        self._steps = 0
        return self._observation(), {}

    def step(self, action):
        self._steps += 1
        toward = float(action[0]) * (1, -1)[self.task_id]
        reward = 1 - abs(toward + 0.5)
        return self._observation(), reward, False, self._steps >= 5, {"success": float(toward > 0.3)}


def test_the_correction_leads_where_the_dense_reward_does_not():
    """MTSAC's answer is the dense optimum; TSACSAC's proposal may be it, its corrected action is in success."""
    settings = dict(
        learning_rate=3e-3,
        learning_starts=200,
        batch_size=64,
        gamma=0.5,
        ent_coef=0.02,
        policy_kwargs=dict(net_arch=[32]),
        seed=0,
        device="cpu",
    )
    obs = np.array([[1, 1, 0], [1, 0, 1]], dtype=np.float32)
    actions = {}
    for algorithm in (MTSAC, TSACSAC):
        model = algorithm("MlpPolicy", VecTaskAssignment(DummyVecEnv([DivertedTaskEnv for _ in range(2)])), **settings)
        model.learn(1400)
        actions[algorithm] = model.predict(obs, deterministic=True)[0][:, 0] * [1, -1]
    np.testing.assert_allclose(actions[MTSAC], [-0.5, -0.5], atol=0.2)
    assert np.all(actions[TSACSAC] > 0.3)


def test_without_lambda_one_task_is_solved_as_by_sac():
    """SB3's own test of SAC (``test_identity.py::test_continuous``), whose environment never says success."""
    env = IdentityEnvBox(eps=0.5)
    model = TSACSAC(
        "MlpPolicy", env, learning_rate=1e-3, lambda_init=0.0, policy_kwargs=dict(net_arch=[64, 64]), seed=0, gamma=0.95
    )
    with pytest.warns(UserWarning, match="infos hold no 'success'"):
        model.learn(400)
    mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=20, warn=False)
    assert mean_reward > 90
