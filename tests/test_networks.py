"""Shapes, strides, dilations and heads of the networks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import SqueezeExcitation

from cac_fast.train.errors import InputError
from cac_fast.train.networks import Segmenter, build_network, upsample_logits
from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.deeplabv3plus import ASPP
from cac_fast.train.networks.pspnet import PSPHead
from cac_fast.train.registry import BACKBONES, NETWORKS

CLASSES = 5
# VGG-16 has tests of its own.
TORCHVISION = [name for name in BACKBONES.names if "/" not in name and "vgg" not in name]
OUTPUT_STRIDE = {"deeplabv3plus": 16, "lraspp": 16, "pspnet": 8}
LOW_STRIDE = {"deeplabv3plus": 4, "lraspp": 8, "pspnet": 4}
FEATURES = {"deeplabv3plus": (256, 4), "pspnet": (512, 8)}
# Low-level ones at strides 4 and 8, high-level ones.
CHANNELS = {
    "mobilenet_v2": ({4: 24, 8: 32}, 320),
    "mobilenet_v3_large": ({4: 24, 8: 40}, 960),
    "resnet18": ({4: 64, 8: 128}, 512),
    "resnet50": ({4: 256, 8: 512}, 2048),
    "resnet101": ({4: 256, 8: 512}, 2048),
}
HEADS = ("fc.", "classifier.", "features.18.")

every_network = pytest.mark.parametrize("network", NETWORKS.names)
every_backbone = pytest.mark.parametrize("backbone", TORCHVISION)
# resnet101 is resnet50 with more blocks: left out where something is computed.
small_backbones = pytest.mark.parametrize("backbone", TORCHVISION[:4])


@functools.cache
def structure(network: str, backbone: str) -> Segmenter:
    """A network without data: shapes, names and settings only."""
    with torch.device("meta"):
        return build_network(network, backbone, CLASSES).eval()


def torchvisions(backbone: str, **options) -> nn.Module:
    """torchvision's network without data."""
    with torch.device("meta"):
        return torchvision.models.get_model(backbone, weights=None, **options)


@functools.cache
def evaluated(network: str, backbone: str) -> Segmenter:
    """A network in eval mode, shared by the tests that do not change it."""
    torch.manual_seed(0)
    return build_network(network, backbone, CLASSES).eval()


@functools.cache
def original(backbone: str) -> nn.Module:
    """torchvision's network with random BatchNorm parameters, so that padding shows."""
    torch.manual_seed(1)
    net = torchvision.models.get_model(backbone, weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def without_head(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.startswith(HEADS)}


def without_gates(net: nn.Module) -> nn.Module:
    """A copy whose gates pass everything: they see means of a map, which its strides change."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, SqueezeExcitation):
                setattr(parent, name, nn.Identity())
    return net


def with_original_weights(network: str, backbone: str) -> nn.Module:
    """The dilated backbone of a network, in eval mode and double precision."""
    dilated = build_backbone(backbone, OUTPUT_STRIDE[network], LOW_STRIDE[network])
    dilated.load_state_dict(without_head(original(backbone).state_dict()), strict=True)
    return dilated.eval().double()


def convolutions(module: nn.Module) -> dict[str, tuple]:
    return {
        name: (conv.stride, conv.dilation, conv.padding)
        for name, conv in module.named_modules()
        if isinstance(conv, nn.Conv2d) and not name.startswith(HEADS)
    }


# --- shapes ---------------------------------------------------------------------------------


@every_network
@every_backbone
@pytest.mark.parametrize("size", [(32, 32), (49, 75), (120, 321)])
@torch.no_grad()
def test_shapes(network, backbone, size):
    net = structure(network, backbone)
    x = torch.empty(2, 3, *size, device="meta")

    def at(stride):
        return tuple(-(-side // stride) for side in size)

    low, high = net.backbone(x)
    low_stride = LOW_STRIDE[network]
    low_channels, high_channels = CHANNELS[backbone][0][low_stride], CHANNELS[backbone][1]
    assert low.shape == (2, low_channels, *at(low_stride))
    assert high.shape == (2, high_channels, *at(OUTPUT_STRIDE[network]))

    channels, stride = FEATURES.get(network, (128 + low_channels, 8))
    assert (net.feature_channels, net.feature_stride) == (channels, stride)
    features = net.features(x)
    assert features.shape == (2, channels, *at(stride))
    assert net.classify(features).shape == (2, CLASSES, *at(stride))


@every_network
@pytest.mark.parametrize("size", [(32, 32), (49, 75)])
@torch.no_grad()
def test_forward_is_features_then_classify_then_upsampling(network, size):
    net = evaluated(network, "mobilenet_v2")
    x = torch.randn(1, 3, *size)
    logits = net(x)
    assert logits.shape == (1, CLASSES, *size)
    assert logits.isfinite().all()
    assert logits.std() > 0
    torch.testing.assert_close(logits, upsample_logits(net.classify(net.features(x)), size))


@torch.no_grad()
def test_classify_is_pixelwise():
    net = evaluated("deeplabv3plus", "resnet18")
    features = torch.randn(2, 256, 4, 6)
    whole = net.classify(features)
    torch.testing.assert_close(whole[:, :, 1:2, 3:4], net.classify(features[:, :, 1:2, 3:4]))


def test_upsampling_aligns_corners():
    logits = torch.tensor([[[[0.0, 3.0]]]])
    assert upsample_logits(logits, (1, 4)).flatten().tolist() == pytest.approx([0, 1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_upsampled_logits_are_fp32_at_least(dtype):
    out = upsample_logits(torch.zeros(1, 2, 2, 2, dtype=dtype), (3, 3))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_network
def test_unknown_names_are_input_errors(network):
    with pytest.raises(InputError, match=r"'resnet34'.*mobilenet_v2, mobilenet_v3_large"):
        build_network(network, "resnet34", CLASSES)
    with pytest.raises(InputError, match=r"'unet'.*deeplabv3plus, lraspp, pspnet"):
        build_network("unet", "resnet18", CLASSES)


# --- strides and dilations ------------------------------------------------------------------


def changed(stage: str, blocks: int, dilations, conv: str) -> dict[str, int]:
    """{convolution: dilation} for the named 3x3 of each block of a stage."""
    return {f"{stage}.{i}.{conv}": dilations[i] for i in range(blocks)}


def basic(stage: str, first: tuple[int, int], second: int) -> dict[str, int]:
    """resnet18: two blocks of two 3x3, the first 3x3 had the stride."""
    return {
        f"{stage}.0.conv1": first[0],
        f"{stage}.0.conv2": first[1],
        f"{stage}.1.conv1": second,
        f"{stage}.1.conv2": second,
    }


def mobile(first: int, last: int, dilations) -> dict[str, int]:
    return {f"features.{i}.conv.1.0": d for i, d in zip(range(first, last), dilations, strict=True)}


def mobile_v3(first: int, last: int, dilations) -> dict[str, int]:
    pairs = zip(range(first, last), dilations, strict=True)
    return {f"features.{i}.block.1.0": d for i, d in pairs}


DILATIONS = {
    ("deeplabv3plus", "resnet18"): basic("layer4", (2, 2), 4),
    ("deeplabv3plus", "resnet50"): changed("layer4", 3, (2, 4, 8), "conv2"),
    ("deeplabv3plus", "resnet101"): changed("layer4", 3, (2, 4, 8), "conv2"),
    ("deeplabv3plus", "mobilenet_v2"): mobile(14, 18, [2] * 4),
    ("pspnet", "resnet18"): basic("layer3", (1, 2), 2) | basic("layer4", (2, 4), 4),
    ("pspnet", "resnet50"): changed("layer3", 6, [1] + [2] * 5, "conv2")
    | changed("layer4", 3, (2, 4, 4), "conv2"),
    ("pspnet", "resnet101"): changed("layer3", 23, [1] + [2] * 22, "conv2")
    | changed("layer4", 3, (2, 4, 4), "conv2"),
    ("pspnet", "mobilenet_v2"): mobile(7, 14, [1] + [2] * 6) | mobile(14, 18, [2, 4, 4, 4]),
    ("deeplabv3plus", "mobilenet_v3_large"): mobile_v3(13, 16, [2] * 3),
    ("pspnet", "mobilenet_v3_large"): mobile_v3(7, 13, [1] + [2] * 5)
    | mobile_v3(13, 16, [2, 4, 4]),
}
DILATIONS |= {("lraspp", name): DILATIONS["deeplabv3plus", name] for name in TORCHVISION}


@every_network
@every_backbone
def test_dilations_are_the_methods_and_all_else_is_torchvisions(network, backbone):
    expected = convolutions(torchvisions(backbone))
    stages = {".".join(name.split(".")[:2]) for name in DILATIONS[network, backbone]}
    for name, (_, dilation, padding) in expected.items():
        if ".".join(name.split(".")[:2]) in stages:
            expected[name] = ((1, 1), dilation, padding)
    for name, d in DILATIONS[network, backbone].items():
        # Undilated, the padding is half of 3 or of 5, rounded down.
        expected[name] = ((1, 1), (d, d), tuple(d * side for side in expected[name][2]))
    assert convolutions(structure(network, backbone).backbone) == expected


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_pspnet_is_dilated_as_torchvision_does_it(backbone):
    net = torchvisions(backbone, replace_stride_with_dilation=[False, True, True])
    assert convolutions(structure("pspnet", backbone).backbone) == convolutions(net)


def test_mobilenet_v3_is_dilated_as_torchvision_does_it():
    net = torchvisions("mobilenet_v3_large", dilated=True)
    for network in ("deeplabv3plus", "lraspp"):
        ours = structure(network, "mobilenet_v3_large").backbone
        assert convolutions(ours) == convolutions(net)


@every_network
@every_backbone
def test_backbone_has_torchvisions_weights_layout(network, backbone):
    ours = structure(network, backbone).backbone.state_dict()
    theirs = without_head(torchvisions(backbone).state_dict())
    assert [(n, t.shape) for n, t in ours.items()] == [(n, t.shape) for n, t in theirs.items()]


@small_backbones
@pytest.mark.parametrize("size", [(32, 48), (33, 71)])
@torch.no_grad()
def test_pspnet_backbone_computes_the_original_at_every_fourth_location(backbone, size):
    dilated = without_gates(with_original_weights("pspnet", backbone))
    net = without_gates(original(backbone))
    if backbone.startswith("mobilenet"):
        strided = net.features[: len(dilated.features)]
    else:
        strided = nn.Sequential(*list(net.children())[:-2])
    x = torch.randn(1, 3, *size)
    expected = strided.double()(x.double())
    torch.testing.assert_close(
        dilated(x.double())[1][:, :, ::4, ::4], expected, rtol=1e-9, atol=1e-9
    )


@small_backbones
@torch.no_grad()
def test_deeplab_blocks_compute_the_original_on_each_grid(backbone):
    """A block dilated by d is the undilated block on every d-th location, at every phase."""
    dilated = without_gates(with_original_weights("deeplabv3plus", backbone))
    net = without_gates(original(backbone)).double()
    stages = {"mobilenet_v2": slice(14, 18), "mobilenet_v3_large": slice(13, 16)}
    mobile_net = backbone in stages
    blocks = dilated.features[stages[backbone]] if mobile_net else dilated.layer4
    plain = net.features[stages[backbone]] if mobile_net else net.layer4
    grids = (2, 2, 2, 2) if mobile_net else (2, 4, 8)
    channels = next(m for m in blocks.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(1, channels, 17, 13, dtype=torch.float64)
    for block, undilated, d in zip(blocks, plain, grids, strict=False):
        for conv in (m for m in undilated.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
        out = block(x)
        for row, column in ((0, 0), (1, 0), (d - 1, d - 1)):
            torch.testing.assert_close(
                out[:, :, row::d, column::d],
                undilated(x[:, :, row::d, column::d]),
                rtol=1e-9,
                atol=1e-9,
            )
        x = out


@small_backbones
@pytest.mark.parametrize(("network", "size"), [("deeplabv3plus", (12, 16)), ("lraspp", (6, 8))])
@torch.no_grad()
def test_low_level_features_are_the_originals(network, size, backbone):
    net = original(backbone)
    at_quarter = LOW_STRIDE[network] == 4
    if backbone.startswith("mobilenet"):
        stem = net.features[: 4 if at_quarter else 7]
    else:
        stem = nn.Sequential(*list(net.children())[: 5 if at_quarter else 6])
    dilated = with_original_weights(network, backbone).float()
    x = torch.randn(1, 3, 45, 64)
    low, _ = dilated(x)
    assert low.shape[-2:] == size
    torch.testing.assert_close(low, stem(x))


# --- heads ----------------------------------------------------------------------------------


def test_aspp_rates_and_pyramid_bins():
    aspp = ASPP(8)
    first = [branch[0] for branch in aspp.branches]
    assert [conv.kernel_size[0] for conv in first] == [1, 3, 3, 3]
    assert [conv.dilation[0] for conv in first] == [1, 6, 12, 18]
    assert [conv.padding[0] for conv in first] == [0, 6, 12, 18]
    assert [branch[0].output_size for branch in PSPHead(8).pyramid] == [1, 2, 3, 6]


@torch.no_grad()
def test_psp_bottleneck_sees_the_global_average_everywhere():
    torch.manual_seed(0)
    head = PSPHead(4).eval()
    x = torch.randn(1, 4, 12, 12)
    y = x.clone()
    y[:, :, 0, 0] += 100  # the other bins and the 3x3 do not carry it to the far corner
    moved = (head(x, x) - head(y, y)).abs().amax(dim=1)
    assert moved[0, -1, -1] > 1e-3


@torch.no_grad()
def test_aspp_pooled_branch_is_the_mean_of_its_image():
    torch.manual_seed(0)
    aspp = ASPP(4).eval()
    x = torch.randn(2, 4, 5, 7)
    mean = aspp.pooled[1](x.mean(dim=(2, 3), keepdim=True))
    pooled = F.interpolate(mean, size=(5, 7), mode="bilinear", align_corners=True)
    joined = torch.cat([*(branch(x) for branch in aspp.branches), pooled], dim=1)
    torch.testing.assert_close(aspp(x), aspp.project(joined))


# DeepLabv3+: (1 + 27 + 1) * 256 * in for the branches, 1280 * 256 to join them, 48 * low,
# 9 * 256 * (304 + 256) for the decoder, two numbers a channel for each BatchNorm.
# LR-ASPP: 128 * in twice, the gate's bias, BatchNorm.
# PSPNet: 4 * 512 * in for the pyramid, 9 * 512 * (in + 2048) for the bottleneck, BatchNorm alike.
@pytest.mark.parametrize(
    ("network", "backbone", "expected"),
    [
        ("deeplabv3plus", "mobilenet_v2", 3_998_944),
        ("deeplabv3plus", "resnet18", 5_426_272),
        ("deeplabv3plus", "resnet50", 16_838_752),
        ("lraspp", "mobilenet_v2", 82_304),
        ("lraspp", "mobilenet_v3_large", 246_144),
        ("pspnet", "mobilenet_v2", 11_572_224),
        ("pspnet", "resnet50", 23_073_792),
    ],
)
def test_parameters_of_the_head(network, backbone, expected):
    net = structure(network, backbone)
    assert sum(p.numel() for p in net.head.parameters()) == expected
    classifier = sum(p.numel() for p in net.classifier.parameters())
    assert classifier == CLASSES * (net.feature_channels + 1)


def dropouts(net: nn.Module) -> dict[str, float]:
    return {name: m.p for name, m in net.named_modules() if isinstance(m, nn.Dropout)}


def test_dropout_is_where_the_method_says():
    expected = {"head.dropout": 0.5, "head.decoder.1": 0.5, "classifier.0": 0.1}
    assert dropouts(structure("deeplabv3plus", "resnet18")) == expected
    assert dropouts(structure("pspnet", "resnet18")) == {}
    assert dropouts(structure("lraspp", "mobilenet_v2")) == {}


@every_network
def test_without_dropout_training_mode_repeats_itself(network):
    net = build_network(network, "resnet18", CLASSES, dropout=False).train()
    assert dropouts(net) == {}
    assert list(net.state_dict()) == list(structure(network, "resnet18").state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))


@torch.no_grad()
def test_dropout_acts_in_training_mode():
    net = build_network("deeplabv3plus", "mobilenet_v2", CLASSES).train()
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, _, out: seen.append((m.p, out.shape[-2:])))
    x = torch.randn(2, 3, 64, 96)
    assert not torch.equal(net.features(x), net.features(x))
    assert seen[:2] == [(0.5, (4, 6)), (0.5, (16, 24))]
    features = torch.ones(1, 256, 8, 8)
    assert not torch.equal(net.classify(features), net.classify(features))


# --- training -------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large", "resnet18"])
def test_every_parameter_has_a_gradient(network, backbone):
    """A parameter without one would stall DDP."""
    torch.manual_seed(0)
    net = build_network(network, backbone, CLASSES, dropout=False).train()
    logits = net(torch.randn(2, 3, 40, 56))
    F.cross_entropy(logits, torch.randint(CLASSES, (2, 40, 56))).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []
    assert net.classifier[1].weight.grad.abs().sum() > 0
    assert next(net.backbone.parameters()).grad.abs().sum() > 0


def test_one_image_trains_while_batchnorm_is_frozen():
    net = build_network("deeplabv3plus", "mobilenet_v2", CLASSES).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    net(torch.randn(1, 3, 32, 32)).sum().backward()


@every_network
@torch.no_grad()
def test_channels_last_stays_so_and_changes_nothing(network):
    net = build_network(network, "mobilenet_v2", CLASSES).eval()
    x = torch.randn(2, 3, 48, 64)
    expected = net.features(x)
    net.to(memory_format=torch.channels_last)
    features = net.features(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


@every_network
@torch.no_grad()
def test_autocast(network):
    net = evaluated(network, "mobilenet_v2")
    x = torch.randn(1, 3, 33, 48)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = net.features(x), net(x)
    assert features.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert F.cosine_similarity(logits.flatten(), net(x).flatten(), dim=0) > 0.98
