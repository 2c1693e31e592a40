"""Fast distributed training of dense multi-task networks (semantic segmentation and depth from one image)."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # Python is looking for the module that it will run
    from mtunet_dist.system import startup

    if startup.is_module_of(__name__, sys.orig_argv):
        startup.begin()
