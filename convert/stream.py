"""The residual stream of many token windows, carried through a model one layer at a time.

Invariant: between two calls every chunk stands before the same layer. No layer's weights are held here, and the cache
is one layer's, for one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.norm import rms_norm
from engine.model.batch import Batch
from engine.model.rotary import Rotary
from engine.model.transformer import Layer, rope_key

CHUNK_TOKENS = 4096
BLOCK_SIZE = 64


class Chunk:
    """Whole windows, run as fresh sequences of one batch: x [T, hidden] is where they stand in the model."""

    def __init__(self, windows: Sequence[Sequence[int]], embedding: Tensor) -> None:
        device, lengths = embedding.device, [len(window) for window in windows]
        tables: list[list[int]] = []
        for length in lengths:
            start = tables[-1][-1] + 1 if tables else 0
            tables.append(list(range(start, start + -(-length // BLOCK_SIZE))))
        self.num_blocks = tables[-1][-1] + 1
        self.batch = Batch.build([0] * len(windows), lengths, tables, BLOCK_SIZE, device)
        self.token_ids = torch.tensor([t for window in windows for t in window], device=device)
        self.x = F.embedding(self.token_ids, embedding)
        # The last token of a window predicts nothing; every other one predicts its successor.
        bounds = torch.tensor(lengths, device=device).cumsum(0) - 1
        predicts = torch.ones(len(self.token_ids), dtype=torch.bool, device=device)
        predicts[bounds] = False
        self.scored = predicts.nonzero().squeeze(1)  # int64 [n], positions whose prediction is scored
        self.targets = self.token_ids[self.scored + 1]


def chunks(windows: Sequence[Sequence[int]], embedding: Tensor, limit: int = CHUNK_TOKENS) -> Iterator[Chunk]:
    """Windows in order, together as long as they have at most `limit` tokens; a longer one alone."""
    held: list[Sequence[int]] = []
    for window in windows:
        if held and sum(map(len, held)) + len(window) > limit:
            yield Chunk(held, embedding)
            held = []
        held.append(window)
    if held:
        yield Chunk(held, embedding)


class Stream:
    """All the windows of a text, standing before the same layer."""

    def __init__(self, windows: Sequence[Sequence[int]], embedding: Tensor) -> None:
        self.chunks = list(chunks(windows, embedding))

    def inputs(self, layer: Layer) -> Iterator[Tensor]:
        """What the layer's projections see: normed [T, hidden], chunk by chunk."""
        for chunk in self.chunks:
            yield rms_norm(chunk.x, layer.attention_norm, layer.eps)

    def attended(self, layer: Layer) -> Iterator[Tensor]:
        """What the layer's attention adds to the residual stream: [T, hidden], chunk by chunk."""
        cache = self._cache(layer)
        for chunk, normed in zip(self.chunks, self.inputs(layer), strict=True):
            yield layer.attention(normed, chunk.batch, cache, _rotations(layer, chunk))

    def advance(self, layer: Layer) -> None:
        """Run the layer on every chunk."""
        cache = self._cache(layer)
        for chunk in self.chunks:
            chunk.x = layer(chunk.x, chunk.batch, cache, _rotations(layer, chunk))

    def _cache(self, layer: Layer) -> Tensor:
        blocks, x = max(chunk.num_blocks for chunk in self.chunks), self.chunks[0].x
        return torch.zeros(blocks, BLOCK_SIZE, layer.spec.attention.cache_width, dtype=x.dtype, device=x.device)


def _rotations(layer: Layer, chunk: Chunk) -> Tensor:
    rotary = Rotary([rope_key(layer.spec.attention)], chunk.x.device)
    return rotary.tables(chunk.batch.positions)[0]
