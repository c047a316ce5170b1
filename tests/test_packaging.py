"""The package's metadata, and what importing it pulls in."""

import ast
import re
import subprocess
import sys
from importlib.metadata import metadata, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sb3_mtrl

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sb3_mtrl"


def declared(extra: str = "") -> list[Requirement]:
    """The requirements of the installed distribution: those of one extra, or those of a plain install."""
    found = [Requirement(text) for text in requires("sb3-mtrl") or []]
    return [item for item in found if ("extra ==" in str(item.marker)) == bool(extra) and _applies(item, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_version_is_the_one_of_version_txt() -> None:
    written = (PACKAGE / "version.txt").read_text().strip()

    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", written)
    assert sb3_mtrl.__version__ == written
    assert version("sb3-mtrl") == written


def test_changelog_has_an_entry_for_this_version() -> None:
    headings = re.findall(r"^## Release (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)

    assert headings[0] == sb3_mtrl.__version__


def test_supported_pythons() -> None:
    # metaworld 3.1 itself requires Python < 3.14.
    specifier = metadata("sb3-mtrl")["Requires-Python"]
    classifiers = metadata("sb3-mtrl").get_all("Classifier")

    assert set(specifier.split(",")) == {">=3.10", "<3.14"}
    named = {item.rpartition(" ")[2] for item in classifiers if item.startswith("Programming Language :: Python :: 3.")}
    assert named == {"3.10", "3.11", "3.12", "3.13"}


@pytest.mark.parametrize("extra", ["", "onnx", "plots", "video", "dev"])
def test_dependencies_have_both_bounds(extra: str) -> None:
    found = declared(extra)

    assert found
    for requirement in found:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"


@pytest.mark.parametrize("extra", ["", "onnx", "plots", "video", "dev"])
def test_constraints_pin_each_direct_dependency_within_its_range(extra: str) -> None:
    pins = {canonicalize_name(pin.name): pin for pin in constraints() if _applies(pin, "")}

    for requirement in declared(extra):
        (specifier,) = pins[canonicalize_name(requirement.name)].specifier
        assert specifier.operator == "=="
        assert specifier.version in requirement.specifier, f"tested with {specifier.version}, which {requirement} excludes"


def test_constraints_are_exact_public_versions() -> None:
    # A local version such as 2.13.0+cpu exists in some indexes only.
    for pin in constraints():
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "+" not in specifier.version, pin
        assert "*" not in specifier.version, pin


def test_constraints_name_each_package_once_per_python() -> None:
    for python in ("3.10", "3.11", "3.12", "3.13"):
        names = [pin.name for pin in constraints() if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names))


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level names that a module imports, less those that it can do without (`try: import x; except ImportError`)."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif not (isinstance(node, ast.Try) and any("ImportError" in ast.dump(handler) for handler in node.handlers)):
            found |= imported_packages(node)
    return found


def test_every_imported_package_is_declared() -> None:
    """What the package imports must be its own dependency, not only somebody else's."""
    imported = set().union(*(imported_packages(ast.parse(file.read_text())) for file in PACKAGE.rglob("*.py")))
    imported -= {*sys.stdlib_module_names, "sb3_mtrl", "_sb3_mtrl_zoo_hook"}
    names = {canonicalize_name(item.name) for item in [*declared(), *declared("onnx"), *declared("plots"), *declared("video")]}
    owners = packages_distributions()

    assert {"torch", "stable_baselines3", "metaworld"} <= imported
    undeclared = {module for module in imported if not names & {canonicalize_name(owner) for owner in owners.get(module, ())}}
    assert undeclared == set()


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_environments_import_no_torch_of_their_own() -> None:
    """The environments run in worker processes and in other frameworks; stand-ins for their parents keep torch out of view."""
    code = f"""
import sys, types
package = types.ModuleType("sb3_mtrl")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["sb3_mtrl"] = package
import sb3_mtrl.envs
print("torch" in sys.modules, "stable_baselines3" in sys.modules)
"""
    assert run_python(code).split() == ["False", "False"]


def test_start_of_python_imports_nothing_heavy() -> None:
    """The start-up hook runs in every Python process of the environment: it may not bring in the package."""
    heavy = {"sb3_mtrl", "torch", "numpy", "gymnasium", "stable_baselines3", "rl_zoo3", "metaworld"}

    assert heavy.isdisjoint(run_python("import sys; print(*sys.modules)").split())


def test_import_leaves_the_zoo_alone() -> None:
    assert run_python("import sys, sb3_mtrl; print('rl_zoo3' in sys.modules)").strip() == "False"


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
