import io
import itertools
import os
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, LogEveryNTimesteps, StopTrainingOnNoModelImprovement
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mtrl.common import callbacks
from sb3_mtrl.common.callbacks import MultiTaskEvalCallback, TaskSuccessCallback, record_per_task
from sb3_mtrl.common.evaluation import MultiTaskEvaluation
from sb3_mtrl.common.results import read_evaluations
from tests.tiny_envs import PointTasksEnv

HORIZON = 5


class Dumps(KVWriter):
    """Keeps what the logger dumps."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass

    def rows_with(self, key: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if key in row]


class CountCalls(BaseCallback):
    def _on_step(self) -> bool:
        return True


def make_env(n_envs: int = 1, num_tasks: int = 3, vec_env_cls: Any = DummyVecEnv, seed: int = 0, **env_kwargs: Any):
    env_kwargs = {"num_tasks": num_tasks, "horizon": HORIZON, "step_size": 0.5, **env_kwargs}
    return make_vec_env(PointTasksEnv, n_envs, seed=seed, env_kwargs=env_kwargs, vec_env_cls=vec_env_cls)


def make_sac(env, learning_starts: int = 10_000, seed: int = 0) -> tuple[SAC, Dumps]:
    """A SAC that, by default, never updates, with a logger that can be read."""
    model = SAC(
        "MlpPolicy",
        env,
        policy_kwargs={"net_arch": [4]},
        learning_starts=learning_starts,
        buffer_size=1000,
        seed=seed,
        device="cpu",
    )
    dumps = Dumps()
    model.set_logger(Logger(None, [dumps]))
    return model, dumps


def make_evaluation(success_by_task: list[float], reward: float) -> MultiTaskEvaluation:
    """Four episodes per task, all of one return."""
    successes = np.concatenate([np.arange(4) < 4 * success for success in success_by_task]).astype(float)
    successes[np.isnan(np.repeat(success_by_task, 4))] = np.nan
    n_tasks, n_episodes = len(success_by_task), len(successes)
    return MultiTaskEvaluation(
        task_names=tuple(f"point-{task}" for task in range(n_tasks)),
        task_ids=np.repeat(np.arange(n_tasks), 4),
        rewards=np.full(n_episodes, float(reward)),
        lengths=np.full(n_episodes, HORIZON),
        successes=successes,
    )


def script_evaluations(monkeypatch, *evaluations: MultiTaskEvaluation) -> None:
    """Let the callback see these evaluations instead of real ones."""
    script = iter(evaluations)
    monkeypatch.setattr(callbacks, "evaluate_multi_task_policy", lambda *args, **kwargs: next(script))


def load_npz(folder) -> dict[str, np.ndarray]:
    with np.load(os.path.join(folder, "evaluations.npz")) as file:
        return {name: file[name] for name in file.files}


# ------------------------------------------------------------------------------------------------ logging per task


def test_task_names_that_the_console_cannot_tell_apart(tmp_path):
    names = ["button-press-topdown-v3", "button-press-topdown-wall-v3"]
    console = io.StringIO()
    csv_path = str(tmp_path / "progress.csv")
    with pytest.raises(ValueError, match="truncated"):  # what this is about: SB3's table alone
        logger = Logger(None, [HumanOutputFormat(console)])
        for name in names:
            logger.record(f"eval/success_rate/{name}", 1.0)
        logger.dump()

    logger = Logger(None, [HumanOutputFormat(console), CSVOutputFormat(csv_path)])
    logger.record("eval/success_rate", 0.5)
    record_per_task(logger, "eval/success_rate", dict.fromkeys(names, 0.5))
    logger.dump()
    assert "button" not in console.getvalue()
    with open(csv_path) as file:
        assert sorted(file.readline().strip().split(",")) == [
            "eval/success_rate",
            *(f"eval/success_rate/{name}" for name in names),
        ]


@pytest.mark.parametrize("num_tasks,console,shown", [(3, True, True), (3, False, False), (10, True, True), (11, True, False)])
def test_per_task_values_in_the_console(num_tasks, console, shown):
    text = io.StringIO()
    logger = Logger(None, [HumanOutputFormat(text)])
    logger.record("train/loss", 0.0)
    record_per_task(logger, "train/ent_coef", {f"point-{task}": 0.5 for task in range(num_tasks)}, console)
    logger.dump()
    assert ("ent_coef/point-2" in text.getvalue()) == shown


# ------------------------------------------------------------------------------------------- TaskSuccessCallback


def test_task_success_of_scripted_episodes():
    model, _ = make_sac(make_env(2))
    callback = TaskSuccessCallback(window_size=2)
    callback.init_callback(model)

    def finish(*episodes: tuple[int, bool, float]) -> None:
        infos = [{"task_id": task, "is_success": success, "episode": {"r": reward}} for task, success, reward in episodes]
        callback.locals = {"dones": np.ones(len(infos), dtype=bool), "infos": infos}
        assert callback.on_step()

    finish((0, True, 1.0), (2, False, -1.0))
    finish((0, False, 2.0), (0, False, 4.0))
    # By hand: of task 0 the window holds the last two episodes; task 1 has none yet
    assert callback.success_rates == {"point-0": 0.0, "point-2": 0.0}
    assert callback.mean_rewards == {"point-0": 3.0, "point-2": -1.0}
    finish((1, True, 0.0), (0, True, 0.0))
    recorded = model.logger.name_to_value
    assert recorded["rollout/success_rate/point-0"] == 0.5
    assert recorded["rollout/success_rate/point-1"] == 1.0
    assert recorded["rollout/ep_rew_mean/point-0"] == 2.0
    assert recorded["rollout/success_rate_task_mean"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert recorded["rollout/success_rate_worst_task"] == 0.0


def test_task_of_an_episode_is_read_from_the_observation_if_the_info_does_not_tell():
    model, _ = make_sac(make_env())
    callback = TaskSuccessCallback()
    callback.init_callback(model)
    info = {"is_success": True, "terminal_observation": np.array([0, 0, 0, 0, 0, 1, 0], dtype=np.float32)}
    callback.locals = {"dones": np.array([True]), "infos": [info]}
    callback.on_step()
    assert callback.success_rates == {"point-1": 1.0}


@pytest.mark.parametrize("algorithm", [SAC, PPO])
def test_every_dump_holds_all_tasks(algorithm):
    kwargs = {"n_steps": 16, "batch_size": 16} if algorithm is PPO else {"learning_starts": 1000}
    model = algorithm("MlpPolicy", make_env(2), policy_kwargs={"net_arch": [4]}, device="cpu", **kwargs)
    dumps = Dumps()
    model.set_logger(Logger(None, [dumps]))
    callback = TaskSuccessCallback()
    model.learn(128, callback=callback, log_interval=1)
    assert set(callback.success_rates) == {"point-0", "point-1", "point-2"}
    # Once all tasks have finished an episode they are in every dump, also in those between two of their episodes
    # (SAC dumps once per finished episode: the second time in a step the logger is empty but for SB3's own values)
    rows = list({row["time/total_timesteps"]: row for row in reversed(dumps.rows)}.values())[::-1]
    complete = [row for row in rows if "rollout/success_rate/point-2" in row]
    assert len(complete) >= 3
    assert rows[-len(complete) :] == complete
    assert all(
        f"rollout/{key}/point-{task}" in row for row in complete for key in ("success_rate", "ep_rew_mean") for task in (0, 1)
    )


def test_dumps_between_episodes_hold_all_tasks():
    model, dumps = make_sac(make_env())
    model.learn(4 * HORIZON, callback=[TaskSuccessCallback(), LogEveryNTimesteps(1)], log_interval=None)
    with_rewards = [f"rollout/ep_rew_mean/point-{task}" for task in range(3)]
    # One sub-environment plays the tasks in turn: task i ends its first episode at step (i + 1) * HORIZON
    for row in dumps.rows:
        finished = row["time/total_timesteps"] // HORIZON
        assert [key in row for key in with_rewards] == [task < finished for task in range(3)]
    assert len(dumps.rows) == 4 * HORIZON


def test_task_success_windows_go_on_in_a_second_learn():
    model, _ = make_sac(make_env())
    callback = TaskSuccessCallback()
    model.learn(HORIZON, callback=callback)
    assert list(callback.mean_rewards) == ["point-0"]
    model.learn(HORIZON, callback=callback, reset_num_timesteps=False)
    assert list(callback.mean_rewards) == ["point-0", "point-1"]


def test_task_success_without_tasks_and_success():
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=3)])  # not even a Monitor
    model, _ = make_sac(env)
    callback = TaskSuccessCallback()
    model.learn(6, callback=callback)
    assert callback.success_rates == {} and callback.mean_rewards == {}


def test_bad_window_is_refused():
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        TaskSuccessCallback(window_size=0)


# ----------------------------------------------------------------------------------------- MultiTaskEvalCallback


@pytest.mark.parametrize("n_envs", [1, 2, 3, 5])
def test_evaluation_is_even_and_rounded_up(n_envs, tmp_path, capsys):
    model, dumps = make_sac(make_env(2))
    callback = MultiTaskEvalCallback(make_env(n_envs), n_eval_episodes=4, eval_freq=10, log_path=str(tmp_path))
    assert callback.n_eval_episodes == 6
    assert "Evaluating 6 instead of 4 episodes: 2 of each of the 3 tasks" in capsys.readouterr().out
    model.learn(40, callback=callback)

    output = capsys.readouterr().out
    assert "Eval num_timesteps=40" in output and "Success rate: " in output
    assert output.count("  point-0 ") == 2  # the table, once per evaluation
    arrays = load_npz(tmp_path)
    assert arrays["timesteps"].tolist() == [20, 40]
    assert arrays["task_ids"].tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays["task_names"].tolist() == ["point-0", "point-1", "point-2"]
    assert arrays["results"].shape == arrays["ep_lengths"].shape == arrays["successes"].shape == (2, 6)
    assert arrays["task_mean_rewards"] == pytest.approx(arrays["results"].reshape(2, 3, 2).mean(axis=2))
    assert arrays["task_success_rates"] == pytest.approx(arrays["successes"].reshape(2, 3, 2).mean(axis=2))
    # As RL Zoo's plot script reads it
    assert np.squeeze(arrays["results"].mean(axis=1)).shape == (2,)
    # The policy was not updated, and the goals are the same each time
    assert arrays["results"][0].tolist() == arrays["results"][1].tolist()
    assert sorted(os.listdir(tmp_path)) == ["evaluations.npz"]

    row = dumps.rows_with("eval/mean_reward")[-1]
    assert row["eval/mean_reward"] == callback.last_mean_reward == pytest.approx(arrays["results"][1].mean())
    assert row["eval/success_rate"] == callback.last_success_rate
    assert row["eval/mean_ep_length"] == HORIZON
    assert callback.last_evaluation is not None and callback.last_evaluation.episode_counts.tolist() == [2, 2, 2]
    for task, name in enumerate(arrays["task_names"]):
        assert row[f"eval/success_rate/{name}"] == callback.last_task_success[name]
        assert row[f"eval/mean_reward/{name}"] == pytest.approx(arrays["task_mean_rewards"][1, task])


def test_multiple_of_the_number_of_tasks_is_kept(capsys):
    assert MultiTaskEvalCallback(make_env(), n_eval_episodes=6).n_eval_episodes == 6
    MultiTaskEvalCallback(make_env(), n_eval_episodes=4, verbose=0)
    assert capsys.readouterr().out == ""


def test_evaluation_in_sub_processes(tmp_path):
    results = []
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        model, _ = make_sac(make_env())
        eval_env = make_env(2, vec_env_cls=vec_env_cls, seed=7)
        callback = MultiTaskEvalCallback(eval_env, n_eval_episodes=6, eval_freq=10, log_path=str(tmp_path), verbose=0)
        if vec_env_cls is SubprocVecEnv:
            with pytest.warns(UserWarning, match="not of the same type"):
                model.learn(10, callback=callback)
        else:
            model.learn(10, callback=callback)
        eval_env.close()
        results.append(load_npz(tmp_path)["results"].tolist())
    assert results[0] == results[1]


def test_seed_of_the_evaluation(tmp_path):
    def results(seed: int | None) -> np.ndarray:
        model, _ = make_sac(make_env())
        callback = MultiTaskEvalCallback(
            make_env(), n_eval_episodes=3, eval_freq=10, log_path=str(tmp_path), verbose=0, seed=seed
        )
        model.learn(20, callback=callback)
        return load_npz(tmp_path)["results"]

    assert results(1).tolist() == results(1).tolist() != results(2).tolist()
    fresh_goals = results(None)
    assert fresh_goals[0].tolist() != fresh_goals[1].tolist()


def test_best_model_is_chosen_by_success_then_reward(monkeypatch, tmp_path, capsys):
    script = [
        (make_evaluation([0.5, 0.0, 0.5], reward=10), True),  # the first
        (make_evaluation([0.0, 0.25, 0.5], reward=99), False),  # fewer successes, more reward
        (make_evaluation([0.5, 0.5, 0.0], reward=10), False),  # equal in both
        (make_evaluation([0.75, 0.0, 0.25], reward=11), True),  # as many successes, more reward
        (make_evaluation([0.5, 0.5, 0.25], reward=-5), True),  # more successes, less reward
        (make_evaluation([0.5, 0.5, 0.25], reward=float("nan")), False),
        (make_evaluation([0.5, 0.5, 0.25], reward=-4), True),
    ]
    script_evaluations(monkeypatch, *(evaluation for evaluation, _ in script))
    model, dumps = make_sac(make_env())
    saved: list[int] = []
    monkeypatch.setattr(model, "save", lambda path: saved.append(model.num_timesteps))
    on_new_best, after_eval = CountCalls(), CountCalls()
    callback = MultiTaskEvalCallback(
        make_env(), on_new_best, after_eval, n_eval_episodes=12, eval_freq=1, best_model_save_path=str(tmp_path)
    )
    model.learn(len(script), callback=callback)
    expected = [step for step, (_, is_best) in enumerate(script, start=1) if is_best]
    assert saved == expected
    assert (on_new_best.n_calls, after_eval.n_calls) == (len(expected), len(script))
    assert callback.best_success_rate == pytest.approx(5 / 12)
    assert callback.best_mean_reward == 99.0  # SB3's meaning: the highest mean reward, whichever model is kept
    assert callback.last_mean_reward == -4.0
    assert capsys.readouterr().out.count("New best success rate!") == len(expected)

    row = dumps.rows[0]
    # By hand from the first evaluation: rates 1/2, 0, 1/2
    assert row["eval/success_rate"] == pytest.approx(1 / 3)
    assert row["eval/success_rate_worst_task"] == 0.0
    assert row["eval/success_rate_task_std"] == pytest.approx(np.sqrt(2) / 6)


def test_best_model_without_success_is_chosen_by_reward(monkeypatch, tmp_path):
    nan = float("nan")
    rewards_and_best = [(nan, False), (1.0, True), (nan, False), (0.5, False), (2.0, True)]
    script_evaluations(monkeypatch, *(make_evaluation([nan] * 3, reward) for reward, _ in rewards_and_best))
    model, dumps = make_sac(make_env())
    on_new_best = CountCalls()
    callback = MultiTaskEvalCallback(make_env(), on_new_best, eval_freq=1, log_path=str(tmp_path), verbose=0)
    calls = []
    after_eval = CountCalls()
    after_eval._on_step = lambda: calls.append(on_new_best.n_calls) or True  # type: ignore[method-assign,func-returns-value]
    callback.callback, after_eval.parent = after_eval, callback
    model.learn(len(rewards_and_best), callback=callback)
    assert calls == list(itertools.accumulate(int(is_best) for _, is_best in rewards_and_best))
    assert callback.best_mean_reward == 2.0
    assert callback.last_task_success == {} and np.isnan(callback.last_success_rate)
    assert "successes" not in load_npz(tmp_path)
    assert not dumps.rows_with("eval/success_rate")


def test_best_model_is_saved_and_loads(tmp_path):
    model, _ = make_sac(make_env())
    model.learn(10, callback=MultiTaskEvalCallback(make_env(), eval_freq=10, best_model_save_path=str(tmp_path), verbose=0))
    loaded = SAC.load(tmp_path / "best_model", device="cpu")
    obs = make_env().reset()
    assert loaded.predict(obs, deterministic=True)[0].tolist() == model.predict(obs, deterministic=True)[0].tolist()


def test_child_callbacks_can_stop_the_training(monkeypatch):
    script_evaluations(monkeypatch, *(make_evaluation([0.0] * 3, reward=1) for _ in range(10)))
    model, _ = make_sac(make_env())
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2)
    model.learn(10, callback=MultiTaskEvalCallback(make_env(), callback_after_eval=stop, eval_freq=1, verbose=0))
    assert model.num_timesteps == 4  # the first evaluation is the best, then three without improvement are one too many


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_does_not_notice_the_evaluation(deterministic):
    def train(evaluate: bool) -> tuple[np.ndarray, dict[str, th.Tensor]]:
        model, _ = make_sac(make_env(2), learning_starts=10)
        callback = MultiTaskEvalCallback(make_env(3), eval_freq=7, deterministic=deterministic, verbose=0)
        model.learn(60, callback=callback if evaluate else None)
        assert (callback.last_evaluation is not None) == evaluate
        return model.replay_buffer.observations[:30], model.policy.state_dict()

    (obs, params), (obs_without, params_without) = train(True), train(False)
    assert np.array_equal(obs, obs_without)
    assert all(th.equal(params[name], params_without[name]) for name in params)


def test_normalization_statistics_are_copied():
    env = VecNormalize(make_env(), norm_obs=True, norm_reward=False)
    eval_env = VecNormalize(make_env(), training=False, norm_obs=True, norm_reward=False)
    model, _ = make_sac(env)
    model.learn(10, callback=MultiTaskEvalCallback(eval_env, eval_freq=10, verbose=0))
    assert env.obs_rms.count > 10
    assert eval_env.obs_rms.mean.tolist() == env.obs_rms.mean.tolist()


def test_environments_wrapped_differently_are_an_error():
    model, _ = make_sac(VecNormalize(make_env()))
    with pytest.warns(UserWarning, match="not of the same type"), pytest.raises(AssertionError):
        model.learn(10, callback=MultiTaskEvalCallback(make_env(), eval_freq=10, verbose=0))


def test_one_task_equals_sb3(tmp_path):
    recorded = []
    for callback_cls in (EvalCallback, MultiTaskEvalCallback):
        model, dumps = make_sac(make_env(num_tasks=1))
        log_path = str(tmp_path / callback_cls.__name__)
        kwargs = {"seed": None} if callback_cls is MultiTaskEvalCallback else {}  # SB3 does not seed
        callback = callback_cls(
            make_env(num_tasks=1, seed=3), n_eval_episodes=4, eval_freq=10, log_path=log_path, verbose=0, **kwargs
        )
        model.learn(20, callback=callback)
        recorded.append((dumps.rows, load_npz(log_path), callback))
    (rows, arrays, callback), (our_rows, our_arrays, our_callback) = recorded
    for row, our_row in zip(rows, our_rows, strict=True):
        eval_keys = {key for key in row if key.startswith("eval/")}
        assert eval_keys == {key for key in our_row if key.startswith("eval/")}
        for key in eval_keys:
            assert our_row[key] == pytest.approx(row[key])
    for name, array in arrays.items():
        assert our_arrays[name].tolist() == array.tolist()
    assert our_callback.best_mean_reward == pytest.approx(callback.best_mean_reward)


def test_another_number_of_tasks_is_refused_before_training():
    model, _ = make_sac(make_env(num_tasks=3))
    with pytest.raises(ValueError, match=r"as many tasks as the training environment \(3\), got 2"):
        model.learn(10, callback=MultiTaskEvalCallback(make_env(num_tasks=2), verbose=0))


def test_bad_number_of_episodes_is_refused():
    with pytest.raises(ValueError, match="n_eval_episodes must be at least 1, got 0"):
        MultiTaskEvalCallback(make_env(), n_eval_episodes=0)


# ------------------------------------------------------------------------------------------ continuing a training


def continue_training(log_path, model: SAC, n_timesteps: int, **kwargs: Any) -> MultiTaskEvalCallback:
    kwargs = {"n_eval_episodes": 3, "verbose": 0, "eval_freq": 10, **kwargs}
    callback = MultiTaskEvalCallback(make_env(), log_path=str(log_path), **kwargs)
    model.learn(n_timesteps, callback=callback, reset_num_timesteps=False)
    return callback


def test_continued_training_goes_on_in_its_record(tmp_path):
    model, _ = make_sac(make_env())
    first = continue_training(tmp_path, model, 30)
    model.num_timesteps = 20  # as loaded from a checkpoint, while the training went on to 30
    on_new_best = CountCalls()
    second = continue_training(tmp_path, model, 10, callback_on_new_best=on_new_best)
    arrays = load_npz(tmp_path)
    assert arrays["timesteps"].tolist() == [10, 20, 30]
    assert arrays["results"].shape == arrays["ep_lengths"].shape == arrays["successes"].shape == (3, 3)
    assert arrays["task_mean_rewards"].shape == arrays["task_success_rates"].shape == (3, 3)
    # The policy is the same as ever, so nothing is better than before
    assert on_new_best.n_calls == 0
    assert second.best_mean_reward == pytest.approx(first.best_mean_reward)
    assert second.best_success_rate == first.best_success_rate


def test_rows_of_success_stay_with_their_evaluations(monkeypatch, tmp_path):
    """Two evaluations tell nothing of success, one of the first two tasks alone, one of all."""
    nan = float("nan")
    unknown, partly, known = (make_evaluation(rates, 1.0) for rates in ([nan] * 3, [0.5, 1.0, nan], [0.0, 0.25, 1.0]))
    script_evaluations(monkeypatch, unknown, unknown, partly, known, unknown)
    model, _ = make_sac(make_env())
    for n_evaluations in (3, 1, 1):
        continue_training(tmp_path, model, 10 * n_evaluations, n_eval_episodes=12)
    arrays = load_npz(tmp_path)
    assert arrays["timesteps"].tolist() == [10, 20, 30, 40, 50]
    expected = [[nan] * 3, [nan] * 3, [0.5, 1.0, nan], [0.0, 0.25, 1.0], [nan] * 3]
    np.testing.assert_array_equal(arrays["task_success_rates"], expected)
    np.testing.assert_array_equal(arrays["successes"].reshape(5, 3, 4).mean(axis=2), expected)
    history = read_evaluations(tmp_path / "evaluations.npz", "sac", "Env-v0", 1)
    np.testing.assert_array_equal(history.success_rates, expected)


def test_best_score_counts_what_was_lost_with_a_crash(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, _ = make_sac(make_env())
    bad, good, middling = (make_evaluation([rate] * 3, rate) for rate in (0.0, 1.0, 0.5))
    script_evaluations(monkeypatch, bad, good, middling)
    continue_training("logs", model, 20, n_eval_episodes=12)
    model.num_timesteps = 10
    callback = continue_training("logs", model, 10, n_eval_episodes=12)
    assert load_npz("logs")["results"].mean(axis=1).tolist() == [0.0, 0.5]
    # best_model.zip is still the one that scored 1
    assert callback.best_success_rate == 1.0


def test_new_training_starts_a_new_record(tmp_path):
    model, _ = make_sac(make_env())
    continue_training(tmp_path, model, 30)
    callback = MultiTaskEvalCallback(make_env(), n_eval_episodes=6, log_path=str(tmp_path), verbose=0, eval_freq=10)
    model.learn(10, callback=callback)
    assert load_npz(tmp_path)["results"].shape == (1, 6)


def test_record_that_does_not_fit_is_refused(tmp_path):
    model, _ = make_sac(make_env())
    continue_training(tmp_path, model, 10)
    with pytest.raises(ValueError, match=r"3 episodes .* 6 episodes .* choose another log_path"):
        continue_training(tmp_path, model, 10, n_eval_episodes=6)
    arrays = load_npz(tmp_path)
    np.savez(tmp_path / "evaluations.npz", **arrays | {"ep_lengths": arrays["ep_lengths"][:0]})
    with pytest.raises(ValueError, match=r"a row for each evaluation .* 'ep_lengths': 0, .* choose another log_path"):
        continue_training(tmp_path, model, 10)
    (tmp_path / "evaluations.npz").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="does not hold the evaluations"):
        continue_training(tmp_path, model, 10)
