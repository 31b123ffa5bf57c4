"""Install the import root `cac_fast`: cac_fast/ itself, kernels/ and train/ as its subpackages.

The compiled back ends (csrc/: modules `cac_fast._C` and, with a CUDA compiler, `cac_fast._C_cuda`)
are built where torch and the compilers are there; where they are not, the install succeeds all the
same and `cac_fast.backends()` says why. CAC_FAST_CUDA=0 leaves the CUDA part out, with 1 it is an
error if that cannot be built; TORCH_CUDA_ARCH_LIST says what it is built for.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FOLDERS = {"cac_fast": "cac_fast", "cac_fast.kernels": "kernels", "cac_fast.train": "train"}

TRAIN = ["torchvision>=0.26", "pillow>=10.1", "tensorboard", "tqdm", "nvidia-ml-py"]
FAST = ["imagecodecs"]  # PNGs in half of Pillow's time, where there is a wheel of it
TIMM = ["timm>=1.0.31"]  # more encoders: --backbone timm/NAME
DEV = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "ninja", "pybind11"]
DEV += ["matplotlib", *TIMM]

# No debugging information, which takes a good part of the build's time. OpenMP is what
# at::parallel_for runs on in a Linux build of PyTorch.
FLAGS = ["-O3", "-g0", "-fopenmp"] if sys.platform == "linux" else ["-O3", "-g0"]

# PyTorch adds a standard of its own choice, C++17 until 2.11 and C++20 after it, only where none is
# passed. Its newer headers need this one.
STANDARD = "-std=c++20"

# Code for A100 and H100 (8.0 runs on all of 8.x too), and PTX for what comes after.
CUDA_ARCHS = "8.0+PTX;9.0a"
CUDA_MODULE = "cac_fast._C_cuda"


class Nvcc(NamedTuple):
    """root: the toolkit's folder, with bin, include and nvvm. version: as in 13.0.88."""

    root: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


def find_nvcc(wanted: str | None) -> Nvcc | str:
    """A CUDA compiler that works, if there is one of the version `wanted`; else why there is none.

    Looked for in CUDA_HOME and CUDA_PATH; where neither is set on the PATH, in the system's place
    and in pip packages. wanted: as torch.version.cuda; the first of its major version is preferred.
    """
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if not folders:
        on_path = shutil.which("nvcc")
        folders = [Path(on_path).parent.parent] if on_path else []
        folders += [Path("/usr/local/cuda")]
        folders += [
            nvcc.parent.parent
            for base in map(Path, sys.path)
            for pattern in ("nvidia/cu*/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc")
            for nvcc in sorted(base.glob(pattern), reverse=True)
        ]
    answers = list(map(ask_nvcc, folders))
    found = [answer for answer in answers if isinstance(answer, Nvcc)]
    fitting = [nvcc for nvcc in found if wanted and nvcc.major == wanted.split(".")[0]]
    reasons = [answer for answer in answers if isinstance(answer, str)]
    return [*fitting, *found, *reasons, "no CUDA compiler was found when cac_fast was installed"][0]


def ask_nvcc(folder: Path) -> Nvcc | str | None:
    """The compiler in a folder; why it is of no use; None where there is none."""
    nvcc = str(folder / "bin" / "nvcc")
    try:
        # A wrapper script may stand where no toolkit is; the compiler itself says where it lives.
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        version = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    number = re.search(r"\bV(\d+\.\d+\.\d+)", version)
    if not top or not number:
        return None
    root = Path(top[1].strip()).resolve()
    if not (root / "include" / "cuda_runtime.h").is_file():
        return f"the CUDA compiler {nvcc} has no include/cuda_runtime.h in {root}"
    return Nvcc(root, number[1])


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


def archs(asked: str) -> str:
    """Of a TORCH_CUDA_ARCH_LIST what the kernels can be built for: images of PyTorch set lists that
    go back further.

    9.0 becomes 9.0a, which runs on the same GPUs and has the instructions that the kernels for
    sm_90a need; but its PTX runs on no later GPU, so that 9.0+PTX becomes 9.0a and 8.0+PTX.
    """
    names = asked.replace(";", " ").replace("Hopper", "9.0+PTX").split()
    old = [name for name in names if re.match(r"[1-7]\.", name)]
    if old:
        print(f"cac_fast: its CUDA kernels need sm_80, so not built for {', '.join(old)}")
    kept = []
    for name in names:
        if re.fullmatch(r"9\.0a?(\+PTX)?", name):
            kept += ["8.0+PTX", "9.0a"] if name == "9.0+PTX" else ["9.0a"]
        elif name not in old:
            kept.append(name)
    if "8.0+PTX" in kept:
        kept = [name for name in kept if name != "8.0"]
    return ";".join(dict.fromkeys(kept)) or CUDA_ARCHS


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


class BuildOrSayWhy(BuildExtension):
    """A build that fails leaves its reason where the extension would have been."""

    def run(self) -> None:
        library = Path(self.build_lib) / "cac_fast"
        self.folder = ROOT / FOLDERS["cac_fast"] if self.inplace else library
        for old in (*library.glob("_C*.*"), *self.folder.glob("_C*.*")):
            old.unlink(missing_ok=True)
        before = self.inplace, self.compiler
        for extension in list(self.extensions):
            if reason := NO_CUDA if extension.name == CUDA_MODULE else NO_TORCH:
                self.extensions.remove(extension)
                self.say_why(extension, RuntimeError(reason))
        # PyTorch asks about the CUDA compiler's host before it builds anything: that must not cost
        # the CPU's part, so what is left is tried again without the CUDA part, which comes last.
        while self.extensions:
            try:
                return super().run()
            except Exception as error:
                self.inplace, self.compiler = before
                self.say_why(self.extensions.pop(), error)

    def build_extension(self, extension: Extension) -> None:
        output: list[str] = []
        try:
            with recorded(output):
                super().build_extension(extension)
        except Exception as error:
            self.say_why(extension, RuntimeError("\n".join((str(error), *what_failed(output)))))

    def say_why(self, extension: Extension, error: Exception) -> None:
        if extension.name == CUDA_MODULE and os.environ.get("CAC_FAST_CUDA") == "1":
            sys.exit(f"{extension.name} cannot be built: {error}")
        self.folder.mkdir(parents=True, exist_ok=True)
        reason = str(error).strip() or type(error).__name__
        name = extension.name.rpartition(".")[2]
        (self.folder / f"{name}.txt").write_text(reason + "\n", encoding="utf-8")
        print(f"{extension.name} is not built: {reason}", file=sys.stderr)


@contextmanager
def recorded(lines: list[str]) -> Iterator[None]:
    """Adds what is written meanwhile, compilers' messages included, to `lines`; then prints it."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = {stream: os.dup(stream) for stream in (1, 2)}
        for stream in kept:
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            for stream, copy in kept.items():
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)


def what_failed(output: list[str]) -> list[str]:
    """The lines of a compiler's output that say why it failed; the last ones, if none does."""
    telling = re.compile(r"(error|fatal)\s*:|cannot find|undefined reference", re.IGNORECASE)
    errors = [line for line in output if telling.search(line)]
    return [line[:300] for line in errors[:20] or output[-20:]]


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


def list_sources(*patterns: str) -> list[str]:
    # Relative paths, as setuptools asks for.
    paths = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def describe_extensions() -> list[Extension]:
    cpu = CppExtension(
        "cac_fast._C",
        list_sources("*.cpp"),
        define_macros=[("CAC_FAST_FLAGS", ",".join(FLAGS))],
        extra_compile_args=[*FLAGS, STANDARD],
        extra_link_args=[flag for flag in FLAGS if flag == "-fopenmp"],
        depends=list_sources("*.h"),
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
    name="cac_fast",
    version=read_version(),
    description="Directional contrastive loss for semi-supervised semantic segmentation",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=list_packages(),
    ext_modules=describe_extensions(),
    cmdclass={"build_ext": BuildOrSayWhy},
    install_requires=["torch>=2.11", "numpy"],
    extras_require={"train": TRAIN, "fast": FAST, "timm": TIMM, "dev": TRAIN + DEV},
)
