"""Calibration text: files, or text that the source model writes itself; -> windows to fit on and windows to check on.

Invariant: no predicted token is in two of the parts, so what is measured on one was not fitted or chosen on another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.sampling import sample_tokens
from convert.text import encode, read_text, window_bos
from engine.checkpoint import Checkpoint
from engine.tokenizer import Tokenizer

# Tokens of a window, of two kinds: what matters only far apart is seen in long ones alone, others weigh what is near.
WINDOW = 256  # as TransMLA has it
LONG_WINDOW = 2048  # or the context
MIN_TOKENS = 128
MAX_HELD_OUT = 8192  # tokens of each of the two held-out parts
PIECE_CHARS = 20_000  # a text is drawn from in pieces of about this size

Windows = list[list[int]]


@dataclass(frozen=True)
class Calibration:
    fit: Windows  # statistics are taken of these
    select: Windows  # options are chosen on these
    check: Windows  # the result is measured on these
    record: dict[str, Any]  # what it was, for conversion.json


def check_tokens(tokens: int) -> None:
    """Raises ConversionError."""
    if tokens < MIN_TOKENS:
        raise ConversionError(f"--calibration-tokens {tokens} is too few: give at least {MIN_TOKENS}")


def from_files(source: Checkpoint, paths: Sequence[Path], tokens: int, seed: int) -> Calibration:
    """`tokens` to fit on, and an eighth as many for each held-out part, from pieces of the files in random order.

    Takes what there is where the files have less. Raises ConversionError where a file is no text, or too little.
    """
    tokenizer = Tokenizer.from_folder(source.path)
    pieces = [(path, piece) for path in paths for piece in _pieces(read_text(path))]
    random.Random(seed).shuffle(pieces)
    ids: list[int] = []
    for path, piece in pieces:
        if len(ids) >= _total(tokens):
            break
        ids += encode(tokenizer, piece, path, source.spec.vocab_size)
    if len(ids) < MIN_TOKENS:
        names = ", ".join(map(str, paths))
        raise ConversionError(f"{names}: {len(ids)} tokens are too few to calibrate on; give at least {MIN_TOKENS}")
    record = {"source": "files", "files": [path.name for path in paths]}
    return _split(ids, tokens, source, window_bos(tokenizer), record)


def from_model(source: Checkpoint, tokens: int, seed: int, device: str | None) -> Calibration:
    """As `from_files`, of text sampled from the source model, through its chat template where it has one."""
    tokenizer = Tokenizer.from_folder(source.path)
    ids = sample_tokens(source, tokenizer, _total(tokens), seed, device)
    return _split(ids, tokens, source, window_bos(tokenizer), {"source": "sampled from the source model"})


def _total(tokens: int) -> int:
    return tokens + 2 * _held_out(tokens) + 4 * WINDOW  # and a little for what windows round off


def _held_out(tokens: int) -> int:
    return min(max(tokens // 8, WINDOW), MAX_HELD_OUT)


def _split(ids: list[int], tokens: int, source: Checkpoint, bos: int | None, record: dict[str, Any]) -> Calibration:
    held = min(_held_out(tokens), len(ids) // 4)
    context, rest = source.spec.max_position_embeddings, iter(ids)
    lead = [next(rest)] if bos is None else [bos]
    parts: list[Windows] = []
    for size in (held, held, min(tokens, len(ids) - 2 * held)):
        windows: Windows = []
        for length in _lengths(size, context):
            window = [*lead, *islice(rest, length - 1)]
            if len(window) == length:  # else the text is at its end
                windows.append(window)
                lead = window[-1:] if bos is None else lead
        parts.append(windows)
    select, check, fit = parts
    counts = {
        "windows": sorted({len(window) for window in fit}),
        "tokens": sum(map(len, fit)),
        "held_out_tokens": sum(map(len, check)),
    }
    return Calibration(fit, select, check, record | counts)


def _lengths(tokens: int, context: int) -> list[int]:
    """Of the windows that make `tokens` tokens: short ones, three long ones of as many tokens each, and so on."""
    long = min(LONG_WINDOW, context, tokens // 2)
    short = min(WINDOW, long)
    lengths: list[int] = []
    for turn in cycle([[short] * (long // short), [long], [long], [long]]):
        if sum(lengths) + long > tokens:
            break
        lengths += turn
    return lengths + [short] * math.ceil((tokens - sum(lengths)) / short)


def _pieces(text: str) -> list[str]:
    """The text in pieces of about PIECE_CHARS, broken at line ends (or, in one endless line, where they fall)."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS, start + 2 * PIECE_CHARS) + 1 or start + 2 * PIECE_CHARS
        pieces.append(text[start:end])
        start = end
    return pieces
