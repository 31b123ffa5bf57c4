"""Bad inputs, each answered by one line that names the thing and the remedy, and exit code 2."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import (
    Case,
    Code,
    all_masks,
    altered,
    another_class,
    asked,
    best_as_last,
    checkpoint_of,
    classes,
    cut,
    cut_weights,
    foreign_last,
    ids,
    listed,
    no_image,
    one_class,
    pattern,
    remove,
    run_of,
    settings_file,
    train_on,
    turned,
    two_classes,
    voc,
    weights,
)
from data_folders import write_folder, write_image, write_mask

from cac_fast.train import check, evaluate, main, predict, split

KINDS: dict[str, dict[str, list[Case]]] = {
    "data": {
        "format of a mask": [
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
        ],
        "values of a mask": [
            (
                "mask of 16 bits",
                lambda r: ids(r, pattern(0).astype(np.uint16) + 300),
                ("id 300",),
            ),
            (
                "instance ids",
                lambda r: ids(r, pattern(0, 1, 2, 3)),
                ("t00.png holds the id 3", "0 to 2"),
            ),
            (
                "id of a validation mask",
                lambda r: write_mask(r / "masks/val/v00.png", value=77) and None,
                ("v00.png", "77"),
            ),
        ],
        "colors of a mask": [
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
        ],
        "size of a mask": [
            (
                "mask half as large",
                lambda r: ids(r, np.zeros((12, 16), np.uint8)),
                ("2 times the mask",),
            ),
            (
                "mask turned",
                lambda r: ids(r, np.zeros((32, 24), np.uint8)),
                ("turn the mask",),
            ),
            ("image that exif turns", turned, ("t00.jpg", "EXIF orientation", "turn the mask")),
        ],
        "broken mask": [
            ("empty mask", lambda r: cut(r / "masks/train/t00.png", 0), ("t00.png",)),
            (
                "cut mask",
                lambda r: cut(r / "masks/train/t01.png"),
                ("t01.png", "replace or remove"),
            ),
        ],
        "broken image": [
            (
                "cut image",
                lambda r: cut(r / "images/train/t01.png"),
                ("images/train/t01.png", "replace or remove"),
            ),
            (
                "empty image",
                lambda r: cut(r / "images/val/v00.png", 0),
                ("images/val/v00.png", "replace or remove"),
            ),
            (
                "text called png",
                lambda r: (r / "images/train/t00.png").write_text("<html>") and None,
                ("images/train/t00.png", "replace or remove"),
            ),
        ],
        "what the masks hold": [
            (
                "all ignored",
                lambda r: all_masks(r, 255),
                ("every pixel of all 4 labeled", "write the ids"),
            ),
            ("one class", lambda r: all_masks(r, 1), ("hold the id 1 ('wet road') alone",)),
            ("0 and 255", two_classes, ("255, which is ignored: write the object as 1", "'road'")),
        ],
        "validation": [
            (
                "validation ignored",
                lambda r: write_mask(r / "masks/val/v00.png", value=255) and None,
                ("1 validation masks is 255",),
            ),
            (
                "validation image without a mask",
                lambda r: remove(r / "masks/val/v00.png"),
                ("val/v00.png has no mask",),
            ),
        ],
        "names": [
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
        ],
        "folders": [
            ("no data folder", lambda r: ["--data-dir", str(r / "none")], ("none",)),
            ("no images folder", lambda r: remove(r / "images"), ("images",)),
            ("no masks", lambda r: remove(r / "masks/train"), ("mask",)),
        ],
        "class list": [
            ("no class list", lambda r: remove(r / "classes.txt"), ("classes.txt",)),
            ("name without color", lambda r: classes(r, "0 sky\n1 road\n"), ("id name R G B",)),
            ("one class listed", one_class, ("'sky' is the only class", "list the background")),
        ],
        "ids of the class list": [
            (
                "ids from 1",
                lambda r: classes(r, "1 sky 1 2 3\n2 road 4 5 6\n"),
                ("without gaps", "1, 2"),
            ),
            (
                "id twice",
                lambda r: classes(r, "0 sky 1 2 3\n0 road 4 5 6\n"),
                ("line 2", "renumber"),
            ),
        ],
    },
    "lists": {
        "name in a list": [
            (
                "misspelled name",
                lambda r: listed(r, "t01\nt0l\n"),
                ("line 2", "t0l", "nearest is t0"),
            ),
            ("unlabeled image", lambda r: listed(r, "t00\nt07\n"), ("line 2: t07 has no mask",)),
            (
                "voc list",
                lambda r: voc(r, "JPEGImages/b.jpg\n"),
                ("train.txt line 1", "image b"),
            ),
        ],
        "path in a list": [
            (
                "path that is not there",
                lambda r: listed(r, "images\\train\\t44.png"),
                (
                    "line 1",
                    f"images{os.sep}train{os.sep}t44.png was looked for",
                    "the nearest is images",
                ),
            ),
            (
                "mask that is not there",
                lambda r: listed(r, "images/train/t00.png masks/t00.png"),
                ("line 1", "masks/t00.png does not exist", "correct the line"),
            ),
        ],
        "form of a list": [
            (
                "three columns",
                lambda r: listed(r, "a.png b.png c.png\n"),
                ("more than two columns", "tab"),
            ),
            (
                "utf-16 unmarked",
                lambda r: listed(r, "t00".encode("utf-16-le")),
                ("UTF-16", "text file"),
            ),
            (
                "pickled list",
                lambda r: listed(r, b"\x80\x04\x00\x00"),
                ("labeled.txt", "text file"),
            ),
        ],
        "list without lines": [
            ("empty list", lambda r: listed(r, "\n"), ("labeled.txt is empty",)),
            ("list of nothing", lambda r: listed(r, b"\xff\xfe"), ("labeled.txt is empty",)),
            (
                "list that is a folder",
                lambda r: ["--labeled", str(r)],
                ("cannot be read", "text file"),
            ),
        ],
        "other lists": [
            (
                "no list",
                lambda r: [*listed(r, "t00\n"), "--unlabeled", str(r / "none.txt")],
                ("none.txt",),
            ),
            (
                "names of another split",
                lambda r: (
                    listed(r, "v99\n")
                    and (evaluate, asked("{0}/../run", evaluate)[1] + " --names {0}/labeled.txt")
                ),
                ("v99",),
            ),
        ],
    },
    "weights": {
        "no weights file": [
            ("no weights", lambda r: ["--weights", str(r / "none.pth")], ("none.pth",)),
            ("folder without a run", lambda r: ["--weights", str(r)], ("best.pt", "not found")),
        ],
        "broken weights": [
            ("empty weights", lambda r: weights(r, b""), ("w.pth", "download it again")),
            ("cut weights", cut_weights, ("w.pth", "truncated")),
            ("page called weights", lambda r: weights(r, b"<html>no</html>"), ("download it",)),
        ],
        "more than tensors": [
            ("weights with code", lambda r: weights(r, {"a": Code()}), ("more than tensors",)),
            ("whole module", lambda r: weights(r, torch.nn.Linear(2, 2)), ("save its state_dict",)),
            ("list of tensors", lambda r: weights(r, [torch.ones(2)]), ("list", "state_dict")),
        ],
        "other weights": [
            (
                "weights of another architecture",
                lambda r: weights(r, {"conv1.weight": torch.zeros(64, 3, 7, 7)}),
                ("another architecture", "for this backbone"),
            ),
            ("no tensors", lambda r: weights(r, {"epoch": 3}), ("another architecture",)),
        ],
    },
    "checkpoints": {
        "no checkpoint": [
            ("no file", lambda r: asked("{0}/none.pt"), ("none.pt does not exist",)),
            ("folder without best.pt", lambda r: asked("{0}"), ("best.pt does not exist",)),
        ],
        "broken checkpoint": [
            ("empty checkpoint", lambda r: checkpoint_of(r, b""), ("w.pth", "truncated")),
            ("text", lambda r: checkpoint_of(r, b"a text\n"), ("w.pth", "no checkpoint")),
            (
                "checkpoint with code",
                lambda r: checkpoint_of(r, {"a": Code()}),
                ("cannot be read",),
            ),
        ],
        "no checkpoint of this program": [
            (
                "plain weights",
                lambda r: checkpoint_of(r, {"conv1.weight": torch.ones(1)}),
                ("not a checkpoint of this program",),
            ),
            ("a list", lambda r: checkpoint_of(r, [1, 2]), ("not a checkpoint",)),
            (
                "whole network",
                lambda r: checkpoint_of(r, torch.nn.Linear(2, 2)),
                ("cannot be read",),
            ),
        ],
        "another checkpoint": [
            (
                "of a newer format",
                lambda r: altered(r, lambda s: s.update(format=s["format"] + 1)),
                ("w.pth", "newer"),
            ),
            (
                "without its config",
                lambda r: altered(r, lambda s: s.pop("config")),
                ("w.pth", "config"),
            ),
            (
                "of another network",
                lambda r: altered(r, lambda s: s["config"].update(backbone="resnet18")),
                ("another architecture",),
            ),
        ],
        "classes of a checkpoint": [("another class", another_class, ("3 classes", "has 4"))],
        "broken run folder": [
            (
                "cut last.pt",
                lambda r: cut(run_of(r) / "last.pt", 10**6),
                ("last.pt cannot be read", "--restart"),
            ),
            ("best.pt as last.pt", best_as_last, ("copy of best.pt", "--restart")),
            ("last.pt gone", lambda r: remove(run_of(r) / "last.pt"), ("best.pt", "--restart")),
        ],
        "another run in the folder": [
            (
                "fewer iterations",
                lambda r: ["--iterations", "1"],
                ("iterations: 2 there, 1 here", "--restart"),
            ),
            ("other crops", lambda r: ["--crop-size", "40"], ("crop_size: 32 there, 40 here",)),
            ("other images", lambda r: listed(r, "t00\nt01\n"), ("other labeled images",)),
        ],
        "another file in the run folder": [
            ("foreign last.pt", foreign_last, ("last.pt is not a checkpoint", "--restart")),
        ],
    },
    "settings": {
        "options": [
            ("unknown option", lambda r: ["--batchsize", "4"], ("did you mean --batch-size?",)),
            ("no number", lambda r: ["--iterations", "many"], ("--iterations",)),
            ("unknown backbone", lambda r: ["--backbone", "resnet"], ("--backbone",)),
        ],
        "numbers": [
            ("crop", lambda r: ["--crop-size", "36"], ("use 32 or 40",)),
            ("one image", lambda r: ["--batch-size", "1"], ("--freeze-bn",)),
            ("share of no image", lambda r: ["--labeled-share", "1/100"], ("1/100",)),
        ],
        "files of settings": [
            ("no file", lambda r: ["--config", str(r / "none.toml")], ("none.toml: no such file",)),
            ("no TOML", lambda r: settings_file(r, "crop: 3\n"), ("a.toml",)),
            ("unknown key", lambda r: settings_file(r, "batchsize = 3\n"), ("batch_size",)),
        ],
        "output": [
            ("a file", lambda r: ["--output", str(r / "classes.txt")], ("--output",)),
            ("below a file", lambda r: ["--output", str(r / "classes.txt/run")], ("--output",)),
        ],
        "other commands": [
            ("check nothing", lambda r: (check, "--dataset folder"), ("--data-dir",)),
            (
                "check no folder",
                lambda r: (check, "--dataset folder --data-dir {0}/none"),
                ("none does not exist", "--data-dir"),
            ),
            (
                "split a wrong share",
                lambda r: (
                    split,
                    "--dataset folder --data-dir {0} --labeled-share 1/9 --output {0}/l",
                ),
                ("1/9",),
            ),
        ],
        "files to write": [
            (
                "json is a folder",
                lambda r: (check, "--dataset folder --data-dir {0} --json {0}"),
                ("--json", "folder that exists"),
            ),
            (
                "sheet of no picture",
                lambda r: (check, "--dataset folder --data-dir {0} --sheet {0}/a.doc"),
                ("a.doc", ".png"),
            ),
        ],
        "images to predict": [
            (
                "pattern of none",
                lambda r: (predict, "--checkpoint x --images {0}/*.xyz --output {0}/o"),
                ("no pattern", "*.xyz"),
            ),
            (
                "no such folder",
                lambda r: (predict, "--checkpoint x --images {0}/masks/none --output {0}/o"),
                ("masks/none",),
            ),
            (
                "no image",
                no_image,
                ("no image", ".npy 1"),
            ),
        ],
    },
}
FORMER = {"checkpoints", "lists"}
CASES = [
    pytest.param(group, make, words, id=f"{kind}-{what}")
    for group, kinds in KINDS.items()
    for kind, cases in kinds.items()
    for what, make, words in cases
]


def test_they_are_many_and_of_many_kinds():
    kinds = [len(cases) for kinds in KINDS.values() for cases in kinds.values()]
    assert max(kinds) <= 3 and sum(kinds) >= 60
    assert sum(case.values[0] != "settings" for case in CASES) >= 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations on good data."""
    root = write_folder(tmp_path_factory.mktemp("finished") / "data")
    assert main.main(train_on(root)) == 0
    return run_of(root)


@pytest.mark.parametrize(("group", "make", "words"), CASES)
def test_bad_input(tmp_path, capfd, monkeypatch, finished, group, make, words):
    monkeypatch.chdir(tmp_path)
    root = write_folder(tmp_path / "data")
    if group in FORMER:
        shutil.copytree(finished, run_of(root))
    made = make(root)
    command, arguments = main, [*train_on(root), *(made or [])]
    if isinstance(made, tuple):
        command, arguments = made[0], made[1].format(root).split()
    before = files(tmp_path)
    capfd.readouterr()
    assert command.main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    for word in words:
        assert word in err, err
    assert files(tmp_path) == before


def files(folder: Path) -> dict[Path, bytes]:
    """All files but the lock, with their content: none is lost, none is left behind."""
    return {
        path: b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.name != "lock"
    }
