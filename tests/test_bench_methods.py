"""The bench of the methods: what it measures, its ratios, and the command from end to end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import one_line
from PIL import Image

import methods
from cac_fast.train import config
from cac_fast.train.data.opening import open_lists
from cac_fast.train.errors import InputError
from lib import made_up

SMALL = "--network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --device cpu"
SMALL += " --iterations 7"


def contender(name: str, *times: float, peak: int | None = None) -> methods.Contender:
    made = methods.Contender(name, [])
    made.times, made.peak = list(times), peak
    return made


def test_ratios_are_of_the_same_turn() -> None:
    found = methods.rows(
        [
            contender("supervised", 1.0, 2.0, 4.0, peak=200),
            contender("dear", 3.0, 6.0, 20.0, peak=500),
            contender("cheap", 2.0, 4.0),  # a turn was cut off
            contender("lost"),
        ]
    )
    assert [row["method"] for row in found] == ["supervised", "cheap", "dear", "lost"]
    first, cheap, dear, lost = found
    assert first["time"] == first["memory"] == 1
    assert cheap["time"] == cheap["time_p20"] == 2 and cheap["memory"] is None
    assert (dear["time"], dear["median_ms"], dear["memory"]) == (3, 6000, 2.5)
    assert dear["time_p80"] == pytest.approx(3 + 0.6 * 2)
    assert lost["time"] is None and lost["runs"] == 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[list[str]] = []

    def measured(calls: list[partial], seconds: float) -> list[tuple[int, str]]:
        (call,) = calls
        assert call.func is methods.peak_bytes
        asked.append(call.args[0])
        return [(1_000_000 * len(asked), "")]

    monkeypatch.setattr(methods, "side_by_side", measured)
    file = tmp_path / "rows.json"
    words = f"--methods self_training,cac --turns 2 --json {file} -- {SMALL} --learning-rate 0.02"
    assert methods.main(words.split()) == 0
    record = json.loads(file.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert rows.keys() == {"supervised", "self_training", "cac"}
    for row in rows.values():
        assert (row["status"], row["runs"]) == ("ok", 2)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert rows["supervised"]["time"] == 1 < rows["cac"]["time"]
    assert [row["memory"] for row in rows.values()] == [row["peak_mb"] for row in rows.values()]
    assert {"torch", "cpu", "commit", "threads"} <= record.keys()
    assert record["command"].startswith("python bench/methods.py --methods self_training,cac")
    assert "| supervised" in capsys.readouterr().out
    for settings in map(config.parse, asked):
        assert settings.optim.learning_rate == 0.02 and settings.data.crop_size == 32
        assert (settings.data.pseudo_labels is None) == (settings.loss.method != "self_training")


def test_a_step_is_of_the_end_and_of_all_classes(folder_data: Path, tmp_path: Path) -> None:
    where = f"--dataset folder --data-dir {folder_data} --output {tmp_path / 'run'} --workers 0"
    words = [*where.split(), *methods.SETTINGS.split(), *SMALL.split(), "--method", "fixmatch"]
    one = methods.Contender("fixmatch", words)
    one.prepare()
    assert one.trainer.iteration == 6
    seen = []
    one.trainer.optimize = lambda step: seen.append(step)
    one.run()
    assert seen[0].unlabeled is not None and len(one.times) == 1
    (network,) = one.trainer.method.segmenters()
    logits = network.train()(seen[0].labeled["image"])
    assert logits.argmax(1).unique().numel() == 3
    # Those of a network that is random throughout lie far closer together.
    assert (logits.std((0, 2, 3)) > 1.5).all()
    assert methods.peak_bytes(words) > 1e6
    wrong = methods.Contender("fixmatch", [*words, "--data-dir", "nowhere"])
    with pytest.raises(InputError, match="nowhere"):
        wrong.prepare()


def test_the_wait_for_a_batch_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = methods.Contender("cac", [])
    one.trainer = type("T", (), {"optimize": lambda self, step: None})()
    one.trainer.world = type("W", (), {"device": torch.device("cpu")})()
    one.steps = iter([methods.Step({}, None, 3.0)])
    monkeypatch.setattr(methods, "host_and_wall", lambda call, device: (call(), 5.0))
    one.run()
    assert one.times == [2.0]


def test_a_step_that_does_not_fit_gets_a_row_that_says_so() -> None:
    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")

    one = contender("dear")
    one.attempt(full)
    one.attempt(lambda: pytest.fail("it goes on"))
    text = methods.table(methods.rows([contender("supervised", 1.0), one]))
    assert "- dear failed: CUDA out of memory.\n" in text and "our reading" not in text
    assert methods.table(methods.rows([contender("supervised"), contender("ecs")])).endswith(
        "ecs: our reading of its paper, whose authors published neither code nor settings."
    )


def test_what_refuses_the_options_gets_a_row_that_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(methods, "side_by_side", lambda calls, seconds: [(1, "")])
    file = tmp_path / "rows.json"
    words = f"--methods cct --turns 1 --json {file} -- {SMALL} --forward joint"
    assert methods.main(words.split()) == 0
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["supervised"]["status"] == "ok" and rows["supervised"]["runs"] == 1
    assert rows["cct"]["status"].startswith("refused: --forward joint")
    assert "- cct refused: --forward joint" in capsys.readouterr().out
    words = f"--methods cct --turns 1 -- {SMALL} --crop-size 1"
    with pytest.raises(InputError, match="--crop-size 1"):
        methods.main(words.split())


def test_a_method_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError) as error:
        methods.parse(["--methods", "fixmach"])
    one_line(error, "'fixmach'", "did you mean", "cac")


def test_labels_are_made_up_where_a_method_needs_some(folder_data: Path, tmp_path: Path) -> None:
    words = ["--dataset", "folder", "--data-dir", str(folder_data), "--method", "self_training"]
    assert made_up.with_labels([*words, "--teacher", "x"], tmp_path)[-1] == "x"
    assert made_up.with_labels([*words[:-1], "fixmatch"], tmp_path)[-1] == "fixmatch"
    made = made_up.with_labels(words, tmp_path / "made")
    assert made == [*words, "--pseudo-labels", str(tmp_path / "made")]
    _, _, unlabeled = open_lists(config.parse(words))
    ids = [np.asarray(Image.open(tmp_path / f"made/{one.name}.png")) for one in unlabeled]
    assert [one.shape for one in ids] == [(48, 56)] * 3
    assert set(np.unique(ids)) == {0, 1, 2, 255}
