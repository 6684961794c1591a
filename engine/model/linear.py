"""y = x W^T + b, with the weight in the form that the device multiplies fastest.

Invariant: the result is that of the weight as given, in the precision of x. On a CPU, fp32 weights that fp16 can hold
(all that come from a bf16 or fp16 checkpoint) are kept as packed fp16 panels: half the bytes to read, widened in
registers, multiplied and summed in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Weight [out, in], bias [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._packed = None
        self._weight: Tensor | None = weight
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if on_cpu and "fbgemm" in torch.backends.quantized.supported_engines and fits_fp16(weight):
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self._packed is not None:
            return _multiply_packed(x, self._packed)
        assert self._weight is not None  # one of the two is set
        return F.linear(x, self._weight, self.bias)
