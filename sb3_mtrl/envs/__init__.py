from typing import Any

import gymnasium as gym

from sb3_mtrl.envs.metaworld import QUICKSTART_TASKS, SUITES, MetaWorldMultiTaskEnv, list_tasks

# suffix of the id -> what it changes. An id says everything about its environment: RL Zoo does not
# hand the ``env_kwargs`` of a YAML file to the evaluation environment.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "-fixed": {"goals": "fixed"},
    "-short": {"horizon": 150},
    "-short-fixed": {"horizon": 150, "goals": "fixed"},
}


def register_envs() -> None:
    """
    Make ``gym.make`` know the Meta-World ids, e.g. ``MetaWorld-MT10-v3``; a second call changes nothing.

    No time limit is registered: the environments truncate themselves at their ``horizon``.
    """
    module = "sb3_mtrl.envs.metaworld"
    entries: list[tuple[str, str, dict[str, Any]]] = [
        *((suite, f"{module}:MetaWorldMultiTaskEnv", {"tasks": suite}) for suite in SUITES),
        ("MT1", f"{module}:make_mt1", {}),
        ("Custom", f"{module}:make_custom", {}),
    ]
    for name, entry_point, kwargs in entries:
        for suffix, variant in VARIANTS.items():
            env_id = f"MetaWorld-{name}{suffix}-v3"
            _register(env_id, entry_point, {**kwargs, **variant})
    _register("MetaWorld-Quickstart-v3", f"{module}:MetaWorldMultiTaskEnv", {"tasks": QUICKSTART_TASKS, "horizon": 150})


def _register(env_id: str, entry_point: str, kwargs: dict[str, Any]) -> None:
    if env_id not in gym.registry:
        gym.register(id=env_id, entry_point=entry_point, kwargs=kwargs)


register_envs()

__all__ = ["SUITES", "MetaWorldMultiTaskEnv", "list_tasks", "register_envs"]
