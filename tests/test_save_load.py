"""Saving, loading, resuming and exporting with several tasks."""

import io
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac.policies import SACPolicy

from sb3_mtrl import CMTASAC, MTSAC, STARSSAC, TSACSAC, PaCoSAC
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.policies import export_onnx
from sb3_mtrl.common.utils import is_fused
from sb3_mtrl.common.vec_env import VecTaskNormalize
from tests.models import NUM_TASKS, make_env, make_model, parameters_of
from tests.tiny_envs import PointTasksEnv

ALGORITHMS = [MTSAC, PaCoSAC, STARSSAC, TSACSAC]
EXPORTABLE = [
    (MTSAC, {}),
    (MTSAC, dict(n_heads="per_task")),
    (MTSAC, dict(policy_kwargs=dict(observe_task=False))),
    (PaCoSAC, {}),
    (PaCoSAC, dict(structure="actor_only")),
    (PaCoSAC, dict(structure="output_only")),
    (PaCoSAC, dict(policy_kwargs=dict(w_activation="softmax"))),
    (STARSSAC, {}),
    (STARSSAC, dict(unique_dim=0, replay_buffer_class=MultiTaskReplayBuffer)),
    (STARSSAC, dict(n_param_sets=1, compositional_head=False, optimizer_order="joint", actor_batch="uniform_in_task")),
]
VARIANTS = [*EXPORTABLE, (TSACSAC, {}), (TSACSAC, dict(n_heads="per_task")), (TSACSAC, dict(base="paco"))]


def random_observations(n: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=(n, 4)), np.eye(NUM_TASKS)[np.arange(n) % NUM_TASKS]], axis=1).astype(np.float32)


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS)
def test_save_and_load_carry_everything(algorithm, kwargs, tmp_path):
    model = make_model(algorithm, learning_starts=20, **kwargs)
    model.learn(90)
    path = tmp_path / "model.zip"
    model.save(path)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = algorithm.load(path, env=make_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert (loaded.num_tasks, loaded.task_names) == (NUM_TASKS, ("point-0", "point-1", "point-2"))
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())
    assert th.equal(loaded.log_ent_coef, model.log_ent_coef)
    observations = random_observations()
    assert np.array_equal(
        model.predict(observations, deterministic=True)[0], loaded.predict(observations, deterministic=True)[0]
    )
    # The optimisers' moments are there too: both go on alike
    for one in (model, loaded):
        one.set_logger(model.logger)
        one.set_random_seed(7)
        one.train(3)
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())
    assert th.equal(loaded.log_ent_coef, model.log_ent_coef)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, CMTASAC])
def test_optimizers_that_were_not_fused_go_on_as_they_were(algorithm, tmp_path):
    """As in files of versions that did not fuse them: the loaded model makes the updates of the one that was saved."""
    unfused = dict(eps=1e-7) if algorithm is PaCoSAC else {}
    model = make_model(algorithm, learning_starts=20, policy_kwargs=dict(optimizer_kwargs=unfused))
    model.learn(90)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    del model.policy_kwargs["optimizer_kwargs"]
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.actor.optimizer.defaults["fused"] and not is_fused(loaded.actor.optimizer)
    for one in (model, loaded):
        one.set_logger(model.logger)
        one.set_random_seed(7)
        one.train(3)
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_user_s_policy_kwargs_are_saved_as_given(algorithm, tmp_path):
    model = make_model(algorithm)
    model.save(tmp_path / "model.zip")
    user_kwargs = {"net_arch": [16, 16], "use_sde": False}
    assert model.policy_kwargs == user_kwargs
    algorithm.load(tmp_path / "model.zip", policy_kwargs=user_kwargs, device="cpu")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "setting"), [(MTSAC, dict(n_heads="per_task")), (PaCoSAC, dict(n_param_sets=2, w_init="uniform"))]
)
def test_settings_that_older_versions_took_from_policy_kwargs(algorithm, setting, safe, tmp_path):
    model = make_model(algorithm, **setting)
    # As such files have it: the policy followed its own argument, the algorithm kept the default of the same name
    model.policy_kwargs.update(setting)
    for name, default in dict(n_heads="shared", n_param_sets=5, w_init="normal").items():
        if name in setting:
            setattr(model, name, default)
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", device="cpu", safe=safe)
    assert {name: getattr(loaded, name) for name in setting} == setting
    expected = parameters_of(model)
    assert all(th.equal(tensor, expected[name]) for name, tensor in parameters_of(loaded).items())


def test_a_model_that_counts_episodes_can_be_loaded_on_several_environments(tmp_path):
    make_model(env=make_env(n_envs=1), train_freq=(1, "episode")).save(tmp_path / "model.zip")
    loaded = MTSAC.load(tmp_path / "model.zip", env=make_env(n_envs=3), device="cpu")
    assert loaded.n_envs == 3 and loaded.train_freq.unit.value == "episode"
    assert loaded.predict(random_observations(3))[0].shape == (3, 2)


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS)
def test_policy_saved_alone(algorithm, kwargs, tmp_path):
    model = make_model(algorithm, **kwargs)
    model.policy.save(tmp_path / "policy.pkl")
    policy = type(model.policy).load(tmp_path / "policy.pkl", device="cpu")
    observations = random_observations()
    assert np.array_equal(
        policy.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loading_for_other_tasks_is_refused(algorithm, tmp_path):
    model = make_model(algorithm, collect=30)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match="env must have the model's num_tasks=3, got one with num_tasks=2"):
        algorithm.load(tmp_path / "model.zip", env=make_env(2), device="cpu")
    other = make_model(algorithm, env=make_env(2), collect=30)
    own_buffer = other.replay_buffer
    with pytest.raises(ValueError, match=r"'num_tasks': 2, .* got .*'num_tasks': 3"):
        other.load_replay_buffer(tmp_path / "buffer.pkl")
    assert other.replay_buffer is own_buffer
    sac = SAC("MlpPolicy", make_env(), device="cpu")
    sac.save_replay_buffer(tmp_path / "sac.pkl")
    with pytest.raises(ValueError, match="a ReplayBuffer of"):
        model.load_replay_buffer(tmp_path / "sac.pkl")
    assert isinstance(model.replay_buffer, MultiTaskReplayBuffer)


@pytest.mark.parametrize(
    ("algorithm", "env_tasks", "kwargs"),
    [
        (MTSAC, 2, {}),
        (PaCoSAC, 2, {}),
        (PaCoSAC, 3, dict(n_param_sets=2)),
        (STARSSAC, 3, dict(unique_dim=8)),
        (TSACSAC, 2, {}),
    ],
)
def test_parameters_of_other_shapes_are_refused_and_nothing_changes(algorithm, env_tasks, kwargs):
    parameters = make_model(algorithm).get_parameters()
    other = make_model(algorithm, env=make_env(env_tasks), batch_size=6 * env_tasks, **kwargs)
    before = parameters_of(other)
    with pytest.raises(RuntimeError, match=f"do not fit this model of num_tasks={env_tasks}"):
        other.set_parameters(parameters)
    assert all(th.equal(tensor, before[name]) for name, tensor in parameters_of(other).items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("damage", ["truncated", "no zip", "one byte"])
def test_damaged_files_are_refused(algorithm, damage, tmp_path):
    path = tmp_path / "model.zip"
    make_model(algorithm).save(path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "no zip":
        content = b"not a zip file"
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip"):
        algorithm.load(path, device="cpu")


@pytest.mark.parametrize("as_file_object", [False, True])
def test_a_damaged_weight_is_noticed_whatever_pytorch_reads(as_file_object, tmp_path, monkeypatch):
    path = tmp_path / "model.zip"
    make_model(MTSAC).save(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = archive.getinfo("policy.pth")
    content[part.header_offset + part.file_size // 2] ^= 0xFF
    path.write_bytes(content)
    seek = zipfile.ZipExtFile.seek

    def seek_as_python_313(self, *args):
        self._expected_crc = None
        return seek(self, *args)

    monkeypatch.setattr(zipfile.ZipExtFile, "seek", seek_as_python_313)
    with pytest.raises(ValueError, match=r"path must name a whole model file, got .*Bad CRC-32 for file 'policy.pth'"):
        MTSAC.load(io.BytesIO(content) if as_file_object else path, device="cpu")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loading_from_a_file_object_and_with_another_number_of_sub_environments(algorithm):
    model = make_model(algorithm, learning_starts=20)
    model.learn(60)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    buffer_file = io.BytesIO()
    model.save_replay_buffer(buffer_file)
    buffer_file.seek(0)
    loaded = algorithm.load(file, env=make_env(n_envs=2), device="cpu")
    loaded.load_replay_buffer(buffer_file)
    n_updates = loaded._n_updates
    loaded.learn(40)
    assert loaded.replay_buffer.size() == 60 + 40
    assert loaded._n_updates > n_updates


@pytest.mark.parametrize(("algorithm", "kwargs"), EXPORTABLE)
def test_exported_task_policies_act_alike(algorithm, kwargs, tmp_path):
    model = make_model(algorithm, learning_starts=20, **kwargs)
    model.learn(60)
    observations = random_observations()
    expected, _ = model.predict(observations, deterministic=True)
    for task_id, task_name in enumerate(model.task_names):
        exported = model.export_task_policy(task_name)
        assert type(exported) is SACPolicy
        exported.save(tmp_path / "exported.pkl")
        rows = np.arange(len(observations)) % NUM_TASKS == task_id
        for policy in (exported, model.export_task_policy(task_id), SACPolicy.load(tmp_path / "exported.pkl", device="cpu")):
            actions, _ = policy.predict(observations[rows, :4], deterministic=True)
            np.testing.assert_allclose(actions, expected[rows], atol=1e-6)
        # The critics too
        obs, actions = th.as_tensor(observations[rows]), th.as_tensor(expected[rows])
        for got, wanted in zip(exported.critic(obs[:, :4], actions), model.critic(obs, actions), strict=True):
            th.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_export_of_a_single_task_model():
    model = MTSAC("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), device="cpu")
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(
        model.export_task_policy(0).predict(observations, deterministic=True)[0],
        model.predict(observations, deterministic=True)[0],
        atol=1e-6,
    )


def test_a_file_of_another_algorithm_is_refused(tmp_path):
    make_model(PaCoSAC).save(tmp_path / "paco.zip")
    with pytest.raises(ValueError, match="policy must be one of MTSAC's, got PaCoPolicy"):
        MTSAC.load(tmp_path / "paco.zip", device="cpu")
    make_model(MTSAC).save(tmp_path / "mtsac.zip")
    with pytest.raises(ValueError, match=r"policy must be a subclass of PaCoPolicy or one of .* got .*MTSACPolicy"):
        PaCoSAC.load(tmp_path / "mtsac.zip", device="cpu")


def test_learning_rates_given_at_loading_count(tmp_path):
    make_model(PaCoSAC, learning_starts=20).learn(60).save(tmp_path / "model.zip")
    loaded = PaCoSAC.load(
        tmp_path / "model.zip", env=make_env(), ent_coef_learning_rate=1e-2, w_learning_rate=1e-5, device="cpu"
    )
    loaded.learn(30)
    assert loaded.ent_coef_optimizer.param_groups[0]["lr"] == 1e-2
    assert loaded.policy.w_optimizer.param_groups[0]["lr"] == 1e-5


def test_w_reset_goes_on_where_it_was(tmp_path):
    model = make_model(PaCoSAC)
    callback = model.w_reset_callback
    callback.after_update(th.tensor([True, False, False]))
    model.save(tmp_path / "model.zip")
    loaded = PaCoSAC.load(tmp_path / "model.zip", env=make_env(), device="cpu")
    assert loaded.w_reset_callback.resets.tolist() == [1, 0, 0]
    for one in (model, loaded):
        one.w_reset_callback.after_update(th.tensor([False, True, False]))
    assert th.equal(loaded.policy.compositional_vectors, model.policy.compositional_vectors)


def test_export_of_a_normalised_model_warns():
    model = make_model(MTSAC, env=VecTaskNormalize(make_env()))
    with pytest.warns(UserWarning, match="normalised"):
        model.export_task_policy(0)


def test_export_refuses_unknown_tasks():
    model = make_model()
    with pytest.raises(ValueError, match="task must be one of point-0, point-1, point-2, got 'point-3'"):
        model.export_task_policy("point-3")
    with pytest.raises(ValueError, match="task must be between 0 and 2, got 3"):
        model.export_task_policy(3)


class ScaledActions(PointTasksEnv):
    """The same with actions between 0 and 4 instead of -1 and 1."""

    def __init__(self) -> None:
        super().__init__(3)
        self.action_space = type(self.action_space)(0.0, 4.0, (2,), np.float32)


@pytest.mark.parametrize("algorithm", [MTSAC, PaCoSAC])
def test_onnx_gives_the_same_actions(algorithm, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    env = DummyVecEnv([ScaledActions])
    model = make_model(algorithm, env=env)
    policy = model.export_task_policy(1)
    path = tmp_path / "policy.onnx"
    export_onnx(policy, path)
    session = onnxruntime.InferenceSession(str(path))
    for n in (1, 5):
        observations = np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)
        (actions,) = session.run(["action"], {"observation": observations})
        expected, _ = policy.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions, expected, atol=1e-5)
