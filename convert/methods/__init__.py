"""Conversion methods, one file each: pure functions from one GQA layer to one MLA layer.

A method reads a GQASpec, that layer's attention tensors (named as in the checkpoint, without
`model.layers.<i>.self_attn.`), the layer's calibration statistics and its own options. It gives an MLASpec and MLA
tensors under DeepSeek's names, in float64 or in the source's dtype. It reads no file and knows no other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from convert.statistics import LayerStatistics
from engine.spec import GQASpec, MLASpec

ConvertedLayer = tuple[MLASpec, dict[str, Tensor]]
LayerMethod = Callable[[GQASpec, Mapping[str, Tensor], LayerStatistics], ConvertedLayer]
"""A method with its options for one layer bound."""
