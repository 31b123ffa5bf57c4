"""The faster kernels of light networks on CPUs, against PyTorch's in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cac_fast import _extension
from cac_fast.train.networks import build_network, light, synchronize_batch_norm, upsample_logits
from cac_fast.train.networks.light import (
    DilatedDepthwiseConv2d,
    NormClamp,
    PointwiseConv2d,
    lighten,
)

built = pytest.mark.skipif(_extension.unavailable() is not None, reason="no extension")
ACTIVATIONS = {"none": None, "relu": nn.ReLU(), "relu6": nn.ReLU6(inplace=True)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def channels_last(*size: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(*size, generator=rng)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(channels, generator=rng))
    return norm


def layers(norm: nn.BatchNorm2d, activation: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(norm, *([] if activation is None else [activation]))


def gradients(module: nn.Module, x: Tensor, of_y: Tensor) -> list[Tensor]:
    """y and the gradients of x and of the module's parameters, in the dtype of x."""
    y = module(x)
    wanted = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, of_y.to(y.dtype))]


def in_float64(module: nn.Module, x: Tensor, of_y: Tensor) -> tuple[list[Tensor], nn.Module]:
    plain = copy.deepcopy(module).double()
    wide = x.detach().double().contiguous().requires_grad_()
    return gradients(plain, wide, of_y), plain


def assert_same(mine: list[Tensor], exact: list[Tensor], usual: list[Tensor] | None = None) -> None:
    """As near as 2e-6 of the largest value, or twice as far off as PyTorch's in float32."""
    for a, b, c in zip(mine, exact, exact if usual is None else usual, strict=True):
        assert a.shape == b.shape
        near = 2e-6 * b.abs().max().clamp(min=1e-3) + 2 * (c.double() - b).abs().max()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=near.item())


def assert_same_bits(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    of_y = torch.randn_like(copy.deepcopy(one)(x))
    one, other = copy.deepcopy(one), copy.deepcopy(other)
    for a, b in zip(gradients(one, x, of_y), gradients(other, x, of_y), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@built
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(
    "size",
    [(2, 1, 3, 5), (3, 7, 5, 3), (4, 16, 33, 31), (2, 130, 9, 7), (1, 960, 1, 3), (8, 24, 64, 65)],
    ids=str,
)
def test_batch_norm_with_its_activation(
    size: tuple[int, ...], activation: nn.Module | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = channels_last(*size)
    with torch.no_grad():
        x[:, 0] += 100  # a mean far from 0
    module = layers(norm_of(size[1]), activation)
    faster = copy.deepcopy(module)
    lighten(faster)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", None)
    of_y = torch.randn(size)
    mine = gradients(faster, x, of_y)
    monkeypatch.undo()
    # Next to a bound a rounding decides whether a gradient passes.
    z = copy.deepcopy(module[0]).double()(x.detach().double())
    near = (z.abs() < 1e-3) | ((z - 6).abs() < 1e-3)
    of_y[near] = 0
    mine[1:] = gradients(copy.deepcopy(faster), x, of_y)[1:]
    exact, plain = in_float64(module, x, of_y)
    assert_same(mine, exact, gradients(copy.deepcopy(module), x, of_y))
    assert_same(list(faster.buffers()), [b.double() for b in plain.buffers()])
    assert mine[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size, channels", [((5, 7), 5), ((16, 9), 16), ((11, 8), 130)], ids=str)
@pytest.mark.parametrize("stride, dilation", [(1, 2), (1, 3), (1, 4), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("kernel", [3, 5, (3, 1)], ids=str)
def test_depthwise_convolution(
    kernel: int, stride: int, dilation: int, size: tuple[int, int], channels: int
) -> None:
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = dilation * (rows // 2), dilation * (columns // 2)
    settings = {"stride": stride, "dilation": dilation, "padding": padding, "bias": False}
    module = nn.Sequential(nn.Conv2d(channels, channels, kernel, groups=channels, **settings))
    x = channels_last(3, channels, *size)
    of_y = torch.randn_like(module(x))
    exact, _ = in_float64(module, x, of_y)
    lighten(module)
    faster = stride == 1 and dilation > 1
    assert type(module[0]) is (DilatedDepthwiseConv2d if faster else nn.Conv2d)
    assert ("_Dilated" in type(module(x).grad_fn).__name__) == faster
    assert_same(gradients(module, x, of_y), exact)


@pytest.mark.parametrize(
    "other", [{"groups": 2}, {"padding": 1}, {"padding_mode": "circular"}, {"bias": True}], ids=str
)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    settings = {"dilation": 2, "padding": 2, "groups": 4, "bias": False} | other
    module = nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.Conv2d(4, 4, 1, stride=2))
    lighten(module)
    assert [type(conv) for conv in module] == [nn.Conv2d, nn.Conv2d]


@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_convolution(bias: bool) -> None:
    module = nn.Sequential(nn.Conv2d(7, 5, 1, bias=bias))
    x, of_y = channels_last(3, 7, 5, 9), torch.randn(3, 5, 5, 9)
    exact, _ = in_float64(module, x, of_y)
    lighten(module)
    assert type(module[0]) is PointwiseConv2d
    mine = gradients(module, x, of_y)
    assert_same(mine, exact)
    assert mine[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("widest", [128, 6])
def test_upsampling_by_products(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "_WIDEST", widest)
    logits = channels_last(2, 5, 4, 7)
    of_y = torch.randn(2, 5, 33, 20)

    def both(x: Tensor) -> list[Tensor]:
        y = upsample_logits(x, (33, 20))
        return [y.detach(), *torch.autograd.grad(y, x, of_y.to(y.dtype))]

    wide = logits.detach().double().requires_grad_()
    upsampled = upsample_logits(logits, (33, 20))
    assert ("Upsample" in type(upsampled.grad_fn).__name__) == (widest < 7)
    assert upsampled.is_contiguous()
    assert_same(both(logits), both(wide))


def test_statistics_taken_anew_are_means_of_all_batches() -> None:
    """As `torch.optim.swa_utils.update_bn` takes them: without a momentum."""
    module = layers(norm_of(5), nn.ReLU6())
    faster = copy.deepcopy(module)
    lighten(faster)
    batches = [channels_last(2, 5, 4, 6).detach() for _ in range(3)]
    for one in (module, faster):
        update_bn(batches, one)
    for mine, exact in zip(faster.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(mine, exact)
    plain = nn.Sequential(nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, momentum=None))
    lighten(plain)
    assert plain(batches[0]).shape == batches[0].shape


@built
def test_every_number_of_threads_gives_the_same_bits() -> None:
    module = layers(norm_of(200), nn.ReLU6())
    lighten(module)
    x, of_y, before = channels_last(3, 200, 41, 40), torch.randn(3, 200, 41, 40), None
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 5, 1):
            torch.set_num_threads(number)
            again = copy.deepcopy(module)
            results = [*gradients(again, x, of_y), *again.buffers()]
            assert before is None or all(map(torch.equal, results, before))
            before = results
    finally:
        torch.set_num_threads(threads)


def block() -> nn.Sequential:
    """The three kinds of layers that have other kernels."""
    torch.manual_seed(4)
    depthwise = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False)
    return nn.Sequential(nn.Conv2d(3, 6, 1), norm_of(6), nn.ReLU6(), depthwise, norm_of(6))


@pytest.mark.parametrize("case", ["float64", "contiguous", "evaluation", "empty"])
def test_anything_else_is_computed_as_before(case: str) -> None:
    plain = block()
    faster = copy.deepcopy(plain)
    lighten(faster)
    x = channels_last(0 if case == "empty" else 4, 3, 9, 8)
    if case == "float64":
        x, plain, faster = x.detach().double().requires_grad_(), plain.double(), faster.double()
    if case == "contiguous":
        x = x.detach().contiguous().requires_grad_()
    if case in ("evaluation", "empty"):
        plain.eval(), faster.eval()
        with torch.no_grad():
            assert torch.equal(faster(x), plain(x))
        return
    assert_same_bits(plain, faster, x)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "unavailable", lambda: "taken away by a test")
    plain = layers(norm_of(6), nn.ReLU6())
    faster = copy.deepcopy(plain)
    lighten(faster)
    assert_same_bits(plain, faster, channels_last(4, 6, 9, 8))


def test_bfloat16_under_autocast() -> None:
    plain = block()
    faster = copy.deepcopy(plain)
    lighten(faster)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(plain, faster, channels_last(4, 3, 9, 8))
        assert_same_bits(plain[3:], faster[3:], channels_last(4, 6, 9, 8))


def test_one_value_of_a_channel_is_refused_as_before() -> None:
    module = layers(norm_of(4), nn.ReLU6())
    lighten(module)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(channels_last(1, 4, 1, 1))


@built
def test_other_numbers_of_channels_are_refused_as_before() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4))
    lighten(module)
    with pytest.raises(RuntimeError, match="running_mean"):
        module(channels_last(2, 8, 3, 3))
    assert not nn.Sequential(NormClamp(nn.BatchNorm2d(4).eval(), None))[0].training


@built
def test_the_operator_refuses_other_sizes() -> None:
    """It reads and writes by the sizes of x."""
    x, fits = channels_last(2, 8, 3, 3).detach(), [torch.ones(8) for _ in range(4)]
    for place in range(4):
        given = [*fits[:place], torch.ones(4), *fits[place + 1 :]]
        with pytest.raises(RuntimeError, match="expected 8 channels"):
            torch.ops.cac_fast.norm_clamp(x, *given, 0.1, 1e-5, 0.0, 6.0)
    with pytest.raises(RuntimeError, match="channels-last"):
        torch.ops.cac_fast.norm_clamp(x.contiguous(), *fits, 0.1, 1e-5, 0.0, 6.0)


def test_without_gradients_nothing_changes() -> None:
    x = channels_last(2, 8, 3, 3)
    assert light.takes_light_kernels(x)
    with torch.no_grad():
        assert not light.takes_light_kernels(x)


def test_nan_stays_nan() -> None:
    module = layers(norm_of(4), nn.ReLU6())
    lighten(module)
    x = channels_last(2, 4, 3, 3).detach()
    x[0, 1, 2, 2] = math.nan
    assert module(x).isnan().any(dim=3).any(dim=2).tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large"])
def test_network(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names stay; loss and gradients are as near to float64 as PyTorch's own."""
    torch.manual_seed(0)
    faster = build_network("lraspp", backbone, 5).to(memory_format=torch.channels_last)
    monkeypatch.setattr(light, "takes_light_kernels", lambda x: False)
    plain = copy.deepcopy(faster)
    x = channels_last(4, 3, 64, 64).detach()
    weight = torch.randn(4, 5, 64, 64)

    def step(network: nn.Module, dtype: torch.dtype) -> Tensor:
        network = copy.deepcopy(network).to(dtype)
        (network(x.to(dtype)) * weight.to(dtype)).sum().backward()
        return torch.cat([p.grad.flatten().double() for p in network.parameters()])

    exact, usual = step(plain, torch.float64), step(plain, torch.float32)
    monkeypatch.undo()
    mine = step(faster, torch.float32)
    assert not torch.equal(mine, usual)
    assert (mine - exact).norm() < 2 * (usual - exact).norm()
    assert not any(type(module) is nn.BatchNorm2d for module in faster.modules())


def test_synchronized_norms_keep_the_activation() -> None:
    module = layers(norm_of(4), nn.ReLU6())
    lighten(module)
    assert isinstance(module[0], NormClamp)
    x = channels_last(2, 4, 3, 3, spread=9.0)
    expected = module.eval()(x)
    synchronize_batch_norm(module, None)
    assert not isinstance(module[0], NormClamp)
    assert torch.equal(module.eval()(x), expected)
    assert expected.min() == 0 and expected.max() == 6
    assert torch.equal(expected, F.relu6(module[0](x)))
