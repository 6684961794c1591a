"""The converted layers of one conversion, kept as they come: tensors with the writer, the rest as JSON beside them.

Invariant: a layer whose tensors the writer has is finished, and its spec and record are there.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from convert.partial import PartialWork
from convert.pipeline import Converted, Store, StoredAttention
from engine.checkpoint import CheckpointWriter
from engine.checkpoint.mla_format import config_from_spec, spec_from_config
from engine.checkpoint.shards import ShardWriter, output_errors
from engine.errors import CheckpointError
from engine.spec import LayerSpec, MLASpec, ModelSpec

ATTENTION = "self_attn."
TRIALS = "trials"


class LayerStore(Store):
    """The layers of one candidate; `spec` says all else of the model."""

    def __init__(self, work: PartialWork, writer: CheckpointWriter, spec: ModelSpec) -> None:
        self._work = work
        self._writer = writer
        self._spec = spec
        self._layers = range(len(spec.layers))

    def has(self, _candidate: int, layer: int) -> bool:
        return self._writer.has(layer)

    def read(self, _candidate: int, layer: int) -> StoredAttention:
        spec = self._layer(layer)
        assert isinstance(spec.attention, MLASpec)  # nothing else is written
        tensors = self._writer.read_layer(layer, spec, ATTENTION)
        return spec.attention, {name.removeprefix(ATTENTION): t for name, t in tensors.items()}

    def keep(self, _candidate: int, layer: int, made: Converted) -> None:
        """Raises OutputError, CheckpointError for tensors that are not finite."""
        measured = {"attention_error": made.attention_error(), "refinement": made.refinement}
        self._work.keep(_name(layer), {"config": _config(self._spec, made.spec), "measured": measured})
        self._writer.add_layer(layer, made.tensors(), made.spec)

    def specs(self) -> tuple[LayerSpec, ...]:
        return tuple(self._layer(i) for i in self._layers)

    def measured(self, key: str) -> list[Any]:
        """What was measured of each layer, under this name."""
        return [self._work.read(_name(i))["measured"][key] for i in self._layers]

    def _layer(self, index: int) -> LayerSpec:
        return _from_config(self._work.read(_name(index))["config"])


class TrialStore(Store):
    """The attention of every candidate's layers in one round of choosing; `discard_trials` when one is chosen.

    Invariant: an attention whose tensors are there is finished, and its spec is there.
    """

    def __init__(self, work: PartialWork, spec: ModelSpec, candidates: int, name: str) -> None:
        """Raises OutputError."""
        self._spec = spec
        self._folder = work.folder / TRIALS / name
        with output_errors(work.folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._records = PartialWork(self._folder)
            self._shards = [ShardWriter(self._folder / str(i), len(spec.layers), spec.dtype) for i in range(candidates)]

    def keep(self, candidate: int, layer: int, made: Converted) -> None:
        """Raises OutputError, CheckpointError for tensors that are not finite."""
        tensors = made.attention[1]
        config = _config(self._spec, made.spec)
        self._records.keep(f"{candidate}-{_name(layer)}", {"config": config, "tensors": list(tensors)})
        with output_errors(self._folder):
            try:
                self._shards[candidate].write(layer + 1, tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{self._folder}: layer {layer}: {error}") from None

    def has(self, candidate: int, layer: int) -> bool:
        return layer + 1 in self._shards[candidate].written

    def read(self, candidate: int, layer: int) -> StoredAttention:
        record = self._records.read(f"{candidate}-{_name(layer)}")
        spec = _from_config(record["config"]).attention
        assert isinstance(spec, MLASpec)  # nothing else is kept
        with output_errors(self._folder):
            return spec, self._shards[candidate].read(layer + 1, record["tensors"])


def discard_trials(work: PartialWork) -> None:
    """What all TrialStores of this work hold."""
    shutil.rmtree(work.folder / TRIALS, ignore_errors=True)


def _config(spec: ModelSpec, layer: LayerSpec) -> dict[str, Any]:
    """config.json of a model of this layer alone, which says all about it."""
    return config_from_spec(replace(spec, layers=(layer,)))


def _from_config(config: dict[str, Any]) -> LayerSpec:
    return spec_from_config(config, config["dtype"]).layers[0]


def _name(index: int) -> str:
    return f"layer-{index:05d}"
