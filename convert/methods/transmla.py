"""TransMLA (arXiv 2502.07864): RoRoPE, FreqFold, balancing, joint PCA. Training-free and lossy.

1. RoRoPE: all KV heads' keys are one latent key of g D channels. Within a group of frequencies an orthogonal map
   gathers its energy in the first few pairs of channels; these dr channels alone keep RoPE, shared by all heads.
   FreqFold lets F neighbouring frequencies share one map, as if they turned alike.
2. Balancing: the rest of the keys is divided by rho, so that keys and values weigh alike in
3. the joint PCA of [k_nope / rho; v]: its r leading directions are the latent.

Symbols: H query heads, g KV heads, D head_dim, c = D / dr, F = freqfold. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.errors import ConversionError
from convert.methods import ConvertedLayer
from convert.statistics import LayerStatistics
from engine.spec import GQASpec, MLASpec, RopeSpec

ROUNDING = 1e-5  # keys below this fraction of their whole are noise of fp32 projections


@dataclass(frozen=True)
class TransMLAOptions:
    kv_lora_rank: int  # r
    qk_rope_head_dim: int  # dr
    freqfold: int  # F: neighbouring frequencies that share one rotation


def freqfolds(spec: GQASpec, qk_rope_head_dim: int) -> list[int]:
    """The values of F worth trying: c, 2c, 4c and 8c, as far as they divide the number of frequencies."""
    collapse, pairs = spec.head_dim // qk_rope_head_dim, spec.head_dim // 2
    powers = (collapse << i for i in range(4))
    return [fold for fold in powers if fold <= pairs and pairs % fold == 0]


def check_sizes(spec: GQASpec, rank: int, rope: int) -> None:
    """Raises ConversionError where the layer has no r and dr like these."""
    d = spec.head_dim
    if rope < 2 or rope % 2 or d % rope:
        divisors = ", ".join(str(n) for n in range(2, d + 1, 2) if d % n == 0)
        raise ConversionError(
            f"--qk-rope-head-dim {rope} does not fit heads of {d} channels: it must be even and divide {d} ({divisors})"
        )
    widest = 2 * spec.num_kv_heads * d - rope
    if not 1 <= rank <= widest:
        raise ConversionError(
            f"--kv-lora-rank {rank} is out of range: with --qk-rope-head-dim {rope} this model's keys and values leave "
            f"between 1 and {widest} dimensions to keep"
        )


def check_options(spec: GQASpec, options: TransMLAOptions) -> None:
    """Raises ConversionError where the layer cannot be converted with these numbers."""
    check_sizes(spec, options.kv_lora_rank, options.qk_rope_head_dim)
    collapse, pairs = spec.head_dim // options.qk_rope_head_dim, spec.head_dim // 2
    allowed = [fold for fold in range(collapse, pairs + 1, collapse) if pairs % fold == 0]
    if options.freqfold not in allowed:
        raise ConversionError(
            f"--freqfold {options.freqfold} does not fit: it must be a multiple of head_dim / qk_rope_head_dim = "
            f"{collapse} and divide the {pairs} frequencies ({', '.join(map(str, allowed))})"
        )


def rotation(spec: GQASpec, key_moment: Tensor, options: TransMLAOptions) -> Tensor:
    """RoRoPE with FreqFold: the orthogonal [g D, g D] map of all heads' keys; its first dr rows give the rope key.

    key_moment: [g D, g D], uncentred. Rope rows lie in interleaved pairs, pair m turning at the source's frequency m c.
    Within frequency group i both halves of a pair (real and imaginary) are turned by the same matrix.
    """
    g, d, fold = spec.num_kv_heads, spec.head_dim, options.freqfold
    collapse = d // options.qk_rope_head_dim
    groups, per_block = d // 2 // fold, fold // collapse
    index = torch.arange(g * d, device=key_moment.device)
    # Source channel of (head, half, group i, a, b), frequency i F + a c + b  ->  [i, half, entry (b, head, a)].
    if spec.rope.layout == "half":
        channels = index.view(g, 2, groups, per_block, collapse).permute(2, 1, 4, 0, 3)
    else:
        channels = index.view(g, groups, per_block, collapse, 2).permute(1, 4, 3, 0, 2)
    channels = channels.reshape(groups, 2, g * fold)
    # Row of (block, i, a, half), component block * F/c + a of group i  ->  [i, half, component].
    rows = index.view(g * collapse, groups, per_block, 2).permute(1, 3, 0, 2).reshape(groups, 2, g * fold)
    moments = key_moment[channels[..., :, None], channels[..., None, :]].sum(1)  # [groups, g F, g F]
    directions = torch.linalg.eigh(moments).eigenvectors.flip(-1)  # columns by falling energy
    out = torch.zeros_like(key_moment)
    out[rows[..., :, None], channels[..., None, :]] = directions.mT[:, None]
    return out


def balance(nope: Tensor, kv_moment: Tensor) -> tuple[Tensor, float]:
    """-> (the moment of [nope k / rho; v] [n + g D, n + g D], rho), `nope` [n, g D] being a map of keys."""
    width = nope.shape[1]
    both = torch.block_diag(nope, torch.eye(width, dtype=nope.dtype, device=nope.device))
    moment = both @ kv_moment @ both.T
    energy = moment.diagonal().clamp_min(0).sqrt()  # root mean square of each channel
    keys, values = energy[: len(nope)], energy[len(nope) :]
    # Keys that RoPE keeps whole leave rounding errors behind, which must not be blown up to the size of values.
    floor = ROUNDING * kv_moment.diagonal()[:width].clamp_min(0).sqrt().mean()
    rho = float(torch.maximum(keys.mean(), floor) / values.mean()) if len(keys) and values.any() and floor > 0 else 1.0
    scale = torch.ones_like(energy)
    scale[: len(nope)] /= rho
    return scale[:, None] * moment * scale, rho


def joint_basis(nope: Tensor, kv_moment: Tensor, rank: int) -> tuple[Tensor, float]:
    """-> (R [n + g D, r], rho): the leading directions of [nope k / rho; v]."""
    moment, rho = balance(nope, kv_moment)
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :rank], rho


def convert_layer(
    spec: GQASpec, tensors: Mapping[str, Tensor], statistics: LayerStatistics, options: TransMLAOptions
) -> ConvertedLayer:
    """-> the MLA layer, tensors in float64. Raises ConversionError where the options do not fit the layer."""
    check_options(spec, options)
    width = spec.num_kv_heads * spec.head_dim
    turn = rotation(spec, statistics.kv_moment[:width, :width], options)
    basis, rho = joint_basis(turn[options.qk_rope_head_dim :], statistics.kv_moment, options.kv_lora_rank)
    scale = torch.ones_like(basis[:, :1])
    scale[:-width] = rho
    return absorb(spec, tensors, options, turn, (basis / scale).T, basis * scale)


def absorb(
    spec: GQASpec, tensors: Mapping[str, Tensor], options: TransMLAOptions, turn: Tensor, encode: Tensor, decode: Tensor
) -> ConvertedLayer:
    """All maps into the projections: `turn` [g D, g D] of keys, whose first dr rows keep RoPE and whose others are
    k_nope; the latent is encode [r, n + g D] of [k_nope; v], and decode [n + g D, r] brings those back."""
    g, d, dr = spec.num_kv_heads, spec.head_dim, options.qk_rope_head_dim
    rope, nope = turn[:dr], turn[dr:]
    has_nope = len(nope) > 0  # a single KV head may keep RoPE on every channel
    group_of_head = torch.arange(spec.num_heads, device=turn.device) * g // spec.num_heads
    rope_of_head = rope.unflatten(1, (g, d)).transpose(0, 1)[group_of_head]  # [H, dr, D]
    out = {name: t for name, t in tensors.items() if name.startswith("o_proj.")}
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        # A bias is a weight of one column.
        q, k, v = (t[:, None] if t.ndim == 1 else t for t in (tensors[f"{n}_proj.{kind}"].double() for n in "qkv"))
        heads = q.unflatten(0, (spec.num_heads, d))  # [H, D, hidden]
        q_rows = torch.cat((heads, rope_of_head @ heads), 1) if has_nope else rope_of_head @ heads
        shape = (-1, *tensors[f"q_proj.{kind}"].shape[1:])
        out[f"q_proj.{kind}"] = q_rows.reshape(shape)
        cached = torch.cat((encode @ torch.cat((nope @ k, v)), rope @ k))
        out[f"kv_a_proj_with_mqa.{kind}"] = cached.reshape(shape)
    k_up = (nope.T @ decode[: len(nope)]).unflatten(0, (g, d))[group_of_head]  # [H, D, r]
    v_up = decode[len(nope) :].unflatten(0, (g, d))[group_of_head]
    out["kv_b_proj.weight"] = (torch.cat((k_up, v_up), 1) if has_nope else v_up).flatten(0, 1)
    return _mla_spec(spec, options, d if has_nope else 0), out


def _mla_spec(spec: GQASpec, options: TransMLAOptions, nope_dim: int) -> MLASpec:
    """RoPE's amplitude (YaRN) multiplies every score of the source, so it moves into the softmax scale."""
    collapse = spec.head_dim // options.qk_rope_head_dim
    return MLASpec(
        num_heads=spec.num_heads,
        kv_lora_rank=options.kv_lora_rank,
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=options.qk_rope_head_dim,
        v_head_dim=spec.head_dim,
        softmax_scale=spec.softmax_scale * spec.rope.scale**2,
        rope=RopeSpec(spec.rope.inv_freq[::collapse], "interleaved"),
        q_bias=spec.qkv_bias,
        kv_a_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
    )
