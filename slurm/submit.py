"""Submit to Slurm: ``python slurm/submit.py train CONFIG key=value... --nodes=2``, or ``mtunet submit``."""

from mtunet_dist.submit import main

if __name__ == "__main__":
    main()
