"""The transforms, held against images whose pixel values are their coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_folders import CROPS, SEEDS, one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cac_fast.overlap import overlap_from_crops
from cac_fast.train.data.augment import (
    PADDING_COLOR,
    LabeledTransform,
    UnlabeledTransform,
    resize_labels,
    resize_part,
)
from cac_fast.train.data.photometric import CHANGES, apply_photometric
from cac_fast.train.data.stream import on_image
from cac_fast.train.errors import InputError

SIZES = st.integers(1, 150)
RANGES = st.sampled_from([(0.1, 1.0), (0.0, 0.3), (0.5, 0.9), (1.0, 1.0)])


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the row, green the column and blue 0: never the padding's color."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([y, x, np.zeros_like(y)], axis=2))


def ids(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((37 * y + 101 * x) % 251).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def draw(height, width, crop, iou_range, seed, mask=None):
    """A pair through the trainer's transform, at scale 1 and with the colors left alone."""
    transform = UnlabeledTransform(crop, (1.0, 1.0), None, iou_range, photometric=False)
    return transform(coordinates(height, width), mask, np.random.default_rng(seed))


def unflipped(item) -> list[torch.Tensor]:
    """Both views as they were before their flips."""
    views = ((item[f"image{view}"], item[f"flip{view}"]) for view in (1, 2))
    return [image.flip(2) if flip else image for image, flip in views]


def cells(item, view: int) -> dict[tuple[int, int], int]:
    """Cells wholly on the image: image (row, column) of the first pixel -> flat cell index."""
    image = item[f"image{view}"].numpy()
    flip = bool(item[f"flip{view}"])
    found = {}
    side = image.shape[1] // 8
    for index in range(side * side):
        row, column = divmod(index, side)
        patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        patch = patch[:, :, ::-1] if flip else patch
        if patch[2].any():  # a pixel of padding
            continue
        y, x = int(patch[0, 0, 0]), int(patch[1, 0, 0])
        rows, columns = np.mgrid[y : y + 8, x : x + 8]
        assert (patch[0] == rows).all() and (patch[1] == columns).all()
        found[y, x] = index
    return found


def overlap_of(item, crop):
    batched = {name: value[None] for name, value in item.items()}
    names = ("offset", "flip1", "flip2", "valid1", "valid2")
    return overlap_from_crops(*(batched[name] for name in names), (crop // 8, crop // 8))


@given(SIZES, SIZES, CROPS, RANGES, SEEDS)
def test_pairs_are_exactly_the_cells_with_the_same_pixels(height, width, crop, iou_range, seed):
    item = draw(height, width, crop, iou_range, seed)
    overlap = overlap_of(item, crop)
    views = cells(item, 1), cells(item, 2)
    for mine, other, partner, valid in (
        (views[0], views[1], overlap.partner1[0], overlap.valid1[0]),
        (views[1], views[0], overlap.partner2[0], overlap.valid2[0]),
    ):
        expected = torch.full_like(partner, -1)
        on_image = torch.zeros_like(valid)
        for place, index in mine.items():
            expected[index] = other.get(place, -1)
            on_image[index] = True
        assert torch.equal(partner, expected)
        assert torch.equal(valid, on_image)


@given(SIZES, SIZES, CROPS, SEEDS)
def test_padding_is_never_paired(height, width, crop, seed):
    item = draw(height, width, crop, (0.1, 1.0), seed)
    overlap = overlap_of(item, crop)
    for view, partner in ((1, overlap.partner1), (2, overlap.partner2)):
        padded = item[f"image{view}"][2] != 0
        blocks = padded.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).any(3).any(1).flatten()
        assert not (blocks & (partner[0] >= 0)).any()


@given(SIZES, SIZES, CROPS, SEEDS)
def test_truth_is_the_id_at_the_center_and_equal_in_both_views(height, width, crop, seed):
    mask = ids(height, width)
    item = draw(height, width, crop, (0.1, 1.0), seed, mask)
    overlap = overlap_of(item, crop)
    truths = [item[f"truth{view}"].flatten() for view in (1, 2)]
    paired = overlap.partner1[0] >= 0
    assert torch.equal(truths[0][paired], truths[1][overlap.partner1[0][paired]])
    for view, truth in enumerate(truths, start=1):
        assert truth.dtype == torch.uint8 and truth.numel() == (crop // 8) ** 2
        for (y, x), index in cells(item, view).items():
            assert truth[index] == mask[y + 4, x + 4]
        padded = unflipped(item)[view - 1][2, 4::8, 4::8] != 0
        padded = padded.flip(1) if item[f"flip{view}"] else padded
        assert torch.equal(padded.flatten(), truth == 255)


@given(SIZES, SIZES, CROPS, SEEDS)
def test_labeled_pixels_and_labels_stay_together(height, width, crop, seed):
    transform = LabeledTransform(crop, (1.0, 1.0))
    mask = ids(height, width)
    item = transform(coordinates(height, width), mask, np.random.default_rng(seed))
    image, label = item["image"].numpy(), item["label"].numpy()
    assert image.shape == (3, crop, crop) and label.shape == (crop, crop)
    on_image = image[2] == 0
    assert on_image.sum() == min(height, crop) * min(width, crop)
    assert (label[on_image] == mask[image[0][on_image], image[1][on_image]]).all()
    assert (label[~on_image] == 255).all()
    assert (image[:, ~on_image].T == PADDING_COLOR).all()


@given(SIZES, SIZES, CROPS, SEEDS)
def test_labeled_crops_know_their_padding(height, width, crop, seed):
    """By whole cells of 8 pixels."""
    transform = LabeledTransform(crop, (1.0, 1.0))
    item = transform(coordinates(height, width), ids(height, width), np.random.default_rng(seed))
    known = on_image(item["flip"][None], item["valid"][None], crop)[0]
    pixels = item["image"][2] == 0
    cells = pixels.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).all(3).all(1)
    assert torch.equal(known, cells.repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_labeled_flip_has_even_odds():
    transform = LabeledTransform(8, (1.0, 1.0))
    mask = np.zeros((8, 8), np.uint8)
    draws = (transform(coordinates(8, 8), mask, np.random.default_rng(seed)) for seed in range(400))
    flipped = sum(int(item["image"][1, 0, 0] == 7) for item in draws)
    assert 150 < flipped < 250


@given(SIZES, SIZES, st.integers(1, 150), st.integers(1, 150), st.data())
def test_resizing_a_part_is_resizing_all_and_cutting(height, width, new_height, new_width, data):
    top = data.draw(st.integers(0, new_height - 1))
    left = data.draw(st.integers(0, new_width - 1))
    bottom = data.draw(st.integers(top + 1, new_height))
    right = data.draw(st.integers(left + 1, new_width))
    image, size, box = noise(height, width), (new_height, new_width), (top, left, bottom, right)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    whole = F.interpolate(planes, size, mode="bilinear", antialias=True)[0]
    cut = whole[:, top:bottom, left:right].int()
    for pixels in (image, np.asarray(image)):
        part = resize_part(pixels, size, box)
        assert part.dtype == torch.uint8
        # Two roundings, of PyTorch's or of Pillow's weights, and half a level.
        assert (part - cut).abs().max() <= 2
    # Nearest: the pixel under the center; the later one where that falls on their border.
    for axis, (first, last, old, new) in enumerate(
        ((top, bottom, height, new_height), (left, right, width, new_width))
    ):
        mask = np.asarray(coordinates(height, width))[..., axis]
        found = resize_labels(mask, size, box).numpy()
        assert found.shape == (bottom - top, right - left)
        picked = found[:, 0] if axis == 0 else found[0]
        assert (picked == [(2 * i + 1) * old // (2 * new) for i in range(first, last)]).all()


@pytest.mark.parametrize("size", [(96, 190), (97, 191), (95, 189), (150, 300), (60, 60), (31, 7)])
def test_resizes_as_pillow(size):
    """Which rounds after each of its two passes, as PyTorch does, by weights of other precision."""
    image, box = noise(96, 190), (5, 3, size[0], size[1] - 1)
    whole = image.resize(size[::-1], Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[box[0] : box[2], box[1] : box[3]].astype(int)
    difference = np.abs(resize_part(image, size, box).permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 2 and difference.mean() < 0.1


@given(SIZES, SIZES, CROPS, SEEDS)
def test_shapes_and_types_at_any_scale(height, width, crop, seed):
    rng = np.random.default_rng(seed)
    item = UnlabeledTransform(crop)(noise(height, width), ids(height, width), rng)
    for view in (1, 2):
        assert item[f"image{view}"].shape == (3, crop, crop)
        assert item[f"image{view}"].dtype == torch.uint8
        assert item[f"truth{view}"].shape == (crop // 8, crop // 8)
        assert item[f"changes_{view}"].shape == (CHANGES,)
        assert item[f"flip{view}"].shape == () and item[f"flip{view}"].dtype == torch.bool
        assert item[f"valid{view}"].shape == (2,) and item[f"valid{view}"].dtype == torch.int64
    assert item["offset"].shape == (2,) and item["offset"].dtype == torch.int64


def test_no_truth_without_a_mask():
    item = draw(40, 40, 16, (0.1, 1.0), seed=0)
    assert set(item) == {"image1", "image2", "offset", "flip1", "flip2", "valid1", "valid2"}


def test_same_generator_same_item():
    transform = UnlabeledTransform(32)
    first, again, other = (
        transform(noise(50, 70), None, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image1"], other["image1"])


def changed(item, view: int) -> torch.Tensor:
    """A view with its colors changed, float, its flip undone."""
    image = apply_photometric(item[f"image{view}"][None].float(), item[f"changes_{view}"][None])[0]
    return image.flip(2) if item[f"flip{view}"] else image


def test_views_get_their_own_colors():
    transform = UnlabeledTransform(32, (1.0, 1.0), iou_range=(1.0, 1.0))
    same = 0
    for seed in range(40):
        item = transform(noise(32, 32), None, np.random.default_rng(seed))
        same += torch.equal(changed(item, 1), changed(item, 2))
    assert same <= 3  # both left alone: 0.0064


def test_photometric_sees_no_padding():
    """It changes a small image in a crop as it changes the image alone, and no padding."""
    for seed in range(20):
        items = [
            UnlabeledTransform(crop, (1.0, 1.0))(noise(16, 24), None, np.random.default_rng(seed))
            for crop in (24, 32)
        ]
        for view in (1, 2):
            small, large = (changed(item, view) for item in items)
            for padding in (small[:, 16:], large[:, 16:], large[:, :, 24:]):
                assert padding.flatten(1).unique(dim=1).flatten().tolist() == [*PADDING_COLOR]
            assert (small[:, :16] - large[:, :16, :24]).abs().max() < 1e-3


def test_jitter_changes_labeled_colors_only():
    mask = ids(40, 40)
    plain, jittered = (
        LabeledTransform(32, jitter=jitter)(noise(40, 40), mask, np.random.default_rng(5))
        for jitter in (False, True)
    )
    assert torch.equal(plain["label"], jittered["label"])
    assert torch.equal(plain["image"], jittered["image"]) and "changes" not in plain
    image = jittered["image"][None].float()
    found = apply_photometric(image.clone(), jittered["changes"][None])
    assert (found - image).abs().mean() > 1


@pytest.mark.parametrize("transform", [LabeledTransform, UnlabeledTransform])
@pytest.mark.parametrize("crop, remedy", [(100, "96 or 104"), (4, "8 or 16"), (0, "8 or 16")])
def test_crop_must_be_a_multiple_of_8(transform, crop, remedy):
    with pytest.raises(InputError) as error:
        transform(crop)
    one_line(error, crop, remedy)
