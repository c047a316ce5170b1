"""``python -m sb3_mtrl.train``: ``python -m rl_zoo3.train`` where the start-up hook is off or not installed."""

from sb3_mtrl.zoo import register


def main() -> None:
    """
    Train an agent with RL Zoo; the command-line arguments are those of ``rl_zoo3.train``.
    """
    register()
    from rl_zoo3.train import train

    train()


if __name__ == "__main__":
    main()
