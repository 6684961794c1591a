"""CARE (arXiv 2603.17946, ICLR 2026): covariance-aware factors with adjusted ranks, in TransMLA's pipeline.

1. RoRoPE, FreqFold and balancing as in transmla.py: x = [k_nope / rho; v] is what the latent is a linear function of.
2. The up-projection W of x is factored under the covariance C of x, with one of two bases:
   `care`: SVD of C^(1/2) W^T, cut off and C^(1/2) undone: the least E|W x - W' x|^2 there is for the rank;
   `transmla-care`: x is projected onto the leading left singular vectors of C^4 W^T.
3. Adjusted ranks: one at a time, a layer's rank grows where that removes most of what is left of its spectrum.
   Keys and values share the budget half and half, and each half is shared out by itself.

W repeats the (orthogonal) maps back to each KV head's channels for every query head, so W^T W is diag(rho^2, 1) times
their number, and matrices of the size of x do. The paper's own one-shot figures keep RoPE on reconstructed keys, whose
cache is none of MLA's. Symbols as in transmla.py; everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.methods import ConvertedLayer
from convert.methods.transmla import TransMLAOptions, absorb, balance, check_options, rotation
from convert.statistics import LayerStatistics
from engine.spec import GQASpec

DAMPING = {"care": 0.1, "transmla-care": 0.01}  # of the covariance's mean diagonal
POWER = {"care": 0.5, "transmla-care": 4.0}  # of the covariance, in the matrix whose singular vectors count
BASES = tuple(POWER)


@dataclass(frozen=True)
class CareOptions(TransMLAOptions):
    basis: str  # one of BASES


@dataclass(frozen=True)
class Spectra:
    """Of one layer: squared singular values of C^(1/2) W^T, up to a factor, falling. float64, on the host."""

    keys: Tensor  # [g D - dr]
    values: Tensor  # [g D]


@dataclass(frozen=True)
class _Balanced:
    turn: Tensor  # [g D, g D]: the first dr rows keep RoPE
    moment: Tensor  # [n + g D, n + g D], of x
    scale: Tensor  # [n + g D]: rho and 1, so that [k_nope; v] = scale x


def convert_layer(
    spec: GQASpec, tensors: Mapping[str, Tensor], statistics: LayerStatistics, options: CareOptions
) -> ConvertedLayer:
    """-> the MLA layer, tensors in float64. Raises ConversionError where the options do not fit the layer."""
    check_options(spec, options)
    x = _balanced(spec, statistics, options)
    encode, decode = factor(x.moment, x.scale, options.kv_lora_rank, options.basis)
    return absorb(spec, tensors, options, x.turn, encode / x.scale, decode)


def spectra(
    spec: GQASpec, _tensors: Mapping[str, Tensor], statistics: LayerStatistics, options: CareOptions
) -> Spectra:
    """What `adjusted_ranks` shares ranks out by; options.kv_lora_rank does not matter."""
    x = _balanced(spec, statistics, options)
    of_keys = slice(len(x.moment) - len(x.turn))
    parts = x.moment[of_keys, of_keys], x.moment[of_keys.stop :, of_keys.stop :]
    return Spectra(*(torch.linalg.eigvalsh(_damped(part, DAMPING[options.basis])).flip(0).cpu() for part in parts))


def factor(moment: Tensor, scale: Tensor, rank: int, basis: str) -> tuple[Tensor, Tensor]:
    """-> encode [rank, n], of x, and decode [n, rank], to scale x; moment [n, n] of x, W^T W = diag(scale^2)."""
    values, vectors = torch.linalg.eigh(_damped(moment, DAMPING[basis]))
    values = values / values[-1]  # no power of it overflows
    root = (vectors * values ** POWER[basis]) @ vectors.mT
    left, singular, right = torch.linalg.svd(root * scale, full_matrices=False)
    left = left[:, :rank]
    if basis == "transmla-care":
        return left.mT, scale[:, None] * left
    undo = (vectors * values ** -POWER[basis]) @ vectors.mT
    return (singular[:rank] * (undo @ left)).mT, right[:rank].mT


def adjusted_ranks(layers: Sequence[Spectra], ranks: Sequence[int]) -> list[int]:
    """Latent ranks of all layers, their sum at most that of `ranks`, which are 4 or more: from half to twice each."""
    least = [rank // 4 for rank in ranks]
    of_keys = _greedy([layer.keys for layer in layers], least, ranks, sum(ranks) // 2)
    of_values = _greedy([layer.values for layer in layers], least, ranks, sum(ranks) - sum(of_keys))
    return [k + v for k, v in zip(of_keys, of_values, strict=True)]


def _greedy(spectra: Sequence[Tensor], least: Sequence[int], most: Sequence[int], budget: int) -> list[int]:
    """One rank at a time to the layer it gains most, until the budget is spent or every spectrum is."""
    count = len(spectra)
    squares = [spectrum.tolist() for spectrum in spectra]
    most = [min(limit, len(s)) for limit, s in zip(most, squares, strict=True)]
    ranks = [min(low, high) for low, high in zip(least, most, strict=True)]
    left = [math.fsum(s[rank:]) for s, rank in zip(squares, ranks, strict=True)]

    def gain(i: int) -> float:
        """The part of what is left that goes; errors of early layers travel further; a rank costs more the more."""
        share = squares[i][ranks[i]] / max(left[i], 1e-12 * math.fsum(squares[i])) if left[i] > 0 else 0.0
        travel = math.sqrt((count - i) / ((count + 1) / 2))
        return share * travel / math.sqrt(max(ranks[i], 1) / max(least[i], 1))

    for _ in range(budget - sum(ranks)):
        open_layers = [i for i in range(count) if ranks[i] < most[i]]
        if not open_layers:
            break
        best = max(open_layers, key=gain)
        left[best] -= squares[best][ranks[best]]
        ranks[best] += 1
    return ranks


def _balanced(spec: GQASpec, statistics: LayerStatistics, options: CareOptions) -> _Balanced:
    width = spec.num_kv_heads * spec.head_dim
    turn = rotation(spec, statistics.kv_moment[:width, :width], options)
    moment, rho = balance(turn[options.qk_rope_head_dim :], statistics.kv_moment)
    scale = torch.ones_like(moment[0])
    scale[:-width] = rho
    return _Balanced(turn, moment, scale)


def _damped(moment: Tensor, share: float) -> Tensor:
    """With `share` of its mean diagonal added to the diagonal; never singular."""
    mean = moment.trace() / max(1, len(moment))
    damping = share * mean if mean > 0 else torch.ones_like(mean)
    return (moment + moment.mT) / 2 + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
