"""CMTASAC: who trains what, the recurrent state, its limit cases, and the checks of its set-up."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_mtrl import CMTASAC, MTSAC
from sb3_mtrl.cmtasac.cmtasac import NEXT_STATE, STATE
from sb3_mtrl.cmtasac.policies import GATE_SHARING, CMTAPolicy
from sb3_mtrl.common.torch_layers import Experts, TaskEncoder, info_nce_losses
from sb3_mtrl.common.utils import polyak_update_
from sb3_mtrl.common.vec_env import VecTaskAssignment
from sb3_mtrl.mtsac.policies import MTSACPolicy
from tests.models import NUM_TASKS, DropTasks, make_env, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv

SMALL = dict(expert_arch=[8], feature_dim=6, lstm_hidden_dim=5, task_embedding_dim=4, task_encoder_arch=[8])


def make_cmta(policy_kwargs: dict | None = None, **kwargs) -> CMTASAC:
    return make_model(CMTASAC, policy_kwargs={**SMALL, **(policy_kwargs or {})}, **kwargs)


def n_parameters(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def parameter_groups(model: CMTASAC) -> dict[str, list[th.Tensor]]:
    """The rows of the table of who trains what."""
    policy = model.policy
    target = policy.critic_target
    return {
        "q": list(policy.critic.q_stack.parameters()),
        "experts": list(policy.critic.encoder.experts.parameters()),
        "critic attention": list(policy.critic.encoder.attention.parameters()),
        "task encoder": list(policy.task_encoder.parameters()),
        "actor head": policy.actor.head_parameters(),
        "actor attention": list(policy.actor.encoder.attention.parameters()),
        "entropy coefficients": [model.log_ent_coef],
        "target q": list(target.q_stack.parameters()),
        "target encoder": target.encoder_parameters(),
    }


def sample(model: CMTASAC, batch_size: int = 24):
    replay_data = model.replay_buffer.sample(batch_size)
    return replay_data, *model._observations(replay_data)


# ------------------------------------------------------------------- networks


def test_parameter_counts_of_the_published_network():
    """Observations of 12, actions of 4, T = 10, k = 6: the counts of the authors' networks."""
    policy = CMTAPolicy(
        spaces.Box(-np.inf, np.inf, (22,), np.float32),
        spaces.Box(-1, 1, (4,), np.float32),
        ConstantSchedule(3e-4),
        num_tasks=10,
    )
    encoder = policy.critic.encoder
    assert n_parameters(policy.task_encoder.parameters()) == 25_536
    assert n_parameters(encoder.experts.parameters()) == 29_952
    assert n_parameters(encoder.attention.lstm.parameters()) == 19_968
    assert n_parameters(encoder.attention.gate.parameters()) == 128 * 6 + 6 == 774
    assert n_parameters(encoder.parameters()) == 50_694
    assert n_parameters(policy.actor.head_parameters()) == 595_464
    assert n_parameters(policy.critic.q_stack.parameters()) == 2 * 593_921


def test_new_policies_are_almost_deterministic():
    """log_std = -20 + 11 (tanh(raw) + 1) with raw near 0 is near -9; the entropy of 4 Gaussians of that is 4 (-9 + 1.42)."""
    th.manual_seed(0)
    policy = CMTAPolicy(
        spaces.Box(-np.inf, np.inf, (22,), np.float32),
        spaces.Box(-1, 1, (4,), np.float32),
        ConstantSchedule(3e-4),
        num_tasks=10,
    )
    obs = th.cat([th.randn(200, 12), th.eye(10).repeat(20, 1)], dim=1)
    _, log_std, _ = policy.actor.get_action_dist_params(obs)
    assert -9.5 < log_std.mean() < -8.5
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=1).mean()
    assert entropy.item() == pytest.approx(-30.3, abs=2)


@pytest.mark.parametrize("log_std_squash", ["tanh", "clip"])
def test_log_std_stays_within_its_bounds(log_std_squash):
    model = make_cmta(dict(log_std_squash=log_std_squash, log_std_bounds=(-3.0, -1.0)))
    model.actor.log_std.bias.data[:] = th.tensor([50.0, -50.0])
    _, log_std, _ = model.actor.get_action_dist_params(th.zeros(1, 7))
    th.testing.assert_close(log_std, th.tensor([[-1.0, -3.0]]))


def test_encoder_equals_its_equations():
    """z, h', w, m as the paper writes them, from the same weights with torch's own LSTM."""
    model = make_cmta(collect=30)
    _, obs, _ = sample(model)
    critic = model.critic
    rows = obs
    base, hidden, cell, one_hot = rows[:, :4], rows[:, 4:9], rows[:, 9:14], rows[:, 14:]
    lstm = nn.LSTM(4, 5)
    lstm.load_state_dict({f"{name}_l0": value for name, value in critic.encoder.attention.lstm.state_dict().items()})
    z = model.policy.task_encoder()[one_hot.argmax(dim=1)]
    output, (next_hidden, next_cell) = lstm(base[None], (hidden[None], cell[None]))
    gate = critic.encoder.attention.gate.linear
    logits = th.cat([z, output[0]], dim=1) @ gate.weight.t() + gate.bias
    w = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    m = sum(w[:, j : j + 1] * critic.encoder.experts(base)[j] for j in range(6))
    for keep_experts in (True, False):
        encoding = critic.encode(obs, keep_experts=keep_experts)
        th.testing.assert_close(encoding.latent, th.cat([m, z], dim=1))
        th.testing.assert_close(encoding.gate_weights, w)
        th.testing.assert_close(encoding.next_state, th.cat([next_hidden[0], next_cell[0]], dim=1))


def test_observations_without_state_are_the_first_of_an_episode():
    model = make_cmta()
    obs = th.randn(3, 4)
    one_hot = th.eye(3)
    without = model.critic.encode(th.cat([obs, one_hot], dim=1))
    with_zeros = model.critic.encode(th.cat([obs, th.zeros(3, 10), one_hot], dim=1))
    th.testing.assert_close(without.gate_weights, with_zeros.gate_weights)


# ------------------------------------------------------------ who trains what


@pytest.mark.parametrize("optimizer_order", ["sequential", "joint"])
@pytest.mark.parametrize("gate_sharing", GATE_SHARING)
def test_who_trains_what(gate_sharing, optimizer_order):
    model = make_cmta(gate_sharing=gate_sharing, optimizer_order=optimizer_order, collect=60)
    groups = parameter_groups(model)
    before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in groups.items()}
    model.train(3)
    changed = {
        name for name, tensors in groups.items() if any(not th.equal(a, b) for a, b in zip(tensors, before[name], strict=True))
    }
    assert changed == set(groups) - ({"actor attention"} if gate_sharing == "released" else set())
    # "full": one and the same attention; else the actor's own. The experts are the critics' in any case
    is_critics = model.actor.encoder.attention is model.critic.encoder.attention
    assert is_critics == (gate_sharing == "full")
    assert model.actor.encoder.experts is model.critic.encoder.experts
    assert not any(
        a is b for a in model.critic_target.parameters() for b in (*model.critic.parameters(), *model.actor.parameters())
    )


@pytest.mark.parametrize("gate_sharing", GATE_SHARING)
def test_every_tensor_is_in_one_optimizer_at_most(gate_sharing):
    model = make_cmta(gate_sharing=gate_sharing)

    def held(optimizer) -> set[int]:
        return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    optimizers = [model.actor.optimizer, model.critic.optimizer, model.policy.task_encoder_optimizer]
    assert sum(len(held(optimizer)) for optimizer in optimizers) == len(set().union(*map(held, optimizers)))
    owners = {
        name: [optimizer for optimizer in optimizers if all(id(parameter) in held(optimizer) for parameter in parameters)]
        for name, parameters in parameter_groups(model).items()
    }
    actor, critic, task_encoder = ([optimizer] for optimizer in optimizers)
    assert owners == {
        "q": critic,
        "experts": critic,
        "critic attention": critic,
        "task encoder": task_encoder,
        "actor head": actor,
        "actor attention": {"full": critic, "released": [], "actor": actor}[gate_sharing],
        "entropy coefficients": [],
        "target q": [],
        "target encoder": [],
    }


def trained_groups(model: CMTASAC, loss: th.Tensor) -> set[str]:
    """Groups of parameters that a loss has a gradient other than exactly zero for."""
    model.policy.zero_grad()
    loss.backward()
    return {
        name
        for name, parameters in parameter_groups(model).items()
        if any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    }


def test_what_each_loss_has_a_gradient_for():
    model = make_cmta(gate_sharing="actor", collect=60)
    replay_data, obs, next_obs = sample(model)
    encoding = model.critic.encode(obs, keep_experts=True)
    with th.no_grad():
        next_outputs = model.critic_target.encode(next_obs, keep_experts=True).expert_outputs
    info_nce = info_nce_losses(encoding.expert_outputs, next_outputs)[0].mean()
    assert trained_groups(model, info_nce) == {"experts"}
    td_loss = model._td_errors(replay_data, obs, next_obs, th.ones(1)).square().mean()
    assert trained_groups(model, td_loss) == {"q", "experts", "critic attention", "task encoder"}
    actions, log_prob = model.actor.action_log_prob(obs)
    actor_loss = log_prob.mean() - model.critic.q_values(obs, actions, frozen=True).mean()
    assert trained_groups(model, actor_loss) == {"actor head", "actor attention"}


@pytest.mark.parametrize("gate_sharing", ["full", "released"])
def test_the_actor_loss_trains_the_head_alone(gate_sharing):
    model = make_cmta(gate_sharing=gate_sharing, collect=60)
    _, obs, _ = sample(model)
    actions, log_prob = model.actor.action_log_prob(obs)
    loss = log_prob.mean() - model.critic.q_values(obs, actions, frozen=True).mean()
    assert trained_groups(model, loss) == {"actor head"}


def test_the_task_encoder_learns_only_through_z_beside_the_mixture():
    model = make_cmta(collect=60)
    weight = model.critic.q_stack.weights[0]
    weight.data[:, SMALL["feature_dim"] : SMALL["feature_dim"] + SMALL["task_embedding_dim"]] = 0.0
    replay_data, obs, next_obs = sample(model)
    td_loss = model._td_errors(replay_data, obs, next_obs, th.ones(1)).square().mean()
    assert "task encoder" not in trained_groups(model, td_loss)


def test_target_networks_follow_at_two_rates():
    model = make_cmta(tau=0.1, encoder_tau=0.5, collect=30)
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.add_(1.0)
    expected = {}
    for part, tau in (("q_stack", 0.1), ("encoder", 0.5)):
        source, target = getattr(model.critic, part), getattr(model.critic_target, part)
        pairs = zip(source.parameters(), target.parameters(), strict=True)
        expected[part] = [(1 - tau) * b.detach() + tau * a.detach() for a, b in pairs]
    model._update_target_networks()
    for part, values in expected.items():
        for got, wanted in zip(getattr(model.critic_target, part).parameters(), values, strict=True):
            th.testing.assert_close(got, wanted)


# --------------------------------------------------------------------- losses


def test_a_task_s_samples_change_its_own_temperature_only():
    model = make_cmta(collect=60)
    model.add_update_guard(DropTasks([True, False, True]))
    model.train(1)
    # Adam's first step is the learning rate times the sign of the gradient
    assert model.log_ent_coef.detach().abs().tolist() == pytest.approx([0.0, 3e-4, 0.0], abs=1e-8)


@pytest.mark.parametrize("ent_coef_loss", ["alpha", "log_alpha"])
def test_gradient_of_the_temperatures(ent_coef_loss):
    """d L / d log alpha_t = -c (mean of log pi over task t + target entropy) / T with c = alpha_t, or 1 for "log_alpha"."""
    model = make_cmta(collect=60, ent_coef="auto_0.3", ent_coef_loss=ent_coef_loss)
    data = model.replay_buffer.sample(24)
    log_prob = th.linspace(-3, 2, 24).reshape(-1, 1)
    (gradient,) = th.autograd.grad(model._ent_coef_losses(log_prob, data, None).mean(), model.log_ent_coef)
    factor = 0.3 if ent_coef_loss == "alpha" else 1.0
    th.testing.assert_close(gradient, -factor * (log_prob.view(3, 8).mean(dim=1) + model.target_entropy) / 3)


def written_out_losses(model: CMTASAC, replay_data) -> dict[str, th.Tensor]:
    """Losses of the critics, without grouping, folding or sharing of encodings."""
    obs = th.cat([replay_data.observations[:, :4], replay_data.extras[STATE], replay_data.observations[:, 4:]], dim=1)
    next_obs = th.cat(
        [replay_data.next_observations[:, :4], replay_data.extras[NEXT_STATE], replay_data.next_observations[:, 4:]], dim=1
    )
    policy = model.policy
    alpha = model.log_ent_coef.detach().exp()[replay_data.observations[:, 4:].argmax(dim=1)].unsqueeze(1)
    with th.no_grad():
        next_actions, next_log_prob = policy.actor.action_log_prob(next_obs)
        next_q = th.min(*policy.critic_target(next_obs, next_actions)) - alpha * next_log_prob.unsqueeze(1)
        target = replay_data.rewards + (1 - replay_data.dones) * model.gamma * next_q
        next_outputs = policy.critic_target.encode(next_obs, keep_experts=True).expert_outputs
    q1, q2 = policy.critic(obs, replay_data.actions)
    outputs = policy.critic.encode(obs, keep_experts=True).expert_outputs
    td = nn.functional.mse_loss(q1, target) + nn.functional.mse_loss(q2, target)
    return {"td": td, "info_nce": info_nce_losses(outputs, next_outputs, 0.1)[0].mean()}


def test_one_update_equals_the_losses_written_out():
    """
    One step of plain gradient descent on plainly written losses is the expected number. (Adam's first step is the sign of the
    gradient, which is decided by rounding where the gradient is next to zero.)
    """
    policy_kwargs = dict(optimizer_class=th.optim.SGD)
    settings = dict(gate_sharing="released", contrastive_coef=30.0, learning_rate=1e-2)
    models = [make_cmta(policy_kwargs, collect=60, **settings) for _ in range(2)]
    batch = models[0].replay_buffer.sample(24)
    for model in models:
        model.replay_buffer.sample = lambda *args, **kwargs: batch
    start = parameters_of(models[1])
    models[0].set_random_seed(5)
    models[0].train(1)
    model = models[1]
    model.set_random_seed(5)
    losses = written_out_losses(model, batch)
    model.critic.optimizer.zero_grad()
    model.policy.task_encoder_optimizer.zero_grad()
    (losses["td"] + 30.0 * losses["info_nce"]).backward()
    model.critic.optimizer.step()
    obs, _ = model._observations(batch)
    alpha = model.log_ent_coef.detach().exp().repeat_interleave(8).unsqueeze(1)
    actions, log_prob = model.actor.action_log_prob(obs)
    min_q = th.min(*model.critic(obs, actions))
    model.actor.optimizer.zero_grad()
    actor_loss = (alpha * log_prob.unsqueeze(1) - min_q).mean()
    grads = th.autograd.grad(actor_loss, model.actor.head_parameters())
    for parameter, grad in zip(model.actor.head_parameters(), grads, strict=True):
        parameter.grad = grad
    model.actor.optimizer.step()
    model.policy.task_encoder_optimizer.step()
    polyak_update_(model.critic.q_stack.parameters(), model.critic_target.q_stack.parameters(), 0.005)
    polyak_update_(model.critic.encoder.parameters(), model.critic_target.encoder.parameters(), 0.05)
    expected = parameters_of(model)
    for name, tensor in parameters_of(models[0]).items():
        step, expected_step = tensor - start[name], expected[name] - start[name]
        th.testing.assert_close(step, expected_step, rtol=1e-3, atol=1e-4 * expected_step.abs().max().item() + 1e-7)
    assert models[0]._train_sums["contrastive_loss"].item() == pytest.approx(losses["info_nce"].item(), rel=1e-4)
    assert models[0]._train_sums["critic_loss"].mean().item() == pytest.approx(losses["td"].item(), rel=1e-4)


def test_a_spoilt_state_stays_with_its_task():
    model = make_cmta(collect=60, on_nonfinite="mask")
    model.add_update_guard(DropTasks([False, False, False]))
    buffer = model.replay_buffer
    buffer._rows[: buffer.capacity_per_task, buffer._columns[STATE]] = np.nan
    model.train(2)
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert model.dropped_updates.tolist() == [2, 0, 0]


# ----------------------------------------------------------------- limit case


class OneExpertExtractor(BaseFeaturesExtractor):
    """The encoder with one expert: its output and the task representation; the task encoder is held, not registered."""

    def __init__(self, observation_space: spaces.Box, task_encoder: list[TaskEncoder]):
        super().__init__(observation_space, SMALL["feature_dim"] + SMALL["task_embedding_dim"])
        self.experts = Experts(4, SMALL["feature_dim"], 1, SMALL["expert_arch"])
        self.held = task_encoder

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.cat([self.experts(observations[:, :4])[0], observations[:, 4:] @ self.held[0]()], dim=1)


class Constant(nn.Module):
    """What the actor sees of the critics' encoder."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.held = [extractor]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        with th.no_grad():
            return self.held[0](observations)


class OneExpertPolicy(MTSACPolicy):
    """MTSAC's networks on that encoder, which the critic loss trains."""

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        self.actor.features_extractor = Constant(self.critic.features_extractor)
        heads = (self.actor.latent_pi, self.actor.mu, self.actor.log_std)
        self.actor.optimizer = th.optim.Adam([p for head in heads for p in head.parameters()], lr=3e-4)


class OneExpertMTSAC(MTSAC):
    """MTSAC with the task encoder's optimiser, and CMTA's squared errors instead of half of them."""

    def _shared_optimizers(self):
        return [self.task_encoder_optimizer]

    @staticmethod
    def _critic_losses(td_errors: th.Tensor) -> th.Tensor:
        return 2 * MTSAC._critic_losses(td_errors)


def test_one_expert_without_contrast_and_memory_is_mtsac_on_that_encoder():
    """Equal start, equal batches: the parameters of MTSAC's own update are the expected numbers."""
    cmta = make_cmta(
        dict(log_std_squash="clip"),
        n_experts=1,
        contrastive_coef=0.0,
        use_temporal=False,
        optimizer_order="joint",
        encoder_tau=0.005,
        ent_coef_loss="log_alpha",
        collect=60,
    )
    task_encoder = TaskEncoder(3, 4, 4, [8])
    task_encoder.load_state_dict(cmta.policy.task_encoder.state_dict())
    mtsac = OneExpertMTSAC(
        OneExpertPolicy,
        make_env(),
        batch_size=24,
        optimizer_order="joint",
        seed=0,
        device="cpu",
        policy_kwargs=dict(
            net_arch=[16, 16],
            features_extractor_class=OneExpertExtractor,
            features_extractor_kwargs=dict(task_encoder=[task_encoder]),
        ),
    )
    mtsac.task_encoder_optimizer = th.optim.Adam(task_encoder.parameters(), lr=3e-4)
    pairs = []
    for name in ("latent_pi", "mu", "log_std"):
        pairs.append((getattr(cmta.actor, name), getattr(mtsac.actor, name)))
    for one, other in ((cmta.critic, mtsac.critic), (cmta.critic_target, mtsac.critic_target)):
        pairs += [(one.q_stack, other.q_stack), (one.encoder.experts, other.features_extractor.experts)]
    for one, other in pairs:
        other.load_state_dict(one.state_dict())
    mtsac.replay_buffer = cmta.replay_buffer
    mtsac.set_logger(cmta.logger)
    for model in (cmta, mtsac):
        model.set_random_seed(3)
        model.train(10)
    pairs.append((cmta.policy.task_encoder, task_encoder))
    for one, other in pairs:
        for got, expected in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            th.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    th.testing.assert_close(cmta.log_ent_coef, mtsac.log_ent_coef, rtol=0, atol=1e-6)


# ------------------------------------------------------------ recurrent state


class EndingEnv(PointTasksEnv):
    """Episodes of a given length that end by termination or truncation."""

    def __init__(self, length: int, terminates: bool):
        super().__init__(NUM_TASKS, horizon=length, random_goals=False)
        self.terminates = terminates

    def step(self, action):
        obs, reward, _, is_over, info = super().step(action)
        return obs, reward, is_over and self.terminates, is_over and not self.terminates, info


LENGTHS = (7, 11, 18)
TERMINATES = (False, True, False)


def make_ending_env() -> VecTaskAssignment:
    env_fns = [
        lambda length=length, terminates=terminates: EndingEnv(length, terminates)
        for length, terminates in zip(LENGTHS, TERMINATES, strict=True)
    ]
    return VecTaskAssignment(DummyVecEnv(env_fns))


def unroll(policy: CMTAPolicy, base: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States ``[h; c]`` before and after each step of one sub-environment, by torch's LSTM cell in a plain loop."""
    hidden, cell = th.zeros(1, policy.lstm_hidden_dim), th.zeros(1, policy.lstm_hidden_dim)
    before, after = [], []
    for observation, is_start in zip(th.as_tensor(base), starts, strict=True):
        if is_start:
            hidden, cell = th.zeros_like(hidden), th.zeros_like(cell)
        before.append(th.cat([hidden, cell], dim=1))
        with th.no_grad():
            hidden, cell = policy.actor.encoder.attention.lstm(observation[None], (hidden, cell))
        after.append(th.cat([hidden, cell], dim=1))
    return th.cat(before).numpy(), th.cat(after).numpy()


@pytest.mark.parametrize("gate_sharing", GATE_SHARING)
def test_stored_states_equal_an_unroll(gate_sharing):
    """100 vector steps, half of them warm-up, over episodes of 7, 11 and 18 steps; one sub-environment is one task."""
    model = make_cmta(env=make_ending_env(), learning_starts=150, gradient_steps=0, gate_sharing=gate_sharing)
    model.learn(300)
    buffer = model.replay_buffer
    columns = buffer._columns
    for task, (length, terminates) in enumerate(zip(LENGTHS, TERMINATES, strict=True)):
        rows = buffer._rows[task * buffer.capacity_per_task :][:100]
        obs, next_obs = rows[:, columns["obs"]], rows[:, columns["next_obs"]]
        steps = np.arange(100) % length
        before, after = unroll(model.policy, obs, steps == 0)
        np.testing.assert_allclose(rows[:, columns[STATE]], before, atol=1e-6)
        np.testing.assert_allclose(rows[:, columns[NEXT_STATE]], after, atol=1e-6)
        assert np.array_equal((rows[:, columns[STATE]] == 0).all(axis=1), steps == 0)
        # (h', c') of a step is (h, c) of the next one, and so are the observations, but for the ends of episodes
        inside = steps[1:] != 0
        assert np.array_equal(rows[:-1, columns[NEXT_STATE]][inside], rows[1:, columns[STATE]][inside])
        assert np.array_equal(next_obs[:-1][inside], obs[1:][inside])
        ends = steps == length - 1
        # The true last observation is one step away from the one before, the reset would be back at the start
        moved = np.clip(rows[ends, columns["action"]], -1, 1) * 0.2
        np.testing.assert_allclose(next_obs[ends, :2] - obs[ends, :2], moved, atol=1e-5)
        assert np.array_equal(rows[:, columns["done"]][:, 0], ends * float(terminates))


def test_carried_state_continues_and_restarts_with_the_environment():
    model = make_cmta(gradient_steps=0)
    model.learn(30)  # 10 vector steps of 20
    carried = model._last_state
    assert carried[0].any()
    first = model.replay_buffer.sizes()[0]
    model.learn(3, reset_num_timesteps=False)
    buffer = model.replay_buffer
    stored = buffer._rows[[task * buffer.capacity_per_task + first for task in range(3)]][:, buffer._columns[STATE]]
    assert np.array_equal(stored, np.concatenate(carried, axis=2)[0])
    model.learn(3)  # starts anew
    stored = buffer._rows[[task * buffer.capacity_per_task + first + 1 for task in range(3)]][:, buffer._columns[STATE]]
    assert not stored.any()
    model.learn(30, reset_num_timesteps=False)
    model.set_env(make_env())
    model.learn(3, reset_num_timesteps=False)
    last = model.replay_buffer.sizes()[0] - 1
    stored = buffer._rows[[task * buffer.capacity_per_task + last for task in range(3)]][:, buffer._columns[STATE]]
    assert not stored.any()


def test_predict_carries_the_state():
    model = make_cmta(dict(log_std_squash="clip"))
    policy = model.policy
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 3, 4)).astype(np.float32)
    obs = np.concatenate([base, np.broadcast_to(np.eye(3, dtype=np.float32), (6, 3, 3))], axis=2)
    starts = np.zeros((6, 3), dtype=bool)
    starts[0] = True
    starts[3, 1] = True  # only its own sub-environment starts anew
    state, actions = None, []
    for step in range(6):
        action, state = model.predict(obs[step], state=state, episode_start=starts[step], deterministic=True)
        actions.append(action)
        assert [part.shape for part in state] == [(1, 3, 5), (1, 3, 5)]
        for env in range(3):
            _, after = unroll(policy, base[: step + 1, env], starts[: step + 1, env])
            np.testing.assert_allclose(np.concatenate(state, axis=2)[0, env], after[-1], atol=1e-6)
    # The actions are those of the networks at that state
    before, _ = unroll(policy, base[:, 1], starts[:, 1])
    rows = th.as_tensor(np.concatenate([base[:, 1], before, obs[:, 1, 4:]], axis=1))
    expected = th.tanh(policy.actor.get_action_dist_params(rows)[0]).detach()
    np.testing.assert_allclose(np.stack(actions)[:, 1], expected, atol=1e-6)
    # Sub-environments do not see each other
    order = [2, 0, 1]
    state = None
    for step in range(6):
        action, state = model.predict(obs[step][order], state, starts[step][order], deterministic=True)
        np.testing.assert_allclose(action, actions[step][order], atol=1e-6)


def test_predict_of_one_observation_and_without_state():
    model = make_cmta()
    obs = np.array([0.1, 0.2, 0.3, 0.4, 0, 1, 0], dtype=np.float32)
    action, state = model.predict(obs, deterministic=True)
    assert action.shape == (2,) and [part.shape for part in state] == [(1, 1, 5)] * 2
    assert np.array_equal(action, model.predict(obs, model.policy.initial_state(1), np.array([False]), True)[0])
    assert np.array_equal(action, model.predict(obs, state, np.array([True]), True)[0])
    again, _ = model.predict(obs, state, deterministic=True)
    assert not np.array_equal(action, again)
    with pytest.raises(ValueError, match=r"state must be a pair \(h, c\) of arrays of shape \(1, 1, 5\) or None"):
        model.predict(obs, model.policy.initial_state(2))
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        model.predict((obs, {}))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gate_weights_are_those_of_predict(dtype):
    model = make_cmta()
    obs = np.concatenate([np.random.default_rng(0).normal(size=(3, 4)), np.eye(3)], axis=1).astype(dtype)
    _, state = model.predict(obs)
    weights = model.policy.gate_weights(obs, state)
    assert weights.shape == (3, 6) and np.allclose(weights.sum(axis=1), 1)
    assert not np.array_equal(weights, model.policy.gate_weights(obs, state, np.ones(3, dtype=bool)))


class StateRecorder(BaseCallback):
    def __init__(self):
        super().__init__()
        self.states: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.states.append(np.concatenate(self.model._next_state, axis=2))
        return True


def test_evaluation_in_mid_training_leaves_the_state_alone():
    recorded = []
    for evaluate in (False, True):
        model = make_cmta(learning_starts=30)
        recorder = StateRecorder()
        callbacks: list[BaseCallback] = [recorder]
        if evaluate:
            callbacks.append(EvalCallback(make_env(), eval_freq=5, n_eval_episodes=2, verbose=0, warn=False))
        model.learn(90, callback=callbacks)
        recorded.append((recorder.states, parameters_of(model)))
    (expected, expected_parameters), (states, parameters) = recorded
    assert len(states) == 30 and all(np.array_equal(one, other) for one, other in zip(states, expected, strict=True))
    assert all(th.equal(tensor, expected_parameters[name]) for name, tensor in parameters.items())


def test_recomputed_states_equal_the_stored_ones_while_the_lstm_is_the_same():
    stored = make_cmta(gate_sharing="released", collect=60)
    recomputed = make_cmta(gate_sharing="released", collect=60, recompute_states=True)
    recomputed.policy.load_state_dict(stored.policy.state_dict())
    replay_data = stored.replay_buffer.sample(24)
    for got, expected in zip(recomputed._observations(replay_data), stored._observations(replay_data), strict=True):
        th.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # They take half the memory
    widths = [model.replay_buffer.extra_columns for model in (stored, recomputed)]
    assert widths == [{STATE: 10, NEXT_STATE: 10}, {STATE: 10}]
    recomputed.train(2)


# ------------------------------------------------------------ options, checks


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(use_temporal=False),
        dict(contrastive_coef=0.0),
        dict(n_experts=1),
        dict(recompute_states=True),
        dict(warmup_actions="policy"),
        dict(ent_coef=0.1),
        dict(gradient_steps=2, target_update_interval=2),
        dict(policy_kwargs=dict(n_critics=3)),
        dict(policy_kwargs=dict(pretrained_task_embeddings=np.arange(6.0).reshape(3, 2))),
        dict(max_grad_norm=1.0, ent_coef_learning_rate=1e-3),
        dict(optimizer_order="joint", use_temporal=False),
    ],
)
def test_options_train(kwargs):
    model = make_cmta(learning_starts=30, **kwargs)
    before = parameters_of(model)
    model.learn(60)
    after = parameters_of(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    changed = {name.split(".")[0] for name, tensor in after.items() if not th.equal(tensor, before[name])}
    assert changed == {"actor", "critic", "critic_target", "task_encoder"}
    if not model.use_temporal:
        assert model.replay_buffer.extra_columns == {} and model._last_state is None
        assert model.critic.encoder.attention.lstm is None


def test_values_in_the_logger():
    model = make_cmta(learning_starts=30, n_experts=3)
    model.learn(60, log_interval=None)
    recorded: dict[str, float] = {}
    record = model.logger.record
    model.logger.record = lambda key, value, exclude=None: (recorded.update({key: value}), record(key, value, exclude))
    model.dump_logs()
    weights = np.array([[recorded[f"train/gate_weight_{j}/point-{t}"] for j in range(3)] for t in range(3)])
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert 0 < recorded["train/gate_entropy/point-1"] <= math.log(3) + 1e-6
    pairs = [recorded[f"train/expert_similarity/{pair}"] for pair in ("0-1", "0-2", "1-2")]
    assert recorded["train/expert_similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert recorded["train/contrastive_loss"] > 0
    assert model._train_sums == {}


@pytest.mark.parametrize("use_temporal", [True, False])
def test_one_task_on_any_environment(use_temporal):
    model = CMTASAC(
        "MlpPolicy",
        "Pendulum-v1",
        learning_starts=20,
        batch_size=16,
        use_temporal=use_temporal,
        policy_kwargs=dict(net_arch=[16]),
        seed=0,
        device="cpu",
    )
    model.learn(40)
    data, obs, _ = sample(model, 16)
    assert data.observations.shape == (16, 3)  # no one-hot
    assert obs.shape[-1] == 3 + 128 * use_temporal
    evaluate_policy(model, gym.make("Pendulum-v1"), n_eval_episodes=1, warn=False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_experts=0), "n_experts must be at least 1, got 0"),
        (dict(gate_sharing="none"), "gate_sharing must be one of 'full', 'released', 'actor', got 'none'"),
        (dict(ent_coef_loss="beta"), "ent_coef_loss must be one of 'alpha', 'log_alpha', got 'beta'"),
        (dict(contrastive_coef=-1.0), "contrastive_coef must be at least 0, got -1.0"),
        (dict(contrastive_coef=float("nan")), "contrastive_coef must be at least 0 and finite, got nan"),
        (dict(contrastive_temperature=0.0), "contrastive_temperature must be above 0, got 0.0"),
        (dict(encoder_tau=0.0), r"encoder_tau must be in \(0, 1\], got 0.0"),
        (dict(use_temporal=False, recompute_states=True), "recompute_states must be False with use_temporal=False, got True"),
        (dict(use_sde=True), "use_sde must be False, got True"),
        (dict(n_steps=3), "n_steps must be 1"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage must be False"),
        (dict(replay_buffer_class=ReplayBuffer), "replay_buffer_class must be None, MultiTaskReplayBuffer or a subclass"),
        (dict(replay_buffer_kwargs=dict(extra_columns={"success": 1})), "replay_buffer_kwargs must not set extra_columns"),
        (
            dict(policy_kwargs=dict(use_temporal=False)),
            "use_temporal must be given as an argument of CMTASAC, not in policy_kwargs, got False there and True here",
        ),
        (dict(policy_kwargs=dict(feature_dim=0)), "feature_dim must be at least 1, got 0"),
        (dict(policy_kwargs=dict(log_std_squash="relu")), "log_std_squash must be one of 'tanh', 'clip', got 'relu'"),
        (dict(policy_kwargs=dict(expert_arch=[])), "expert_arch must name at least one layer width"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_cmta(**kwargs)


def test_what_needs_vectors_says_so():
    class Images(gym.Env):
        observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    with pytest.raises(
        ValueError, match=r"use_temporal must be False unless observations are vectors|observation_space must be"
    ):
        CMTASAC("CnnPolicy", Images(), buffer_size=100, device="cpu")
    model = CMTASAC(
        "CnnPolicy", Images(), buffer_size=100, learning_starts=4, batch_size=4, use_temporal=False, device="cpu", seed=0
    )
    model.learn(8)


def test_policies_of_other_algorithms_are_refused():
    with pytest.raises(ValueError, match=r"policy must be a subclass of CMTAPolicy or one of 'MlpPolicy'.* got .*MTSACPolicy"):
        CMTASAC(MTSACPolicy, make_env())


def test_export_says_why_it_is_not_possible():
    with pytest.raises(ValueError, match="cannot be exported"):
        make_cmta().export_task_policy(0)


# ------------------------------------------------------------ save, load, resume


@pytest.mark.parametrize("gate_sharing", GATE_SHARING)
def test_a_loaded_model_acts_and_trains_alike(gate_sharing, tmp_path):
    model = make_cmta(gate_sharing=gate_sharing, learning_starts=20)
    model.learn(60)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = CMTASAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.actor.encoder.experts is loaded.critic.encoder.experts
    assert (loaded.actor.encoder.attention is loaded.critic.encoder.attention) == (gate_sharing == "full")
    for one in (model, loaded):
        one.set_logger(model.logger)
        one.set_random_seed(7)
        one.train(3)
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())
    obs = np.concatenate([np.random.default_rng(0).normal(size=(3, 4)), np.eye(3)], axis=1).astype(np.float32)
    states: list = [None, None]
    for _ in range(3):
        (action, states[0]), (loaded_action, states[1]) = (
            one.predict(obs, state, deterministic=True) for one, state in zip((model, loaded), states, strict=True)
        )
        assert np.array_equal(action, loaded_action)
    loaded.learn(30, reset_num_timesteps=False)


def test_policy_and_actor_saved_alone(tmp_path):
    model = make_cmta(dict(pretrained_task_embeddings=np.eye(3)), gate_sharing="actor", n_experts=3)
    model.policy.save(tmp_path / "policy.pkl")
    model.actor.save(tmp_path / "actor.pkl")
    obs = np.concatenate([np.random.default_rng(0).normal(size=(3, 4)), np.eye(3)], axis=1).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    policy = type(model.policy).load(tmp_path / "policy.pkl", device="cpu")
    np.testing.assert_allclose(policy.predict(obs, deterministic=True)[0], expected, atol=1e-7)
    actor = type(model.actor).load(tmp_path / "actor.pkl", device="cpu")
    with th.no_grad():
        np.testing.assert_allclose(actor(th.as_tensor(obs), deterministic=True), expected, atol=1e-7)


def test_the_state_continues_where_the_environment_does(tmp_path):
    """``load(force_reset=False)`` goes on in mid-episode, from the last observation that SB3 saved."""
    env = make_env()
    model = make_cmta(env=env, gradient_steps=0)
    model.learn(30)
    model.save(tmp_path / "model.zip")
    loaded = CMTASAC.load(tmp_path / "model.zip", env=env, device="cpu", force_reset=False)
    loaded.learn(3, reset_num_timesteps=False)
    buffer = loaded.replay_buffer
    stored = buffer._rows[[task * buffer.capacity_per_task for task in range(3)]][:, buffer._columns[STATE]]
    assert np.array_equal(stored, np.concatenate(model._last_state, axis=2)[0])
    reset = CMTASAC.load(tmp_path / "model.zip", env=make_env(n_envs=2), device="cpu")
    reset.learn(4, reset_num_timesteps=False)  # the saved state was of three sub-environments


def test_replay_buffers_without_states_are_refused(tmp_path):
    other = make_model(MTSAC, collect=30)
    other.save_replay_buffer(tmp_path / "buffer.pkl")
    model = make_cmta(collect=30)
    own_buffer = model.replay_buffer
    with pytest.raises(ValueError, match=r"recurrent states \{'recurrent_state': 10, 'next_recurrent_state': 10\}"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is own_buffer


# ------------------------------------------------------------------- learning


class OppositeTasksEnv(gym.Env):
    """Two tasks whose best actions are opposite, on one and the same observation: only the one-hot tells them apart."""

    num_tasks = 2
    task_names = ("left", "right")
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
        target = (-0.5, 0.5)[self.task_id]
        return self._observation(), -float(abs(action[0] - target)), False, self._steps >= 5, {}


@pytest.mark.parametrize("use_temporal", [True, False])
def test_two_tasks_with_opposite_actions_are_solved(use_temporal):
    env = VecTaskAssignment(DummyVecEnv([OppositeTasksEnv for _ in range(2)]))
    model = CMTASAC(
        "MlpPolicy",
        env,
        learning_rate=3e-3,
        learning_starts=200,
        batch_size=64,
        gamma=0.5,
        use_temporal=use_temporal,
        policy_kwargs=dict(net_arch=[32], **SMALL),
        seed=0,
        device="cpu",
    )
    model.learn(1400)
    obs = np.array([[1, 1, 0], [1, 0, 1]], dtype=np.float32)
    state = None
    for _ in range(5):
        actions, state = model.predict(obs, state=state, deterministic=True)
        np.testing.assert_allclose(actions[:, 0], [-0.5, 0.5], atol=0.2)
