"""What a method sees of a source layer: queries, keys and values that are linear in what the layer gets.

Methods are linear maps of queries and of [k; v], multiplied into the projections. Where queries and keys are normalised
head by head that cannot be done, and need not be: the norms come before anything is cached. Methods then see a layer
whose input is u = [q; k; v], normalised, and whose projections pick q, k and v out of it; what they multiply into those
is the maps themselves. `finish` takes the maps out again and puts them after the source's projections and norms.

Invariant: what no map changes (norms, windows, caps) is carried over here, so that no method needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.methods import ConvertedLayer
from engine.kernels.norm import rms_norm
from engine.spec import GQASpec, HeadNormSpec, MLASpec


@dataclass(frozen=True)
class LinearView:
    """`spec` and `tensors`: what a method is given for the layer; `inputs`: turns what the layer gets, normed
    [windows, length, hidden] part by part, into what the projections in `tensors` get."""

    spec: GQASpec
    tensors: Mapping[str, Tensor]
    inputs: Callable[[Iterable[Tensor]], Iterable[Tensor]]
    finish: Callable[[MLASpec, dict[str, Tensor]], ConvertedLayer]  # what a method made -> the layer as it is written


def linear_view(spec: GQASpec, tensors: Mapping[str, Tensor]) -> LinearView:
    """`tensors`: the attention's, named as in the checkpoint; they may be made when they are asked for."""
    if spec.qk_norm_eps is None:
        return LinearView(spec, tensors, lambda inputs: inputs, lambda mla, made: (_limited(mla, spec), made))
    return _normed_view(spec, spec.qk_norm_eps, tensors)


def _limited(mla: MLASpec, source: GQASpec) -> MLASpec:
    return replace(mla, sliding_window=source.sliding_window, score_softcap=source.score_softcap)


def _normed_view(spec: GQASpec, eps: float, tensors: Mapping[str, Tensor]) -> LinearView:
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    like = tensors["q_proj.weight"]
    picks = torch.eye(q_width + 2 * kv_width, dtype=like.dtype, device=like.device)
    names = [f"{name}_proj.weight" for name in "qkv"]
    seen = dict(zip(names, picks.split((q_width, kv_width, kv_width)), strict=True))
    seen |= {name: tensors[name] for name in tensors if name.startswith("o_proj.")}

    def project(own: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
        y = F.linear(x, own[f"{name}_proj.weight"], own.get(f"{name}_proj.bias"))
        if name == "v":
            return y
        return rms_norm(y.reshape(-1, spec.head_dim), own[f"{name}_norm.weight"], eps).view_as(y)

    def inputs(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        own = {name: tensors[name] for name in tensors if not name.startswith("o_proj.")}  # made once for all parts
        for x in parts:
            yield torch.cat([project(own, x, name) for name in "qkv"], -1)

    def finish(mla: MLASpec, made: dict[str, Tensor]) -> ConvertedLayer:
        return _after_norms(_limited(mla, spec), made, spec, eps, tensors)

    return LinearView(replace(spec, qkv_bias=False, qk_norm_eps=None), seen, inputs, finish)


def _after_norms(
    mla: MLASpec, made: dict[str, Tensor], source: GQASpec, eps: float, tensors: Mapping[str, Tensor]
) -> ConvertedLayer:
    """A layer made over u = [q; k; v] -> the same over the source's projections and norms."""
    heads, dim, n = source.num_heads, source.head_dim, mla.qk_nope_head_dim
    q_rows = made["q_proj.weight"][:, : heads * dim].unflatten(1, (heads, dim)).unflatten(0, (heads, -1))
    nope, rope = q_rows.diagonal(dim1=0, dim2=2).permute(2, 0, 1).split((n, mla.qk_rope_head_dim), 1)  # [H, *, D] each
    up = made["kv_b_proj.weight"].unflatten(0, (heads, -1))
    if n:  # a head's nope query is its whole query: what the method maps it by joins the keys' up-projection
        up = torch.cat((nope.mT @ up[:, :n], up[:, n:]), 1)
    out = {name: t for name, t in made.items() if name.startswith(("o_proj.", "kv_a_proj_with_mqa.bias"))}
    out |= {name: tensors[name] for name in tensors if not name.startswith("o_proj.")}
    out["q_rope_proj.weight"] = rope.flatten(0, 1)
    out["kv_a_proj_with_mqa.weight"] = made["kv_a_proj_with_mqa.weight"][:, heads * dim :]
    out["kv_b_proj.weight"] = up.flatten(0, 1)
    norm = HeadNormSpec(source.num_kv_heads, dim, eps)
    return replace(mla, qk_nope_head_dim=dim if n else 0, q_bias=source.qkv_bias, head_norm=norm), out
