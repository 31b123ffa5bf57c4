"""Bad inputs, each answered by one line that names the thing and the remedy, and exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_folders import write_folder, write_image, write_mask
from PIL import Image

from cac_fast.train import check, main, predict, split

QUICK = "--backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 2 --workers 0".split()

Case = tuple[str, Callable[[Path], list[str] | None], tuple[str, ...]]
"""What it is; how it is made of a good data folder, with more arguments; words of the answer."""


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


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


CASES: list[Case] = [
    # Masks
    (
        "jpeg mask",
        lambda r: ids(r, pattern(0, 1, 2), "train/t00.jpg"),
        ("t00.jpg", "JPEG", "write it anew as PNG"),
    ),
    (
        "jpeg mask called png",
        lambda r: ids(r, pattern(0, 1, 2), format="jpeg"),
        ("t00.png", "JPEG"),
    ),
    (
        "float mask",
        lambda r: ids(r, pattern(0, 1, 2).astype(np.float32), "train/t00.tif"),
        ("t00.tif", "floating-point", "8-bit gray PNG"),
    ),
    (
        "mask with an unknown color",
        lambda r: ids(r, np.repeat(pattern(1, 1, 9)[..., None], 3, 2)),
        ("t00.png", "(1, 1, 1) at x 0, y 0", "correct the class list"),
    ),
    (
        "transparent mask",
        lambda r: ids(r, np.zeros((24, 32, 4), np.uint8)),
        ("t00.png", "transparent pixel at x 0, y 0", "save it"),
    ),
    ("mask half as large", lambda r: ids(r, np.zeros((12, 16), np.uint8)), ("2 times the mask",)),
    ("mask turned", lambda r: ids(r, np.zeros((32, 24), np.uint8)), ("turn the mask",)),
    ("image that exif turns", turned, ("t00.jpg", "EXIF orientation", "turn the mask")),
    ("mask of 16 bits", lambda r: ids(r, pattern(0).astype(np.uint16) + 300), ("id 300",)),
    ("instance ids", lambda r: ids(r, pattern(0, 1, 2, 3)), ("t00.png holds the id 3", "0 to 2")),
    ("empty mask", lambda r: (r / "masks/train/t00.png").write_bytes(b"") and None, ("t00.png",)),
    ("cut mask", lambda r: cut(r / "masks/train/t01.png"), ("t01.png", "replace or remove")),
    # What is in them
    ("all ignored", lambda r: all_masks(r, 255), ("every pixel of all 4 labeled", "write the ids")),
    ("one class", lambda r: all_masks(r, 1), ("hold the id 1 ('wet road') alone",)),
    ("0 and 255", two_classes, ("255, which is ignored: write the object as 1", "'road'")),
    ("one class listed", one_class, ("'sky' is the only class", "list the background")),
    (
        "validation ignored",
        lambda r: write_mask(r / "masks/val/v00.png", value=255) and None,
        ("1 validation masks is 255",),
    ),
    ("no masks", lambda r: [p.unlink() for p in (r / "masks/train").iterdir()] and None, ("mask",)),
    # Names
    (
        "two masks of a name",
        lambda r: write_mask(r / "masks/train/t00.tif") and None,
        ("t00.png", "t00.tif", "rename one"),
    ),
    (
        "two images of a name",
        lambda r: write_image(r / "images/train/t00.gif") and None,
        ("t00.gif", "t00.png", "rename one"),
    ),
    # Lists
    ("misspelled name", lambda r: listed(r, "t01\nt0l\n"), ("line 2", "t0l", "nearest is t0")),
    (
        "path that is not there",
        lambda r: listed(r, "images\\train\\t44.png"),
        ("line 1", f"images{os.sep}train{os.sep}t44.png was looked for", "the nearest is images"),
    ),
    (
        "mask that is not there",
        lambda r: listed(r, "images/train/t00.png masks/t00.png"),
        ("line 1", "masks/t00.png does not exist", "correct the line"),
    ),
    ("unlabeled image", lambda r: listed(r, "t00\nt07\n"), ("line 2: t07 has no mask", "move")),
    ("three columns", lambda r: listed(r, "a.png b.png c.png\n"), ("more than two columns", "tab")),
    ("utf-16 unmarked", lambda r: listed(r, "t00".encode("utf-16-le")), ("UTF-16", "text file")),
    ("list of nothing", lambda r: listed(r, b"\xff\xfe"), ("labeled.txt is empty",)),
    ("pickled list", lambda r: listed(r, b"\x80\x04\x00\x00"), ("labeled.txt", "text file")),
    ("list that is a folder", lambda r: ["--labeled", str(r)], ("cannot be read", "text file")),
    ("voc list", lambda r: voc(r, "JPEGImages/b.jpg\n"), ("train.txt line 1", "no image b")),
    # Classes
    ("name without color", lambda r: classes(r, "0 sky\n1 road\n"), ("line 1", "id name R G B")),
    ("ids from 1", lambda r: classes(r, "1 sky 1 2 3\n2 road 4 5 6\n"), ("without gaps", "1, 2")),
    ("id twice", lambda r: classes(r, "0 sky 1 2 3\n0 road 4 5 6\n"), ("line 2", "renumber")),
]


@pytest.mark.parametrize(
    ("make", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_data_that_cannot_be_trained_on(tmp_path, capfd, make, words):
    root = write_folder(tmp_path / "data")
    more = make(root) or []
    run = ["--dataset", "folder", "--data-dir", str(root), "--output", str(tmp_path / "run")]
    answered(main.main, [*run, *QUICK, "--device", "cpu", *more], words, capfd)
    assert not (tmp_path / "run").exists()


def answered(command, arguments: list[str], words: tuple[str, ...], capfd) -> None:
    assert command(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (check, "--dataset folder", ("--data-dir",)),
        (check, "--dataset folder --data-dir {0}/none", ("none does not exist", "--data-dir")),
        (check, "--dataset folder --data-dir {0} --json {0}", ("--json", "folder that exists")),
        (check, "--dataset folder --data-dir {0} --sheet {0}/a.doc", ("a.doc", ".png")),
        (split, "--dataset folder --data-dir {0} --labeled-share 1/9 --output {0}/l", ("1/9",)),
        (predict, "--checkpoint x --images {0}/*.xyz --output {0}/o", ("no pattern", "*.xyz")),
        (predict, "--checkpoint x --images {0}/masks/none --output {0}/o", ("masks/none",)),
        (predict, "--checkpoint x --images {0}/lists --output {0}/o", ("no image", ".npy 1")),
    ],
)
def test_other_commands(tmp_path, capfd, command, arguments, words):
    root = write_folder(tmp_path / "data")
    (root / "lists").mkdir()
    (root / "lists/a.npy").write_text("")
    answered(command.main, arguments.format(root).split(), words, capfd)
