"""``python -m sb3_mtrl.enjoy``: ``python -m rl_zoo3.enjoy`` where the start-up hook is off or not installed."""

from sb3_mtrl.zoo import register


def main() -> None:
    """
    Watch or measure a trained agent with RL Zoo; the command-line arguments are those of ``rl_zoo3.enjoy``.
    """
    register()
    from rl_zoo3.enjoy import enjoy

    enjoy()


if __name__ == "__main__":
    main()
