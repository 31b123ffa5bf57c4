"""train/classify.py: from image labels to pseudo masks, on a toy city of few images."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import write_folder
from PIL import Image, PngImagePlugin

from cac_fast.train import checkpoint, classify, main
from cac_fast.train.config import Config
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.toycity import dataset
from cac_fast.train.distributed import World
from cac_fast.train.log import read_metrics
from cac_fast.train.weak import scores
from cac_fast.train.weak.labels import ImageLabels
from cac_fast.train.weak.masks import MaskWriter
from cac_fast.train.weak.training import ClassifierRun

QUICK = (
    "--backbone mobilenet_v2 --crop-size 64 --batch-size 2 --iterations 6 --eval-every 4 "
    "--save-every 100 --log-every 1 --workers 0 --device cpu --cam-scales 1,0.5"
).split()
COUNTS = {"LABELED": 2, "UNLABELED": 3, "VAL": 2, "TEST": 1}


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, count in COUNTS.items():
            patch.setattr(dataset, name, count)
        root = tmp_path_factory.mktemp("city")
        open_data("toycity", root)
    return root


def run(city: Path, output: Path, *more: object, code: int = 0) -> Path:
    words = ["--dataset", "toycity", "--data-dir", city, "--output", output, *QUICK, *more]
    if "--image-labels" not in more:
        words += ["--image-labels", "from-masks"]
    assert classify.main([str(word) for word in words]) == code
    return output


@pytest.fixture(scope="module")
def finished(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(city, tmp_path_factory.mktemp("run"))


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    files = sorted((folder / "masks").rglob("*"))
    return {
        path.relative_to(folder / "masks").as_posix(): np.array(Image.open(path))
        for path in files
        if path.is_file()
    }


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "masks").rglob("*.png")}


# ---- the whole command


def test_files_of_a_run(city: Path, finished: Path) -> None:
    data = open_data("toycity", city)
    train = data.splits["train"]
    masks = masks_of(finished)
    assert list(masks) == [f"{sample.name}.png" for sample in train] and len(masks) == 5
    pixels = np.zeros(256, np.int64)
    for sample, mask in zip(train, masks.values(), strict=True):
        truth = data.read_mask(sample.mask)
        assert mask.shape == truth.shape and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {*np.unique(truth), 255}
        pixels += np.bincount(mask.ravel(), minlength=256)
    with Image.open(finished / "masks" / next(iter(masks))) as file:
        colors = np.array(file.getpalette()).reshape(-1, 3)
        assert file.mode == "P" and len(colors) == 256
    assert colors[: data.num_classes].tolist() == [list(color) for color in data.palette]
    lines = read_metrics(finished / "metrics.jsonl")
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "images_per_s"} <= line.keys() for line in train_lines)
    rates = [line["lr"] for line in train_lines]
    assert rates == pytest.approx([0.01 * (1 - step / 6) ** 0.9 for step in range(6)])
    groups = checkpoint.read(finished / "last.pt")["optimizer"]["param_groups"]
    assert [group["base_lr"] for group in groups] == [0.01, 0.1]
    assert [group["momentum"] for group in groups] == [0.9, 0.9]
    val = [line for line in lines if line["kind"] == "val"]
    assert [line["iteration"] for line in val] == [4, 6]
    assert all({"map", "f1", "ap"} <= line.keys() for line in val)
    about = json.loads((finished / "pseudo.json").read_text())
    assert about["labels_read_from_masks"] == about["images"] == about["with_truth"] == 5
    assert [item["pixels"] for item in about["classes"]] == pixels[: data.num_classes].tolist()
    assert about["covered"] == pytest.approx(1 - pixels[255] / pixels.sum())
    assert about["settings"] == {"foreground": 0.3, "background": 0.05, "scales": [1.0, 0.5]}
    height, width = truth.shape
    assert Image.open(finished / "sheet.png").size == (4 * width, 5 * height)


def test_what_is_finished_is_kept(
    city: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before, masks = times_of(finished), masks_of(finished)
    about = (finished / "pseudo.json").read_text()
    monkeypatch.setattr(MaskWriter, "maps", lambda *_: pytest.fail("a map was made anew"))
    run(city, finished)
    assert "is trained already" in capfd.readouterr().out
    assert times_of(finished) == before
    assert (finished / "pseudo.json").read_text() == about
    monkeypatch.undo()
    no_file, half_a_file, wrong_size, *_ = lost = list(before)[:3]
    no_file.write_bytes(no_file.read_bytes()[:40])
    half_a_file.write_bytes(half_a_file.read_bytes()[:-100])  # with the key, but not all pixels
    with Image.open(wrong_size) as mask:  # as of an image that was replaced
        texts = PngImagePlugin.PngInfo()
        texts.add_text("key", mask.info["key"])
        mask.crop((0, 0, 8, 8)).save(wrong_size, pnginfo=texts)
    run(city, finished)
    after = times_of(finished)
    assert [path for path in before if after[path] != before[path]] == lost
    assert (finished / "pseudo.json").read_text() == about
    np.testing.assert_equal(masks_of(finished), masks)
    # Other thresholds need no other network.
    weights = checkpoint.read(finished / "last.pt")["method"]
    run(city, finished, "--cam-foreground", 1, "--cam-background", 0)
    assert all(value != after[path] for path, value in times_of(finished).items())
    covered = json.loads((finished / "pseudo.json").read_text())["covered"]
    assert covered == 0 < json.loads(about)["covered"]  # no map reaches 1
    again = checkpoint.read(finished / "last.pt")["method"]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    run(city, finished)
    assert (finished / "pseudo.json").read_text() == about


def test_a_stopped_run_ends_with_the_same_bits(
    city: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = ClassifierRun._optimize

    def stopped(self: ClassifierRun, step: Any) -> torch.Tensor:
        if self.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(self, step)

    monkeypatch.setattr(ClassifierRun, "_optimize", stopped)
    with pytest.raises(SystemExit) as caught:
        run(city, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "masks").exists()
    monkeypatch.undo()
    run(city, tmp_path)
    whole, parts = (checkpoint.read(folder / "last.pt") for folder in (finished, tmp_path))
    assert whole["method"].keys() == parts["method"].keys()
    assert all(torch.equal(value, parts["method"][name]) for name, value in whole["method"].items())
    np.testing.assert_equal(masks_of(tmp_path), masks_of(finished))
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (finished, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_statistics_of_loaded_weights_are_kept(city: Path, finished: Path, tmp_path: Path) -> None:
    state = checkpoint.read(finished / "last.pt")["method"]
    mine = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    torch.save(mine, tmp_path / "weights.pth")
    run(city, tmp_path / "run", "--weights", tmp_path / "weights.pth", "--iterations", 1)
    after = checkpoint.read(tmp_path / "run/last.pt")["method"]
    for name in state:
        kind = name.rpartition(".")[2]
        if kind in ("running_mean", "running_var"):
            assert torch.equal(state[name], after[name])
        elif kind == "weight":
            assert not torch.equal(state[name], after[name])


def test_labels_of_a_file_decide(
    city: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = open_data("toycity", city).splits["train"]
    file = tmp_path / "labels.txt"
    file.write_text(f"{train[0].name} road car\n{train[3].name}\n")
    run(city, tmp_path / "run", "--image-labels", file, "--iterations", 1)
    masks = masks_of(tmp_path / "run")
    assert list(masks) == [f"{train[0].name}.png", f"{train[3].name}.png"]
    assert set(np.unique(masks[f"{train[0].name}.png"])) <= {0, 5, 255}
    assert set(np.unique(masks[f"{train[3].name}.png"])) == {255}  # no class, no background
    said = capfd.readouterr().out
    assert "2 images, 3 others have none" in said and "read from their masks" not in said
    file.write_text(f"{train[0].name} road\n{train[3].name}\n")
    run(city, tmp_path / "run", "--image-labels", file, "--iterations", 1, code=2)
    assert "other or otherwise labeled images" in capfd.readouterr().err


def test_epochs_count_the_labeled_images(city: Path, tmp_path: Path) -> None:
    words = ["--dataset", "toycity", "--data-dir", city, "--output", tmp_path / "run"]
    words += ["--image-labels", "from-masks", *QUICK, "--epochs", 2]
    words = [word for word in map(str, words) if word not in ("--iterations", "6")]
    assert classify.main(words) == 0
    assert checkpoint.read(tmp_path / "run/last.pt")["iteration"] == 5  # 2 x 5 images by twos


def test_an_unreadable_image_gets_no_mask(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "data")
    (root / "images/train/t05.png").write_bytes(b"no image")
    lines = "".join(f"t{index:02d} car\n" for index in range(8))
    (tmp_path / "labels.txt").write_text(lines)
    words = ["--dataset", "folder", "--data-dir", root, "--output", tmp_path / "run", *QUICK]
    words += ["--image-labels", tmp_path / "labels.txt"]
    assert classify.main([str(word) for word in words]) == 0
    assert "t05.png" in capfd.readouterr().err
    assert list(masks_of(tmp_path / "run")) == [f"t{i:02d}.png" for i in range(8) if i != 5]
    about = json.loads((tmp_path / "run/pseudo.json").read_text())
    assert (about["unreadable"], about["with_truth"]) == (1, 4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--epochs", 2), ("--epochs and --iterations",)),
        (("--cam-background", 0.5), ("--cam-background 0.5", "--cam-foreground 0.3", "lower it")),
        (("--cam-foreground", 1.5), ("--cam-foreground 1.5", "from 0 to 1")),
        (("--cam-scales", "1,x"), ("--cam-scales 1,x",)),
        (("--cam-scales", "0"), ("--cam-scales 0",)),
        (("--crop-size", 60), ("--crop-size 60", "use 56 or 64")),
        (("--image-labels", "nowhere.txt"), ("nowhere.txt does not exist",)),
        (("--learning-rat", 1), ("did you mean --learning-rate?",)),
        (("--learning-rate", 0.5), ("other settings", "learning_rate")),
        (("--weights", "nowhere.pth"), ("other settings", "weights")),
    ],
)
def test_bad_input_is_one_line(
    city: Path,
    finished: Path,
    capfd: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    run(city, finished, *more, code=2)
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_folder_of_the_other_program_is_refused(
    city: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--dataset toycity --data-dir {city} --method supervised --iterations 2 --batch-size 2"
    words += " --backbone mobilenet_v2 --crop-size 32 --workers 0 --device cpu --output"
    assert main.main([*words.split(), str(tmp_path / "run")]) == 0
    run(city, tmp_path / "run", code=2)
    assert main.main([*words.split(), str(finished)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [
        f"{folder} holds a run with other settings" in line
        for folder, line in zip((tmp_path / "run", finished), lines, strict=True)
    ] == [True, True], lines


def test_torchrun_is_refused(
    city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(city, tmp_path, code=2)
    assert "classify is a single process" in capfd.readouterr().err


def test_batches_have_the_labels_of_their_images(tmp_path: Path) -> None:
    """Images of one color each, whose red says which labels they have; smaller than the crop."""
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("0 a 1 1 1\n1 background 2 2 2\n2 b 3 3 3\n3 c 4 4 4\n")
    by_red = {10: (0,), 100: (2, 3), 200: (), 250: (3,)}
    for red in by_red:
        pixels = np.full((20, 40, 3), red, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/train/{red:03d}.png")
    data = open_data("folder", tmp_path)
    labels = ImageLabels(data.splits["train"], tuple(by_red.values()), "by hand")
    config = Config.of(
        backbone="mobilenet_v2", crop_size=48, batch_size=3, iterations=4, workers=0,
        labeled_scale=(1.0, 1.0), output=str(tmp_path / "run"),
    )  # fmt: skip
    run = ClassifierRun(config, World(0, 1, torch.device("cpu")), data, labels)
    seen = set()
    for step in run._steps():
        images, shown, targets = (step.labeled[name] for name in ("image", "shown", "target"))
        for image, place, target in zip(images, shown, targets, strict=True):
            (red,) = image[:, place].unique().tolist()
            assert place.sum() == 16 * 40  # whole cells of 8 pixels
            assert (image[0, ~place] == red).sum() == 4 * 40
            assert target.tolist() == [float(index in by_red[red]) for index in (0, 2, 3)]
            seen.add(red)
    assert seen == set(by_red)


# ---- scores of the network


def test_average_precision_equals_a_loop_over_thresholds() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 5, 40):
        values, truth = rng.integers(0, 8, count) / 8, rng.random(count) < 0.4
        truth[0] = True
        expected, recall = 0.0, 0.0
        for threshold in sorted(set(values), reverse=True):
            chosen = values >= threshold
            hits = (chosen & truth).sum()
            expected += (hits / truth.sum() - recall) * hits / chosen.sum()
            recall = hits / truth.sum()
        assert scores.average_precision(values, truth) == pytest.approx(expected)
    assert scores.average_precision(np.array([0.9, 0.5, 0.1]), np.array([True, False, True])) == (
        pytest.approx((1 + 2 / 3) / 2)
    )


def test_scores_of_classes_without_a_positive_are_none() -> None:
    probabilities = np.array([[0.9, 0.2, 0.5], [0.1, 0.7, 0.9]])
    truth = np.array([[True, False, False], [False, False, True]])
    found = scores.classification_scores(probabilities, truth)
    assert found == {"map": 1.0, "f1": pytest.approx(2 * 2 / 5), "ap": [1.0, None, 1.0]}
    empty = scores.classification_scores(np.zeros((2, 1)), np.zeros((2, 1), bool))
    assert empty == {"map": None, "f1": 0.0, "ap": [None]}
