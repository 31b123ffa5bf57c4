"""CutMix of several rectangles, and the ramp of unsupervised losses."""

from __future__ import annotations

import math

import pytest
import torch

from cac_fast.train.methods.mixing import cutmix, inside
from cac_fast.train.methods.ramp import sigmoid_ramp


def test_every_box_inverts_what_it_covers():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.randint(0, 12, (5, 3, 4), dtype=torch.int16, generator=generator)
    covered = inside(boxes, torch.Size((9, 11)))
    assert covered.shape == (5, 9, 11)
    for image, of_image in enumerate(boxes.tolist()):
        for y in range(9):
            for x in range(11):
                taken = False
                for top, left, bottom, right in of_image:
                    if top <= y < bottom and left <= x < right:
                        taken = not taken
                assert covered[image, y, x] == taken
    assert 20 < covered.sum() < 400


def test_pairs_give_each_other_their_rectangles():
    values = torch.arange(4).reshape(4, 1, 1).expand(4, 2, 3)
    boxes = torch.zeros(4, 2, 3, dtype=torch.bool)
    boxes[:, 0, 1] = True
    mixed = cutmix(values, boxes)
    assert mixed[:, 0, 1].tolist() == [1, 0, 3, 2]
    assert torch.equal(mixed[~boxes], values[~boxes])


@pytest.mark.parametrize(("step", "weight"), [(0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0)])
def test_the_ramp_at_its_ends_and_half_way(step: int, weight: float):
    assert sigmoid_ramp(step, 10) == pytest.approx(weight, rel=1e-12)
    assert sigmoid_ramp(step, 0) == 1.0 and sigmoid_ramp(25, 10) == 1.0
