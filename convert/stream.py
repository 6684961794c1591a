"""The residual stream of many token windows, carried through a model one layer at a time.

Invariant: between two calls every chunk stands before the same layer. No layer's weights are held here, and the cache
is one layer's, for one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.kernels.norm import rms_norm
from engine.model.batch import Batch
from engine.model.rotary import Rotary
from engine.model.transformer import Layer, embed, rope_key
from engine.spec import ModelSpec

CHUNK_TOKENS = 4096
CHUNK_NUMBERS = 1 << 25  # of a gated MLP's two projections: 128 MiB in fp32
BLOCK_SIZE = 64
BATCH_TOKENS = 1024  # of one step of a layer's refinement


class Chunk:
    """Windows of one length, run as fresh sequences of one batch: x [T, hidden] is where they stand in the model.

    x is float32, or what is wider, whatever the embedding's dtype.
    """

    def __init__(self, windows: Sequence[Sequence[int]], embedding: Tensor, spec: ModelSpec) -> None:
        ids = torch.tensor(windows, device=embedding.device)  # int64 [windows, length]
        self.num_windows, self.length = ids.shape
        self.batch = Batch.dense(self.num_windows, self.length, BLOCK_SIZE, embedding.device)
        self.num_blocks = self.num_windows * -(-self.length // BLOCK_SIZE)
        self.token_ids = ids.flatten()
        self.targets = ids[:, 1:].flatten()  # what the windows' tokens predict; the last of each predicts nothing
        self.seen = torch.arange(1, self.length, device=ids.device).repeat(
            self.num_windows
        )  # tokens before each target
        used, index = self.token_ids.unique(return_inverse=True)
        self.x = embed(index, embedding[used].to(torch.promote_types(embedding.dtype, torch.float32)), spec)

    def predicting(self, rows: Tensor) -> Tensor:
        """rows [T, n] -> the rows of the tokens that predict `targets`."""
        return rows.unflatten(0, (self.num_windows, self.length))[:, :-1].flatten(0, 1)


def chunks(
    windows: Sequence[Sequence[int]], embedding: Tensor, spec: ModelSpec, limit: int = CHUNK_TOKENS
) -> Iterator[Chunk]:
    """Windows in order: neighbours of one length together, as long as they have at most `limit` tokens.

    Fewer where an MLP is wide, so that what it computes takes no more than CHUNK_NUMBERS.
    """
    widest = max((layer.mlp.intermediate_size for layer in spec.layers), default=1)
    limit = min(limit, max(1, CHUNK_NUMBERS // (2 * widest)))
    held: list[Sequence[int]] = []
    for window in windows:
        if held and (len(window) != len(held[0]) or (len(held) + 1) * len(window) > limit):
            yield Chunk(held, embedding, spec)
            held = []
        held.append(window)
    if held:
        yield Chunk(held, embedding, spec)


class Stream:
    """All the windows of a text, standing before the same layer."""

    def __init__(self, windows: Sequence[Sequence[int]], embedding: Tensor, spec: ModelSpec) -> None:
        self.chunks = list(chunks(windows, embedding, spec))

    def inputs(self, layer: Layer) -> Iterator[Tensor]:
        """What the layer's projections see: normed [T, hidden], chunk by chunk."""
        for chunk in self.chunks:
            yield rms_norm(chunk.x, layer.attention_norm, layer.eps)

    def windows(self, layer: Layer) -> Iterator[Tensor]:
        """`inputs`, window by window: [windows, length, hidden]."""
        for chunk, normed in zip(self.chunks, self.inputs(layer), strict=True):
            yield normed.unflatten(0, (chunk.num_windows, chunk.length))

    def attended(self, layer: Layer) -> Iterator[Tensor]:
        """What the layer's attention adds to the residual stream: [T, hidden], chunk by chunk."""
        cache = self._cache(layer)
        for chunk, normed in zip(self.chunks, self.inputs(layer), strict=True):
            yield layer.attention(normed, chunk.batch, cache, _rotations(layer, chunk))

    def weight(self, layer: Layer) -> float:
        """How much of the residual stream the layer's attention is: |what it adds|^2 / |the stream with it|^2."""
        added = whole = 0.0
        for chunk, y in zip(self.chunks, self.attended(layer), strict=True):
            if layer.post_attention_norm is not None:
                y = rms_norm(y, layer.post_attention_norm, layer.eps)
            y = y * layer.residual_scale
            added += y.double().square().sum().item()
            whole += (chunk.x + y).double().square().sum().item()
        return added / whole if whole else 0.0

    def examples(self, layer: Layer) -> list[tuple[Tensor, Tensor]]:
        """`windows` beside `attended`, both [windows, length, hidden], in batches of about BATCH_TOKENS.

        They are tensors that autograd may keep, as those made in inference mode may not be.
        """
        batches: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(False), torch.no_grad():
            for chunk, x, y in zip(self.chunks, self.windows(layer), self.attended(layer), strict=True):
                count = max(1, BATCH_TOKENS // chunk.length)
                batches += zip(x.split(count), y.view_as(x).split(count), strict=True)
        return batches

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
