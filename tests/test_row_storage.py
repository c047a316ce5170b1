"""Rows of the replay buffer on a device (here the CPU's, with the same code) against rows in main memory."""

import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mtrl import CMTASAC, MTSAC, TSACSAC
from sb3_mtrl.common import buffers, row_storage
from sb3_mtrl.common.buffers import MultiTaskReplayBuffer
from sb3_mtrl.common.checkpoint import MultiTaskCheckpointCallback
from sb3_mtrl.common.checkpoint_store import CheckpointStore, read_checkpoint
from sb3_mtrl.common.prioritized import TaskPrioritizedReplayBuffer
from sb3_mtrl.common.row_storage import DeviceCopy, DeviceRows
from sb3_mtrl.common.vec_env import VecTaskAssignment, VecTaskNormalize
from tests.models import NUM_TASKS, make_env, make_model, parameters_of
from tests.test_buffers import add, make_buffer
from tests.tiny_envs import PointTasksEnv

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


def make_pair(**kwargs) -> tuple[MultiTaskReplayBuffer, MultiTaskReplayBuffer]:
    return make_buffer(**kwargs), make_buffer(storage_device="cpu", **kwargs)


def fill_unequally(*some_buffers: MultiTaskReplayBuffer, n_steps: int = 40) -> None:
    """Task 0 comes in three of five rows, and its ring of 10 goes round twice; task 2 does not fill its own."""
    rng = np.random.default_rng(0)
    for step in range(n_steps):
        tasks = rng.choice(3, size=2, p=[0.6, 0.35, 0.05]).tolist()
        for buffer in some_buffers:
            add(buffer, tasks, [step, step + 0.25])


def assert_equal_batches(one, other) -> None:
    for name, value in one._asdict().items():
        got = getattr(other, name)
        if isinstance(value, dict):
            assert value.keys() == got.keys() and all(th.equal(value[key], got[key]) for key in value)
        elif isinstance(value, th.Tensor):
            assert th.equal(value, got), name
        else:
            assert np.array_equal(value, got), name


@pytest.mark.parametrize("max_staged", [1, 7, 1024])
def test_rows_are_those_in_main_memory(max_staged, monkeypatch):
    monkeypatch.setattr(row_storage, "MAX_STAGED_ROWS", max_staged)
    host, device = make_pair(buffer_size=30, n_envs=2)
    fill_unequally(host, device)
    assert host.full.tolist() == [True, True, False]
    assert isinstance(device._rows, th.Tensor) and np.array_equal(device._rows.numpy(), host._rows)
    assert device.sizes().tolist() == host.sizes().tolist() and np.array_equal(device.row_numbers(), host.row_numbers())


def test_rows_wait_until_they_may_be_drawn():
    buffer = make_buffer(storage_device="cpu", n_envs=2, buffer_size=30)
    add(buffer, [0, 1], [1.0, 2.0])
    assert not buffer._storage._rows.any()
    assert set(buffer.sample(6).observations[:, 0].tolist()) == {1.0, 2.0}


def test_of_two_rows_for_one_place_the_last_one_stays():
    buffer = make_buffer(num_tasks=1, buffer_size=2, n_envs=1, storage_device="cpu")
    for value in range(5):  # all wait together
        add(buffer, [0], [value])
    assert buffer._rows[:, 0].tolist() == [4.0, 3.0]


def test_refused_rows_are_counted():
    pair = make_pair(n_envs=2)
    for buffer in pair:
        add(buffer, [0, 1], [1.0, np.nan])
        assert buffer.refused.tolist() == [0, 1, 0] and buffer.last_refused == (1, ("obs", "next_obs", "reward"))
    assert np.array_equal(pair[1]._rows.numpy(), pair[0]._rows)


def test_equal_places_give_equal_batches():
    host, device = make_pair(buffer_size=30, n_envs=2, extra_columns={"success": 1})
    rng = np.random.default_rng(1)
    for step in range(20):
        tasks = rng.integers(3, size=2).tolist()
        for buffer in (host, device):
            add(buffer, tasks, [step, -step], infos=[{"success": 0.5}, {"success": 1.0}])
    places = np.stack([task * 10 + rng.integers(host.sizes()[task], size=4) for task in (0, 1, 2, 1)])
    assert_equal_batches(host._get_samples(places), device._get_samples(places))


def test_draws_on_a_device_are_uniform_and_seeded():
    """Chi-square of 4 degrees of freedom: above 18.5 in one of 1000 seeds."""
    buffer = make_buffer(storage_device="cpu", num_tasks=2, buffer_size=14)
    for value in range(5):
        add(buffer, [0], [value])
    for value in range(9):  # goes round: 2 to 8 stay
        add(buffer, [1], [value])
    draws = []
    for _ in range(2):
        th.manual_seed(3)
        draws.append(buffer.sample(2 * 20_000).observations[:, 0].view(2, -1))
    assert th.equal(*draws)
    for values, expected in zip(draws[0], (range(5), range(2, 9)), strict=True):
        counts = np.bincount(values.int().numpy(), minlength=expected[-1] + 1)[expected[0] :]
        assert counts.sum() == 20_000 and len(counts) == len(expected)
        mean = 20_000 / len(counts)
        # The second one has 6 degrees of freedom: 22.5
        assert np.square(counts - mean).sum() / mean < (18.5 if len(counts) == 5 else 22.5)


def test_a_task_without_data_leaves_its_group_to_the_others():
    buffer = make_buffer(storage_device="cpu")
    add(buffer, [1], [7.0])
    assert buffer.sample(6).group_tasks.tolist() == [1, 1, 1]
    add(buffer, [0], [8.0])
    assert buffer.sample(6).group_tasks.tolist() == [0, 1, 0]  # what draws are made by follows
    buffer.reset()
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(3)


@pytest.mark.parametrize("to_device", [False, True])
@pytest.mark.parametrize("buffer_class", [MultiTaskReplayBuffer, TaskPrioritizedReplayBuffer])
def test_files_fit_both(to_device, buffer_class, tmp_path):
    env = make_env()
    spaces_ = (env.observation_space, env.action_space)
    kwargs = dict(device="cpu", n_envs=NUM_TASKS, num_tasks=NUM_TASKS)
    original = buffer_class(30, *spaces_, **kwargs, storage_device=None if to_device else "cpu")
    obs = env.reset()
    for _ in range(14):  # rings of 10
        new_obs, rewards, dones, infos = env.step([env.action_space.sample() for _ in range(NUM_TASKS)])
        original.add(obs, new_obs, np.zeros((NUM_TASKS, 2)), rewards, dones, infos)
        obs = new_obs
    save_to_pkl(tmp_path / "buffer.pkl", original)
    loaded = load_from_pkl(tmp_path / "buffer.pkl")
    assert loaded.storage_device is None  # the file says nothing of devices
    if to_device:
        loaded.store_on("cpu")
        assert loaded.storage_device == th.device("cpu")
    assert np.array_equal(np.asarray(loaded._rows), np.asarray(original._rows))
    places = np.array([[0, 9, 3], [10, 11, 12], [20, 21, 22]])
    assert_equal_batches(loaded._get_samples(places), original._get_samples(places))
    for buffer in (loaded, original):  # both go on
        buffer.add(obs, new_obs, np.zeros((NUM_TASKS, 2)), rewards, dones, infos)
    assert np.array_equal(np.asarray(loaded._rows), np.asarray(original._rows))


@pytest.mark.parametrize("storage_device", [None, "cpu"])
def test_models_load_files_of_the_other_kind(storage_device, tmp_path):
    make_model(collect=60).save_replay_buffer(tmp_path / "host.pkl")
    make_model(collect=60, replay_buffer_kwargs=dict(storage_device="cpu")).save_replay_buffer(tmp_path / "device.pkl")
    model = make_model(replay_buffer_kwargs=dict(storage_device=storage_device))
    kept = []
    for name in ("host", "device"):
        model.load_replay_buffer(tmp_path / f"{name}.pkl")
        assert model.replay_buffer.storage_device == (None if storage_device is None else th.device("cpu"))
        kept.append(np.asarray(model.replay_buffer._rows))
        assert model.replay_buffer.sample(24).observations.shape == (24, 7)
    # Equal seeds, and updates do not come before learning starts: the same 20 steps of each task
    assert kept[0].any() and np.array_equal(*kept)


@pytest.mark.parametrize("fails", [False, True])
def test_the_former_rows_make_room_first(fails, monkeypatch, tmp_path):
    """A device may not have room for both; if it has none for the new ones the former ones go back."""
    make_model(collect=90).save_replay_buffer(tmp_path / "buffer.pkl")
    model = make_model(collect=60, replay_buffer_kwargs=dict(storage_device="cpu"))
    own_buffer, rows = model.replay_buffer, np.asarray(model.replay_buffer._rows).copy()
    moves, store_on = [], MultiTaskReplayBuffer.store_on

    def watched(buffer, storage_device):
        moves.append((buffer is own_buffer, storage_device))
        if fails and buffer is not own_buffer:
            raise th.OutOfMemoryError("no room")
        store_on(buffer, storage_device)

    monkeypatch.setattr(MultiTaskReplayBuffer, "store_on", watched)
    device = th.device("cpu")
    if fails:
        with pytest.raises(th.OutOfMemoryError, match="no room"):
            model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert moves == [(True, None), (False, device), (True, device)]
        assert model.replay_buffer is own_buffer and own_buffer.storage_device == device
        assert np.array_equal(np.asarray(own_buffer._rows), rows)
    else:
        model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert moves == [(True, None), (False, device)]
        assert model.replay_buffer.storage_device == device and model.replay_buffer.sizes().tolist() == [30, 30, 30]


@pytest.mark.parametrize("algorithm", [CMTASAC, TSACSAC])
def test_rows_stay_on_their_device_if_a_file_is_refused(algorithm, tmp_path):
    make_model(collect=30).save_replay_buffer(tmp_path / "buffer.pkl")
    kwargs = dict(use_temporal=True) if algorithm is CMTASAC else {}
    model = make_model(algorithm, collect=30, replay_buffer_kwargs=dict(storage_device="cpu"), **kwargs)
    own_buffer, storage = model.replay_buffer, model.replay_buffer._storage
    with pytest.raises(ValueError, match="path must name a replay buffer with the"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is own_buffer and own_buffer._storage is storage


@pytest.mark.parametrize("rows_per_block", [3, 65_536])
def test_rows_of_checkpoints_are_read_in_blocks(rows_per_block, monkeypatch, tmp_path):
    monkeypatch.setattr(buffers, "ROWS_PER_BLOCK", rows_per_block)
    monkeypatch.setattr("sb3_mtrl.common.checkpoint_store.ROWS_PER_BLOCK", rows_per_block)
    host, device = make_pair(buffer_size=30, n_envs=2)
    fill_unequally(host, device)
    for task, (start, end) in enumerate(host.row_numbers().tolist()):
        rows = [np.concatenate(list(buffer.row_blocks(task, start, end))) for buffer in (host, device)]
        assert np.array_equal(*rows) and len(rows[0]) == end - start
        assert all(len(block) <= rows_per_block for block in device.row_blocks(task, start, end))
    store = CheckpointStore(tmp_path, keep=1)
    store.lock()
    path = store.write(1, {}, {}, device)
    for copy in make_pair(buffer_size=30, n_envs=2):  # files of one kind load into both
        copy.set_checkpoint_state(device.get_checkpoint_state())
        read_checkpoint(path).load_rows(copy)
        assert np.array_equal(np.asarray(copy._rows), host._rows)


@pytest.mark.parametrize("algorithm", [MTSAC, TSACSAC])
def test_a_training_goes_on_exactly(algorithm, tmp_path):
    """As with rows in main memory: stopped after a checkpoint and resumed, it ends with the parameters of one in one go."""

    def train(folder, *stops):
        for stop in stops:
            model = make_model(
                algorithm, learning_starts=15, buffer_size=60, replay_buffer_kwargs=dict(storage_device="cpu"), batch_size=6
            )
            model.learn(stop, callback=MultiTaskCheckpointCallback(8, tmp_path / folder, resume="auto"))
        return parameters_of(model), model.replay_buffer

    (expected, expected_buffer), (got, buffer) = train("whole", 150), train("stopped", 75, 150)
    assert all(th.equal(got[name], expected[name]) for name in expected)
    assert th.equal(buffer._rows, expected_buffer._rows) and buffer.storage_device == th.device("cpu")


class ShiftedNormalize(VecNormalize):
    """Not one of those whose formulas are known."""

    def normalize_obs(self, obs):
        return super().normalize_obs(obs) + np.float32(1)


@pytest.mark.parametrize("wrapper", [VecTaskNormalize, VecNormalize, ShiftedNormalize])
@pytest.mark.parametrize("kwargs", [{}, dict(norm_obs=False), dict(norm_reward=False), dict(clip_obs=0.5, clip_reward=0.2)])
def test_normalised_batches(wrapper, kwargs):
    venv = DummyVecEnv([lambda: PointTasksEnv(2, reward_scales=[1.0, 100.0]) for _ in range(2)])
    venv = wrapper(VecTaskAssignment(venv), gamma=0.9, **kwargs)
    host, device = (
        MultiTaskReplayBuffer(
            200, venv.observation_space, venv.action_space, device="cpu", n_envs=2, num_tasks=2, storage_device=storage_device
        )
        for storage_device in (None, "cpu")
    )
    venv.reset()
    original = venv.get_original_obs()
    rng = np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        _, _, dones, infos = venv.step(action)
        for buffer in (host, device):
            buffer.add(original, venv.get_original_obs(), action, venv.get_original_reward(), dones, infos)
        original = venv.get_original_obs()
    places = np.stack([np.arange(60), 100 + np.arange(60)])
    expected, got = host._get_samples(places, venv), device._get_samples(places, venv)
    # Both in float64, from the same statistics; rewards by SB3 in the precision that NumPy takes
    for name in ("observations", "next_observations", "rewards"):
        th.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-7)


def test_small_arrays_are_copied_when_they_change():
    copy, values = DeviceCopy(th.device("cpu")), np.array([1, 2])
    first = copy.of(values)
    assert copy.of(np.array([1, 2])) is first
    values[0] = 5
    assert first.tolist() == [1, 2] and copy.of(values).tolist() == [5, 2]


def test_memory_is_counted_where_it_is(monkeypatch):
    host, device = make_pair(buffer_size=30)
    assert host._n_bytes() == 30 * host.row_width * 4 and device._n_bytes() == 0
    monkeypatch.setattr(th.cuda, "mem_get_info", lambda storage_device: (100, 200))
    with pytest.warns(UserWarning, match="cuda does not have apparently enough memory .* 0.00GB > 0.00GB"):
        device._warn_if_too_large_for(th.device("cuda"))


@pytest.mark.parametrize("bad", ["cuda:x", "meta", "gpu", "", 0, True, 1.5, th.ones(2), "mps"])
def test_bad_storage_devices(bad):
    with pytest.raises(ValueError, match=r"storage_device must be None, 'cpu', 'cuda' or one of its devices .*, got "):
        make_buffer(storage_device=bad)


@pytest.mark.skipif(th.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu():
    with pytest.raises(
        ValueError, match="storage_device must be None or 'cpu' where PyTorch finds no CUDA device, got 'cuda'"
    ):
        make_buffer(storage_device="cuda")
    message = r"replay_device must be 'cpu' with networks on device 'cpu', got 'cuda' \(PyTorch finds no CUDA device\)"
    with pytest.raises(ValueError, match=message):
        make_model(replay_device="cuda")


@pytest.mark.parametrize("bad", ["cuda:0", "gpu", None, 3])
def test_bad_replay_devices(bad):
    with pytest.raises(ValueError, match="replay_device must be one of 'cpu', 'cuda', got"):
        make_model(replay_device=bad)


def test_pickles_of_before_have_no_device():
    buffer = make_buffer()
    add(buffer, [0], [1.0])
    state = buffer.__getstate__()
    assert not any("storage" in name or "on_device" in name for name in state)
    assert pickle.loads(pickle.dumps(buffer)).sizes().tolist() == [1, 0, 0]


def test_device_rows_keep_what_waits_when_others_are_put():
    storage = DeviceRows(4, 1, th.device("cpu"))
    storage.write(np.array([0, 1]), np.array([[1.0], [2.0]], dtype=np.float32))
    storage.put(1, np.array([[3.0]], dtype=np.float32))
    assert storage.rows.flatten().tolist() == [1.0, 3.0, 0.0, 0.0]


@needs_gpu
@pytest.mark.parametrize("algorithm", [MTSAC, TSACSAC])
def test_resident_replay_on_a_gpu(algorithm, tmp_path):
    model = make_model(algorithm, device="cuda", replay_device="cuda", learning_starts=15, buffer_size=60)
    model.learn(150)
    assert model.replay_buffer._rows.is_cuda and model.replay_buffer.sample(24).observations.is_cuda
    host = make_model(algorithm, device="cuda", learning_starts=15, buffer_size=60)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    host.load_replay_buffer(tmp_path / "buffer.pkl")
    places = np.arange(60).reshape(3, 20)
    assert_equal_batches(host.replay_buffer._get_samples(places), model.replay_buffer._get_samples(places))
