"""
Multi-task algorithms in RL Zoo: ``python -m rl_zoo3.train --algo pacosac --env MetaWorld-MT10-v3``.

RL Zoo has no plugin interface, so three of its modules are amended once they are loaded: by the start-up hook (installed with
the package, see ``_sb3_mtrl_zoo_hook``), or by ``register()`` for those who cannot or do not want to use the hook
(``python -m sb3_mtrl.train`` and ``python -m sb3_mtrl.enjoy`` call it).

* ``rl_zoo3.utils``: ``ALGOS`` gains our classes; ``get_model_path`` also looks into ``logs`` where ``enjoy`` was given no
  folder; ``create_test_env`` adds a table of the tasks to multi-task environments.
* ``rl_zoo3.hyperparams_opt``: ``HYPERPARAMS_SAMPLER`` and ``HYPERPARAMS_CONVERTER`` gain our samplers and converters.
* ``rl_zoo3.exp_manager``: ``ExperimentManager`` becomes a subclass, see ``sb3_mtrl.zoo.exp_manager``.

All of it acts on the algorithms of this package only, but for the table of the tasks: ``rl_zoo3.enjoy`` prints it for any
agent on a multi-task environment.
"""

import importlib
from types import ModuleType

from sb3_mtrl.zoo.patches import PATCHES

__all__ = ["patch", "register"]


def patch(module: ModuleType) -> None:
    """
    Amend one loaded module of RL Zoo; a second call changes nothing.

    :param module: ``rl_zoo3.utils``, ``rl_zoo3.hyperparams_opt`` or ``rl_zoo3.exp_manager``
    :raises ValueError: for any other module
    """
    if module.__name__ not in PATCHES:
        raise ValueError(f"module must be one of {', '.join(PATCHES)}, got {module.__name__}")
    PATCHES[module.__name__](module)


def register() -> None:
    """
    Make our algorithms known to RL Zoo in this process, with or without the start-up hook.
    """
    for name in PATCHES:
        patch(importlib.import_module(name))
