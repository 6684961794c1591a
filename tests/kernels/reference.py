"""Definitions in float64, written out, and block caches that hold NaN wherever no token lies."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def assert_near(actual, expected, dtype):
    """Within the rounding of dtype, absolute and relative; infinities and their signs must agree; no NaN."""
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def attention(q, keys, values, visible, scale, softcap=None):
    """q [Q, d], keys [S, d], values [S, v], visible bool [Q, S] -> out [Q, v], lse [Q], a row at a time, in float64."""
    q, keys, values = q.double(), keys.double(), values.double()
    out = torch.zeros(q.shape[0], values.shape[1], dtype=torch.float64)
    lse = torch.full((q.shape[0],), float("-inf"), dtype=torch.float64)
    for i in range(q.shape[0]):
        if visible[i].any():
            scores = scale * (keys[visible[i]] @ q[i])
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            lse[i] = scores.logsumexp(0)
            out[i] = (scores - lse[i]).exp() @ values[visible[i]]
    return out, lse


def block_cache(sequences, block_size, dtype, device="cpu", seed=0):
    """sequences: tensors [len, width]. -> cache, block tables int32, lengths int32; NaN in all slots without a token.

    Blocks lie in random order. Block 0 is nobody's, all NaN, and what tables are padded with.
    """
    counts = [-(-len(rows) // block_size) for rows in sequences]
    generator = torch.Generator().manual_seed(seed)
    order = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    cache = torch.full((len(order) + 1, block_size, sequences[0].shape[1]), float("nan"), dtype=dtype)
    tables = torch.zeros(len(sequences), max([*counts, 1]) + 1, dtype=torch.int32)
    for b, rows in enumerate(sequences):
        for i in range(counts[b]):
            tables[b, i] = order.pop()
            piece = rows[i * block_size : (i + 1) * block_size]
            cache[int(tables[b, i]), : len(piece)] = piece.to(dtype)
    lengths = torch.tensor([len(rows) for rows in sequences], dtype=torch.int32)
    return cache.to(device), tables.to(device), lengths.to(device)
