"""PaCoSAC against independent numbers (tests/data/paco_fixtures.json, plain numpy loops), hand calculations and its limit
cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import ConstantSchedule

from sb3_mtrl import MTSAC, PaCoSAC
from sb3_mtrl.common.callbacks import LossMaskoutCallback, WResetCallback, mix_compositional_vectors
from sb3_mtrl.common.type_aliases import TaskLosses
from sb3_mtrl.pacosac.policies import PaCoPolicy
from tests.models import DropTasks, make_env, make_model, parameters_of

FIXTURES = json.loads((Path(__file__).parent / "data" / "paco_fixtures.json").read_text())


def tensor(values: object) -> th.Tensor:
    return th.tensor(values, dtype=th.float32)


@pytest.fixture
def fixture_policy() -> PaCoPolicy:
    """The fixtures' network: K = 3, T = 4, observations of 3, actions of 2, two hidden layers of 4 (the file is float64)."""
    num_tasks = FIXTURES["T"]
    observation_space = spaces.Box(-np.inf, np.inf, (FIXTURES["obs_dim"] + num_tasks,), np.float32)
    action_space = spaces.Box(-1, 1, (FIXTURES["act_dim"],), np.float32)
    policy = PaCoPolicy(
        observation_space,
        action_space,
        ConstantSchedule(3e-4),
        net_arch=FIXTURES["hidden"],
        num_tasks=num_tasks,
        n_param_sets=FIXTURES["K"],
    )
    params = FIXTURES["params"]

    def fill(layer: th.nn.Module, network: int, weight: th.Tensor, bias: th.Tensor) -> None:
        layer.weight.data[network] = weight.transpose(1, 2)  # the file has (K, out, in)
        layer.bias.data[network] = bias

    actor_layers = policy.actor.compositional.layers
    for layer, stored in zip(actor_layers[:-1], params["actor_trunk"], strict=True):
        fill(layer, 0, tensor(stored["weight"]), tensor(stored["bias"]))
    heads = [params["actor_mean"], params["actor_log_std"]]
    heads = [head[0] if isinstance(head, list) else head for head in heads]
    fill(
        actor_layers[-1],
        0,
        th.cat([tensor(head["weight"]) for head in heads], dim=1),
        th.cat([tensor(head["bias"]) for head in heads], dim=1),
    )
    for network, name in enumerate(["q1", "q2"]):
        for layer, stored in zip(policy.critic.compositional.layers, params[name], strict=True):
            fill(layer, network, tensor(stored["weight"]), tensor(stored["bias"]))
    policy.compositional_vectors.data = tensor(FIXTURES["W"])
    return policy


def fixture_batch() -> tuple[th.Tensor, th.Tensor]:
    rows = FIXTURES["rows"]
    one_hot = th.eye(FIXTURES["T"])[[row["task"] for row in rows]]
    return th.cat([tensor([row["obs"] for row in rows]), one_hot], dim=1), tensor([row["action"] for row in rows])


def as_groups(obs: th.Tensor) -> th.Tensor:
    """Every row a group of its own: the composed path."""
    return obs.unsqueeze(1)


@pytest.mark.parametrize("grouped", [False, True])
def test_forward_equals_the_fixtures(fixture_policy, grouped):
    obs, actions = fixture_batch()
    rows = FIXTURES["rows"]
    obs = as_groups(obs) if grouped else obs
    mean, log_std, _ = fixture_policy.actor.get_action_dist_params(obs)
    q_values = fixture_policy.critic.q_values(obs, actions)
    th.testing.assert_close(mean, tensor([row["mean"] for row in rows]), rtol=0, atol=3e-6)
    th.testing.assert_close(log_std, tensor([row["log_std"] for row in rows]), rtol=0, atol=3e-6)
    for network, name in enumerate(["q1", "q2"]):
        expected = tensor([row[name] for row in rows]).reshape(-1)
        th.testing.assert_close(q_values[network, :, 0], expected, rtol=0, atol=3e-6)


def test_rollout_path_equals_the_fixtures(fixture_policy):
    obs, _ = fixture_batch()
    fixture_policy.set_training_mode(False)
    with th.no_grad():
        mean, _, _ = fixture_policy.actor.get_action_dist_params(obs)
    assert fixture_policy.actor.composition_cache.composed_from != ()  # it did take the cached path
    th.testing.assert_close(mean, tensor([row["mean"] for row in FIXTURES["rows"]]), rtol=0, atol=3e-6)


def test_action_gradient_equals_the_fixtures(fixture_policy):
    obs, actions = fixture_batch()
    actions.requires_grad_()
    min_q = fixture_policy.critic.q_values(as_groups(obs), actions, frozen=True).min(dim=0).values
    (gradient,) = th.autograd.grad(min_q.sum(), actions)
    (name,) = [name for name in FIXTURES["rows"][0] if "da" in name]
    expected = tensor([row[name] for row in FIXTURES["rows"]])
    th.testing.assert_close(gradient, expected, rtol=0, atol=1e-4)  # central differences


@pytest.mark.parametrize("grouped", [False, True])
def test_gradient_of_w_equals_the_fixtures(fixture_policy, grouped):
    obs, actions = fixture_batch()
    q1 = fixture_policy.critic.q_values(as_groups(obs) if grouped else obs, actions)[0, :, 0]
    weighted_sum = (th.arange(1, len(q1) + 1) * q1).sum()
    (gradient,) = th.autograd.grad(weighted_sum, fixture_policy.compositional_vectors)
    th.testing.assert_close(gradient, tensor(FIXTURES["grad_W_of_weighted_q1_sum"]), rtol=0, atol=5e-5)


def test_maskout_equals_the_fixtures():
    """J and the masked mean of the file, from its TD errors, actor values and temperature losses."""
    stored = FIXTURES["maskout"]
    td_errors = tensor(stored["td_errors"]).t().unsqueeze(2)  # (2, B, 1)
    per_row = MTSAC._critic_losses(td_errors) + (tensor(stored["actor_value"]) + tensor(stored["alpha_value"])).unsqueeze(1)
    th.testing.assert_close(per_row[:, 0], tensor(stored["per_sample"]))
    tasks = th.tensor(stored["task"])
    task_mean = th.stack([per_row[tasks == task].mean() for task in range(4)])
    th.testing.assert_close(task_mean, tensor(stored["J"]))
    model = make_model(PaCoSAC, env=make_env(4))
    maskout, _ = model.update_guards
    zeros = th.zeros(4)
    dropped = maskout.drop_tasks(TaskLosses(task_mean, zeros, zeros))
    assert dropped.tolist() == stored["extreme"]
    kept = th.where(dropped[tasks].unsqueeze(1), 0.0, per_row)
    assert kept.mean().item() == pytest.approx(stored["masked_mean_loss"])


def test_task_loss_by_hand():
    """
    Q = (1, 2), y = 4, g = (1, 2, 0, 0), alpha = .5, log pi = -3:
    critic (9 + 4) / 2 = 6.5; actor 5 / 2 + .5 * -3 = 1; temperature log(.5) (3 + 6.4378 ...) = -ln 2 (3 - Hbar) = -6.5418
    """
    td_errors = tensor([[1.0 - 4.0], [2.0 - 4.0]]).unsqueeze(2)
    critic = MTSAC._critic_losses(td_errors).item()
    actor = 0.5 * th.tensor([1.0, 2.0, 0.0, 0.0]).square().sum().item() + 0.5 * -3
    target_entropy = 4 * math.log(0.2)
    assert target_entropy == pytest.approx(FIXTURES["constants"]["target_entropy_alf_4d"])
    temperature = math.log(0.5) * (3 - target_entropy)
    assert critic + actor + temperature == pytest.approx(0.9582, abs=1e-4)


def test_temperature_loss_in_the_update_by_hand():
    model = make_model(PaCoSAC, collect=60, ent_coef="auto_0.5")
    data = model.replay_buffer.sample(24)
    losses = model._ent_coef_losses(th.full((24, 1), -3.0), data, None)
    expected = math.log(0.5) * (3 - 2 * math.log(0.2))  # log alpha (- log pi - target entropy), two actions
    th.testing.assert_close(losses, th.full((24, 1), expected))


@pytest.mark.parametrize("simplex", ["l1", "dirichlet"])
def test_w_reset_equals_the_fixtures(simplex):
    stored = FIXTURES["reset"]
    w = tensor(FIXTURES["W"])
    normal = th.zeros(4, dtype=th.bool)
    normal[stored["normal_tasks"]] = True
    draws = th.full((1, 4), 0.9)
    if simplex == "l1":
        draws[0, stored["normal_tasks"]] = tensor(stored["uniform_draw"])
    else:  # the file's exponential draws E as uniform ones, U = 1 - exp(-E)
        draws[0, stored["normal_tasks"]] = 1 - th.exp(-tensor(stored["exponential_draw"]))
    mixed = mix_compositional_vectors(w, normal, draws, "l1_uniform" if simplex == "l1" else "dirichlet")
    th.testing.assert_close(mixed[0], tensor(stored[f"new_w_{simplex}"]))


def test_parameter_counts_of_the_paper():
    observation_space = spaces.Box(-np.inf, np.inf, (39 + 10,), np.float32)
    action_space = spaces.Box(-1, 1, (4,), np.float32)
    policy = PaCoPolicy(observation_space, action_space, ConstantSchedule(3e-4), num_tasks=10, n_param_sets=5)
    constants = FIXTURES["constants"]
    assert sum(parameter.numel() for parameter in policy.actor.parameters()) == constants["params_actor_K5"]
    assert sum(parameter.numel() for parameter in policy.critic.parameters()) == constants["params_two_critics_K5"]
    assert policy.compositional_vectors.shape == (10, 5)


def test_starts_as_published():
    model = make_model(PaCoSAC, policy_kwargs=dict(net_arch=[100, 100]))
    for network in (model.actor, model.critic):
        for layer in network.compositional.layers:
            assert all(th.equal(layer.weight[:, 0], layer.weight[:, k]) for k in range(5))
            assert th.all(layer.bias == 0)
    head = model.actor.compositional.layers[-1].weight[0, 0]
    assert head.std().item() == pytest.approx(0.3 / math.sqrt(100), rel=0.15)
    q_output = model.critic.compositional.layers[-1].weight
    assert 0.002 < q_output.abs().max() <= 0.003
    q_hidden = model.critic.compositional.layers[1].weight
    assert 0.09 < q_hidden.abs().max() <= 0.1  # 1 / sqrt(100)
    for name, parameter in model.critic.state_dict().items():
        assert th.equal(parameter, model.critic_target.state_dict()[name])
    assert model.log_ent_coef.tolist() == [0.0, 0.0, 0.0]
    assert model.target_entropy == pytest.approx(2 * math.log(0.2))
    assert model.policy.w_optimizer.defaults["eps"] == 1e-7


def test_w_has_one_owner_and_one_optimizer():
    model = make_model(PaCoSAC)
    w = model.policy.compositional_vectors
    owners = [
        name
        for name, optimizer in (
            ("actor", model.actor.optimizer),
            ("critic", model.critic.optimizer),
            ("w", model.policy.w_optimizer),
            ("ent_coef", model.ent_coef_optimizer),
        )
        if any(parameter is w for group in optimizer.param_groups for parameter in group["params"])
    ]
    assert owners == ["w"]
    for network in (model.actor, model.critic, model.critic_target):
        assert all(parameter is not w for parameter in network.parameters())
        assert network.task_vectors.w is w


def test_soft_updates_leave_w_alone():
    """SB3's in-place update of a tensor with itself would shrink W by (1 - tau^2) each time."""
    model = make_model(PaCoSAC, tau=0.5)
    before = model.policy.compositional_vectors.detach().clone()
    for _ in range(10):
        model._update_target_networks()
    assert th.equal(model.policy.compositional_vectors, before)


def test_targets_use_the_current_w():
    model = make_model(PaCoSAC)
    obs = th.cat([th.randn(6, 4), th.eye(3).repeat(2, 1)], dim=1)
    actions = th.rand(6, 2)
    with th.no_grad():
        model.policy.compositional_vectors.normal_()
    th.testing.assert_close(model.critic_target.q_values(obs, actions), model.critic.q_values(obs, actions))


def test_minus_q_does_not_reach_w():
    """
    W's gradient of one joint update is that of the critic loss plus that of alpha log pi - g a, with g constant; -Q through
    the critic is not in it.
    """
    model = make_model(PaCoSAC, collect=60, maskout_threshold=None, w_reset=False)
    w = model.policy.compositional_vectors
    data = model.replay_buffer.sample(24)
    obs, next_obs = model._observations(data)
    th.manual_seed(7)
    actions_pi, log_prob = model.actor.action_log_prob(obs)
    td_errors = model._td_errors(data, obs, next_obs, model._ent_coef_per_row(data))
    critic_loss = 0.5 * td_errors.square().sum(dim=0).mean()
    free_actions = actions_pi.detach().requires_grad_()
    (g,) = th.autograd.grad(model.critic.q_values(obs, free_actions).min(dim=0).values.sum(), free_actions)
    actor_loss = (log_prob.unsqueeze(1) - (g * actions_pi).sum(dim=1, keepdim=True)).mean()  # alpha is 1 at the start
    expected = th.autograd.grad(critic_loss + actor_loss, w)[0]
    model.policy.w_optimizer.step = lambda: None
    model.replay_buffer.sample = lambda batch_size, env: data
    th.manual_seed(7)
    model.train(1)
    th.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-7)


def test_parameter_sets_part_with_the_first_update():
    model = make_model(PaCoSAC, collect=60)
    model.train(1)
    weight = model.actor.compositional.layers[0].weight[0]
    assert not any(th.equal(weight[0], weight[k]) for k in range(1, 5))


def set_w(model: PaCoSAC, values: th.Tensor) -> None:
    with th.no_grad():
        model.policy.compositional_vectors.copy_(values)


def copy_mtsac_into_paco(mtsac: MTSAC, paco: PaCoSAC) -> None:
    """Weights of ordinary networks as the only parameter set."""
    *trunk, head = [mtsac.actor.single_task_layers(0)[index] for index in range(len(mtsac.actor.single_task_layers(0)))]
    with th.no_grad():
        for layer, (weight, bias) in zip(paco.actor.compositional.layers, [*trunk, head], strict=True):
            layer.weight[0, 0], layer.bias[0, 0] = weight, bias
        for source, target in ((mtsac.critic, paco.critic), (mtsac.critic_target, paco.critic_target)):
            for layer, (weight, bias) in zip(target.compositional.layers, source.single_task_layers(0), strict=True):
                layer.weight[:, 0], layer.bias[:, 0] = weight, bias


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_one_parameter_set_with_w_one_is_mtsac(num_tasks, order):
    """K = 1, W = 1 and held there: the same networks without the one-hot, the same updates up to float rounding."""
    common = dict(
        optimizer_order=order, ent_coef_learning_rate=1e-4, min_ent_coef=None, max_ent_coef=None, target_entropy=-1.0
    )
    adam = dict(optimizer_kwargs=dict(eps=1e-7), log_std_bounds=(-10.0, 2.0))
    mtsac = make_model(
        MTSAC,
        env=make_env(num_tasks, n_envs=2),
        warmup_actions="uniform",
        policy_kwargs=dict(observe_task=num_tasks == 1, **adam),
        **common,
    )
    paco = make_model(
        PaCoSAC,
        env=make_env(num_tasks, n_envs=2),
        warmup_actions="uniform",
        n_param_sets=1,
        w_learning_rate=0.0,
        policy_kwargs=adam,
        **common,
    )
    mtsac.learn(120)
    paco.learn(120)
    paco.replay_buffer = mtsac.replay_buffer
    copy_mtsac_into_paco(mtsac, paco)
    set_w(paco, th.ones(num_tasks, 1))
    for model in (mtsac, paco):
        model.set_random_seed(11)
        model.train(20)
    assert th.all(paco.policy.compositional_vectors == 1)
    expected = mtsac.actor.single_task_layers(0)
    for (weight, bias), (expected_weight, expected_bias) in zip(paco.actor.single_task_layers(0), expected, strict=True):
        th.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-6)
        th.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-6)
    for (weight, _), (expected_weight, _) in zip(
        paco.critic.single_task_layers(0), mtsac.critic.single_task_layers(0), strict=True
    ):
        th.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-6)
    th.testing.assert_close(paco.log_ent_coef, mtsac.log_ent_coef, rtol=0, atol=1e-7)


def test_one_hot_w_is_independent_networks():
    """K = T and W = I: what happens to task 2's parameters does not depend on task 0's data."""
    results = []
    for spoil in (False, True):
        model = make_model(PaCoSAC, collect=60, n_param_sets=3, w_init="onehot", w_learning_rate=0.0)
        if spoil:
            buffer = model.replay_buffer
            buffer._rows[: buffer.capacity_per_task, buffer._columns["reward"]] += 1.0
        model.set_random_seed(5)
        model.train(3)
        results.append([layer.weight.detach().clone() for layer in model.critic.compositional.layers])
    for clean, spoilt in zip(*results, strict=True):
        assert th.equal(clean[:, 1:], spoilt[:, 1:])
        assert not th.equal(clean[:, 0], spoilt[:, 0])


@pytest.mark.parametrize("structure", ["ac_shared", "actor_only", "output_only"])
def test_structures(structure):
    model = make_model(PaCoSAC, structure=structure, learning_starts=20)
    before = parameters_of(model)
    model.learn(90)
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert not th.equal(model.policy.compositional_vectors, before["compositional_vectors"])
    obs = th.cat([th.randn(6, 4), th.eye(3).repeat_interleave(2, dim=0)], dim=1)
    rows = model.actor.get_action_dist_params(obs)[0]
    groups = model.actor.get_action_dist_params(obs.view(3, 2, -1))[0]
    th.testing.assert_close(rows, groups)
    critics_use_w = hasattr(model.critic, "compositional")
    assert critics_use_w == (structure == "ac_shared")
    n_compositional = len(model.actor.compositional.layers)
    assert n_compositional == (1 if structure == "output_only" else 3)


def explode(model: PaCoSAC, task: int, value: float = 1e4) -> None:
    """Rewards of one task that no critic can follow."""
    buffer = model.replay_buffer
    start = task * buffer.capacity_per_task
    buffer._rows[start : start + buffer.capacity_per_task, buffer._columns["reward"]] = value


def test_exploding_task_is_masked_and_reset():
    model = make_model(PaCoSAC, collect=60)
    explode(model, 1)
    before = model.policy.compositional_vectors.detach().clone()
    model.train(1)
    after = model.policy.compositional_vectors.detach()
    assert model.dropped_updates.tolist() == [0, 1, 0]
    # A convex combination of the others' vectors as they are after the step
    coefficients = th.linalg.lstsq(after[[0, 2]].T, after[1]).solution
    th.testing.assert_close(coefficients @ after[[0, 2]], after[1], rtol=0, atol=1e-5)
    assert coefficients.sum().item() == pytest.approx(1.0, abs=1e-4) and th.all(coefficients > 0)
    assert not th.equal(after[0], before[0])
    # Its temperature had no gradient
    assert model.log_ent_coef[1] == 0 and model.log_ent_coef[0] != 0


def test_maskout_only_gives_no_gradient_to_the_row():
    model = make_model(PaCoSAC, collect=60, w_reset=False)
    explode(model, 1)
    before = model.policy.compositional_vectors.detach().clone()
    model.train(1)
    assert th.equal(model.policy.compositional_vectors[1], before[1])
    assert model.dropped_updates.tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite_stay_with_their_task(value):
    model = make_model(PaCoSAC, collect=60)
    explode(model, 2, value)
    model.train(3)
    assert model.dropped_updates.tolist() == [0, 0, 3]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert model.log_ent_coef.isfinite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_vector_that_is_not_finite_or_overflows_is_reset(value):
    model = make_model(PaCoSAC, collect=60)
    with th.no_grad():
        model.policy.compositional_vectors[0] = value
    model.train(1)
    assert model.dropped_updates.tolist() == [1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    assert model.policy.compositional_vectors[0].abs().max() < 100


@pytest.mark.parametrize("structure", ["ac_shared", "actor_only", "output_only"])
def test_observations_that_are_not_finite_stay_with_their_task(structure):
    model = make_model(PaCoSAC, collect=60, structure=structure)
    buffer = model.replay_buffer
    buffer._rows[: buffer.capacity_per_task, buffer._columns["obs"]] = np.nan
    model.train(2)
    assert model.dropped_updates.tolist() == [2, 0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())


def test_infinite_losses_explode_at_any_threshold():
    model = make_model(PaCoSAC, collect=60, maskout_threshold=float("inf"))
    explode(model, 2, np.inf)
    model.train(1)
    assert model.dropped_updates.tolist() == [0, 0, 1]


def test_the_gate_is_open_after_an_update():
    model = make_model(PaCoSAC, collect=60)
    explode(model, 0)
    model.train(1)
    assert model.policy.gradient_gate.dropped_tasks is None


def test_moments_that_are_not_finite_are_forgotten_at_a_reset():
    model = make_model(PaCoSAC, collect=60)
    model.train(1)
    model.policy.w_optimizer.state[model.policy.compositional_vectors]["exp_avg"][1] = np.nan
    model.train(1)  # spoils the vector of task 1
    model.train(3)  # resets it once
    assert model.w_reset_callback.resets.tolist() == [0, 1, 0]
    assert model.policy.compositional_vectors.isfinite().all()


def test_resets_and_vectors_are_logged():
    model = make_model(PaCoSAC, collect=60)
    explode(model, 1)
    model.train(2)
    recorded = {}
    model.logger.dump = lambda step: recorded.update(model.logger.name_to_value)
    model.dump_logs()
    assert recorded["train/w_resets"] == recorded["train/w_resets/point-1"] == 2
    norm = model.policy.compositional_vectors[0].norm().item()
    assert recorded["train/w_norm/point-0"] == pytest.approx(norm)


def test_a_vector_is_drawn_anew_until_its_loss_is_below_the_threshold():
    model = make_model(PaCoSAC, collect=60)
    with th.no_grad():
        model.policy.compositional_vectors[1] *= 1000  # the fault is the vector's: with another one the task learns on
    model.train(3)
    assert model.dropped_updates.tolist() == model.w_reset_callback.resets.tolist() == [0, 1, 0]
    explode(model, 1)  # the fault is the rewards': no vector helps, and each update draws one
    model.train(3)
    assert model.dropped_updates.tolist() == model.w_reset_callback.resets.tolist() == [0, 4, 0]


def test_nothing_is_reset_when_every_task_explodes():
    model = make_model(PaCoSAC, collect=60)
    for task in range(3):
        explode(model, task)
    before = parameters_of(model)
    model.train(2)
    after = parameters_of(model)
    assert model.dropped_updates.tolist() == [2, 2, 2]
    # The soft update of the target critics goes on
    assert all(th.equal(after[name], before[name]) for name in before if not name.startswith("critic_target"))


def test_reset_moments():
    for reset_moments in (False, True):
        model = make_model(PaCoSAC, collect=60, w_reset_moments=reset_moments)
        model.train(3)
        explode(model, 1)
        model.train(1)
        state = model.policy.w_optimizer.state[model.policy.compositional_vectors]
        for name in ("exp_avg", "exp_avg_sq"):
            assert (state[name][1].abs().max() == 0) == reset_moments
            assert state[name][0].abs().max() > 0


def test_a_run_without_explosions_is_the_same_with_and_without_the_guards():
    results = []
    for guards in (dict(maskout_threshold=1e9), dict(maskout_threshold=None, w_reset=False)):
        model = make_model(PaCoSAC, learning_starts=20, **guards)
        model.learn(120)
        results.append(parameters_of(model))
    assert all(th.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_own_callbacks_replace_the_defaults():
    model = make_model(PaCoSAC, learning_starts=20)
    assert [type(guard) for guard in model.update_guards] == [LossMaskoutCallback, WResetCallback]
    maskout = LossMaskoutCallback(threshold=0.0, loss="critic")
    model.learn(30, callback=[maskout, WResetCallback("l1_uniform", seed=3)])
    assert len(model.update_guards) == 2
    assert model.update_guards[0] is maskout
    assert model.update_guards[1].simplex == "l1_uniform"
    assert model.dropped_updates.tolist() == [model._n_updates] * 3


def test_generators_of_a_gpu_start_anew(tmp_path):
    """The generator of w-resets was one of the GPU once, whose state has 16 bytes."""
    model = make_model(PaCoSAC, seed=5)
    model.w_reset_callback.generator_state = th.zeros(16, dtype=th.uint8)
    model.save(tmp_path / "model.zip")
    loaded = PaCoSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    expected = th.Generator().manual_seed(5)
    with pytest.warns(UserWarning, match="starts anew from its seed") as warned:
        for _ in range(2):
            assert th.equal(loaded.w_reset_callback.draw(), th.rand(3, 3, generator=expected))
    assert len(warned) == 1


def test_reset_mixtures_have_the_spread_of_their_simplex():
    """Nine normal tasks: standard deviation of a coefficient 0.099 (Dirichlet) and 0.064 (normalised uniform)."""
    th.manual_seed(0)
    for simplex, expected in (("dirichlet", math.sqrt(8 / 810)), ("l1_uniform", 0.064)):
        beta = mix_compositional_vectors(th.eye(9), th.ones(9, dtype=th.bool), th.rand(50_000, 9), simplex)
        assert beta[:, 0].std().item() == pytest.approx(expected, rel=0.03)
        th.testing.assert_close(beta.sum(dim=1), th.ones(len(beta)))


def test_cached_actor_follows_every_change_of_parameters():
    model = make_model(PaCoSAC, collect=60)
    obs = np.concatenate([np.random.default_rng(0).normal(size=(4, 4)), np.eye(3)[[0, 1, 2, 1]]], axis=1).astype(np.float32)

    def check() -> np.ndarray:
        actions, _ = model.predict(obs, deterministic=True)
        with th.enable_grad():  # the path that composes anew
            mean, _, _ = model.actor.get_action_dist_params(th.as_tensor(obs))
        np.testing.assert_allclose(actions, th.tanh(mean).detach().numpy(), atol=1e-6)
        return actions

    first = check()
    model.train(1)
    second = check()
    with th.no_grad():
        model.policy.compositional_vectors[1] += 1.0
    third = check()
    assert not np.array_equal(first, second)
    assert np.array_equal(second[0], third[0]) and not np.array_equal(second[1], third[1])


def test_w_learning_rate_and_schedule():
    model = make_model(PaCoSAC, learning_rate=lambda remaining: 1e-3 * remaining, learning_starts=0)
    model.learn(60)
    assert model.policy.w_optimizer.param_groups[0]["lr"] == model.actor.optimizer.param_groups[0]["lr"] < 1e-3
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == 1e-4
    model = make_model(PaCoSAC, w_learning_rate=5e-4, learning_rate=lambda remaining: 1e-3 * remaining, learning_starts=0)
    model.learn(60)
    assert model.policy.w_optimizer.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_param_sets=0), "n_param_sets must be at least 1, got 0"),
        (dict(w_init="ones"), "w_init must be one of"),
        (dict(w_init="onehot"), "w_init='onehot' needs n_param_sets equal to num_tasks=3, got 5"),
        (dict(structure="critic_only"), "structure must be one of"),
        (dict(maskout_threshold=-1.0), "maskout_threshold must be at least 0 or None, got -1"),
        (dict(maskout_threshold=float("nan")), "maskout_threshold must be at least 0 or None, got nan"),
        (dict(w_reset_simplex="gauss"), "w_reset_simplex must be one of 'dirichlet', 'l1_uniform', got 'gauss'"),
        (dict(w_learning_rate=-1e-4), "w_learning_rate must be at least 0 or None"),
        (dict(use_sde=True), "use_sde must be False, got True"),
        (dict(policy_kwargs=dict(w_activation="relu")), "w_activation must be one of"),
        (dict(structure="actor_only", policy_kwargs=dict(share_features_extractor=True)), "share_features_extractor must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(PaCoSAC, **kwargs)


def test_policy_of_another_algorithm_is_refused():
    with pytest.raises(ValueError, match="policy must be a subclass of PaCoPolicy"):
        PaCoSAC(MTSAC.policy_aliases["MlpPolicy"], make_env())


def test_guards_persist_their_counts(tmp_path):
    model = make_model(PaCoSAC, collect=60)
    model.add_update_guard(DropTasks([True, False, False]))
    model.train(2)
    model.save(tmp_path / "model")
    assert PaCoSAC.load(tmp_path / "model", device="cpu").dropped_updates.tolist() == [2, 0, 0]


def test_learns_one_task_of_sb3_s_own_suite():
    """
    SB3's test of continuous actions (its best reward is 100) with the temperature at that test's rate; at PaCo's own 1e-4 its
    400 steps are too few to leave the initial exploration.
    """
    env = IdentityEnvBox(eps=0.5)
    model = PaCoSAC(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        ent_coef_learning_rate=None,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=0,
        gamma=0.95,
        device="cpu",
    )
    model.learn(400)
    mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=20, warn=False)
    assert mean_reward > 90
