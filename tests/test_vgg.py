"""VGG-16 as an encoder: strides, torchvision's names and values, norms that may not be there."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from small_training import assert_same_bits, run, weights
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.vgg import cfgs, make_layers

import cac_fast.train
from cac_fast.train.errors import InputError
from cac_fast.train.networks import (
    NETWORKS,
    Segmenter,
    build_network,
    freeze_batch_norm,
    load_backbone_weights,
    synchronize_batch_norm,
)
from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.vgg import VGGBackbone, _PoolAtEveryLocation

CLASSES = 5
STRIDES = {"deeplabv3plus": (16, 4), "lraspp": (16, 8), "pspnet": (8, 4)}
# Where torchvision's layers with ReLU 3_3, 4_3 and 5_3 end, and tensors without counters.
ENDS = {"vgg16": (16, 23, 30), "vgg16_bn": (23, 33, 43)}
TENSORS = {"vgg16": 26, "vgg16_bn": 78}

every_backbone = pytest.mark.parametrize("backbone", ENDS)
every_network = pytest.mark.parametrize("network", NETWORKS.names)


@functools.cache
def original(backbone: str) -> nn.Sequential:
    """torchvision's layers in double precision, with norms and biases so that padding shows."""
    torch.manual_seed(1)
    layers = make_layers(cfgs["D"], batch_norm=backbone == "vgg16_bn")
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return layers.double().eval()


def file_of(backbone: str) -> dict[str, torch.Tensor]:
    """What torchvision's file holds; its classifier's first layer only, and small."""
    state = {f"features.{name}": value for name, value in original(backbone).state_dict().items()}
    return state | {"classifier.0.weight": torch.ones(2, 2), "classifier.0.bias": torch.ones(2)}


def with_original_weights(backbone: str, output_stride: int, low_stride: int) -> VGGBackbone:
    encoder = build_backbone(backbone, output_stride, low_stride).double().eval()
    encoder.features.load_state_dict(original(backbone).state_dict(), strict=True)
    return encoder


@functools.cache
def built(network: str, backbone: str) -> Segmenter:
    """A network for the tests that do not change it, or set what they change."""
    torch.manual_seed(0)
    return build_network(network, backbone, CLASSES, dropout=False)


# --- shapes and values ----------------------------------------------------------------------


@every_backbone
@every_network
@pytest.mark.parametrize("size", [(64, 96), (40, 72), (33, 47), (36, 44), (49, 75)])
@torch.no_grad()
def test_maps_have_their_strides_rounded_up(backbone, network, size):
    output_stride, low_stride = STRIDES[network]
    with torch.device("meta"):
        net = build_network(network, backbone, CLASSES).eval()
    low, high = net.backbone(torch.empty(2, 3, *size, device="meta"))
    for found, channels, stride in (
        (low, {4: 256, 8: 512}[low_stride], low_stride),
        (high, 512, output_stride),
    ):
        assert found.shape == (2, channels, *(-(-side // stride) for side in size))
    assert (net.backbone.low_channels, net.backbone.high_channels) == (low.shape[1], 512)
    assert net(torch.empty(1, 3, *size, device="meta")).shape == (1, CLASSES, *size)


@every_backbone
@pytest.mark.parametrize(("output_stride", "low_stride"), STRIDES.values())
@torch.no_grad()
def test_values_are_torchvisions(backbone, output_stride, low_stride):
    """At stride 8 at every second location: the others lie between those of torchvision."""
    encoder, layers = with_original_weights(backbone, output_stride, low_stride), original(backbone)
    third, fourth, end = ENDS[backbone]
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    low, high = encoder(x)
    every = 16 // output_stride
    expected = layers[: third if low_stride == 4 else fourth](x), layers[:end](x)
    torch.testing.assert_close(low, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(high[:, :, ::every, ::every], expected[1], rtol=1e-9, atol=1e-9)
    assert expected[1].std() > 0.1


@torch.no_grad()
def test_what_lies_beyond_the_border_never_wins():
    x = torch.randn(2, 3, 4, 5) - 10
    found = _PoolAtEveryLocation()(x)
    for row, column in ((0, 0), (2, 3), (3, 1), (1, 4), (3, 4)):
        window = x[:, :, row : row + 2, column : column + 2]
        assert torch.equal(found[:, :, row, column], window.amax(dim=(2, 3)))
    assert found.shape == x.shape


# --- weights --------------------------------------------------------------------------------


@every_backbone
def test_names_and_shapes_are_torchvisions(backbone):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(backbone, weights=None).state_dict()
    expected = [(n, t.shape) for n, t in theirs.items() if n.startswith("features.")]
    ours = build_backbone(backbone, 8, 4).state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == expected


@every_backbone
def test_torchvisions_file_leaves_nothing_missing(backbone, tmp_path):
    torch.save(file_of(backbone), tmp_path / "weights.pth")
    net = build_network("pspnet", backbone, CLASSES)
    report = load_backbone_weights(net, tmp_path / "weights.pth")
    assert (report.loaded, report.missing) == (TENSORS[backbone], [])
    assert report.skipped == ["classifier.0.weight", "classifier.0.bias"]
    for name, tensor in net.backbone.features.named_parameters():
        torch.testing.assert_close(tensor.data, original(backbone).state_dict()[name].float())


@pytest.mark.parametrize(
    ("backbone", "other"),
    [("vgg16", "vgg16_bn"), ("vgg16_bn", "vgg16"), ("resnet18", "vgg16"), ("resnet18", "vgg16_bn")],
)
def test_a_file_of_another_is_refused(backbone, other, tmp_path):
    torch.save(file_of(other), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth' is of another architecture"):
        load_backbone_weights(built("deeplabv3plus", backbone), tmp_path / "weights.pth")


# --- norms, gradients, recomputation --------------------------------------------------------


def test_freeze_bn_finds_norms_of_the_head_alone_without_norms_in_the_backbone():
    for backbone, of_backbone in (("vgg16", 0), ("vgg16_bn", 13)):
        net = built("deeplabv3plus", backbone).train()
        freeze_batch_norm(net)
        frozen = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm) and not m.training]
        assert sum(name.startswith("backbone.") for name in frozen) == of_backbone
        assert sum(name.startswith("head.") for name in frozen) == 9
        net.train()
    freeze_batch_norm(build_backbone("vgg16", 16, 4))


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_backbone
def test_synchronized_norms_take_the_place_of_all_norms(alone, backbone):
    plain = build_backbone(backbone, 16, 4)
    synchronized = copy.deepcopy(plain)
    synchronize_batch_norm(synchronized, None)
    calls = []
    for module in synchronized.modules():
        assert not isinstance(module, nn.BatchNorm2d)
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 48)
    for theirs, mine in zip(plain(x), synchronized(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) == (13 if backbone == "vgg16_bn" else 0)
    assert synchronized.state_dict().keys() == plain.state_dict().keys()


@every_network
@every_backbone
def test_every_parameter_has_a_gradient(network, backbone):
    """A parameter without one would stall DDP."""
    net = built(network, backbone).train()
    net.zero_grad()
    logits = net(torch.randn(2, 3, 40, 56))
    F.cross_entropy(logits, torch.randint(CLASSES, (2, 40, 56))).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []
    assert next(net.backbone.parameters()).grad.abs().sum() > 0


@every_backbone
@pytest.mark.parametrize("network", ["pspnet", "lraspp"])
def test_the_groups_are_recomputed_and_nothing_else_changes(network, backbone):
    kept = copy.deepcopy(built(network, backbone)).train()
    recomputed = copy.deepcopy(kept)
    recomputed.checkpoint_activations()
    assert len(recomputed.backbone.blocks()) == 5
    calls = []
    recomputed.backbone.features[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 40, 56)
    for net in (kept, recomputed):
        net.zero_grad()
        net(x).square().mean().backward()
    assert len(calls) == 2
    for (name, one), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert_same_bits(kept.state_dict(), recomputed.state_dict())


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "network", "more"),
    [("vgg16", "lraspp", ["--freeze-bn"]), ("vgg16_bn", "pspnet", ["--checkpoint-activations"])],
)
def test_trains_goes_on_and_predicts(backbone, network, more, folder_data, tmp_path):
    options = ["--backbone", backbone, "--network", network, "--warmup", "1", *more]
    run(folder_data, tmp_path / "run", *options, "--iterations", "1")
    before = weights(tmp_path / "run" / "last.pt")
    lines = run(folder_data, tmp_path / "run", *options, "--iterations", "2")
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == [1, 2]
    after = weights(tmp_path / "run" / "last.pt")
    name = next(name for name in after if name.endswith("backbone.features.0.weight"))
    assert after.keys() == before.keys() and not torch.equal(before[name], after[name])
    predictor = cac_fast.train.load(tmp_path / "run" / "last.pt")
    image = torch.randint(256, (3, 37, 45), dtype=torch.uint8)
    assert predictor.predict(image).shape == (37, 45)
