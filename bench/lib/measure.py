"""What the benches share: time, peak memory, facts about the machine, the command, the record."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cac_fast.proven import architecture
from cac_fast.train.provenance import device_name

ROOT = Path(__file__).resolve().parents[2]
PROC = Path("/proc")


# Seconds that a device waits at most while the host queues a call's kernels.
LONGEST_LEAD = 0.1


class Times(NamedTuple):
    """Seconds of one call; on a CPU all three are the same.

    device: from the start of its first kernel to the end of its last, queued ahead, so that none
    waits for the host. host: until the call returns. wall: from the call to the result, on a device
    that was idle.
    """

    device: float
    host: float
    wall: float


def times(call: Callable[[], Any], device: torch.device) -> Times:
    """Of one call, on CUDA of two: the host's time alone, then the device's."""
    host, wall = host_and_wall(call, device)
    if device.type != "cuda":
        return Times(wall, wall, wall)
    return Times(device_seconds(call, device, host), host, wall)


def host_and_wall(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds until a call returns and until its result is there, on a device that was idle."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    returned = time.perf_counter()
    if cuda:
        torch.cuda.synchronize(device)
    return returned - begin, time.perf_counter() - begin


def device_seconds(call: Callable[[], Any], device: torch.device, host: float = 0.0) -> float:
    """Seconds of one call on the device, which has nothing of the call's in its L2 cache before.

    host: seconds that the host needs for it. A CUDA device waits longer than that before it begins,
    so that it finds all kernels queued. A call that waits for the device keeps its gaps.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    lead = min(1.5 * host + 2e-4, LONGEST_LEAD)
    cycles = round(lead * _cycles_per_second(device))
    torch.cuda.synchronize(device)
    _cache_filler(device).zero_()
    torch.cuda._sleep(cycles)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


@cache
def _cycles_per_second(device: torch.device) -> float:
    """Of the counter that `torch.cuda._sleep` waits by."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 10_000_000
    torch.cuda._sleep(cycles)  # loads its kernel
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return cycles / (begin.elapsed_time(end) / 1e3)


@cache
def _cache_filler(device: torch.device) -> torch.Tensor:
    """Twice the L2 cache."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def percentiles(times: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The columns of a row that are milliseconds: median, p20 and p80 of times in seconds."""
    values = 1e3 * np.percentile(times, (50, 20, 80))
    return dict(zip(("median_ms", "p20_ms", "p80_ms"), values.tolist(), strict=True))


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What `call` returns, and its peak memory beyond what was held before, results included.

    CUDA: PyTorch's allocator. CPU: the process's resident memory, whose peak Linux can reset, as
    the profiler misses what C++ code allocates without PyTorch; None where that is not possible.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    try:
        # Freed pages that the C library keeps would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return call(), None
    before = _proc_bytes("self/status", "VmRSS")
    result = call()
    return result, max(0, _proc_bytes("self/status", "VmHWM") - before)


def host_syncs(call: Callable[[], Any]) -> int:
    """How often a call makes the host wait for a CUDA device, as far as PyTorch notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(item.message) for item in caught)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where it is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _proc_bytes("meminfo", "MemAvailable")
    except OSError:
        return None


def _proc_bytes(file: str, name: str) -> int:
    """A line `NAME:  123 kB` of a file below /proc."""
    lines = (PROC / file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def facts(device: torch.device) -> dict[str, Any]:
    """Device, CPU, versions and commit that a number was measured with."""
    describe = "git", "describe", "--always", "--dirty"
    commit = ""
    if shutil.which("git"):
        found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    cpu = device_name(torch.device("cpu"))
    return {
        "device": device_name(device),
        **({"architecture": architecture(device)} if device.type == "cuda" else {}),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "commit": commit,
    }


def can_plot() -> bool:
    """Whether matplotlib is there; says so if not, as numbers without a picture are better than
    none."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        print("no plot, as matplotlib is not installed")
    return there


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clocks, power and temperature of an NVIDIA GPU at this moment; empty where not known."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        # By UUID, as NVML does not know of CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        }
    except pynvml.NVMLError:
        return {}


def progress(text: str, end: str = "\n") -> None:
    """Say how far the run is; where its tables do not go."""
    print(text, end=end, file=sys.stderr, flush=True)


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON; nothing for None. A run that is ended meanwhile leaves the last one
    whole."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def shown(argument: str) -> str:
    """A path from the project's folder, or by its name if it lies elsewhere; all else as it is."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def command_line(program: str, arguments: list[str]) -> str:
    """The command as anyone can type it: its paths as they are `shown`."""
    return shlex.join(["python", program, *map(shown, arguments)])
