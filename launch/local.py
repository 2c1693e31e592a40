"""Train on this machine, one process per GPU: ``python launch/local.py CONFIG key=value...``, or ``mtunet launch``."""

from mtunet_dist.launch import main

if __name__ == "__main__":
    main()
