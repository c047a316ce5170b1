"""
``python -m sb3_mtrl.train``: ``python -m rl_zoo3.train`` where the start-up hook is off or not installed.

It has one argument more, ``--resume [EXP_ID]``: go on with this experiment of ``--algo`` and ``--env`` (below ``-f``), by
default the last one that has a checkpoint, which ``--save-freq`` writes. The other arguments are those that the experiment was
started with, its hyperparameters those that were saved (``-conf`` replaces them); what is given again takes their place, of
``-params``, ``--env-kwargs`` and ``--eval-env-kwargs`` each key by itself, and stays for the next ``--resume``.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from sb3_mtrl.zoo import register

# Arguments that are given as key:value, with their other names; several name one dictionary
_DICT_OPTIONS = {"-params": "-params", "--hyperparams": "-params"}
_DICT_OPTIONS.update({option: option for option in ("--env-kwargs", "--eval-env-kwargs")})
# What the saved hyperparameters of the experiment take the place of
_CONFIG_OPTIONS = ("-conf", "--conf-file", "--trial-id")


def find_experiment_to_resume(folder: str, algo: str, env_id: str, exp_id: int | None = None) -> Path:
    """
    :param folder: Folder of all agents (``-f`` of RL Zoo)
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :param exp_id: Number of the experiment; None: the last one that has a checkpoint
    :return: Folder of the experiment
    :raises FileNotFoundError: if there is none, or it has no checkpoint
    """
    from rl_zoo3.utils import EnvironmentName

    from sb3_mtrl.zoo.runs import find_experiments
    from sb3_mtrl.zoo.utils import CHECKPOINT_FOLDER

    passed_over: list[str] = []
    for candidate in reversed(find_experiments(folder, algo, env_id)):
        if exp_id is not None and candidate != exp_id:
            continue
        experiment = Path(folder, algo, f"{EnvironmentName(env_id)}_{candidate}")
        if any((experiment / CHECKPOINT_FOLDER).glob("checkpoint_*")):
            without = f" (newer, but without checkpoint: {', '.join(passed_over)})" if passed_over else ""
            print(f"Resuming experiment {experiment}{without}")
            return experiment
        passed_over.append(experiment.name)
    which = "no experiment" if exp_id is None else f"no experiment {exp_id}"
    raise FileNotFoundError(
        f"{which} of --algo {algo} --env {env_id} in {folder} has a checkpoint to go on from: --save-freq writes them"
    )


def split_arguments(arguments: list[str]) -> dict[str, list[str]]:
    """
    :param arguments: A command line of options alone
    :return: The values of each option, the last where it is given twice, in order
    """
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in arguments:
        # As argparse tells options from negative numbers
        if argument.startswith("-") and not re.fullmatch(r"-\d+|-\d*\.\d+", argument):
            option, has_value, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
            option = _DICT_OPTIONS.get(option, option)
            options.pop(option, None)
            values = options[option] = [value] if has_value else []
        else:
            values.append(argument)
    return options


def merge_arguments(before: list[str], again: list[str]) -> list[str]:
    """
    :param before: The command line that an experiment was started with
    :param again: That with which it goes on, and which takes the other's place
    :return: Both in one
    """
    merged = {option: values for option, values in split_arguments(before).items() if option not in _CONFIG_OPTIONS}
    for option, values in split_arguments(again).items():
        if option in _DICT_OPTIONS.values():
            by_key = {value.partition(":")[0]: value for value in [*merged.get(option, []), *values]}
            values = list(by_key.values())
        merged.pop(option, None)
        merged[option] = values
    return [part for option, values in merged.items() for part in (option, *values)]


def prepare_resume(arguments: list[str]) -> list[str]:
    """
    Let the next experiment manager go on with the experiment that the command line names.

    :param arguments: The command line, with ``--resume``
    :return: The command line that the experiment was started with, and this one in it, without ``--resume``
    :raises FileNotFoundError: if there is nothing to go on from
    """
    from rl_zoo3.utils import EnvironmentName

    from sb3_mtrl.zoo.exp_manager import MultiTaskExperimentMixin
    from sb3_mtrl.zoo.patches import TRAIN_FOLDER
    from sb3_mtrl.zoo.utils import ARGUMENTS_FILE

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("-f", "--log-folder", default=TRAIN_FOLDER)
    parser.add_argument("--resume", nargs="?", type=int, metavar="EXP_ID")
    args, _ = parser.parse_known_args(arguments)
    experiment = find_experiment_to_resume(args.log_folder, args.algo, args.env, args.resume)
    MultiTaskExperimentMixin.resume_folder = str(experiment)
    before = json.loads((experiment / EnvironmentName(args.env) / ARGUMENTS_FILE).read_text())
    again = split_arguments(arguments)
    del again["--resume"]
    return merge_arguments(before, [part for option, values in again.items() for part in (option, *values)])


def main() -> None:
    """
    Train an agent with RL Zoo; the command-line arguments are those of ``rl_zoo3.train``, and ``--resume``.
    """
    register()
    from rl_zoo3.train import train

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{(__doc__ or '').strip()}\n\nRL Zoo's arguments:\n")
    elif any(argument.partition("=")[0] == "--resume" for argument in sys.argv[1:]):
        sys.argv[1:] = prepare_resume(sys.argv[1:])
    train()


if __name__ == "__main__":
    main()
