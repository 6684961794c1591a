"""Score-aware conversion: keep what the layer's attention answers to. Training-free and lossy.

Rotated pairs of channels are complex numbers q[h, f], k[g, f]; a score is
    Re sum_f q[h, f] conj(k[g(h), f]) exp(i theta_f (t - s)).

1. Balance: at each frequency an invertible complex map mixes the KV heads, k' = A_f k and q' = A_f^-H q, which no score
   notices, rotated or not: all heads turn alike at f. A_f scales the keys by the queries that meet them, then takes the
   Hermitian eigenvectors: an eigenvalue is what dropping the component from the scores would cost.
2. Choice: losing RoPE costs a component eigenvalue * (1 - |rho|^2), with rho the mean turn between query and key. The
   dr/2 dearest of all (frequency, component) pairs keep it, whatever their frequencies, in one key for all heads.
3. The queries of the others are multiplied by rho, the constant that stands in for the turn with least squares.
4. Joint low rank of these keys and the values, centred, each in the metric in which its errors reach the output.
5. Absorption of all maps into the projections; the means' part of the output is a bias of o_proj.

Symbols: H query heads, g KV heads, D head_dim, F = D/2 frequencies, n = g D - dr. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.attention_statistics import AttentionStatistics, pairs
from convert.errors import ConversionError
from convert.methods import ConvertedLayer
from convert.methods.low_rank import joint_low_rank
from engine.spec import GQASpec, MLASpec, RopeSpec

LEAST_SCALE = 1e-6  # of the largest, in balancing: queries that are never there do not send keys to zero
LEAST_ENERGY = 1e-10  # of the largest eigenvalue of a metric, so that it can be undone


@dataclass(frozen=True)
class ScoreAwareOptions:
    kv_lora_rank: int  # r
    qk_rope_head_dim: int  # dr


@dataclass(frozen=True)
class Components:
    """Of every frequency, g components: k'[f, c] = sum_j key[f, c, j] k[j, f], and likewise the queries'."""

    energy: Tensor  # float64 [F, g]: squared error of the output if the component were dropped
    key: Tensor  # complex128 [F, g, g], the last axis over KV heads
    query: Tensor  # complex128 [F, g, g]; sum_c query[f, c, i] conj(key[f, c, j]) is 1 where i = j, else 0


def check_options(spec: GQASpec, options: ScoreAwareOptions) -> None:
    """Raises ConversionError where the layer has no r and dr like these."""
    rank, rope, width = options.kv_lora_rank, options.qk_rope_head_dim, spec.num_kv_heads * spec.head_dim
    if rope < 2 or rope % 2 or rope > width:
        raise ConversionError(
            f"--qk-rope-head-dim {rope} does not fit: it must be even, between 2 and the {width} channels of all keys"
        )
    if not 1 <= rank <= 2 * width - rope:
        raise ConversionError(
            f"--kv-lora-rank {rank} is out of range: with --qk-rope-head-dim {rope} this model's keys and values leave "
            f"between 1 and {2 * width - rope} dimensions to keep"
        )


def balance(spec: GQASpec, query_moment: Tensor, key_moment: Tensor) -> Components:
    """query_moment [H, D, D] as in AttentionStatistics; key_moment [g D, g D], uncentred."""
    groups = spec.num_kv_heads
    met = pair_energy(spec, query_moment).unflatten(0, (groups, -1)).sum(1).mT  # [F, g]: of the queries a key meets
    scale = met.sqrt()
    scale = scale.clamp_min(LEAST_SCALE * float(scale.max()) or 1.0)
    scaled = hermitian_moments(spec, key_moment) * scale[:, :, None] * scale[:, None, :]
    energy, vectors = torch.linalg.eigh(scaled)
    inverse = vectors.mH  # [F, c, g]
    return Components(energy.clamp_min(0), inverse * scale[:, None], inverse / scale[:, None])


def pair_energy(spec: GQASpec, moments: Tensor) -> Tensor:
    """[..., D, D] -> [..., F]: mean squared length of each rotated pair."""
    channels = moments.diagonal(dim1=-2, dim2=-1)
    return torch.view_as_real(pairs(channels, spec.rope.layout)).sum(-1)


def hermitian_moments(spec: GQASpec, key_moment: Tensor) -> Tensor:
    """real [g D, g D] -> complex [F, g, g]: the mean of k k^H over KV heads, frequency by frequency."""
    groups, d = spec.num_kv_heads, spec.head_dim
    m = key_moment.view(groups, d, groups, d).permute(0, 2, 1, 3)  # [g, g', D, D]
    rows = torch.arange(d, device=m.device)
    re, im = torch.view_as_real(pairs(rows.double(), spec.rope.layout)).long().unbind(-1)  # channels of each pair
    moment = torch.complex(m[:, :, re, re] + m[:, :, im, im], m[:, :, im, re] - m[:, :, re, im])
    return moment.permute(2, 0, 1)


def rope_cost(spec: GQASpec, components: Components, query_moment: Tensor, rotation: Tensor) -> Tensor:
    """[F, g]: what it costs each component to lose RoPE; |rho|^2 is the heads' mean by the energy of their queries."""
    group = torch.arange(spec.num_heads, device=rotation.device) * spec.num_kv_heads // spec.num_heads
    weight = components.query[:, :, group].abs().square() * pair_energy(spec, query_moment).mT[:, None]  # [F, c, H]
    kept = (weight * rotation.abs().square().mT[:, None]).sum(-1) / weight.sum(-1).clamp_min(1e-300)
    return components.energy * (1 - kept)


def choose(cost: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """cost [F, g] -> flat numbers of the `count` components that keep RoPE and of the others, in order."""
    order = cost.flatten().argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def channels(spec: GQASpec, coefficients: Tensor, frequency: Tensor) -> Tensor:
    """Complex maps as real ones: coefficients [m, j], of j heads' pairs at frequency [m] -> [2 m, j D], (re, im)."""
    count, heads = coefficients.shape
    d, device = spec.head_dim, coefficients.device
    index = torch.arange(d, device=device).double()
    re, im = torch.view_as_real(pairs(index, spec.rope.layout)).long()[frequency].unbind(-1)  # [m] each
    out = torch.zeros(count, 2, heads, d, dtype=torch.float64, device=device)
    rows = torch.arange(count, device=device)
    out[rows, 0, :, re], out[rows, 0, :, im] = coefficients.real, -coefficients.imag
    out[rows, 1, :, re], out[rows, 1, :, im] = coefficients.imag, coefficients.real
    return out.reshape(2 * count, heads * d)


def key_map(spec: GQASpec, components: Components, chosen: Tensor) -> Tensor:
    """[2 m, g D]: all heads' keys -> the chosen components, pairs interleaved."""
    return channels(spec, components.key.flatten(0, 1)[chosen], chosen // spec.num_kv_heads)


def query_map(spec: GQASpec, components: Components, chosen: Tensor, rotation: Tensor | None) -> Tensor:
    """[H, 2 m, D]: each head's query -> the chosen components, times rotation [H, F] where they lose RoPE."""
    frequency, maps = chosen // spec.num_kv_heads, []
    coefficients = components.query.flatten(0, 1)[chosen]  # [m, g]
    for head in range(spec.num_heads):
        own = coefficients[:, head * spec.num_kv_heads // spec.num_heads]
        own = own if rotation is None else own * rotation[head, frequency]
        maps.append(channels(spec, own[:, None], frequency))
    return torch.stack(maps)


def latent_maps(
    spec: GQASpec, o_weight: Tensor, statistics: AttentionStatistics, keys: Tensor, queries: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """-> E [r, 2 g D], of [k; v], and D [n + g D, r], to [k_nope; v]: the joint low rank, its metric undone.

    keys [n, g D], queries [H, n, D]: the maps of what loses RoPE. An error of a key is measured by the scores it makes,
    weighted by their sensitivity; an error of a mixed value by what o_weight [hidden, H D] makes of it.
    """
    scale, groups = spec.softmax_scale * spec.rope.scale**2, spec.num_kv_heads
    key_metric = torch.einsum("hij,hjk,hlk->il", queries, statistics.query_moment, queries) * scale**2
    out = o_weight.double().unflatten(1, (groups, -1, spec.head_dim)).permute(1, 2, 0, 3).flatten(1, 2)  # [g, *, D]
    key_root, key_inverse = roots(key_metric)
    value_root, value_inverse = roots(torch.block_diag(*(out.mT @ out)))
    root = torch.block_diag(key_root @ keys, value_root)  # [n + g D, 2 g D]: of [k; v], in the metric
    kv_mean, mixed_mean = statistics.kv_mean, statistics.mixed_mean.mean(0)
    centred = float(spec.score_softcap is None)
    key_moment = root @ (statistics.kv_moment - centred * torch.outer(kv_mean, kv_mean)) @ root.mT
    value_moment = root @ (statistics.mixed_moment - centred * torch.outer(mixed_mean, mixed_mean)) @ root.mT
    encode, decode = joint_low_rank(key_moment, value_moment, len(keys), rank)
    return encode @ root, torch.block_diag(key_inverse, value_inverse) @ decode


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """-> the symmetric square root of a positive semi-definite matrix, and its inverse, with a floor under both."""
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    largest = values[-1] if len(values) and values[-1] > 0 else torch.ones_like(metric.sum())
    root = values.clamp_min(LEAST_ENERGY * largest).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def convert_layer(
    spec: GQASpec, tensors: Mapping[str, Tensor], statistics: AttentionStatistics, options: ScoreAwareOptions
) -> ConvertedLayer:
    """-> the MLA layer, tensors in float64. Raises ConversionError where the options do not fit the layer."""
    check_options(spec, options)
    groups, d, width = spec.num_kv_heads, spec.head_dim, spec.num_kv_heads * spec.head_dim
    components = balance(spec, statistics.query_moment, statistics.kv_moment[:width, :width])
    cost = rope_cost(spec, components, statistics.query_moment, statistics.rotation)
    rope, nope = choose(cost, options.qk_rope_head_dim // 2)
    rope_keys, nope_keys = (key_map(spec, components, chosen) for chosen in (rope, nope))
    nope_queries = query_map(spec, components, nope, statistics.rotation)
    o_weight = tensors["o_proj.weight"]
    encode, decode = latent_maps(spec, o_weight, statistics, nope_keys, nope_queries, options.kv_lora_rank)

    group_of_head = torch.arange(spec.num_heads, device=encode.device) * groups // spec.num_heads
    k_up = nope_queries.mT @ decode[: len(nope_keys)]  # [H, D, r]: the queries themselves stay as they are
    v_up = decode[len(nope_keys) :].unflatten(0, (groups, d))[group_of_head]  # [H, D, r]
    # A cap is the one thing that notices a constant added to all scores: there, nothing is centred.
    mean = statistics.mixed_mean.mean(0) * float(spec.score_softcap is None)
    # What the latent does not bring back of each head's own mean value joins the bias, so that outputs keep their mean.
    values = statistics.mixed_mean[:, width:].unflatten(1, (groups, d))
    values = values[torch.arange(spec.num_heads, device=values.device), group_of_head]  # [H, D]
    latents = (statistics.mixed_mean - mean) @ encode.mT  # [H, r]
    missing = values - torch.einsum("hdr,hr->hd", v_up, latents)
    o_bias = o_weight.double() @ missing.flatten()

    out = {"o_proj.weight": o_weight, "o_proj.bias": o_bias + tensors["o_proj.bias"] if spec.o_bias else o_bias}
    rope_queries = query_map(spec, components, rope, None)
    out |= _projections(spec, tensors, rope_queries, torch.cat((encode, _keys_alone(rope_keys))), len(nope) > 0)
    out["kv_a_proj_with_mqa.bias"][: options.kv_lora_rank] -= encode @ mean
    out["kv_b_proj.weight"] = (torch.cat((k_up, v_up), 1) if len(nope) else v_up).flatten(0, 1)
    frequencies = tuple(spec.rope.inv_freq[i] for i in (rope // groups).tolist())
    return _mla_spec(spec, options, d if len(nope) else 0, frequencies), out


def _keys_alone(keys: Tensor) -> Tensor:
    """A map of k [*, g D] as one of [k; v]."""
    return torch.cat((keys, torch.zeros_like(keys)), 1)


def _projections(
    spec: GQASpec, tensors: Mapping[str, Tensor], rope_queries: Tensor, cached: Tensor, keep_queries: bool
) -> dict[str, Tensor]:
    """q_proj and kv_a_proj_with_mqa: rope_queries [H, dr, D] after the source's, `cached` [r + dr, 2 g D] after [k; v].

    The latent has a bias, its mean's, whether or not the source has any.
    """
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        # A bias is a weight of one column.
        q, k, v = (t[:, None] if t.ndim == 1 else t for t in (tensors[f"{n}_proj.{kind}"].double() for n in "qkv"))
        heads = q.unflatten(0, (spec.num_heads, spec.head_dim))  # [H, D, hidden]
        rope = rope_queries @ heads
        shape = (-1, *tensors[f"q_proj.{kind}"].shape[1:])
        out[f"q_proj.{kind}"] = (torch.cat((heads, rope), 1) if keep_queries else rope).reshape(shape)
        out[f"kv_a_proj_with_mqa.{kind}"] = (cached @ torch.cat((k, v))).reshape(shape)
    if not spec.qkv_bias:
        out["kv_a_proj_with_mqa.bias"] = cached.new_zeros(len(cached))
    return out


def _mla_spec(spec: GQASpec, options: ScoreAwareOptions, nope_dim: int, frequencies: tuple[float, ...]) -> MLASpec:
    """RoPE's amplitude (YaRN) multiplies every score of the source, so it moves into the softmax scale."""
    return MLASpec(
        num_heads=spec.num_heads,
        kv_lora_rank=options.kv_lora_rank,
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=options.qk_rope_head_dim,
        v_head_dim=spec.head_dim,
        softmax_scale=spec.softmax_scale * spec.rope.scale**2,
        rope=RopeSpec(frequencies, "interleaved"),
        q_bias=spec.qkv_bias,
        kv_a_bias=True,
        o_bias=True,
    )
