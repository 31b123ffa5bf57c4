"""evaluate, predict and split as a user runs them, and what they say to bad input."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cac_fast.train import checkpoint, evaluate, load, predict, split
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.splits import select
from cac_fast.train.distributed import World
from cac_fast.train.evaluation import evaluate as evaluate_network
from cac_fast.train.inference import Predictor
from cac_fast.train.networks import build_network

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("road", "blue sky", "car")
PALETTE = ((128, 64, 128), (70, 130, 180), (0, 0, 142))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run python with these arguments, one thread, and check the exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    return done


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 56)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path
    )


def write_mask(path: Path, seed: int, size: tuple[int, int] = (40, 56)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), size)
    ).save(path)


def make_data(root: Path) -> Path:
    """A `folder` data set: six training images, five with masks, and three validation images."""
    for split_name, count in (("train", 6), ("val", 3)):
        for index in range(count):
            write_image(root / "images" / split_name / f"{index}.png", index)
            if (split_name, index) != ("train", 5):
                write_mask(root / "masks" / split_name / f"{index}.png", index)
    lines = [
        f"{index} {name} {' '.join(map(str, PALETTE[index]))}\n"
        for index, name in enumerate(CLASSES)
    ]
    (root / "classes.txt").write_text("".join(lines))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training writes it (of a network that was never trained)."""
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.manual_seed(0)
    state = {
        "network": build_network("deeplabv3plus", "mobilenet_v2", len(CLASSES)).state_dict(),
        "config": {
            "network": "deeplabv3plus",
            "backbone": "mobilenet_v2",
            "dataset": "folder",
            "crop_size": 64,
        },
        "classes": list(CLASSES),
        "palette": [list(color) for color in PALETTE],
        "iteration": 3,
        "best": None,
    }
    checkpoint.write(path, state)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs, one in a folder of its own, and something that is no photograph."""
    write_image(tmp_path / "photos" / "street.png", 0, (90, 130))
    write_image(tmp_path / "photos" / "day 1" / "a.b.JPG", 1)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden.png").write_text("no image")
    return tmp_path / "photos"


# ---- what they do


def test_evaluate_prints_and_writes_what_the_library_finds(
    data: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--checkpoint",
        trained,
        "--dataset",
        "folder",
        "--data-dir",
        data,
        "--device",
        "cpu",
        "--workers",
        0,
    ]
    assert evaluate.main([*map(str, arguments), "--json", str(tmp_path / "one.json")]) == 0
    printed = capfd.readouterr().out
    opened = open_data("folder", data)
    world = World(0, 1, torch.device("cpu"))
    expected = evaluate_network(
        load(trained).network, opened.splits["val"], opened, world, workers=0
    )
    found = json.loads((tmp_path / "one.json").read_text())
    assert {name: found[name] for name in expected} == expected
    assert (found["split"], found["images"], found["classes"]) == ("val", 3, list(CLASSES))
    rows = [line.rsplit(maxsplit=1) for line in printed.splitlines() if not line.startswith("-")]
    numbers = ["-" if iou is None else f"{iou:.4f}" for iou in expected["iou"]]
    assert rows == [
        ["class", "IoU"],
        *([name, number] for name, number in zip(CLASSES, numbers, strict=True)),
        ["mIoU", f"{expected['miou']:.4f}"],
        ["pixel accuracy", f"{expected['pixel_accuracy']:.4f}"],
    ]
    (tmp_path / "some.txt").write_text("2\n0\n")
    named = ["--names", tmp_path / "some.txt", "--split", "train", "--json", tmp_path / "some.json"]
    assert evaluate.main([*map(str, arguments), *map(str, named)]) == 0
    capfd.readouterr()
    some = json.loads((tmp_path / "some.json").read_text())
    train = opened.splits["train"]
    two = evaluate_network(load(trained).network, [train[0], train[2]], opened, world, workers=0)
    assert {name: some[name] for name in two} == two
    assert (some["split"], some["names"], some["images"]) == ("train", "some.txt", 2)
    assert found["names"] is None
    # Three images on two processes: the same numbers, printed once.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _evaluate_as_rank,
        (port, [*map(str, arguments), "--json", str(tmp_path / "two.json")], tmp_path),
        nprocs=2,
        start_method="fork",
    )
    assert json.loads((tmp_path / "two.json").read_text()) == found
    assert (tmp_path / "0.out").read_text() == printed
    assert (tmp_path / "1.out").read_text() == ""


def _evaluate_as_rank(rank: int, port: int, arguments: list[str], folder: Path) -> None:
    """The command in the environment that torchrun makes, without the seconds that it takes."""
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with (folder / f"{rank}.out").open("w") as file, contextlib.redirect_stdout(file):
        assert evaluate.main(arguments) == 0


def test_predict_writes_ids_and_overlays_and_skips_what_is_broken(
    photos: Path, trained: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    output = (
        photos / "predictions"
    )  # inside the images' folder, where a second run must not take it for input
    arguments = ["--checkpoint", trained, "--images", photos, "--output", output, "--device", "cpu"]
    done = run("-m", "cac_fast.train.predict", *arguments)
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "broken.jpg" in warnings[0]
    assert "2 images predicted, 1 skipped" in done.stdout
    written = sorted(
        path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()
    )
    assert written == ["day 1/a.b.png", "day 1/a.b_overlay.png", "street.png", "street_overlay.png"]

    photo, ids = Image.open(photos / "street.png"), Image.open(output / "street.png")
    assert ids.mode == "P" and ids.getpalette()[:9] == [
        value for color in PALETTE for value in color
    ]
    labels = load(trained).predict(photo)
    assert (np.asarray(ids) == labels).all()
    assert len(np.unique(labels)) > 1
    overlay = np.asarray(Image.open(output / "street_overlay.png")).astype(float)
    mixed = (np.asarray(photo).astype(float) + np.array(PALETTE)[labels]) / 2
    assert np.abs(overlay - mixed).max() <= 1

    former = (output / "street.png").read_bytes()
    assert predict.main([str(item) for item in arguments]) == 0
    assert (
        sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
        == written
    )
    assert (output / "street.png").read_bytes() == former


def test_predict_in_tiles(
    photos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    logits = Predictor.logits
    monkeypatch.setattr(
        Predictor,
        "logits",
        lambda self, image: seen.append(max(image.shape)) or logits(self, image),
    )
    output = tmp_path / "out"
    arguments = [
        "--checkpoint",
        trained,
        "--images",
        photos,
        "--output",
        output,
        "--tile",
        "64",
        "--device",
        "cpu",
    ]
    assert predict.main([str(item) for item in arguments]) == 0
    assert max(seen) <= 64 and len(seen) > 2
    assert Image.open(output / "street.png").size == (130, 90)


def test_split_writes_the_lists_that_training_derives(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "lists"
    arguments = [
        "--dataset",
        "folder",
        "--data-dir",
        data,
        "--labeled-share",
        "2/5",
        "--data-list",
        1,
    ]
    done = run(ROOT / "train" / "split.py", *arguments, "--output", output)
    assert "2 labeled and 4 unlabeled images" in done.stdout
    opened = open_data("folder", data)
    from_lists = select(opened, output / "labeled.txt", output / "unlabeled.txt", None, 0)
    assert from_lists == select(opened, None, None, "2/5", 1)


# ---- what they say to bad input: one line, exit code 2, no traceback


def test_bad_input_ends_the_process_with_one_line_and_code_2() -> None:
    done = run(ROOT / "train" / "evaluate.py", "--chekpoint", "x", code=2)
    assert done.stderr == "error: unknown option --chekpoint, did you mean --checkpoint?\n"
    assert done.stdout == ""


def fails(
    command: Callable[[list[str]], int],
    options: dict[str, object],
    capfd: pytest.CaptureFixture[str],
) -> str:
    """The one line that `command` answers with, warnings and progress left out."""
    capfd.readouterr()
    arguments = [
        str(item)
        for name, value in options.items()
        if value is not None
        for item in (f"--{name}", value)
    ]
    assert command(arguments) == 2
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith(("warning: ", "images "))]
    assert out == "" and len(errors) == 1 and errors[0].startswith("error: "), err
    return errors[0]


def test_evaluate_refuses_bad_input(data: Path, trained: Path, tmp_path: Path, capfd) -> None:
    good = {
        "checkpoint": trained,
        "dataset": "folder",
        "data-dir": data,
        "device": "cpu",
        "workers": 0,
    }

    def error(**changes: object) -> str:
        return fails(
            evaluate.main,
            good | {name.replace("_", "-"): value for name, value in changes.items()},
            capfd,
        )

    assert "does not exist" in error(checkpoint=tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(trained.read_bytes()[:10_000])
    assert "short.pt cannot be read" in error(checkpoint=tmp_path / "short.pt")
    assert "the data folder" in error(data_dir=tmp_path / "none")
    assert "--data-dir" in error(data_dir=None)
    assert "the test split" in error(split="test")
    assert "folder that exists" in error(json=tmp_path / "none" / "x.json")
    assert "invalid choice: 'vall'" in error(split="vall")
    assert "required: --checkpoint" in error(checkpoint=None)
    if not torch.cuda.is_available():
        assert "no CUDA device" in error(device="cuda")

    text = (data / "classes.txt").read_text()
    (data / "classes.txt").write_text(text.replace("car", "tram"))
    assert "class 2 is 'car' in checkpoint" in error()
    (data / "classes.txt").write_text(text + "3 bus 1 2 3\n")
    assert "knows 3 classes but the data has 4" in error()
    (data / "classes.txt").write_text(text)
    write_mask(data / "masks" / "val" / "0.png", 0, (39, 56))
    assert "0.png is 56 x 39 but image" in error()
    (data / "masks" / "val" / "0.png").unlink()
    assert "0.png has no mask" in error()
    assert not (tmp_path / "x.json").exists()


def test_predict_refuses_bad_input(
    photos: Path, trained: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    output = tmp_path / "out"
    good = {"checkpoint": trained, "images": photos, "output": output, "device": "cpu"}

    def error(**changes: object) -> str:
        return fails(predict.main, good | changes, capfd)

    assert "none.pt does not exist" in error(checkpoint=tmp_path / "none.pt")
    assert "is not a folder" in error(images=tmp_path / "none")
    assert "is the folder of the images" in error(output=photos)
    assert "--tile 10 is too small" in error(tile=10)
    assert "invalid int value" in error(tile="big")
    (tmp_path / "empty").mkdir()
    assert "no image was found" in error(images=tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "not with torchrun" in error()

    def too_large_for_the_gpu(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", lambda *_: torch.empty(2**55))
        assert "does not fit in memory: use --tile 1024" in error()
        patch.setattr(Predictor, "predict", too_large_for_the_gpu)
        assert "use a smaller --tile" in error(tile=512)
    output.write_text("a file")
    assert "cannot be written" in error()
    output.unlink()

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes((photos / "street.png").read_bytes()[:1000])
    assert "none of the 1 images" in error(images=broken)
    assert not output.exists()


@pytest.mark.parametrize(
    ("first", "second"), [("a.jpg", "a.png"), ("a.jpg", "a_overlay.jpg"), ("x/a.jpg", "x/a.tif")]
)
def test_predict_refuses_outputs_that_collide(
    tmp_path: Path, trained: Path, capfd, first: str, second: str
) -> None:
    write_image(tmp_path / "in" / first, 0)
    write_image(tmp_path / "in" / second, 1)
    options = {
        "checkpoint": trained,
        "images": tmp_path / "in",
        "output": tmp_path / "out",
        "device": "cpu",
    }
    message = fails(predict.main, options, capfd)
    assert first in message and second in message and "would both be written" in message
    assert not (tmp_path / "out").exists()


def test_predict_never_overwrites_an_image(tmp_path: Path, trained: Path, capfd) -> None:
    write_image(tmp_path / "x" / "x" / "a.jpg", 0)
    write_image(tmp_path / "x" / "a.png", 1)
    options = {"checkpoint": trained, "images": tmp_path / "x", "output": tmp_path, "device": "cpu"}
    assert "would be overwritten" in fails(predict.main, options, capfd)


def test_split_refuses_bad_input(data: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "lists"
    good = {"dataset": "folder", "data-dir": data, "labeled-share": "1/2", "output": output}

    def error(**changes: object) -> str:
        return fails(
            split.main,
            good | {name.replace("_", "-"): value for name, value in changes.items()},
            capfd,
        )

    assert "leaves no labeled image" in error(labeled_share="1/100")
    assert "neither full nor a fraction" in error(labeled_share="half")
    assert "-1 is less than 0" in error(data_list=-1)
    assert "required: --labeled-share" in error(labeled_share=None)
    output.write_text("a file")
    assert "cannot be written" in error()
    output.unlink()
    output.mkdir()
    (output / "unlabeled.txt").write_text("mine")
    assert "is there already" in error()
    assert (output / "unlabeled.txt").read_text() == "mine"
