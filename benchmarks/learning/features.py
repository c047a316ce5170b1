"""
Do CMTA's features still tell where the goal is? A trained CMTASAC beside one with new networks.

    python -m benchmarks.learning.features logs/cpu_suite/cmtasac/MetaWorld-Custom-v3_1/MetaWorld-Custom-v3.zip

Actor and critics see nothing but the features m that the encoder makes of an observation, and the critic loss alone trains it.
A linear regression reads the position of the goal, and its offset from the gripper, from m on the first steps of many episodes
of reach. It learns on the episodes of some goals and is tested on those of the others: there is no goal to recognise. A
success is a gripper within 5 cm of the goal: compare that with the norm of the error over all three axes. An axis along which
the goals spread less need not be read.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch as th

from sb3_mtrl import CMTASAC, make_multi_task_vec_env
from sb3_mtrl.cmtasac.policies import CMTAPolicy

TASK = "reach-v3"
# Of Meta-World's observations
HAND, GOAL = slice(0, 3), slice(36, 39)
SUCCESS_RADIUS = 0.05  # metres
N_EPISODES, N_STEPS = 100, 40
RIDGE = 1e-4


def collect(model: CMTASAC, num_tasks: int, task_id: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The first steps of episodes, by the model and by random actions in turn.

    :param model: A trained model
    :param num_tasks: Number of tasks T that it knows
    :param task_id: Which of them the task is
    :return: Observations ``(N, n + T)`` and recurrent states before them ``(N, 2H)``
    """
    env = make_multi_task_vec_env("MetaWorld-MT1-v3", n_envs=1, seed=0, env_kwargs={"task": TASK})
    one_hot = np.eye(num_tasks, dtype=np.float32)[[task_id]]
    observations, states = [], []
    for episode in range(N_EPISODES):
        obs, state = env.reset(), model.policy.initial_state(1)
        for _ in range(N_STEPS):
            obs = np.concatenate([obs[:, : GOAL.stop], one_hot], axis=1, dtype=np.float32)
            observations.append(obs[0])
            states.append(np.concatenate(state, axis=2)[0, 0])
            action, state = model.predict(obs, state)
            if episode % 2 == 1:
                action = np.array([env.action_space.sample()])
            obs, *_ = env.step(action)
    env.close()
    return np.stack(observations), np.stack(states)


def split_by_goal(goals: np.ndarray) -> np.ndarray:
    """
    :param goals: The goal at each step ``(N, 3)``
    :return: Whether it is one of three fifths of the goals, drawn with a fixed seed, ``(N,)``
    """
    different, goal_ids = np.unique(goals, axis=0, return_inverse=True)
    rank = np.random.default_rng(0).permutation(len(different))  # sorted, the others would lie to one side of these
    return rank[goal_ids.ravel()] < 3 * len(different) // 5  # NumPy 2.0 returns a column


def read_error(features: np.ndarray, values: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """
    :param features: ``(N, d)``
    :param values: What is to be read from them ``(N, n)``
    :param is_train: Which of them to learn on ``(N,)``, bool
    :return: Root mean square error of ridge regression on the others ``(n,)``
    """
    mean, std = features[is_train].mean(axis=0), features[is_train].std(axis=0) + 1e-6
    x = np.column_stack([(features - mean) / std, np.ones(len(features))])
    gram = x[is_train].T @ x[is_train] + RIDGE * is_train.sum() * np.eye(x.shape[1])
    predicted = x[~is_train] @ np.linalg.solve(gram, x[is_train].T @ values[is_train])
    return np.sqrt(np.mean((predicted - values[~is_train]) ** 2, axis=0))


def with_norms(errors: np.ndarray) -> np.ndarray:
    """
    :param errors: Root mean square errors along x, y and z of several positions, ``(3 n,)``
    :return: The same, each position followed by the root mean square of the length of its error, ``(4 n,)``
    """
    by_position = errors.reshape(-1, 3)
    return np.column_stack([by_position, np.sqrt((by_position**2).sum(axis=1))]).ravel()


def mixture(policy: CMTAPolicy, observations: np.ndarray, states: np.ndarray) -> np.ndarray:
    """
    :return: The critics' features m, ``(N, feature_dim)``
    """
    with th.no_grad():
        obs = policy.layout.attach_state(th.as_tensor(observations), th.as_tensor(states))
        return policy.critic.encode(obs).latent[:, : policy.feature_dim].numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Print the errors in centimetres.

    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="zip file of a CMTASAC with temporal attention that was trained on reach, among others")
    parser.add_argument("--task-id", type=int, default=0, help="which of its tasks reach is (default: 0)")
    args = parser.parse_args(arguments)
    th.manual_seed(0)
    model = CMTASAC.load(args.model, device="cpu")
    observations, states = collect(model, model.num_tasks, args.task_id)
    hand, goal = observations[:, HAND], observations[:, GOAL]
    values, is_train = np.concatenate([goal, goal - hand], axis=1), split_by_goal(goal)
    new_policy = type(model.policy)(**model.policy._get_constructor_parameters())
    rows = {
        "spread (standard deviation)": values.std(axis=0),
        "error, from the observation itself": read_error(observations[:, : GOAL.stop], values, is_train),
        "error, from m of new networks": read_error(mixture(new_policy, observations, states), values, is_train),
        "error, from m of the trained model": read_error(mixture(model.policy, observations, states), values, is_train),
    }
    names = [f"{what} {axis}" for what in ("goal", "goal - hand") for axis in (*"xyz", "norm")]
    print(f"{f'{TASK}, cm':<38}" + "".join(f"{name:>18}" for name in names))
    for name, row in rows.items():
        print(f"{name:<38}" + "".join(f"{100 * value:>18.1f}" for value in with_norms(row)))
    print(f"a success is within {100 * SUCCESS_RADIUS:.1f} cm of the goal: compare the norm")
    for name, policy in (("new", new_policy), ("trained", model.policy)):
        with th.no_grad():
            hidden = policy.critic.encoder.experts.last_hidden(th.as_tensor(observations[:, : GOAL.stop]))
        shares = ", ".join(f"{share:.0%}" for share in (hidden <= 0).all(dim=1).float().mean(dim=1).tolist())
        print(f"hidden units of each expert that no observation activates, {name}: {shares}")


if __name__ == "__main__":
    main()
