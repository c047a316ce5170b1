"""
Start-up hook of sb3_mtrl: makes its algorithms known to RL Zoo when, and only when, RL Zoo is imported.

RL Zoo builds the choices of ``--algo`` before it imports anything a user could name, so a plugin has to speak earlier.
``sb3_mtrl_zoo.pth`` (and, from Python 3.15 on, ``sb3_mtrl_zoo.start``) calls ``install()`` when Python starts. All that does
is to add one finder to ``sys.meta_path``: three modules of ``rl_zoo3`` are handed to ``sb3_mtrl.zoo.patch`` right after they
were executed; every other import passes by untouched. Nothing of sb3_mtrl, torch or RL Zoo is imported at start-up.

``SB3_MTRL_NO_ZOO_HOOK=1`` in the environment switches the hook off; ``python -m sb3_mtrl.train`` works without it.
"""

import os
import sys

PATCHED_MODULES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})
OFF_SWITCH = "SB3_MTRL_NO_ZOO_HOOK"


class ZooFinder:
    """Meta-path finder that lets the other finders find a module of RL Zoo and has it patched once it was executed."""

    def __init__(self):
        self._busy = set()

    def find_spec(self, fullname, path=None, target=None):
        # A second finder of this kind asks this one in turn: answering while busy would never end
        if fullname not in PATCHED_MODULES or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = self._find_elsewhere(fullname, path, target)
        finally:
            self._busy.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _patch_after_execution(spec.loader, fullname)
        return spec

    def _find_elsewhere(self, fullname, path, target):
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


def _patch_after_execution(loader, fullname):
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        # A loader may serve several modules (that of a zip archive does)
        if module.__name__ == fullname:
            _patch(module)

    loader.exec_module = exec_module


def _patch(module):
    try:
        from sb3_mtrl.zoo import patch

        patch(module)
    except Exception as error:  # whatever is wrong with this plugin, RL Zoo itself must go on working
        import warnings

        warnings.warn(
            f"sb3_mtrl could not register itself with {module.__name__} ({type(error).__name__}: {error}); "
            f"RL Zoo goes on without its algorithms. {OFF_SWITCH}=1 silences this.",
            RuntimeWarning,
            stacklevel=2,
        )


def install():
    """Put the finder first on ``sys.meta_path``, once; do nothing where the off-switch is set."""
    if os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
        return
    if not any(isinstance(finder, ZooFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())
