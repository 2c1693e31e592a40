"""Search for good settings: ``python tune/sweep.py SWEEP.yaml key=value...``, or ``mtunet sweep``."""

from mtunet_dist.sweep import main

if __name__ == "__main__":
    main()
