"""Triton's interpreter, made to treat bfloat16 as the hardware does, and quicker.

As it stands it keeps bf16 as uint16 and multiplies the bits. Here dots and arithmetic widen it to fp32, and narrowing
rounds to nearest even. And it patches all of triton.language at every call of one jit function by another, which takes
most of its time; here once a launch.
"""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32).reshape(handle.data.shape), tl.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install_bfloat16(patch) -> None:
    """`patch`: a pytest.MonkeyPatch, which undoes it."""
    builder = InterpreterBuilder
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, _widen(a), _widen(b), *rest)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        result = op(_widen(left).data, _widen(right).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_narrow(result), tl.bfloat16)

    def cast_impl(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_narrow(source.data), tl.bfloat16)
        return _widen(source) if types == (tl.bfloat16, tl.float32) else cast(self, source, target)

    for name, function in (("create_dot", create_dot), ("binary_op", binary_op), ("cast_impl", cast_impl)):
        patch.setattr(builder, name, function)


def install_single_patching(patch) -> None:
    """`patch`: a pytest.MonkeyPatch, which undoes it."""
    patch_lang, patched = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_once(function):
        modules = {value for value in function.__globals__.values() if inspect.ismodule(value)} & {tl, tl.core}
        if modules <= patched:
            return Nothing()
        scope = patch_lang(function)
        patched.update(modules)
        restore = scope.restore

        def restore_all():
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)
