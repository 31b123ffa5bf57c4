"""What holds of all source files."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {".py", ".sh", ".cpp", ".h", ".cu", ".cuh"}
MOST_LINES = 400


def test_files_are_short() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("bench", "cac_fast", "csrc", "kernels", "train")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in KINDS
    }
    assert len(lines) > 100
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
