"""A pytest plugin for use with TRITON_INTERPRET=1: mends what Triton's interpreter gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_CAST = interpreter.InterpreterBuilder.cast_impl
_DOT = interpreter.InterpreterBuilder.create_dot
_PATCH = interpreter._patch_lang_tensor


def cast(builder: Any, source: Any, to: Any) -> Any:
    """Round to bfloat16 as a GPU does; the interpreter cuts off."""
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return _CAST(builder, source, to)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)


def dot(builder: Any, a: Any, b: Any, *more: Any) -> Any:
    """Multiply bfloat16 numbers; the interpreter would multiply their bits as integers."""
    return _DOT(builder, widen(a), widen(b), *more)


def widen(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def patch(tensor: Any, scope: Any) -> None:
    """Bounds of loops as integers; Triton 3.6 asks NumPy for what NumPy 2.4 refuses."""
    _PATCH(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter.InterpreterBuilder.cast_impl = cast
interpreter.InterpreterBuilder.create_dot = dot
interpreter._patch_lang_tensor = patch
