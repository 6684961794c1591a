"""The attention of one layer of the source while it is in memory: to compute with, and as methods see it.

Invariant: nothing here outlives the object; a pass holds one at a time. The MLP is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from convert.linear_view import linear_view
from convert.stream import Stream
from engine.model.transformer import AttentionHalf
from engine.spec import GQASpec, ModelSpec
from engine.tensor_map import under

Collect = Callable[[GQASpec, Mapping[str, Tensor], Iterable[Tensor]], Any]  # as LayerMethod's and LayerSurvey's


class SourceAttention:
    def __init__(self, model: ModelSpec, index: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the layer's, where and in what they are to be computed with, each made when it is asked for."""
        spec = model.layers[index]
        assert isinstance(spec.attention, GQASpec)  # candidates exist for GQA models alone
        self.half = AttentionHalf(spec, model, tensors)
        self.view = linear_view(spec.attention, under(tensors, "self_attn."))

    def learn(self, collectors: Iterable[Collect], text: Stream) -> dict[Collect, Any]:
        """What each finds in the text, which stands before it. One that is named twice looks once."""
        view = self.view
        return {
            collect: collect(view.spec, view.tensors, view.inputs(text.windows(self.half)))
            for collect in dict.fromkeys(collectors)
        }
