"""MHA2MLA (Towards Economical Inference, arXiv 2502.14837): partial RoPE, and an SVD of the weights of what loses it.

1. Partial RoPE: of every head's D/2 rotated pairs, dr/2 keep RoPE, as they are; each KV head keeps a rotated key of its
   own (a rope group). Which pairs: the fastest (`high`), the slowest (`low`), evenly spaced (`uniform`), or, chosen for
   each KV head, those whose queries and keys are longest on calibration text (`2-norm`).
2. The other rows of k_proj and all of v_proj are factored through one latent, `joint`ly or each through a part of its
   own (`split`), by plain SVD: nothing is learnt from text, so weights count alike however often they are used.

The method is meant to be trained afterwards; this is its starting point. Biases never enter the latent: that of the
un-rotated keys moves every score of a query alike, which softmax ignores, and that of the values joins o_proj's.
Symbols: H query heads, g KV heads, D head_dim, dr channels with RoPE per head. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.errors import ConversionError
from convert.methods import ConvertedLayer
from engine.spec import GQASpec, MLASpec, RopeSpec

PARTIAL_ROPE = ("high", "low", "uniform", "2-norm")
SVD = ("joint", "split")


@dataclass(frozen=True)
class MHA2MLAOptions:
    kv_lora_rank: int  # r, of keys and values together
    qk_rope_head_dim: int  # dr, for each KV head
    partial_rope: str  # one of PARTIAL_ROPE
    svd: str  # one of SVD


@dataclass(frozen=True)
class PairNorms:
    """Of one source layer: mean length of each rotated pair over the calibration tokens, biases included."""

    query: Tensor  # float64 [H, D/2]
    key: Tensor  # float64 [g, D/2]


def check_options(spec: GQASpec, options: MHA2MLAOptions) -> None:
    """Raises ConversionError where the layer cannot be converted with these numbers."""
    rank, rope, d = options.kv_lora_rank, options.qk_rope_head_dim, spec.head_dim
    if rope < 2 or rope % 2 or rope > d:
        raise ConversionError(
            f"--qk-rope-head-dim {rope} does not fit heads of {d} channels: it must be even and between 2 and {d} "
            "(with --method mha2mla each KV head has that many)"
        )
    if spec.qkv_bias and spec.score_softcap is not None:
        raise ConversionError("--method mha2mla cannot convert a layer with key biases and capped scores")
    widest = spec.num_kv_heads * (2 * d - rope)
    if not 2 <= rank <= widest:
        raise ConversionError(
            f"--kv-lora-rank {rank} is out of range: with --qk-rope-head-dim {rope} for each KV head this model's keys "
            f"and values leave between 2 and {widest} dimensions to keep"
        )


def collect_pair_norms(spec: GQASpec, tensors: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> PairNorms:
    """`tensors`: the attention's (`q_proj.weight`, ...); `inputs`: what it sees, normed, [..., hidden]."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for x in inputs:
        for name in "qk":
            y = F.linear(x.flatten(0, -2), tensors[f"{name}_proj.weight"], tensors.get(f"{name}_proj.bias"))
            heads = y.unflatten(1, (-1, spec.head_dim))  # [T, heads, D]
            pairs = heads.unflatten(2, (2, -1)) if spec.rope.layout == "half" else heads.unflatten(2, (-1, 2)).mT
            lengths = pairs.norm(dim=2).sum(0, dtype=torch.float64)  # [heads, D/2]
            sums[name] = sums[name] + lengths if tokens else lengths
        tokens += x.shape[:-1].numel()
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise ConversionError("the source model computes queries or keys that are not finite: its weights are damaged")
    return PairNorms(sums["q"] / tokens, sums["k"] / tokens)


def choose_pairs(spec: GQASpec, options: MHA2MLAOptions, norms: PairNorms | None) -> Tensor:
    """-> int64 [g, dr/2]: the pairs of each KV head that keep RoPE, in order. `norms`: for 2-norm."""
    pairs, kept = spec.head_dim // 2, options.qk_rope_head_dim // 2
    if options.partial_rope == "2-norm":
        assert norms is not None  # the plan binds the collector of these to this choice
        groups = spec.num_kv_heads
        score = (norms.query.unflatten(0, (groups, -1)) * norms.key[:, None]).sum(1)  # [g, D/2]
        return score.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(1).values
    index = {
        "high": torch.arange(kept),
        "low": torch.arange(pairs - kept, pairs),
        "uniform": torch.arange(kept) * pairs // kept,  # where dr divides D: every D/dr-th
    }[options.partial_rope]
    return index.expand(spec.num_kv_heads, -1)


def channels(spec: GQASpec, pairs: Tensor) -> Tensor:
    """Pairs [g, m] -> their channels [g, 2 m], laid out as the source's."""
    if spec.rope.layout == "half":
        return torch.cat((pairs, pairs + spec.head_dim // 2), 1)
    return torch.stack((2 * pairs, 2 * pairs + 1), 2).flatten(1)


def factor(keys: Tensor, values: Tensor, rank: int, svd: str) -> tuple[Tensor, Tensor]:
    """keys [n, hidden], values [m, hidden] -> down [rank, hidden], up [n + m, rank] with up @ down near [keys; values].

    `split` gives keys and values half of the rank each, and either what the other has no use for.
    """
    if svd == "joint":
        return _truncated(torch.cat((keys, values)), rank)
    of_keys = min(rank // 2, len(keys))
    of_values = min(rank - of_keys, len(values))
    down_k, up_k = _truncated(keys, rank - of_values)
    down_v, up_v = _truncated(values, of_values)
    return torch.cat((down_k, down_v)), torch.block_diag(up_k, up_v)


def _truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """weight [n, hidden] -> S_r V_r^T [rank, hidden] and U_r [n, rank] of its SVD: any split of S_r does."""
    left = torch.linalg.eigh(weight @ weight.mT).eigenvectors.flip(-1)[:, :rank]
    return left.mT @ weight, left


def convert_layer(
    spec: GQASpec, tensors: Mapping[str, Tensor], norms: PairNorms | None, options: MHA2MLAOptions
) -> ConvertedLayer:
    """-> the MLA layer, tensors in float64. Raises ConversionError where the options do not fit the layer."""
    check_options(spec, options)
    heads, groups, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    nope_dim = d - options.qk_rope_head_dim
    device = tensors["q_proj.weight"].device
    kept = choose_pairs(spec, options, norms).to(device)
    dropped = torch.ones(groups, d // 2, dtype=torch.bool, device=device).scatter(1, kept, False)
    others = dropped.nonzero()[:, 1].view(groups, nope_dim // 2)
    order = torch.cat((channels(spec, others), channels(spec, kept)), 1)  # [g, D]: without RoPE, then with
    group_of_head = torch.arange(heads, device=device) * groups // heads

    def ordered(name: str, channel_order: Tensor) -> Tensor:
        """A projection's rows, head by head in that order [heads, D]: [heads, D, hidden]; a bias has one column."""
        t = tensors[name].double()
        rows = (t[:, None] if t.ndim == 1 else t).unflatten(0, (-1, d))
        return rows.gather(1, channel_order[..., None].expand(-1, -1, rows.shape[2]))

    keys, values = ordered("k_proj.weight", order), tensors["v_proj.weight"].double()
    down, up = factor(keys[:, :nope_dim].flatten(0, 1), values, options.kv_lora_rank, options.svd)
    k_up = up[: groups * nope_dim].unflatten(0, (groups, nope_dim))[group_of_head]
    v_up = up[groups * nope_dim :].unflatten(0, (groups, d))[group_of_head]
    out = {name: t for name, t in tensors.items() if name.startswith("o_proj.")}
    out["q_proj.weight"] = ordered("q_proj.weight", order[group_of_head]).flatten(0, 1)
    out["kv_a_proj_with_mqa.weight"] = torch.cat((down, keys[:, nope_dim:].flatten(0, 1)))
    out["kv_b_proj.weight"] = torch.cat((k_up, v_up), 1).flatten(0, 1)
    if spec.qkv_bias:
        out["q_proj.bias"] = ordered("q_proj.bias", order[group_of_head]).flatten()
        rope_bias = ordered("k_proj.bias", order)[:, nope_dim:].flatten()
        out["kv_a_proj_with_mqa.bias"] = F.pad(rope_bias, (len(down), 0))
        mixed = tensors["v_proj.bias"].double().view(groups, d)[group_of_head].flatten()  # of weights that sum to one
        out["o_proj.bias"] = tensors["o_proj.weight"].double() @ mixed + tensors.get("o_proj.bias", 0.0)
    return _mla_spec(spec, options, kept), out


def _mla_spec(spec: GQASpec, options: MHA2MLAOptions, kept: Tensor) -> MLASpec:
    """RoPE's amplitude (YaRN) multiplies every score of the source, so it moves into the softmax scale."""
    frequencies = tuple(spec.rope.inv_freq[i] for i in kept.flatten().tolist())
    return MLASpec(
        num_heads=spec.num_heads,
        kv_lora_rank=options.kv_lora_rank,
        qk_nope_head_dim=spec.head_dim - options.qk_rope_head_dim,
        qk_rope_head_dim=options.qk_rope_head_dim,
        v_head_dim=spec.head_dim,
        softmax_scale=spec.softmax_scale * spec.rope.scale**2,
        rope=RopeSpec(frequencies, spec.rope.layout),
        rope_groups=spec.num_kv_heads,
        q_bias=spec.qkv_bias,
        kv_a_bias=spec.qkv_bias,
        o_bias=spec.o_bias or spec.qkv_bias,
    )
