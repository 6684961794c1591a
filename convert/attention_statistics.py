"""What score-aware conversion learns about a layer: keys, queries and values as its own attention uses them.

An error e in the score of query t and key s of head h changes what the layer adds to the residual stream by
`a W_o[h] (v_s - o_t) e`, with a the attention weight, o_t = sum_s a v_s. Its squared length for e = 1 is the
*sensitivity* w[h, t, s] = a^2 |W_o[h] (v_s - o_t)|^2, and everything about queries and keys is weighted by it. Values
are counted as they arrive in the output: mixed by the attention weights. Those are the layer's own, windows and caps
included; where scores are capped, e is an error before the cap, which passes it multiplied by 1 - tanh^2.

Invariant: sums over tokens are float64; attention matrices exist for at most BLOCK_ELEMENTS weights at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.errors import ConversionError
from engine.kernels.rope import rope_table
from engine.spec import GQASpec

BLOCK_ELEMENTS = 1 << 22  # attention weights of one block of queries, over all heads: 16 MiB in fp32
EVEN = 0.1  # share of `rotation` that counts all pairs alike: a score may be wrong where attention does not look now
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class AttentionStatistics:
    """Of one source layer over T `tokens`, before any rotation, biases included; kv is [k; v], head after head.

    H query heads, g KV heads of D channels, f = D/2 frequencies.
    """

    tokens: int
    query_moment: Tensor  # float64 [H, D, D]: sum_ts w q q^T / T
    kv_mean: Tensor  # float64 [2 g D]: sum_hts w kv_s / sum w
    kv_moment: Tensor  # float64 [2 g D, 2 g D]: sum_hts w kv_s kv_s^T / sum w
    mixed_mean: Tensor  # float64 [H, 2 g D]: mean over t of sum_s a kv_s
    mixed_moment: Tensor  # float64 [2 g D, 2 g D]: of sum_s a kv_s, mean over t and h
    rotation: Tensor  # complex128 [H, f]: mean of exp(i theta_f (t - s)), by w, and for a share of EVEN by nothing


def collect_attention(
    spec: GQASpec,
    tensors: Mapping[str, Tensor],
    inputs: Iterable[Tensor],
    sample: list[tuple[Tensor, Tensor]] | None = None,
    sample_tokens: int = 0,
) -> AttentionStatistics:
    """`tensors`: the attention's (`q_proj.weight`, ...); `inputs`: what it sees, normed, [windows, length, hidden].

    `sample` takes about the first `sample_tokens` of the inputs, each part with what attention puts out for it.
    Raises ConversionError where the layer computes what is not finite.
    """
    sums = _Sums(spec, tensors)
    for windows in inputs:
        outputs = [sums.add(window) for window in windows]
        wanted = (sample_tokens - sums.tokens + windows[..., 0].numel()) // windows.shape[1]  # windows of this part
        if sample is not None and wanted > 0:
            sample.append((windows[:wanted], torch.stack(outputs[:wanted])))
    return sums.statistics()


def pairs(x: Tensor, layout: str) -> Tensor:
    """[..., D] -> complex [..., D/2]: the channels of each rotated pair as one number."""
    if layout == "half":
        return torch.complex(*x.chunk(2, -1))
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


class _Sums:
    def __init__(self, spec: GQASpec, tensors: Mapping[str, Tensor]) -> None:
        heads, dim = spec.num_heads, spec.head_dim
        self.spec = spec
        self.weight = torch.cat([tensors[f"{n}_proj.weight"] for n in "qkv"])  # [(H + 2 g) D, hidden]
        self.bias = torch.cat([tensors[f"{n}_proj.bias"] for n in "qkv"]) if spec.qkv_bias else None
        self.o_weight, self.o_bias = tensors["o_proj.weight"], tensors.get("o_proj.bias")
        out = self.o_weight.unflatten(1, (heads, dim)).transpose(0, 1)  # [H, hidden, D]
        self.metric = out.mT @ out  # [H, D, D]: |W_o[h] v|^2 = v^T metric v
        self.group_of_head = torch.arange(heads, device=out.device) * spec.num_kv_heads // heads
        self.inv_freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64, device=out.device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=out.device)

        width = spec.cache_width
        self.tokens = 0
        self.query, self.sensitivity = zeros(heads, dim, dim), zeros()
        self.kv_first, self.kv_second = zeros(width), zeros(width, width)
        self.mixed_first, self.mixed_second = zeros(heads, width), zeros(width, width)
        self.ages = zeros(heads, 0)  # sensitivity by t - s
        self.pairs_of_age = zeros(0)

    def add(self, x: Tensor) -> Tensor:
        """One window [T, hidden], from position 0 -> what attention puts out, alike."""
        heads, groups, length = self.spec.num_heads, self.spec.num_kv_heads, len(x)
        qkv = F.linear(x, self.weight, self.bias)
        q, kv = qkv.split((heads * self.spec.head_dim, self.spec.cache_width), 1)
        q = q.unflatten(1, (heads, -1)).transpose(0, 1)  # [H, T, D]
        k, v = kv.unflatten(1, (2, groups, -1)).permute(1, 2, 0, 3)[:, self.group_of_head]  # [H, T, D] each
        turn = torch.view_as_complex(rope_table(torch.arange(length, device=x.device), self.inv_freq[None])[:, 0])
        turn = turn.to(x.dtype.to_complex())  # [T, f]
        weight_of_key = torch.zeros(length, dtype=torch.float64, device=x.device)
        self._grow(length)
        self.pairs_of_age[:length] += torch.arange(length, 0, -1, device=x.device)
        outputs = []
        step = max(1, BLOCK_ELEMENTS // (heads * length))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            w, out = self._add_queries(rows, q[:, rows], k, v, kv, turn)
            outputs.append(out)
            self.ages[:, : rows.stop] += sums_by_age(w, start)
            weight_of_key += w.sum((0, 1), dtype=torch.float64)
        self.tokens += length
        wide = kv.double()
        self.sensitivity += weight_of_key.sum()
        self.kv_first += weight_of_key @ wide
        self.kv_second += (wide * weight_of_key[:, None]).T @ wide
        return F.linear(torch.cat(outputs, 1).transpose(0, 1).flatten(1), self.o_weight, self.o_bias)

    def _add_queries(
        self, rows: slice, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> the sensitivities [H, R, T] of queries q [H, R, D] at positions `rows` to k, v [H, T, D]; o [H, R, D]."""
        layout, scale = self.spec.rope.layout, self.spec.softmax_scale * self.spec.rope.scale**2
        qc, kc = pairs(q, layout), pairs(k, layout)
        scores = _real(qc * turn[rows]) @ _real(kc * turn).mT * scale
        cap, window = self.spec.score_softcap, self.spec.sliding_window
        if cap is not None:
            scores = (scores / cap).tanh_()
            passed = (1 - scores.square()).square_()
            scores *= cap
        ages = torch.arange(rows.start, rows.stop, device=q.device)[:, None] - torch.arange(len(turn), device=q.device)
        hidden = ages < 0 if window is None else (ages < 0) | (ages >= window)
        a = scores.masked_fill_(hidden, -math.inf).softmax(-1)  # [H, R, T]
        mixed = a @ kv  # [H, R, 2 g D]
        out = a @ v  # [H, R, D]
        seen, made = v @ self.metric, out @ self.metric
        square = (seen * v).sum(-1)[:, None] - 2 * made @ v.mT + (made * out).sum(-1)[..., None]
        w = a.square() * square.clamp_min_(0)
        if cap is not None:
            w *= passed
        self.query += ((q * w.sum(-1, keepdim=True)).mT @ q).double()
        self.mixed_first += mixed.sum(1, dtype=torch.float64)
        flat = mixed.flatten(0, 1).double()
        self.mixed_second.addmm_(flat.T, flat)
        return w, out

    def _grow(self, length: int) -> None:
        """Room for ages below `length`."""
        room = max(0, length - len(self.pairs_of_age))
        self.ages, self.pairs_of_age = F.pad(self.ages, (0, room)), F.pad(self.pairs_of_age, (0, room))

    def _rotation(self) -> Tensor:
        seen = self.pairs_of_age[: self.spec.sliding_window]
        ages = self.ages[:, : len(seen)]
        share = (1 - EVEN) * ages / ages.sum(1, keepdim=True).clamp_min(TINY) + EVEN * seen / seen.sum()  # [H, ages]
        angle = torch.arange(len(seen), device=seen.device)[:, None] * self.inv_freq
        return torch.complex(share @ angle.cos(), share @ angle.sin())

    def statistics(self) -> AttentionStatistics:
        total = self.sensitivity.clamp_min(TINY)
        result = AttentionStatistics(
            tokens=self.tokens,
            query_moment=self.query / self.tokens,
            kv_mean=self.kv_first / total,
            kv_moment=self.kv_second / total,
            mixed_mean=self.mixed_first / self.tokens,
            mixed_moment=self.mixed_second / (self.tokens * self.spec.num_heads),
            rotation=self._rotation(),
        )
        for value in (self.query, self.kv_second, self.mixed_second, self.ages):
            if not torch.isfinite(value).all():
                raise ConversionError("the source model computes attention that is not finite: its weights are damaged")
        return result


def sums_by_age(w: Tensor, start: int) -> Tensor:
    """w [H, R, T], of queries start, start + 1, ... and keys 0, 1, ...; nothing where a key is later than its query
    -> float64 [H, start + R]: the sum over all pairs that are 0, 1, ... apart."""
    _, rows, keys = w.shape
    # Each row begins one column further to the right than the next: pairs of one age are then one column.
    shifted = F.pad(w.flip(1), (0, rows)).flatten(1)[:, : rows * (keys + rows - 1)].unflatten(1, (rows, -1))
    return shifted.sum(1)[:, : start + rows].flip(1).double()


def _real(x: Tensor) -> Tensor:
    """complex [..., f] -> [..., 2 f]: real parts, then imaginary parts."""
    return torch.cat((x.real, x.imag), -1)
