"""A pass over the source's layers: calibration statistics -> method -> the layer as it will be written, and its error.

Invariant: one layer's weights are in memory at a time; the embedding and the head are read when they are needed, and
not widened as a whole. Everything else held is activations. All statistics are the source model's own: no layer sees
the conversion of those before it. What is measured is what is written: errors are taken with the tensors rounded to
the dtype they are stored in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from convert.linear_view import linear_view
from convert.methods import LayerMethod
from convert.output_fit import fit_output
from convert.plan import Candidate
from convert.quality import Comparison, relative_error
from convert.refine import Batch, RefineOptions, refine_layer
from convert.stream import Stream
from engine.checkpoint import Checkpoint
from engine.kernels.norm import rms_norm
from engine.model.mla import MLAttention
from engine.model.transformer import Layer, finish_logits, norm_weight
from engine.spec import GQASpec, LayerSpec, MLASpec, ModelSpec

HEAD_ROWS = 4096  # of the output head, widened at a time

Windows = Sequence[Sequence[int]]
# Takes each converted layer as it is made, in order: its spec, its tensors (the attention's as stored, the rest as in
# the source), and what was measured of it, for JSON: `attention_error`, the relative error of its attention's output on
# the source's own inputs, and `refinement`, refine_layer's record or None.
LayerSink = Callable[[LayerSpec, dict[str, Tensor], dict[str, Any]], None]
StoredAttention = tuple[MLASpec, dict[str, Tensor]]


class Finished(Protocol):
    """Attention that was converted before, as it was stored, so that it need not be again."""

    def has(self, candidate: int, layer: int) -> bool: ...

    def read(self, candidate: int, layer: int) -> StoredAttention: ...


class Trials(Finished, Protocol):
    """Keeps every candidate's attention as it is made."""

    def keep(self, candidate: int, layer: int, attention: StoredAttention) -> None: ...


@dataclass(frozen=True)
class Precision:
    """Where and how to compute, and how the result is stored."""

    device: torch.device
    stored: torch.dtype
    compute: torch.dtype = torch.float32

    def outer(self, source: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What no layer owns, as the source stores it and as the result does: not widened, since it may be large."""
        here = {name: t.to(self.device) for name, t in source.outer().items()}
        return here, self.store(here)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.device, self.compute) for name, t in tensors.items()}

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.stored) for name, t in tensors.items()}

    def laid_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`store`, each tensor contiguous in memory of its own, as it comes back from a file: sums may depend on it."""
        contiguous = torch.contiguous_format
        return {name: t.to(self.stored, copy=True, memory_format=contiguous) for name, t in tensors.items()}


@dataclass(frozen=True)
class Refinement:
    """Every layer is refined (refine.py), its options chosen on windows that it was not fitted to."""

    held_out: Windows
    options: RefineOptions


def sweep(
    source: Checkpoint,
    fit: Windows,
    check: Windows,
    candidates: Sequence[Candidate],
    precision: Precision,
    sink: LayerSink | None = None,
    description: str = "converting",
    done: Finished | None = None,
    trials: Trials | None = None,
    refinement: Refinement | None = None,
    fit_outputs: bool = True,
) -> list[Comparison]:
    """Convert the whole model by every candidate, with statistics of `fit`; -> how each compares on `check`.

    `sink` gets the first candidate's layers, `trials` the attention of all. What `done` or `trials` has is not
    converted again; `sink` does not get it. With a `refinement` every candidate is refined. A choice among candidates
    may go without `fit_outputs`, which take time.
    """
    loaded, stored = precision.outer(source)
    texts = [fit, check] if refinement is None else [fit, check, refinement.held_out]
    source_streams = [Stream(windows, loaded["embed_tokens.weight"], source.spec) for windows in texts]
    fit_stream, check_stream = source_streams[:2]
    fitting = fit_outputs and any(m.fits_output for candidate in candidates for m in candidate.layers)
    finishing = [fit_stream, source_streams[2]] if refinement is not None else [fit_stream] if fitting else []
    own_streams = [Stream(check, stored["embed_tokens.weight"], source.spec) for _ in candidates]
    del loaded, stored
    for index, spec in enumerate(tqdm(source.spec.layers, description, unit="layer", disable=None)):
        assert isinstance(spec.attention, GQASpec)  # candidates exist for GQA models alone
        raw = dict(source.layer(index))
        tensors = precision.load(raw)
        attention = {n.removeprefix("self_attn."): t for n, t in tensors.items() if n.startswith("self_attn.")}
        rest = {n: t for n, t in raw.items() if not n.startswith("self_attn.")}
        layer = Layer(spec, source.spec, tensors)
        del tensors
        as_stored = layer
        if any(t.dtype != precision.stored for t in raw.values()):
            as_stored = Layer(spec, source.spec, precision.load(precision.store(raw)))
        before = done or trials
        methods = {
            i: candidate.layers[index]
            for i, candidate in enumerate(candidates)
            if before is None or not before.has(i, index)
        }
        view = linear_view(spec.attention, attention)
        learnt = {collect: collect(view.spec, view.tensors, view.inputs(fit_stream.windows(layer)))
                  for collect in dict.fromkeys(method.collect for method in methods.values())}  # fmt: skip
        finish = _Finish(precision, refinement, [stream.examples(layer) for stream in finishing if methods])
        for i, stream in enumerate(own_streams):
            if before is not None and i not in methods:
                mla, made = before.read(i, index)
                stream.advance(_with_attention(as_stored, mla, precision.load(made)))
                continue
            method = methods[i]
            mla, made = view.finish(*method.convert(view.spec, view.tensors, learnt[method.collect]))
            made, record = finish(method, mla, made)
            made = precision.laid_out(made)
            converted = _with_attention(as_stored, mla, precision.load(made))
            if i == 0 and sink is not None:
                error = relative_error(zip(check_stream.attended(layer), check_stream.attended(converted), strict=True))
                measured = {"attention_error": error, "refinement": record}
                sink(converted.spec, rest | {f"self_attn.{name}": t for name, t in made.items()}, measured)
            if trials is not None:
                trials.keep(i, index, (mla, made))
            stream.advance(converted)
            del converted
        for stream in source_streams:
            stream.advance(layer)
        del raw, attention, rest, view, layer, as_stored, learnt, made, finish  # before the next layer is read
    loaded, stored = precision.outer(source)
    return [_compare(check_stream, own, loaded, stored, source.spec) for own in own_streams]


@dataclass(frozen=True)
class _Finish:
    """What becomes of a layer after the method: its output projection fitted, or all of it refined, or nothing."""

    precision: Precision
    refinement: Refinement | None
    examples: list[list[Batch]]  # of the source layer: to fit on, and held out; as far as they are needed

    def __call__(
        self, method: LayerMethod[Any], spec: MLASpec, made: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """-> the tensors, and refine_layer's record where there is one."""
        if self.refinement is not None:
            fit, held_out = self.examples
            return refine_layer(spec, made, fit, held_out, self.precision.stored, self.refinement.options)
        if self.examples and method.fits_output:
            return fit_output(spec, self.precision.load(made), self.examples[0]), None
        return made, None


def _with_attention(layer: Layer, spec: MLASpec, tensors: dict[str, Tensor]) -> Layer:
    """The same layer, sharing all else, with another attention."""
    other = copy.copy(layer)
    other.spec = replace(layer.spec, attention=spec)
    other.attention = MLAttention(spec, tensors)
    return other


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in], weight [out, in] of any dtype -> [n, out] in x's, with little of the weight widened at a time."""
    return torch.cat([F.linear(x, rows.to(x.dtype)) for rows in weight.split(HEAD_ROWS)], -1)


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
