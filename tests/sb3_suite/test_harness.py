"""The harness itself: what it fetches, keeps and refuses."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.sb3_suite import fetch
from tests.sb3_suite.deselected import DESELECTED, Deselected
from tests.zoo_suite.__main__ import rename_algorithm

SUITE = Path(__file__).parent
REQUIREMENT = f"stable-baselines3-{version('stable-baselines3')}"


@pytest.mark.parametrize(
    ("nodeid", "matches"),
    [
        ("tests/test_run.py::test_sac[auto]", True),
        ("test_run.py::test_sac", True),
        ("tests/test_run.py::test_sac[a/b]", True),
        ("tests/test_run.py::test_sac_long[auto]", False),
        ("tests/test_rerun.py::test_sac[auto]", False),
    ],
)
def test_an_entry_without_parameters_names_all_of_them(nodeid: str, matches: bool) -> None:
    assert Deselected("MTSAC", "test_run.py::test_sac", "reason").matches(nodeid) is matches


def test_an_entry_with_parameters_names_only_these() -> None:
    entry = Deselected("MTSAC", "test_run.py::test_sac[a/b]", "reason")

    assert entry.matches("tests/test_run.py::test_sac[a/b]")
    assert not entry.matches("tests/test_run.py::test_sac[b]")


def fake_pip(monkeypatch: pytest.MonkeyPatch, source: Path, status: int = 0) -> list[list[str]]:
    """Let `pip download` deliver the archive of a folder; return the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "source.tar.gz", "w:gz") as tar:
            tar.add(source, arcname="source")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def make_source(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def test_fetch_keeps_the_tests_but_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's source beside the tests would be imported instead of the installed one.
    source = make_source(
        tmp_path / "source", "pyproject.toml", "setup.py", "pkg/__init__.py", "tests/test_a.py", "tests/b/c.txt"
    )
    commands = fake_pip(monkeypatch, source)

    folder = fetch.fetch_tests("stable-baselines3", tmp_path / "cache")

    assert folder == tmp_path / "cache" / REQUIREMENT
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == {"pyproject.toml", "tests/test_a.py", "tests/b/c.txt"}
    # The second time it comes from the cache.
    assert fetch.fetch_tests("stable-baselines3", tmp_path / "cache") == folder
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        (("pyproject.toml", "tests/test_a.py"), 1, "could not download"),
        (("pyproject.toml", "tests/data.txt"), 0, "holds no tests"),
        (("tests/test_a.py",), 0, "holds no tests"),
    ],
)
def test_fetch_refuses_what_is_not_a_test_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], status: int, message: str
) -> None:
    fake_pip(monkeypatch, make_source(tmp_path / "source", *files), status)

    with pytest.raises(RuntimeError, match=message):
        fetch.fetch_tests("stable-baselines3", tmp_path / "cache")
    # Nothing half done that a later run would take for the cached tests.
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_tests_that_run_sac_are_kept_and_too_few_of_them_fail(tmp_path: Path) -> None:
    (tmp_path / "test_upstream.py").write_text(
        """
import pytest
from stable_baselines3 import PPO, SAC

MODELS = {"ppo": PPO, "sac": SAC}

def helper():
    return SAC

@pytest.mark.parametrize("model_class", [SAC, PPO])
def test_parameter(model_class):
    assert model_class is PPO or model_class.__name__ == "MTSAC"

@pytest.mark.parametrize("name", ["sac", "ppo"])
def test_name(name):
    assert MODELS[name].__name__ == "MTSAC"

def test_helper():
    assert helper().__name__ == "MTSAC"

def test_other():
    PPO
"""
    )
    environment = os.environ | {"SB3_ALGO": "sb3_mtrl:MTSAC", "PYTHONPATH": str(fetch.REPOSITORY)}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.sb3_suite.rebind"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, "test_upstream.py", str(SUITE / "selection.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    passed = {line.partition(" ")[0].rpartition("::")[2] for line in result.stdout.splitlines() if " PASSED" in line}
    assert passed == {"test_parameter[MTSAC]", "test_name[sac]", "test_helper", "test_deselected_algorithms_exist"}
    assert "3 of SB3's tests concern SAC, expected at least 100" in result.stdout
    # None of the entries for MTSAC names a test of this file: each is reported as stale.
    stale = [entry for entry in DESELECTED if entry.algo == "MTSAC"]
    assert stale
    assert all(repr(entry.test) in result.stdout for entry in stale)
    assert result.returncode == 1


def test_the_zoos_commands_are_renamed() -> None:
    # Lines of the kind that the zoo's tests have.
    source = (
        'x["sac-Pendulum-v1"] = ("sac", 1)\ncmd = f"python train.py -n 1 --algo sac --env {e} "\npath = "sac/Pendulum-v1_1"\n'
    )

    renamed = rename_algorithm(source, "mtsac")

    assert renamed == (
        'x["mtsac-Pendulum-v1"] = ("mtsac", 1)\n'
        f'cmd = f"{sys.executable} -m rl_zoo3.train -n 1 --algo mtsac --env {{e}} "\n'
        'path = "mtsac/Pendulum-v1_1"\n'
    )
