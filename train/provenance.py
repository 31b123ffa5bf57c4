"""What a run was trained with: the commit of this program and the device."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FILE = "trained_with.json"
"""In a run folder: {"commits": [...], "devices": [...]}, those of all its starts."""


def commit() -> str | None:
    """The commit of this program where it lies in a repository of its own, with `-dirty` if a
    tracked file differs from it."""
    if not (ROOT / ".git").exists():
        return None
    words = "describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """What the GPU or the CPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def note(folder: Path, device: torch.device, new: bool) -> None:
    """Add this start to a run folder's file; new: nothing is left of earlier starts."""
    path = folder / FILE
    found: dict[str, list[str]] = {"commits": [], "devices": []}
    if not new and path.is_file():
        try:
            former = json.loads(path.read_text())
            found = {name: [str(value) for value in former[name]] for name in found}
        except (OSError, ValueError, TypeError, KeyError):
            pass  # a run that can go on does not end because of a note
    for name, value in (("commits", commit()), ("devices", device_name(device))):
        if value is not None and value not in found[name]:
            found[name] = [*found[name], value]
    path.write_text(json.dumps(found, indent=2) + "\n")
