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

DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class EvaluationRequest:
    model: Path
    reference: Path
    text: Path
    window: int | None = None  # None: the context, at most DEFAULT_WINDOW
    dtype: str = "auto"  # to compute in
    device: str | None = None


@dataclass(frozen=True)
class EvaluationText:
    """A text as windows that stand alone, and what is measured on it."""

    path: Path
    windows: list[list[int]]
    window: int  # tokens, of the longest
    predicted_bytes: int  # of the text: all but those of a first token that no other comes before

    def measured(self, comparison: Comparison) -> dict[str, Any]:
        bits = comparison.tokens / math.log(2) / max(1, self.predicted_bytes)
        return {
            "text": str(self.path),
            "window": self.window,
            "tokens": comparison.tokens,
            **comparison.report(),
            "bits_per_byte": comparison.nll * bits,
            "reference_bits_per_byte": comparison.reference_nll * bits,
        }


@torch.inference_mode()
def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """-> the report, as it is printed and written. Raises EngineError where the two cannot be compared."""
    checkpoints = [open_checkpoint(path) for path in (request.model, request.reference)]
    text = _common_text(request, checkpoints)
    model, reference = (load_model(c, request.device, request.dtype, progress=True) for c in checkpoints)
    comparison = Comparison(reference.spec.vocab_size)
    with tqdm(total=len(text.windows), desc="evaluating", unit="window", disable=None) as progress:
        for chunk in chunks(text.windows, reference.embedding, reference.spec):
            a, b = (_hidden(m, chunk) for m in (reference, model))
            comparison.add(a, b, chunk.targets, chunk.seen, reference.logits, model.logits)
            progress.update(chunk.num_windows)
    sizes = [c.spec.cache_bytes_per_token(DTYPES[c.spec.dtype].itemsize) for c in checkpoints]
    return {
        "model": str(request.model),
        "reference": str(request.reference),
        **text.measured(comparison),
        "cache_bytes_per_token": sizes[0],
        "reference_cache_bytes_per_token": sizes[1],
    }


def evaluation_text(checkpoint: Checkpoint, path: Path, window: int | None) -> EvaluationText:
    """The file cut into windows of `window` tokens, by default the context, at most DEFAULT_WINDOW.

    Raises ConversionError where the file is no text, or too short, and where the context is shorter than `window`.
    """
    context = checkpoint.spec.max_position_embeddings
    if window is not None and not 2 <= window <= context:
        raise ConversionError(f"--window {window} is out of range: the model allows 2 to {context} tokens")
    length = window or min(DEFAULT_WINDOW, context)
    tokenizer, text = Tokenizer.from_folder(checkpoint.path), read_text(path)
    ids, bos = encode(tokenizer, text, path, checkpoint.spec.vocab_size), window_bos(tokenizer)
    windows = cut_windows(ids, length, bos)
    if not windows:
        raise ConversionError(f"{path}: is too short: there is no token to predict")
    first = 0 if bos is not None else len(tokenizer.token_bytes(ids[0]))
    return EvaluationText(path, windows, length, len(text.encode()) - first)


def _common_text(request: EvaluationRequest, checkpoints: list[Checkpoint]) -> EvaluationText:
    """The text as both models see it."""
    vocab, reference_vocab = (c.spec.vocab_size for c in checkpoints)
    if vocab != reference_vocab:
        raise ConversionError(
            f"{request.model} has a vocabulary of {vocab} tokens and {request.reference} one of {reference_vocab}: "
            "give the model it was converted from as --reference"
        )
    shorter = min(checkpoints, key=lambda c: c.spec.max_position_embeddings)
    longer = checkpoints[checkpoints[0] is shorter]
    text = evaluation_text(shorter, request.text, request.window)
    if evaluation_text(longer, request.text, text.window).windows != text.windows:
        raise ConversionError(
            f"{request.model} and {request.reference} have different tokenizers: they split {request.text} differently"
        )
    return text


def _hidden(model: Transformer, chunk: Chunk) -> torch.Tensor:
    """[scored, hidden]: what the model predicts the chunk's targets from."""
    cache = model.new_cache(chunk.num_blocks, BLOCK_SIZE)
    return chunk.predicting(model.forward(chunk.token_ids, chunk.batch, cache))
