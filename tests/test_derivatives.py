"""What of the loss can be differentiated, transformed and exported; the rest is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from cac_fast import DirectionalContrastiveLoss, directional_contrastive_loss
from cac_fast.ops import dc_loss_rows

Loss = Callable[[Tensor], Tensor]


def operands(a: int = 6, m: int = 9, d: int = 4) -> tuple[Tensor, ...]:
    """Arguments of the public function up to the confidences; every anchor is active."""
    rng = torch.Generator().manual_seed(0)
    features = (torch.randn(rows, d, generator=rng, dtype=torch.float64) for rows in (a, a, m))
    labels = (torch.randint(0, 3, (rows,), generator=rng) for rows in (a, m))
    return (*features, *labels, torch.zeros(a), torch.ones(a))


ANCHORS, *GIVEN = operands()


def public(anchors: Tensor) -> Tensor:
    return directional_contrastive_loss(anchors, *GIVEN)


def per_anchor(anchors: Tensor) -> Tensor:
    return directional_contrastive_loss(anchors, *GIVEN, reduction="none")


def rows(anchors: Tensor) -> Tensor:
    return dc_loss_rows(anchors, *GIVEN[:4], torch.ones(len(anchors)).bool(), 0.1)[0].sum()


def registered(anchors: Tensor) -> Tensor:
    given = *GIVEN[:4], torch.ones(len(anchors)).bool(), 0.1
    return torch.ops.cac_fast.dc_loss_rows(anchors, *given)[0].sum()


def gradient(loss: Loss) -> Tensor:
    leaf = ANCHORS.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("loss", [public, rows, registered])
def test_second_derivative_is_an_error(loss: Loss) -> None:
    leaf = ANCHORS.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(first.detach(), gradient(loss))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.square().sum(), leaf)


def test_second_derivative_is_an_error_where_the_one_from_above_has_a_graph() -> None:
    leaf = ANCHORS.clone().requires_grad_()
    squares = per_anchor(leaf).square().sum()
    (first,) = torch.autograd.grad(squares, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize("loss", [public, rows, registered])
def test_forward_mode_is_an_error(loss: Loss) -> None:
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        loss(forward_ad.make_dual(ANCHORS, torch.ones_like(ANCHORS)))


@pytest.mark.parametrize("loss", [public, rows])
def test_transforms_of_torch_func(loss: Loss) -> None:
    expected = gradient(loss)
    assert torch.equal(torch.func.grad(loss)(ANCHORS), expected)
    value, pull = torch.func.vjp(loss, ANCHORS)
    assert torch.equal(value, loss(ANCHORS))
    assert torch.equal(pull(torch.ones_like(value))[0], expected)
    both = torch.stack((ANCHORS, 2 * ANCHORS))
    assert torch.equal(torch.func.vmap(loss)(both), torch.stack([loss(one) for one in both]))
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(loss, (ANCHORS,), (torch.ones_like(ANCHORS),))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(ANCHORS)


def test_jacobian_of_torch_func() -> None:
    found = torch.func.jacrev(per_anchor)(ANCHORS)
    torch.testing.assert_close(found.sum(0) / len(ANCHORS), gradient(public))
    assert not found[0, 1:].any()


def test_a_temperature_that_requires_grad_is_named() -> None:
    temperature = torch.tensor(0.1, requires_grad=True)
    active = torch.ones(len(ANCHORS)).bool()
    for call in (
        lambda: directional_contrastive_loss(ANCHORS, *GIVEN, temperature=temperature),
        lambda: dc_loss_rows(ANCHORS, *GIVEN[:4], active, temperature),
        lambda: DirectionalContrastiveLoss(temperature=temperature),
    ):
        with pytest.raises(ValueError, match="temperature must not require grad"):
            call()


def test_exports_with_any_number_of_anchors_and_negatives() -> None:
    class Net(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return directional_contrastive_loss(*given)

    a, m = (torch.export.Dim(name, min=2) for name in ("A", "M"))
    sizes = [{0: dim} for dim in (a, a, m, a, m, a, a)]
    program = torch.export.export(Net(), operands(12, 20), dynamic_shapes={"given": tuple(sizes)})
    for counts in ((12, 20), (30, 7)):
        given = operands(*counts)
        torch.testing.assert_close(program.module()(*given), directional_contrastive_loss(*given))
