"""Photometric changes of a batch, held against torchvision's on one image after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from cac_fast.train.data.photometric import (
    apply_photometric,
    draw_jitter,
    draw_photometric,
    no_change,
    set_place,
)

SIZE = 20


def batch(count: int = 6) -> Tensor:
    """Crops with saturated, gray and black pixels among them."""
    images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 255
    images[:, :, :2] = images[:, :1, :2]
    images[:, 1:, 2:4] = 0
    images[:, :, 4] = 0
    images[:, :, 5] = 255
    return images


def drawn(count: int, draw=draw_photometric) -> Tensor:
    rows = [draw(np.random.default_rng(seed)) for seed in range(count)]
    for row in rows:
        set_place(row, SIZE, 0, SIZE)
    return torch.from_numpy(np.stack(rows))


def by_torchvision(image: Tensor, row: Tensor) -> Tensor:
    """The same changes, in the same order, of one image in [0, 1]."""
    sigma, *rest = row.tolist()
    if sigma > 0:
        image = functional.gaussian_blur(image, [5, 5], [sigma, sigma])
    names = ("brightness", "contrast", "saturation", "hue")
    turns = sorted((turn, i) for i, turn in enumerate(rest[4:8]) if turn >= 0)
    for _, i in turns:
        image = getattr(functional, f"adjust_{names[i]}")(image, rest[i])
    return functional.rgb_to_grayscale(image, num_output_channels=3) if rest[8] else image


@pytest.mark.parametrize("draw", [draw_photometric, draw_jitter])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_torchvision(draw, memory_format):
    changes = drawn(40, draw)
    images = batch(40)
    found = apply_photometric(images.clone().contiguous(memory_format=memory_format), changes)
    for image, row, mine in zip(images, changes, found, strict=True):
        # Half a level: torchvision's weight of red is 0.2989 and not 0.299.
        assert (mine - 255 * by_torchvision(image / 255, row)).abs().max() < 0.5


def test_a_crop_does_not_depend_on_its_batch():
    changes, images = drawn(6), batch()
    together = apply_photometric(images.clone(), changes)
    for i in range(6):
        alone = apply_photometric(images[i : i + 1].clone(), changes[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-3)


def test_no_change_changes_nothing():
    changes = no_change()
    set_place(changes, SIZE, 0, SIZE)
    images = batch(2)
    found = apply_photometric(images.clone(), torch.from_numpy(changes).expand(2, -1))
    assert torch.equal(found, images)


def test_a_tiny_image_is_not_blurred():
    changes = no_change()
    changes[0] = 1.0
    set_place(changes, 2, 0, 2)
    images = batch(1)
    assert torch.equal(apply_photometric(images.clone(), torch.from_numpy(changes)[None]), images)


def test_probabilities():
    """Blur 0.5, jitter 0.8, gray 0.2, within five sigma of 1,000 draws; and the ranges."""
    rows = drawn(1000)
    sigma, amounts, turns, gray = rows[:, 0], rows[:, 1:5], rows[:, 5:9], rows[:, 9]
    jitter = turns[:, 0] >= 0
    for chosen, share in ((sigma > 0, 0.5), (jitter, 0.8), (gray > 0, 0.2)):
        assert abs(chosen.double().mean() - share) < 5 * (share * (1 - share) / 1000) ** 0.5
    assert 0.1 <= sigma[sigma > 0].min() < 0.15 and 1.95 < sigma.max() <= 2
    for kind, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        values, room = amounts[jitter, kind], 0.05 * (high - low)
        assert low <= values.min() < low + room and high - room < values.max() <= high
    orders = turns[jitter].sort(1)
    assert (orders.values == torch.arange(4.0)).all()
    assert len(orders.indices.unique(dim=0)) == 24
