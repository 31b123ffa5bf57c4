"""The paper's tables as runs: what is planned, what is run again, what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_folders import one_line, write_folder
from PIL import Image
from tabled import REST, SMALL, Programs, val
from tiny_scenes import write_scenes

from accuracy import table_outcome, table_plan, tables
from accuracy.paper_tables import TABLES
from cac_fast.train import config
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from cac_fast.train.registry import METHODS, Entry
from lib.measure import ROOT


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


# What is off in each row of Table 3, in the words of train/main.py.
OFF = {
    "I": "contrastive directional negative-sampling positive-filtering",
    "II": "directional negative-sampling positive-filtering",
    "III": "negative-sampling positive-filtering",
    "IV": "positive-filtering",
    "V": "directional",
    "VI": "context",
    "VII": "projector",
    "VIII": "",
}
SWITCHES = "projector context contrastive directional negative_sampling positive_filtering".split()


def test_rows_have_the_papers_switches(programs: Programs) -> None:
    found = {cell.row: cell for cell in programs.plan(3, "--seeds", "0")}
    assert list(found) == ["SupOnly", "ST", *OFF]
    # Whatever a call says: the switches are what makes a row.
    again = {
        cell.row: cell for cell in programs.plan(3, "--seeds", "0", rest=[*REST, "--no-context"])
    }
    for name, off in OFF.items():
        flags = [f"--no-{switch}" for switch in off.split()]
        wanted = config.parse([*programs.words[:4], *flags]).loss
        for cells in (found, again):
            loss = cells[name].runs[0].settings.loss
            assert loss.method == "cac"
            assert [getattr(loss, s) for s in SWITCHES] == [getattr(wanted, s) for s in SWITCHES]
    assert found["SupOnly"].runs[0].settings.loss.method == "supervised"


def test_the_papers_data_get_the_papers_settings(tmp_path: Path) -> None:
    """Against Sec. 4.1, and Table 4's reading of NumNeg as 2 n (1 + p)."""
    options = tables.parse(["--table", "3", "--dataset", "voc", "--data-dir", str(tmp_path)])
    lists: list[str] = []
    data = tables.open_data("folder", write_folder(tmp_path / "set"))
    for row in TABLES[3].rows[2:]:
        run, note = table_plan.training(TABLES[3], row, lists, 0, options, data)
        flat = run.settings.flat()
        assert (flat["network"], flat["backbone"], flat["crop_size"]) == ("pspnet", "resnet50", 320)
        assert (flat["iterations"], flat["learning_rate"]) == (92_560, 0.001)
        assert (flat["negatives_per_view"], flat["bank_past_steps"]) == (6400, 1)
        assert note == ""
        assert table_outcome._unlike(row, run.settings, "voc") == [
            "weights: random, the paper's ImageNet"
        ]
    numbers = [500, 1000, 2000, 6400, 12_800, 19_200, 25_600]
    for row, number in zip(TABLES[4].rows, numbers, strict=True):
        run, _ = table_plan.training(TABLES[4], row, lists, 0, options, data)
        loss = run.settings.loss
        assert 2 * loss.negatives_per_view * (1 + loss.bank_past_steps) == number
    options = tables.parse(["--table", "2", "--dataset", "cityscapes", "--data-dir", str(tmp_path)])
    run, _ = table_plan.training(TABLES[2], TABLES[2].rows[1], lists, 0, options, data)
    flat = run.settings.flat()
    assert (flat["crop_size"], flat["learning_rate"], flat["iterations"]) == (720, 0.01, 92_560)
    assert (flat["negatives_per_view"], flat["bank_past_steps"]) == (16_200, 0)


def test_what_is_no_default_is_told(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = [*REST, "--base-size", "400", "--ema-decay", "0.5", "--averaged-labels"]
    programs.fill(3, "--rows", "SupOnly", "--seeds", "0", rest=rest)
    found = programs.record(3)["differences"]
    assert "base_size: 400, the default is None" in found
    assert f"ema_decay: 0.5, the default is 0.996 (rows {', '.join(OFF)})" in found
    assert not any(text.startswith("precision") for text in found)
    monkeypatch.setattr(table_outcome, "pick_precision", lambda settings, world: "bf16")
    programs.fill(3, "--rows", "SupOnly", "--seeds", "0", rest=rest)
    assert "precision: bf16, the paper states none" in programs.record(3)["differences"]


def test_numbers_are_the_papers() -> None:
    """Differences that the paper's text names, and sums over each table."""
    values = {
        number: {(row.name, column): value for row in table.rows
                 for column, value in zip(table.columns, row.values, strict=True)}
        for number, table in TABLES.items()
    }  # fmt: skip
    assert [len(table.rows) for table in TABLES.values()] == [10, 2, 10, 7, 10]
    sums = [sum(v for v in found.values() if v is not None) for found in values.values()]
    assert sums == pytest.approx([2798.1, 434.3, 663.6, 501.1, 1029.4])
    ranking = sorted(TABLES[3].rows, key=lambda row: -row.values[0])
    assert [row.name for row in ranking] == "VIII IV V VI ST III SupOnly I VII II".split()
    assert values[5]["CAC R50", "weakly"] - values[1][
        "SupOnly PSPNet R50", "full"
    ] == pytest.approx(1)


def test_image_labels_that_cannot_be_read(programs: Programs) -> None:
    path = programs.folder / "labels.txt"
    path.write_bytes(b"\xff\xfe\x00")
    for words in (["--image-labels", str(path)], ["--image-labels", f"{path}x"]):
        with pytest.raises(InputError) as error:
            programs.fill(5, *words)
        one_line(error, path)


def test_values_are_those_of_metrics(programs: Programs) -> None:
    programs.fails = "VIII mIoU seed 1"
    assert programs.fill(3, "--rows", "VIII,IV", "--seeds", "0,1,2") == 1
    record = programs.record(3)
    assert {run["settings"]["data_dir"] for run in record["runs"]} == {"set"}  # not where it lies
    found = {cell["row"]: cell for cell in record["cells"]}
    for name, seeds in (("IV", [0, 1, 2]), ("VIII", [0, 2])):
        folders = [run["folder"] for run in record["runs"] if run["name"].startswith(f"{name} ")]
        curves = [
            [line["miou"] for line in read_metrics(programs.folder / "runs" / f / "metrics.jsonl")]
            for f in folders
        ]
        assert found[name]["seeds"] == seeds
        assert found[name]["last"]["values"] == [100 * curve[-1] for curve in curves]
        assert found[name]["best"]["values"] == [100 * max(curve) for curve in curves]
    assert found["VIII"]["missing"] == [1] and found["I"]["last"] is None
    assert found["VIII"]["last"]["sd"] == pytest.approx(2**0.5)  # 2 points apart
    text = programs.text(3)
    assert "| row | column | paper (voc, other data) | ours, last | ours, best | n | note |" in text
    assert "| VIII | mIoU | 72.4 | 12.6 ± 1.4 | 14.6 ± 1.4 | 2, lacks 1 |  |" in text
    assert "| I | mIoU | 64.2 | - | - | - |  |" in text
    assert "| ST | mIoU | 66.3 | - | - | - | behind 4 steps of its teacher |" in text
    assert "| VIII - IV | +0.8 | +0.2 ± 0.0 | 2 |" in text
    assert "- crop_size: 32, the paper's 320\n" in text
    # The paper states a warm-up of its own method alone; that of another one is its preset's.
    assert f"- warmup: 2, the paper's 1/16 of the iterations (rows {', '.join(OFF)})\n" in text
    assert "- warmup: 2, the method's preset is 0 (rows ST)\n" in text
    programs.fails = ""
    programs.calls.clear()
    assert programs.fill(3, "--rows", "VIII,IV", "--seeds", "0,1,2") == 0
    assert [label for label, _ in programs.calls] == ["VIII mIoU seed 1"]
    assert "lacks" not in programs.text(3)


def test_a_run_is_known_by_its_settings(programs: Programs, tmp_path: Path) -> None:
    def key(*more: str, rest: list[str] = REST) -> str:
        cells = programs.plan(3, "--seeds", "3", rest=[*rest, *more])
        return next(cell.runs[3].key for cell in cells if cell.row == "VIII")

    first = key()
    # What does not change the numbers, paths among it, and what is the default anyway.
    for same in ("--workers 1", "--cache x", "--save-every 7", "--momentum 0.9"):
        assert key(*same.split()) == first
    others = (
        "--iterations 5",
        "--momentum 0.8",
        "--data-list 0 --labeled-share 1/4",
        "--weights a.pth",
    )
    keys = [key(*other.split()) for other in others]
    assert len({first, *keys}) == 5
    assert key("--weights", "b/a.pth") == keys[-1]
    # Lists by what they hold.
    found = []
    for number, name in enumerate(("t00", "t00", "t01")):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"{name}\n")
        found.append(key("--labeled", str(path)))
    assert found[0] == found[1] != found[2] and first not in found
    seeds = {run.key for cell in programs.plan(3) for run in cell.runs.values()}
    assert len(seeds) == 10 * 3

    # Two tables share the run of the same settings.
    def one(table: int, row: str, column: str) -> str:
        cells = programs.plan(table, "--seeds", "0")
        return next(c.runs[0].key for c in cells if (c.row, c.column) == (row, column))

    assert one(1, "SupOnly PSPNet R50", "1/8") == one(3, "SupOnly", "mIoU")
    assert one(1, "SupOnly PSPNet R50", "1/4") != one(3, "SupOnly", "mIoU")


def test_a_changed_default_is_told(programs: Programs) -> None:
    programs.fill(3, "--rows", "VIII", "--seeds", "0")
    (path,) = programs.folder.glob("runs/*/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"momentum": 0.5}))
    with pytest.raises(InputError) as error:
        programs.fill(3, "--rows", "VIII", "--seeds", "0")
    one_line(error, path.parent, "momentum", "--runs")


def test_self_training_follows_its_teacher(programs: Programs) -> None:
    assert programs.fill(3, "--rows", "ST", "--seeds", "0,1", "--jobs", "2") == 0
    trained = {label: command for label, command in programs.calls}
    assert set(trained) == {f"{row} mIoU seed {s}" for row in ("ST", "SupOnly") for s in (0, 1)}
    for seed in (0, 1):
        command, teacher = (trained[f"{row} mIoU seed {seed}"] for row in ("ST", "SupOnly"))
        assert command[command.index("--teacher") + 1] == teacher[teacher.index("--output") + 1]
        assert command[command.index("--method") + 1] == "self_training"
        labels = [label for label, _ in programs.calls]
        assert labels.index(f"SupOnly mIoU seed {seed}") < labels.index(f"ST mIoU seed {seed}")

    # Another teacher, another student, though its own settings are the same.
    cells = {cell.row: cell for cell in programs.plan(3, "--seeds", "0,1")}
    data = tables.open_data("folder", programs.folder / "set")
    student = cells["VIII"].runs[0]
    keys = {
        table_plan._after(student, data, "--teacher", teacher).key
        for teacher in cells["SupOnly"].runs.values()
    }
    assert len(keys | {student.key}) == 3


def test_what_needs_a_failed_run_does_not_begin(
    programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.fails = "SupOnly"
    assert programs.fill(3, "--rows", "ST", "--seeds", "0") == 1
    assert [label for label, _ in programs.calls] == ["SupOnly mIoU seed 0"]
    assert "error: ST mIoU seed 0 not begun" in capsys.readouterr().err


def test_image_labels_are_classified_first(programs: Programs) -> None:
    cells = {(c.row, c.column): c for c in programs.plan(5)}
    assert cells["CAC R50", "weakly"].note == "needs --image-labels"
    assert ("WSSN VGG-16", "semi") not in cells  # the paper has no number either
    assert cells["CAC R50", "semi"].runs and not cells["WSSN VGG-16", "weakly"].runs
    labels = programs.folder / "labels.txt"
    labels.write_text("t00 car\n")
    rows = ["--rows", "CAC R50", "--seeds", "0,1", "--image-labels", str(labels)]
    for _ in range(2):
        assert programs.fill(5, *rows) == 0
    semi, classify, weakly, semi1, weakly1 = (command for _, command in programs.calls)
    assert classify[0] == "train/classify.py"
    assert classify[classify.index("--image-labels") + 1] == str(labels)
    assert classify[classify.index("--backbone") + 1] == "mobilenet_v2"
    assert classify[classify.index("--labeled-share") + 1] == "1/8"
    key = programs.plan(5, *rows)[-1].runs[0].key
    labels.write_text("t00 sky\n")
    assert programs.plan(5, *rows)[-1].runs[0].key != key
    masks = f"{classify[classify.index('--output') + 1]}/masks"
    for command in (weakly, weakly1):
        assert command[command.index("--pseudo-labels") + 1] == masks
    assert "--pseudo-labels" not in [*semi, *semi1]


def test_labels_read_from_masks_are_told(programs: Programs) -> None:
    rows = ["--rows", "CAC R50", "--columns", "weakly", "--seeds", "0", "--image-labels"]
    assert programs.fill(5, *rows, "from-masks") == 0
    said = "- image labels: read from masks, those of unlabeled images among them"
    assert said in programs.text(5)
    labels = programs.folder / "labels.txt"
    labels.write_text("t00 car\n")
    assert programs.fill(5, *rows, str(labels)) == 0
    assert "read from masks" not in programs.text(5)


def test_methods_of_the_registry_join(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METHODS.entries, "cct")
    before = {cell.row: cell for cell in programs.plan(1, "--seeds", "0")}
    assert before["CCT PSPNet R50"].note == "no method cct here"
    assert before["fixmatch DeepLabv3+ R101"].paper is None
    entry = Entry("cac_fast.train.methods.supervised:Supervised", "a stub")
    monkeypatch.setitem(METHODS.entries, "cct", entry)
    monkeypatch.setitem(METHODS.entries, "new", entry)
    after = {(cell.row, cell.column): cell for cell in programs.plan(1, "--seeds", "0")}
    assert after["CCT PSPNet R50", "1/8"].runs[0].settings.loss.method == "cct"
    run = after["new DeepLabv3+ R50", "1/4"].runs[0]
    assert (run.settings.loss.method, run.settings.data.labeled_share) == ("new", "1/4")
    assert not any(row.startswith("cct ") for row, _ in after)


def test_each_seed_of_table_1_has_a_list(programs: Programs) -> None:
    cells = {(c.row, c.column): c for c in programs.plan(1)}
    lists = [run.settings.data.data_list for run in cells["CAC PSPNet R50", "1/8"].runs.values()]
    assert lists == [0, 1, 2]
    lists = [run.settings.data.data_list for run in programs.plan(3)[0].runs.values()]
    assert lists == [0, 0, 0]


def test_a_preset_replaces_what_all_rows_share(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    words = ["--dataset", "toycity", "--data-dir", str(folder), "--table"]
    data = tables.open_data("folder", folder)
    found = {}
    for number in (1, 3):
        options = tables.parse([*words, str(number)])
        for row in TABLES[number].rows:
            if row.method not in METHODS.entries:
                continue
            run, _ = table_plan.training(TABLES[number], row, [], 0, options, data)
            found[number, row.name] = run.settings.model.backbone
    assert found[3, "VIII"] == found[3, "SupOnly"] == "resnet18"
    assert found[1, "CAC PSPNet R50"] == "resnet50"
    assert found[1, "CAC DeepLabv3+ R101"] == "resnet101"


def test_negatives_are_capped_by_name(programs: Programs) -> None:
    assert programs.fill(4, "--seeds", "0", "--rows", "500,1k,25.6k") == 0
    # 2 crops of 4 x 4 locations; what is the same then is one run.
    assert len(programs.calls) == 2
    text = programs.text(4)
    assert "n 250 capped at 32, all there are" in text
    cells = {cell["row"]: cell for cell in programs.record(4)["cells"]}
    assert cells["500"]["last"] == cells["1k"]["last"] == cells["12.8k"]["last"]
    assert "| s a step | MB |" in text


@pytest.mark.parametrize("number", [3, 4])
def test_a_plot_is_written_where_there_is_something(programs: Programs, number: int) -> None:
    pytest.importorskip("matplotlib")
    path = programs.folder / "plot.png"
    assert programs.fill(number, "--seeds", "0", "--rows", "VIII" if number == 3 else "500") == 0
    record = programs.record(number)
    programs.plot(number, record | {"cells": record["cells"][:2]}, path)
    # Only Table 4 shows time and memory below: its picture is the higher one.
    assert path.exists() == (number == 4)
    programs.plot(number, record, path)
    with Image.open(path) as picture:
        assert (picture.height > picture.width) == (number == 4)


def test_step_times_are_of_settled_steps_with_unlabeled_images() -> None:
    words = ["--dataset", "toycity", "--warmup", "40", "--iterations", "200", "--method"]
    lines = [
        {"kind": "train", "iteration": 20 * (i + 1), "images_per_s": 16 / (i + 1)} for i in range(7)
    ]
    lines.insert(4, val(80, 0.5))
    # From 60 on: the lines at 80 to 140, of 4 to 7 seconds a step of 8 + 8 images.
    assert table_outcome.median_step_seconds(lines, config.parse([*words, "cac"])) == 5.5
    # Supervised: from 20 on, and of 8 images.
    assert table_outcome.median_step_seconds(lines, config.parse([*words, "supervised"])) == 2.25
    assert table_outcome.median_step_seconds(lines[:3], config.parse([*words, "cac"])) is None


@pytest.mark.parametrize(
    ("words", "rest", "named"),
    [
        (["--rows", "IX"], [], "IX"),
        (["--columns", "1/8"], [], "1/8"),
        ([], ["--seed", "3"], "--seed"),
        ([], ["--output=x"], "--output"),
        ([], ["--pseudo-labels", "x"], "--pseudo-labels"),
        (["--jobs", "0"], [], "--jobs"),
        (["--runs", __file__], [], "--runs"),
        (["--results", __file__], [], "--results"),
        (["--threads", "0"], [], "--threads"),
    ],
)
def test_mistakes_are_one_line(
    programs: Programs, words: list[str], rest: list[str], named: str
) -> None:
    with pytest.raises(InputError) as error:
        programs.fill(3, *words, rest=[*REST, *rest])
    one_line(error, named)
    assert programs.calls == []


def test_shares_are_the_columns(programs: Programs) -> None:
    with pytest.raises(InputError) as error:
        programs.fill(1, rest=[*REST, "--labeled-share", "1/3"])
    one_line(error, "shares")


def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """SIGKILL to the program and its training, in the middle of the latter."""
    data = write_scenes(tmp_path / "set", {"train": (4, 2), "val": (1, 0)})
    words = f"--table 3 --dataset folder --data-dir {data} --rows VIII --seeds 0 --threads 1"
    words += f" --runs {tmp_path / 'runs'} --results {tmp_path / 'results'} -- {SMALL}"
    words += " --device cpu --iterations 16 --save-every 3 --log-every 1 --eval-every 100"
    words += " --labeled-share full"
    command = [sys.executable, str(ROOT / "bench/accuracy/tables.py"), *words.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = None
    try:
        deadline = time.monotonic() + 240
        while folder is None:
            assert time.monotonic() < deadline and process.poll() is None
            found = list(tmp_path.glob("runs/*/last.pt"))
            folder = found[0].parent if found else None
            time.sleep(0.02)
        training = int((folder / "lock").read_text().split()[1])
        process.kill()
        os.kill(training, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    before = read_metrics(folder / "metrics.jsonl")
    assert before[-1]["iteration"] < 16
    assert tables.fill(tables.parse(words.split())) == 0
    lines = read_metrics(folder / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in train] == list(range(1, 17))
    # Those up to the last checkpoint are the same lines, times included: not trained again.
    kept = [line for line in before if line in lines]
    assert len(kept) >= 3
    (run,) = json.loads((tmp_path / "results/table3-set.json").read_text())["runs"]
    assert run["scores"]["val_last"] == lines[-1]["miou"]
    assert run["folder"] == folder.name
