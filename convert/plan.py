"""From what the user asked for to what is tried: the sizes of every layer, and the candidates to choose among."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from convert.errors import ConversionError
from convert.methods import LayerMethod, exact, transmla
from engine.spec import GQASpec, ModelSpec

DEFAULT_CACHE_RATIO = 0.5
METHODS = {
    "exact": "the same function and the same cache size, in MLA form; nothing is lost, nothing is saved",
    "transmla": "rotate keys, keep RoPE on a few channels, joint PCA of the rest with the values (arXiv 2502.07864)",
}


@dataclass(frozen=True)
class MethodRequest:
    """The method and its sizes as asked for; None: not said."""

    method: str = "transmla"
    cache_ratio: float | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    freqfold: int | None = None  # None: chosen among all that fit


@dataclass(frozen=True)
class Candidate:
    """One way to convert a whole model: a bound method for every layer, and what sets it apart from the others."""

    options: dict[str, Any]
    layers: tuple[LayerMethod, ...]


def gqa_layers(spec: ModelSpec) -> list[GQASpec]:
    """Raises ConversionError unless every layer is GQA."""
    layers = [layer.attention for layer in spec.layers if isinstance(layer.attention, GQASpec)]
    if len(layers) < len(spec.layers):
        raise ConversionError("the source model already uses latent attention: there is nothing to convert")
    return layers


def split_budget(spec: GQASpec, cache_ratio: float) -> tuple[int, int]:
    """-> (r, dr) with r + dr at most cache_ratio * 2 g D, the source's cache width.

    dr is the largest of D, D/2, D/4, ... that is even and at most two thirds of the budget: RoPE on more channels
    kept more of every model measured (docs/conversion.md) than a larger rank did. The rank is rounded down to
    a power of two's multiple, 16 at most, that costs it no more than an eighth.
    """
    if not 0 < cache_ratio <= 1:
        raise ConversionError(f"--cache-ratio {cache_ratio:g} is out of range: it must be above 0 and at most 1")
    budget = int(cache_ratio * spec.cache_width + 1e-6)
    rope = spec.head_dim
    while rope % 4 == 0 and 3 * rope > 2 * budget:
        rope //= 2
    rank = budget - rope
    if rank < 1:
        least = math.ceil(1000 * (rope + 1) / spec.cache_width) / 1000
        raise ConversionError(
            f"--cache-ratio {cache_ratio:g} leaves no room: this model caches {spec.cache_width} numbers per token and "
            f"layer, and the smallest ratio that works is {least:g}"
        )
    step = 16
    while step > 1 and rank < 8 * step:
        step //= 2
    return rank - rank % step, rope


def candidates(spec: ModelSpec, request: MethodRequest) -> list[Candidate]:
    """The ways to try, one or more. Raises ConversionError on impossible sizes."""
    layers = gqa_layers(spec)
    if request.method == "exact":
        return [_exact(layers, request)]
    if request.method == "transmla":
        return _transmla(layers, request)
    raise ConversionError(f"--method {request.method} is not known; there are: {', '.join(METHODS)}")


def _exact(layers: Sequence[GQASpec], request: MethodRequest) -> Candidate:
    sized = (request.kv_lora_rank, request.qk_rope_head_dim, request.freqfold)
    if request.cache_ratio not in (None, 1.0) or any(value is not None for value in sized):
        raise ConversionError(
            "--method exact keeps the cache as large as the source's: leave out --cache-ratio, --kv-lora-rank, "
            "--qk-rope-head-dim and --freqfold, or choose another --method"
        )
    return Candidate({}, tuple(exact.convert_layer for _ in layers))


def _transmla(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate]:
    sizes = [_sizes(spec, request) for spec in layers]
    for spec, (rank, rope) in zip(layers, sizes, strict=True):
        transmla.check_sizes(spec, rank, rope)
    # What fits every layer, for a model whose layers are not all alike.
    common = set.intersection(*(set(transmla.freqfolds(s, dr)) for s, (_, dr) in zip(layers, sizes, strict=True)))
    folds = sorted(common) if request.freqfold is None else [request.freqfold]
    if not folds:
        raise ConversionError("no --freqfold fits every layer of this model; choose another --qk-rope-head-dim")
    return [_transmla_candidate(layers, sizes, fold) for fold in folds]


def _transmla_candidate(layers: Sequence[GQASpec], sizes: Sequence[tuple[int, int]], fold: int) -> Candidate:
    methods = []
    for spec, (rank, rope) in zip(layers, sizes, strict=True):
        options = transmla.TransMLAOptions(rank, rope, fold)
        transmla.check_options(spec, options)
        methods.append(partial(transmla.convert_layer, options=options))
    return Candidate({"freqfold": fold}, tuple(methods))


def _sizes(spec: GQASpec, request: MethodRequest) -> tuple[int, int]:
    """-> (r, dr) of one layer."""
    rank, rope = request.kv_lora_rank, request.qk_rope_head_dim
    if rank is None and rope is None:
        return split_budget(spec, DEFAULT_CACHE_RATIO if request.cache_ratio is None else request.cache_ratio)
    if request.cache_ratio is not None:
        raise ConversionError("give --cache-ratio, or --kv-lora-rank and --qk-rope-head-dim, not both")
    if rank is None or rope is None:
        raise ConversionError("--kv-lora-rank and --qk-rope-head-dim go together: give both, or --cache-ratio alone")
    return rank, rope
