"""
Search spaces for ``-optimize``, in RL Zoo's form: a sampler draws from a trial, and a converter makes hyperparameters of what
a trial stored (``--trial-id``). The sampler ends with the converter, so both always agree.

A trial knows nothing of the number of tasks T, so the batch is drawn per task: ``batch_size_per_task`` is a key that the
experiment manager turns into ``batch_size``, and the value "num_tasks" becomes T (both may be used in YAML files, too).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def convert_multi_task_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters as a trial stores them
    :return: Hyperparameters
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size_per_task"] = 2 ** hyperparams.pop("batch_size_per_task_pow")
    net_width, n_layers = hyperparams.pop("net_width"), hyperparams.pop("n_layers")
    hyperparams["policy_kwargs"] = {"net_arch": [net_width] * n_layers}
    if hyperparams.get("w_init") == "onehot":
        # One parameter set per task; the number that was drawn is not used
        hyperparams["n_param_sets"] = "num_tasks"
    return hyperparams


def sample_mtsac_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: The trial to draw from
    :param n_actions: Number of action dimensions
    :param n_envs: Number of sub-environments (not used)
    :param additional_args: More about the run (not used)
    :return: Hyperparameters of MTSAC
    """
    params = _sample_common_params(trial, n_actions)
    params["n_heads"] = trial.suggest_categorical("n_heads", ["shared", "per_task"])
    params["max_grad_norm"] = trial.suggest_float("max_grad_norm", 0.3, 10.0, log=True)
    return convert_multi_task_params(params)


def sample_pacosac_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    :param trial: The trial to draw from
    :param n_actions: Number of action dimensions
    :param n_envs: Number of sub-environments (not used)
    :param additional_args: More about the run; ``num_tasks`` (optional) bounds the number of parameter sets
    :return: Hyperparameters of PaCoSAC
    """
    params = {**_sample_common_params(trial, n_actions), **_sample_compositional_params(trial, additional_args)}
    # Around the published 3000, in units of a squared reward sum (Meta-World pays at most 10 per step)
    params["maskout_threshold"] = trial.suggest_float("maskout_threshold", 100.0, 30_000.0, log=True)
    return convert_multi_task_params(params)


def sample_cmtasac_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    :param trial: The trial to draw from
    :param n_actions: Number of action dimensions
    :param n_envs: Number of sub-environments (not used)
    :param additional_args: More about the run (not used)
    :return: Hyperparameters of CMTASAC
    """
    params = _sample_common_params(trial, n_actions)
    # 6 are what was published
    params["n_experts"] = trial.suggest_int("n_experts", 2, 12)
    params["gate_sharing"] = trial.suggest_categorical("gate_sharing", ["full", "released", "actor"])
    # Below the published 2500 as well: the larger it is, the less the value error shapes the experts
    params["contrastive_coef"] = trial.suggest_float("contrastive_coef", 1.0, 10_000.0, log=True)
    # The target encoder follows ten times as fast as the target critics in the authors' code
    params["encoder_tau"] = trial.suggest_float("encoder_tau", 0.005, 0.2, log=True)
    return convert_multi_task_params(params)


def sample_tsacsac_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    :param trial: The trial to draw from
    :param n_actions: Number of action dimensions
    :param n_envs: Number of sub-environments (not used)
    :param additional_args: More about the run (not used)
    :return: Hyperparameters of TSACSAC
    """
    params = _sample_common_params(trial, n_actions)
    params["n_heads"] = trial.suggest_categorical("n_heads", ["shared", "per_task"])
    # Of the scale of the dense reward (at most 10 per step in Meta-World): a tenth of it was not enough on a small decoy task
    params["success_bonus"] = trial.suggest_float("success_bonus", 1.0, 30.0, log=True)
    # Scripted experts are in success for 0.06 to 0.9 of 500 steps, 0.2 to 0.65 of 150
    params["sparse_budget"] = trial.suggest_float("sparse_budget", 0.05, 0.8)
    params["lambda_mode"] = trial.suggest_categorical("lambda_mode", ["per_task", "shared"])
    params["lambda_learning_rate"] = trial.suggest_float("lambda_learning_rate", 1e-3, 3e-2, log=True)
    params["lambda_max"] = trial.suggest_float("lambda_max", 2.0, 30.0, log=True)
    params["action_distance"] = trial.suggest_categorical("action_distance", ["hinge", "l2"])
    # Around the default -n_actions (1 + ln 2)
    params["edit_target_entropy"] = trial.suggest_float("edit_target_entropy", -3.0 * n_actions, -0.5 * n_actions)
    return convert_multi_task_params(params)


def sample_starssac_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    :param trial: The trial to draw from
    :param n_actions: Number of action dimensions
    :param n_envs: Number of sub-environments (not used)
    :param additional_args: More about the run; ``num_tasks`` (optional) bounds the number of parameter sets
    :return: Hyperparameters of STARSSAC
    """
    params = {**_sample_common_params(trial, n_actions), **_sample_compositional_params(trial, additional_args)}
    # The published description names no numbers: widely around the defaults
    params["unique_dim"] = trial.suggest_categorical("unique_dim", [16, 32, 64, 128])
    params["triplet_coef"] = trial.suggest_float("triplet_coef", 0.01, 10.0, log=True)
    params["triplet_margin"] = trial.suggest_float("triplet_margin", 0.1, 1.0)
    # From 0.1 (a task that is never solved may take half of a batch) to almost equal shares
    params["rho_min"] = trial.suggest_float("rho_min", 0.05, 0.8, log=True)
    params["per_alpha"] = trial.suggest_float("per_alpha", 0.0, 0.8)
    params["actor_batch"] = trial.suggest_categorical("actor_batch", ["same", "uniform_in_task"])
    # A squared error of the reward sum, three times that of PaCo's by default
    params["maskout_threshold"] = trial.suggest_float("maskout_threshold", 300.0, 100_000.0, log=True)
    return convert_multi_task_params(params)


def _sample_compositional_params(trial: "optuna.Trial", additional_args: dict[str, Any]) -> dict[str, Any]:
    # 5 of 10 tasks and 20 of 50 tasks are what was published
    max_param_sets = 10 if additional_args.get("num_tasks", 10) <= 10 else 20
    return {
        "n_param_sets": trial.suggest_int("n_param_sets", 2, max_param_sets),
        "w_init": trial.suggest_categorical("w_init", ["normal", "onehot", "simplex", "uniform"]),
        "w_learning_rate": trial.suggest_float("w_learning_rate", 1e-5, 2e-3, log=True),
    }


def _sample_common_params(trial: "optuna.Trial", n_actions: int) -> dict[str, Any]:
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.001, 0.03, log=True)
    # From 2**4=16 to 2**8=256
    batch_size_per_task_pow = trial.suggest_int("batch_size_per_task_pow", 4, 8)
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size_per_task", 2**batch_size_per_task_pow)
    return {
        "one_minus_gamma": one_minus_gamma,
        "batch_size_per_task_pow": batch_size_per_task_pow,
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "ent_coef_learning_rate": trial.suggest_float("ent_coef_learning_rate", 1e-5, 2e-3, log=True),
        # Polyak coeff
        "tau": trial.suggest_float("tau", 0.001, 0.05, log=True),
        # SAC takes -1 per action dimension, PaCo ln 0.2 = -1.6
        "target_entropy": trial.suggest_float("target_entropy", -2.5 * n_actions, -0.5 * n_actions),
        "net_width": trial.suggest_categorical("net_width", [128, 256, 400]),
        "n_layers": trial.suggest_int("n_layers", 2, 3),
    }
