"""The record of a comparison: what later calls add to it, and what they must not."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import compared
import pytest
from compared import Trainer, scoring
from data_folders import one_line, write_folder, write_image, write_mask

from accuracy import arguments, compare, runs
from accuracy.record import former_record
from cac_fast.train.errors import InputError
from lib.measure import ROOT

source, trainer = compared.source, compared.trainer


def test_a_later_call_adds_its_seeds(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(word) for word in trainer.words]
    weights = ["--weights", "/there/w.pth"]
    assert compare.compare(compare.parse([*words, "--seeds", "1", "--", *weights])) == 0
    trainer.trained.clear()
    later = [*words, "--seeds", "0", "--arms", "cac,supervised_all"]
    assert compare.compare(compare.parse([*later, "--", "--weights", "/here/w.pth"])) == 0
    assert trainer.trained == ["supervised_all 1/2 seed 0", "cac 1/2 seed 0"]
    record = trainer.record()
    names = [(run["method"], run["seed"]) for run in record["runs"]]
    assert names == [("supervised_all", 0), ("cac", 0), ("supervised", 1), ("cac", 1)]
    first, second = record["command"].split(" ; ")
    assert "--seeds 1" in first and "--seeds 0" in second
    with pytest.raises(InputError) as error:
        compare.compare(compare.parse([*words, "--", *weights, "--iterations", "7"]))
    one_line(error, "other settings", "iterations", "--name")
    with pytest.raises(InputError) as error:
        compare.parse([*words, "--arms", "cac,fix"])
    one_line(error, "'fix'", "supervised_all")


def test_longer_runs_are_not_finished(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another record of the same runs: they are planned and have a further commit."""
    words = trainer.words
    assert compare.compare(compare.parse([*words, "--", "--iterations", "4"])) == 0
    trainer.commit = "second"
    longer = compare.parse([*words, "--name", "longer", "--", "--iterations", "8"])
    job = ("supervised", "1/2", 0)
    assert not runs.is_finished(job, longer)
    assert compare.compare(longer) == 0
    record = json.loads((trainer.output / "results/longer.json").read_text())
    assert [run["commits"] for run in record["runs"]] == [["first", "second"]] * 4
    trainer.iteration = 8
    assert compare.compare(longer) == 0
    assert runs.is_finished(job, longer)


def test_a_record_takes_runs_of_its_experiment_alone(
    trainer: Trainer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring(monkeypatch, trainer)
    write_image(source / "images/test/x.png")
    write_mask(source / "masks/test/x.png")
    for place in ("a/0", "a/1", "b/0"):
        (tmp_path / place / "dusk").mkdir(parents=True)
        for name in runs.LISTS:
            (tmp_path / place / "dusk" / name).write_text("t00\n")
        (tmp_path / place / "day.txt").write_text("x\n")
    other = write_folder(tmp_path / "there" / "other", labeled=1, unlabeled=0)
    base = trainer.words
    lists, names = ["--lists", str(tmp_path / "a/{list}/dusk")], ["--names"]
    names += [str(tmp_path / "a/0/day.txt")]
    rest = ["--", "--iterations", "4"]

    def call(*words: object) -> int:
        return compare.compare(compare.parse([str(word) for word in words]))

    def refused(words: list, *says: str) -> None:
        with pytest.raises(InputError) as error:
            call(*words)
        one_line(error, "compare.json", "--name", *says)

    assert call(*base, *lists, *names, *rest) == 0
    path = tmp_path / "results/compare.json"
    record = json.loads(path.read_text())
    # As records write what lies outside of the project, and in it.
    command = record["command"]
    within = command.replace("--lists dusk", "--lists 'a/{list}/dusk'").replace(
        "--data-dir set", "--data-dir here/set"
    )
    old = {key: value for key, value in record.items() if key != "digests"}
    for former in (record, old, {**old, "command": within}):
        path.write_text(json.dumps(former))
        assert call(*base, *lists, *names, *rest) == 0
        path.write_text(json.dumps(former))
        refused([*base, *lists, *names, "--", "--iterations", "8"], "iterations: 4 there, 8 here")
        refused([*base, *lists, *names, "--", "--iterations", "2"], "iterations: 4 there, 2 here")
        refused([*base, *lists, *names, *rest, "--labeled", "x.txt"], "labeled: None there")
        monkeypatch.setattr(arguments, "shrunken", lambda folder, factor: folder)
        refused([*base, *lists, *names, "--shrink", "2", *rest], "--shrink: 1 there, 2 here")
    path.write_text(json.dumps({**old, "command": within}))
    refused([*base, "--lists", tmp_path / "b/{list}/dusk", *names, *rest], "--lists dusk: a/{list}")
    refused([*base, "--data-dir", other, *lists, *rest], "--data-dir: here/set there")
    named = {**old, "command": command.replace("--names day.txt", "--names a/0/day.txt")}
    path.write_text(json.dumps(named))
    elsewhere = ["--names", tmp_path / "b/0/day.txt"]
    refused([*base, *lists, *elsewhere, *rest], "--names day: a/0/day.txt there")
    # The same paths, but something else in them.
    path.write_text(json.dumps(record))
    (tmp_path / "a/1/dusk/labeled.txt").write_text("t01\n")
    refused([*base, *lists, *names, *rest], "--lists dusk of seed 1")
    (tmp_path / "a/1/dusk/labeled.txt").write_text("t00\n")
    (tmp_path / "a/0/day.txt").write_text("x\n\n")
    refused([*base, *lists, *names, *rest], "--names day")
    (tmp_path / "a/0/day.txt").write_text("x\n")
    write_image(source / "images/train/further.png")
    refused([*base, *lists, *names, *rest], "names of images and classes")


def test_runs_of_the_record_are_kept_without_their_folders(
    trainer: Trainer, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.words += ["--arms", "supervised,supervised_adapted,cac"]
    rest = ["--", "--iterations", "4"]
    compare.compare(compare.parse([*trainer.words, *rest]))
    first = trainer.record()["runs"]
    table = trainer.output / "results/compare.md"
    text = table.read_text()

    def again(*words: str, gone: str = "*") -> list[str]:
        for folder in trainer.options.runs.glob(gone):
            shutil.rmtree(folder)
        trainer.trained.clear()
        capsys.readouterr()
        assert compare.compare(compare.parse([*trainer.words, *words])) == 0
        return trainer.trained

    table.unlink()
    assert again(*rest) == []
    assert capsys.readouterr().out.count("its scores stay in the record\n") == 6
    assert trainer.record()["runs"] == first and table.read_text() == text
    # What the record does not have is trained.
    trainer.commit = "second"
    both = ["supervised 1/2 seed 2", "cac 1/2 seed 2"]
    assert again("--seeds", "0,1,2", *rest) == both
    assert trainer.record()["runs"][:6] == first
    # So is what that begins with, and what has a folder goes on.
    path, record = trainer.output / "results/compare.json", trainer.record()
    without = [run for run in record["runs"] if "adapted" not in run["method"]]
    path.write_text(json.dumps({**record, "runs": without}))
    assert again(*rest) == ["supervised 1/2 seed 0", "supervised 1/2 seed 1"]
    assert "supervised 1/2 0: trained anew" in capsys.readouterr().out
    trainer.commit = "third"
    assert again(*rest, gone="supervised-*seed0") == ["supervised 1/2 seed 1"]
    commits = {(run["method"], run["seed"]): run["commits"] for run in trainer.record()["runs"]}
    # An adapted network is made anew where its source is.
    assert [commits["supervised_adapted", seed] for seed in (0, 1)] == [["second"], ["third"]]
    # A score that is new has to be measured, also where the record does not tell of which lists.
    write_image(source / "images/test/x.png")
    write_mask(source / "masks/test/x.png")
    path.write_text(json.dumps({**record, "digests": {}}))
    assert len(again(*rest)) == 4
    assert len(again("--test", *rest)) == 4
    assert len(again("--test", *rest)) == 0
    assert len(again("--test", *rest, "--restart")) == 4


def test_a_student_needs_its_teacher_but_once(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "plot_methods", lambda *_: None)
    monkeypatch.setattr(compare, "draw_sheet", lambda *_: None)
    words = [
        *trainer.words,
        "--seeds",
        "0",
        "--methods",
        "self_training",
        "--",
        "--iterations",
        "4",
    ]

    def again(*gone: str) -> list[str]:
        for name in gone:
            shutil.rmtree(trainer.options.runs / f"{name}-1_2-seed0")
        trainer.trained.clear()
        assert compare.compare(compare.parse(words)) == 0
        return [label.split()[0] for label in trainer.trained]

    every = ["supervised", "supervised_all", "supervised_adapted", "self_training"]
    assert again() == ["supervised", "supervised_all", "self_training"]
    assert again(*every) == []
    path, record = trainer.output / "results/compare.json", trainer.record()
    others = [run for run in record["runs"] if run["method"] != "self_training"]
    path.write_text(json.dumps({**record, "runs": others}))
    assert again() == ["supervised", "self_training"]
    assert again("self_training") == ["supervised"]  # which only reads what is there


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"command": "python compare.py --gone 1", "runs": []}'],
)
def test_a_record_that_cannot_be_compared_is_refused(trainer: Trainer, text: str) -> None:
    path = trainer.output / "results/compare.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError) as error:
        compare.compare(trainer.options)
    one_line(error, path, "cannot be compared", "--name")
    assert path.read_text() == text


RECORDS = [
    path
    for path in sorted((ROOT / "bench/results").glob("*.json"))
    if "/compare.py " in json.loads(path.read_text()).get("command", "")
]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_can_grow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "shrunken", lambda folder, factor: folder)
    record = json.loads(path.read_text())
    words = shlex.split(record["command"].split(" ; ")[-1])[2:]
    former = former_record(path.with_suffix(""), compare.parse(words), {})
    assert [run["scores"] for run in former.runs.values()] == [
        run["scores"] for run in record["runs"]
    ]
    assert all(run["machines"][0]["torch"] for run in former.runs.values())
