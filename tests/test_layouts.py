"""Each data layout, small ones made here and the real samples where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_folders import (
    CLASSES,
    DATA,
    needs_camvid,
    needs_samples,
    one_line,
    write_folder,
    write_image,
    write_mask,
)

from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.layouts import toycity as toycity_layout
from cac_fast.train.data.layouts.cityscapes import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_LABEL_MAP,
    CITYSCAPES_PALETTE,
)
from cac_fast.train.data.layouts.voc import VOC_CLASSES, VOC_PALETTE
from cac_fast.train.errors import InputError


def names(data, split: str) -> list[str]:
    return [sample.name for sample in data.splits[split]]


def test_tables_have_one_color_a_class():
    assert len(CITYSCAPES_CLASSES) == len(CITYSCAPES_PALETTE) == len(set(CITYSCAPES_PALETTE)) == 19
    assert len(VOC_CLASSES) == len(VOC_PALETTE) == len(set(VOC_PALETTE)) == 21
    # VOC's colors count in bits: bit k of the class goes to channel k mod 3, highest bits first.
    for index, color in enumerate(VOC_PALETTE):
        bits = [(index >> k & 1) << (7 - k // 3) for k in range(8)]
        assert color == tuple(sum(bits[channel::3]) for channel in range(3))


def test_cityscapes_label_map():
    assert sorted(set(CITYSCAPES_LABEL_MAP)) == [*range(19), 254, 255]
    assert [CITYSCAPES_LABEL_MAP[i] for i in (0, 7, 8, 9, 26, 33, 34, 255)] == [
        255, 0, 1, 255, 13, 18, 254, 255,
    ]  # fmt: skip


def test_folder(tmp_path):
    root = write_folder(tmp_path / "data", labeled=2, unlabeled=1)
    data = open_data("folder", root)
    assert data.dataset == "folder" and data.root == root and data.num_classes == 3
    assert data.classes == ("sky", "wet road", "car")
    assert data.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert names(data, "train") == ["t00", "t01", "t02"]
    assert names(data, "val") == ["v00"] and names(data, "test") == []
    assert [sample.mask is not None for sample in data.splits["train"]] == [True, True, False]
    first = data.splits["train"][0]
    assert (
        first.image == root / "images/train/t00.png" and first.mask == root / "masks/train/t00.png"
    )


def test_folder_takes_what_people_have(tmp_path):
    root = write_folder(tmp_path, labeled=1, unlabeled=0)
    write_image(root / "images/train/A photo.JPG")
    write_mask(root / "masks/train/A photo.PNG")
    write_image(root / "images/train/trip/x.y.tif")
    write_mask(root / "masks/train/trip/x.y.png")
    for other in ("._t00.png", "notes.txt", ".cache/t09.png"):
        (root / "images/train" / other).parent.mkdir(exist_ok=True)
        (root / "images/train" / other).write_text("no image")
    data = open_data("folder", root)
    assert names(data, "train") == ["A photo", "t00", "trip/x.y"]
    assert all(sample.mask is not None for sample in data.splits["train"])


def test_folder_two_images_of_one_name(tmp_path):
    root = write_folder(tmp_path)
    write_image(root / "images/train/t00.jpg")
    with pytest.raises(InputError) as error:
        open_data("folder", root)
    one_line(error, "t00.jpg", "t00.png", "rename")


def test_folder_without_training_images(tmp_path):
    root = write_folder(tmp_path)
    shutil.rmtree(root / "images/train")
    with pytest.raises(InputError) as error:
        open_data("folder", root)
    one_line(error, root / "images" / "train", "jpg")


def test_folder_without_class_list(tmp_path):
    root = write_folder(tmp_path)
    (root / "classes.txt").unlink()
    with pytest.raises(InputError) as error:
        open_data("folder", root)
    one_line(error, root / "classes.txt", "id name R G B")


@pytest.mark.parametrize(
    "text, words",
    [
        ("0 sky 1 2 3\n1 road 4 5\n", ("line 2", "1 road 4 5")),
        ("0 sky 1 2 3\nroad 1 4 5 6\n", ("line 2",)),
        ("0 sky 1 2 300\n", ("line 1",)),
        ("0 sky 1 2 -3\n", ("line 1",)),
        ("0 1 2 3\n", ("line 1",)),
        ("256 sky 1 2 3\n", ("line 1",)),
        ("0 sky 1 2 3\n0 road 4 5 6\n", ("line 2", "twice")),
        ("0 sky 1 2 3\n2 road 4 5 6\n", ("0, 2", "gaps")),
        ("255 ignore 0 0 0\n", ("none",)),
        ("", ("none",)),
    ],
)
def test_malformed_class_list(tmp_path, text, words):
    root = write_folder(tmp_path)
    (root / "classes.txt").write_text(text)
    with pytest.raises(InputError) as error:
        open_data("folder", root)
    one_line(error, root / "classes.txt", *words)


def test_class_list_in_any_order_with_comments(tmp_path):
    root = write_folder(tmp_path)
    lines = CLASSES.splitlines()
    (root / "classes.txt").write_text("# id name R G B\r\n\r\n" + "\r\n".join(reversed(lines)))
    assert open_data("folder", root).classes == ("sky", "wet road", "car")


@pytest.mark.parametrize("dataset", ["cityscapes", "voc", "folder"])
def test_missing_data_folder(tmp_path, dataset):
    with pytest.raises(InputError) as error:
        open_data(dataset, tmp_path / "nowhere")
    one_line(error, tmp_path / "nowhere", "--data-dir")
    with pytest.raises(InputError) as error:
        open_data(dataset, None)
    one_line(error, dataset, "--data-dir")


def test_unknown_dataset(tmp_path):
    with pytest.raises(InputError) as error:
        open_data("ade", tmp_path)
    one_line(error, "ade", "cityscapes, voc, folder, toycity")


def write_city(
    root: Path, split: str, name: str, ids: str | None = "labelTrainIds", value=1
) -> None:
    city = name.split("_")[0]
    write_image(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
    if ids is not None:
        write_mask(root / f"gtFine/{split}/{city}/{name}_gtFine_{ids}.png", value=value)


def test_cityscapes(tmp_path):
    write_city(tmp_path, "train", "ulm_000001_000019")
    write_city(tmp_path, "train", "ulm_000001_000019", "labelIds", value=7)
    write_city(tmp_path, "train", "aachen_000002_000019")
    write_city(tmp_path, "val", "lindau_000003_000019", "labelIds", value=26)
    write_city(tmp_path, "test", "berlin_000004_000019", None)
    data = open_data("cityscapes", tmp_path)
    assert names(data, "train") == ["aachen/aachen_000002_000019", "ulm/ulm_000001_000019"]
    assert data.classes == CITYSCAPES_CLASSES
    for sample in data.splits["train"]:  # trainIds are taken where there are both, and not mapped
        assert (data.read_mask(sample.mask) == 1).all()
    assert (data.read_mask(data.splits["val"][0].mask) == 13).all()
    assert data.splits["test"][0].mask is None


def test_cityscapes_wrong_id_is_named_as_the_file_has_it(tmp_path):
    write_city(tmp_path, "train", "ulm_000001_000019", "labelIds", value=40)
    data = open_data("cityscapes", tmp_path)
    with pytest.raises(InputError) as error:
        data.read_mask(data.splits["train"][0].mask)
    one_line(error, "ulm_000001_000019_gtFine_labelIds.png", "id 40,")


def test_not_the_cityscapes_layout(tmp_path):
    with pytest.raises(InputError) as error:
        open_data("cityscapes", tmp_path)
    one_line(error, tmp_path, "leftImg8bit/SPLIT/CITY")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        open_data("cityscapes", tmp_path)
    one_line(error, tmp_path, "no image")


@needs_samples
def test_real_cityscapes_frame(tmp_path):
    source = DATA / "samples/cityscapes_like/pseudo_cityscapes_dataset"
    data = open_data("cityscapes", source)
    assert names(data, "val") == ["frankfurt/frankfurt_000000_000294"]
    (sample,) = data.splits["val"]
    by_train_ids = data.read_mask(sample.mask)
    assert set(np.unique(by_train_ids)) == {0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 255}
    assert read_image(sample.image).size == by_train_ids.shape[::-1] == (256, 128)

    # The official download has labelIds only: the same classes must come out of those.
    for path in source.rglob("*.png"):
        if "labelTrainIds" not in path.name:
            copy = tmp_path / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    data = open_data("cityscapes", tmp_path)
    (sample,) = data.splits["val"]
    assert sample.mask.name.endswith("labelIds.png")
    mapped = data.read_mask(sample.mask)
    assert set(np.unique(mapped)) == set(np.unique(by_train_ids))
    assert (mapped == by_train_ids).mean() > 0.99  # the two files were scaled down differently


def write_voc(root: Path, masks: str = "SegmentationClass", lists: dict | None = None) -> Path:
    for i in range(4):
        write_image(root / f"JPEGImages/2007_{i}.jpg")
        write_mask(root / f"{masks}/2007_{i}.png")
    for name, lines in (lists or {}).items():
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_places(tmp_path, inside):
    home = write_voc(tmp_path / inside, lists={"train": ["2007_2", "2007_0"], "val": ["2007_1"]})
    data = open_data("voc", tmp_path)
    assert data.root == home and data.classes == VOC_CLASSES
    assert names(data, "train") == ["2007_0", "2007_2"] and names(data, "val") == ["2007_1"]
    assert data.splits["val"][0].mask == home / "SegmentationClass/2007_1.png"


def test_voc_prefers_the_augmented_set(tmp_path):
    write_voc(tmp_path, lists={"train": ["2007_0"], "val": ["2007_3"]})
    lines = ["/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png", "2007_0", "2007_2"]
    write_voc(tmp_path, "SegmentationClassAug", {"trainaug": lines})
    data = open_data("voc", tmp_path)
    assert names(data, "train") == ["2007_0", "2007_1", "2007_2"]
    assert {s.mask.parent.name for s in data.splits["train"]} == {"SegmentationClassAug"}


def test_voc_augmented_set_without_its_list(tmp_path):
    write_voc(tmp_path, lists={"train": ["2007_0"], "val": ["2007_3"]})
    write_voc(tmp_path, "SegmentationClassAug")
    assert names(open_data("voc", tmp_path), "train") == ["2007_0", "2007_1", "2007_2"]


def test_voc_val_masks_beside_an_augmented_set_without_them(tmp_path):
    write_voc(tmp_path, lists={"val": ["2007_3"]})
    write_voc(tmp_path, "SegmentationClassAug", {"trainaug": ["2007_0"]})
    (tmp_path / "SegmentationClassAug/2007_3.png").unlink()
    data = open_data("voc", tmp_path)
    assert data.splits["val"][0].mask == tmp_path / "SegmentationClass/2007_3.png"
    assert data.splits["train"][0].mask == tmp_path / "SegmentationClassAug/2007_0.png"


def test_voc_without_lists_takes_all_masks(tmp_path):
    write_voc(tmp_path)
    write_image(tmp_path / "JPEGImages/2007_9.jpg")  # no mask: no segmentation image
    assert names(open_data("voc", tmp_path), "train") == [f"2007_{i}" for i in range(4)]
    write_voc(tmp_path, lists={"val": ["2007_1"]})
    assert names(open_data("voc", tmp_path), "train") == ["2007_0", "2007_2", "2007_3"]


def test_voc_list_naming_a_missing_image(tmp_path):
    write_voc(tmp_path, lists={"train": ["2007_0", "2007_7"]})
    with pytest.raises(InputError) as error:
        open_data("voc", tmp_path)
    one_line(error, "train.txt line 2", "2007_7")


def test_voc_without_its_folders(tmp_path):
    with pytest.raises(InputError) as error:
        open_data("voc", tmp_path)
    one_line(error, tmp_path, "JPEGImages", "VOCdevkit/VOC2012")
    write_image(tmp_path / "JPEGImages/2007_0.jpg")
    with pytest.raises(InputError) as error:
        open_data("voc", tmp_path)
    one_line(error, tmp_path, "SegmentationClassAug")
    (tmp_path / "SegmentationClass").mkdir()
    with pytest.raises(InputError) as error:
        open_data("voc", tmp_path)
    one_line(error, tmp_path, "no training image")


@needs_samples
def test_real_voc_photographs():
    data = open_data("voc", DATA / "samples/voc_like/data_dataset_voc")
    assert names(data, "train") == ["2011_000003", "2011_000006", "2011_000025"]
    found = [set(np.unique(data.read_mask(sample.mask))) for sample in data.splits["train"]]
    assert found == [{0, 5, 15, 255}, {0, 9, 15, 18, 255}, {0, 6, 7}]


@needs_camvid
def test_real_camvid():
    data = open_data("folder", DATA / "camvid")
    counts = [len(data.splits[split]) for split in ("train", "val", "test")]
    assert counts == [367, 101, 233] and data.num_classes == 11
    assert data.classes[0] == "Sky" and data.palette[10] == (0, 128, 192)
    assert all(sample.mask is not None for samples in data.splits.values() for sample in samples)


def test_toycity_is_written_and_read_as_cityscapes(tmp_path, monkeypatch):
    class Toy:
        CLASSES = ("road", "car")
        PALETTE = ((1, 1, 1), (2, 2, 2))

        @staticmethod
        def ensure(root):
            write_city(root, "train", "toy_000000_000000", value=1)

    monkeypatch.setattr(toycity_layout, "toycity", Toy)
    data = open_data("toycity", tmp_path / "new")
    assert names(data, "train") == ["toy/toy_000000_000000"] and data.classes == Toy.CLASSES
    assert (data.read_mask(data.splits["train"][0].mask) == 1).all()
    assert data.lists == tuple(data.root / f"lists/{n}.txt" for n in ("labeled", "unlabeled"))
    monkeypatch.chdir(tmp_path)
    assert open_data("toycity", None).root == Path("data/toycity")
