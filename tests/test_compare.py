"""The comparison: what it runs, what it writes when, and what it says when runs fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compared
import pytest
from compared import Trainer, scoring
from data_folders import one_line, write_image, write_mask

from accuracy import compare, demo, plan, runs
from accuracy.arms import ARMS, Arm
from cac_fast.train import checkpoint
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError
from lib.running import RunError

source, trainer = compared.source, compared.trainer


def test_results_are_written_after_each_run(
    trainer: Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, report = [], compare.report
    monkeypatch.setattr(
        compare, "report", lambda runs, rows: tables.append(len(runs)) or report(runs, rows)
    )
    trainer.fails = "supervised 1/2 seed 1"
    assert compare.compare(trainer.options) == 1
    assert tables == [1, 2, 3, 3]
    assert len(trainer.trained) == 4
    names = [(run["method"], run["seed"]) for run in trainer.record()["runs"]]
    assert names == [("supervised", 0), ("cac", 0), ("cac", 1)]
    # A cut last line of metrics.jsonl is passed over, as the trainer does.
    assert trainer.record()["runs"][0]["curve"] == [[2, 0.2], [4, 0.4]]
    text = (trainer.output / "results/compare.md").read_text()
    assert "| cac | 40.0 ± 0.0 |" in text
    assert "gain" not in text  # of other seeds
    out = capsys.readouterr()
    assert out.err == "error: supervised 1/2 seed 1 ended with code 1: boom\n"
    assert "warning" not in out.out
    trainer.fails = None
    assert compare.compare(trainer.options) == 0
    assert len(trainer.record()["runs"]) == 4
    assert "| gain | +0.0 |" in (trainer.output / "results/compare.md").read_text()


def test_runs_keep_the_commits_they_were_trained_with(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.iteration = 2  # stopped half-way
    compare.compare(trainer.options)
    assert trainer.commits() == [["first"]] * 4
    trainer.commit, trainer.iteration = "second", 4
    compare.compare(trainer.options)
    trainer.commit = "third"
    assert "warning: the runs were trained with several commits" in capsys.readouterr().out
    compare.compare(trainer.options)  # only reads what is finished
    assert trainer.commits() == [["first", "second"]] * 4
    (trainer.options.runs / "cac-1_2-seed0/compare.json").unlink()
    compare.compare(trainer.options)
    assert trainer.commits()[1] == ["unknown"]
    trainer.options.rest = ["--iterations", "4", "--restart"]
    compare.compare(trainer.options)
    assert trainer.commits() == [["third"]] * 4


def test_runs_keep_the_machines_they_were_trained_on(trainer: Trainer) -> None:
    def machines() -> list[list[str]]:
        return [[at["device"] for at in run["machines"]] for run in trainer.record()["runs"]]

    trainer.iteration = 2
    compare.compare(trainer.options)
    trainer.device, trainer.iteration = "there", 4
    compare.compare(trainer.options)
    trainer.device = "elsewhere"
    compare.compare(trainer.options)  # only reads what is finished
    assert machines() == [["here", "there"]] * 4
    # A record and folders that were made before: one machine is noted for all.
    path = trainer.output / "results/compare.json"
    record = json.loads(path.read_text())
    for run in record["runs"]:
        del run["machines"]
    path.write_text(json.dumps({**record, "device": "there", "torch": "2.11.0"}))
    for note in trainer.options.runs.glob("*/compare.json"):
        note.write_text(json.dumps({"commits": ["first"]}))
    words = [*trainer.words, "--seeds", "0,2", "--", "--iterations", "4"]
    compare.compare(compare.parse(words))
    assert machines() == [*[["there"]] * 4, *[["elsewhere"]] * 2]
    assert trainer.record()["runs"][0]["machines"] == [{"device": "there", "torch": "2.11.0"}]
    assert "device" not in trainer.record()


def test_unfinished_runs_are_written_too(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal comes in the third run; the fourth does not begin."""
    plain = trainer.run

    def run(command: list[str], threads: int, label: str) -> None:
        if len(trainer.trained) < 2:
            return plain(command, threads, label)
        trainer.trained.append(label)
        if len(trainer.trained) == 4:
            raise RunError("not begun")
        while len(trainer.record()["runs"]) < 2:
            time.sleep(0.01)
        folder = Path(command[command.index("--output") + 1])
        lines = [
            {"kind": "val", "iteration": 2, "miou": 0.2},
            {"kind": "train", "iteration": 3, "loss": 1.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.kill(os.getpid(), signal.SIGTERM)
        raise RunError(f"{label} ended with code 143")

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(SystemExit) as stop:
        compare.compare(trainer.options)
    assert stop.value.code == 128 + signal.SIGTERM
    record = trainer.record()
    assert [(run["method"], run["seed"]) for run in record["runs"]] == [
        ("supervised", 0),
        ("cac", 0),
    ]
    assert record["unfinished"] == [
        {
            "method": "supervised",
            "share": "1/2",
            "seed": 1,
            "commits": ["first"],
            "iteration": 3,
            "curve": [[2, 0.2]],
        }
    ]
    assert "unfinished: supervised 1/2 seed 1 at iteration 3" in capsys.readouterr().out
    begun = runs.run_folder(("cac", "1/2", 1), trainer.options)
    assert runs.unfinished_run(("cac", "1/2", 1), trainer.options) is None
    begun.mkdir(exist_ok=True)
    (begun / "config.json").touch()
    assert runs.unfinished_run(("cac", "1/2", 1), trainer.options)["iteration"] == 0
    (begun / "config.json").unlink()
    text = (trainer.output / "results/compare.md").read_text()
    assert text.endswith("\n\nTo do: supervised 1 run; cac 1 run.\n")
    # A call that does not ask for it keeps it; it goes when it is finished.
    monkeypatch.setattr(runs, "run", plain)
    for seed, kept in (("0", record["unfinished"]), ("1", [])):
        words = [*trainer.words, "--seeds", seed, "--", "--iterations", "4"]
        assert compare.compare(compare.parse(words)) == 0
        assert trainer.record()["unfinished"] == kept


def test_a_stop_waits_until_the_trainings_have_saved(tmp_path: Path) -> None:
    """Sent to the whole group, as `timeout` does; it comes to a training once, and none follows."""
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "name, signals = sys.argv[1], []\n"
        "signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))\n"
        "pathlib.Path(f'{name}-begun').touch()\n"
        "while not signals:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "pathlib.Path(f'{name}-saved').write_text(str(len(signals)))\n"
        "sys.exit(128 + signals[0])\n"
    )
    (tmp_path / "compare_two.py").write_text(
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(compare.__file__).parents[1])!r})\n"
        "from lib import running\n"
        "running.ROOT = Path.cwd()\n"
        "with running.programs.stopped_by_signals(), ThreadPoolExecutor(1) as pool:\n"
        "    for name in ('first', 'second'):\n"
        "        last = pool.submit(running.run, ['train.py', name], 1, name)\n"
        "    last.result()\n"
    )
    command = [sys.executable, "compare_two.py"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "first-begun").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "first-saved").read_text() == "1"
    assert not (tmp_path / "second-begun").exists()


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_a_variant_is_an_arm_with_more_options(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("light", "lighter"):
        monkeypatch.setitem(ARMS, name, ARMS["control"])
        del ARMS[name]  # both are gone again after the test
    commands = scoring(monkeypatch, trainer)
    variants = ["--variant", "light=cac --dc-weight 0.01", "--variant", "lighter=light --warmup 0"]
    words = [*trainer.words, "--arms", "supervised", *variants, "--seeds", "0"]
    for _ in range(2):  # the second call finds them in the record
        assert compare.compare(compare.parse([*words, "--", "--iterations", "4"])) == 0
    assert [run["method"] for run in trainer.record()["runs"]] == ["supervised", "light", "lighter"]
    assert trainer.record()["summary"][0]["lighter_gain"] == 0
    assert len({ARMS[arm].color for arm in ("control", "cac", "light", "lighter")}) == 4
    ends = [command[command.index("4") + 1 :] for command in commands[:3]]
    assert ends == [[], ["--dc-weight", "0.01"], ["--dc-weight", "0.01", "--warmup", "0"]]
    assert commands[2][commands[2].index("--method") + 1] == "cac"
    for wrong in ("cac", "light=cac", "x=gone", "a b=cac", "cac=cac --warmup 0"):
        with pytest.raises(InputError, match="--variant"):
            compare.parse([*words, "--variant", wrong])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--seed", "7"], "--seed: compare.py itself gives"),
        (["--", "--method=cac"], "--method=cac: compare.py itself gives"),
        (["--", "--output", "x"], "--output: compare.py itself gives"),
        (["--", "--labeled-share", "full"], "--labeled-share: compare.py itself gives"),
        (["--variant", "same_seed=cac --seed 7"], "--seed: compare.py itself gives"),
        (["--seeds", "0,0"], "--seeds 0,0: give different whole numbers between commas"),
        (["--seeds", "x"], "--seeds"),
    ],
)
def test_no_option_makes_a_run_another_than_it_is_called(
    words: list[str], message: str, trainer: Trainer
) -> None:
    with pytest.raises(InputError, match=message):
        compare.parse([*trainer.words, *words])


def test_arms_differ_in_masks_and_weight(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(2):
        folder = tmp_path / f"splits/{number}/dusk"
        folder.mkdir(parents=True)
        (folder / "labeled.txt").write_text(f"a{number}\n")
        (folder / "unlabeled.txt").write_text("b\nc")
    commands = scoring(monkeypatch, trainer)
    words = ["--lists", tmp_path / "splits/{list}/dusk", "--arms", ",".join(ARMS)]
    arguments = [*trainer.words, *words, "--seeds", "3", "--", "--dc-weight", "0.2"]
    assert compare.compare(compare.parse([str(word) for word in arguments])) == 0
    supervised, supervised_all, control, cac, fixmatch, both = commands[:6]
    assert [value(command, "--method") for command in commands[:6]] == [
        *["supervised"] * 2,
        *["cac"] * 2,
        *["fixmatch"] * 2,
    ]
    labeled = tmp_path / "splits/1/dusk/labeled.txt"  # 3 modulo 2
    for command in (supervised, control, cac, fixmatch, both):
        assert value(command, "--labeled") == str(labeled)
        assert value(command, "--unlabeled") == str(labeled.with_name("unlabeled.txt"))
    assert "--unlabeled" not in supervised_all
    assert Path(value(supervised_all, "--labeled")).read_text().split() == ["a1", "b", "c"]
    assert control[-4:] == ["--dc-weight", "0.2", "--dc-weight", "0"]
    assert cac[-2:] == ["--dc-weight", "0.2"]
    assert fixmatch[-2:] == ["--dc-weight", "0"] and both[-2:] == ["--dc-weight", "0.1"]
    for name, state, command in zip(
        ["supervised"] * 2 + ["cac"] * 2, ["last", "best"] * 2, commands[6:], strict=True
    ):
        folders = [trainer.options.runs / f"{arm}-dusk-seed3" for arm in (name, f"{name}_adapted")]
        source, output = (str(folder / f"{state}.pt") for folder in folders)
        assert command == ["train/adapt.py", "--checkpoint", source, "--output", output]
    assert [run["share"] for run in trainer.record()["runs"]] == ["dusk"] * len(ARMS)
    with pytest.raises(InputError) as error:
        compare.compare(compare.parse([*map(str, arguments[:-5]), "--lists", "nowhere"]))
    one_line(error, "--lists", "nowhere", "labeled.txt")


def test_adapted_networks_are_scored_and_noted_anew(
    trainer: Trainer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(source / "images/test/x.png")
    write_mask(source / "masks/test/x.png")
    found = {"last.pt": 0.1, "best.pt": 0.2}

    def scored(command: list[str]) -> float:
        path = Path(value(command, "--checkpoint"))
        of_test = 0.05 if "test" in command else 0.0
        return found[path.name] + of_test + 0.5 * path.parent.name.startswith("supervised_adapted")

    monkeypatch.setattr(trainer, "scored", scored)
    words = [*trainer.words, "--test", "--arms", "supervised,supervised_adapted", "--seeds", "0"]
    for commit in ("first", "second"):
        trainer.commit = commit
        assert compare.compare(compare.parse([*words, "--", "--iterations", "4"])) == 0
        base, adapted = trainer.record()["runs"]
        assert base["commits"] == ["first"] and adapted["commits"] == [commit]
    expected = {"val_last": 0.6, "val_best": 0.7, "test_last": 0.65, "test_best": 0.75}
    assert adapted["scores"] == pytest.approx(expected)
    assert base["scores"]["test_last"] == pytest.approx(0.15)
    assert adapted["curve"] == [[4, adapted["scores"]["val_last"]]]
    assert trainer.record()["summary"][0]["supervised_adapted_gain"] == pytest.approx(50)


def test_named_images_are_scored_by_themselves(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    write_image(source / "images/test/x.png")
    write_mask(source / "masks/test/x.png")
    (tmp_path / "dusk.txt").write_text("x\n")
    scoring(monkeypatch, trainer)
    words = [*trainer.words, "--test", "--names", tmp_path / "dusk.txt"]
    words = [str(word) for word in words]
    assert compare.compare(compare.parse(words)) == 0
    record = trainer.record()
    columns = [f"{part}_{state}" for part in ("test", "dusk") for state in ("last", "best")]
    assert list(record["runs"][0]["scores"]) == ["val_last", "val_best", *columns]
    assert list(record["runs"][0]["iou"]) == columns
    assert record["summary"][0]["scored_on"] == "dusk"
    assert record["summary"][0]["known"]["classes"] == [0, 1]
    (tmp_path / "dusk.txt").write_text("x\ny\n")
    with pytest.raises(InputError) as error:
        compare.compare(compare.parse(words))
    one_line(error, "dusk.txt line 2", "y")


@pytest.mark.parametrize(
    ("words", "title"), [([], "set"), (["--title", "set, random weights"], "set, random weights")]
)
def test_a_title_tells_experiments_apart(trainer: Trainer, words: list[str], title: str) -> None:
    assert compare.compare(compare.parse([*trainer.words, *words, "--", "--iterations", "4"])) == 0
    assert [row["setting"] for row in trainer.record()["summary"]] == [f"{title} 1/2"]


@pytest.mark.parametrize("name", ["day", "val", "test"])
def test_results_of_one_name_are_refused(trainer: Trainer, tmp_path: Path, name: str) -> None:
    files = [tmp_path / "a/day.txt", tmp_path / f"b/{name}.txt"]
    names = [word for file in files for word in ("--names", str(file))]
    with pytest.raises(InputError) as error:
        compare.parse([*trainer.words, *names])
    one_line(error, f"--names {files[1]}", repr(name), "rename")


def test_a_further_arm_is_one_line(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "match", Arm("fixmatch", "tab:red", more=("--momentum", "0.8")))
    write_image(trainer.options.folder / "images/test/x.png")
    write_mask(trainer.options.folder / "masks/test/x.png")
    commands = scoring(monkeypatch, trainer)
    words = [*trainer.words, "--test", "--arms", "supervised,supervised_all,match"]
    assert compare.compare(compare.parse(words)) == 0
    assert value(commands[-1], "--method") == "fixmatch"
    assert commands[-1][-2:] == ["--momentum", "0.8"]
    (row,) = trainer.record()["summary"]
    assert (row["match_gain"], row["match_seeds"], row["gain"], row["seeds"]) == (0.0, 2, None, 0)
    text = (trainer.output / "results/compare.md").read_text()
    assert "| headroom | control | gain | match | of the headroom |" in text


def test_hours_are_planned_from_measured_steps(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--dataset folder --data-dir {source} --arms supervised,cac --seeds 0,1 --threads 1"
    rest = "--network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --workers 0"
    rest += " --iterations 3600 --warmup 600 --device cpu"
    options = compare.parse([*words.split(), "--runs", str(tmp_path), "--", *rest.split()])
    jobs = [(arm, "full", seed) for seed in (0, 1) for arm in ("supervised", "cac")]
    hours = plan.plan(jobs, jobs, options, {})
    steps = json.loads((tmp_path / "step_time.json").read_text())
    assert 0 < steps["labeled"] < steps["both"]
    base = steps["labeled"]
    assert hours["supervised"] == pytest.approx((base, 0, base))
    whole = (steps["labeled"] + 5 * steps["both"]) / 6
    assert hours["cac"] == pytest.approx((whole, base / 6, base))
    assert (
        f"planned: {2 * sum(each.whole for each in hours.values()):.1f} hours"
        in capsys.readouterr().out
    )
    for job in jobs:
        state = {"iteration": 3600, "config": {"iterations": 3600}}
        runs.run_folder(job, options).mkdir()
        checkpoint.write(runs.run_folder(job, options) / "last.pt", state)
    assert plan.plan(jobs, jobs, options, {}) == {}


def test_scored_splits_must_hold_images(trainer: Trainer, source: Path) -> None:
    trainer.options.test = True
    with pytest.raises(InputError) as error:
        compare.compare(trainer.options)
    one_line(error, "test split", "--test")
    (source / "images/val/v00.png").unlink()
    with pytest.raises(InputError) as error:
        compare.compare(trainer.options)
    one_line(error, "val split", source)
    assert trainer.trained == []


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--seeds", 2)])
def test_demo_takes_no_arguments_and_trains_nothing_for_help(
    argument: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.compare, "compare", lambda _: pytest.fail("it trains"))
    try:
        assert run_command(lambda: demo.main([argument])) == code
    except SystemExit as ended:
        assert ended.code == code


def test_demo_answers_an_outdated_toy_city_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("something else\n")
    monkeypatch.setattr(demo, "DATA", tmp_path)
    assert run_command(demo.main) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
