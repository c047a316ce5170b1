"""Updates in bfloat16: close to those in float32, and with float32 where eight bits do not do."""

import pytest
import torch as th

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.cpu_tuning import MatmulProbe
from sb3_mtrl.common.torch_layers import StackedMLP, precise_baddbmm
from sb3_mtrl.mtsac.policies import sample_squashed_gaussian
from tests.models import ALGORITHMS, make_env, make_model, parameters_of

pytestmark = pytest.mark.filterwarnings("ignore:amp='bf16' makes training slower")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU"))]
VARIANTS = [
    (MTSAC, {}),
    (MTSAC, {"optimizer_order": "joint"}),
    (MTSAC, {"n_heads": "per_task"}),
    (PaCoSAC, {}),
    (PaCoSAC, {"optimizer_order": "sequential"}),
    (CMTASAC, {}),
    (CMTASAC, {"gate_sharing": "actor", "optimizer_order": "joint"}),
    (TSACSAC, {}),
    (TSACSAC, {"base": "paco"}),
    (STARSSAC, {}),
    (STARSSAC, {"optimizer_order": "joint"}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(["algorithm", "settings"], VARIANTS)
def test_update_is_close_to_float32(algorithm, settings, device):
    """bfloat16 rounds by 2^-9 at most; sums of such errors leave the direction of an update alone."""
    changes = []
    for amp in ("none", "bf16"):
        # Plain gradient descent: Adam's first steps would blow rounding errors of tiny gradients up to full steps
        policy_kwargs = dict(net_arch=[64, 64], optimizer_class=th.optim.SGD)
        model = make_model(algorithm, collect=60, amp=amp, device=device, policy_kwargs=policy_kwargs, **settings)
        before = parameters_of(model)
        th.manual_seed(1)
        model.train(3)
        after = parameters_of(model)
        parts = [(after[name] - before[name]).flatten() for name in sorted(before) if before[name].is_floating_point()]
        changes.append(th.cat(parts).double())
    exact, rounded = changes
    assert not th.equal(exact, rounded)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parameters_stay_float32(algorithm):
    model = make_model(algorithm, amp="bf16", learning_starts=20)
    model.learn(60)
    assert model._n_updates > 0
    for name, tensor in model.policy.state_dict().items():
        assert tensor.dtype == th.float32 and tensor.isfinite().all(), name
    assert not th.is_autocast_enabled("cpu")


@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC, TSACSAC, STARSSAC])
def test_values_stay_float32(algorithm):
    model = make_model(algorithm, collect=30)
    data = model.replay_buffer.sample(24)
    with th.autocast("cpu", th.bfloat16):
        for critic in (model.critic, model.critic_target):
            values = critic.q_values(data.observations.view(len(data.group_tasks), -1, 7), data.actions)
            assert values.dtype == th.float32


def test_autocast_ends_with_an_exception(monkeypatch):
    model = make_model(collect=30, amp="bf16")

    def fail(*args):
        assert th.is_autocast_enabled("cpu")
        raise RuntimeError("in the update")

    monkeypatch.setattr(model, "_sequential_update", fail)
    with pytest.raises(RuntimeError, match="in the update"):
        model.train(1)
    assert not th.is_autocast_enabled("cpu")


def test_each_loss_sees_the_weights_of_now():
    """Autocast would cache them at their first use, and the actor learn from the critics of before their step."""
    model = make_model(collect=30, amp="bf16")
    layer = th.nn.Linear(4, 4)
    x = th.ones(2, 4)
    with model._update_context():
        first = layer(x)
        with th.no_grad():
            layer.weight.add_(1.0)
        # By hand: the sum of four more ones
        th.testing.assert_close(layer(x).float(), first.float() + 4.0, rtol=2e-2, atol=2e-2)
        assert layer(x).dtype == th.bfloat16


def test_values_of_critics_are_not_rounded():
    layers = [th.nn.Linear(2, 2), th.nn.ReLU(), th.nn.Linear(2, 1)]
    with th.no_grad():
        layers[0].weight.copy_(th.eye(2))
        layers[0].bias.zero_()
        layers[2].weight.fill_(500.0)
        layers[2].bias.fill_(1.0)
    critic = StackedMLP([th.nn.Sequential(*layers)])
    with th.autocast("cpu", th.bfloat16):
        values = critic(th.ones(1, 2))
    # 500 + 500 + 1; the neighbours of 1001 in bfloat16 are 1000 and 1004
    assert values.dtype == th.float32 and values.item() == 1001.0


def test_precise_product_without_autocast_is_the_plain_one():
    bias, x, weight = th.randn(2, 1, 3), th.randn(2, 5, 4), th.randn(2, 4, 3)
    assert th.equal(precise_baddbmm(bias, x, weight), th.baddbmm(bias, x, weight))


def test_log_probabilities_are_taken_in_float32():
    mean = th.full((3, 2), 2.5)
    results = []
    for dtype in (th.float32, th.bfloat16):
        th.manual_seed(0)
        results.append(sample_squashed_gaussian(mean.to(dtype), th.full((3, 2), -2.0, dtype=dtype)))
    for in_float32, in_bfloat16 in zip(*results, strict=True):
        assert in_bfloat16.dtype == th.float32 and th.equal(in_float32, in_bfloat16)


def test_bad_choice():
    with pytest.raises(ValueError, match="amp must be one of 'none', 'bf16', got 'fp16'"):
        make_model(env=make_env(), amp="fp16")


@pytest.mark.parametrize(["speedup", "n_warnings"], [(0.07, 1), (1.7, 0)])
def test_warning_where_bfloat16_is_slower(monkeypatch, recwarn, speedup, n_warnings):
    monkeypatch.setattr("sb3_mtrl.mtsac.mtsac.bfloat16_probe", lambda: MatmulProbe(speedup, 2e-3))
    make_model(amp="none")
    assert len(recwarn) == 0
    make_model(amp="bf16")
    assert ["amp='bf16' makes training slower" in str(warning.message) for warning in recwarn] == [True] * n_warnings
