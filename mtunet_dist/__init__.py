"""Fast distributed training of dense multi-task networks (semantic segmentation and depth from one image)."""

__version__ = "0.1.0"
