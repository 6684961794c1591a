"""From what the user asked for to what is tried: candidates to choose among, every layer's sizes and options bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from convert.attention_statistics import collect_attention
from convert.errors import ConversionError
from convert.methods import (
    LayerMethod,
    LayerSurvey,
    care,
    exact,
    learn_nothing,
    mha2mla,
    score_aware,
    shared_budget,
    transmla,
)
from convert.sizes import head_splits, rope_splits, rope_splits_by_head
from convert.statistics import collect
from engine.spec import GQASpec, ModelSpec

DEFAULT_CACHE_RATIO = 0.5
# Steps of a layer's rope share below its best split's. What a layer has lost without RoPE is nearer to what refinement
# makes up for than what it has lost for want of rank.
LESS_ROPE = (0, 1, 2)
DEFAULT_METHOD = "score-aware"
METHODS = {
    "score-aware": "keep what attention answers to: RoPE and a joint latent where dropping them would cost the most",
    "exact": "the same function and the same cache size, in MLA form; nothing is lost, nothing is saved",
    "transmla": "rotate keys, keep RoPE on a few channels, joint PCA of the rest with the values (arXiv 2502.07864)",
    "mha2mla": "keep RoPE on a few pairs of channels of each KV head, SVD of the other weights (arXiv 2502.14837)",
    "care": "transmla with a covariance-weighted low rank, of its own in every layer (arXiv 2603.17946)",
}


Sizes = tuple[tuple[int, int], ...]  # (r, dr) of every layer
Splits = Callable[[GQASpec, float], list[tuple[int, int]]]  # of a layer's cache, given a ratio


@dataclass(frozen=True)
class MethodRequest:
    """The method and its sizes as asked for; None: not said."""

    method: str = DEFAULT_METHOD
    cache_ratio: float | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    freqfold: int | None = None  # None: chosen among all that fit
    partial_rope: str | None = None  # None: chosen among all there are
    svd: str | None = None  # None: chosen among both


@dataclass(frozen=True)
class Candidate:
    """One way to convert a whole model: a bound method for every layer, and what sets it apart from the others."""

    options: dict[str, Any]
    layers: tuple[LayerMethod[Any], ...]
    cached: Sizes  # numbers in each layer's latent and rotated keys


@dataclass(frozen=True)
class Allocation:
    """A candidate whose layers share one budget: how it looks at each of them, and the candidate that follows.

    Convert with `survey.settle`, which turns these into Candidates."""

    surveys: tuple[LayerSurvey[Any, Any], ...]
    # Of what the surveys found, and |output of the attention|^2 / |residual stream|^2, of every layer.
    allocate: Callable[[Sequence[Any], Sequence[float]], Candidate]


def gqa_layers(spec: ModelSpec) -> list[GQASpec]:
    """Raises ConversionError unless every layer is GQA."""
    layers = [layer.attention for layer in spec.layers if isinstance(layer.attention, GQASpec)]
    if len(layers) < len(spec.layers):
        raise ConversionError("the source model already uses latent attention: there is nothing to convert")
    return layers


def candidates(spec: ModelSpec, request: MethodRequest) -> list[Candidate | Allocation]:
    """The ways to try, one or more. Raises ConversionError on impossible sizes."""
    layers = gqa_layers(spec)
    ways: dict[str, Callable[[Sequence[GQASpec], MethodRequest], Sequence[Candidate | Allocation]]] = {
        "exact": _exact, "score-aware": _score_aware, "transmla": _transmla, "mha2mla": _mha2mla, "care": _care,
    }  # fmt: skip
    if request.method not in ways:
        raise ConversionError(f"--method {request.method} is not known; there are: {', '.join(METHODS)}")
    _check_options_belong(request)
    return list(ways[request.method](layers, request))


def _check_options_belong(request: MethodRequest) -> None:
    methods_of = {"freqfold": ("transmla", "care"), "partial_rope": ("mha2mla",), "svd": ("mha2mla",)}
    for name, methods in methods_of.items():
        if getattr(request, name) is not None and request.method not in methods:
            option = name.replace("_", "-")
            raise ConversionError(f"--{option} is an option of --method {' and '.join(methods)}; leave it out")


def _exact(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate]:
    sized = request.kv_lora_rank is not None or request.qk_rope_head_dim is not None
    if sized or request.cache_ratio not in (None, 1.0):
        raise ConversionError(
            "--method exact keeps the cache as large as the source's: leave out --cache-ratio, --kv-lora-rank and "
            "--qk-rope-head-dim, or choose another --method"
        )
    cached = tuple((spec.num_kv_heads * spec.head_dim,) * 2 for spec in layers)
    return [Candidate({}, tuple(LayerMethod(learn_nothing, exact.convert_layer) for _ in layers), cached)]


def _score_aware(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate | Allocation]:
    """The given sizes; or each layer's own split, of even budgets and of a shared one."""
    ratio = _ratio(request)
    if ratio is None:
        return [_score_aware_candidate(layers, tuple(_given_sizes(request) for _ in layers), "even")]
    shares = len(layers) > 1 and ratio < 1
    surveys = tuple(
        LayerSurvey(shared_budget.observe, partial(shared_budget.layer_cost, splits=rope_splits(spec, ratio)))
        for spec in layers
    )
    return [
        Allocation(surveys, partial(_score_aware_sizes, layers, ratio, budgets, less_rope))
        for budgets in (("even", "shared") if shares else ("even",))
        for less_rope in (LESS_ROPE if ratio < 1 else (0,))
    ]


def _score_aware_sizes(
    layers: Sequence[GQASpec],
    ratio: float,
    budgets: str,
    less_rope: int,
    found: Sequence[shared_budget.LayerCost],
    weights: Sequence[float],
) -> Candidate:
    """An Allocation's `allocate`."""
    numbers: Sequence[float]
    if budgets == "shared":
        numbers = shared_budget.shared_budgets(layers, ratio, found, weights)
    else:
        numbers = shared_budget.even_budgets(layers, ratio)
    return _score_aware_candidate(layers, shared_budget.split_sizes(layers, numbers, found, less_rope), budgets)


def _score_aware_candidate(layers: Sequence[GQASpec], sizes: Sizes, budgets: str) -> Candidate:
    methods = []
    for spec, (rank, rope) in zip(layers, sizes, strict=True):
        options = score_aware.ScoreAwareOptions(rank, rope)
        score_aware.check_options(spec, options)
        convert = partial(score_aware.convert_layer, options=options)
        methods.append(LayerMethod(collect_attention, convert, fits_output=True))
    return Candidate(_named(sizes) | {"budgets": budgets}, tuple(methods), sizes)


def _transmla(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate]:
    """One for each split and FreqFold."""
    return [_transmla_candidate(sizes, fold) for sizes, fold in _folded_sizes(layers, request)]


def _transmla_candidate(sizes: Sizes, fold: int) -> Candidate:
    methods = [
        LayerMethod(collect, partial(transmla.convert_layer, options=transmla.TransMLAOptions(rank, rope, fold)))
        for rank, rope in sizes
    ]
    return Candidate(_named(sizes) | {"freqfold": fold}, tuple(methods), sizes)


def _folded_sizes(layers: Sequence[GQASpec], request: MethodRequest) -> list[tuple[Sizes, int]]:
    """The sizes to try, each with every FreqFold to try; one that was given has to suit some of the sizes."""
    found, refused = [], ConversionError("no --freqfold fits every layer of this model; choose other sizes")
    for sizes in _sizes(layers, request, head_splits):
        for spec, (rank, rope) in zip(layers, sizes, strict=True):
            transmla.check_sizes(spec, rank, rope)
        # What fits every layer, for a model whose layers are not all alike.
        fitting = (set(transmla.freqfolds(s, dr)) for s, (_, dr) in zip(layers, sizes, strict=True))
        folds = sorted(set.intersection(*fitting)) if request.freqfold is None else [request.freqfold]
        try:
            for spec, (rank, rope) in zip(layers, sizes, strict=True):
                for fold in folds:
                    transmla.check_options(spec, transmla.TransMLAOptions(rank, rope, fold))
        except ConversionError as error:
            refused = error
        else:
            found += [(sizes, fold) for fold in folds]
    if not found:
        raise refused
    return found


def _mha2mla(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate]:
    """One for each split, choice of pairs and kind of SVD."""
    if any(spec.qk_norm_eps is not None for spec in layers):
        raise ConversionError(
            "--method mha2mla factors the weights that make keys, and this model normalises what they make (QK norm); "
            "choose another --method"
        )
    found = []
    for sizes in _sizes(layers, request, rope_splits_by_head):
        whole = all(rope == spec.head_dim for spec, (_, rope) in zip(layers, sizes, strict=True))
        ropes = [request.partial_rope] if request.partial_rope else mha2mla.PARTIAL_ROPE[: 1 if whole else None]
        svds = [request.svd] if request.svd else mha2mla.SVD[: 1 if whole else None]
        found += [_mha2mla_candidate(layers, sizes, rope, svd) for rope in ropes for svd in svds]
    return found


def _mha2mla_candidate(layers: Sequence[GQASpec], sizes: Sizes, partial_rope: str, svd: str) -> Candidate:
    methods: list[LayerMethod[Any]] = []
    collector = mha2mla.collect_pair_norms if partial_rope == "2-norm" else learn_nothing
    for spec, (rank, rope) in zip(layers, sizes, strict=True):
        options = mha2mla.MHA2MLAOptions(rank, rope, partial_rope, svd)
        mha2mla.check_options(spec, options)
        methods.append(LayerMethod(collector, partial(mha2mla.convert_layer, options=options)))
    cached = tuple((rank, spec.num_kv_heads * rope) for spec, (rank, rope) in zip(layers, sizes, strict=True))
    return Candidate(_named(sizes) | {"partial_rope": partial_rope, "svd": svd}, tuple(methods), cached)


def _care(layers: Sequence[GQASpec], request: MethodRequest) -> list[Candidate | Allocation]:
    """One for each split, FreqFold, basis, and ranks that are adjusted or not."""
    found: list[Candidate | Allocation] = []
    for sizes, fold in _folded_sizes(layers, request):
        for basis in care.BASES:
            found.append(_care_candidate(sizes, fold, basis, "uniform"))
            if min(rank for rank, _ in sizes) >= 4:
                found.append(_care_allocation(sizes, fold, basis))
    return found


def _care_candidate(sizes: Sizes, fold: int, basis: str, ranks: str) -> Candidate:
    methods = [
        LayerMethod(collect, partial(care.convert_layer, options=care.CareOptions(rank, rope, fold, basis)))
        for rank, rope in sizes
    ]
    return Candidate(_named(sizes) | {"freqfold": fold, "basis": basis, "ranks": ranks}, tuple(methods), sizes)


def _care_allocation(sizes: Sizes, fold: int, basis: str) -> Allocation:
    def allocate(found: Sequence[care.Spectra], _weights: Sequence[float]) -> Candidate:
        ranks = care.adjusted_ranks(found, [rank for rank, _ in sizes])
        adjusted = tuple((rank, rope) for rank, (_, rope) in zip(ranks, sizes, strict=True))
        return _care_candidate(adjusted, fold, basis, "adjusted")

    surveys = [
        LayerSurvey(collect, partial(care.spectra, options=care.CareOptions(rank, rope, fold, basis)))
        for rank, rope in sizes
    ]
    return Allocation(tuple(surveys), allocate)


def _named(sizes: Sizes) -> dict[str, Any]:
    """The distinct sizes, as they are reported."""
    return {"sizes": [list(size) for size in dict.fromkeys(sizes)]}


def _sizes(layers: Sequence[GQASpec], request: MethodRequest, splits: Splits) -> list[Sizes]:
    """The distinct sizes to try: those given, or those that `splits` makes of the cache ratio, layer by layer."""
    ratio = _ratio(request)
    if ratio is None:
        return [tuple(_given_sizes(request) for _ in layers)]
    return list(dict.fromkeys(zip(*(splits(spec, ratio) for spec in layers), strict=True)))


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
