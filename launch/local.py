"""Train on this machine, one process per GPU: ``python launch/local.py CONFIG key=value...``, or ``mtunet launch``."""

from mtunet_dist.cli import run

if __name__ == "__main__":
    run("launch")
