"""Which classes are in an image: label files, VOC's annotations, masks."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from data_folders import one_line, write_folder, write_image, write_mask

from cac_fast.train.data.layouts import SegmentationData, open_data
from cac_fast.train.errors import InputError
from cac_fast.train.weak.labels import (
    FROM_MASKS,
    ImageLabels,
    background_of,
    find_labels,
    foreground_of,
)

E_ACUTE = "\u00e9"


@pytest.fixture
def data(tmp_path: Path) -> SegmentationData:
    """Classes sky, wet road, car; images t00 to t07, the first four with masks of all classes."""
    return open_data("folder", write_folder(tmp_path / "data"))


def labels_of(data: SegmentationData, content: str | bytes | None) -> ImageLabels:
    """The labels of the train split by a file with this content."""
    path = data.root.parent / "labels.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return find_labels(str(path), data.splits["train"], data)


def by_name(found: ImageLabels) -> dict[str, tuple[int, ...]]:
    return dict(zip((sample.name for sample in found.samples), found.labels, strict=True))


def test_lines_in_all_their_forms(data: SegmentationData) -> None:
    content = (
        "# a comment\n\n"
        't00 car "wet road"\n'
        "t01.png\tsky\twet road\n"
        "images/train/t02.png 'wet road' car car\n"
        "t05\n"
    )
    expected = {"t00": (1, 2), "t01": (0, 1), "t02": (1, 2), "t05": ()}
    marked = b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()
    for form in (content, marked):
        found = labels_of(data, form)
        assert by_name(found) == expected
        assert found.from_masks == 0 and "6 images" not in found.found
        assert "4 images, 4 others have none" in found.found


def test_labels_of_other_images_are_passed_over(data: SegmentationData) -> None:
    found = labels_of(data, "t00 car\nimages/val/v00.png sky\n")
    assert by_name(found) == {"t00": (2,)}
    assert "1 images, 7 others have none, 1 labeled images are not of" in found.found


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    for form in ("NFC", "NFD"):
        (root / "classes.txt").write_text(
            f"0 sky 1 2 3\n1 {unicodedata.normalize(form, 'caf' + E_ACUTE)} 4 5 6\n2 car 7 8 9\n",
            encoding="utf-8",
        )
        data = open_data("folder", root)
        for other in ("NFC", "NFD"):
            line = "t00 " + unicodedata.normalize(other, "caf" + E_ACUTE)
            assert by_name(labels_of(data, line)) == {"t00": (1,)}


def test_other_labels_have_another_digest(data: SegmentationData) -> None:
    digests = {labels_of(data, text).digest() for text in ("t00 car", "t00 sky", "t01 car")}
    assert len(digests) == 3
    assert labels_of(data, "t01 car\n").digest() in digests


def test_background_is_no_label(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "classes.txt").write_text("0 sky 1 2 3\n1 background 4 5 6\n2 car 7 8 9\n")
    data = open_data("folder", root)
    assert (background_of(data), foreground_of(data)) == (1, (0, 2))
    assert by_name(labels_of(data, "t00 background car\nt01 background")) == {
        "t00": (2,),
        "t01": (),
    }
    assert by_name(find_labels(FROM_MASKS, data.splits["train"], data)) == dict.fromkeys(
        ("t00", "t01", "t02", "t03"), (0, 2)
    )


def test_without_the_class_background_there_is_none(data: SegmentationData) -> None:
    assert (background_of(data), foreground_of(data)) == (None, (0, 1, 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("t00 car\nt01 carr\n", ("labels.txt line 2", "unknown class 'carr'", "did you mean car?")),
        ("t00 zebra", ("line 1", "unknown class 'zebra'", "sky, wet road, car")),
        ("t00 wet road", ("line 1", "unknown class 'wet'")),
        ("t99 car", ("line 1", "t99 is neither an image")),
        ("t00 car\n\nt00.png sky\n", ("line 3", "t00.png is in line 1 already")),
        ("t00 'car\n", ("line 1", "cannot be split", "no closing quotation")),
        ("", ("labels.txt", "no label at all")),
        ("t00\nt01\n", ("labels.txt", "no label at all")),
        (b"t00 car\0", ("labels.txt", "cannot be read")),
        (None, ("labels.txt does not exist",)),
    ],
)
def test_bad_files_get_one_line(
    data: SegmentationData, content: str | bytes | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        labels_of(data, content)
    one_line(caught, *words)


def test_data_without_labels_of_its_own_needs_a_file(data: SegmentationData) -> None:
    with pytest.raises(InputError) as caught:
        find_labels(None, data.splits["train"], data)
    one_line(caught, "--image-labels is needed for --dataset folder", FROM_MASKS)


def test_classes_of_the_masks(data: SegmentationData) -> None:
    write_mask(data.root / "masks/train/t02.png", value=1)
    found = find_labels(FROM_MASKS, data.splits["train"], data)
    assert by_name(found) == {"t00": (0, 1, 2), "t01": (0, 1, 2), "t02": (1,), "t03": (0, 1, 2)}
    assert found.from_masks == 4 and "MASKS" in found.found


# ---- VOC


def annotation(*names: str) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part>"
        "</object>"
        for name in names
    )
    return f"<annotation><folder>VOC2012</folder>{objects}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> SegmentationData:
    """Three images: a and b with annotations, c with a mask alone (ids 0 to 2)."""
    root = tmp_path / "VOC2012"
    for name in "abc":
        write_image(root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"SegmentationClass/{name}.png")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\nc\n")
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text(annotation("person", "cat", "background", "person"))
    (root / "Annotations/b.xml").write_text(annotation())
    return open_data("voc", root)


def test_objects_of_annotations(voc: SegmentationData) -> None:
    found = find_labels(None, voc.splits["train"], voc)
    assert by_name(found) == {"a": (8, 15), "b": (), "c": (1, 2)}
    assert found.from_masks == 1 and "of 1 without a file there the classes of the MASKS" in (
        found.found
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (annotation("catt"), ("a.xml", "unknown class 'catt'", "did you mean cat?")),
        ("<annotation>", ("a.xml", "cannot be read", "replace or remove")),
    ],
)
def test_bad_annotations(voc: SegmentationData, content: str, words: tuple[str, ...]) -> None:
    (voc.root / "Annotations/a.xml").write_text(content)
    with pytest.raises(InputError) as caught:
        find_labels(None, voc.splits["train"], voc)
    one_line(caught, *words)
