from pathlib import Path

import sb3_mtrl

# As hyperparameter files and saved configurations write it
TASK_ASSIGNMENT = "sb3_mtrl.common.vec_env.VecTaskAssignment"
# In the folder of an experiment: what it goes on from, and (beside the saved configuration) the command line to do it with
CHECKPOINT_FOLDER = "checkpoints"
ARGUMENTS_FILE = "arguments.json"


def hyperparams_path(algo: str) -> Path:
    """
    File with the default hyperparameters of an algorithm.

    :param algo: Name of the algorithm in RL Zoo
    :return: The YAML file in the installed package, or in the root of a source checkout (editable installation)
    :raises FileNotFoundError: if there is none
    """
    package = Path(sb3_mtrl.__file__).parent
    candidates = [folder / "hyperparams" / f"{algo}.yml" for folder in (package, package.parent)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no hyperparameters for {algo}: looked for {' and '.join(map(str, candidates))}")
