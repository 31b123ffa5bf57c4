"""Views of unlabeled images: what is drawn for them, and what is made of it on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import CPU

from cac_fast.train import config
from cac_fast.train.data import opening
from cac_fast.train.data.augment import PADDING_COLOR, UnlabeledTransform
from cac_fast.train.data.images import IMAGENET_MEAN, IMAGENET_STD
from cac_fast.train.data.photometric import apply_photometric
from cac_fast.train.data.stream import Stream
from cac_fast.train.data.views import PAIR, View, draw_boxes
from cac_fast.train.distributed import World

MIXED = {
    "weak": View(1),
    "strong": View(1, "strong", boxes=1),
    "other": View(2, "cac"),
    "boxes": View(1, boxes=3),
}


def stream(folder_data, views, world=CPU, **settings) -> Stream:
    given = {"batch_size": 4, "crop_size": 32, "workers": 0, "seed": 3} | settings
    of = config.Config.of(dataset="folder", data_dir=str(folder_data), **given)
    return Stream(of, world, *opening.open_lists(of), views)


def batch(*arguments, start: int = 1, **settings) -> dict[str, torch.Tensor]:
    (step,) = stream(*arguments, **settings).steps(start, start + 1, True)
    return step.unlabeled


def item(views, seed: int, size=(60, 70), crop: int = 32) -> dict[str, torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    transform = UnlabeledTransform(crop, (1.0, 1.0), views=views)
    return transform(Image.fromarray(pixels), None, np.random.default_rng(seed))


def test_views_of_one_crop_differ_in_color_alone(folder_data):
    found = batch(folder_data, MIXED)
    images = {name for name in found if name.startswith("image")}
    assert images == {f"image_{name}" for name in MIXED}
    assert torch.equal(found["image_weak"], found["image_boxes"])
    assert not torch.equal(found["image_weak"], found["image_strong"])
    assert not torch.equal(found["image_weak"], found["image_other"])
    assert found["boxes_strong"].shape == (4, 1, 4) and found["boxes_boxes"].shape == (4, 3, 4)
    assert found["boxes_strong"].dtype == torch.int16 and "boxes_weak" not in found
    assert {"flip1", "flip2", "valid1", "valid2", "offset"} <= found.keys()


def test_the_weak_view_is_the_crop_of_the_pair(folder_data):
    """All methods see the same images and the same first crop for a seed."""
    pair, weak = item(PAIR, seed=5), item({"weak": View(1)}, seed=5)
    assert set(weak) == {"image1", "flip1", "valid1"}
    for name in ("flip1", "valid1"):
        assert torch.equal(weak[name], pair[name])
    difference = weak["image1"].int() - pair["image1"].int()
    assert difference.abs().max() <= 1
    second = item({"weak": View(2)}, seed=5)
    assert set(second) == {"image2", "flip2", "valid2"}
    assert torch.equal(second["flip2"], pair["flip2"])


def test_only_the_views_that_ask_for_colors_change_them():
    found = item(MIXED, seed=1)
    assert {name for name in found if "changes" in name} == {"changes_strong", "changes_other"}


def test_strong_colors_reach_further():
    """0.5 and a fourth of a turn, where CAC's are 0.4 and a tenth; the rest is drawn alike."""
    views = {"cac": View(1, "cac"), "strong": View(1, "strong")}
    drawn = [item(views, seed) for seed in range(400)]
    rows = {name: torch.stack([one[f"changes_{name}"] for one in drawn]) for name in views}
    for name, contrast, hue in (("cac", 0.4, 0.1), ("strong", 0.5, 0.25)):
        jittered = rows[name][rows[name][:, 5] >= 0]
        assert 0.7 < len(jittered) / 400 < 0.9
        factors, shift = jittered[:, 1:4], jittered[:, 4]
        assert 0.95 * contrast < (factors - 1).abs().max() <= contrast + 1e-6
        assert 0.95 * hue < shift.abs().max() <= hue
        assert 0.4 < (rows[name][:, 0] > 0).float().mean() < 0.6  # blurred
        assert 0.12 < rows[name][:, 9].mean() < 0.28  # gray


def test_what_is_drawn_depends_on_the_position_alone(folder_data):
    whole = batch(folder_data, MIXED)
    parts = [batch(folder_data, MIXED, World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    first, second = (step.unlabeled for step in stream(folder_data, MIXED).steps(0, 2, True))
    assert all(torch.equal(second[name], value) for name, value in whole.items())
    assert not torch.equal(first["image_strong"], second["image_strong"])


def test_the_image_is_where_it_is_said_to_be(folder_data):
    """A crop larger than the images, flipped or not: all else has the padding's color."""
    settings = {"crop_size": 80, "unlabeled_scale": (1.0, 1.0)}
    found = batch(folder_data, {"weak": View(1)}, **settings)
    flips = set(found["flip1"].tolist())
    flips |= set(batch(folder_data, {"weak": View(1)}, start=2, **settings)["flip1"].tolist())
    assert flips == {False, True}
    for start in (1, 2):
        found = batch(folder_data, {"weak": View(1)}, start=start, **settings)
        color = torch.tensor(PADDING_COLOR) / 255
        color = (color - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        padded = ((found["image_weak"] - color[:, None, None]).abs() < 1e-5).all(1)
        on_image = found["on_image1"]
        assert on_image.shape == (4, 80, 80) and on_image.dtype == torch.bool
        assert on_image.sum((1, 2)).tolist() == [48 * 56] * 4  # the images' size
        assert torch.equal(on_image, ~padded)


@pytest.mark.parametrize("crop", [8, 64, 321])
def test_boxes_lie_in_the_crop(crop):
    rng = np.random.default_rng(0)
    one = np.concatenate([draw_boxes(crop, 1, rng) for _ in range(400)]).astype(int)
    three = np.stack([draw_boxes(crop, 3, rng) for _ in range(400)]).astype(int)
    for boxes in (one, three.reshape(-1, 4)):
        top, left, bottom, right = boxes.T
        assert (top >= 0).all() and (top <= bottom).all() and (bottom <= crop).all()
        assert (left >= 0).all() and (left <= right).all() and (right <= crop).all()
    if crop < 64:
        return
    areas = (one[:, 2] - one[:, 0]) * (one[:, 3] - one[:, 1]) / crop**2
    drawn = areas > 0
    assert 0.4 < drawn.mean() < 0.6
    assert 0.015 < areas[drawn].min() < 0.05 and 0.3 < areas.max() <= 0.4
    proportions = (one[drawn, 2] - one[drawn, 0]) / (one[drawn, 3] - one[drawn, 1])
    assert 0.25 < proportions.min() < 0.6 and 1.7 < proportions.max() < 4
    areas = (three[..., 2] - three[..., 0]) * (three[..., 3] - three[..., 1]) / crop**2
    assert 0.07 < areas.min() < 0.09 and 0.15 < areas.max() < 0.18  # a third of 0.25 to 0.5


def test_padding_keeps_its_color_in_every_view():
    found = item(MIXED, seed=2, size=(20, 24))
    image = found["image1"][None].float()
    changed = apply_photometric(image.clone(), found["changes_strong"][None])
    assert torch.equal(changed[:, :, 20:], image[:, :, 20:])
