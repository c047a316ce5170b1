"""``python -m tests.zoo_suite --algo pacosac [arguments for pytest]``"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sb3_suite.fetch import fetch_tests

# The zoo's tests that run SAC. They are named one by one, so that pytest refuses the run if one of them has gone. Left out:
# - test_optimize with other samplers and pruners: the zoo's own run skips them for SAC, too ("Skipping slow tests");
# - test_parallel_train: the callback that it tests loads a copy of the model as stable_baselines3.SAC, whatever its class is,
#   and stock SAC cannot hold the parameters of ours;
# - test_benchmark and test_record_video: they need the zoo's trained agents, the latter a display, too.
TESTS = (
    "test_train.py::test_train[{algo}-Pendulum-v1]",
    "test_train.py::test_save_load_replay_buffer",
    "test_hyperparams_opt.py::test_optimize[{algo}-Pendulum-v1-median-random]",
)


def rename_algorithm(source: str, algo: str) -> str:
    """
    Let a test module of the zoo run another algorithm than SAC.

    The tests start the zoo's scripts as processes, so no class can be rebound: the command lines have to change.

    :param source: text of the test module
    :param algo: name of the algorithm in the zoo
    :return: the text with ``sac`` replaced by ``algo`` and the repository's ``train.py`` by the installed module
    """
    source = source.replace("python train.py", f"{sys.executable} -m rl_zoo3.train")
    return source.replace("--algo sac ", f"--algo {algo} ").replace('"sac', f'"{algo}')


def main() -> int:
    """
    Run the zoo's tests in a pytest process of their own.

    :return: pytest's exit status
    """
    parser = argparse.ArgumentParser(prog="python -m tests.zoo_suite", description=__doc__)
    parser.add_argument("--algo", required=True, help="name of the algorithm in the zoo, such as mtsac")
    args, pytest_args = parser.parse_known_args()

    root = fetch_tests("rl_zoo3")
    tests = [test.format(algo=args.algo) for test in TESTS]
    with tempfile.TemporaryDirectory() as scratch:
        for name in {test.partition("::")[0] for test in tests}:
            source = (root / "tests" / name).read_text()
            Path(scratch, name).write_text(rename_algorithm(source, args.algo))
        command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "--rootdir", scratch]
        command += ["-p", "no:cacheprovider", *tests, *pytest_args]
        return subprocess.run(command, cwd=scratch).returncode


if __name__ == "__main__":
    raise SystemExit(main())
