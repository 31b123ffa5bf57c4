"""The classification for the pseudo masks of Table 5: its options, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_folders import one_line
from tabled import Programs

from accuracy import table_hours, table_plan, tables
from accuracy.table_classify import SEEN
from cac_fast.train.config import Config
from cac_fast.train.errors import InputError

MASKS = ["--seeds", "0", "--image-labels", "from-masks"]
TEXT = "--learning-rate 0.001 --crop-size 128 --base-size 320 --epochs 20 --cam-scales 1,2"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


def keys(programs: Programs, *words: str) -> dict[str, str]:
    """The keys of the cells of CAC R50 by their columns."""
    cells = programs.plan(5, *MASKS, *words)
    return {cell.column: cell.runs[0].key for cell in cells if cell.row == "CAC R50"}


def test_options_reach_the_classification_alone(programs: Programs) -> None:
    rows = [*MASKS, "--rows", "CAC R50", "--classify", TEXT]
    assert programs.fill(5, *rows) == 0
    semi, classify, weakly = (command for _, command in programs.calls)
    assert classify[0] == "train/classify.py"
    first = classify.index("--learning-rate")
    assert classify[first : first + len(TEXT.split())] == TEXT.split()
    assert "--epochs" not in [*semi, *weakly]
    said = (
        "masks of a classification: 20 epochs, batches of 16, crops of 128, base size 320, "
        "learning rate 0.001"
    )
    assert {cell["row"]: cell["note"] for cell in programs.record(5)["cells"]}["CAC R50"] == said
    # What was done is not done again.
    programs.calls.clear()
    assert programs.fill(5, *rows) == 0 and programs.calls == []


def test_options_are_part_of_what_a_weakly_run_is_known_by(programs: Programs) -> None:
    plain, other = keys(programs), keys(programs, "--classify", TEXT)
    assert plain["semi"] == other["semi"] and plain["weakly"] != other["weakly"]
    again = keys(programs, "--classify", " ".join(f"--{w}" for w in TEXT.split("--")[:0:-1]))
    assert again == other  # in another order
    found = [keys(programs, "--classify", f"{TEXT} {more}")["weakly"] for more in (
        "--epochs 19", "--cam-foreground 0.4", "--seed 1", "--weight-decay 0",
    )]  # fmt: skip
    assert len({other["weakly"], *found}) == 5
    # What is the default anyway, or changes no mask.
    for same in ("--epochs 5", "--crop-size 512 --cam-scales 1,0.5,1.5,2", "--eval-every 7"):
        assert keys(programs, "--classify", same) == plain


def test_without_options_a_classification_is_known_as_before_there_were_any(
    programs: Programs,
) -> None:
    run = programs.plan(5, *MASKS)[-1].runs[0]
    ((_, classification, _),) = run.needs
    flat = run.settings.flat()
    seen = {name: flat[name] for name in SEEN if flat[name] is not None}
    data = tables.open_data("folder", programs.folder / "set")
    known = Config.of(dataset="folder", **seen), data, "classify", "from-masks"
    assert classification.key == table_plan.key_of(*known)


def test_a_plan_says_what_is_not_of_the_iterations(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"labeled": 360.0, "both": 720.0, "step": 1.0, "steps": 9}
    monkeypatch.setattr(table_hours, "step_seconds", lambda *words: times)
    assert programs.fill(5, *MASKS, "--dry-run", "--iterations", "3") == 0
    said = "weakly: masks of a classification: 5 epochs, batches of 16, crops of 512, base size 640"
    out = capsys.readouterr().out
    for row in ("CAC VGG-16", "CAC R50"):
        assert f"{row} {said}, learning rate 0.01\n" in out
    programs.fill(5, *MASKS, "--dry-run", "--classify", "--iterations 1 --batch-size 2")
    assert "classification: 1 iteration, batches of 2, crops of 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--learning-rat 0.1", "did you mean --learning-rate"),
        ("--learning-rate 0", "--learning-rate 0.0: must be positive"),
        ("--epochs 3 --iterations 7", "both --epochs and --iterations"),
        ("--crop-size 100", "--crop-size 100"),
        ("--cam-foreground 0.1 --cam-background 0.2", "--cam-background 0.2 is above"),
        ("--backbone resnet18", "--backbone is of the table and its rows"),
        ("--labeled-share=1/4", "--labeled-share is of the table and its rows"),
        ("--no-restart", "--no-restart is of the table and its rows"),
        ("--epochs '2", "No closing quotation"),
        ("nothing", "unexpected argument nothing"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(
    programs: Programs, text: str, named: str
) -> None:
    with pytest.raises(InputError) as error:
        programs.fill(5, *MASKS, f"--classify={text}")
    one_line(error, f"--classify '{text}': ", named)
    assert programs.calls == []


def test_a_table_without_a_classification_takes_no_options_for_it(programs: Programs) -> None:
    with pytest.raises(InputError) as error:
        tables.parse(["--table", "3", *programs.words, "--classify", "--epochs 3"])
    one_line(error, "--classify", "--table 3")
