"""
``python -m sb3_mtrl.train``: ``python -m rl_zoo3.train`` where the start-up hook is off or not installed.

It has one argument more, ``--resume``: go on with the last experiment of ``--algo`` and ``--env`` (below ``-f``) that has a
checkpoint, which ``--save-freq`` writes. The other arguments are those that the experiment was started with; what is given
again takes their place.
"""

import argparse
import json
import sys
from pathlib import Path

from sb3_mtrl.zoo import register


def find_experiment_to_resume(folder: str, algo: str, env_id: str) -> Path:
    """
    :param folder: Folder of all agents (``-f`` of RL Zoo)
    :param algo: Name of the algorithm in RL Zoo
    :param env_id: Id of the environment
    :return: Folder of the last experiment that has a checkpoint
    :raises FileNotFoundError: if there is none
    """
    from rl_zoo3.utils import EnvironmentName

    from sb3_mtrl.zoo.runs import find_experiments
    from sb3_mtrl.zoo.utils import CHECKPOINT_FOLDER

    for exp_id in reversed(find_experiments(folder, algo, env_id)):
        experiment = Path(folder, algo, f"{EnvironmentName(env_id)}_{exp_id}")
        if any((experiment / CHECKPOINT_FOLDER).glob("checkpoint_*")):
            return experiment
    raise FileNotFoundError(
        f"no experiment of --algo {algo} --env {env_id} in {folder} has a checkpoint to go on from: --save-freq writes them"
    )


def prepare_resume(arguments: list[str]) -> list[str]:
    """
    Let the next experiment manager go on with the experiment that the command line names.

    :param arguments: The command line without ``--resume``
    :return: The command line that the experiment was started with, and this one after it
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
    args, _ = parser.parse_known_args(arguments)
    experiment = find_experiment_to_resume(args.log_folder, args.algo, args.env)
    MultiTaskExperimentMixin.resume_folder = str(experiment)
    return [*json.loads((experiment / EnvironmentName(args.env) / ARGUMENTS_FILE).read_text()), *arguments]


def main() -> None:
    """
    Train an agent with RL Zoo; the command-line arguments are those of ``rl_zoo3.train``, and ``--resume``.
    """
    register()
    from rl_zoo3.train import train

    if "--resume" in sys.argv:
        sys.argv[1:] = prepare_resume([argument for argument in sys.argv[1:] if argument != "--resume"])
    train()


if __name__ == "__main__":
    main()
