"""Lists as users hold them, and the seeded shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from data_folders import DATA, needs_camvid, one_line, write_folder, write_image, write_mask
from hypothesis import given
from hypothesis import strategies as st

from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.data.lists import named
from cac_fast.train.data.splits import labeled_count, select, write_lists
from cac_fast.train.errors import InputError


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def imaginary(total: int, without_mask: int = 0) -> SegmentationData:
    """Data that is nowhere on disk: shares do not look at the files."""
    samples = tuple(
        Sample(f"{i:05d}", Path(f"{i}.png"), None if i < without_mask else Path(f"m{i}.png"))
        for i in range(total)
    )
    splits = {"train": samples, "val": (), "test": ()}
    return SegmentationData("folder", Path("."), ("a",), ((0, 0, 0),), splits)


@pytest.mark.parametrize(
    "total, share, count",
    [
        (2975, "1/8", 372),
        (2975, "1/4", 744),
        (10582, "1/8", 1323),
        (10582, "1/4", 2645),
        (367, "1/16", 23),
        (367, "1/8", 46),
        (367, "1/4", 92),
        (8, "0.5", 4),
        (8, "1", 8),
    ],
)
def test_counts(total, share, count):
    assert labeled_count(total, share) == count
    labeled, unlabeled = select(imaginary(total), None, None, share, 0)
    assert len(labeled) == count
    assert len(unlabeled) == (total - count if count < total else total)


@given(st.integers(16, 400), st.integers(0, 5))
def test_shares_are_nested_and_complete(total, data_list):
    data = imaginary(total, without_mask=4)
    smaller: set[str] = set()
    for share in ("1/16", "1/8", "1/4", "1/2"):
        labeled, unlabeled = select(data, None, None, share, data_list)
        chosen = set(names(labeled))
        assert smaller <= chosen and len(chosen) == len(labeled)
        assert sorted(names(labeled) + names(unlabeled)) == names(data.splits["train"])
        assert all(sample.mask is not None for sample in labeled)
        smaller = chosen


def test_data_lists_differ_and_repeat():
    data = imaginary(200)
    drawn = [tuple(names(select(data, None, None, "1/8", i)[0])) for i in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


@needs_camvid
@pytest.mark.parametrize("data_list", [0, 1, 2])
@pytest.mark.parametrize("share", ["1/16", "1/8", "1/4"])
def test_shares_of_camvid_are_its_own_lists(share, data_list):
    """Its lists were made elsewhere by the same rule, so this pins the order for good."""
    data = open_data("folder", DATA / "camvid")
    folder = DATA / "camvid" / "splits" / str(data_list) / share.replace("/", "_")
    derived = select(data, None, None, share, data_list)
    listed = select(data, folder / "labeled.txt", folder / "unlabeled.txt", None)
    for ours, theirs in zip(derived, listed, strict=True):
        assert set(ours) == set(theirs) and len(ours) == len(theirs)


def test_full_without_other_images():
    labeled, unlabeled = select(imaginary(10), None, None, "full", 0)
    assert labeled == unlabeled and len(labeled) == 10
    assert select(imaginary(10), None, None, None, 0) == (labeled, unlabeled)


def test_full_with_images_without_mask():
    labeled, unlabeled = select(imaginary(10, without_mask=3), None, None, "full", 0)
    assert len(labeled) == 7 and [sample.mask for sample in unlabeled] == [None] * 3


@pytest.mark.parametrize("share", ["1/0", "half", "0", "-1/8", "9/8", ""])
def test_share_that_is_none(share):
    with pytest.raises(InputError) as error:
        select(imaginary(10), None, None, share, 0)
    one_line(error, repr(share), "1/8")


def test_share_that_leaves_nothing():
    with pytest.raises(InputError) as error:
        select(imaginary(7), None, None, "1/16", 0)
    one_line(error, "1/16", "7")


def test_no_masks_at_all():
    with pytest.raises(InputError) as error:
        select(imaginary(5, without_mask=5), None, None, "1/2", 0)
    one_line(error, "mask")


@pytest.fixture
def folder(tmp_path) -> SegmentationData:
    return open_data("folder", write_folder(tmp_path / "data"))


def write_list(data: SegmentationData, text: str, name: str = "labeled.txt") -> Path:
    path = data.root / name
    path.write_text(text, encoding="utf-8")
    return path


def test_list_of_names(folder):
    labeled, unlabeled = select(folder, write_list(folder, "t02\r\n\r\n# no\nt00\n"), None, None)
    assert names(labeled) == ["t02", "t00"]
    assert labeled[0] == folder.splits["train"][2]
    assert names(unlabeled) == ["t01", "t03", "t04", "t05", "t06", "t07"]


def test_list_of_paths(folder):
    write_image(folder.root / "more/a b.png")
    write_mask(folder.root / "more/a b mask.png")
    text = (
        "images/train/t01.png masks/train/t01.png\n"
        "/images/train/t05.png /masks/train/t00.png\n"
        "more/a b.png\tmore/a b mask.png\n"
    )
    others = write_list(folder, "images/train/t06.png\nmore/a b.png\n", "unlabeled.txt")
    labeled, unlabeled = select(folder, write_list(folder, text), others, None)
    assert labeled[0] == folder.splits["train"][1]
    assert labeled[1].mask == folder.root / "masks/train/t00.png"
    assert names(labeled)[2] == names(unlabeled)[1] == "more/a b"
    assert [sample.mask for sample in unlabeled] == [None, None]


def test_list_that_takes_all_leaves_the_labeled_ones(folder):
    text = "".join(f"t{i:02d}\n" for i in range(4))
    for i in range(4, 8):
        (folder.root / f"images/train/t{i:02d}.png").unlink()
    data = open_data("folder", folder.root)
    labeled, unlabeled = select(data, write_list(folder, text), None, None)
    assert labeled == unlabeled and len(labeled) == 4


def test_unlabeled_list_alone_leaves_the_share(folder):
    others = write_list(folder, "t07\n", "unlabeled.txt")
    labeled, unlabeled = select(folder, None, others, "1/2")
    assert len(labeled) == 2 and names(unlabeled) == ["t07"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ("empty",)),
        ("\n# only this\n", ("empty",)),
        ("t00\nt99\n", ("line 2", "t99", "neither")),
        ("t00\n\nimages/train/t77.png masks/train/t00.png\n", ("line 3", "images/train/t77.png")),
        ("images/train/t00.png masks/train/t77.png\n", ("line 1", "masks/train/t77.png")),
        ("t05\n", ("line 1", "t05 has no mask")),
        ("images/train/t05.png\n", ("line 1", "no mask", "second column")),
        ("images/train/t00.png masks/train/t00.png 1\n", ("line 1", "more than two columns")),
        ("x" * 9999 + "\n", ("line 1", "x" * 200 + "... is neither an image")),
        ("x/" * 9999 + "\n", ("line 1", "is neither an image")),
        ("images/train/t00.png " + "x" * 9999 + "\n", ("line 1", "mask", "... does not exist")),
        ("x " * 9999 + "\n", ("line 1", "...' has more than two columns")),
    ],
)
def test_bad_labeled_list(folder, text, words):
    path = write_list(folder, text)
    with pytest.raises(InputError) as error:
        select(folder, path, None, None)
    assert len(one_line(error, path, *words)) < 1000


def test_missing_and_unreadable_lists(folder):
    binary = folder.root / "labeled.bin"
    binary.write_bytes(b"\xff\xfe\x00t00")
    for path in (folder.root / "none.txt", folder.root, binary):
        with pytest.raises(InputError) as error:
            select(folder, path, None, None)
        one_line(error, path)


def test_named_images_of_a_split(folder, tmp_path):
    path = tmp_path / "some.txt"
    train = folder.splits["train"]
    path.write_text(f"# two\n{train[2].name}\n\n{train[0].name}\n")
    assert named(folder.splits["train"], path) == [train[0], train[2]]
    for text, words in (("\nnone", ("line 2", "none", "another split")), ("#\n", ("empty",))):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            named(folder.splits["train"], path)
        one_line(error, "some.txt", *words)


@pytest.mark.parametrize(
    "line",
    ["t02.png", "T02", "./images/train/t02.png", "{root}/images/train/t02.png", "t02.jpg",
     "C:\\old\\Images\\train\\t02.png"],
)  # fmt: skip
def test_named_images_in_other_forms(folder, tmp_path, line):
    path = tmp_path / "some.txt"
    path.write_text(line.replace("{root}", str(folder.root)))
    assert named(folder.splits["train"], path) == [folder.splits["train"][2]]


def test_folders_above_the_data_may_be_called_as_splits(tmp_path):
    train = open_data("folder", write_folder(tmp_path / "test/data")).splits["train"]
    (tmp_path / "some.txt").write_text("/home/val/data/images/train/t02.png")
    assert named(train, tmp_path / "some.txt") == [train[2]]


def test_a_named_image_of_another_split_is_refused(folder, tmp_path):
    write_image(folder.root / "images/train/seq/0001.png")
    path, data = tmp_path / "some.txt", open_data("folder", folder.root)
    for line in ("images/val/v00.png", "images/val/seq/0001.png", "/old/val/seq/0001.png", "t0Z"):
        path.write_text(line)
        with pytest.raises(InputError) as error:
            named(data.splits["train"], path)
        one_line(error, "some.txt line 1", line, *["nearest is t0"] * (line == "t0Z"))


def test_list_and_share_together(folder):
    with pytest.raises(InputError) as error:
        select(folder, write_list(folder, "t00\n"), None, "1/8")
    one_line(error, "--labeled", "--labeled-share")


def test_authors_voc_lists(tmp_path):
    for name in ("2009_003377", "2009_005030", "2010_005647"):
        write_image(tmp_path / f"VOC2012/JPEGImages/{name}.jpg")
        write_mask(tmp_path / f"VOC2012/SegmentationClassAug/{name}.png")
    data = open_data("voc", tmp_path)
    text = (
        "/JPEGImages/2009_005030.jpg /SegmentationClassAug/2009_005030.png\n"
        "/JPEGImages/2009_003377.jpg /SegmentationClassAug/2009_003377.png\n"
    )
    labeled, unlabeled = select(data, write_list(data, text), None, None)
    assert names(labeled) == ["2009_005030", "2009_003377"]
    assert labeled[0] == data.splits["train"][1]
    assert names(unlabeled) == ["2010_005647"]


@pytest.mark.parametrize("ids", ["labelTrainIds", "labelIds"])
def test_authors_cityscapes_lists(tmp_path, ids):
    """Read as they are, also where only the labelIds of the official download are there."""
    lines = []
    for name in ("aachen_000000_000019", "ulm_000001_000019", "ulm_000002_000019"):
        city = name.split("_")[0]
        image = f"leftImg8bit/train/{city}/{name}_leftImg8bit.png"
        write_image(tmp_path / image)
        write_mask(tmp_path / f"gtFine/train/{city}/{name}_gtFine_{ids}.png", value=7)
        lines.append(f"{image} gtFine/train/{city}/{name}_gtFine_labelTrainIds.png\n")
    data = open_data("cityscapes", tmp_path)
    first = write_list(data, lines[0])
    second = write_list(data, "".join(lines[1:]), "unlabeled.txt")
    labeled, unlabeled = select(data, first, second, None)
    assert (*labeled, *unlabeled) == data.splits["train"]
    assert (data.read_mask(labeled[0].mask) == (7 if ids == "labelTrainIds" else 0)).all()


def test_unlabeled_lines_may_name_masks_that_are_not_there(folder):
    others = write_list(folder, "images/train/t06.png masks/train/t06.png\n", "unlabeled.txt")
    _, unlabeled = select(folder, write_list(folder, "t00\n"), others, None)
    assert names(unlabeled) == ["t06"] and unlabeled[0].mask is None


def test_written_lists_are_read_back(tmp_path):
    root = write_folder(tmp_path / "data")
    write_image(root / "images/train/my photo.png")
    write_mask(root / "masks/train/my photo.png")
    write_image(root / "images/train/other photo.png")
    data = open_data("folder", root)
    labeled, unlabeled = select(data, None, None, "1/2", 3)
    output = tmp_path / "lists" / "new"
    write_lists(output, labeled, unlabeled, data.root)
    again = select(data, output / "labeled.txt", output / "unlabeled.txt", None)
    assert again == (labeled, unlabeled)
    line = next(
        line for line in (output / "labeled.txt").read_text().splitlines() if "photo" not in line
    )
    name = Path(line.split()[0]).stem
    assert line == f"images/train/{name}.png masks/train/{name}.png"


def test_toycity_brings_its_own_lists(folder):
    (folder.root / "lists").mkdir()
    write_list(folder, "t01\n", "lists/labeled.txt")
    write_list(folder, "t04\nt05\n", "lists/unlabeled.txt")
    lists = tuple(folder.root / "lists" / f"{name}.txt" for name in ("labeled", "unlabeled"))
    toy = replace(folder, lists=lists)
    assert tuple(map(names, select(toy, None, None, None))) == (["t01"], ["t04", "t05"])
    assert len(select(toy, None, None, "1/2")[0]) == 2
