"""What the attention kernels share: loading columns of rows, the running softmax, and tiles of ragged queries.

Softmax runs in base 2 (scores come multiplied by log2 e). Scores nobody may see are -inf while the running maximum
starts at -1e30, which is finite: so no difference of the two is ever NaN, and a row that sees nothing ends with a sum
of 0.

WINDOW is how many tokens a query sees, itself among them, 0 for all before it; CAP is 0 where scores are not capped.
Both are constants of the compiled kernel, so that models with neither pay for neither.
"""

from __future__ import annotations

from engine.kernels._triton import jit, next_power_of_2, tl

LOG2_E = 1.4426950408889634


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """-> what `base_2_scores` multiplies by, and its CAP: scores become softcap * tanh(scale * score / softcap)."""
    return (scale * LOG2_E, 0.0) if softcap is None else (2 * scale / softcap * LOG2_E, softcap * LOG2_E)


def padded_count(num_seqs: int) -> int:
    """A power of two that holds so many sequences; the same for all counts up to 64, so that one kernel serves them."""
    return max(64, next_power_of_2(num_seqs))


@jit
def load_columns(
    rows: tl.tensor,
    row_mask: tl.tensor,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    END: tl.constexpr,
) -> tl.tensor:
    """Columns [START, START + SIZE) of the rows that `rows` [N] points to -> [N, SIZE].

    0 in masked rows and from column END on. Rows past a sequence's end are masked here, not afterwards: their memory
    may hold NaN, and 0 * NaN is NaN.
    """
    columns = START + tl.arange(0, SIZE)
    mask = row_mask[:, None]
    if START + SIZE > END:
        mask = mask & (columns < END)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)


@jit
def block_numbers(
    table_ptr: tl.tensor, start: tl.tensor, kv_len: tl.tensor, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr
) -> tl.tensor:
    """The blocks of a sequence's tokens [start, start + TOKENS): one number where a tile lies within a block.

    Loops ask for the next tile's while they work on this one: a load that waited for a load would not be pipelined, and
    the cache rows behind it not be prefetched.
    """
    if BLOCK_SIZE % TOKENS == 0:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < kv_len, other=0)
    else:
        positions = start + tl.arange(0, TOKENS)
        return tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < kv_len, other=0)


@jit
def cache_rows(
    cache_ptr: tl.tensor,
    blocks: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Pointers to the rows of tokens [start, start + TOKENS), which lie in `blocks`; a row is WIDTH numbers."""
    if BLOCK_SIZE % TOKENS == 0:
        within = start % BLOCK_SIZE + tl.arange(0, TOKENS)
    else:
        within = (start + tl.arange(0, TOKENS)) % BLOCK_SIZE
    return cache_ptr + (blocks.to(tl.int64) * BLOCK_SIZE + within) * WIDTH


@jit
def store_columns(
    rows: tl.tensor,
    row_mask: tl.tensor,
    values: tl.tensor,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    END: tl.constexpr,
) -> None:
    """values [N, SIZE] to columns [START, START + SIZE) of `rows` [N], but for masked rows and columns from END on."""
    columns = START + tl.arange(0, SIZE)
    mask = row_mask[:, None]
    if START + SIZE > END:
        mask = mask & (columns < END)[None, :]
    tl.store(rows[:, None] + columns[None, :], values.to(rows.dtype.element_ty), mask=mask)


@jit
def base_2_scores(products: tl.tensor, factor: float, CAP: tl.constexpr) -> tl.tensor:
    """Dot products of queries and keys -> scores times log2 e; tanh x is 1 - 2 / (1 + exp 2x)."""
    if CAP > 0:
        return CAP - 2 * CAP / (1 + tl.exp2(products * factor))
    else:
        return products * factor


@jit
def softmax_start(ROWS: tl.constexpr) -> tl.tensor:
    """The running maximum and sum of ROWS rows that have seen nothing yet."""
    return tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)


@jit
def softmax_step(scores: tl.tensor, peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """scores [M, N] -> their weights, the factor [M] for what was accumulated before, the new maximum and sum [M]."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    rescale = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, 1)


@jit
def softmax_end(peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """-> the factor [M] for what was accumulated, and the log-sum-exp [M] in base 2, -inf for rows that saw nothing."""
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    return 1.0 / safe, tl.where(seen, peak + tl.log2(safe), float("-inf"))


@jit
def find_tile(cu_ptr: tl.tensor, index: tl.tensor, num_seqs: int, ROWS: tl.constexpr, SEQS: tl.constexpr) -> tl.tensor:
    """Cut every ragged sequence into tiles of ROWS rows: the index-th of all -> (its sequence, its first row there).

    cu_ptr: int32 [num_seqs + 1] bounds; SEQS >= num_seqs, a power of two. There are at most ceil(T / ROWS) + num_seqs
    tiles, so the host can launch that many without knowing the bounds; those too many get sequence num_seqs.
    """
    sequences = tl.arange(0, SEQS)
    exists = sequences < num_seqs
    starts = tl.load(cu_ptr + sequences, mask=exists, other=0)
    ends = tl.load(cu_ptr + 1 + sequences, mask=exists, other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((exists & (tile_ends <= index)).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(sequences == sequence, tile_ends - tiles, 0), 0)
    return sequence, (index - first_tile) * ROWS
