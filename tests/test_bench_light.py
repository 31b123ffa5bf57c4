"""The bench of the kernels for light networks."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import light
from cac_fast import build_info
from cac_fast.train.errors import InputError

built = pytest.mark.skipif(not build_info()["built"], reason="the extension is not built")


@built
def test_both_networks_are_compared_and_timed(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    clock = accumulate([0, 4, 0, 2, 0, 1.5] * 2)  # begin and end of each pass, in two turns
    monkeypatch.setattr(light, "time", SimpleNamespace(perf_counter=clock.__next__))
    sizes = ["--batch-size", "2", "--crop-size", "64", "--turns", "2"]
    light.main([*sizes, "--json", str(tmp_path / "light.json")])
    record = json.loads((tmp_path / "light.json").read_text())
    assert record["batch_size"] == 2 and {"device", "commit", "threads"} <= record.keys()
    assert record["speedup"] == pytest.approx(2)
    assert record["speedup_95"] == pytest.approx([2, 2])
    assert record["head_share"] == pytest.approx(0.25)
    plain, other = (record["gradient_errors"][name] for name in ("plain", "light"))
    # The kernels are there, and right.
    assert plain != other and other < max(2 * plain, 1e-5)
    assert record["light_backbone"]["median_ms"] == pytest.approx(1500)
    out = capsys.readouterr().out
    assert "2.00 times as fast" in out and "head, upsampling and loss: 25 %" in out


@built
def test_the_backbone_alone_reaches_its_own_weights() -> None:
    _, network = light.networks()
    light.run_backbone(network, torch.randn(2, 3, 32, 32))
    reached = {
        name.partition(".")[0]
        for name, weight in network.named_parameters()
        if weight.grad is not None
    }
    assert reached == {"backbone"}


def test_the_extension_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(light, "build_info", lambda: {"built": False, "reason": "no compiler"})
    with pytest.raises(InputError, match="no compiler"):
        light.main([])


def test_interval() -> None:
    assert light.interval([2.0, 2.0, 2.0]) == pytest.approx((2.0, 2.0, 2.0))
    mean, low, high = light.interval([1.0, 4.0])
    assert (low, mean, high) == pytest.approx((0.5, 2.0, 8.0))
