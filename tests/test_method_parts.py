"""What several methods share: CutMix, the ramp of a weight, second networks, refused settings."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_training import CPU
from test_step import Backbone, Head
from torch import nn

from cac_fast.train import config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods import Method, cct, method_class
from cac_fast.train.methods.mixing import cutmix, inside
from cac_fast.train.methods.ramp import sigmoid_ramp
from cac_fast.train.networks import Segmenter


def built(name: str, *options: str, network: Segmenter | None = None) -> Method:
    """A method whose networks all start as `network`, as by `--weights RUN`."""
    settings = config.parse(["--dataset", "toycity", "--method", name, *options])
    if network is None:
        network = Segmenter(Backbone(), Head(), 3, dropout=0.5)
    return method_class(settings)(lambda: copy.deepcopy(network), CPU, settings, torch.float32)


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


@pytest.mark.parametrize(
    ("name", "batch", "processes", "unmixed"),
    [
        ("cps --cutmix", 8, 8, "of 1 one stays as it is; use a --batch-size that 16 divides"),
        ("fixmatch", 3, 1, "of 3 one stays as it is; use a --batch-size that 2 divides"),
        ("fixmatch", 8, 4, None),
        ("cps", 3, 1, None),
    ],
)
def test_images_without_a_partner_are_told_of(name, batch, processes, unmixed, capsys):
    words = ["--dataset", "toycity", "--method", *name.split(), "--batch-size", str(batch)]
    settings = config.parse(words)
    world = World(0, processes, torch.device("cpu"))
    network = Segmenter(Backbone(), Head(), 3, dropout=0.5)
    method_class(settings)(lambda: copy.deepcopy(network), world, settings, torch.float32)
    told = capsys.readouterr().err
    assert told == "" if unmixed is None else unmixed in told


@pytest.mark.parametrize(("step", "weight"), [(0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0)])
def test_the_ramp_at_its_ends_and_half_way(step: int, weight: float):
    assert sigmoid_ramp(step, 10) == pytest.approx(weight, rel=1e-12)
    assert sigmoid_ramp(step, 0) == 1.0 and sigmoid_ramp(25, 10) == 1.0


@pytest.mark.parametrize("name", ["cps", "gct"])
def test_two_networks_differ_where_both_start_from_one_run(name: str):
    model = built(name)
    one, two = (dict(network.named_modules()) for network in model.segmenters())
    convolutions = {module for module in one if isinstance(one[module], nn.Conv2d)}
    equal = {
        module for module in convolutions if torch.equal(one[module].weight, two[module].weight)
    }
    assert equal == {module for module in convolutions if module.startswith("backbone.")} != set()


@pytest.mark.parametrize("name", ["cct", "cps", "s4gan"])
def test_passes_of_their_own_are_not_joined(name: str):
    with pytest.raises(InputError) as error:
        built(name, "--forward", "joint")
    assert str(error.value) == (
        f"--forward joint: {name} has labeled and unlabeled images in passes of their own: use "
        "--forward separate"
    )


def test_cct_compares_with_the_classifier_without_dropout(monkeypatch):
    monkeypatch.setattr(cct, "PERTURBATIONS", (lambda features: features,))
    model = built("cct", "--auxiliary-heads", "1")
    (head,) = model.heads
    head.load_state_dict(model.network.classifier[-1].state_dict())
    images, cells = torch.randn(2, 3, 32, 32), torch.ones(2, 4, 4, dtype=torch.bool)
    assert model.training and model.distance(images, cells) == 0
