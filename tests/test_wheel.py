"""The wheel: what is in it, and the literal RL Zoo commands in a fresh virtual environment that has nothing of ours but it."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STARTUP_FILES = {"_sb3_mtrl_zoo_hook.py", "sb3_mtrl_zoo.pth", "sb3_mtrl_zoo.start"}

pytestmark = pytest.mark.expensive


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SB3_MTRL_NO_ZOO_HOOK": ""}
    env.pop("PYTHONPATH", None)  # else our sources would be found without the wheel
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Interpreter of a fresh environment with the wheel. Dependencies are those of the environment that runs the tests: its
    packages are put on the path, but its ``.pth`` files are not read, so neither its start-up hook nor an editable
    installation is seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    algorithms = run(
        interpreter, "-c", "import stable_baselines3, rl_zoo3.utils as u; print(sorted(u.ALGOS))", cwd=folder
    ).stdout
    assert "'sac'" in algorithms and "mtsac" not in algorithms
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return interpreter


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for name in STARTUP_FILES:
            assert archive.read(name) == (ROOT / "startup" / name).read_bytes()
    # Nothing at the top of site-packages but the package and the start-up files
    assert {name.split("/")[0] for name in names} == {"sb3_mtrl"} | STARTUP_FILES
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_mtrl").rglob("*.py")}
    expected |= {"sb3_mtrl/py.typed", "sb3_mtrl/version.txt"}
    expected |= {f"sb3_mtrl/hyperparams/{path.name}" for path in (ROOT / "hyperparams").glob("*.yml")}
    assert names - STARTUP_FILES == expected
    assert {"sb3_mtrl/hyperparams/mtsac.yml", "sb3_mtrl/hyperparams/pacosac.yml"} <= expected


def test_literal_commands_and_uninstallation(python: Path, tmp_path: Path) -> None:
    arguments = ("--algo", "pacosac", "--env", "MetaWorld-MT3-short-v3")
    trained = run(
        python, "-m", "rl_zoo3.train", *arguments, "-n", "60", "--eval-freq", "-1", "-params",
        "policy_kwargs:dict(net_arch=[8])", "batch_size:12", cwd=tmp_path,
    ).stdout  # fmt: skip
    (site_packages,) = python.parent.parent.glob("lib/python*/site-packages")
    assert f"Loading hyperparameters from: {site_packages / 'sb3_mtrl' / 'hyperparams' / 'pacosac.yml'}" in trained
    enjoyed = run(python, "-m", "rl_zoo3.enjoy", *arguments, "--no-render", "-n", "300", cwd=tmp_path).stdout
    assert "push-v3" in enjoyed and "mean of tasks" in enjoyed

    # Uninstalling leaves nothing behind, and RL Zoo as it was
    assert {path.name for path in site_packages.iterdir()} >= STARTUP_FILES
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "--yes", "sb3-mtrl", cwd=tmp_path)
    assert [path.name for path in site_packages.iterdir() if "mtrl" in path.name] == []
    refused = run(python, "-m", "rl_zoo3.train", "--algo", "pacosac", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "invalid choice: 'pacosac'" in refused.stderr
    assert "Error processing line" not in refused.stderr  # what Python prints of a .pth whose module is gone
