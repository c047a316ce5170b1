"""Other libraries that ours is compared with, each in a virtual environment of its own."""

import site
import subprocess
import sys
import venv
from pathlib import Path

CACHE = Path(".cache")
# Name -> what is installed, and the program that measures it, which only imports it if it gets no arguments
PEERS = {
    "sbx": ("sbx-rl>=0.20", "benchmarks.speed.sbx_learner"),
    "envpool": ("envpool>=1.2", "benchmarks.speed.envpool_simulator"),
}


def peer_python(name: str) -> str:
    """
    Python with another library, made below ``.cache`` if it is not there yet: ``"sbx"``, Stable-Baselines3 in JAX (300 MB of
    JAX), or ``"envpool"``, simulators in C++ (0.8 GB).

    SB3, Gymnasium, PyTorch and NumPy are those of this environment, so that both sides run the same.

    :param name: Name of the library
    :return: Path of its interpreter
    :raises RuntimeError: if it cannot be made, with the reason
    """
    requirement, program = PEERS[name]
    folder = CACHE / f"{name}-venv"
    python = str((folder / "bin" / "python").absolute())
    if not (folder / ".installed").exists():
        try:
            venv.create(folder, with_pip=True, clear=True)
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
            for arguments in (["pip", "install", "--quiet", requirement], [program]):
                subprocess.run([python, "-m", *arguments], capture_output=True, text=True, timeout=600, check=True)
        except subprocess.SubprocessError as e:
            reason = str(getattr(e, "stderr", None) or e).strip().splitlines()[-1]
            raise RuntimeError(f"{requirement} cannot be installed: {reason}") from e
        (folder / ".installed").touch()
    return python


if __name__ == "__main__":
    for peer in sys.argv[1:] or PEERS:
        print(peer_python(peer))
