"""Install the import root `cac_fast`: cac_fast/ itself, kernels/ and train/ as its subpackages.

The compiled back ends (csrc/, module `cac_fast._C`) are built where torch and a C++ compiler are
there; where they are not, the install succeeds all the same and `cac_fast.backends()` says why.
"""

import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # a torch that cannot be imported is as good as none
    BuildExtension, CppExtension = build_ext, Extension
    NO_TORCH = (
        f"torch could not be imported when cac_fast was installed ({error}); "
        "install with pip install --no-build-isolation"
    )
else:
    NO_TORCH = None

ROOT = Path(__file__).parent
FOLDERS = {"cac_fast": "cac_fast", "cac_fast.kernels": "kernels", "cac_fast.train": "train"}

TRAIN = ["torchvision>=0.26", "pillow>=10.1", "tensorboard", "tqdm", "nvidia-ml-py"]
DEV = ["pytest", "pytest-timeout", "hypothesis", "ruff", "ninja", "pybind11", "matplotlib"]

# No debugging information, which takes a good part of the build's time. OpenMP is what
# at::parallel_for runs on in a Linux build of PyTorch.
FLAGS = ["-O3", "-g0", "-fopenmp"] if sys.platform == "linux" else ["-O3", "-g0"]


class BuildOrSayWhy(BuildExtension):
    """A build that fails leaves its reason where the extension would have been."""

    def run(self) -> None:
        inplace = self.inplace
        library = Path(self.build_lib) / "cac_fast"
        folder = ROOT / FOLDERS["cac_fast"] if inplace else library
        for old in (*library.glob("_C.*"), *folder.glob("_C.*")):
            old.unlink(missing_ok=True)
        try:
            if NO_TORCH:
                raise RuntimeError(NO_TORCH)
            super().run()
            # setuptools only warns of an optional extension that cannot be compiled.
            if not any(folder.glob("_C.*")):
                raise RuntimeError("it could not be compiled; pip install -v shows why")
        except Exception as error:
            self.inplace = inplace
            folder.mkdir(parents=True, exist_ok=True)
            reason = str(error).strip() or type(error).__name__
            (folder / "_C.txt").write_text(reason + "\n", encoding="utf-8")
            print(f"cac_fast._C is not built: {reason}", file=sys.stderr)


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


def describe_extension() -> Extension:
    # Relative paths, as setuptools asks for.
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    return CppExtension(
        "cac_fast._C",
        sources,
        define_macros=[("CAC_FAST_FLAGS", ",".join(FLAGS))],
        extra_compile_args=FLAGS,
        extra_link_args=[flag for flag in FLAGS if flag == "-fopenmp"],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")],
        optional=True,
    )


setup(
    name="cac_fast",
    version=read_version(),
    description="Directional contrastive loss for semi-supervised semantic segmentation",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=list_packages(),
    ext_modules=[describe_extension()],
    cmdclass={"build_ext": BuildOrSayWhy},
    install_requires=["torch>=2.11", "numpy"],
    extras_require={"train": TRAIN, "dev": TRAIN + DEV},
)
