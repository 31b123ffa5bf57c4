"""Install the import root `cac_fast`: cac_fast/ itself, kernels/ and train/ as its subpackages.

The compiled back ends (csrc/: modules `cac_fast._C` and, with a CUDA compiler, `cac_fast._C_cuda`)
are built where torch and the compilers are there; where they are not, the install succeeds all the
same and `cac_fast.backends()` says why. CAC_FAST_CUDA=0 leaves the CUDA part out, with 1 it is an
error if that cannot be built; TORCH_CUDA_ARCH_LIST says what it is built for. The metadata is in
pyproject.toml.
"""

import os
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))  # where pip builds, nothing else adds it

from find_nvcc import archs, find_nvcc
from say_why import SayWhy

ROOT = Path(__file__).parent
FOLDERS = {"cac_fast": "cac_fast", "cac_fast.kernels": "kernels", "cac_fast.train": "train"}

# No debugging information, which takes a good part of the build's time. OpenMP is what
# at::parallel_for runs on in a Linux build of PyTorch.
FLAGS = ["-O3", "-g0", "-fopenmp"] if sys.platform == "linux" else ["-O3", "-g0"]

# PyTorch adds a standard of its own choice, C++17 until 2.11 and C++20 after it, only where none is
# passed. Its newer headers need this one.
STANDARD = "-std=c++20"

CPU_MODULE, CUDA_MODULE = "cac_fast._C", "cac_fast._C_cuda"

try:
    import torch
except Exception as error:  # a torch that cannot be imported is as good as none
    torch, NO_TORCH = (
        None,
        (
            f"torch could not be imported when cac_fast was installed ({error}); "
            "install with pip install --no-build-isolation"
        ),
    )
else:
    NO_TORCH = None


def why_no_cuda() -> str | None:
    """Why there is no use in trying to build the CUDA back end, or None."""
    if NO_TORCH:
        return NO_TORCH
    if os.environ.get("CAC_FAST_CUDA") == "0":
        return "CAC_FAST_CUDA=0 when cac_fast was installed"
    if isinstance(NVCC, str):
        return NVCC
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if NVCC.major != torch.version.cuda.split(".")[0]:
        return f"the CUDA compiler is {NVCC.version}, PyTorch is built with {torch.version.cuda}"
    return None


NVCC = find_nvcc(torch and torch.version.cuda)
NO_CUDA = why_no_cuda()
ARCHS = archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
if not NO_CUDA:
    # PyTorch looks for it when its tools are imported, and takes a wrapper's folder for the root.
    os.environ["CUDA_HOME"] = str(NVCC.root)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHS

if torch:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
else:
    BuildExtension, CppExtension, CUDAExtension = build_ext, Extension, Extension


class BuildOrSayWhy(SayWhy, BuildExtension):
    reasons: ClassVar = {CPU_MODULE: NO_TORCH, CUDA_MODULE: NO_CUDA}
    home = ROOT / FOLDERS["cac_fast"]
    must = (CUDA_MODULE,) if os.environ.get("CAC_FAST_CUDA") == "1" else ()


def list_packages() -> list[str]:
    return [
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(ROOT / folder)))
    ]


def list_sources(*patterns: str) -> list[str]:
    # Relative paths, as setuptools asks for.
    paths = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def describe_extensions() -> list[Extension]:
    cpu = CppExtension(
        CPU_MODULE,
        list_sources("*.cpp"),
        define_macros=[("CAC_FAST_FLAGS", ",".join(FLAGS))],
        extra_compile_args=[*FLAGS, STANDARD],
        extra_link_args=[flag for flag in FLAGS if flag == "-fopenmp"],
        depends=list_sources("*.h", "*.py"),
        optional=True,
    )
    # A module of its own, so that the CPU's does not depend on it. Where it cannot be built it is
    # there to say so.
    describe = Extension if NO_CUDA else CUDAExtension
    facts = {
        "CAC_FAST_CUDA_ARCHS": ARCHS,
        "CAC_FAST_NVCC": "" if NO_CUDA else NVCC.version,
    }
    gpu = describe(
        CUDA_MODULE,
        list_sources("cuda/*.cpp", "cuda/**/*.cu"),
        extra_compile_args={
            "cxx": [
                STANDARD,
                "-O2",
                "-g0",
                *(f"-D{name}={value}" for name, value in facts.items()),
            ],
            "nvcc": [STANDARD, "-O3"],
        },
        depends=list_sources("cuda/**/*.h", "cuda/**/*.cuh"),
        optional=True,
    )
    # The toolkit's pip packages have no file of that name to link to; PyTorch brings the library.
    gpu.libraries = [name for name in gpu.libraries if name != "cudart"]
    return [cpu, gpu]


setup(
    package_dir=FOLDERS,
    packages=list_packages(),
    package_data={"cac_fast.train.reporting": ["page.css", "page.js"]},
    ext_modules=describe_extensions(),
    cmdclass={"build_ext": BuildOrSayWhy},
)
