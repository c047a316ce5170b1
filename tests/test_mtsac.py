"""MTSAC: equal to SB3's SAC with one task; with several, per-task temperatures, heads, guards and checks of its set-up."""

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mtrl import MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.callbacks import LossMaskoutCallback, WResetCallback
from sb3_mtrl.common.utils import is_fused
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize
from tests.models import ALGORITHMS, NUM_TASKS, DropTasks, make_env, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv


@pytest.mark.parametrize("ent_coef", ["auto", 0.1])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_one_task_equals_sac_update_for_update(ent_coef, n_critics):
    """Same seeds, same transitions, 30 updates: the parameters of SB3's own SAC are the expected numbers."""
    models = []
    for algorithm in (SAC, MTSAC):
        model = algorithm(
            "MlpPolicy",
            "Pendulum-v1",
            seed=3,
            learning_starts=60,
            batch_size=32,
            ent_coef=ent_coef,
            device="cpu",
            policy_kwargs=dict(net_arch=[16, 16], n_critics=n_critics),
        )
        model.learn(60)
        model.set_random_seed(1)
        model.train(gradient_steps=30, batch_size=32)
        models.append(model)
    sac, mtsac = models
    for name, expected in sac.actor.state_dict().items():
        th.testing.assert_close(mtsac.actor.state_dict()[name], expected, rtol=0, atol=1e-6)
    for sac_critic, mtsac_critic in ((sac.critic, mtsac.critic), (sac.critic_target, mtsac.critic_target)):
        obs, actions = th.randn(50, 3), th.rand(50, 1) * 2 - 1
        for expected, got in zip(sac_critic(obs, actions), mtsac_critic(obs, actions), strict=True):
            th.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if ent_coef == "auto":
        assert mtsac.log_ent_coef.item() == pytest.approx(sac.log_ent_coef.item(), abs=1e-7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fused_optimizers_make_the_steps_of_pytorch_s_loop(algorithm):
    """The expected parameters are those after ten updates with PyTorch's own loop over parameters, up to float rounding."""
    eps = dict(eps=1e-7) if algorithm is PaCoSAC else {}  # its default
    parameters = []
    for optimizer_kwargs in (eps, None):
        model = make_model(algorithm, collect=60, policy_kwargs=dict(optimizer_kwargs=optimizer_kwargs))
        assert is_fused(model.actor.optimizer) == is_fused(model.critic.optimizer) == (optimizer_kwargs is None)
        model.set_random_seed(1)
        model.train(10)
        parameters.append(parameters_of(model))
    for name, expected in parameters[0].items():
        th.testing.assert_close(parameters[1][name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "settings",
    [dict(optimizer_kwargs={}), dict(optimizer_kwargs=dict(weight_decay=1e-3)), dict(optimizer_class=th.optim.AdamW)],
    ids=["nothing", "weight decay", "another class"],
)
def test_optimizers_that_were_told_how_to_step_are_left_alone(algorithm, settings):
    model = make_model(algorithm, policy_kwargs=settings)
    for network in (model.actor, model.critic):
        optimizer = network.optimizer
        assert type(optimizer) is settings.get("optimizer_class", th.optim.Adam) and not is_fused(optimizer)
        for name, value in settings.get("optimizer_kwargs", {}).items():
            assert optimizer.defaults[name] == value


def test_every_task_has_its_own_temperature():
    model = make_model(collect=60, learning_starts=30)
    assert model.log_ent_coef.shape == (NUM_TASKS,)
    assert len(set(model.log_ent_coef.tolist())) == NUM_TASKS


def test_temperature_gradient_is_the_mean_over_the_batch():
    """
    d L / d log_alpha_t = -(b / B) (mean of log pi over task t + target entropy), by the definition of the loss.
    """
    model = make_model(collect=60)
    data = model.replay_buffer.sample(24)
    log_prob = th.linspace(-3, 2, 24).reshape(-1, 1)
    loss = model._ent_coef_losses(log_prob, data, None).mean()
    (gradient,) = th.autograd.grad(loss, model.log_ent_coef)
    expected = -(log_prob.view(3, 8).mean(dim=1) + model.target_entropy) / 3
    th.testing.assert_close(gradient, expected)


def test_bounds_of_the_temperature():
    model = make_model(collect=60, min_ent_coef=0.5, max_ent_coef=0.8, ent_coef="auto_0.9", ent_coef_learning_rate=1e-3)
    model.train(1)
    assert th.all(model.log_ent_coef.exp() <= 0.8 + 1e-6)
    with th.no_grad():
        model.log_ent_coef.fill_(np.log(0.1))
    data = model.replay_buffer.sample(24)
    assert th.allclose(model._ent_coef_per_row(data), th.tensor(0.5))
    loss = model._ent_coef_losses(th.ones(24, 1), data, None).mean()
    assert th.autograd.grad(loss, model.log_ent_coef)[0].tolist() == [0.0, 0.0, 0.0]  # none below the lower bound


@pytest.mark.parametrize("n_heads", ["shared", "per_task"])
@pytest.mark.parametrize("observe_task", [True, False])
def test_groups_and_rows_are_one_function(n_heads, observe_task):
    model = make_model(n_heads=n_heads, policy_kwargs=dict(observe_task=observe_task))
    obs = th.cat([th.randn(12, 4), th.eye(3).repeat_interleave(4, dim=0)], dim=1)
    actions = th.rand(12, 2)
    for rows, groups in (
        (model.actor.get_action_dist_params(obs)[:2], model.actor.get_action_dist_params(obs.view(3, 4, -1))[:2]),
        ([model.critic.q_values(obs, actions)], [model.critic.q_values(obs.view(3, 4, -1), actions)]),
    ):
        for one, other in zip(rows, groups, strict=True):
            th.testing.assert_close(one, other)


def test_heads_of_other_tasks_get_no_gradient():
    model = make_model(n_heads="per_task")
    obs = th.cat([th.randn(5, 4), th.eye(3)[[1] * 5]], dim=1)
    model.actor.get_action_dist_params(obs)[0].sum().backward()
    gradient = model.actor.mu.weight.grad[0].abs().sum(dim=(1, 2))
    assert gradient[1] > 0 and gradient[0] == gradient[2] == 0


def test_joint_order_takes_all_gradients_at_the_same_parameters():
    """
    After one joint update the actor equals that of an update in which the critics could not move; in sequential order it does
    not.
    """
    actors = {}
    for order in ("joint", "sequential"):
        for frozen_critic in (False, True):
            model = make_model(collect=60, optimizer_order=order)
            if frozen_critic:
                model.critic.optimizer.step = lambda: None
            model._update_learning_rate = lambda optimizers: None
            model.set_random_seed(5)
            model.train(1)
            actors[order, frozen_critic] = th.cat([parameter.flatten() for parameter in model.actor.parameters()])
    assert th.equal(actors["joint", False], actors["joint", True])
    assert not th.equal(actors["sequential", False], actors["sequential", True])
    # With the critics held, both orders make the same actor step
    th.testing.assert_close(actors["joint", True], actors["sequential", True], rtol=0, atol=1e-7)


def test_actor_loss_leaves_no_gradient_in_the_critics():
    model = make_model(collect=60)
    data = model.replay_buffer.sample(24)
    obs, _ = model._observations(data)
    actions, _ = model.actor.action_log_prob(obs)
    model.critic.q_values(obs, actions, frozen=True).sum().backward()
    assert all(parameter.grad is None for parameter in model.critic.parameters())
    assert any(parameter.grad is not None for parameter in model.actor.parameters())


def test_max_grad_norm_clips_actor_and_critics():
    model = make_model(collect=60, max_grad_norm=1e-3)
    model.train(1)
    for network in (model.actor, model.critic):
        norm = th.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm()
        assert norm <= 1e-3 * 1.001


def test_warm_up_with_the_policy():
    """Actions of the initial policy lie near its mean, uniform ones do not: their deviation from it tells which they are."""
    deviations = {}
    for warmup_actions in ("uniform", "policy"):
        model = make_model(warmup_actions=warmup_actions, policy_kwargs=dict(log_std_bounds=(-10.0, -9.0)))
        model.learn(30)
        data = model.replay_buffer.sample(24)
        with th.no_grad():
            mean = model.actor(data.observations, deterministic=True)
        deviations[warmup_actions] = (data.actions - mean).abs().mean().item()
    assert deviations["policy"] < 1e-3
    assert deviations["uniform"] > 0.1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("log_interval", [0, -1, 2.5])
def test_wrong_log_interval(algorithm, log_interval):
    with pytest.raises(ValueError, match=f"log_interval must be .*, got {log_interval}"):
        make_model(algorithm).learn(10, log_interval=log_interval)


def test_per_task_values_are_logged_once_per_dump():
    model = make_model(learning_starts=10)
    model.learn(90, log_interval=None)
    # Updates after 12, 15, ..., 90 steps
    assert model._n_summed_updates == model._n_updates == 27
    recorded = {}
    model.logger.dump = lambda step: recorded.update(model.logger.name_to_value)
    model.dump_logs()
    for task_name in model.task_names:
        assert recorded[f"train/ent_coef/{task_name}"] > 0
        assert np.isfinite(recorded[f"train/critic_loss/{task_name}"])
        assert np.isfinite(recorded[f"train/actor_loss/{task_name}"])
    mean = np.mean([recorded[f"train/critic_loss/{name}"] for name in model.task_names])
    assert recorded["train/critic_loss"] == pytest.approx(mean, rel=1e-6)
    assert recorded["train/n_updates"] == 27
    assert model._train_sums == {} and model._n_summed_updates == 0


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_guards_see_task_losses_and_drop_samples(order):
    """With task 1 dropped, its transitions may be anything: the update is the same."""
    results = []
    for spoil in (False, True):
        model = make_model(collect=60, optimizer_order=order, on_nonfinite="mask")
        guard = DropTasks([False, True, False])
        model.add_update_guard(guard)
        if spoil:
            buffer = model.replay_buffer
            rewards = buffer._rows.reshape(3, buffer.capacity_per_task, -1)[1, :, buffer._columns["reward"]]
            rewards[:] = np.nan
        model.set_random_seed(5)
        model.train(3)
        assert model.dropped_updates.tolist() == [0, 3, 0]
        assert len(guard.seen) == len(guard.after) == 3
        assert guard.seen[0].critic.shape == (3,)
        assert (guard.seen[0].actor is None) == (order == "sequential")
        assert spoil == bool(guard.seen[0].critic[1].isnan())
        results.append(parameters_of(model))
    for name, expected in results[0].items():
        assert th.equal(results[1][name], expected), name


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_no_step_is_made_when_all_tasks_are_dropped(order):
    model = make_model(collect=60, optimizer_order=order, tau=0.5)
    model.train(2)  # moments that would move the parameters even without a gradient
    before = parameters_of(model)
    before_ent_coef = model.log_ent_coef.detach().clone()
    model.add_update_guard(DropTasks([True, True, True]))
    model.train(1)
    after = parameters_of(model)
    assert all(th.equal(after[name], before[name]) for name in before if not name.startswith("critic_target"))
    assert th.equal(model.log_ent_coef, before_ent_coef)


def test_maskout_callback_on_plain_mtsac():
    model = make_model(learning_starts=10)
    model.learn(60, callback=LossMaskoutCallback(threshold=0.0, loss="critic"))
    assert model.dropped_updates.tolist() == [model._n_updates] * 3
    with pytest.raises(ValueError, match="loss must be 'critic' with optimizer_order='sequential'"):
        model.learn(10, callback=LossMaskoutCallback())
    with pytest.raises(ValueError, match="compositional vectors"):
        model.learn(10, callback=WResetCallback())


def test_normalised_training_runs_and_plain_vecnormalize_is_refused():
    env = VecTaskNormalize(make_env())
    model = make_model(env=env, learning_starts=10)
    model.learn(60)
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    with pytest.raises(ValueError, match="VecTaskNormalize"):
        make_model(env=VecNormalize(make_env()))
    model = make_model(env=VecNormalize(make_env(), norm_obs=False))
    with pytest.raises(ValueError, match="VecTaskNormalize"):
        model.set_env(VecNormalize(make_env()))


@pytest.mark.parametrize("n_envs", [1, 2, 4])
def test_any_number_of_sub_environments(n_envs):
    model = make_model(env=make_env(n_envs=n_envs), learning_starts=20)
    model.learn(160)
    assert model._n_updates > 0
    assert np.all(model.replay_buffer.sizes() > 0)


def test_unassigned_tasks_are_warned_about():
    with pytest.warns(UserWarning, match="VecTaskAssignment"):
        make_model(env=DummyVecEnv([lambda: PointTasksEnv(3) for _ in range(2)]))


@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC, STARSSAC])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_tasks=0), "num_tasks must be at least 1 or None, got 0"),
        (dict(num_tasks=5), "num_tasks must equal the environment's num_tasks=3 or be None, got 5"),
        (dict(batch_size=25), "batch_size must be a positive multiple of num_tasks=3"),
        (dict(buffer_size=2), "buffer_size must be at least num_tasks=3, got 2"),
        (dict(n_steps=3), "n_steps must be 1 with num_tasks=3, got 3"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage must be False with num_tasks=3, got True"),
        (dict(replay_buffer_class=ReplayBuffer), "replay_buffer_class must be None, MultiTaskReplayBuffer"),
        (dict(optimizer_order="parallel"), "optimizer_order must be one of 'sequential', 'joint', got 'parallel'"),
        (dict(warmup_actions="zero"), "warmup_actions must be one of"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be above 0 or None, got 0"),
        (dict(max_ent_coef=-1.0), "max_ent_coef must be above 0 or None, got -1"),
        (dict(policy_kwargs=dict(log_std_bounds=(2, -10))), "log_std_bounds must be"),
        (
            dict(policy_kwargs=dict(num_tasks=2)),
            r"num_tasks must be given as an argument of \w+, not in policy_kwargs, got 2 there and 3 here",
        ),
        (
            dict(replay_buffer_kwargs=dict(num_tasks=2)),
            r"num_tasks must be given as an argument of \w+, not in replay_buffer_kwargs, got 2 there and 3 here",
        ),
    ],
)
def test_bad_arguments(algorithm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, **kwargs)


def test_bad_heads_and_policies():
    with pytest.raises(ValueError, match="n_heads must be one of 'shared', 'per_task', got 'many'"):
        make_model(n_heads="many")
    with pytest.raises(ValueError, match="clip_mean must be a number, got nan"):
        make_model(policy_kwargs=dict(clip_mean=float("nan")))
    with pytest.raises(ValueError, match="use_sde must be False with n_heads='per_task'"):
        make_model(n_heads="per_task", use_sde=True)
    with pytest.raises(ValueError, match="n_heads must be given as an argument of MTSAC, not in policy_kwargs, got"):
        make_model(policy_kwargs=dict(n_heads="per_task"))
    for policy in (SAC.policy_aliases["MlpPolicy"], int):
        with pytest.raises(ValueError, match="policy must be a subclass of MTSACPolicy or one of 'MlpPolicy', 'CnnPolicy', "):
            MTSAC(policy, make_env())


def test_a_wrong_one_hot_length_is_refused():
    with pytest.raises(ValueError, match="one-hot of 3 tasks"):
        MTSAC("MlpPolicy", "Pendulum-v1", num_tasks=3)


@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC, STARSSAC, TSACSAC])
def test_an_env_without_continuous_actions_is_refused(algorithm):
    with pytest.raises(AssertionError, match="Discrete"):
        algorithm("MlpPolicy", "CartPole-v1")


class OtherTasksEnv(PointTasksEnv):
    """As many tasks with other names."""

    def __init__(self) -> None:
        super().__init__(NUM_TASKS)
        self.task_names = ("other-0", "other-1", "other-2")


def test_other_tasks_of_the_same_number_are_warned_about():
    model = make_model()
    with pytest.warns(UserWarning, match=r"made for the tasks point-0, .* other tasks .*: other-0"):
        model.set_env(VecTaskAssignment(DummyVecEnv([OtherTasksEnv] * 3)))


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_observations_that_are_not_finite_stay_with_their_task(order):
    """All tasks share the weights here, and a zero loss times an infinite input would be NaN."""
    model = make_model(collect=60, optimizer_order=order, on_nonfinite="mask")
    LossMaskoutCallback(loss="critic").init_callback(model)
    buffer = model.replay_buffer
    buffer._rows[: buffer.capacity_per_task, buffer._columns["obs"]] = np.inf
    model.train(2)
    assert model.dropped_updates.tolist() == [2, 0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())


def test_a_task_that_is_always_left_out_is_warned_about():
    model = make_model(learning_starts=10)
    model.add_update_guard(DropTasks([False, True, False]))
    with pytest.warns(UserWarning, match="left out point-1: this does not mend itself"):
        model.learn(120, log_interval=None).dump_logs()


@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC, STARSSAC, TSACSAC])
def test_another_number_of_tasks_is_refused(algorithm):
    model = make_model(algorithm)
    with pytest.raises(ValueError, match="num_tasks=3, the environment has num_tasks=2"):
        model.set_env(make_env(2))
