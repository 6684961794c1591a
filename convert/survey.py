"""A first pass over the source's layers, for candidates whose layers share one budget.

Invariant: as in pipeline.py, one layer's weights are in memory at a time. What a survey finds is held for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from convert.linear_view import linear_view
from convert.pipeline import Precision, Windows
from convert.plan import Allocation, Candidate
from convert.stream import Stream
from engine.checkpoint import Checkpoint
from engine.model.transformer import Layer
from engine.spec import GQASpec


def settle(
    source: Checkpoint, fit: Windows, tried: Sequence[Candidate | Allocation], precision: Precision
) -> list[Candidate]:
    """The candidates in order; where there are allocations, after one pass of the source over `fit` for all of them."""
    found: dict[int, list[Any]] = {i: [] for i, way in enumerate(tried) if isinstance(way, Allocation)}
    weights: list[float] = []
    if found:
        stream = Stream(fit, precision.outer(source)[0]["embed_tokens.weight"], source.spec)
        for index, spec in enumerate(tqdm(source.spec.layers, "surveying", unit="layer", disable=None)):
            assert isinstance(spec.attention, GQASpec)  # candidates exist for GQA models alone
            tensors = precision.load(source.layer(index))
            attention = {n.removeprefix("self_attn."): t for n, t in tensors.items() if n.startswith("self_attn.")}
            layer = Layer(spec, source.spec, tensors)
            surveys = {i: way.surveys[index] for i, way in enumerate(tried) if isinstance(way, Allocation)}
            view = linear_view(spec.attention, attention)
            learnt = {collect: collect(view.spec, view.tensors, view.inputs(stream.windows(layer)))
                      for collect in dict.fromkeys(survey.collect for survey in surveys.values())}  # fmt: skip
            for i, survey in surveys.items():
                found[i].append(survey.find(view.spec, view.tensors, learnt[survey.collect]))
            weights.append(stream.weight(layer))
            stream.advance(layer)
            del tensors, attention, layer, learnt  # before the next layer is read
    return [way.allocate(found[i], weights) if isinstance(way, Allocation) else way for i, way in enumerate(tried)]
