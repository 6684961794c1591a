"""Writing rows into the block cache, and gathering a sequence's rows out of it.

One layer's cache is [num_blocks, block_size, width], contiguous; a token's slot is block * block_size + offset. What a
row means is the attention's business: [latent | rope keys] for MLA, [keys | values] for GQA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit, jit_for_any, next_power_of_2, tl
from engine.kernels.attention_parts import load_columns, padded_count, store_columns

ROWS = 16  # rows gathered by one program


def cache_write_torch(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    rows = rows if rows.dtype == cache.dtype else rows.to(cache.dtype)
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots, rows)


@jit
def _write_kernel(
    cache_ptr: tl.tensor,  # [num_slots, WIDTH]
    rows_ptr: tl.tensor,  # [T, WIDTH]
    slots_ptr: tl.tensor,  # int64 [T]
    rows_stride: int,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PADDED)
    mask = columns < WIDTH
    row = tl.load(rows_ptr + token * rows_stride + columns, mask=mask)
    slot = tl.load(slots_ptr + token)
    tl.store(cache_ptr + slot * WIDTH + columns, row.to(cache_ptr.dtype.element_ty), mask=mask)


def cache_write_triton(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    width = cache.shape[2]
    if rows.shape[0] > 0:
        _write_kernel[(rows.shape[0],)](
            cache, rows, slots, rows.stride(0), WIDTH=width, WIDTH_PADDED=next_power_of_2(width), num_warps=1
        )


def cache_write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """rows [T, width] (any row stride) -> cache[slots]; slots int64 [T], distinct."""
    implementation = cache_write_triton if cache.is_cuda else cache_write_torch
    implementation(cache, rows, slots)


def cache_gather_torch(cache: Tensor, block_tables: Tensor, starts: Tensor, cu_rows: Tensor, total: int) -> Tensor:
    block_size = cache.shape[1]
    counts = (cu_rows[1:] - cu_rows[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=cache.device), counts, output_size=total)
    within = torch.arange(total, device=cache.device) - cu_rows[:-1].long()[sequence] + starts.long()[sequence]
    blocks = block_tables[sequence, within // block_size].long()
    return cache.view(-1, cache.shape[-1])[blocks * block_size + within % block_size]


@jit_for_any("tables_ptr", "starts_ptr", "cu_rows_ptr", "total", "num_seqs", "tables_stride")
def _gather_kernel(
    cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, WIDTH]
    tables_ptr: tl.tensor,  # int32 [B, max_blocks]
    starts_ptr: tl.tensor,  # int32 [B]
    cu_rows_ptr: tl.tensor,  # int32 [B + 1]
    out_ptr: tl.tensor,  # [total, WIDTH]
    total: int,
    num_seqs: int,
    tables_stride: int,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < total
    sequences = tl.arange(0, SEQS)
    ends = tl.load(cu_rows_ptr + 1 + sequences, mask=sequences < num_seqs, other=2147483647)
    sequence = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)  # [ROWS]: how many end before this row
    begins = tl.load(cu_rows_ptr + sequence, mask=row_mask, other=0)
    position = rows - begins + tl.load(starts_ptr + sequence, mask=row_mask, other=0)
    table_entry = tables_ptr + sequence.to(tl.int64) * tables_stride + position // BLOCK_SIZE
    block = tl.load(table_entry, mask=row_mask, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    values = load_columns(cache_ptr + slot * WIDTH, row_mask, 0, WIDTH_PADDED, WIDTH)
    store_columns(out_ptr + rows * WIDTH, row_mask, values, 0, WIDTH_PADDED, WIDTH)


def cache_gather_triton(cache: Tensor, block_tables: Tensor, starts: Tensor, cu_rows: Tensor, total: int) -> Tensor:
    width, num_seqs = cache.shape[2], starts.shape[0]
    out = torch.empty(total, width, dtype=cache.dtype, device=cache.device)
    if out.numel() > 0:
        _gather_kernel[(-(-total // ROWS),)](
            cache, block_tables, starts, cu_rows, out, total, num_seqs, block_tables.stride(0),
            BLOCK_SIZE=cache.shape[1], WIDTH=width, WIDTH_PADDED=next_power_of_2(width),
            SEQS=padded_count(num_seqs), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out


def cache_gather(cache: Tensor, block_tables: Tensor, starts: Tensor, cu_rows: Tensor, total: int) -> Tensor:
    """Positions [starts[b], starts[b] + cu_rows[b+1] - cu_rows[b]) of every sequence b, end to end -> [total, width].

    block_tables int32 [B, max_blocks]; starts int32 [B]; cu_rows int32 [B + 1]; total == cu_rows[-1].
    """
    implementation = cache_gather_triton if cache.is_cuda else cache_gather_torch
    return implementation(cache, block_tables, starts, cu_rows, total)


def padded_rows(
    cache: Tensor, block_tables: Tensor, kv_lens: Tensor, max_kv_len: int, window: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Every sequence's last `window` rows (None: all), padded to the most of any -> ([B, S, width], padding [B, S]).

    The padding repeats the sequence's own last row, so nothing stale is read; it is None where there is none. Plain
    torch, for the definitions of decode attention. max_kv_len == max(kv_lens).
    """
    num_seqs, block_size, width = len(kv_lens), cache.shape[1], cache.shape[2]
    count = max_kv_len if window is None else min(window, max_kv_len)
    if num_seqs == 1:
        before = max_kv_len - count
        blocks = block_tables[0, before // block_size : -(-max_kv_len // block_size)]
        rows = cache.flatten(1).index_select(0, blocks).view(1, -1, width)
        return rows[:, before % block_size :][:, :count], None
    starts = (kv_lens[:, None] - count).clamp_(min=0)
    positions = starts + torch.arange(count, device=cache.device)
    own = torch.minimum(positions, (kv_lens[:, None] - 1).clamp_(min=0))
    index = block_tables.gather(1, own // block_size) * block_size + own % block_size
    rows = cache.view(-1, width).index_select(0, index.flatten()).view(num_seqs, count, width)
    return rows, positions >= kv_lens[:, None]
