"""Split-KV decoding (Flash-Decoding): a sequence's tokens are divided among programs, whose outputs are combined.

Partial outputs are normalised, fp32, [B, H, splits, width]; each has its log-sum-exp in base 2, [B, H, splits]. A split
without tokens writes -inf there and no output, so the combination never reads an output whose sum is -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit, jit_for_any, next_power_of_2, tl

MIN_SPLIT_TOKENS = 256  # below this a split costs more to combine than it gains
MAX_SPLITS = 64


def num_splits(programs: int, max_kv_len: int, window: int | None, device: torch.device) -> int:
    """How many: two programs per multiprocessor, no split of the longest sequence below MIN_SPLIT_TOKENS.

    `programs`: how many there are without splitting; `window`: how many of its last tokens a sequence attends to.
    """
    max_kv_len = max_kv_len if window is None else min(window, max_kv_len)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(2 * processors // max(1, programs), max_kv_len // MIN_SPLIT_TOKENS, MAX_SPLITS)
    return max(wanted, 1)


@jit
def split_range(
    kv_len: tl.tensor, split: tl.tensor, splits: int, TOKENS: tl.constexpr, WINDOW: tl.constexpr
) -> tl.tensor:
    """The tiles [first, last) of TOKENS tokens that this split attends to; short sequences leave late splits empty.

    Tiles wholly before the last WINDOW tokens are nobody's; 0: there is no window.
    """
    tiles = tl.cdiv(kv_len, TOKENS)
    if WINDOW > 0:
        skipped = tl.maximum(kv_len - WINDOW, 0) // TOKENS
        share = tl.maximum(tl.cdiv(tiles - skipped, splits), 256 // TOKENS)  # MIN_SPLIT_TOKENS
        first = skipped + split * share
    else:
        share = tl.maximum(tl.cdiv(tiles, splits), 256 // TOKENS)
        first = split * share
    return first, tl.minimum(first + share, tiles)


@jit_for_any("splits")
def _combine_kernel(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    splits: int,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lse_row = lse_ptr + row * splits
    numbers = tl.arange(0, MOST)
    lses = tl.load(lse_row + numbers, mask=numbers < splits, other=float("-inf"))
    peak = tl.maximum(tl.max(lses, 0), -1e30)
    total = tl.sum(tl.exp2(lses - peak), 0)
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    columns = tl.arange(0, WIDTH_PADDED)
    out = tl.zeros([WIDTH_PADDED], tl.float32)
    for split in range(splits):
        lse = tl.load(lse_row + split)
        mask = columns < tl.where(lse > float("-inf"), WIDTH, 0)
        out += tl.load(partial_ptr + (row * splits + split) * WIDTH + columns, mask=mask, other=0.0) * tl.exp2(
            lse - peak
        )
    tl.store(out_ptr + row * WIDTH + columns, (out * inverse).to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


def partial_results(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits leave their outputs and log-sum-exps: `out` itself where there is but one split."""
    if splits == 1:
        return out, out
    batch, heads, width = out.shape
    partial = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=out.device)
    return partial, torch.empty(batch, heads, splits, dtype=torch.float32, device=out.device)


def combine(partial: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """What `partial_results` gave, now filled -> out [B, H, width], all contiguous."""
    if partial is out:
        return out
    batch, heads, splits, width = partial.shape
    _combine_kernel[(batch * heads,)](
        partial, lse, out, splits, WIDTH=width, WIDTH_PADDED=next_power_of_2(width), MOST=MAX_SPLITS, num_warps=1
    )
    return out
