"""Names and lists as they come from other programs and systems."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from data_folders import one_line, write_folder, write_image, write_mask

from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.data.listing import files
from cac_fast.train.data.splits import select, write_lists
from cac_fast.train.errors import InputError

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path) -> SegmentationData:
    return open_data("folder", write_folder(tmp_path / "data"))


def chosen(data: SegmentationData, content: str | bytes) -> list[Sample]:
    path = data.root / "labeled.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return select(data, path, None, None)[0]


def masked(data: SegmentationData, split: str = "train") -> list[str]:
    return [sample.name for sample in data.splits[split] if sample.mask is not None]


@pytest.mark.parametrize(
    "line",
    [
        "t01",
        "t01.png",
        "t01.jpg",
        "T01",
        "./images/train/t01.png",
        "images/train/t01.png",
        "images\\train\\t01.png",
        "\\images\\train\\t01.png masks\\train\\t01.png",
        "images/train/t01.jpg",
        "Images/Train/T01.PNG",
        "{root}/images/train/t01.png",
        "{root}/images/train/t01.png {root}/masks/train/t01.png",
        "/home/them/data/images/train/t01.png /home/them/data/masks/train/t01.png",
        "C:\\My Data\\images\\train\\t01.png",
        "D:/data/images/train/t01.png\tD:/data/masks/train/t01.png",
        "images/train/t01.png,masks/train/t01.png",
        "images/train/t01.png; masks/train/t01.png",
        "images/train/t01.png masks/train/t01.PNG",
    ],
)
def test_ways_to_write_a_line(folder, line):
    (sample,) = chosen(folder, line.replace("{root}", str(folder.root)) + "\r\n")
    assert sample == folder.splits["train"][1]


def test_paths_from_elsewhere(folder, tmp_path):
    image, mask = write_image(tmp_path / "other/a.png"), write_mask(tmp_path / "other/b.png")
    (sample,) = chosen(folder, f"{image} {mask}\n")
    assert (sample.image, sample.mask) == (image, mask)
    os.symlink(folder.root, tmp_path / "link")
    (sample,) = chosen(folder, f"{tmp_path}/link/images/train/t01.png\n")
    assert sample == folder.splits["train"][1]


def test_image_of_another_split_keeps_its_mask(folder):
    (sample,) = chosen(folder, "images/val/v00.png\n")
    assert sample.name == "images/val/v00"
    assert sample.mask == folder.root / "masks/val/v00.png"


def test_another_files_name_is_not_taken_for_it(folder):
    """Not what has the same last part in another folder, nor the mask's column for an image."""
    for line in ("elsewhere/t01.png", "/x/t01.png", "gone.png masks/train/t01.png"):
        with pytest.raises(InputError, match="is neither an image below"):
            chosen(folder, line)


def test_a_path_of_another_split_is_not_taken_for_a_name(tmp_path):
    root = write_folder(tmp_path / "data")
    write_image(root / "images/train/seq/0001.png")
    write_mask(root / "masks/train/seq/0001.png")
    data = open_data("folder", root)
    for line in ("/old/images/val/seq/0001.png", "D:\\Val\\seq\\0001.png"):
        with pytest.raises(InputError, match="is neither an image below"):
            chosen(data, line)
    for line in (
        "/old/seq/0001.png",
        "/val/old/train/seq/0001.png",
        "/val/Images/Train/Seq/0001.png",
    ):
        assert [sample.name for sample in chosen(data, line)] == ["seq/0001"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(folder, encoding):
    write_image(folder.root / f"images/train/{NFC}.png")
    write_mask(folder.root / f"masks/train/{NFC}.png")
    data = open_data("folder", folder.root)
    text = f"t00\r\n# comment\r\n\r\n{NFC}\r\n"
    assert [sample.name for sample in chosen(data, text.encode(encoding))] == ["t00", NFC]


def test_utf_16_without_a_mark_is_named(folder):
    with pytest.raises(InputError) as error:
        chosen(folder, "t00\n".encode("utf-16-le"))
    one_line(error, "labeled.txt", "UTF-16 without a byte order mark")


@pytest.mark.parametrize("there, listed", [(NFC, NFD), (NFD, NFC)])
def test_both_unicode_forms(folder, there, listed):
    write_image(folder.root / f"images/train/{there}.png")
    write_mask(folder.root / f"masks/train/{listed}.png")
    data = open_data("folder", folder.root)
    assert there in masked(data) and "were matched" in data.notes[0]
    for line in (listed, f"images/train/{listed}.png", f"images/train/{listed}.png masks/train/x"):
        if line.endswith("x"):
            line = line.removesuffix("x") + f"{there}.png"
        (sample,) = chosen(data, line)
        assert sample.name == there and sample.mask.name == f"{listed}.png"


def test_names_that_are_no_utf_8(tmp_path):
    root = write_folder(tmp_path / "data", labeled=1, unlabeled=0)
    raw = b"caf\xe9"
    name = os.fsdecode(raw)
    write_image(root / f"images/train/{name}.png")
    write_mask(root / f"masks/train/{name}.png")
    data = open_data("folder", root)
    assert chosen(data, raw + b"\n")[0].name == name
    assert chosen(data, "caf\u00e9\n")[0].name == name
    labeled, unlabeled = select(data, None, None, "1/2", 0)
    write_lists(tmp_path / "lists", labeled, unlabeled, root)
    lists = [tmp_path / "lists" / f"{kind}.txt" for kind in ("labeled", "unlabeled")]
    assert select(data, *lists, None) == (labeled, unlabeled)
    # A list in the old Western encoding, of files named in UTF-8.
    write_image(root / f"images/train/{NFC}.png")
    write_mask(root / f"masks/train/{NFC}.png")
    (root / f"images/train/{name}.png").unlink()
    assert chosen(open_data("folder", root), raw + b"\n")[0].name == NFC


@pytest.mark.parametrize("names", [("frame.0001", "frame.0002"), ("my image 1", "my image 2")])
@pytest.mark.parametrize("dataset", ["folder", "voc", "cityscapes"])
def test_names_with_dots_and_blanks(tmp_path, dataset, names):
    root = write_folder(tmp_path, 0, 0)
    for name in names:
        write_image(image := root / f"{place(dataset, name)[0]}")
        write_mask(mask := root / f"{place(dataset, name)[1]}")
    if dataset == "voc":
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        lines = [names[0], f"/JPEGImages/{names[1]}.jpg /SegmentationClass/{names[1]}.png"]
        (lists / "train.txt").write_text("\n".join(lines) + "\n")
    data = open_data(dataset, root)
    known = data.splits["train"][-1]
    assert len(data.splits["train"]) == 2 and (known.image, known.mask) == (image, mask)
    below = [path.relative_to(data.root).as_posix() for path in (image, mask)]
    for line in (known.name, below[0], " ".join(below), "\t".join(below), f"C:\\x\\{below[0]}"):
        assert chosen(data, line) == [known]


def place(dataset: str, name: str) -> tuple[str, str]:
    if dataset == "folder":
        return f"images/train/{name}.png", f"masks/train/{name}.png"
    if dataset == "voc":
        return f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"
    city = f"train/a city/{name}"
    return f"leftImg8bit/{city}_leftImg8bit.png", f"gtFine/{city}_gtFine_labelTrainIds.png"


def test_one_path_a_line_of_cityscapes(tmp_path):
    """As U2PL publishes them; and the names as mmsegmentation writes them."""
    for name in ("a_1", "a_2"):
        image, mask = (tmp_path / path for path in place("cityscapes", name))
        write_image(image)
        write_mask(mask)
    data = open_data("cityscapes", tmp_path)
    for line in (
        "leftImg8bit/train/a city/a_2_leftImg8bit.png",
        "train/a city/a_2_leftImg8bit.png",
        "a city/a_2_leftImg8bit",
        "a city/a_2",
    ):
        assert chosen(data, line) == [data.splits["train"][1]]


def test_what_cannot_be_resolved_says_what_was_looked_for(folder):
    for line, words in (
        ("t0O", ("line 1: t0O is neither", f"{folder.root}/t0O", "the nearest is t0")),
        ("images/trian/t05.png", (f"{folder.root}/images/trian/t05.png", "images/train/t05.png")),
        ("images\\train\\x.png", (f"{folder.root}/images/train/x.png",)),
        ("t00\tmasks/none.png", (f"the mask {folder.root}/masks/none.png does not exist",)),
    ):
        with pytest.raises(InputError) as error:
            chosen(folder, line)
        one_line(error, "labeled.txt line 1", *words)


def test_voc_line_that_cannot_be_resolved(tmp_path):
    write_image(tmp_path / "JPEGImages/2007_001.jpg")
    write_mask(tmp_path / "SegmentationClass/2007_001.png")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("JPEGImages/2007_O01.jpg x\n")
    with pytest.raises(InputError) as error:
        open_data("voc", tmp_path)
    one_line(error, "train.txt line 1", "no image 2007_O01", "the nearest name is 2007_001")


def test_masks_under_other_names(tmp_path):
    root = write_folder(tmp_path, labeled=0, unlabeled=0)
    for image, mask in (
        ("Upper.jpg", "upper.png"),
        ("a.jpg", "a.jpg.png"),
        ("b.jpg", "b.tif"),
        ("c.jpg", "c.BMP"),
        ("d.jpg", "other.png"),
        ("e.jpg", "E.png"),
        ("E.jpg", None),
    ):
        write_image(root / "images/train" / image)
        if mask is not None:
            write_mask(root / "masks/train" / mask)
    data = open_data("folder", root)
    # Of e and E the exact one: nobody else is asked.
    assert masked(data) == ["E", "Upper", "a", "b", "c"]
    matched, lost = data.notes
    assert matched.startswith("2 of the masks in") and "upper.png to Upper.jpg" in matched
    assert lost.startswith("1 of the masks in") and "belong to no image" in lost
    assert lost.endswith("other.png")


def test_ambiguous_masks_are_left_alone(tmp_path):
    root = write_folder(tmp_path, labeled=1, unlabeled=0)
    for name in ("x.jpg", "X.jpg"):
        write_image(root / "images/train" / name)
    write_mask(root / "masks/train/x.JPG.png")
    data = open_data("folder", root)
    assert masked(data) == ["t00"] and "1 of the masks" in data.notes[0]


def test_two_masks_of_a_name(tmp_path):
    root = write_folder(tmp_path, labeled=1, unlabeled=0)
    (root / "masks/train/t00.jpg").write_bytes(b"a picture to look at")
    assert open_data("folder", root).splits["train"][0].mask.suffix == ".png"
    write_mask(root / "masks/train/t00.tif")
    with pytest.raises(InputError) as error:
        open_data("folder", root)
    one_line(error, "t00.png", "t00.tif", "rename")


def test_files_of_other_kinds_are_counted(tmp_path):
    root = write_folder(tmp_path, labeled=1, unlabeled=0)
    for name in ("images/train/a.heic", "images/train/b.HEIC", "images/train/c.npy", "x.heic"):
        (root / name).write_text("")
    (root / "images/train/labels.json").write_text("")
    (root / "masks/train/t00.npy").write_text("")
    assert [note.partition(" of other kinds")[0] for note in open_data("folder", root).notes] == [
        f"3 files in {root / 'images/train'} are",
        f"1 files in {root / 'masks/train'} are",
    ]
    assert open_data("folder", root).notes[0].endswith(".heic 2, .npy 1")


def test_links(tmp_path):
    """To other folders they are followed; each image is listed once, whatever leads back."""
    root, other = write_folder(tmp_path / "data", labeled=1, unlabeled=1), tmp_path / "other"
    write_image(other / "deep/x.png")
    train = root / "images/train"
    write_image(train / "day/y.png")
    for link, target in {
        train / "a": ".",
        train / "b": ".",
        train / "up": "../..",
        train / "again": "day",
        train / "self": "self",
        train / "away": other,
        other / "deep/back": other,
        other / "home": train,
    }.items():
        link.symlink_to(target)
    names = [sample.name for sample in open_data("folder", root).splits["train"]]
    assert names == ["away/deep/x", "day/y", "t00", "t01"]
    assert "x.png" not in [path.name for path in files(other, without=other / "deep")]
    assert list(files(Path("nowhere"))) == []


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, error):
    root = write_folder(tmp_path / "data")
    locked = write_image(root / "images/train/locked/x.png").parent
    scandir = os.scandir

    def refusing(place):
        if Path(place) == locked:
            raise error(5, "no way in")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError) as raised:
        open_data("folder", root)
    one_line(raised, locked, "no way in")
