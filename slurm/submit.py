"""Submit to Slurm: ``python slurm/submit.py train CONFIG key=value... --nodes=2``, or ``mtunet submit``."""

from mtunet_dist.cli import run

if __name__ == "__main__":
    run("submit")
