"""`convert evaluate`: a converted model against its source on a text.

Both models run in the engine, side by side in memory, over windows that stand alone (see text.py). KL(source ||
converted) is in nats per predicted token; bits per byte, unlike perplexity, compare across tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convert.errors import ConversionError
from convert.quality import Comparison
from convert.stream import BLOCK_SIZE, Chunk, chunks
from convert.text import cut_windows, encode, read_text, window_bos
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.model.load import DTYPES, load_model
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class EvaluationRequest:
    model: Path
    reference: Path
    text: Path
    window: int | None = None  # None: DEFAULT_WINDOW, or the context where that is shorter
    dtype: str = "auto"  # to compute in
    device: str | None = None


@torch.inference_mode()
def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """-> the report, as it is printed and written. Raises EngineError where the two cannot be compared."""
    checkpoints = [open_checkpoint(path) for path in (request.model, request.reference)]
    length = _window(request, checkpoints)
    text = read_text(request.text)
    ids, bos, first = _tokens(request, checkpoints, text)
    model, reference = (load_model(c, request.device, request.dtype, progress=True) for c in checkpoints)
    comparison = Comparison(reference.spec.vocab_size)
    windows = cut_windows(ids, length, bos)
    if not windows:
        raise ConversionError(f"{request.text}: is too short: there is no token to predict")
    with tqdm(total=len(windows), desc="evaluating", unit="window", disable=None) as progress:
        for chunk in chunks(windows, reference.embedding, reference.spec):
            a, b = (_hidden(m, chunk) for m in (reference, model))
            comparison.add(a, b, chunk.targets, reference.logits, model.logits)
            progress.update(chunk.num_windows)
    sizes = [c.spec.cache_bytes_per_token(DTYPES[c.spec.dtype].itemsize) for c in checkpoints]
    bits = comparison.tokens / math.log(2) / max(1, len(text.encode()) - first)
    return {
        "model": str(request.model),
        "reference": str(request.reference),
        "text": str(request.text),
        "window": length,
        "tokens": comparison.tokens,
        **comparison.report(),
        "bits_per_byte": comparison.nll * bits,
        "reference_bits_per_byte": comparison.reference_nll * bits,
        "cache_bytes_per_token": sizes[0],
        "reference_cache_bytes_per_token": sizes[1],
    }


def _hidden(model: Transformer, chunk: Chunk) -> torch.Tensor:
    """[scored, hidden]: what the model predicts the chunk's targets from."""
    cache = model.new_cache(chunk.num_blocks, BLOCK_SIZE)
    return chunk.predicting(model.forward(chunk.token_ids, chunk.batch, cache))


def _window(request: EvaluationRequest, checkpoints: list[Checkpoint]) -> int:
    context = min(c.spec.max_position_embeddings for c in checkpoints)
    if request.window is None:
        return min(DEFAULT_WINDOW, context)
    if not 2 <= request.window <= context:
        raise ConversionError(f"--window {request.window} is out of range: these models allow 2 to {context} tokens")
    return request.window


def _tokens(request: EvaluationRequest, checkpoints: list[Checkpoint], text: str) -> tuple[list[int], int | None, int]:
    """-> the text's token ids, what windows begin with, and how many bytes no token predicts."""
    vocab, reference_vocab = (c.spec.vocab_size for c in checkpoints)
    if vocab != reference_vocab:
        raise ConversionError(
            f"{request.model} has a vocabulary of {vocab} tokens and {request.reference} one of {reference_vocab}: "
            "give the model it was converted from as --reference"
        )
    tokenizers = [Tokenizer.from_folder(c.path) for c in checkpoints]
    ids, reference_ids = (encode(t, text, request.text, vocab) for t in tokenizers)
    bos, reference_bos = (window_bos(t) for t in tokenizers)
    if (ids, bos) != (reference_ids, reference_bos):
        raise ConversionError(
            f"{request.model} and {request.reference} have different tokenizers: they split {request.text} differently"
        )
    return ids, bos, len(tokenizers[0].token_bytes(ids[0])) if bos is None else 0
