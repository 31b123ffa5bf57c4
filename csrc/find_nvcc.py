"""The CUDA compiler that setup.py builds with, and what it builds for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Code for A100 and H100 (8.0 runs on all of 8.x too), and PTX for what comes after.
CUDA_ARCHS = "8.0+PTX;9.0a"


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
        dry_run, version = (
            subprocess.run([nvcc, *options], capture_output=True, text=True, check=True)
            for options in (("--dryrun", "-x", "cu", os.devnull), ("--version",))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    number = re.search(r"\bV(\d+\.\d+\.\d+)", version.stdout)
    if not top or not number:
        return None
    root = Path(top[1].strip()).resolve()
    if not (root / "include" / "cuda_runtime.h").is_file():
        return f"the CUDA compiler {nvcc} has no include/cuda_runtime.h in {root}"
    return Nvcc(root, number[1])


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
