"""Triton, where it is installed.

It has no wheels for macOS. There the modules still import, kernels stay plain functions that nobody calls, and the
torch definitions serve; wherever a CUDA tensor can exist, so does Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:
    triton = tl = None


def jit(kernel: Callable[..., object]) -> Any:  # noqa: ANN401
    """`triton.jit`; a kernel is launched as kernel[grid](...)."""
    return kernel if triton is None else triton.jit(kernel)


def jit_for_any(*arguments: str) -> Callable[[Callable[..., object]], Any]:
    """`jit`, compiled once for all values of these arguments, which change from step to step.

    Of others Triton compiles variants, for integers that are 1 or a multiple of 16 and for pointers that are aligned: a
    stall of seconds when a server first meets one.
    """
    return lambda kernel: kernel if triton is None else triton.jit(kernel, do_not_specialize=list(arguments))


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
