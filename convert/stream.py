"""The residual stream of many token windows, carried through a model one half of a layer at a time.

Invariant: between two calls every chunk stands before the same half, attention or MLP. No weights are held here, and
the cache is one layer's, for one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.model.batch import Batch
from engine.model.rotary import Rotary
from engine.model.transformer import AttentionHalf, MLPHalf, embed, rope_key
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


class Examples(Sequence[tuple[Tensor, Tensor]]):
    """Inputs of an attention, and what it puts out. Inputs are normed when they are asked for, and not kept."""

    def __init__(self, half: AttentionHalf, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`batches`: the stream before the attention, and what the attention puts out."""
        self._half, self._batches = half, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # slices are not needed
        x, y = self._batches[index]
        return self._half.normed(x.flatten(0, 1)).view_as(x), y


class Stream:
    """All the windows of a text, standing before the same half of a layer."""

    def __init__(self, windows: Sequence[Sequence[int]], embedding: Tensor, spec: ModelSpec) -> None:
        self.chunks = list(chunks(windows, embedding, spec))

    def inputs(self, half: AttentionHalf) -> Iterator[Tensor]:
        """What the attention's projections see: normed [T, hidden], chunk by chunk."""
        for chunk in self.chunks:
            yield half.normed(chunk.x)

    def windows(self, half: AttentionHalf) -> Iterator[Tensor]:
        """`inputs`, window by window: [windows, length, hidden]."""
        for chunk, normed in zip(self.chunks, self.inputs(half), strict=True):
            yield normed.unflatten(0, (chunk.num_windows, chunk.length))

    def attended(self, half: AttentionHalf) -> Iterator[Tensor]:
        """What attention puts out: [T, hidden], chunk by chunk."""
        blocks, x = max(chunk.num_blocks for chunk in self.chunks), self.chunks[0].x
        cache = x.new_zeros(blocks, BLOCK_SIZE, half.spec.attention.cache_width)
        for chunk, normed in zip(self.chunks, self.inputs(half), strict=True):
            yield half.attention(normed, chunk.batch, cache, _rotations(half, chunk))

    def weight(self, half: AttentionHalf) -> float:
        """How much of the residual stream the layer's attention is: |what it adds|^2 / |the stream with it|^2."""
        added = whole = 0.0
        for chunk, y in zip(self.chunks, map(half.added, self.attended(half)), strict=True):
            added += y.double().square().sum().item()
            whole += (chunk.x + y).double().square().sum().item()
        return added / whole if whole else 0.0

    def examples(self, half: AttentionHalf) -> Examples:
        """`windows` beside `attended`, both [windows, length, hidden], in batches of about BATCH_TOKENS.

        They are tensors that autograd may keep, as those made in inference mode may not be.
        """
        batches: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(False), torch.no_grad():
            for chunk, y in zip(self.chunks, self.attended(half), strict=True):
                count = max(1, BATCH_TOKENS // chunk.length)
                x, y = (t.unflatten(0, (chunk.num_windows, chunk.length)).split(count) for t in (chunk.x, y))
                batches += zip(x, y, strict=True)
        return Examples(half, batches)

    def attend(self, half: AttentionHalf) -> None:
        """Run it on every chunk, which then stands before the MLP."""
        for chunk, y in zip(self.chunks, self.attended(half), strict=True):
            chunk.x = chunk.x + half.added(y)

    def feed(self, half: MLPHalf) -> None:
        """Run it on every chunk, which then stands before the next layer."""
        for chunk in self.chunks:
            chunk.x = chunk.x + half.added(half.mlp(half.normed(chunk.x)))


def _rotations(half: AttentionHalf, chunk: Chunk) -> Tensor:
    rotary = Rotary([rope_key(half.spec.attention)], chunk.x.device)
    return rotary.tables(chunk.batch.positions)[0]
