"""One layer of the source while it is in memory: to compute with, and as methods see it.

Invariant: nothing here outlives the object; a pass holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from convert.linear_view import linear_view
from convert.stream import Stream
from engine.model.transformer import Layer
from engine.spec import GQASpec, ModelSpec
from engine.tensor_map import under

Collect = Callable[[GQASpec, Mapping[str, Tensor], Iterable[Tensor]], Any]  # as LayerMethod's and LayerSurvey's


class SourceLayer:
    def __init__(self, model: ModelSpec, index: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: all of the layer's, where and in what they are to be computed with."""
        spec = model.layers[index]
        assert isinstance(spec.attention, GQASpec)  # candidates exist for GQA models alone
        self.layer = Layer(spec, model, tensors)
        self.view = linear_view(spec.attention, dict(under(tensors, "self_attn.")))

    def learn(self, collectors: Iterable[Collect], text: Stream) -> dict[Collect, Any]:
        """What each finds in the text, which stands before this layer. One that is named twice looks once."""
        view = self.view
        return {
            collect: collect(view.spec, view.tensors, view.inputs(text.windows(self.layer)))
            for collect in dict.fromkeys(collectors)
        }
