"""The runs under a folder and their progress: ``python slurm/status.py [FOLDER]``, or ``mtunet status``."""

from mtunet_dist.cli import run

if __name__ == "__main__":
    run("status")
