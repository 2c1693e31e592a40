"""Train on many nodes: ``python launch/nodes.py --head HOST --nnodes N CONFIG key=value...``, or ``mtunet launch``."""

from mtunet_dist.cli import run

if __name__ == "__main__":
    run("launch")
