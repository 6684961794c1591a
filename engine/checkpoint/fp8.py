"""FP8 weights with a scale for each block of 128 x 128, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3).

`<name>.weight` [out, in] is float8_e4m3fn, and `<name>.weight_scale_inv` fp32 [ceil(out / 128), ceil(in / 128)] is what
each block is multiplied by. They are read multiplied out or, where they are to stay FP8 in memory, as they are with a
scale for each row, `<name>.scale` [out, ceil(in / 128)]: so rows can be joined and re-ordered, and their scales alike.
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
LARGEST = 448.0  # that e4m3 holds


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
    """As TensorFiles, with the scales folded into the weights they belong to: those are entries of `dtype`.

    `scaled`: which these are. `block`: rows and columns that share a scale.
    """

    def __init__(self, files: TensorFiles, block: Shape, dtype: str) -> None:
        """Raises CheckpointError where a weight in FP8 has no scales, or not one for each block."""
        self._files = files
        self.block = block
        self._dtype = dtype
        self.scaled = frozenset(name for name, entry in files.entries.items() if entry.dtype == FP8)
        for name in self.scaled:
            self._check(name)
        scales = {name + SCALE for name in self.scaled}
        self.entries = {
            name: replace(entry, dtype=dtype) if name in self.scaled else entry
            for name, entry in files.entries.items()
            if name not in scales
        }

    def load(self, name: str) -> Tensor:
        """In its stored dtype, one in FP8 in `dtype`; on the CPU. Raises CheckpointError for NaN or Inf."""
        tensor = self._files.load(name)
        if name not in self.scaled:
            return tensor
        weight = multiply_out(tensor, self._files.load(name + SCALE), self.block, getattr(torch, self._dtype))
        self._check_finite(name, all_finite(weight))
        return weight

    def load_fp8(self, name: str) -> Tensor:
        """One of `scaled` as it is stored, on the CPU. Raises CheckpointError for NaN."""
        weight = self._files.load(name)
        # Of the bytes, 0x7F and 0xFF are NaN: the largest there are with one sign bit, and with the other.
        has_nan = weight.numel() and (weight.view(torch.int8).max() == 0x7F or weight.view(torch.uint8).max() == 0xFF)
        self._check_finite(name, not has_nan)
        return weight

    def load_scale(self, name: str) -> Tensor:
        """Of one of `scaled`: fp32 [out, ceil(in / columns of a block)], a row for each row of the weight."""
        scale = self._files.load(name + SCALE)
        self._check_finite(name, all_finite(scale * LARGEST))
        return scale.repeat_interleave(self.block[0], 0)[: self.entries[name].shape[0]]

    def _check_finite(self, name: str, finite: bool) -> None:
        if not finite:
            raise CheckpointError(f"{self.entries[name].file}: tensor {name} has weights that are NaN or infinite")

    def _check(self, name: str) -> None:
        shape = self._files.entries[name].shape
        scale = self._files.entries.get(name + SCALE)
        expected = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=False))
        if scale is None or len(shape) != 2 or scale.shape != expected or scale.dtype != "float32":
            found = "absent" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise CheckpointError(
                f"tensor {name} is {FP8} {list(shape)}: {name + SCALE} must be float32 {list(expected)}, but is {found}"
            )


def scale_name(weight: str) -> str:
    """self_attn.q_proj.weight -> self_attn.q_proj.scale."""
    return f"{weight.removesuffix('weight')}scale"


def multiply_out(weight: Tensor, scale: Tensor, block: Shape, dtype: torch.dtype) -> Tensor:
    """weight float8 [out, in] times the scale of each element's block, in fp32 -> [out, in] in `dtype`."""
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype)
    for i, row in enumerate(scale):  # a row of blocks at a time: no fp32 copy of the whole
        part = weight[i * rows : (i + 1) * rows].float()
        out[i * rows : (i + 1) * rows] = part * row.repeat_interleave(columns)[: weight.shape[1]]
    return out
