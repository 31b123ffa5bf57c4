"""The comparison: smaller copies of data, what it writes when, and what it says when runs fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_folders import one_line, write_folder, write_image, write_mask
from PIL import Image

from accuracy import compare, demo
from accuracy.shrink import shrunken
from cac_fast.train import checkpoint
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import open_data
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "here" / "set", labeled=1, unlabeled=0)


def halves(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 12), Image.Resampling.BOX))


def test_shrunken_holds_all_that_the_source_does(source: Path, tmp_path: Path) -> None:
    for name in ("a.jpeg", "b.JPG", "c.d.bmp"):
        write_image(source / "images/train" / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(source / "images/train/b.JPG").save(source / "images/train/e.jpg", exif=turned)
    write_mask(source / "masks/train/e.png", height=32, width=24)
    data = open_data("folder", shrunken(source, 2, tmp_path))
    before = open_data("folder", source)
    assert data.classes == before.classes
    for split, samples in before.splits.items():
        assert [item.name for item in data.splits[split]] == [item.name for item in samples]
        for sample, copy in zip(samples, data.splits[split], strict=True):
            image, small = read_image(sample.image), read_image(copy.image)
            size = (image.width // 2, image.height // 2)
            expected = image.resize(size, Image.Resampling.BOX)
            np.testing.assert_array_equal(np.asarray(small), np.asarray(expected))
            if sample.mask is None:
                assert copy.mask is None
                continue
            mask = Image.fromarray(before.read_mask(sample.mask))
            np.testing.assert_array_equal(
                data.read_mask(copy.mask), np.asarray(mask.resize(size, Image.Resampling.NEAREST))
            )
    assert (data.root / "images/train/e.png").is_file()
    # What was made until now from a PNG.
    plain = source / "images/train/t00.png"
    found = np.asarray(Image.open(data.root / "images/train/t00.png"))
    np.testing.assert_array_equal(found, halves(Image.open(plain)))


def test_shrunken_follows_its_source(source: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "there" / "set", labeled=2, unlabeled=0)
    target = shrunken(source, 2, tmp_path)
    assert len({target, shrunken(other, 2, tmp_path), shrunken(source, 4, tmp_path)}) == 3
    image, copy = source / "images/train/t00.png", target / "images/train/t00.png"
    made = copy.stat().st_ino
    shrunken(source, 2, tmp_path)
    assert copy.stat().st_ino == made
    write_image(image, seed=9)
    os.utime(image, ns=(1, copy.stat().st_mtime_ns + 10**9))
    write_image(source / "images/train/gone.png")
    shrunken(source, 2, tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(copy)), halves(Image.open(image)))
    (source / "images/train/gone.png").unlink()
    shrunken(source, 2, tmp_path)
    assert [item.name for item in open_data("folder", target).splits["train"]] == ["t00"]


def test_killed_copy_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(image: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            shrunken(source, 2, tmp_path)
    data = open_data("folder", shrunken(source, 2, tmp_path))
    assert read_image(data.splits["train"][0].image).size == (16, 12)


def test_shrink_refuses(source: Path, tmp_path: Path) -> None:
    def parse(*arguments: object) -> None:
        compare.parse([str(item) for item in arguments])

    for dataset in ("cityscapes", "voc", "toycity"):
        with pytest.raises(InputError) as error:
            parse("--dataset", dataset, "--data-dir", source, "--shrink", 2)
        one_line(error, "--shrink", dataset, "--dataset folder")
    with pytest.raises(InputError) as error:
        parse("--dataset", "folder", "--data-dir", source, "--shrink", 0)
    one_line(error, "--shrink 0")
    with pytest.raises(InputError) as error:
        parse("--dataset", "folder", "--shrink", 2)
    one_line(error, "--data-dir")
    write_mask(source / "masks/train/t00.png", height=25)
    with pytest.raises(InputError) as error:
        shrunken(source, 2, tmp_path)
    one_line(error, "32 x 25", "32 x 24")


class Trainer:
    """In place of the commands: leaves what they leave in a run folder; fails where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path, output: Path) -> None:
        self.output, self.iteration = output, 4
        self.fails: str | None = None
        self.commit = "first"
        self.trained: list[str] = []
        words = "--dataset folder --shares 1/2 --seeds 0,1 --threads 1"
        folders = ["--runs", output / "runs", "--results", output / "results"]
        self.words = [*words.split(), "--data-dir", str(source), *map(str, folders)]
        self.options = compare.parse([*self.words, "--", "--iterations", "4"])
        monkeypatch.setattr(compare, "run", self.run)
        monkeypatch.setattr(compare, "plot", lambda results, path: None)
        monkeypatch.setattr(compare, "plan", lambda jobs, options: {})
        monkeypatch.setattr(compare, "facts", lambda device: {"commit": self.commit})

    def run(self, command: list[str], threads: int, label: str) -> None:
        self.trained.append(label)
        if label == self.fails:
            raise compare.RunError(f"{label} ended with code 1: boom")
        folder = Path(command[command.index("--output") + 1])
        lines = [{"kind": "val", "iteration": step, "miou": step / 10} for step in (2, 4)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "itera')
        config = {"iterations": 4}
        checkpoint.write(folder / "last.pt", {"iteration": self.iteration, "config": config})

    def record(self) -> dict:
        path = self.output / "results/compare.json"
        return json.loads(path.read_text()) if path.is_file() else {"runs": []}

    def commits(self) -> list[list[str]]:
        return [run["commits"] for run in self.record()["runs"]]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> Trainer:
    return Trainer(monkeypatch, source, tmp_path)


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
            raise compare.RunError("not begun")
        while len(trainer.record()["runs"]) < 2:
            time.sleep(0.01)
        folder = Path(command[command.index("--output") + 1])
        lines = [
            {"kind": "val", "iteration": 2, "miou": 0.2},
            {"kind": "train", "iteration": 3, "loss": 1.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.kill(os.getpid(), signal.SIGTERM)
        raise compare.RunError(f"{label} ended with code 143")

    monkeypatch.setattr(compare, "run", run)
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
        "from accuracy import compare\n"
        "from lib import running\n"
        "running.ROOT = Path.cwd()\n"
        "with compare.programs.stopped_by_signals(), ThreadPoolExecutor(1) as pool:\n"
        "    for name in ('first', 'second'):\n"
        "        last = pool.submit(compare.run, ['train.py', name], 1, name)\n"
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


def scoring(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> list[list[str]]:
    """Let the trainer's evaluations leave results, and keep the trainings' words."""
    train, commands = trainer.run, []

    def run(command: list[str], threads: int, label: str) -> None:
        if command[0] == "train/evaluate.py":
            result = {"miou": 0.5, "iou": [0.5, 0.5]}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
            return
        commands.append(command)
        train(command, threads, label)

    monkeypatch.setattr(compare, "run", run)
    return commands


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_arms_differ_in_masks_and_weight(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(2):
        folder = tmp_path / f"splits/{number}/dusk"
        folder.mkdir(parents=True)
        (folder / "labeled.txt").write_text(f"a{number}\n")
        (folder / "unlabeled.txt").write_text("b\nc")
    commands = scoring(monkeypatch, trainer)
    words = ["--lists", tmp_path / "splits/{list}/dusk", "--arms", ",".join(compare.ARMS)]
    arguments = [*trainer.words, *words, "--seeds", "3", "--", "--dc-weight", "0.2"]
    assert compare.compare(compare.parse([str(word) for word in arguments])) == 0
    supervised, supervised_all, control, cac = commands
    assert [value(command, "--method") for command in commands] == [
        *["supervised"] * 2,
        *["cac"] * 2,
    ]
    labeled = tmp_path / "splits/1/dusk/labeled.txt"  # 3 modulo 2
    for command in (supervised, control, cac):
        assert value(command, "--labeled") == str(labeled)
        assert value(command, "--unlabeled") == str(labeled.with_name("unlabeled.txt"))
    assert "--unlabeled" not in supervised_all
    assert Path(value(supervised_all, "--labeled")).read_text().split() == ["a1", "b", "c"]
    assert control[-4:] == ["--dc-weight", "0.2", "--dc-weight", "0"]
    assert cac[-2:] == ["--dc-weight", "0.2"]
    assert [run["share"] for run in trainer.record()["runs"]] == ["dusk"] * 4
    with pytest.raises(InputError) as error:
        compare.compare(compare.parse([*map(str, arguments[:-5]), "--lists", "nowhere"]))
    one_line(error, "--lists", "nowhere", "labeled.txt")


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
    assert not compare.is_finished(job, longer)
    assert compare.compare(longer) == 0
    record = json.loads((trainer.output / "results/longer.json").read_text())
    assert [run["commits"] for run in record["runs"]] == [["first", "second"]] * 4
    trainer.iteration = 8
    assert compare.compare(longer) == 0
    assert compare.is_finished(job, longer)


def test_a_record_takes_runs_of_its_experiment_alone(
    trainer: Trainer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring(monkeypatch, trainer)
    write_image(source / "images/test/x.png")
    write_mask(source / "masks/test/x.png")
    for place in ("a/0", "a/1", "b/0"):
        (tmp_path / place / "dusk").mkdir(parents=True)
        for name in compare.LISTS:
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
        monkeypatch.setattr(compare, "shrunken", lambda folder, factor: folder)
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


def test_hours_are_planned_from_measured_steps(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--dataset folder --data-dir {source} --arms supervised,cac --seeds 0,1 --threads 1"
    rest = "--network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --workers 0"
    rest += " --iterations 3600 --warmup 600 --device cpu"
    options = compare.parse([*words.split(), "--runs", str(tmp_path), "--", *rest.split()])
    jobs = [(arm, "full", seed) for seed in (0, 1) for arm in ("supervised", "cac")]
    hours = compare.plan(jobs, options)
    steps = json.loads((tmp_path / "step_time.json").read_text())
    assert 0 < steps["labeled"] < steps["both"]
    assert hours["supervised"] == pytest.approx(steps["labeled"])
    assert hours["cac"] == pytest.approx((steps["labeled"] + 5 * steps["both"]) / 6)
    assert f"planned: {2 * sum(hours.values()):.1f} hours" in capsys.readouterr().out
    for job in jobs:
        state = {"iteration": 3600, "config": {"iterations": 3600}}
        compare.run_folder(job, options).mkdir()
        checkpoint.write(compare.run_folder(job, options) / "last.pt", state)
    assert compare.plan(jobs, options) == {}


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


def test_demo_answers_an_outdated_toy_city_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("something else\n")
    monkeypatch.setattr(demo, "DATA", tmp_path)
    assert run_command(demo.main) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
