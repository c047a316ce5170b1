"""``python -m tests.sb3_suite --algo MTSAC [arguments for pytest]``"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sb3_suite.fetch import REPOSITORY, fetch_tests


def main() -> int:
    """
    Run SB3's tests in a pytest process of their own.

    :return: pytest's exit status
    """
    parser = argparse.ArgumentParser(prog="python -m tests.sb3_suite", description=__doc__)
    parser.add_argument("--algo", required=True, help="class of sb3_mtrl, or module:Class")
    args, pytest_args = parser.parse_known_args()

    root = fetch_tests("stable-baselines3")
    # A file that never names SAC says nothing about our classes (and may need packages that we do not).
    files = [file for file in sorted(root.glob("tests/test_*.py")) if re.search(r"\bSAC\b", file.read_text())]
    environment = os.environ | {
        "SB3_ALGO": args.algo if ":" in args.algo else f"sb3_mtrl:{args.algo}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    command += ["-p", "tests.sb3_suite.rebind", "-p", "no:cacheprovider"]
    command += [*map(str, files), str(Path(__file__).with_name("selection.py")), *pytest_args]
    # Some of the tests write into the working directory.
    with tempfile.TemporaryDirectory() as scratch:
        return subprocess.run(command, cwd=scratch, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
