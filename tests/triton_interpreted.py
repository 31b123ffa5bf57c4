"""The Triton kernels on the CPU, under Triton's interpreter; test_triton.py runs this file.

The interpreter must be asked for before Triton is first imported, and then holds for the process.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from test_eager import operands
from torch import Tensor
from triton.runtime import interpreter

from cac_fast import kernels, ops, reference
from cac_fast.kernels import configs

# Small tiles, so that a few hundred rows make many of them.
SMALL = configs.Config(tile=16, block=32, warps=4, stages=2, programs=1)


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, bfloat16 in the interpreter, NaN in every buffer that is not initialised."""
    monkeypatch.setattr(configs, "find", lambda *_: SMALL)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PLAIN_CAST = interpreter.InterpreterBuilder.cast_impl
PLAIN_DOT = interpreter.InterpreterBuilder.create_dot
PLAIN_PATCH = interpreter._patch_lang_tensor


def cast(builder: Any, source: Any, to: Any) -> Any:
    """Round to bfloat16 as a GPU does; the interpreter cuts off."""
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return PLAIN_CAST(builder, source, to)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)


def dot(builder: Any, a: Any, b: Any, *more: Any) -> Any:
    """Multiply bfloat16 numbers; the interpreter would multiply their bits as integers."""
    return PLAIN_DOT(builder, widen(a), widen(b), *more)


def widen(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def patch(tensor: Any, scope: Any) -> None:
    """Bounds of loops as integers; Triton 3.6 asks NumPy for what NumPy 2.4 refuses."""
    PLAIN_PATCH(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def exact(given: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    return reference.dc_loss_rows(*wide, temperature)


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def compare(given: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient against float64, by the error of the reference in the same dtype."""
    dtype, active = given[0].dtype, given[-1]
    loss, gradient = kernels.dc_loss_rows(*given, temperature)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert not loss[~active].any()
    assert not gradient[~active].any()
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    true_loss, true_gradient = exact(given, temperature)
    if dtype == torch.float32:
        bound = max(1e-6, 1e-7 / temperature)
        assert (loss - true_loss).norm() <= bound * true_loss.norm() + 1e-6
        assert error(gradient, true_gradient) <= bound
    else:
        loss_there, gradient_there = reference.dc_loss_rows(*given, temperature)
        assert error(loss, true_loss) <= 1.5 * error(loss_there, true_loss)
        assert error(gradient, true_gradient) <= 1.5 * error(gradient_there, true_gradient)
    return loss, gradient


@pytest.mark.parametrize("labels", ["voc", "ids", "few", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_label_layout(dtype: torch.dtype, labels: str) -> None:
    for temperature in (0.1, 0.01):
        compare(operands(labels, dtype, 90, 200, 16), temperature)


# The largest logit that needs no offset lies between 1/0.1 and 1/0.09 in float16, else between
# 1/0.016 and 1/0.015.
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.09, 0.016, 0.015, 0.0005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_temperature(dtype: torch.dtype, temperature: float) -> None:
    compare(operands("few", dtype, 60, 90, 16), temperature)


@pytest.mark.parametrize("dim", [17, 32, 64, 100, 128, 256])
def test_any_number_of_channels(dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare(operands("voc", dtype, 40, 70, dim), 0.1)


def test_one_channel() -> None:
    compare(operands("voc", torch.float32, 40, 70, 1), 0.1)


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 300), (33, 16), (200, 1), (32, 32), (31, 47)])
def test_sizes_that_divide_nothing(a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.float32, a, m, 16)
    compare((*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)), 0.1)


def test_empty_sides() -> None:
    for a, m in ((0, 5), (5, 0), (0, 0)):
        given = operands("voc", torch.float32, a, m, 16)
        loss, gradient = kernels.dc_loss_rows(*given, 0.1)
        assert loss.shape == (a,)
        assert gradient.shape == (a, 16)
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_nothing_active_or_admitted(temperature: float) -> None:
    *features, y, z, active = operands("few", torch.float32, 50, 60, 16)
    every = torch.ones_like(active)
    for labels, negative_labels, rows in (
        (y, z, torch.zeros_like(active)),
        (y, torch.full_like(z, -1), every),
        (torch.full_like(y, 7), torch.full_like(z, 7), every),
    ):
        loss, gradient = kernels.dc_loss_rows(
            *features, labels, negative_labels, rows, temperature
        )
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("gfx", programs))
    for temperature in (0.1, 0.01):
        compare(operands("voc", torch.float32, 90, 200, 16), temperature)


def test_loads_through_tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", 3))
    for dim in (16, 100):
        compare(operands("voc", torch.bfloat16, 60, 90, dim), 0.1)


def test_extreme_labels_stay_apart() -> None:
    far = [-(2**63), -1, 0, 1, 2**60, 2**60 + 1, 2**62, 2**63 - 1]
    *features, _, _, _ = operands("few", torch.float32, 80, 160, 16)
    y, z = torch.tensor(far * 10), torch.tensor(far * 20)
    for active in (torch.ones(80, dtype=torch.bool), torch.arange(80) % 3 > 0):
        compare((*features, y, z, active), 0.1)


def test_views_of_any_layout() -> None:
    a, p, n, y, z, active = operands("voc", torch.float32, 90, 120, 16)
    plain = kernels.dc_loss_rows(a, p, n, y, z, active, 0.1)
    wide = torch.stack((p, p), dim=1).flatten(0, 1)
    turned = [features.T.contiguous().T for features in (a, n)]
    views = kernels.dc_loss_rows(turned[0], wide[::2], turned[1], y, z, active, 0.1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(views, plain, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_nan_is_not_hidden(temperature: float) -> None:
    *features, labels, negative_labels, active = operands("few", torch.float32, 50, 200, 16)
    features[2][negative_labels == 2] = torch.nan
    assert (negative_labels == 2).any()
    for mine in kernels.dc_loss_rows(*features, labels, negative_labels, active, temperature):
        assert mine[active].isnan().all()


def test_same_bits_on_every_run() -> None:
    given = operands("voc", torch.bfloat16, 90, 200, 16)
    for temperature in (0.1, 0.005):
        first, second = (kernels.dc_loss_rows(*given, temperature) for _ in range(2))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_a_small_loss_is_exact() -> None:
    *features, y, z, active = operands("voc", torch.float32, 40, 50, 16)
    anchors = features[0]
    given = (anchors, anchors, -anchors[:1].expand(50, 16).contiguous(), y, z + 30, active)
    rows = active & ((anchors @ anchors[0]) > 0.5)
    for temperature in (0.05, 0.08, 0.12):
        true_loss, _ = exact(given, temperature)
        loss, _ = kernels.dc_loss_rows(*given, temperature)
        assert rows.any()
        assert true_loss[rows].max() < 1e-3
        torch.testing.assert_close(loss[rows].double(), true_loss[rows], rtol=2e-5, atol=0)


def test_serves_the_operator_and_its_autograd() -> None:
    anchors, *given = operands("voc", torch.float32, 60, 90, 16)
    upstream = torch.rand(60, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad(
            ops.dc_loss_rows(leaf, *given, 0.1, backend=backend)[0], leaf, upstream
        )[0]
        for backend in ("triton", "reference")
        for leaf in [anchors.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
