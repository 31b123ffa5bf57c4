"""Each line of the table of proven paths has a record that shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cac_fast.backend import BACKENDS
from cac_fast.proven import PROOFS, Proof, architecture

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import measure  # noqa: E402  (bench/measure.py)

LINE = Proof("sm_90", "triton", "h100-dc_loss.json")


def problem(proof: Proof, results: Path) -> str | None:
    """Why a record of the loss bench does not show what a line says, or None."""
    if proof.path not in BACKENDS:
        return f"no back end is called {proof.path!r}"
    file = results / proof.record
    if not file.is_file():
        return f"there is no {proof.record}"
    record = json.loads(file.read_text())
    if record.get("architecture") != proof.architecture:
        return f"{proof.record} was measured on {record.get('architecture')}, {record['device']}"
    rows = [row for row in record["rows"] if row["provider"] == proof.path]
    bad = [row["status"] for row in rows if row["status"].startswith(("wrong", "failed"))]
    if bad:
        return f"{proof.record}: {proof.path} {bad[0]}"
    if not any(row["status"] == "ok" for row in rows):
        return f"{proof.record} has no result of {proof.path}"
    return None


def test_records_show_the_lines() -> None:
    problems = [problem(proof, BENCH / "results") for proof in PROOFS]
    assert [text for text in problems if text is not None] == []
    lines = [(proof.architecture, proof.path) for proof in PROOFS]
    assert len(lines) == len(set(lines))


def write(folder: Path, *statuses: str, **facts: Any) -> None:
    rows = [{"provider": "triton", "status": status} for status in statuses]
    rows.append({"provider": "cuda", "status": "ok"})
    record = {"device": "NVIDIA H100", "architecture": "sm_90", "rows": rows} | facts
    (folder / LINE.record).write_text(json.dumps(record))


def test_record_that_shows_it(tmp_path: Path) -> None:
    write(tmp_path, "ok", "skipped: about 6 s for two runs, limit 0.9 s")
    assert problem(LINE, tmp_path) is None


@pytest.mark.parametrize(
    ("statuses", "facts", "said"),
    [
        (["ok"], {"architecture": "sm_80", "device": "A100"}, "was measured on sm_80, A100"),
        (["ok"], {"architecture": None}, "was measured on None"),
        (["ok", "wrong: error of the loss 1e-2"], {}, "triton wrong: error of the loss"),
        (["ok", "failed: MemoryError: x"], {}, "triton failed: MemoryError"),
        (["skipped: dtype"], {}, "has no result of triton"),
        ([], {}, "has no result of triton"),
    ],
)
def test_record_that_does_not(
    tmp_path: Path, statuses: list[str], facts: dict[str, Any], said: str
) -> None:
    write(tmp_path, *statuses, **facts)
    assert said in problem(LINE, tmp_path)


def test_line_without_a_record_or_a_back_end(tmp_path: Path) -> None:
    assert "there is no h100" in problem(LINE, tmp_path)
    assert "'tritn'" in problem(LINE._replace(path="tritn"), tmp_path)


def test_records_name_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: nvidia)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "hip", None)
    facts = measure.facts(torch.device("cuda", 0))
    assert (facts["device"], facts["architecture"]) == ("NVIDIA H100", "sm_90")
    assert "architecture" not in measure.facts(torch.device("cpu"))


def test_architecture_of_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    amd = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: amd)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architecture(torch.device("cuda")) == "gfx942"
