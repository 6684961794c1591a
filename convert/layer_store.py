"""The converted layers of one conversion, kept as they come: tensors with the writer, the rest as JSON beside them.

Invariant: a layer whose tensors the writer has is finished, and its spec and record are there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from convert.partial import PartialWork
from engine.checkpoint import CheckpointWriter
from engine.checkpoint.mla_format import config_from_spec, spec_from_config
from engine.spec import LayerSpec, MLASpec, ModelSpec

ATTENTION = "self_attn."


class LayerStore:
    """Layers are added in order; `spec` says all else of the model."""

    def __init__(self, work: PartialWork, writer: CheckpointWriter, spec: ModelSpec) -> None:
        self._work = work
        self._writer = writer
        self._spec = spec
        self._layers = range(len(spec.layers))

    def add(self, layer: LayerSpec, tensors: dict[str, Tensor], measured: dict[str, Any]) -> None:
        """The first layer that is not finished. Raises OutputError, CheckpointError for tensors that are not finite."""
        index = next(i for i in self._layers if not self._writer.has(i))
        config = config_from_spec(replace(self._spec, layers=(layer,)))
        self._work.keep(_name(index), {"config": config, "measured": measured})
        self._writer.add_layer(index, tensors, layer)

    def finished(self, index: int) -> tuple[MLASpec, dict[str, Tensor]] | None:
        """A layer's attention, if it was added, by this process or an earlier one."""
        if not self._writer.has(index):
            return None
        spec = self._layer(index)
        assert isinstance(spec.attention, MLASpec)  # nothing else is written
        tensors = self._writer.read_layer(index, spec, ATTENTION)
        return spec.attention, {name.removeprefix(ATTENTION): t for name, t in tensors.items()}

    def specs(self) -> tuple[LayerSpec, ...]:
        return tuple(self._layer(i) for i in self._layers)

    def measured(self, key: str) -> list[Any]:
        """What was measured of each layer, under this name."""
        return [self._work.read(_name(i))["measured"][key] for i in self._layers]

    def _layer(self, index: int) -> LayerSpec:
        record: dict[str, Any] = self._work.read(_name(index))
        return spec_from_config(record["config"], self._spec.dtype).layers[0]


def _name(index: int) -> str:
    return f"layer-{index:05d}"
