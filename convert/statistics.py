"""What TransMLA learns about a layer from the calibration text.

Invariant: keys and values are counted as the source model projects them, biases included, before any rotation; sums
are float64 whatever the model runs in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.errors import ConversionError
from engine.spec import GQASpec


@dataclass(frozen=True)
class LayerStatistics:
    """Of one source layer, over `tokens` calibration tokens. g KV heads of D channels, head after head."""

    tokens: int
    kv_moment: Tensor  # float64 [2 g D, 2 g D]: mean of [k; v] [k; v]^T, uncentred


def collect(spec: GQASpec, tensors: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> LayerStatistics:
    """`tensors`: the attention's (`k_proj.weight`, ...); `inputs`: what it sees, normed, [..., hidden]."""
    weight = torch.cat((tensors["k_proj.weight"], tensors["v_proj.weight"]))  # [2 g D, hidden]
    bias = torch.cat((tensors["k_proj.bias"], tensors["v_proj.bias"])) if spec.qkv_bias else None
    moment = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    tokens = 0
    for x in inputs:
        kv = F.linear(x.flatten(0, -2), weight, bias).double()  # [T, 2 g D]
        moment.addmm_(kv.T, kv)
        tokens += len(kv)
    if not torch.isfinite(moment).all():
        raise ConversionError("the source model computes keys or values that are not finite: its weights are damaged")
    return LayerStatistics(tokens, moment / tokens)
