"""Convolutions made where maps are small, against PyTorch's on the large maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cac_fast.train.networks import upsampled
from cac_fast.train.networks.deeplabv3plus import DeepLabV3PlusHead
from cac_fast.train.networks.pspnet import PSPHead
from cac_fast.train.networks.segmenter import DilatedConv2d
from cac_fast.train.networks.upsampled import conv_of_upsampled
from lib.train_step_baseline import HEADS


def plainly(x, weight, size, align_corners):
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
    return F.conv2d(x, weight, padding=1)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("sizes", [((3, 4), (9, 14)), ((1, 1), (5, 3)), ((6, 2), (6, 2))])
def test_conv_of_upsampled(sizes, align_corners):
    torch.manual_seed(0)
    small, large = sizes
    inputs = [torch.randn(2, 5, *small), torch.randn(7, 5, 3, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    found, expected = (
        function(*inputs, large, align_corners) for function in (conv_of_upsampled, plainly)
    )
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
    )


def test_conv_of_upsampled_filled_up_for_tensor_cores(monkeypatch):
    monkeypatch.setattr(upsampled, "_multiple", lambda products: 8)
    test_conv_of_upsampled(((3, 9), (9, 14)), True)


@torch.no_grad()
def test_conv_of_upsampled_rounds_as_plain_pytorch_does():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 8, 8), torch.randn(32, 64, 3, 3)
    exact = plainly(x.double(), weight.double(), (31, 32), True)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (
            function(x.bfloat16(), weight, (31, 32), True)
            for function in (conv_of_upsampled, plainly)
        )
    assert found.dtype == torch.bfloat16
    errors = [float((y.double() - exact).norm()) for y in (found, plain)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("size", [(4, 6), (7, 5), (9, 9)])
def test_dilated_convolution(size):
    torch.manual_seed(0)
    conv = DilatedConv2d(3, 4, dilation=6).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    found, expected = conv(x), nn.Conv2d.forward(conv, x)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, conv.weight, upstream),
        torch.autograd.grad(expected, conv.weight, upstream),
    )


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet"])
@torch.no_grad()
def test_heads_compute_what_is_upsampled_joined_and_convolved(name):
    torch.manual_seed(0)
    head = DeepLabV3PlusHead(3, 4, dropout=0.0) if name == "deeplabv3plus" else PSPHead(4)
    head.double().eval()
    low, high = (torch.randn(2, *shape).double() for shape in ((3, 14, 9), (4, 4, 7)))
    torch.testing.assert_close(head(low, high), HEADS[name](head, low, high))
