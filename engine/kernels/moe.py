"""The experts of a mixture: for each token the weighted sum of a few gated-SiLU MLPs (arXiv 2101.03961, 2401.06066).

On a GPU the (token, expert) pairs are sorted by expert, so that an expert's pairs are neighbouring rows and a tile of
rows needs one expert's weights (MegaBlocks, arXiv 2211.15841). Two launches serve all experts: one computes
silu(gate(x)) * up(x), one projects that down. Where an expert's rows begin stays on the device: the host launches as
many tiles as there could be, and never waits to learn which experts were chosen.

Weights may be FP8 with scales, multiplied as in fp8_linear.py. Here a scale serves a group of rows as well, as it is
published: 128 of them, or fewer where ups would otherwise share a group with gates (`rows_per_scale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels._triton import jit, next_power_of_2, tl
from engine.kernels.attention_parts import find_tile
from engine.kernels.fp8_linear import BLOCK
from engine.kernels.gated_mul import gated_mul_torch

Projection = Callable[[Tensor], Tensor]  # [n, in] -> [n, out]


def moe_torch(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Sequence[Projection], down: Sequence[Projection]
) -> Tensor:
    """The definition, one expert that has tokens after another: `moe_triton` with each expert's projections apart."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    counts = pairs.bincount(minlength=len(gate_up)).tolist()
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype), device=x.device)
    end = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = order[end : end + count]
            tokens = chosen // experts.shape[1]
            y = down[expert](gated_mul_torch(gate_up[expert](x[tokens])))
            out.index_add_(0, tokens, y * weights.flatten()[chosen, None])
            end += count
    return out.to(x.dtype)


def rows_per_scale(width: int) -> int:
    """Rows of gates and ups, `width` of each expert's, that share a scale."""
    return math.gcd(width, BLOCK)


@dataclass(frozen=True)
class _Tile:
    rows: int
    columns: int  # of the output; as many gates as ups where the product is gated
    depth: int  # of the sum, per step of the loop
    warps: int
    stages: int


def _tile(pairs: int, num_experts: int, element_size: int) -> _Tile:
    """By how many rows an expert has on average: few rows want wide reads of the weights, many want reuse of them."""
    if element_size > 2:
        return _Tile(16, 32, 32, 4, 2)
    if pairs <= 16 * num_experts:
        return _Tile(16, 64, 128, 4, 3)
    return _Tile(64, 64, 64, 4, 3) if pairs <= 64 * num_experts else _Tile(128, 64, 64, 8, 3)


@jit
def _experts_kernel(
    x_ptr: tl.tensor,  # GATED: [T, DEPTH] by token; else [T k, DEPTH] in the order of the pairs
    weight_ptr: tl.tensor,  # [E, 2 WIDTH if GATED else WIDTH, DEPTH]
    scale_ptr: tl.tensor,  # fp32 [E, weight's rows / SCALED rounded up, ceil(DEPTH / BLOCK)]; not read unless SCALED
    out_ptr: tl.tensor,  # [T k, WIDTH]; GATED: in the order of the pairs; else by pair
    order_ptr: tl.tensor,  # int64 [T k], the pairs (token * k + choice) by expert
    bounds_ptr: tl.tensor,  # int32 [E + 1] of each expert's pairs in that order
    pair_weight_ptr: tl.tensor,  # fp32 [T k], by pair; not read where GATED
    num_experts: int,
    experts_per_token: int,
    x_stride: int,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,  # rows that share a scale, which divides WIDTH where GATED; 0: the weight has no scales
    BLOCK: tl.constexpr,  # columns that share a scale; STEP divides it
    EXPERTS: tl.constexpr,  # a power of two, at least num_experts
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    expert, first_row = find_tile(bounds_ptr, tl.program_id(0), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    places = tl.load(bounds_ptr + expert) + first_row + tl.arange(0, ROWS)
    row_mask = places < tl.load(bounds_ptr + expert + 1)
    pairs = tl.load(order_ptr + places, mask=row_mask, other=0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < WIDTH
    if GATED:
        rows = x_ptr + pairs // experts_per_token * x_stride
        weight_rows = weight_ptr + (expert.to(tl.int64) * 2 * WIDTH + columns) * DEPTH
    else:
        rows = x_ptr + places.to(tl.int64) * x_stride
        weight_rows = weight_ptr + (expert.to(tl.int64) * WIDTH + columns) * DEPTH
    if SCALED:
        SCALES: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK  # of a row
        GROUPS: tl.constexpr = ((2 * WIDTH if GATED else WIDTH) + SCALED - 1) // SCALED
        scales = scale_ptr + (expert * GROUPS + columns // SCALED) * SCALES
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc_up = acc
    for start in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        channels = start + tl.arange(0, STEP)
        inside = (channels < DEPTH)[None, :]
        x = tl.load(rows[:, None] + channels[None, :], mask=row_mask[:, None] & inside, other=0.0)
        weight_tile = weight_rows[:, None] + channels[None, :]
        weight_mask = column_mask[:, None] & inside
        weight = tl.load(weight_tile, mask=weight_mask, other=0.0)
        if SCALED:
            scale = tl.load(scales + start // BLOCK, mask=column_mask, other=0.0)
            acc += tl.dot(x, weight.to(x.dtype).T, input_precision="ieee") * scale[None, :]
        else:
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
        if GATED:
            up = tl.load(weight_tile + WIDTH * DEPTH, mask=weight_mask, other=0.0)
            if SCALED:
                scale = tl.load(scales + WIDTH // SCALED * SCALES + start // BLOCK, mask=column_mask, other=0.0)
                acc_up += tl.dot(x, up.to(x.dtype).T, input_precision="ieee") * scale[None, :]
            else:
                acc_up = tl.dot(x, up.T, acc_up, input_precision="ieee")
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        out_rows = out_ptr + places.to(tl.int64) * WIDTH
    else:
        acc = acc * tl.load(pair_weight_ptr + pairs, mask=row_mask, other=0.0)[:, None]
        out_rows = out_ptr + pairs * WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_rows[:, None] + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """experts [T, k] -> the pairs (token * k + choice) by expert, int64 [T k], and bounds of each expert's, int32."""
    sorted_experts, order = experts.flatten().sort()
    every = torch.arange(num_experts + 1, device=experts.device)
    return order, torch.searchsorted(sorted_experts, every, out_int32=True)


def moe_triton(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """x [T, hidden] -> [T, hidden]: the sum of each token's experts' outputs times their weights.

    experts int64 and weights fp32 [T, k]; gate_up [E, 2 I, hidden], the gates' rows first; down [E, hidden, I]. Where
    these are float8_e4m3fn: gate_up_scale fp32 [E, 2 I / rows_per_scale(I), ceil(hidden / 128)], down_scale fp32
    [E, ceil(hidden / 128), ceil(I / 128)].
    """
    num_tokens, k = experts.shape
    num_experts, hidden, width = down.shape
    pairs = num_tokens * k
    partial = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    if pairs == 0:
        return torch.zeros_like(x)
    inner = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    order, bounds = sort_by_expert(experts, num_experts)
    weights = weights.contiguous()
    tile = _tile(pairs, num_experts, x.element_size())
    row_tiles = -(-pairs // tile.rows) + min(num_experts, pairs)
    for source, weight, scale, group, out, gated in (
        (x, gate_up, gate_up_scale, rows_per_scale(width), inner, True),
        (inner, down, down_scale, BLOCK, partial, False),
    ):
        _experts_kernel[(row_tiles, -(-out.shape[1] // tile.columns))](
            source, weight, weight if scale is None else scale, out, order, bounds, weights, num_experts, k,
            source.stride(0), DEPTH=source.shape[1], WIDTH=out.shape[1], GATED=gated,
            SCALED=0 if scale is None else group, BLOCK=BLOCK, EXPERTS=next_power_of_2(num_experts), ROWS=tile.rows,
            COLUMNS=tile.columns, STEP=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return partial.view(num_tokens, k, hidden).sum(1)
