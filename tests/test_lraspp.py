"""LR-ASPP: its head, and a training of it through every seam that a network has."""

from __future__ import annotations

import copy
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_training import CPU, assert_same_bits, run, weights

import cac_fast.train
from cac_fast.train import config, engine
from cac_fast.train.data import opening
from cac_fast.train.data.stream import Stream
from cac_fast.train.networks import build_network
from cac_fast.train.networks.lraspp import LRASPPHead

CLASSES = 5

mobile_nets = pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large"])


@torch.no_grad()
def test_lraspp_joins_gated_high_level_features_and_low_level_ones():
    torch.manual_seed(0)
    head = LRASPPHead(3, 6).eval()
    low, high = torch.randn(2, 3, 7, 10), torch.randn(2, 6, 4, 5)
    features = head(low, high)
    assert features.shape == (2, head.feature_channels, 7, 10)
    assert torch.equal(features[:, -3:], low)
    conv, norm, _ = head.reduce
    gate = head.gate[1](high.mean(dim=(2, 3), keepdim=True)).sigmoid()
    gated = norm(conv(high)).relu() * gate
    expected = F.interpolate(gated, size=(7, 10), mode="bilinear", align_corners=True)
    torch.testing.assert_close(features[:, :-3], expected)


@torch.no_grad()
def test_lraspp_is_torchvisions_but_for_the_upsampling():
    """One classifier of what is joined is the sum of torchvision's two, of low and of high."""
    theirs = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ).eval()
    classifier = theirs.classifier
    torch.manual_seed(0)
    low, high = torch.randn(1, 40, 9, 13), torch.randn(1, 960, 5, 7)
    head = LRASPPHead(40, 960).eval()
    head.reduce.load_state_dict(classifier.cbr.state_dict())
    head.gate[1].load_state_dict(
        {"weight": classifier.scale[1].weight, "bias": torch.zeros(head.gate[1].out_channels)}
    )
    weight = torch.cat([classifier.high_classifier.weight, classifier.low_classifier.weight], dim=1)
    bias = classifier.high_classifier.bias + classifier.low_classifier.bias
    ours = F.conv2d(head(low, high), weight, bias)
    gated = classifier.cbr(high) * classifier.scale(high)
    gated = F.interpolate(gated, size=(9, 13), mode="bilinear", align_corners=True)
    expected = classifier.low_classifier(low) + classifier.high_classifier(gated)
    torch.testing.assert_close(ours, expected)


def test_lraspp_trains_on_one_image():
    """Its gate has no BatchNorm: unlike ASPP's it takes the mean of a single image."""
    net = build_network("lraspp", "mobilenet_v2", CLASSES).train()
    net(torch.randn(1, 3, 32, 48)).sum().backward()


@mobile_nets
def test_recomputed_blocks_change_nothing(backbone):
    torch.manual_seed(0)
    kept = build_network("lraspp", backbone, CLASSES).train()
    recomputed = copy.deepcopy(kept)
    recomputed.checkpoint_activations()
    x = torch.randn(2, 3, 40, 56)
    for net in (kept, recomputed):
        net(x).square().mean().backward()
    for (name, one), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert_same_bits(kept.state_dict(), recomputed.state_dict())


@mobile_nets
def test_an_interrupted_training_ends_with_the_same_bits(
    backbone, folder_data, tmp_path, monkeypatch
):
    options = f"--network lraspp --backbone {backbone} --iterations 6 --deterministic".split()
    run(folder_data, tmp_path / "whole", *options)
    step = engine.Trainer._train_step

    def interrupted(self, *batch):
        step(self, *batch)
        if self.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_train_step", interrupted)
        with pytest.raises(SystemExit):
            run(folder_data, tmp_path / "stopped", *options)
    lines = run(folder_data, tmp_path / "stopped", *options)
    assert lines[-1]["kind"] == "val"
    assert_same_bits(*(weights(tmp_path / name / "last.pt") for name in ("whole", "stopped")))
    predictor = cac_fast.train.load(tmp_path / "whole" / "best.pt")
    image = torch.randint(256, (3, 45, 70), dtype=torch.uint8)
    assert predictor.predict(image).shape == (45, 70)
    assert predictor.predict(image, tile=64).dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--network lraspp --backbone mobilenet_v2", True),
        ("--network lraspp --backbone mobilenet_v3_large", True),
        ("--network lraspp --backbone mobilenet_v2 --no-channels-last", False),
        ("--network lraspp --backbone resnet18", False),
        ("--network deeplabv3plus --backbone mobilenet_v2", False),
    ],
)
def test_mobile_nets_train_in_channels_last_on_a_cpu(options, expected, folder_data):
    arguments = ["--dataset", "folder", "--data-dir", str(folder_data), *options.split()]
    settings = config.parse([*arguments, "--batch-size", "2", "--crop-size", "32", "--workers=0"])
    stream = Stream(settings, CPU, *opening.open_lists(settings))
    (step,) = stream.steps(0, 1, True)
    for image in (step.labeled["image"], step.unlabeled["image_1"]):
        assert image.is_contiguous(memory_format=torch.channels_last) == expected
