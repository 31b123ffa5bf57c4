"""The registered operator: schema, fake, autograd, autocast, compilation; bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cac_fast import directional_contrastive_loss
from cac_fast.backend import BACKENDS
from cac_fast.ops import dc_loss_rows


def able(device: str, dtype: torch.dtype) -> list[str]:
    """The back ends that can work there on such features."""
    anchors = torch.empty(0, 16, dtype=dtype, device=device)
    return [
        name
        for name, backend in ((name, entry.load()) for name, entry in BACKENDS.items())
        if not backend.unavailable() and not backend.refuses(anchors)
    ]


HERE = able("cpu", torch.float64)
ON_GPU = able("cuda", torch.float32) if torch.cuda.is_available() else []


def operands(
    a: int = 12,
    m: int = 20,
    d: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        features = torch.randn(rows, d, generator=rng, dtype=torch.float64)
        return torch.nn.functional.normalize(features, dim=1).to(dtype)

    tensors = {
        "anchors": draw(a),
        "positives": draw(a),
        "negatives": draw(m),
        "anchor_labels": torch.randint(0, 3, (a,), generator=rng),
        "negative_labels": torch.randint(-1, 3, (m,), generator=rng),
        "active": torch.rand(a, generator=rng) < 0.7,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"temperature": 0.1}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("a, m", [(12, 20), (0, 20), (12, 0)])
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend: str, a: int, m: int, requires_grad: bool) -> None:
    given = operands(a, m)
    given["anchors"].requires_grad_(requires_grad)
    arguments = (*given.values(), backend)
    torch.library.opcheck(torch.ops.cac_fast.dc_loss_rows.default, arguments)


@pytest.mark.parametrize("backend", ON_GPU)
def test_opcheck_on_a_gpu(backend: str) -> None:
    given = operands(dtype=torch.float32, device="cuda")
    given["anchors"].requires_grad_()
    arguments = (*given.values(), backend)
    torch.library.opcheck(torch.ops.cac_fast.dc_loss_rows.default, arguments)


@pytest.mark.parametrize("backend", HERE)
def test_result_is_contiguous_whatever_the_anchors_are(backend: str) -> None:
    given = operands()
    given["anchors"] = given["anchors"].T.contiguous().T
    arguments = (*given.values(), backend)
    torch.library.opcheck(torch.ops.cac_fast.dc_loss_rows.default, arguments)


@pytest.mark.parametrize("backend", HERE)
def test_labels_of_any_integer_type_and_bound(backend: str) -> None:
    given = operands()
    expected = dc_loss_rows(**given, backend=backend)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint64):
        given["anchor_labels"] = given["anchor_labels"].to(dtype)
        given["negative_labels"] = given["negative_labels"].to(torch.int8)
        for classes in (None, 3, 1000):
            found = dc_loss_rows(**given, backend=backend, classes=classes)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.library.opcheck(
        torch.ops.cac_fast.dc_loss_rows.default, (*given.values(), backend, classes)
    )


@pytest.mark.parametrize("name", ["anchor_labels", "negative_labels"])
@pytest.mark.parametrize("backend", HERE)
def test_label_that_breaks_the_bound(backend: str, name: str) -> None:
    given = operands()
    given[name][3] = 7
    dc_loss_rows(**given, backend=backend, classes=8)
    with pytest.raises(ValueError, match=f"{name} must lie below classes, 7, and one is 7"):
        dc_loss_rows(**given, backend=backend, classes=7)


@pytest.mark.parametrize("backend", HERE)
def test_gradcheck(backend: str) -> None:
    given = operands()
    anchors = given.pop("anchors").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return dc_loss_rows(x, **given, backend=backend)[0]

    torch.autograd.gradcheck(loss, anchors, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_rows(dtype: torch.dtype) -> None:
    given = operands(dtype=dtype)
    given["anchors"].requires_grad_()
    loss, gradient = dc_loss_rows(**given)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    assert not gradient.requires_grad
    inactive = ~given["active"]
    assert inactive.any()
    assert not loss[inactive].any()
    assert not gradient[inactive].any()
    upstream = torch.rand(12).to(loss.dtype)
    (found,) = torch.autograd.grad(loss, given["anchors"], upstream)
    assert found.dtype == dtype
    assert torch.equal(found, (upstream[:, None] * gradient).to(dtype))


def test_features_of_another_dtype_are_taken_in_that_of_the_anchors() -> None:
    given = operands(dtype=torch.float32)
    coarse = given | {"negatives": given["negatives"].bfloat16()}
    exact = given | {"negatives": coarse["negatives"].float()}
    for found, expected in zip(dc_loss_rows(**coarse), dc_loss_rows(**exact), strict=True):
        assert torch.equal(found, expected)


def test_autocast_takes_the_products_in_its_dtype() -> None:
    given = operands(dtype=torch.float32)
    half = {k: v.bfloat16() if k in ("anchors", "positives", "negatives") else v
            for k, v in given.items()}  # fmt: skip
    given["anchors"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = dc_loss_rows(**given)
        loss.sum().backward()
        coarse = operands() | {"negatives": operands(dtype=torch.float32)["negatives"]}
        double, _ = dc_loss_rows(**coarse)
    torch.testing.assert_close(double, dc_loss_rows(**operands())[0], rtol=1e-5, atol=1e-5)
    expected = dc_loss_rows(**half)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert given["anchors"].grad.dtype == torch.float32
    assert torch.equal(given["anchors"].grad, gradient.float())
    assert double.dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("backend", "device"), [(name, "cpu") for name in HERE] + [(name, "cuda") for name in ON_GPU]
)
def test_compiled_with_dynamic_shapes_equals_eager(
    backend: str, device: str, autocast: bool
) -> None:
    torch.compiler.reset()

    def step(anchors: Tensor, given: dict[str, Any]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return directional_contrastive_loss(
                2 * anchors, **given, threshold=0.2, reduction="none", backend=backend
            )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, m in ((12, 20), (30, 7), (17, 41)):
        given = operands(a, m, dtype=torch.float32, device=device)
        rng = torch.Generator().manual_seed(a)
        del given["active"], given["temperature"]
        for name in ("anchor_confidence", "positive_confidence"):
            given[name] = torch.rand(a, generator=rng).to(device)
        anchors = given.pop("anchors").requires_grad_()
        losses = [function(anchors, given) for function in (compiled, step)]
        assert (losses[1] == 0).any()
        assert losses[1].any()
        torch.testing.assert_close(*losses)
        upstream = torch.arange(1.0, 1 + a, device=device)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, anchors, upstream) for loss in losses)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchors", torch.zeros(12)),
        ("anchors", torch.zeros(12, 16).long()),
        ("positives", torch.zeros(11, 16)),
        ("positives", torch.zeros(12, 16, device="meta")),
        ("negatives", torch.zeros(20, 8)),
        ("negatives", torch.zeros(20, 16, device="meta")),
        ("negatives", torch.zeros(20, 16, requires_grad=True)),
        ("anchor_labels", torch.zeros(12)),
        ("anchor_labels", torch.zeros(11).long()),
        ("anchor_labels", torch.zeros(12, device="meta").long()),
        ("negative_labels", torch.zeros(21).long()),
        ("negative_labels", torch.zeros(20, device="meta").long()),
        ("active", torch.zeros(12)),
        ("active", torch.zeros(13).bool()),
        ("active", torch.zeros(12, device="meta").bool()),
        ("temperature", 0.0),
        ("temperature", 9e-7),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("classes", 0),
        ("backend", "numpy"),
        ("backend", "cuda"),
    ],
)
def test_bad_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        dc_loss_rows(**{**operands(), name: value})
