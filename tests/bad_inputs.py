"""Ways to break a folder, a list, a file of weights or a run, for test_bad_data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from data_folders import write_image, write_mask
from PIL import Image

from cac_fast.train import evaluate, predict

QUICK = (
    "--network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 2 "
    "--workers 0 --device cpu"
).split()

Command = tuple[ModuleType, str]
"""Another command than train/main.py, and its arguments; {0} is the data folder."""
Case = tuple[str, Callable[[Path], list[str] | Command | None], tuple[str, ...]]
"""What it is; how it is made of a good data folder, with more arguments; words of the answer."""


def train_on(root: Path) -> list[str]:
    return ["--dataset", "folder", "--data-dir", str(root), "--output", str(run_of(root)), *QUICK]


def run_of(root: Path) -> Path:
    """The run folder; in it lies a run of the good data if the case is one of FORMER."""
    return root.parent / "run"


# ---- data


def ids(root: Path, values: np.ndarray, name: str = "train/t00.png", **more) -> None:
    path = root / "masks" / name
    (root / "masks/train/t00.png").unlink()
    Image.fromarray(values).save(path, **more)


def pattern(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (24, 32))


def listed(root: Path, content: str | bytes) -> list[str]:
    path = root / "labeled.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--labeled", str(path)]


def all_masks(root: Path, *values: int) -> None:
    for path in (root / "masks/train").iterdir():
        Image.fromarray(pattern(*values)).save(path)


def classes(root: Path, text: str) -> None:
    (root / "classes.txt").write_text(text)


def voc(root: Path, line: str) -> list[str]:
    write_image(root / "JPEGImages/a.jpg")
    write_mask(root / "SegmentationClass/a.png")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text(line)
    return ["--dataset", "voc"]


def cut(path: Path, size: int = 60) -> None:
    path.write_bytes(path.read_bytes()[:size])


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images/train/t00.png").unlink()
    Image.new("RGB", (32, 24)).save(root / "images/train/t00.jpg", exif=exif)


def two_classes(root: Path) -> None:
    classes(root, "0 sky 1 2 3\n1 road 4 5 6\n")
    all_masks(root, 0, 255)
    Image.fromarray(pattern(0, 1)).save(root / "masks/val/v00.png")


def one_class(root: Path) -> None:
    classes(root, "0 sky 1 2 3\n")
    all_masks(root, 0)
    Image.fromarray(pattern(0)).save(root / "masks/val/v00.png")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- weights and checkpoints


class Code:
    """What a file must not have done by being read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def weights(root: Path, content: Any) -> list[str]:
    """--weights of a file of these bytes, or with this saved in it."""
    path = root / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return ["--weights", str(path)]


def cut_weights(root: Path) -> list[str]:
    more = weights(root, {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    cut(root / "w.pth", 20_000)
    return more


def asked(path: str, command: ModuleType = predict) -> Command:
    """Predict, or evaluate, with a checkpoint."""
    rest = "--images {0}/images --output {0}/out --device cpu"
    if command is evaluate:
        rest = "--dataset folder --data-dir {0} --device cpu"
    return command, f"--checkpoint {path} {rest}"


def checkpoint_of(root: Path, content: Any) -> Command:
    weights(root, content)
    return asked("{0}/w.pth")


def altered(root: Path, change: Callable[[dict[str, Any]], Any]) -> Command:
    state = torch.load(run_of(root) / "best.pt", weights_only=True)
    change(state)
    return checkpoint_of(root, state)


def another_class(root: Path) -> Command:
    classes(root, "0 sky 1 2 3\n1 wet road 4 5 6\n2 car 7 8 9\n3 tree 9 9 9\n")
    return asked("{0}/../run", evaluate)


def best_as_last(root: Path) -> None:
    shutil.copy(run_of(root) / "best.pt", run_of(root) / "last.pt")


def foreign_last(root: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, run_of(root) / "last.pt")


def no_image(root: Path) -> Command:
    (root / "lists").mkdir()
    (root / "lists/a.npy").write_text("")
    return predict, "--checkpoint x --images {0}/lists --output {0}/o"


def settings_file(root: Path, text: str) -> list[str]:
    (root / "a.toml").write_text(text)
    return ["--config", str(root / "a.toml")]
