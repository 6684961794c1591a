"""The attention of an MLA layer as a plain function that gradients pass through.

The same function as `engine.model.mla.MLAttention` on fresh windows: unabsorbed, without a cache, whole windows at a
time. The engine's kernels write in place and know no backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.kernels.rope import rope_table
from engine.spec import MLASpec

# Of the queries that one part of the heads has: 8 MiB in fp32. Where there are more, attention runs part by part, and
# a backward pass computes each again: keys, values, rotations and gradients are several times as large as the queries.
PART_NUMBERS = 1 << 21


def mla_attention(spec: MLASpec, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x [windows, length, hidden], normed, from position 0 -> what attention puts out, alike.

    `tensors` are named as in the format. Query projections of low rank are not known here: no conversion makes them.
    """
    return F.linear(mla_heads(spec, tensors, x), tensors["o_proj.weight"], tensors.get("o_proj.bias"))


def mla_heads(spec: MLASpec, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`mla_attention` before the output projection: [windows, length, H v]."""
    s = spec
    q, row = _projected(spec, tensors, x)
    latent, k_rope = row.split((s.kv_lora_rank, s.rope_width), -1)
    if s.latent_norm_eps is not None:
        latent = _normed(latent, tensors["kv_a_layernorm.weight"], s.latent_norm_eps)
    q = q.transpose(1, 2)  # [windows, H, length, n + dr]
    turn = None
    if s.qk_rope_head_dim:
        turn = _turns(s, x)
        k_rope = _rotate(k_rope.unflatten(-1, (s.rope_groups, -1)).transpose(1, 2), turn, s.rope.layout)
    up = tensors["kv_b_proj.weight"].unflatten(0, (s.num_heads, -1))  # [H, n + v, r]
    group = torch.arange(s.num_heads, device=x.device) // (s.num_heads // s.rope_groups)  # [H]: of rotated keys
    size = max(1, PART_NUMBERS * s.num_heads // max(1, q.numel()))
    if size >= s.num_heads:
        out = _attended(s, q, up, group, latent, k_rope, turn)
    else:
        parts = zip(q.split(size, 1), up.split(size), group.split(size), strict=True)
        made = [checkpoint(_attended, s, *part, latent, k_rope, turn, use_reentrant=False) for part in parts]
        out = torch.cat(made, 1)
    return out.transpose(1, 2).flatten(2)


def _attended(
    spec: MLASpec, q: Tensor, up: Tensor, group: Tensor, latent: Tensor, k_rope: Tensor, turn: Tensor | None
) -> Tensor:
    """-> [windows, h, length, v], of some of the heads.

    Of these: q [windows, h, length, n + dr], not rotated, up [h, n + v, r] and group, int64 [h]. Of all: latent
    [windows, length, r], k_rope [windows, G, length, dr], rotated, and `_turns`; None where there is no RoPE.
    """
    n = spec.qk_nope_head_dim
    kv = F.linear(latent, up.flatten(0, 1)).unflatten(-1, up.shape[:2]).transpose(1, 2)
    k, v = kv.split((n, spec.v_head_dim), -1)
    if turn is not None:
        q = torch.cat((q[..., :n], _rotate(q[..., n:], turn[group], spec.rope.layout)), -1)
        k = torch.cat((k, k_rope[:, group]), -1)
    return _attend(spec, q, k, v)


def _projected(spec: MLASpec, tensors: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """-> queries [..., H, n + dr] and [latent | rope keys] [..., r + G dr]."""

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    q = linear(x, "q_proj").unflatten(-1, (spec.num_heads, -1))
    norm = spec.head_norm
    if norm is None:
        return q, linear(x, "kv_a_proj_with_mqa")
    q = _normed(q, tensors["q_norm.weight"], norm.eps)
    k = _normed(linear(x, "k_proj").unflatten(-1, (norm.num_kv_heads, -1)), tensors["k_norm.weight"], norm.eps)
    row = linear(torch.cat((k.flatten(-2), linear(x, "v_proj")), -1), "kv_a_proj_with_mqa")
    turned = torch.einsum("...hd,hrd->...hr", q, tensors["q_rope_proj.weight"].unflatten(0, (spec.num_heads, -1)))
    return torch.cat((q, turned), -1) if spec.qk_nope_head_dim else turned, row


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _attend(spec: MLASpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k [windows, H, length, n + dr], v [windows, H, length, v] -> [windows, H, length, v], causal."""
    if spec.score_softcap is None and spec.sliding_window is None:
        # Values as wide as keys: torch has blockwise kernels for that alone, and writes down all scores elsewhere.
        narrow = max(0, q.shape[-1] - v.shape[-1])
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, narrow)), is_causal=True, scale=spec.softmax_scale)
        return out[..., : v.shape[-1]]
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if spec.sliding_window is not None:
        seen = seen.triu(1 - spec.sliding_window)
    scores = q @ k.mT * spec.softmax_scale
    if spec.score_softcap is not None:
        scores = torch.tanh(scores / spec.score_softcap) * spec.score_softcap
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def _turns(spec: MLASpec, x: Tensor) -> Tensor:
    """Every group's rotation at every position: [G, length, dr/2, 2] of (cos, sin), in x's dtype."""
    inv_freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64, device=x.device).view(spec.rope_groups, -1)
    positions = torch.arange(x.shape[1], device=x.device)
    return rope_table(positions, inv_freq, spec.rope.scale).transpose(0, 1).to(x.dtype)


def _rotate(x: Tensor, turn: Tensor, layout: str) -> Tensor:
    """x [..., length, dr] -> rotated; queries and keys come out in one order of channels, whichever it is."""
    a, b = x.chunk(2, -1) if layout == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unbind(-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
