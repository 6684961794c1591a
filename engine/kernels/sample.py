"""Choosing each row's next token from its logits; log-probabilities; penalties.

A token's weight is floor(2^34 exp((logit - best logit) / temperature)): an integer, so every sum of weights is exact
and the same in whatever order it is taken (for up to 2^19 tokens in int64 and in fp64 alike). That makes a draw a
function of the row's logits, seed and position alone, on any batch and any tiling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels._triton import jit, tl

ONE = 2.0**34  # the best token's weight
MIN_TEMPERATURE = 1e-6  # below it, only tokens tied with the best have any weight
CHUNK = 64  # the vocabulary is searched in two steps: which chunk, then where in it
COLUMNS = 8192  # of a tile of the vocabulary on a GPU


@dataclass(frozen=True)
class SamplingTensors:
    """How each of B rows is sampled. The flags live on the host, so that no work is done for filters nobody uses."""

    temperature: Tensor  # float32 [B], 0: greedy
    top_k: Tensor  # int32 [B], 0: off
    top_p: Tensor  # float32 [B], 1: off
    min_p: Tensor  # float32 [B], 0: off
    seed: Tensor  # int64 [B]
    position: Tensor  # int64 [B], index in its sequence of the token to be chosen
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def build(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seed: Sequence[int],
        position: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Self:
        """One value per row; seeds are signed 64-bit."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            temperature=column(temperature, torch.float32),
            top_k=column(top_k, torch.int32),
            top_p=column(top_p, torch.float32),
            min_p=column(min_p, torch.float32),
            seed=column(seed, torch.int64),
            position=column(position, torch.int64),
            all_greedy=not any(temperature),
            any_top_k=any(top_k),
            any_top_p=any(p < 1 for p in top_p),
            any_min_p=any(min_p),
        )


def philox_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """seed, position int64 [...] -> float32 in [0, 1), by Philox-4x32-10 (Salmon et al., SC 2011).

    The bits are those of Triton's `tl.rand(seed, position)`.
    """
    keys, counters = (x.cpu().numpy().view(np.uint64) for x in (seed, position))
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    column = (2, *[1] * seed.dim())
    multiplier = np.array([0xD2511F53, 0xCD9E8D57], np.uint64).reshape(column)
    increment = np.array([0x9E3779B9, 0xBB67AE85], np.uint64).reshape(column)
    key = np.stack((keys & word, keys >> half))
    even = np.stack((counters & word, np.zeros_like(counters)))  # words 0 and 2 of the counter
    odd = np.stack((counters >> half, np.zeros_like(counters)))  # words 1 and 3
    for _ in range(10):
        product = even * multiplier
        even, odd = (product >> half)[::-1] ^ odd ^ key, (product & word)[::-1]
        key = key + increment & word
    bits = even[0].astype(np.uint32).view(np.int32)
    uniform = np.where(bits < 0, ~bits, bits).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform).to(seed.device)


def _chunks(x: Tensor, padding: float) -> Tensor:
    """[B, V] -> [B, ceil(V / CHUNK), CHUNK]."""
    return F.pad(x, (0, -x.shape[1] % CHUNK), value=padding).unflatten(1, (-1, CHUNK))


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit [B, 1] and its index [B, 1], the lowest of several."""
    if logits.numel() < 2**16:
        return logits.max(-1, keepdim=True)
    chunks = _chunks(logits, -math.inf)  # torch takes an amax ten times as fast as a max with its index
    bests, chunk = chunks.amax(-1).max(-1, keepdim=True)
    within = chunks.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK))[:, 0].argmax(-1, keepdim=True)
    return bests, chunk * CHUNK + within


def _keep_top_k_(weights: Tensor, logits: Tensor, top_k: Tensor) -> None:
    vocab = logits.shape[1]
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()[:, None]
    active = k < vocab
    most = max(1, int((k * active).max()))
    kth = logits.topk(most).values.gather(1, k.clamp(max=most) - 1)
    weights.masked_fill_((logits < kth) & active, 0)


def _keep_top_p_(weights: Tensor, top_p: Tensor) -> None:
    p = top_p.double()[:, None]
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    # Tokens lighter than (1 - p) / V of the total weigh less than 1 - p together, so the threshold is not among them:
    # only the others need sorting. (Half of it, so that rounding cannot matter.)
    cut = torch.where(p < 1, (1 - p) * total / (2 * weights.shape[1]), math.inf)
    candidates = max(1, int((weights >= cut).sum(-1).max()))
    heaviest = weights.topk(candidates).values
    index = (heaviest.cumsum(-1, dtype=torch.float64) < p * total).sum(-1, keepdim=True).clamp_(max=candidates - 1)
    threshold = torch.where(p < 1, heaviest.gather(1, index), 0)
    weights.masked_fill_(weights < threshold, 0)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the running sum of weights [B, V] exceeds uniform [B] of their total -> int64 [B, 1]."""
    chunks = _chunks(weights, 0)
    ends = chunks.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, V / CHUNK]
    target = (uniform.double()[:, None] * ends[:, -1:]).floor_()
    chunk = (ends <= target).sum(-1, keepdim=True).clamp_(max=ends.shape[1] - 1)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK))[:, 0].double()  # [B, CHUNK]
    start = ends.gather(1, chunk) - inside.sum(-1, keepdim=True)
    within = (start + inside.cumsum(-1) <= target).sum(-1, keepdim=True)
    return (chunk * CHUNK + within).clamp_(max=weights.shape[1] - 1)


def sample_torch(logits: Tensor, params: SamplingTensors) -> Tensor:
    """The definition."""
    best, greedy = _argmax(logits)
    if params.all_greedy:
        return greedy[:, 0]
    logits, best = logits.float(), best.float()
    inverse = 1 / params.temperature.clamp(min=MIN_TEMPERATURE)[:, None] * math.log2(math.e)
    weights = (logits - best).mul_(inverse).exp2_().mul_(ONE).floor_()
    if params.any_top_k:
        _keep_top_k_(weights, logits, params.top_k)
    if params.any_top_p:
        _keep_top_p_(weights, params.top_p)
    if params.any_min_p:
        weights.masked_fill_(weights < params.min_p[:, None] * ONE, 0)
    drawn = _draw(weights, philox_uniform(params.seed, params.position))
    return torch.where(params.temperature > 0, drawn[:, 0], greedy[:, 0])


@jit
def _load_tile(row_ptr: tl.tensor, start: tl.tensor, vocab: int, COLUMNS: tl.constexpr) -> tl.tensor:
    """The tile's token ids, and their logits in fp32, -inf past the end of the vocabulary."""
    tokens = start + tl.arange(0, COLUMNS)
    return tokens, tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)


@jit
def _tile_weights(
    row_ptr: tl.tensor,
    start: tl.tensor,
    vocab: int,
    best: tl.tensor,
    inverse: tl.tensor,
    least_logit: tl.tensor,
    least_weight: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """int64 [COLUMNS]: the tile's weights, 0 for tokens below either threshold."""
    _, logits = _load_tile(row_ptr, start, vocab, COLUMNS)
    weights = tl.floor(tl.exp2((logits - best) * inverse) * 17179869184.0)  # ONE
    return tl.where((logits >= least_logit) & (weights >= least_weight), weights, 0.0).to(tl.int64)


@jit
def _total_weight(
    row_ptr: tl.tensor,
    vocab: int,
    best: tl.tensor,
    inverse: tl.tensor,
    least_logit: tl.tensor,
    least_weight: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([COLUMNS], tl.int64)
    for start in range(0, vocab, COLUMNS):
        total += _tile_weights(row_ptr, start, vocab, best, inverse, least_logit, least_weight, COLUMNS)
    return tl.sum(total, 0)


@jit
def _ordered(bits: tl.tensor) -> tl.tensor:
    """The bits of an fp32 number as an int32 that orders as the number does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _kth_logit(row_ptr: tl.tensor, vocab: int, best: tl.tensor, k: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """The largest threshold that k logits reach, by bisection over the ordered bits; -inf where fewer are finite."""
    low = tl.full([], -2139095041, tl.int64)  # -inf
    high = _ordered(best.to(tl.int32, bitcast=True)).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        threshold = _ordered(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        reach = tl.zeros([COLUMNS], tl.int32)
        for start in range(0, vocab, COLUMNS):
            _, logits = _load_tile(row_ptr, start, vocab, COLUMNS)
            reach += (logits >= threshold).to(tl.int32)
        enough = tl.sum(reach, 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return _ordered(low.to(tl.int32)).to(tl.float32, bitcast=True)


@jit
def _nucleus_weight(
    row_ptr: tl.tensor,
    vocab: int,
    best: tl.tensor,
    inverse: tl.tensor,
    least_logit: tl.tensor,
    p: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The largest weight such that the tokens at least as heavy hold p of the total, by bisection over its bits."""
    total = _total_weight(row_ptr, vocab, best, inverse, least_logit, 0.0, COLUMNS)
    target = p.to(tl.float64) * total.to(tl.float64)
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0x50800000, tl.int32)  # ONE
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        threshold = middle.to(tl.float32, bitcast=True)
        mass = _total_weight(row_ptr, vocab, best, inverse, least_logit, threshold, COLUMNS)
        enough = mass.to(tl.float64) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.float32, bitcast=True)


@jit
def _sample_kernel(
    logits_ptr: tl.tensor,  # [B, vocab]
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_ptr: tl.tensor,  # int64 [B]
    vocab: int,
    stride: int,
    COLUMNS: tl.constexpr,
) -> None:
    """One row of the batch, its vocabulary in tiles; filters the row does not use cost nothing."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    bests = tl.full([COLUMNS], float("-inf"), tl.float32)
    for start in range(0, vocab, COLUMNS):
        _, logits = _load_tile(row_ptr, start, vocab, COLUMNS)
        bests = tl.maximum(bests, logits)
    best = tl.max(bests, 0)
    temperature = tl.load(temperature_ptr + row)

    if temperature > 0:
        inverse = tl.div_rn(1.0, tl.maximum(temperature, 1e-6)) * 1.4426950408889634  # MIN_TEMPERATURE, log2 e
        least_logit = tl.full([], float("-inf"), tl.float32)
        least_weight = tl.full([], 0.0, tl.float32)
        k = tl.load(top_k_ptr + row)
        if (k > 0) & (k < vocab):
            least_logit = _kth_logit(row_ptr, vocab, best, k, COLUMNS)
        p = tl.load(top_p_ptr + row)
        if p < 1:
            least_weight = _nucleus_weight(row_ptr, vocab, best, inverse, least_logit, p, COLUMNS)
        least_weight = tl.maximum(least_weight, tl.load(min_p_ptr + row) * 17179869184.0)
        total = _total_weight(row_ptr, vocab, best, inverse, least_logit, least_weight, COLUMNS)
        uniform = tl.rand(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        target = (uniform.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        start = 0
        before = tl.full([], 0, tl.int64)
        weights = _tile_weights(row_ptr, start, vocab, best, inverse, least_logit, least_weight, COLUMNS)
        here = tl.sum(weights, 0)
        while (before + here <= target) & (start + COLUMNS < vocab):
            before += here
            start += COLUMNS
            weights = _tile_weights(row_ptr, start, vocab, best, inverse, least_logit, least_weight, COLUMNS)
            here = tl.sum(weights, 0)
        token = start + tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    else:
        firsts = tl.full([COLUMNS], vocab, tl.int32)
        for start in range(0, vocab, COLUMNS):
            tokens, logits = _load_tile(row_ptr, start, vocab, COLUMNS)
            firsts = tl.minimum(firsts, tl.where(logits == best, tokens, vocab))
        token = tl.min(firsts, 0)
    tl.store(token_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))


def sample_triton(logits: Tensor, params: SamplingTensors) -> Tensor:
    batch, vocab = logits.shape
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch > 0:
        _sample_kernel[(batch,)](
            logits, params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.position, tokens,
            vocab, logits.stride(0), COLUMNS=COLUMNS, num_warps=32,
        )  # fmt: skip
    return tokens


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """logits [B, V] -> int64 [B], one token per row; the logits are left as they are.

    Greedy rows take the likeliest token, the lowest of several. Others keep the top_k likeliest; of those the likeliest
    that together reach top_p of what is left; of those the ones at least min_p times as likely as the likeliest, ties
    at each threshold included; and draw from what remains with one uniform number per row, a function of (seed,
    position) alone. Logits of -inf are never drawn; a row needs a finite one and no NaN (else any token may come).
    """
    return sample_triton(logits, params) if logits.is_cuda else sample_torch(logits, params)


def logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V], token_ids int64 [B] -> natural-log probabilities of those tokens, fp32 [B], and of the k likeliest
    ones, fp32 [B, k], descending, with their ids, int64 [B, k]."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None]) - total
    values, ids = logits.topk(min(k, logits.shape[1]))
    return chosen[:, 0], values - total, ids


@dataclass(frozen=True)
class Penalties:
    """Penalties of P rows, each over at most N distinct tokens. Rows without penalties are not in here and are free.

    A short row is filled up with repeats of one of its own (token, count) pairs, which changes nothing.
    """

    rows: Tensor  # int64 [P], which rows of the logits
    token_ids: Tensor  # int64 [P, N], the tokens of prompt and output
    output_counts: Tensor  # float32 [P, N], how often each is in the output; 0: in the prompt only
    repetition: Tensor  # float32 [P, 1], 1: off
    presence: Tensor  # float32 [P, 1], 0: off
    frequency: Tensor  # float32 [P, 1], 0: off

    @classmethod
    def build(
        cls,
        rows: Sequence[int],
        counts: Sequence[Mapping[int, int]],
        repetition: Sequence[float],
        presence: Sequence[float],
        frequency: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> Self:
        """For each of `rows`: its tokens (at least one), each with its number of occurrences in the output, and its
        three penalties."""
        widest = max(map(len, counts))

        def padded(values: list[int]) -> list[int]:
            return values + values[:1] * (widest - len(values))

        def to_device(values: Sequence[object], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            rows=to_device(rows, torch.int64),
            token_ids=to_device([padded(list(c)) for c in counts], torch.int64),
            output_counts=to_device([padded(list(c.values())) for c in counts], torch.float32),
            repetition=to_device(repetition, torch.float32)[:, None],
            presence=to_device(presence, torch.float32)[:, None],
            frequency=to_device(frequency, torch.float32)[:, None],
        )


def apply_penalties_(logits: Tensor, penalties: Penalties) -> None:
    """In place on logits [B, V]. First repetition (arXiv 1909.05858): the positive logits of tokens in prompt or output
    are divided by it, the others multiplied. Then minus presence for tokens in the output, and minus frequency for each
    time they are."""
    index = penalties.rows[:, None], penalties.token_ids
    values = logits[index].float()
    values = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    values -= penalties.presence * (penalties.output_counts > 0) + penalties.frequency * penalties.output_counts
    logits[index] = values.to(logits.dtype)
