"""
Pytest plugin: ``stable_baselines3.SAC`` is one of our classes while SB3's test modules are imported.

The environment variable ``SB3_ALGO`` names the class as ``module:Class``. Only the tests that concern SAC are kept:
those of the other algorithms would run SB3's classes, not ours.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
import stable_baselines3

from tests.sb3_suite.deselected import DESELECTED, Deselected

OTHER_ALGORITHMS = frozenset({"a2c", "ddpg", "dqn", "ppo", "td3"})


class Selection:
    """
    What became of the collected tests.

    :param algo: name of the class that stands in for SAC
    """

    def __init__(self, algo: str) -> None:
        self.algo = algo
        self.entries = [entry for entry in DESELECTED if entry.algo == algo]
        self.stale: list[Deselected] = list(self.entries)
        self.n_selected = 0
        self.n_left_out = 0


SELECTION = pytest.StashKey[Selection]()


def _load_class(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


ALGO = _load_class(os.environ["SB3_ALGO"])
# Plugins are imported before the test modules, whose `from stable_baselines3 import SAC` therefore finds our class.
stable_baselines3.SAC = ALGO  # type: ignore[misc, assignment]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _holds(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds(item) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds(item) for item in value)
    return value is ALGO


def _reaches(function: Callable[..., Any], seen: set[str]) -> bool:
    """Whether a test, or a function of its module that it names, mentions our class."""
    if not isinstance(function, FunctionType):
        return False
    for name in set(_names(function.__code__)) - seen:
        seen.add(name)
        value = function.__globals__.get(name)
        if _holds(value):
            return True
        if getattr(value, "__module__", None) == function.__module__ and _reaches(value, seen):
            return True
    return False


def concerns_sac(item: pytest.Function) -> bool:
    """
    :param item: a collected test
    :return: whether the test runs SAC: because it is a parameter, or because the code mentions it
    """
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    if any(_holds(value) for value in values):
        return True
    if any(str(getattr(value, "__name__", value)).lower() in OTHER_ALGORITHMS for value in values):
        return False
    return _reaches(item.function, set())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what concerns SAC, less what the list leaves out; before pytest's own ``-k``, which may narrow it further."""
    selection = config.stash[SELECTION] = Selection(ALGO.__name__)
    kept, dropped = [], []
    for item in items:
        if not isinstance(item, pytest.Function) or item.path.parent.name == "sb3_suite":
            kept.append(item)
            continue
        if not concerns_sac(item):
            dropped.append(item)
            continue
        matching = [entry for entry in selection.entries if entry.matches(item.nodeid)]
        selection.stale = [entry for entry in selection.stale if entry not in matching]
        if matching:
            selection.n_left_out += 1
            dropped.append(item)
        else:
            selection.n_selected += 1
            kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which class is tested, and what is left out and why."""
    lines = [f"SB3's tests with {ALGO.__module__}.{ALGO.__qualname__} as SAC"]
    return lines + [f"left out: {entry.test}: {entry.reason}" for entry in DESELECTED if entry.algo == ALGO.__name__]
