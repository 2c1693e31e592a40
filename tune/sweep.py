"""Search for good settings: ``python tune/sweep.py SWEEP.yaml key=value...``, or ``mtunet sweep``."""

from mtunet_dist.cli import run

if __name__ == "__main__":
    run("sweep")
