"""How the benches time a call on a GPU: a pretended one, whose host and device have clocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import measure

ROOT = Path(__file__).resolve().parents[1]

CUDA = torch.device("cuda")
CYCLES_PER_SECOND = 1.7e9


class PretendedGpu:
    """Kernels run one after the other, each no sooner than the host has launched it.

    now: the host's clock. idle: when the device has nothing more to do. cached: whether the L2
    cache holds what the call reads.
    """

    def __init__(self) -> None:
        self.now = self.idle = 100.0
        self.cached = False

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.idle = max(self.idle, self.now) + device * (0.5 if self.cached else 1.0)

    def synchronize(self, device: object = None) -> None:
        self.now = max(self.now, self.idle)

    def sleep(self, cycles: int) -> None:
        self.launch(0.0, 0.0)
        self.idle += cycles / CYCLES_PER_SECOND

    def flush(self) -> None:
        self.cached = False

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.idle, self.now))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    gpu = PretendedGpu()
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    filler = SimpleNamespace(zero_=gpu.flush)
    monkeypatch.setattr(measure, "_cache_filler", lambda device: filler)
    measure._cycles_per_second.cache_clear()
    yield gpu
    measure._cycles_per_second.cache_clear()


def test_the_host_is_not_in_the_device_time(gpu: PretendedGpu) -> None:
    def call() -> None:
        for _ in range(75):
            gpu.launch(host=4e-6, device=1e-6)
        gpu.cached = True

    for _ in range(2):
        took = measure.times(call, CUDA)
        assert took.device == pytest.approx(75e-6, rel=1e-3)
        assert took.host == pytest.approx(300e-6)
        assert took.host <= took.wall <= took.host + 2e-6


def test_a_device_that_takes_longer_than_its_host(gpu: PretendedGpu) -> None:
    took = measure.times(lambda: gpu.launch(host=1e-4, device=3e-3), CUDA)
    assert took == pytest.approx((3e-3, 1e-4, 3.1e-3))


def test_waiting_has_an_end(gpu: PretendedGpu) -> None:
    """A host that needs seconds does not make the device wait as long, at each of many repeats."""
    before = gpu.now
    measure.device_seconds(lambda: gpu.launch(host=0.0, device=1e-3), CUDA, host=30.0)
    assert gpu.now - before < 2 * measure.LONGEST_LEAD


def test_a_cpu_has_one_time() -> None:
    calls: list[int] = []
    took = measure.times(lambda: calls.append(1), torch.device("cpu"))
    assert calls == [1]
    assert took.device == took.host == took.wall > 0
