"""Flower's client program, which ends when `fedpeat deploy client` does: its worker ends then, too."""

from simulations.deployment.tether import end_with_parent


def main() -> None:
    """Run `flower-supernode`, on standard input's leash; it reads its own arguments."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    end_with_parent()
    flower_supernode()


if __name__ == "__main__":
    main()
