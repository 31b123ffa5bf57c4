"""The one operator, `cac_fast::dc_loss_rows`: its schema, checks, autograd and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cac_fast.checks import check_classes, check_constant, check_operands, check_temperature
from cac_fast.choice import choose_backend
from cac_fast.operands import Operands


def dc_loss_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    backend: str = "auto",
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Directional contrastive loss of each anchor and its gradient (Eq. 5, without reduction).

    The first seven: see `Operands`. Products are taken of values in the anchors' dtype, or
        autocast's where it is on, and summed in float32 (float64 for float64). The features of all
        negatives must be finite, as a matrix product meets them.
    backend: "auto" or a name from `cac_fast.backends()`.
    classes: if given, all labels lie below it, so that a GPU sorts them in fewer bytes than their
        dtype has. A label that does not is a ValueError of the back ends `reference`, `eager` and
        `cpp`; `triton` and `cuda`, which never wait for the device, may take it for one below 0.

    Returns the loss (A,), float32 or float64, and its gradient by the anchors (A, D), in the dtype
    of the products; both are 0 in rows that are not active or admit no negative. Backward reaches
    the anchors alone, and only through the loss. `torch.ops.cac_fast.dc_loss_rows` is the same, but
    cannot see whether negatives require grad.

    Raises:
        ValueError: wrong shapes, dtypes, devices or choices, or negatives that require grad.
    """
    check_constant("negatives", negatives)
    check_temperature(temperature)
    # torch.func deals with a function before the dispatcher does, level by level.
    rows = _Rows.apply if torch._C._are_functorch_transforms_active() else _operator
    return rows(
        anchors,
        positives.detach() if positives.requires_grad else positives,
        negatives,
        anchor_labels,
        negative_labels,
        active,
        temperature,
        backend,
        classes,
    )


@torch.library.custom_op("cac_fast::dc_loss_rows", mutates_args=())
def _operator(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    backend: str = "auto",
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    operands = Operands(
        anchors, positives, negatives, anchor_labels, negative_labels, active, temperature
    )
    check_operands(operands)
    check_classes(classes)
    rows = choose_backend(backend, anchors, temperature)
    if anchors.numel() == 0 or negatives.numel() == 0:
        return _empty_result(anchors, torch.zeros)
    if positives.dtype != anchors.dtype or negatives.dtype != anchors.dtype:
        operands = operands.to(anchors.dtype)
    return rows(operands, classes)


def _empty_result(anchors: Tensor, make: Any) -> tuple[Tensor, Tensor]:
    shape, device = anchors.shape, anchors.device
    return (
        make(shape[0], dtype=torch.promote_types(anchors.dtype, torch.float32), device=device),
        make(shape, dtype=anchors.dtype, device=device),
    )


@_operator.register_fake
def _(anchors: Tensor, *operands: Any, **choices: Any) -> tuple[Tensor, Tensor]:
    check_operands(Operands(anchors, *operands[:6]))
    return _empty_result(anchors, torch.empty)


class _Rows(torch.autograd.Function):
    """The operator with its derivative: what PyTorch's own registration makes of `backward` knows
    neither torch.func nor forward mode, where it is silent about the tangent it leaves out."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.cac_fast.dc_loss_rows(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, gradient = output
        ctx.save_for_backward(inputs[0], gradient)
        ctx.mark_non_differentiable(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        anchors, gradient = ctx.saved_tensors
        scaled = (upstream.unsqueeze(1) * gradient).to(gradient.dtype)
        if torch.is_grad_enabled():  # with create_graph=True
            scaled = _OnceDifferentiable.apply(scaled, anchors)
        return scaled, *(None,) * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "the directional contrastive loss has no forward-mode derivative: use backward"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        one_by_one = [
            _Rows.apply(
                *(
                    argument if dim is None else argument.select(dim, place)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for place in range(info.batch_size)
        ]
        return tuple(map(torch.stack, zip(*one_by_one, strict=True))), (0, 0)


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient by the anchors whose own derivative is an error.

    It takes the anchors too, since it depends on them even where the gradient from above does not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("the directional contrastive loss is differentiable once, not twice")

    jvp = backward


def _register_autocast(device: str) -> None:
    """Under autocast the products are taken in its dtype, as those of a matrix product are."""

    def rule(*arguments: Any) -> tuple[Tensor, Tensor]:
        features = arguments[:3]
        if features[0].dtype != torch.float64:
            features = [x.to(torch.get_autocast_dtype(device)) for x in features]
        with torch.autocast(device, enabled=False):
            return _operator(*features, *arguments[3:])

    _LIBRARY.impl("dc_loss_rows", rule, f"Autocast{device.upper()}")


_LIBRARY = torch.library.Library("cac_fast", "FRAGMENT")
_LIBRARY.impl("dc_loss_rows", _Rows.apply, "Autograd", allow_override=True)
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
