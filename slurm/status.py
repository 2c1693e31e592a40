"""The runs under a folder and their progress: ``python slurm/status.py [FOLDER]``, or ``mtunet status``."""

from mtunet_dist.status import main

if __name__ == "__main__":
    main()
