"""A pass over the source's layers: of each, statistics -> method -> finish -> store, and all texts past its attention;
then the MLP, and all texts past that.

Invariant: the weights of one half of a layer are in memory at a time, and the rest of what is written is read as it is
written; the embedding and the head are read when they are needed, and not widened as a whole. What is freed goes back
to the system before the next half. Everything else held is activations. All statistics are the source model's own: no
layer sees the conversion of those before it. What is measured is what is written: errors are taken with the tensors
rounded to the dtype they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from convert.memory import give_back
from convert.methods import LayerMethod
from convert.output_fit import fit_output
from convert.plan import Candidate
from convert.quality import Comparison, relative_error
from convert.refine import RefineOptions, refine_layer
from convert.source_layer import Collect, SourceAttention
from convert.stream import Examples, Stream
from engine.checkpoint import Checkpoint
from engine.kernels.norm import rms_norm
from engine.model.load import dtype_name
from engine.model.transformer import AttentionHalf, MLPHalf, finish_logits, norm_weight
from engine.spec import LayerSpec, MLASpec, ModelSpec
from engine.tensor_map import TensorMap

HEAD_ROWS = 4096  # of the output head, widened at a time

Windows = Sequence[Sequence[int]]
StoredAttention = tuple[MLASpec, dict[str, Tensor]]


@dataclass(frozen=True)
class Precision:
    """Where and how to compute, and how the result is stored."""

    device: torch.device
    stored: torch.dtype
    compute: torch.dtype = torch.float32

    def outer(self, source: Checkpoint) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What no layer owns, as the source stores it and as the result does: not widened, since it may be large."""
        here = {name: t.to(self.device) for name, t in source.outer().items()}
        return here, self.store(here)

    def load(self, tensors: Mapping[str, Tensor]) -> TensorMap:
        """To compute with: each is made when it is asked for, and not kept."""
        return TensorMap(tensors, lambda name: tensors[name].to(self.device, self.compute))

    def store(self, tensors: Mapping[str, Tensor]) -> TensorMap:
        """As they are stored, likewise."""
        return TensorMap(tensors, lambda name: tensors[name].to(self.stored))

    def laid_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As stored, contiguous and in memory of their own, as they come back from a file: sums may depend on it."""
        contiguous = torch.contiguous_format
        return {name: t.to(self.stored, copy=True, memory_format=contiguous) for name, t in tensors.items()}


@dataclass(frozen=True)
class Refinement:
    """Every layer is refined (refine.py), its options chosen on windows that it was not fitted to."""

    held_out: Windows
    options: RefineOptions


@dataclass(frozen=True)
class Converted:
    """A layer as it is to be written."""

    spec: LayerSpec
    attention: StoredAttention
    rest: Mapping[str, Tensor]  # all but the attention, named as in the checkpoint; read from the source when asked for
    refinement: dict[str, Any] | None  # refine_layer's record
    attention_error: Callable[[], float]  # relative, on the source's own inputs; costs two runs of the attention

    def tensors(self) -> TensorMap:
        """All of them, the attention's as stored."""
        return _whole(self.rest, self.attention[1])


class Store:
    """Where a sweep puts the layers of its candidates, and finds those that were made before. This one keeps nothing.

    It is asked with a candidate's number and a layer's.
    """

    def has(self, _candidate: int, _layer: int) -> bool:
        """Whether that layer need not be made again."""
        return False

    def read(self, candidate: int, layer: int) -> StoredAttention:
        """The attention of a layer that it `has`, as it was stored."""
        raise KeyError((candidate, layer))

    def keep(self, _candidate: int, _layer: int, _made: Converted) -> None:
        """Called in order: of each layer every candidate that it lacks."""


def sweep(
    source: Checkpoint,
    fit: Windows,
    check: Windows,
    candidates: Sequence[Candidate],
    precision: Precision,
    store: Store | None = None,
    description: str = "converting",
    refinement: Refinement | None = None,
    fit_outputs: bool = True,
) -> list[Comparison]:
    """Convert the whole model by every candidate, with statistics of `fit`; -> how each compares on `check`.

    What `store` has is not converted again; it gets the rest. With a `refinement` every candidate is refined. A choice
    among candidates may go without `fit_outputs`, which take time.
    """
    run = _Sweep(source, fit, check, candidates, precision, store or Store(), refinement, fit_outputs)
    layers = len(source.spec.layers)
    with tqdm(total=layers * len(candidates), desc=description, unit="layer", disable=None) as progress:
        for index in range(layers):
            for record in run.convert_layer(index):
                if record is not None:
                    errors = f"error {record['error_before']:.3g} -> {record['error_after']:.3g}"
                    progress.set_postfix_str(errors, refresh=False)
                progress.update()
    return run.comparisons()


@dataclass(frozen=True)
class _LayerWork:
    """What all candidates share at the attention of one layer."""

    index: int
    source: SourceAttention
    rest: Mapping[str, Tensor]  # Converted's
    learnt: dict[Collect, Any]
    examples: list[Examples]  # to fit on, and held out; as far as they are needed


class _Sweep:
    """The texts of a sweep: the source's, and for each candidate `check` once more. All stand before the same half."""

    def __init__(
        self,
        source: Checkpoint,
        fit: Windows,
        check: Windows,
        candidates: Sequence[Candidate],
        precision: Precision,
        store: Store,
        refinement: Refinement | None,
        fit_outputs: bool,
    ) -> None:
        self.source, self.candidates, self.precision, self.store = source, candidates, precision, store
        self.refinement = refinement
        loaded, stored = precision.outer(source)
        texts = [fit, check] if refinement is None else [fit, check, refinement.held_out]
        self.texts = [Stream(windows, loaded["embed_tokens.weight"], source.spec) for windows in texts]
        self.fit, self.check, *held_out = self.texts
        self.own = [Stream(check, stored["embed_tokens.weight"], source.spec) for _ in candidates]
        fits = fit_outputs and any(method.fits_output for candidate in candidates for method in candidate.layers)
        self.finished_on = [self.fit, *held_out] if fits or held_out else []

    def convert_layer(self, index: int) -> Iterator[dict[str, Any] | None]:
        """By one candidate after the other; -> each one's record of refinement."""
        give_back()
        yield from self._attend(index)
        give_back()
        self._feed(index)

    def _attend(self, index: int) -> Iterator[dict[str, Any] | None]:
        """Every candidate's attention, then the source's. All that is held of the layer goes with the iterator."""
        work = self._begin(index)
        for candidate, own in enumerate(self.own):
            converted, record = self._convert(candidate, work)
            own.attend(converted)
            del converted  # before the next is made
            yield record
        for text in self.texts:
            text.attend(work.source.half)

    def _feed(self, index: int) -> None:
        """The source's MLP, for candidates rounded as it is stored; the same one, where that changes nothing."""
        spec, tensors = self.source.spec, self.source.layer(index)
        exact = self.source.layer_dtypes(index) == {dtype_name(self.precision.stored)}
        for texts in [[*self.texts, *self.own]] if exact else [self.texts, self.own]:
            given = self.precision.store(tensors) if texts is self.own else tensors
            mlp = MLPHalf(spec.layers[index], spec, self.precision.load(given))
            for text in texts:
                text.feed(mlp)
            del mlp  # before the next is made

    def _begin(self, index: int) -> _LayerWork:
        """Read a layer's attention and take its statistics."""
        tensors = self.source.layer(index)
        source = SourceAttention(self.source.spec, index, self.precision.load(tensors))
        rest = TensorMap([name for name in tensors if not name.startswith("self_attn.")], tensors.__getitem__)
        missing = [c.layers[index] for i, c in enumerate(self.candidates) if not self.store.has(i, index)]
        learnt = source.learn((method.collect for method in missing), self.fit)
        examples = [text.examples(source.half) for text in self.finished_on if missing]
        return _LayerWork(index, source, rest, learnt, examples)

    def _convert(self, candidate: int, work: _LayerWork) -> tuple[AttentionHalf, dict[str, Any] | None]:
        """-> the attention by a candidate, which the store then has, and the record of its refinement."""
        if self.store.has(candidate, work.index):
            return self._half(work, self.store.read(candidate, work.index)), None
        spec, made, record = self._make(self.candidates[candidate].layers[work.index], work)
        made = self.precision.laid_out(made)
        half = self._half(work, (spec, made))
        error = partial(_attention_error, self.check, work.source.half, half)
        self.store.keep(candidate, work.index, Converted(half.spec, (spec, made), work.rest, record, error))
        return half, record

    def _make(
        self, method: LayerMethod[Any], work: _LayerWork
    ) -> tuple[MLASpec, dict[str, Tensor], dict[str, Any] | None]:
        """What the method gives, and then all of it refined, or its output projection fitted, or nothing; -> the
        attention, and refine_layer's record."""
        view = work.source.view
        spec, made = view.finish(*method.convert(view.spec, view.tensors, work.learnt[method.collect]))
        if self.refinement is not None:
            made = self.precision.laid_out(made)  # what was float64 is not held any longer
            fit, held_out = work.examples
            made, record = refine_layer(spec, made, fit, held_out, self.refinement.options)
            return spec, made, record
        if work.examples and method.fits_output:
            made = dict(self.precision.load(made))  # likewise
            made = fit_output(spec, made, work.examples[0])
        return spec, made, None

    def _half(self, work: _LayerWork, attention: StoredAttention) -> AttentionHalf:
        """A converted attention between the source's norms, all rounded as they are stored."""
        spec, tensors = attention
        layer = replace(self.source.spec.layers[work.index], attention=spec)
        stored = self.precision.store(_whole(work.rest, tensors))
        return AttentionHalf(layer, self.source.spec, self.precision.load(stored))

    def comparisons(self) -> list[Comparison]:
        """Of each candidate with the source, once all layers are behind them."""
        give_back()
        loaded, stored = self.precision.outer(self.source)
        return [_compare(self.check, own, loaded, stored, self.source.spec) for own in self.own]


def _whole(rest: Mapping[str, Tensor], attention: Mapping[str, Tensor]) -> TensorMap:
    """All of a layer's tensors, of the attention's given without their prefix."""
    own = {f"self_attn.{name}": t for name, t in attention.items()}
    return TensorMap([*rest, *own], lambda name: own[name] if name in own else rest[name])


def _attention_error(text: Stream, source: AttentionHalf, converted: AttentionHalf) -> float:
    """Relative, of what the layer's attention puts out on the source's own inputs."""
    return relative_error(zip(text.attended(source), text.attended(converted), strict=True))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in], weight [out, in] of any dtype -> [n, out] in x's, with little of the weight widened at a time."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    for part, rows in zip(y.split(HEAD_ROWS, -1), weight.split(HEAD_ROWS), strict=True):
        part.copy_(F.linear(x, rows.to(x.dtype)))
    return y


def _compare(
    source: Stream, own: Stream, loaded: Mapping[str, Tensor], stored: Mapping[str, Tensor], spec: ModelSpec
) -> Comparison:
    """Final norm and head on both residual streams."""

    def final(x: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        return rms_norm(x, norm_weight(outer["norm.weight"].to(x.dtype), spec), spec.norm_eps)

    def logits(outer: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        head = outer.get("lm_head.weight", outer["embed_tokens.weight"])
        return lambda hidden: finish_logits(_project(hidden, head), spec)

    comparison = Comparison(spec.vocab_size)
    for a, b in zip(source.chunks, own.chunks, strict=True):
        hidden = final(a.predicting(a.x), loaded), final(b.predicting(b.x), stored)
        comparison.add(*hidden, a.targets, a.seen, logits(loaded), logits(stored))
    return comparison
