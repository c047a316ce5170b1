"""Other libraries that the learner is compared with, each in a virtual environment of its own."""

import site
import subprocess
import venv
from pathlib import Path

CACHE = Path(".cache")
SBX = "sbx-rl>=0.20"


def sbx_python() -> str:
    """
    Python with SBX (Stable-Baselines3 in JAX), made below ``.cache`` if it is not there yet (300 MB of JAX).

    SB3, Gymnasium and PyTorch are those of this environment, so that both sides run the same.

    :return: Path of its interpreter
    :raises RuntimeError: if it cannot be made, with the reason
    """
    folder = CACHE / "sbx-venv"
    python = str((folder / "bin" / "python").absolute())
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
        install = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", SBX], capture_output=True, text=True, timeout=600, check=False
        )
        if install.returncode == 0:
            install = subprocess.run(
                [python, "-m", "benchmarks.speed.sbx_learner"], capture_output=True, text=True, timeout=300, check=False
            )
        if install.returncode != 0:
            last_line = (install.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{SBX} cannot be installed: {last_line}")
        (folder / ".installed").touch()
    return python


if __name__ == "__main__":
    print(sbx_python())
