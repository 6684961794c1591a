"""Joint refinement: a few steps on the attention weights of all layers together, against the source's predictions.

The loss is the KL divergence from source to converted model on calibration text. All else of the model stays as it is.
Both models are held whole, unlike anywhere else in a conversion, and gradients pass through all layers.

Invariant: a pure function of its arguments, the seed included; and what it returns, rounded as it is stored, has on the
held-out windows no larger KL than what it was given, rounded likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.descent import DescentOptions, State, Tensors, descend
from convert.differentiable import mla_attention
from convert.errors import ConversionError
from convert.methods import LayerMethod, learn_nothing
from convert.pipeline import Converted, Precision, Store, Windows
from convert.plan import Candidate
from convert.stream import BATCH_TOKENS, BLOCK_SIZE, Chunk, chunks
from engine.checkpoint import Checkpoint
from engine.model.load import load_model
from engine.model.transformer import Transformer, embed, finish_logits, norm_weight
from engine.spec import GatedMLPSpec, LayerSpec, MLASpec, ModelSpec
from engine.tensor_map import TensorMap, under

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class JointOptions(DescentOptions):
    learning_rates: tuple[float, ...] = (0.004, 0.0015, 0.0005)
    steps: int = 200


def check_joint(spec: ModelSpec) -> None:
    """Raises ConversionError where the model has layers that gradients do not pass through here."""
    if not all(isinstance(mlp := layer.mlp, GatedMLPSpec) and mlp.activation in ACTIVATIONS for layer in spec.layers):
        raise ConversionError(
            "--refine joint: this model's feed-forward layers are of a kind it does not know; use --refine layer"
        )


class Staged(Store):
    """Holds the layers of every candidate, their specs and all their tensors, in memory."""

    def __init__(self) -> None:
        self.layers: dict[int, list[tuple[LayerSpec, Tensors]]] = {}
        self.records: dict[int, list[dict[str, Any] | None]] = {}

    def keep(self, candidate: int, _layer: int, made: Converted) -> None:
        self.layers.setdefault(candidate, []).append((made.spec, dict(made.tensors())))
        self.records.setdefault(candidate, []).append(made.refinement)


def jointly_refined(
    source: Checkpoint,
    candidate: Candidate,
    layers: Sequence[tuple[LayerSpec, Tensors]],
    fit: Windows,
    held_out: Windows,
    precision: Precision,
    options: JointOptions,
) -> tuple[Candidate, dict[str, Any]]:
    """`refine_jointly` of a candidate's layers -> the candidate whose layers are the result, and the record."""
    tuned, record = refine_jointly(source, layers, fit, held_out, precision, options)
    methods = []
    for (layer, _), tensors in zip(layers, tuned, strict=True):
        assert isinstance(layer.attention, MLASpec)  # a method makes nothing else
        methods.append(_made(layer.attention, tensors))
    return replace(candidate, layers=tuple(methods)), record


def _made(spec: MLASpec, tensors: Tensors) -> LayerMethod[None]:
    """A layer that is converted already, as a method."""
    return LayerMethod(learn_nothing, lambda *_: (spec, tensors))


def refine_jointly(
    source: Checkpoint,
    layers: Sequence[tuple[LayerSpec, Tensors]],
    fit: Windows,
    held_out: Windows,
    precision: Precision,
    options: JointOptions,
) -> tuple[list[Tensors], dict[str, Any]]:
    """layers: each converted layer's spec and all its tensors -> their attention tensors in the stored dtype, by layer,
    and the record: KL on `held_out` before and after, and the steps that were kept."""
    check_joint(source.spec)
    with torch.inference_mode(False), torch.enable_grad():
        student = _Student(source, layers, fit, held_out, precision)
        start = State(student.start, student.error(student.start))
        best, rate = descend(student, start, options.steps, options)
    record = {"kl_before": start.error, "kl_after": best.error, "learning_rate": rate, "steps": best.steps}
    return student.by_layer(best.tensors), record


class _Example:
    """Windows of one length, and what the source predicts from: final hidden states [windows, length, hidden]."""

    def __init__(self, chunk: Chunk, teacher: Transformer) -> None:
        with torch.inference_mode():
            cache = teacher.new_cache(chunk.num_blocks, BLOCK_SIZE)
            hidden = teacher.forward(chunk.token_ids, chunk.batch, cache)
        shape = chunk.num_windows, chunk.length
        self.ids, self.hidden = chunk.token_ids.view(shape).clone(), hidden.view(*shape, -1).clone()


class _Student:
    """The converted model as a plain function of its attention weights, in fp32: a problem to descend.

    The weights are one dict, layer i's `name` under `i.name`.
    """

    def __init__(
        self,
        source: Checkpoint,
        layers: Sequence[tuple[LayerSpec, Tensors]],
        fit: Windows,
        held_out: Windows,
        precision: Precision,
    ) -> None:
        self.spec, self.precision = source.spec, precision
        self.teacher = load_model(source, precision.device, "float32")
        self.outer = _plain(precision.load(precision.store(source.outer())))
        self.head = self.outer.get("lm_head.weight", self.outer["embed_tokens.weight"])
        self.layers = [spec for spec, _ in layers]
        self.rest: list[Tensors] = []
        self.start: Tensors = {}
        for i, (_, tensors) in enumerate(layers):
            stored = precision.store(tensors)
            self.start |= {f"{i}.{name}": t for name, t in _plain(under(stored, "self_attn.")).items()}
            rest = [name for name in stored if not name.startswith("self_attn.")]
            self.rest.append(_plain(precision.load(TensorMap(rest, stored.__getitem__))))
        embedding = self.outer["embed_tokens.weight"]
        self.examples, self.held_out = (
            [_Example(c, self.teacher) for c in chunks(windows, embedding, source.spec, BATCH_TOKENS)]
            for windows in (fit, held_out)
        )

    def by_layer(self, tensors: Tensors) -> list[Tensors]:
        starts = [f"{i}." for i in range(len(self.layers))]
        return [{n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)} for own in starts]

    def error(self, tensors: Tensors) -> float:
        """KL per token over what is held out."""
        with torch.no_grad():
            loaded = _plain(self.precision.load(tensors))
            total = sum(self.loss(loaded, example).item() * example.ids.numel() for example in self.held_out)
        return max(0.0, total / sum(example.ids.numel() for example in self.held_out))

    def loss(self, tensors: Tensors, example: _Example) -> Tensor:
        """KL(source || converted) in nats per token."""
        with torch.no_grad():
            p = self.teacher.logits(example.hidden.flatten(0, 1)).log_softmax(-1)
        hidden = self.hidden(example.ids, self.by_layer(tensors))
        q = finish_logits(F.linear(hidden, self.head), self.spec).flatten(0, 1)
        return (p.exp() * (p - q.log_softmax(-1))).sum(-1).mean()

    def hidden(self, ids: Tensor, weights: Sequence[Tensors]) -> Tensor:
        """ids int64 [windows, length] -> final normed hidden states [windows, length, hidden]."""
        x = embed(ids, self.outer["embed_tokens.weight"], self.spec)
        for layer, rest, own in zip(self.layers, self.rest, weights, strict=True):
            assert isinstance(layer.attention, MLASpec)  # they are converted
            post = ("post_attention", "post_feedforward") if layer.post_norms else (None, None)
            attended = mla_attention(layer.attention, own, self.norm(x, rest, "input"))
            x = x + self.added(attended, rest, post[0])
            before = "pre_feedforward" if layer.post_norms else "post_attention"
            x = x + self.added(_mlp(layer, rest, self.norm(x, rest, before)), rest, post[1])
        return self.norm(x, {"norm_layernorm.weight": self.outer["norm.weight"]}, "norm")

    def added(self, y: Tensor, tensors: Tensors, post_norm: str | None) -> Tensor:
        return (y if post_norm is None else self.norm(y, tensors, post_norm)) * self.spec.residual_scale

    def norm(self, x: Tensor, tensors: Tensors, name: str) -> Tensor:
        weight = norm_weight(tensors[f"{name}_layernorm.weight"], self.spec)
        return F.rms_norm(x, x.shape[-1:], weight, self.spec.norm_eps)


def _mlp(layer: LayerSpec, tensors: Tensors, x: Tensor) -> Tensor:
    mlp = layer.mlp
    assert isinstance(mlp, GatedMLPSpec)  # check_joint

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, tensors[f"mlp.{name}_proj.weight"], tensors.get(f"mlp.{name}_proj.bias"))

    gate = linear(x, "gate")
    return linear(ACTIVATIONS[mlp.activation](gate) * linear(x, "up"), "down")


def _plain(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies that autograd may use, whatever mode they were made in."""
    return {name: t.clone() for name, t in tensors.items()}
