"""
The update that a CUDA graph holds, run as it is on the CPU: it is the plain update, it waits for no device, and it touches
nothing on the host. What needs a GPU is skipped without one.
"""

import copy
import gc
import importlib
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.callbacks import LossMaskoutCallback, WResetCallback
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.utils import fuse
from sb3_mtrl.mtsac import static_update
from sb3_mtrl.mtsac.static_update import N_WARM_UPS, Recording, StaticUpdate
from tests.models import ALGORITHMS, NUM_TASKS, DropTasks, make_env, make_model, parameters_of

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
# A float32 holds it exactly, as the learning rate on the device has to
LEARNING_RATE = 2**-11

VARIANTS = [
    *((algorithm, {}) for algorithm in ALGORITHMS),
    *((algorithm, dict(optimizer_order="joint")) for algorithm in (MTSAC, PaCoSAC, CMTASAC, STARSSAC)),
    (MTSAC, dict(n_heads="per_task", max_grad_norm=0.5, ent_coef=0.1)),
    (PaCoSAC, dict(w_learning_rate=2**-12, ent_coef_learning_rate=2**-9)),
    (CMTASAC, dict(recompute_states=True, gate_sharing="actor", ent_coef_loss="log_alpha")),
    (TSACSAC, dict(base="paco", lambda_mode="shared", sp_value_on="proposed", action_distance="l2")),
    (STARSSAC, dict(actor_batch="uniform_in_task", unique_from_rl=False)),
]
IDS = [f"{algorithm.__name__}-{'-'.join(kwargs) or 'default'}" for algorithm, kwargs in VARIANTS]


def make_ready(algorithm: type[MTSAC] = MTSAC, static: bool = True, **kwargs: Any) -> MTSAC:
    """A model with filled rings that treats its device as a GPU."""
    kwargs = {"learning_rate": LEARNING_RATE, "on_nonfinite": "mask", **kwargs}
    model = make_model(algorithm, collect=60, **kwargs)
    model._may_look = False
    if static:
        model._static_update = StaticUpdate(model)
    if isinstance(model, TSACSAC):
        model._fresh_rewards[:] = [[3.0, 1.0, 2.0], [4.0, 4.0, 4.0]]
    model.set_random_seed(1)
    return model


def assert_close(model: MTSAC, expected: MTSAC, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """
    Parameters, moments, steps, counts and sums. Both compute the same; the inputs lie differently in memory, so that sums
    over them are rounded differently.
    """
    for name, tensor in parameters_of(expected).items():
        th.testing.assert_close(parameters_of(model)[name], tensor, rtol=rtol, atol=atol, msg=name)
    for own, other in zip(model._log_ent_coefs(), expected._log_ent_coefs(), strict=True):
        th.testing.assert_close(own, other, rtol=rtol, atol=atol)
    for own, other in zip(model._stepping_optimizers(), expected._stepping_optimizers(), strict=True):
        for states in zip(own.state.values(), other.state.values(), strict=True):
            assert states[0]["step"] == states[1]["step"] > 0
            th.testing.assert_close(states[0]["exp_avg"], states[1]["exp_avg"], rtol=1e-3, atol=1e-5)
        assert [group["lr"] for group in own.param_groups] == [group["lr"] for group in other.param_groups]
    assert th.equal(model.dropped_updates, expected.dropped_updates) and th.equal(model.skipped_steps, expected.skipped_steps)
    assert model._n_summed_updates == expected._n_summed_updates > 0
    assert model._train_sums.keys() == expected._train_sums.keys()
    for name, total in expected._train_sums.items():
        th.testing.assert_close(model._train_sums[name], total, rtol=1e-3, atol=1e-4, msg=name)


# --------------------------------------------------------------- the plain update


@pytest.mark.parametrize("algorithm, kwargs", VARIANTS, ids=IDS)
def test_it_is_the_plain_update(algorithm, kwargs):
    models = [make_ready(algorithm, static, **kwargs) for static in (False, True)]
    for model in models:
        model.set_random_seed(1)
        model.train(2)
        model.train(2, batch_size=12)  # other shapes
        model.train(1)
    assert_close(models[1], models[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_the_update_of_a_cpu(algorithm):
    """With the looks at values that are free there, and optimisers that step in another way: equal up to rounding."""
    models = [make_ready(algorithm, static) for static in (False, True)]
    models[0]._may_look = True
    for model in models:
        model.set_random_seed(1)
        model.train(3)
    for name, tensor in parameters_of(models[0]).items():
        th.testing.assert_close(parameters_of(models[1])[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("algorithm", [MTSAC, STARSSAC])
def test_learning_rates_and_target_networks_follow_their_schedules(algorithm):
    models = []
    for static in (False, True):
        model = make_ready(algorithm, static, learning_rate=lambda progress: progress * 2**-9, target_update_interval=2)
        models.append(model)
        for progress in (1.0, 0.5, 0.5, 0.25):
            model._current_progress_remaining = progress
            model.train(3)
    assert_close(models[1], models[0])
    groups = [group for optimizer in models[1]._stepping_optimizers() for group in optimizer.param_groups]
    # As in a model without: a number, which goes to files and schedules
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in groups)
    assert {group["lr"] for group in models[1].actor.optimizer.param_groups} == {2**-11}


@pytest.mark.parametrize("algorithm", [PaCoSAC, STARSSAC])
def test_guards(algorithm):
    """Task 1 explodes in every update: it is left out, its vector reset, and a prioritized buffer told."""
    models = []
    for static in (False, True):
        model = make_ready(algorithm, static)
        buffer = model.replay_buffer
        buffer._rows[buffer.capacity_per_task : 2 * buffer.capacity_per_task, buffer._columns["reward"]] = 1e8
        model.add_update_guard(guard := DropTasks([False, False, False]))
        model.train(4)
        models.append(model)
        assert len(guard.after) == 4
        assert all(dropped.tolist() == [False, True, False] for dropped in guard.after)
    assert_close(models[1], models[0])
    assert models[1].w_reset_callback.resets.tolist() == [0, 4, 0]
    assert th.equal(models[1].w_reset_callback.generator_state, models[0].w_reset_callback.generator_state)
    if isinstance(models[0].replay_buffer, TaskPrioritizedReplayBuffer):
        leaves = [model.replay_buffer._tree.leaves for model in models]
        np.testing.assert_allclose(leaves[1], leaves[0], rtol=1e-4)
        assert np.all(leaves[1][1][:20] == 1) and not np.all(leaves[1][0][:20] == 1)


def test_bad_values_are_left_out_as_on_a_gpu():
    """A spoilt batch and a gradient that is not finite: no optimiser steps on either, and both are counted."""
    models = []
    for static in (False, True):
        model = make_ready(MTSAC, static)
        model.train(1)
        buffer = model.replay_buffer
        buffer._rows[: buffer.capacity_per_task, buffer._columns["obs"]] = np.nan
        model.train(1)
        assert model.dropped_updates.tolist() == [1, 0, 0] and model._nonfinite_tasks.tolist() == [True, False, False]
        model.critic.q_stack.weights[0].register_hook(lambda gradient: gradient * np.inf)
        model.train(1)
        assert model.skipped_steps == 1
        assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
        models.append(model)
    step = models[1].critic.optimizer.state[models[1].critic.q_stack.weights[0]]["step"]
    assert step == 2  # of three updates
    assert_close(models[1], models[0])


def test_rewards_of_rollouts_reach_lambda_once():
    model = make_ready(TSACSAC)
    model.train(3)
    assert not model._fresh_rewards.any()
    assert model.lambda_optimizer.state[model.raw_lambda]["step"] == 1


def test_what_is_logged_is_the_mean_since_the_last_dump():
    records = []
    for static in (False, True):
        model = make_ready(CMTASAC, static)
        recorded: dict[str, float] = {}
        model.logger.dump = lambda step, recorded=recorded, model=model: recorded.update(model.logger.name_to_value)
        for _ in range(2):
            model.train(2)
            model.dump_logs()
        records.append(recorded)
        recorded.clear()
        model.logger.name_to_value.clear()
        sums = dict(model._train_sums)
        model.dump_logs()  # nothing to report
        assert not any(name.startswith(("train/critic_loss", "train/gate")) for name in recorded)
        if static:
            # A graph goes on adding to these very tensors
            assert sums and all(model._train_sums[name] is total and not total.any() for name, total in sums.items())
        model.train(1)
        model.dump_logs()
    assert records[1]["train/critic_loss"] == pytest.approx(records[0]["train/critic_loss"], rel=1e-4)
    assert records[1].keys() == records[0].keys() and "train/expert_similarity/0-1" in records[1]
    assert records[1]["train/gate_weight_0/point-2"] == pytest.approx(records[0]["train/gate_weight_0/point-2"], rel=1e-4)


def test_one_task_with_the_buffer_of_sb3():
    models = []
    for static in (False, True):
        model = make_model(MTSAC, gym.make("Pendulum-v1"), batch_size=16, collect=40, learning_rate=LEARNING_RATE)
        model._may_look = False
        model._static_update = StaticUpdate(model) if static else None
        model.set_random_seed(1)
        model.train(3)
        models.append(model)
    assert_close(models[1], models[0])


# ------------------------------------------------ nothing waits, nothing is on the host


class NoSynchronisation(TorchDispatchMode):
    """
    Fails where an operation reads values of a tensor to know what to do next, or brings numbers from the host.

    :param device: Where all tensors have to be
    """

    forbidden = (
        *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "unique_dim"),
        *("_unique2", "bincount", "lift_fresh"),
    )

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.n_seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{func} needs values on the host"
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, th.Tensor)]
        places = {tensor.device.type for tensor in tensors}
        assert places <= {self.device}, f"{func} takes tensors on {places}"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            assert all(tensor.dtype != th.bool for tensor in args[1] if tensor is not None), f"{func} with a mask"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{func} without the size of its output"
        self.n_seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm, kwargs", VARIANTS, ids=IDS)
def test_no_operation_looks_at_values(algorithm, kwargs, monkeypatch):
    model = make_ready(algorithm, max_ent_coef=1.0, **{"max_grad_norm": 1.0, **kwargs})
    run, watch = model._static_update._run, NoSynchronisation("cpu")

    def watched(recording, capturable=False):
        with watch:
            run(recording, capturable)

    monkeypatch.setattr(model._static_update, "_run", watched)
    model.train(2)
    assert watch.n_seen > 500


def test_looks_are_noticed():
    model = make_ready(STARSSAC, static=False)
    model.train(1)  # makes the states of the optimisers
    replay_data = model._sample_batch(24)
    with (
        pytest.raises(AssertionError, match=r"unique_consecutive\.default needs values on the host"),
        NoSynchronisation("cpu"),
    ):
        model._make_update(replay_data, True)
    model._may_look = True
    with pytest.raises(AssertionError, match="needs values on the host"), NoSynchronisation("cpu"):
        model._make_update(replay_data, True)
    values = th.ones(3)
    with pytest.raises(AssertionError, match="with a mask"), NoSynchronisation("cpu"):
        values[values > 0]
    with pytest.raises(AssertionError, match="takes tensors on"), NoSynchronisation("meta"):
        values.to("meta")


def on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: on_meta(part) for key, part in value.items()}
    return value.to("meta") if isinstance(value, th.Tensor) else value


def move_to_meta(model: MTSAC) -> None:
    """Make all tensors of a model, in place, ones without values."""
    swaps = th.__future__.get_swap_module_params_on_conversion()
    th.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.policy.to("meta")
    finally:
        th.__future__.set_swap_module_params_on_conversion(swaps)
    for owner in (model, *model.update_guards):
        for name, tensor in vars(owner).items():
            if isinstance(tensor, th.Tensor) and name != "generator_state":
                th.utils.swap_tensors(tensor, tensor.detach().to("meta").requires_grad_(tensor.requires_grad))
    model.device = th.device("meta")


@pytest.mark.parametrize("algorithm, kwargs", VARIANTS, ids=IDS)
def test_all_tensors_are_on_the_device(algorithm, kwargs, monkeypatch):
    """
    On PyTorch's "meta" device, where tensors have shapes but no values: an operation with one on the CPU fails, and so does
    all that would read one. (Fake tensors that say "cuda" would be nearer to a GPU, but autograd needs a PyTorch built with
    CUDA for them.)
    """
    batch = make_ready(algorithm, **kwargs)._sample_batch(24)
    model = make_model(algorithm, on_nonfinite="mask", **{"max_grad_norm": 1.0, **kwargs})
    for optimizer in model._stepping_optimizers():
        fuse(optimizer)
    move_to_meta(model)
    model._may_look = False
    update = model._static_update = StaticUpdate(model)
    # Three things that "meta" lacks: a fused step, which here checks its arguments, and autocast, which is off
    steps = []

    def fused_adam(*args, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, th.Tensor)]
        assert all(tensor.is_meta for tensor in tensors) and kwargs["lr"].is_meta
        steps.append(len(args[0]))

    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    monkeypatch.setattr(th, "_fused_adam_", fused_adam)
    monkeypatch.setattr(th, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(th, "autocast", lambda *args, **kwargs: nullcontext())
    recording = Recording(type(batch)(*map(on_meta, batch)), updates_targets=True)
    for guard in model.update_guards:
        if hasattr(guard, "draw"):
            recording.draws[guard] = th.rand(NUM_TASKS, NUM_TASKS, device="meta")
    update._set_rates()
    for n_updates in (1, 2):  # the second one with moments
        with NoSynchronisation("meta"):
            update._run(recording)
        assert len(steps) == n_updates * len(update._groups())
    assert recording.dropped.is_meta and recording.dropped.shape == (NUM_TASKS,)


# ------------------------------------------------------------- recording and forgetting


class Played(StaticUpdate):
    """Goes through what happens on a GPU; a "graph" runs the function."""

    captures = True  # type: ignore[assignment]

    def __init__(self, model: MTSAC):
        super().__init__(model)
        self.events: list[str] = []

    def _warm_up(self, recording: Recording) -> None:
        recording.n_warm_ups += 1
        self.events.append("warm-up")
        self._run(recording)

    def _capture(self, recording: Recording) -> Any:
        self.events.append("capture")
        return SimpleNamespace(replay=lambda: (self.events.append("replay"), self._run(recording)))

    def take_events(self) -> str:
        events, self.events = self.events, []
        return " ".join(events)


def make_played(algorithm: type[MTSAC] = PaCoSAC, **kwargs: Any) -> tuple[MTSAC, Played]:
    model = make_ready(algorithm, **kwargs)
    model._static_update = Played(model)
    model.train(N_WARM_UPS + 1)
    assert model._static_update.take_events() == "warm-up warm-up warm-up capture replay"
    return model, model._static_update


def test_an_update_is_captured_after_the_first_ones():
    expected = make_ready(PaCoSAC, static=False)
    expected.train(N_WARM_UPS + 1)
    model, played = make_played()
    for one in (model, expected):
        one.set_random_seed(2)
        one.train(2)
        one.dump_logs()
        one._current_progress_remaining = 0.5
        one.train(1)
    assert played.take_events() == "replay replay replay"
    assert_close(model, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_changes_what_its_graph_holds(algorithm):
    """Else it would be recorded again and again: within a call of ``train``, between two, and over a dump of the logger."""
    model, played = make_played(algorithm, on_nonfinite="raise")
    model.train(1)
    model.dump_logs()
    model.train(1)
    assert played.take_events() == "replay replay"


def test_each_kind_of_update_has_its_own_graph(monkeypatch):
    monkeypatch.setattr(static_update, "N_WARM_UPS", 1)
    model = make_ready(MTSAC, target_update_interval=2)
    model._static_update = played = Played(model)
    model.train(6)
    assert played.take_events() == "warm-up warm-up capture replay capture replay replay replay"
    model.train(2, batch_size=12)
    assert played.take_events() == "warm-up warm-up"
    model.train(2)
    assert played.take_events() == "replay replay"


def test_only_the_last_kinds_keep_their_graphs(monkeypatch):
    monkeypatch.setattr(static_update, "N_WARM_UPS", 1)
    monkeypatch.setattr(static_update, "MAX_RECORDINGS", 2)
    model = make_ready(MTSAC)
    model._static_update = played = Played(model)
    for batch_size in (6, 12, 6, 18):  # 12 is the one that was used least recently then
        model.train(2, batch_size)
    assert played.take_events() == "warm-up capture replay warm-up capture replay replay replay warm-up capture replay"
    model.train(1, batch_size=6)
    assert played.take_events() == "replay"
    model.train(1, batch_size=12)
    assert played.take_events() == "warm-up"
    assert len(played._recordings) == 2


def forget_optimizer_states(model: MTSAC) -> None:
    for optimizer in model._stepping_optimizers():
        optimizer.state.clear()


@pytest.mark.parametrize("forget", [forget_optimizer_states, lambda model: model._train_sums.clear()])
def test_nothing_is_made_in_a_capture(forget):
    """What the warm-ups made is emptied before the capture: as part of a graph it would be made anew by every replay."""
    model = make_ready(MTSAC)
    model._static_update = played = Played(model)
    model.train(N_WARM_UPS)
    forget(model)
    model.train(N_WARM_UPS)
    assert played.take_events() == " ".join(["warm-up"] * 2 * N_WARM_UPS)
    model.train(1)
    assert played.take_events() == "capture replay"


def test_other_kinds_do_not_hide_a_change(monkeypatch):
    """Between the capture of one kind and that of another, in one call of ``train``."""
    monkeypatch.setattr(static_update, "N_WARM_UPS", 1)
    model = make_ready(MTSAC, target_update_interval=2)
    model._static_update = played = Played(model)

    class ChangeGamma(DropTasks):
        def after_update(self, dropped):
            super().after_update(dropped)
            if len(self.after) == 3:
                model.gamma = 0.5

    model.add_update_guard(ChangeGamma([False, False, False]))
    model.train(4)
    assert played.take_events() == "warm-up warm-up capture replay warm-up"
    model.train(2)
    assert played.take_events() == "warm-up capture replay"


def test_a_prioritized_buffer_of_another_style_is_followed(tmp_path):
    other = make_ready(STARSSAC, static=False, replay_buffer_kwargs=dict(per_style="alf"))
    other.save_replay_buffer(tmp_path / "buffer.pkl")
    model, played = make_played(STARSSAC)
    with pytest.warns(UserWarning, match="goes on with its own per_style='alf'"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    model.train(1)
    assert played.take_events() == "warm-up"


def test_a_callback_of_the_user_counts_on_in_a_second_learn():
    """TSACSAC does not save what this one counts, and each ``learn`` makes its counts anew."""
    model = make_ready(TSACSAC, base="paco")
    reset = WResetCallback()
    reset.init_callback(model)
    model._static_update = played = Played(model)
    model.train(N_WARM_UPS + 2)
    played.take_events()
    reset.init_callback(model)
    model.train(1)
    assert played.take_events() == "warm-up"


def set_parameters(model: MTSAC) -> None:
    model.set_parameters(copy.deepcopy(model.get_parameters()))


CHANGES = {
    "setting": lambda model: setattr(model, "gamma", 0.5),
    "setting to None": lambda model: vars(model).update(max_ent_coef=1.0, max_grad_norm=None),  # of equal values before
    "buffer": lambda model: setattr(model, "replay_buffer", copy.deepcopy(model.replay_buffer)),
    "tensor of a guard": lambda model: setattr(model.update_guards[0], "vector", th.zeros(3)),
    "parameters": set_parameters,
    "guard": lambda model: model.add_update_guard(DropTasks([True, False, False])),
    "threshold": lambda model: setattr(model.update_guards[0], "threshold", 7.0),
    "replaced guard": lambda model: LossMaskoutCallback(3.0, "critic").init_callback(model),
    "betas": lambda model: model.critic.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "sums": lambda model: setattr(model, "_train_sums", {name: total.clone() for name, total in model._train_sums.items()}),
    "data": lambda model: setattr(model.log_ent_coef, "data", model.log_ent_coef.detach().clone()),
    "network": lambda model: setattr(model.critic.compositional.layers[0].weight, "data", th.ones(2, 5, 6, 16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_forgotten_when_something_changes(change):
    model, played = make_played(optimizer_order="sequential", max_ent_coef=None, max_grad_norm=1.0)
    model.train(1)
    assert played.take_events() == "replay"
    CHANGES[change](model)
    model.train(1)
    assert played.take_events() == "warm-up"
    model.train(3)
    assert played.take_events() == "warm-up warm-up capture replay"


def test_a_setting_of_numpy_is_compared():
    model, played = make_played()
    for gamma, events in ((0.5, "warm-up warm-up warm-up capture replay"), (0.25, "warm-up"), (0.25, "warm-up")):
        model.gamma = np.float64(gamma)
        model.train(N_WARM_UPS + 1 if gamma == 0.5 else 1)
        assert played.take_events() == events


def test_copies_record_their_own_graphs():
    """Also where the model has some, whose tensors are its own."""
    model, played = make_played()
    copied = copy.deepcopy(model, {id(model.env): model.env})  # Gymnasium's spaces cannot be copied
    update = copied._static_update
    assert update is not played and update.model is copied
    assert not update._recordings and update._made_with is None
    assert played._recordings and played.model is model
    for one in (model, copied):
        one.set_random_seed(2)
        one.train(2)
    assert update.take_events() == "warm-up warm-up" and played.take_events() == "replay replay"
    assert_close(copied, model)


def test_it_does_not_keep_its_model():
    model = make_model()
    update = model._static_update = StaticUpdate(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None and update.model is None  # at once, not only when Python looks for cycles


def test_it_does_not_keep_a_former_buffer():
    model, played = make_played()
    gone = weakref.ref(model.replay_buffer)
    model.replay_buffer = copy.deepcopy(model.replay_buffer)
    gc.collect()  # what `learn` leaves behind is in cycles
    assert gone() is None and played._made_with is not None


def test_what_does_not_matter_keeps_them(tmp_path):
    model, played = make_played()
    model.lr_schedule = lambda progress: 2**-10
    model.num_timesteps += 1000
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.update_guards[0].generator_state = th.zeros(5056, dtype=th.uint8)  # of the host, and new after each draw
    model.dump_logs()
    model.train(1)
    assert played.take_events() == "replay"
    followers = len(model._scheduled_optimizers())  # the entropy coefficients have a rate of their own
    assert [rate.item() for rate, _ in played._rates][:followers] == [2**-10] * followers


def test_saved_models_know_nothing_of_it(tmp_path):
    plain, model = make_ready(STARSSAC, static=False), make_ready(STARSSAC)
    for one in (plain, model):
        one.train(2)
        one.save(tmp_path / "model.zip")
        loaded = STARSSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
        assert loaded._static_update is None and not loaded.cuda_graph
        for own, other in zip(loaded._stepping_optimizers(), plain._stepping_optimizers(), strict=True):
            settings = [
                [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
                for optimizer in (own, other)
            ]
            assert settings[0] == settings[1]


def test_models_of_a_gpu_go_on_on_a_cpu(tmp_path):
    model = make_model(collect=60)
    model.replay_device, model.cuda_graph = "cuda", True  # as they are in a file from there
    model.save(tmp_path / "model.zip")
    for safe in (False, True):
        loaded = MTSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu", safe=safe)
        assert (loaded.replay_device, loaded.cuda_graph) == ("cpu", False)
    with pytest.raises(ValueError, match="cuda_graph must be False with networks on device 'cpu', got True"):
        MTSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu", cuda_graph=True)


# --------------------------------------------------------------------- captures


class Cuda:
    """
    Stands in for ``torch.cuda``: streams are names, and a graph ends its capture as PyTorch does.

    :param end_error: What to end a capture raises after an error in it; None: nothing
    """

    def __init__(self, end_error: Exception | None = None):
        self.end_error = end_error
        self.current: Any = "default"
        self.capture_streams: list[Any] = []

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda stream: None)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    def current_stream(self, device=None):
        return self.current if self.current != "default" else SimpleNamespace(wait_stream=lambda stream: None, name="default")

    def set_stream(self, stream):
        self.current = "default" if getattr(stream, "name", None) == "default" else stream

    def device(self, device):
        return nullcontext()

    def stream(self, stream):
        return nullcontext()

    @contextmanager
    def graph(self, graph, stream=None):
        self.capture_streams.append(stream)
        before, self.current = self.current, stream
        try:
            yield
        except Exception:
            if self.end_error is not None:
                raise self.end_error  # noqa: B904, as from C++
            self.current = before
            raise
        self.current = before


class OnFakeCuda(StaticUpdate):
    captures = True  # type: ignore[assignment]


def make_on_cuda(monkeypatch, error: Exception | None = None, end_error: Exception | None = None) -> tuple[MTSAC, Cuda]:
    """
    A model that captures its next update.

    :param error: What this capture raises
    :param end_error: What to end it raises then
    """
    model = make_ready(MTSAC)
    model._static_update = update = OnFakeCuda(model)
    cuda = Cuda(end_error)
    for name in ("Stream", "CUDAGraph", "current_stream", "set_stream", "device", "stream", "graph"):
        monkeypatch.setattr(th.cuda, name, getattr(cuda, name))
    run = update._run

    def failing(recording, capturable=False):
        # Without `capturable`, which needs a GPU
        run(recording)
        if capturable and error is not None:
            raise error

    monkeypatch.setattr(update, "_run", failing)
    model.train(N_WARM_UPS)
    return model, cuda


def test_captures_are_on_a_stream_of_the_device(monkeypatch):
    """That of the warm-ups, and not the one that PyTorch makes once, on the GPU of the first capture."""
    model, cuda = make_on_cuda(monkeypatch)
    stream = model._static_update._stream
    model.train(1)
    assert stream is not None and cuda.capture_streams == [stream]
    assert cuda.current == "default"


def test_a_failed_capture_tells_its_reason_and_is_the_last(monkeypatch):
    reason, end = RuntimeError("operation not permitted"), RuntimeError("failed due to a previous error during capture")
    model, cuda = make_on_cuda(monkeypatch, reason, end)
    with pytest.raises(RuntimeError, match=r"in a new process, cuda_graph=False .*: RuntimeError: operation not permitted"):
        model.train(1)
    assert cuda.current == "default" and len(cuda.capture_streams) == 1
    parameters = parameters_of(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"start a new process, .*RuntimeError: operation not permitted"):
            model.train(1)
    assert len(cuda.capture_streams) == 1
    assert all(th.equal(tensor, parameters[name]) for name, tensor in parameters_of(model).items())


def test_a_capture_that_ends_after_an_error_tells_it(monkeypatch):
    model, cuda = make_on_cuda(monkeypatch, ZeroDivisionError("by a guard"))
    with pytest.raises(ZeroDivisionError, match="by a guard"):
        model.train(1)
    assert cuda.current == "default"
    model, cuda = make_on_cuda(monkeypatch, RuntimeError("cannot copy from the host"))
    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph .*: RuntimeError: cannot copy from the host"):
        model.train(1)


@pytest.mark.parametrize("is_ended", [True, False])
def test_too_little_memory_is_told_as_such(is_ended, monkeypatch):
    error = th.OutOfMemoryError("CUDA out of memory")
    model, cuda = make_on_cuda(monkeypatch, error, None if is_ended else RuntimeError("previous error during capture"))
    with pytest.raises(th.OutOfMemoryError, match="CUDA out of memory"):
        model.train(1)
    assert cuda.current == "default"
    if is_ended:
        model.train(1, batch_size=6)  # a warm-up
    else:
        with pytest.raises(RuntimeError, match="start a new process"):
            model.train(1)


# ----------------------------------------------------------------------- errors


class VectorAndPicture(gym.Env):
    observation_space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)), b=gym.spaces.Box(-1, 1, (3,)))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_there_are_no_graphs_of_a_cpu(algorithm):
    with pytest.raises(ValueError, match="cuda_graph must be False with networks on device 'cpu', got True"):
        make_model(algorithm, cuda_graph=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match="cuda_graph must be True or False, got 'yes'"):
        make_model(cuda_graph="yes")
    with pytest.raises(ValueError, match="cuda_graph must be False with use_sde=True, got True"):
        make_model(cuda_graph=True, use_sde=True)
    for bad in (dict(optimizer_class=th.optim.SGD), dict(optimizer_kwargs=dict(foreach=True))):
        with pytest.raises(ValueError, match="cuda_graph must be False unless optimizer_class is Adam or AdamW"):
            make_model(cuda_graph=True, policy_kwargs=bad)
    with pytest.raises(ValueError, match=r"cuda_graph must be False unless observations are vectors \(a 1-D Box\), got True"):
        MTSAC("MultiInputPolicy", VectorAndPicture(), cuda_graph=True, device="cpu", policy_kwargs=dict(net_arch=[4]))


# ------------------------------------------------------------------------- GPU


@needs_gpu
@pytest.mark.parametrize("algorithm, kwargs", VARIANTS, ids=IDS)
def test_a_graph_is_the_eager_update(algorithm, kwargs):
    """Over 100 updates with the generators in the same state; index_add and index_put add in any order on a GPU."""
    if algorithm is STARSSAC:
        kwargs = {**kwargs, "per_alpha": 0.0}  # priorities would make other batches of other roundings
    models = []
    for cuda_graph in (False, True):
        model = make_model(algorithm, collect=60, device="cuda", cuda_graph=cuda_graph, learning_rate=LEARNING_RATE, **kwargs)
        model.set_random_seed(1)
        for _ in range(20):
            model.train(5)
        models.append(model)
    assert all(recording.graph is not None for recording in models[1]._static_update._recordings.values())
    assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_everything_together_on_a_gpu(algorithm, tmp_path):
    kwargs = dict(device="cuda", cuda_graph=True, replay_device="cuda", learning_starts=15)
    model = make_model(algorithm, **kwargs)
    model.learn(150)
    assert any(recording.graph is not None for recording in model._static_update._recordings.values())
    assert all(tensor.isfinite().all() for tensor in parameters_of(model).values())
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", env=make_env(), device="cuda")
    loaded.learn(60, reset_num_timesteps=False)
    algorithm.load(tmp_path / "model.zip", env=make_env(), device="cpu").learn(60, reset_num_timesteps=False)
