"""The output projection of a converted layer in closed form: linear least squares, given what its heads put out.

Whatever a conversion lost before it, o_proj (and its bias, where the layer has one) can still be the best there is for
the heads as they have become. One pass over the text, no step size, no iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.differentiable import mla_heads
from convert.memory import give_back
from engine.spec import MLASpec

RIDGE = 1e-2  # of the heads' mean energy, towards the projection there was: less text than weights changes little


def fit_output(
    spec: MLASpec, tensors: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """-> `tensors` with o_proj such that attention comes nearest to the targets, sums and solution in float64.

    batches: (normed inputs, what attention should put out), [windows, length, hidden] each.
    """
    give_back()
    columns = [tensors["o_proj.weight"]] + ([tensors["o_proj.bias"][:, None]] if spec.o_bias else [])
    weight = torch.cat(columns, 1).double()  # [hidden, H v (+ 1)]: a bias is a weight of one column
    gram = weight.new_zeros(weight.shape[1], weight.shape[1])
    missing = torch.zeros_like(weight)
    for x, target in batches:
        heads = mla_heads(spec, tensors, x).flatten(0, -2)
        heads = F.pad(heads, (0, int(spec.o_bias)), value=1.0).double()
        gram.addmm_(heads.mT, heads)
        missing.addmm_((target.flatten(0, -2).double() - heads @ weight.mT).mT, heads)
    width = tensors["o_proj.weight"].shape[1]
    ridge = torch.zeros_like(gram[0])
    ridge[:width] = RIDGE * gram.diagonal()[:width].mean().clamp_min(torch.finfo(gram.dtype).tiny)
    weight += torch.linalg.solve(gram + ridge.diag(), missing, left=False)
    fitted = {"o_proj.weight": weight[:, :width].contiguous()}
    if spec.o_bias:
        fitted["o_proj.bias"] = weight[:, width].contiguous()
    return dict(tensors) | {name: t.to(tensors[name].dtype) for name, t in fitted.items()}
