"""Fetch the tests that a source distribution carries, once per version."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "upstream"


def _extract_tests(archive: Path, target: Path) -> None:
    """Unpack only ``tests/`` and ``pyproject.toml``: the package beside them would shadow the installed one."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, inner = member.name.partition("/")
            source = tar.extractfile(member) if inner.startswith("tests/") or inner == "pyproject.toml" else None
            if source is None or ".." in Path(inner).parts:
                continue
            file = target / inner
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read())


def fetch_tests(distribution: str, cache: Path = CACHE) -> Path:
    """
    Return a folder with the ``tests/`` and the ``pyproject.toml`` of the installed version of a distribution.

    They are downloaded with pip the first time, and taken from the cache afterwards.

    :param distribution: name of an installed distribution
    :param cache: folder that holds one folder per distribution and version
    :return: the folder; its ``tests/`` holds at least one ``test_*.py``
    :raises RuntimeError: if the download fails or the source distribution holds no tests
    """
    requirement = f"{distribution}=={version(distribution)}"
    folder = cache / requirement.replace("==", "-")
    if folder.is_dir():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        # Only this one is wanted as source: with ":all:" pip would build its build tools from source, too.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", distribution]
        if subprocess.run([*command, "--dest", scratch, requirement]).returncode != 0:
            raise RuntimeError(f"pip could not download the source distribution of {requirement}")
        unpacked = Path(scratch) / "unpacked"
        for archive in Path(scratch).glob("*.tar.gz"):
            _extract_tests(archive, unpacked)
        if not list(unpacked.glob("tests/test_*.py")) or not (unpacked / "pyproject.toml").is_file():
            raise RuntimeError(f"the source distribution of {requirement} holds no tests/test_*.py with a pyproject.toml")
        # The cached folder appears whole or not at all, even if the download is interrupted.
        shutil.move(unpacked, folder)
    return folder
