"""FP8 weights with a scale for each block of 128 x 128, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3).

`<name>.weight` [out, in] is float8_e4m3fn, and `<name>.weight_scale_inv` fp32 [ceil(out / 128), ceil(in / 128)] is what
each block is multiplied by. They are multiplied out when they are read: above this file there is no FP8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.json_file import Size, typed
from engine.checkpoint.layout import Shape
from engine.checkpoint.tensor_files import TensorFiles, all_finite
from engine.errors import CheckpointError

FP8 = "float8_e4m3fn"
SCALE = "_scale_inv"


class _Quantization(msgspec.Struct):
    quant_method: Literal["fp8"]
    weight_block_size: tuple[Size, Size]
    fmt: Literal["e4m3"] = "e4m3"


def read_fp8_block(config: dict[str, Any]) -> Shape:
    """-> rows and columns of a block, from config.json. Raises CheckpointError for every other quantisation."""
    given = config.get("quantization_config")
    try:
        return typed(given, _Quantization).weight_block_size
    except CheckpointError as error:
        raise CheckpointError(
            f"quantization_config ({given!r:.80}) is not supported; supported: quant_method fp8 with fmt e4m3 and a "
            f"weight_block_size: {error}"
        ) from None


class Fp8Files:
    """As TensorFiles, with the scales folded into the weights they belong to: those are entries of `dtype`."""

    def __init__(self, files: TensorFiles, block: Shape, dtype: str) -> None:
        """Raises CheckpointError where a weight in FP8 has no scales, or not one for each block."""
        self._files = files
        self._block = block
        self._dtype = dtype
        self._scaled = {name for name, entry in files.entries.items() if entry.dtype == FP8}
        for name in self._scaled:
            self._check(name)
        scales = {name + SCALE for name in self._scaled}
        self.entries = {
            name: replace(entry, dtype=dtype) if name in self._scaled else entry
            for name, entry in files.entries.items()
            if name not in scales
        }

    def load(self, name: str) -> Tensor:
        """In its stored dtype, one in FP8 in `dtype`; on the CPU. Raises CheckpointError for NaN or Inf."""
        tensor = self._files.load(name)
        if name not in self._scaled:
            return tensor
        weight = multiply_out(tensor, self._files.load(name + SCALE), self._block, getattr(torch, self._dtype))
        if not all_finite(weight):
            raise CheckpointError(f"{self.entries[name].file}: tensor {name} has weights that are NaN or infinite")
        return weight

    def _check(self, name: str) -> None:
        shape = self._files.entries[name].shape
        scale = self._files.entries.get(name + SCALE)
        expected = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=False))
        if scale is None or len(shape) != 2 or scale.shape != expected or scale.dtype != "float32":
            found = "absent" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise CheckpointError(
                f"tensor {name} is {FP8} {list(shape)}: {name + SCALE} must be float32 {list(expected)}, but is {found}"
            )


def multiply_out(weight: Tensor, scale: Tensor, block: Shape, dtype: torch.dtype) -> Tensor:
    """weight float8 [out, in] times the scale of each element's block, in fp32 -> [out, in] in `dtype`."""
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype)
    for i, row in enumerate(scale):  # a row of blocks at a time: no fp32 copy of the whole
        part = weight[i * rows : (i + 1) * rows].float()
        out[i * rows : (i + 1) * rows] = part * row.repeat_interleave(columns)[: weight.shape[1]]
    return out
