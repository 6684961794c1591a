"""A first pass over the source's layers, for candidates whose layers share one budget.

Invariant: as in pipeline.py, the weights of one half of a layer are in memory at a time. What a survey finds is
held for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from convert.pipeline import Precision, Windows
from convert.plan import Allocation, Candidate
from convert.source_layer import SourceAttention
from convert.stream import Stream
from engine.checkpoint import Checkpoint
from engine.model.transformer import MLPHalf


def settle(
    source: Checkpoint, fit: Windows, tried: Sequence[Candidate | Allocation], precision: Precision
) -> list[Candidate]:
    """The candidates in order; where there are allocations, after one pass of the source over `fit` for all of them."""
    sharing = {i: way for i, way in enumerate(tried) if isinstance(way, Allocation)}
    found: dict[int, list[Any]] = {i: [] for i in sharing}  # layer by layer
    weights: list[float] = []
    if sharing:
        text = Stream(fit, precision.outer(source)[0]["embed_tokens.weight"], source.spec)
        for index in tqdm(range(len(source.spec.layers)), "surveying", unit="layer", disable=None):
            tensors = precision.load(source.layer(index))
            attention = SourceAttention(source.spec, index, tensors)
            surveys = {i: way.surveys[index] for i, way in sharing.items()}
            learnt = attention.learn((survey.collect for survey in surveys.values()), text)
            answers = {
                survey: survey.find(attention.view.spec, attention.view.tensors, learnt[survey.collect])
                for survey in dict.fromkeys(surveys.values())  # that allocations may share
            }
            for i, survey in surveys.items():
                found[i].append(answers[survey])
            weights.append(text.weight(attention.half))
            text.attend(attention.half)
            del attention, learnt  # before the MLP is read
            text.feed(MLPHalf(source.spec.layers[index], source.spec, tensors))
    return [way.allocate(found[i], weights) if isinstance(way, Allocation) else way for i, way in enumerate(tried)]
