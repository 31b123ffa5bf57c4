"""The loader bench: that it compares before it times, and the command from end to end."""

from __future__ import annotations

import json

import pytest

import loader
from lib import loader_baseline

ARGUMENTS = "--device cpu --height 64 --crop-size 32 --pictures 2 --minutes 0".split()


def test_command(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert loader.main([*ARGUMENTS, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    rows = {(row["kind"], row["way"]): row for row in record["rows"]}
    ways = ("authors", "loader", "loader + device", "cached", "cached + device", "device")
    assert set(rows) == {(kind, way) for kind in (*loader.KINDS, "step") for way in ways}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] == 3
    for kind in loader.KINDS:
        assert rows[kind, "authors"]["faster_than_authors"] == 1
    assert rows["step", "cached"]["median_ms"] > rows["unlabeled", "cached"]["median_ms"]
    assert {"torchvision", "pillow", "cpu", "commit", "picture_mb"} <= record.keys()
    assert str(tmp_path) not in file.read_text()
    shown = capsys.readouterr()
    assert "| step: cached" in shown.out and "turn 3" in shown.err


@pytest.mark.parametrize("what", ["image", "labels", "cache"])
def test_nothing_is_timed_where_crops_differ(what, monkeypatch, capsys):
    if what == "cache":
        keep = loader.PixelReader._mapped
        monkeypatch.setattr(
            loader.PixelReader,
            "_mapped",
            lambda *a, **k: None if (pixels := keep(*a, **k)) is None else pixels ^ 1,
        )
    else:
        keep, wanted = loader_baseline.resize, {"image": "RGB", "labels": "L"}[what]
        monkeypatch.setattr(
            loader_baseline,
            "resize",
            lambda image, *rest: (
                keep(image, *rest).transpose(0) if image.mode == wanted else keep(image, *rest)
            ),
        )
    assert loader.main(ARGUMENTS) == 1
    out = capsys.readouterr().out
    expected = {"image": "image differs by", "labels": "the labels differ", "cache": "the cache"}
    assert f"nothing was timed: labeled: {expected[what]}" in out
