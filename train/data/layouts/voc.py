"""PASCAL VOC 2012 and its augmented masks: JPEGImages, SegmentationClassAug, ImageSets."""

from __future__ import annotations

from pathlib import Path

from cac_fast.train.data import names
from cac_fast.train.data.layouts import SPLITS, SegmentationData, paired_samples
from cac_fast.train.data.listing import by_name, files, masks_by_name, not_read, pair
from cac_fast.train.errors import InputError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOC_PALETTE = (
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
    (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128),
    (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0),
    (128, 192, 0), (0, 64, 128),
)  # fmt: skip

VOC_BORDER_COLOR = (224, 224, 192)


def open_voc(root: Path) -> SegmentationData:
    """List VOCdevkit, VOC2012 or the folder that holds one of them."""
    places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    home = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if home is None:
        raise InputError(
            f"no JPEGImages folder was found in {root}, {root}/VOC2012 or "
            f"{root}/VOCdevkit/VOC2012: give the folder that holds JPEGImages"
        )
    kinds = "SegmentationClassAug", "SegmentationClass"
    folders = [home / kind for kind in kinds if (home / kind).is_dir()]
    if not folders:
        raise InputError(
            f"{home} holds neither SegmentationClassAug nor SegmentationClass: "
            "unpack the masks beside JPEGImages"
        )
    found = list(files(home / "JPEGImages"))
    notes = not_read(home / "JPEGImages", found)
    images = by_name(found, lambda path: path.stem)
    # Some copies of SegmentationClassAug lack the masks of val.
    labels: dict[str, Path] = {}
    for folder in reversed(folders):
        masks = masks_by_name(files(folder), lambda path: path.stem)
        matched, said = pair(images, masks, f"the masks in {folder}")
        labels |= matched
        notes += said
    lists = home / "ImageSets" / "Segmentation"
    val = _voc_names(lists / "val.txt", images)
    named = [lists / "trainaug.txt"]
    if folders[0].name != "SegmentationClassAug":
        named.append(lists / "train.txt")
    train_list = next((path for path in named if path.is_file()), None)
    # The augmented set is all that has a mask and is not of val.
    train = _voc_names(train_list, images) if train_list else sorted(labels.keys() - set(val))
    splits = {
        split: paired_samples({name: images[name] for name in chosen}, labels)
        for split, chosen in zip(SPLITS, (train, val, ()), strict=True)
    }
    if not splits["train"]:
        raise InputError(
            f"no training image was found in {home} (ImageSets/Segmentation/trainaug.txt, "
            f"train.txt, or masks in {folders[0].name}): add a list or masks"
        )
    tables = (VOC_CLASSES, VOC_PALETTE)
    return SegmentationData(
        "voc", home, *tables, splits, ignore_color=VOC_BORDER_COLOR, notes=tuple(notes)
    )


def _voc_names(path: Path, images: dict[str, Path]) -> list[str]:
    """Names in a VOC list; some copies hold `/JPEGImages/NAME.jpg ...` lines instead."""
    if not path.is_file():
        return []
    loose = {names.folded(name): name for name in images}

    def find(text: str) -> str | None:
        for form in names.spellings(text):
            last = form.rpartition("/")[2]
            for name in (form, last, names.without_suffix(last), loose.get(names.folded(last))):
                if name in images:
                    return name
        return None

    found = []
    for number, line in names.read_list(path):
        texts = (line, *(image for image, _ in names.columns(line)))
        name = next((name for text in texts if (name := find(text)) is not None), None)
        if name is None:
            wanted = names.without_suffix(Path(line.split()[0]).name)
            near = names.nearest(wanted, images)
            raise InputError(
                f"{path} line {number}: there is no image {wanted} in {path.parents[2]}/JPEGImages"
                f"{f' (the nearest name is {near})' if near else ''}: "
                "add the image or remove the line"
            )
        found.append(name)
    return list(dict.fromkeys(found))
