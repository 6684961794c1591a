"""y = x W^T + b, with the weight in the form that the device multiplies fastest.

Invariant: the result is that of the weight as given, in the precision of x. On a CPU, fp32 weights that fp16 can hold
(all that come from a bf16 or fp16 checkpoint) are kept as packed fp16 panels: half the bytes to read, widened in
registers, multiplied and summed in fp32. A weight that comes as FP8, with its scales, stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.fp8_linear import fp8_linear

Join = Callable[[Sequence[Tensor]], Tensor]
_multiply_packed = torch.ops.quantized.linear_dynamic_fp16.default

LOOKED_AT = 1 << 22  # weights
FP16_LOSS = 2.0**-20  # of the largest weight; numbers below fp16's normal range, which bf16 resolves, may lose that


def fits_fp16(weight: Tensor) -> bool:
    """weight [out, in], looked at in parts, so that no copy of it is made."""
    low, high = weight.aminmax()
    allowed = FP16_LOSS * torch.maximum(-low, high)
    parts = weight.split(max(1, LOOKED_AT // weight.shape[1]))
    return all(bool((part.half().float() - part).abs().max() <= allowed) for part in parts)


class Linear:
    """Weight [out, in], bias [out] or None; where the weight is FP8, its scale fp32 [out, ceil(in / 128)]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.bias = bias
        self._scale = scale
        self._packed = None
        self._weight: Tensor | None = weight
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if on_cpu and "fbgemm" in torch.backends.quantized.supported_engines and fits_fp16(weight):
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self._packed is not None:
            return _multiply_packed(x, self._packed)
        assert self._weight is not None  # one of the two is set
        if self._scale is not None:
            return fp8_linear(x, self._weight, self._scale, self.bias)
        return F.linear(x, self._weight, self.bias)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def projection(
    tensors: Mapping[str, Tensor], *names: str, biased: Collection[str] = (), join: Join = join_rows
) -> Linear:
    """One Linear of several of a checkpoint's projections, from `<name>.weight` and, of those in `biased`, `.bias`.

    `join` makes one of the weights' rows, in whatever order; it does the same to biases, 0 where a projection has none,
    and, where the weights are FP8, to the scales of their rows, `<name>.scale`: all of them are, or none.
    """
    weights = [tensors[f"{name}.weight"] for name in names]
    scales = [tensors[f"{name}.scale"] for name in names if f"{name}.scale" in tensors]
    bias = None
    if biased:
        given = {name: tensors[f"{name}.bias"] for name in biased}
        like = next(iter(given.values()))
        rows = zip(names, weights, strict=True)
        bias = join([given[name] if name in given else like.new_zeros(len(weight)) for name, weight in rows])
    if not scales:
        whole = join(weights)
        weights.clear()  # before the whole is packed
        return Linear(whole, bias)
    joined = join([weight.view(torch.uint8) for weight in weights])  # on a GPU, not every torch can join FP8
    return Linear(joined.view(weights[0].dtype), bias, join(scales))
