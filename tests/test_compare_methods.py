"""Methods side by side: their arms, who waits for whom, scores at equal steps and equal time."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

import compared
import numpy as np
import pytest
from compared import Trainer
from data_folders import one_line
from PIL import Image

from accuracy import compare, methods_outcome, methods_sheet, pace, plan, runs
from accuracy.arms import ARMS
from accuracy.figure_runs import Drawn
from accuracy.pace import Pace
from accuracy.plan import Hours
from accuracy.record import former_record
from cac_fast.train.batch import Batch, Step
from cac_fast.train.errors import InputError
from cac_fast.train.registry import METHODS, Entry
from lib import step_time
from lib.running import RunError

source, trainer = compared.source, compared.trainer

HOURS = {"supervised": 1.0, "supervised_all": 1.0, "control": 2.5, "cac": 3.0}
HOURS |= {"fixmatch": 2.0, "self_training": 1.5, "supervised_adapted": 0.0}
WARM_UP = {"control": 0.25, "cac": 0.25, "fixmatch": 0.25, "self_training": 0.25}
HOURS = {arm: Hours(hours, WARM_UP.get(arm, 0.0)) for arm, hours in HOURS.items()}


@pytest.fixture
def planned(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer whose hours are HOURS."""
    monkeypatch.setattr(
        compare, "plan", lambda jobs, asked, *rest: {arm: HOURS[arm] for arm, _, _ in asked}
    )
    monkeypatch.setattr(compare, "plot_methods", lambda results, path, paces: None)
    monkeypatch.setattr(compare, "draw_sheet", lambda jobs, options, path: None)
    return trainer


def call(trainer: Trainer, *words: str, rest: str = "--iterations 4 --warmup 2") -> int:
    return compare.compare(compare.parse([*trainer.words, *words, "--", *rest.split()]))


def test_a_method_is_an_arm_of_its_name(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(ARMS)
    entry = Entry(METHODS.entry("supervised").where, "one more")
    monkeypatch.setitem(METHODS.entries, "further", entry)
    arms = compare.parse([*trainer.words, "--methods", "further,fixmatch"]).arms
    with_them = ["supervised", "supervised_all", "supervised_adapted"]
    assert sorted(arms) == sorted([*with_them, "fixmatch", "further"])
    assert set(ARMS) == {*before, "further"}
    everything = compare.parse([*trainer.words, "--methods", "all"]).arms
    assert set(everything) == {*with_them, "control", *METHODS.entries}
    assert len(everything) == len(METHODS.entries) + 3
    of_all = compare.parse([*trainer.words, "--methods", "fixmatch", "--shares", "full"]).arms
    assert sorted(of_all) == ["fixmatch", "supervised", "supervised_adapted"]
    assert {name: ARMS[name] for name in before} == before
    colors = [ARMS[name].color for name in everything]
    assert len(set(colors)) == len(colors)
    for name in METHODS.entries:
        assert ARMS[name].method == name
    variant = "--variant", "sure=self_training --confidence 0.9", "--methods", "cac"
    options = compare.parse([*trainer.words, *variant])
    assert sorted(options.arms) == sorted([*with_them, "control", "cac", "sure"])
    assert ARMS["sure"].more == ("--confidence", "0.9")


def test_methods_that_cannot_be_compared_are_named(trainer: Trainer) -> None:
    def refused(*words: str) -> pytest.ExceptionInfo:
        with pytest.raises(InputError) as error:
            compare.parse([*trainer.words, *words])
        return error

    one_line(refused("--methods", "cac,fixmach"), "'fixmach'", "did you mean", "supervised")
    one_line(refused("--methods", "cac", "--arms", "cac"), "--methods", "leave out --arms")
    variant = "--variant", "sure=self_training --confidence 0.9", "--arms", "cac"
    one_line(refused(*variant), "sure", "supervised", "--arms")
    only = refused("--arms", "supervised,cac_adapted")
    one_line(only, "cac_adapted", "add cac to --arms")
    assert "--methods" not in str(only.value)
    one_line(refused("--variant", "supervised_adapted=supervised"), "another arm")
    one_line(refused("--variant", "x=cac_adapted --warmup 0"), "NAME=ARM OPTIONS")


def test_the_cheapest_arms_begin(planned: Trainer) -> None:
    assert call(planned, "--methods", "fixmatch,cac,self_training") == 0
    arms = [label.split()[0] for label in planned.trained[::2]]
    assert arms == [
        *("supervised", "supervised_all", "self_training", "fixmatch", "control", "cac")
    ]
    assert planned.trained[:2] == ["supervised 1/2 seed 0", "supervised 1/2 seed 1"]
    jobs = [("cac", "full", 0), ("supervised", "full", 0)]
    assert plan.cheapest_first(jobs, {"supervised": Hours(2.0), "cac": Hours(1.0)}) == jobs[::-1]


@pytest.mark.parametrize(
    "asked", [("--methods", "cac"), ("--arms", "supervised_adapted,supervised,cac")]
)
def test_what_adapts_a_run_comes_last(
    planned: Trainer, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, str]
) -> None:
    begun = []

    def noted(job: runs.Job, *others: object) -> dict:
        begun.append(job[0])
        return runs.one_run(job, *others)

    monkeypatch.setattr(compare, "one_run", noted)
    monkeypatch.setattr(compare, "plot", lambda results, path: None)
    assert call(planned, *asked, "--jobs", "1") == 0
    assert begun.index("supervised_adapted") > begun.index("cac")
    assert begun[-2:] == ["supervised_adapted"] * 2


def test_an_adapted_arm_costs_what_its_run_does(trainer: Trainer) -> None:
    arms = "supervised,cac,supervised_adapted,cac_adapted"
    words = [*trainer.words, "--arms", arms, "--", "--iterations", "8", "--warmup", "2"]
    options, failed = compare.parse(words), {}
    jobs = [(arm, "1/2", 0) for arm in ("supervised_adapted", "cac_adapted")]
    hours = plan.planned_hours(jobs, options, failed)
    assert hours == {"supervised_adapted": Hours(0.0), "cac_adapted": Hours(0.0)} and not failed
    hours |= {"supervised": Hours(1.0), "cac": Hours(3.0)}
    found = pace.paces(list(hours), hours, options)
    assert {arm: found[arm].hours[-1] for arm in hours} == {
        **{"supervised": 1.0, "supervised_adapted": 1.0, "cac": 3.0, "cac_adapted": 3.0}
    }
    del hours["cac"]
    assert pace.paces(["cac_adapted"], hours, options) == {}


def test_self_training_begins_behind_its_teacher(
    planned: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more threads than runs; the teacher of seed 0 waits until the others have ended."""
    train, others, commands = planned.run, threading.Semaphore(0), {}

    def run(command: list[str], threads: int, label: str) -> None:
        commands[label] = command
        if label == "supervised 1/2 seed 0":
            for _ in range(4):  # supervised seed 1, its student, both of all masks
                assert others.acquire(timeout=60)
        train(command, threads, label)
        others.release()

    monkeypatch.setattr(runs, "run", run)
    assert call(planned, "--methods", "self_training", "--jobs", "6") == 0
    assert planned.trained.index("self_training 1/2 seed 0") == 5
    for seed in (0, 1):
        words = commands[f"self_training 1/2 seed {seed}"]
        teacher = planned.options.runs / f"supervised-1_2-seed{seed}"
        assert words[words.index("--teacher") + 1] == str(teacher)
        assert "--teacher" not in commands[f"supervised 1/2 seed {seed}"]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_without_its_teacher_self_training_does_not_begin(
    planned: Trainer, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    planned.fails = "supervised 1/2 seed 0"
    assert call(planned, "--methods", "self_training,fixmatch", "--jobs", jobs) == 1
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "error: self_training 1/2 seed 0 not begun, as a run that it needs failed",
        "error: supervised 1/2 seed 0 ended with code 1: boom",
        "error: supervised_adapted 1/2 seed 0 not begun, as a run that it needs failed",
    ]
    assert "self_training 1/2 seed 0" not in planned.trained
    (row,) = (one for one in planned.record()["methods"] if one["method"] == "self_training")
    assert (row["seeds"], row["missing_seeds"]) == (1, 1)
    assert len(planned.record()["runs"]) == 7
    text = (planned.output / "results/compare.md").read_text()
    assert "| self_training | 40.0 | +0.0 |" in text and "| 1 run, 1.50 h |" in text


def test_the_table_is_there_for_further_methods_alone(planned: Trainer) -> None:
    assert call(planned, "--methods", "cac") == 0
    assert "methods" not in planned.record()
    path = planned.output / "results/compare.md"
    assert "cost" not in path.read_text()
    summary = planned.record()["summary"]
    assert call(planned, "--methods", "fixmatch") == 0
    assert {row["method"] for row in planned.record()["methods"]} == {
        *("supervised", "supervised_adapted", "control", "cac", "fixmatch")
    }
    assert "| cost |" in path.read_text()
    new = planned.record()["summary"][0]
    assert {name: new[name] for name in ("gain", "headroom", "seeds")} == {
        name: summary[0][name] for name in ("gain", "headroom", "seeds")
    }


def test_the_sheet_is_of_the_first_seed_that_has_two_runs(
    planned: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[argparse.Namespace] = []

    def make(options: argparse.Namespace) -> Drawn:
        asked.append(options)
        return Drawn(Image.new("RGB", (4, 4)), {})

    monkeypatch.setattr(compare, "draw_sheet", methods_sheet.draw_sheet)
    monkeypatch.setattr(methods_sheet.figure_sheet, "make", make)
    assert call(planned, "--methods", "fixmatch", "--seeds", "1,0") == 0
    (first,) = asked
    arms = ["supervised", "supervised_all", "fixmatch", "supervised_adapted"]
    folders = [planned.options.runs / f"{arm}-1_2-seed0" for arm in arms]
    assert (first.captions, first.split) == (arms, "val")
    assert first.runs == [folder / "last.pt" for folder in folders]
    assert (planned.output / "results/compare-sheet.png").is_file()
    for folder in folders[1:]:
        (folder / "last.pt").unlink()
    capsys.readouterr()
    jobs = [(arm, "1/2", seed) for seed in (0, 1) for arm in arms]
    options = compare.parse([*planned.words, "--methods", "fixmatch", "--test"])
    methods_sheet.draw_sheet(jobs, options, tmp_path / "sheet.png")
    assert {path.parent.name[-5:] for path in asked[1].runs} == {"seed1"}
    assert asked[1].split == "test"
    (runs.run_folder(("fixmatch", "1/2", 1), planned.options) / "last.pt").unlink()
    methods_sheet.draw_sheet(jobs, options, tmp_path / "sheet.png")
    assert "sheet.png stays as it is: fixmatch of it are not in" in capsys.readouterr().out
    assert len(asked) == 2
    methods_sheet.draw_sheet(jobs[: len(arms)], options, tmp_path / "sheet.png")
    assert len(asked) == 2


def test_hours_of_finished_runs_are_measured_too(
    planned: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(jobs: list, options: object, failed: dict[str, str]) -> dict[str, Hours]:
        asked.append(sorted({arm for arm, _, _ in jobs}))
        return {arm: HOURS[arm] for arm in asked[-1]}

    monkeypatch.setattr(compare, "plan", lambda *words: {"fixmatch": HOURS["fixmatch"]})
    monkeypatch.setattr(compare, "planned_hours", measured)
    assert call(planned, "--arms", "supervised,cac") == 0
    assert asked == []  # their summary names no cost
    assert call(planned, "--methods", "fixmatch") == 0
    assert asked == [["fixmatch", "supervised", "supervised_adapted", "supervised_all"]]
    planned.options.rest += ["--warmup", "2"]
    known = former_record(planned.output / "results/compare", planned.options, {}).hours
    assert known == {arm: HOURS[arm] for arm in asked[0]}


# ---- numbers

# Evaluations after 4, 6 and 8 iterations of 8.
SCORES = {
    "supervised": [(10, 20, 30), (12, 24, 34)],
    "supervised_all": [(10, 20, 40), (12, 24, 44)],
    "fixmatch": [(20, 30, 36), (22, 34, 39)],
    "cac": [(20, 30, 33)],
    "self_training": [(30, 30, 34), (30, 30, 38)],
}
# Of fixmatch: two steps of warm-up in 0.25 hours, six in 1.5; so 1 hour is 5 steps.
PACES = {
    "supervised": Pace((0, 8), (0, 1)),
    "fixmatch": Pace((0, 2, 8), (0, 0.25, 1.75)),
    "cac": Pace((0, 8), (0, 4)),
    "self_training": Pace((0, 8), (1, 3)),
}


def results() -> list[dict]:
    return [
        {
            "method": arm,
            "share": "dusk",
            "seed": seed,
            "scores": {"val_last": points[-1] / 100, "val_best": points[-1] / 100},
            "curve": [[step, p / 100] for step, p in zip((4, 6, 8), points, strict=True)],
        }
        for arm, of_seeds in SCORES.items()
        for seed, points in enumerate(of_seeds)
    ]


@pytest.fixture
def rows(source: Path, trainer: Trainer) -> list[dict]:
    compare.parse([*trainer.words, "--methods", "all"])
    missing = [("cac", "dusk", 1), ("control", "dusk", 0), ("control", "dusk", 1)]
    paces = PACES | {"control": Pace((0, 8), (0, 2.5))}
    return methods_outcome.rank(results(), "camvid", "val", paces, missing)


def test_methods_are_ranked_by_their_gain(rows: list[dict]) -> None:
    assert [row["method"] for row in rows] == [
        *("fixmatch", "self_training", "cac", "supervised", "control")
    ]
    found = {row["method"]: row for row in rows}
    first = found["fixmatch"]
    assert (first["setting"], first["scored_on"], first["seeds"]) == ("camvid dusk", "val", 2)
    assert first["mean"] == pytest.approx(37.5)
    assert first["gain"] == pytest.approx(5.5)  # 6 and 5
    assert first["gain_standard_error"] == pytest.approx(0.5)
    assert first["share_of_headroom"] == pytest.approx(0.55)
    assert found["cac"]["gain"] == pytest.approx(3) and found["cac"]["seeds"] == 1
    assert found["cac"]["gain_standard_error"] is None
    assert found["supervised"]["gain"] is None and found["supervised"]["seeds"] == 2
    assert found["supervised"]["mean"] == pytest.approx(32)


def test_the_other_order_is_that_of_equal_time(source: Path, trainer: Trainer) -> None:
    compare.parse([*trainer.words, "--methods", "all"])
    rows = methods_outcome.rank(results(), "camvid", "val", PACES, [], "time")
    # What was not evaluated by then comes last, in the order of the arms.
    assert [row["method"] for row in rows] == ["supervised", "fixmatch", "cac", "self_training"]
    assert "Sorted by the gain after equal time." in methods_outcome.methods_table(rows, "time")


def test_cost_and_score_at_equal_time(rows: list[dict]) -> None:
    found = {row["method"]: row for row in rows}
    assert found["supervised"]["cost"] == 1
    assert found["fixmatch"]["cost"] == pytest.approx(1.75)
    # Halfway between the evaluations after 4 and 6 steps: 25 and 28, where supervised ends at 30
    # and 34.
    assert found["fixmatch"]["val_at_equal_time"] == pytest.approx(26.5)
    assert found["fixmatch"]["gain_at_equal_time"] == pytest.approx(-5.5)
    assert found["fixmatch"]["gain_at_equal_time_standard_error"] == pytest.approx(0.5)
    assert found["supervised"]["val_at_equal_time"] == pytest.approx(32)
    # The teacher's run is part of the cost and took all of the time.
    assert found["self_training"]["cost"] == pytest.approx(3)
    assert found["self_training"]["planned_hours"] == pytest.approx(2)
    assert found["self_training"]["val_at_equal_time"] is None
    # Two steps are done by then, and nothing was evaluated.
    assert found["cac"]["cost"] == 4 and found["cac"]["val_at_equal_time"] is None


def test_the_table_names_what_is_missing(rows: list[dict]) -> None:
    lines = methods_outcome.methods_table(rows).splitlines()
    assert lines[2] == (
        "| camvid dusk | fixmatch | 37.5 | +5.5 ± 0.5 | 55 % | 2 | 1.75 | 26.5 | -5.5 ± 0.5 |  |"
    )
    assert "| cac | 33.0 | +3.0 | 30 % | 1 | 4.00 |  |  | 1 run, 4.00 h |" in lines[4]
    assert "| supervised | 32.0 |  |  | 2 | 1.00 | 32.0 |  |  |" in lines[5]
    assert lines[6] == "| camvid dusk | control |  |  |  |  | 2.50 |  |  | 2 runs, 5.00 h |"
    assert "learning rate has not decayed" in "\n".join(lines[7:])
    assert "Sorted by the gain after equal steps." in lines[8]
    assert "our reading" not in lines[-1]
    assert "ecs: our reading" in methods_outcome.methods_table([rows[0] | {"method": "ecs"}])


def test_hours_are_a_line_with_a_knee(trainer: Trainer) -> None:
    words = [*trainer.words, "--methods", "all", "--", "--iterations", "8", "--warmup", "2"]
    options = compare.parse(words)
    hours = HOURS | {"cac": Hours(4.0, 0.5), "control": Hours(2.5, None)}
    found = pace.paces(options.arms, hours, options)
    assert found["supervised"] == Pace((0, 8), (0, 1))
    cac = found["cac"]
    assert cac.hours_at(2) == pytest.approx(0.5) and cac.hours_at(8) == pytest.approx(4)
    assert cac.hours_at(5) == pytest.approx(0.5 + 3.5 / 2)
    assert cac.iteration_at(0.5 + 3.5 / 2) == pytest.approx(5)
    assert found["control"].hours_at(2) == pytest.approx(0.25)  # at the speed of supervised
    # Measured when the machine took twice as long.
    busy = Hours(6.0, 0.5, supervised=2.0)
    slow = pace.paces(
        options.arms, HOURS | {"supervised": busy._replace(whole=1), "cac": busy}, options
    )
    assert slow["cac"].hours == pytest.approx((0, 0.25, 3))
    assert cac.iteration_at(9) == 8
    student = found["self_training"]
    assert student.hours_at(0) == 1 and student.hours_at(8) == pytest.approx(2.5)
    assert student.iteration_at(0.5) == 0
    assert pace.paces(options.arms, {"cac": Hours(4.0)}, options) == {}


def test_alone_arms_take_cacs_warm_up_or_their_own(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another method's steps without unlabeled images cost is not the cost of supervised."""
    asked = []

    def seconds(words: list[str], options: object) -> dict[str, float | None]:
        method = words[words.index("--method") + 1]
        asked.append(method)
        labeled = {"supervised": 1.0, "cac": 2.0, "fixmatch": 9.0, "self_training": 9.0}[method]
        return {"labeled": labeled, "both": None if method == "supervised" else 10.0}

    monkeypatch.setattr(plan, "step_seconds", seconds)

    def hours(methods: str) -> dict[str, Hours]:
        asked.clear()
        words = [*trainer.words, "--methods", methods, "--", "--iterations", "3600"]
        options = compare.parse(words)
        jobs = [(arm, "1/2", 0) for arm in options.arms]
        return plan.planned_hours(jobs, options, failed)

    failed: dict[str, str] = {}

    assert hours("fixmatch")["supervised"] == Hours(1, 0, 1) and asked == ["fixmatch", "supervised"]
    assert hours("self_training,cac")["supervised_all"] == Hours(2, 0, 2)
    assert sorted(asked) == ["cac", "cac", "self_training"]

    assert failed == {}


def test_a_method_that_cannot_run_stops_no_other(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cannot = {"fixmatch"}

    def seconds(words: list[str], options: object) -> dict[str, float]:
        if words[words.index("--method") + 1] in cannot:
            raise RunError("ten steps ended with code 2: boom")
        return {"labeled": 1.0, "both": 2.0}

    monkeypatch.setattr(plan, "step_seconds", seconds)
    monkeypatch.setattr(compare, "plan", plan.plan)
    monkeypatch.setattr(compare, "plot_methods", lambda results, path, paces: None)
    monkeypatch.setattr(compare, "draw_sheet", lambda jobs, options, path: None)
    words = [*trainer.words, "--methods", "fixmatch,self_training", "--seeds", "0"]
    options = compare.parse([*words, "--", "--iterations", "4"])
    assert compare.compare(options) == 1
    assert capsys.readouterr().err == "error: fixmatch: ten steps ended with code 2: boom\n"
    done = ["supervised", "supervised_all", "self_training"]
    assert [label.split()[0] for label in trainer.trained] == done
    there = [run["method"] for run in trainer.record()["runs"]]
    assert sorted(there) == sorted([*done, "supervised_adapted"])
    cannot.add("supervised")
    options = compare.parse([*words, "--name", "none", "--", "--iterations", "8"])
    assert compare.compare(options) == 1 and len(trainer.trained) == len(done)


def test_the_steps_of_self_training_are_measured_with_made_up_labels(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "STEPS", 1)
    monkeypatch.setattr(step_time, "WARM_UP", 1)
    made, optimize = [], step_time.Trainer.optimize

    def kept(trainer: step_time.Trainer, step: Step) -> Batch:
        made.append(trainer)
        return optimize(trainer, step)

    monkeypatch.setattr(step_time.Trainer, "optimize", kept)
    file = tmp_path / "time.json"
    words = f"{file} --dataset folder --data-dir {folder_data} --method self_training --device cpu"
    words += " --network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --workers 0"
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words.split(), "--iterations", "7"])
    step_time.main()
    found = json.loads(file.read_text())
    assert found["labeled"] > 0 and found["both"] > 0
    assert len(made) == 4 and made[0].iteration == 6  # the last step, with all losses
    assert len(made[0].pseudo.samples) == 3
    assert all(sample.mask is not None for sample in made[0].pseudo.samples)


def test_curves_against_hours(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    compare.parse([*trainer.words, "--methods", "all"])
    drawn: dict[str, list] = {}
    plot = axes.Axes.plot

    def kept(self, steps, values, **words):
        drawn.setdefault(words.get("label", ""), []).append((list(steps), list(values)))
        return plot(self, steps, values, **words)

    monkeypatch.setattr(axes.Axes, "plot", kept)
    picture = tmp_path / "curves.png"
    methods_outcome.plot_methods(results(), picture, PACES)
    assert picture.stat().st_size > 0
    by_step, by_hour = drawn["fixmatch (mean of 2)"]
    assert by_step[0] == [4, 6, 8]
    np.testing.assert_allclose(by_hour[0], [0.75, 1.25, 1.75])
    np.testing.assert_allclose(by_hour[1], [0.21, 0.32, 0.375])
    # The hours of these are not known.
    assert len(drawn["supervised_all (mean of 2)"]) == 1
