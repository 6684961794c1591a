"""From what the user asked for to what is tried: the sizes of every layer, and the candidates to choose among."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from convert.attention_statistics import collect_attention
from convert.errors import ConversionError
from convert.methods import LayerMethod, exact, learn_nothing, score_aware, transmla
from convert.statistics import collect
from engine.spec import GQASpec, ModelSpec

DEFAULT_CACHE_RATIO = 0.5
ROPE_SHARES = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2)  # of the budget, tried by score-aware
DEFAULT_METHOD = "score-aware"
METHODS = {
    "score-aware": "keep what attention answers to: RoPE and a joint latent where dropping them would cost the most",
    "exact": "the same function and the same cache size, in MLA form; nothing is lost, nothing is saved",
    "transmla": "rotate keys, keep RoPE on a few channels, joint PCA of the rest with the values (arXiv 2502.07864)",
}


@dataclass(frozen=True)
class MethodRequest:
    """The method and its sizes as asked for; None: not said."""

    method: str = DEFAULT_METHOD
    cache_ratio: float | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    freqfold: int | None = None  # None: chosen among all that fit


@dataclass(frozen=True)
class Candidate:
    """One way to convert a whole model: a bound method for every layer, and what sets it apart from the others."""

    options: dict[str, Any]
    layers: tuple[LayerMethod[Any], ...]


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
    budget = _budget(spec, cache_ratio)
    rope = spec.head_dim
    while rope % 4 == 0 and 3 * rope > 2 * budget:
        rope //= 2
    rank = budget - rope
    if rank < 1:
        raise _no_room(spec, cache_ratio, rope + 1)
    return _rounded(rank), rope


def rope_splits(spec: GQASpec, cache_ratio: float) -> list[tuple[int, int]]:
    """-> (r, dr) with r + dr at most cache_ratio * 2 g D and dr about each of ROPE_SHARES of that.

    dr is a multiple of 16, less where it is small, and the rank is rounded as in `split_budget`.
    """
    budget = _budget(spec, cache_ratio)
    if budget < 3:
        raise _no_room(spec, cache_ratio, 3)
    splits = []
    for share in ROPE_SHARES:
        rope = max(2, 2 * _rounded(int(share * budget) // 2))
        splits.append((_rounded(budget - rope), rope))
    return splits


def _budget(spec: GQASpec, cache_ratio: float) -> int:
    if not 0 < cache_ratio <= 1:
        raise ConversionError(f"--cache-ratio {cache_ratio:g} is out of range: it must be above 0 and at most 1")
    return int(cache_ratio * spec.cache_width + 1e-6)


def _rounded(number: int) -> int:
    """Down to a multiple of 16, or of less where that would cost more than an eighth."""
    step = 16
    while step > 1 and number < 8 * step:
        step //= 2
    return number - number % step


def _no_room(spec: GQASpec, cache_ratio: float, least: int) -> ConversionError:
    ratio = math.ceil(1000 * least / spec.cache_width) / 1000
    return ConversionError(
        f"--cache-ratio {cache_ratio:g} leaves no room: this model caches {spec.cache_width} numbers per token and "
        f"layer, and the smallest ratio that works is {ratio:g}"
    )


def candidates(spec: ModelSpec, request: MethodRequest) -> list[Candidate]:
    """The ways to try, one or more. Raises ConversionError on impossible sizes."""
    layers = gqa_layers(spec)
    if request.method == "exact":
        return [_exact(layers, request)]
    if request.method == "score-aware":
        return _score_aware(layers, request)
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
    return Candidate({}, tuple(LayerMethod(learn_nothing, exact.convert_layer) for _ in layers))


def _score_aware(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate]:
    """One for each distinct split of the budget, or the one that was given."""
    if request.freqfold is not None:
        raise ConversionError("--freqfold is an option of --method transmla; leave it out")
    ratio = _ratio(request)
    if ratio is None:
        by_layer = [[_given_sizes(request)] for _ in layers]
    else:
        by_layer = [rope_splits(spec, ratio) for spec in layers]
    found = []
    for sizes in dict.fromkeys(zip(*by_layer, strict=True)):  # each: (r, dr) of every layer
        methods = []
        for spec, (rank, rope) in zip(layers, sizes, strict=True):
            options = score_aware.ScoreAwareOptions(rank, rope)
            score_aware.check_options(spec, options)
            methods.append(LayerMethod(collect_attention, partial(score_aware.convert_layer, options=options)))
        found.append(Candidate({"sizes": [list(size) for size in dict.fromkeys(sizes)]}, tuple(methods)))
    return found


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
        methods.append(LayerMethod(collect, partial(transmla.convert_layer, options=options)))
    return Candidate({"freqfold": fold}, tuple(methods))


def _sizes(spec: GQASpec, request: MethodRequest) -> tuple[int, int]:
    """-> (r, dr) of one layer."""
    ratio = _ratio(request)
    return _given_sizes(request) if ratio is None else split_budget(spec, ratio)


def _ratio(request: MethodRequest) -> float | None:
    """The cache ratio that was asked for, or is taken where nothing was; None where sizes were given."""
    sized = request.kv_lora_rank is not None or request.qk_rope_head_dim is not None
    if sized and request.cache_ratio is not None:
        raise ConversionError("give --cache-ratio, or --kv-lora-rank and --qk-rope-head-dim, not both")
    if sized or request.cache_ratio is not None:
        return request.cache_ratio
    return DEFAULT_CACHE_RATIO


def _given_sizes(request: MethodRequest) -> tuple[int, int]:
    rank, rope = request.kv_lora_rank, request.qk_rope_head_dim
    if rank is None or rope is None:
        raise ConversionError("--kv-lora-rank and --qk-rope-head-dim go together: give both, or --cache-ratio alone")
    return rank, rope
