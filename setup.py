"""Install the import root `cac_fast`: cac_fast/ itself, kernels/ and train/ as its subpackages."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"cac_fast": "cac_fast", "cac_fast.kernels": "kernels", "cac_fast.train": "train"}

TRAIN = ["torchvision>=0.26", "pillow>=10.1", "tensorboard", "tqdm", "nvidia-ml-py"]
DEV = ["pytest", "pytest-timeout", "hypothesis", "ruff", "ninja", "pybind11", "matplotlib"]


def read_version() -> str:
    # Read as text: importing the package would need torch, which is not there yet.
    text = (ROOT / "cac_fast" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def list_packages() -> list[str]:
    return [
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(ROOT / folder)))
    ]


setup(
    name="cac_fast",
    version=read_version(),
    description="Directional contrastive loss for semi-supervised semantic segmentation",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=list_packages(),
    install_requires=["torch>=2.11", "numpy"],
    extras_require={"train": TRAIN, "dev": TRAIN + DEV},
)
