"""Text files -> token windows, the same way for calibration and for evaluation.

Every window stands alone, as a fresh sequence. Where the tokenizer begins a text with BOS, so does each window; where
it does not, each window begins with the last token of the one before. Either way a window's first token is there to be
seen, not predicted, and every other token of the text is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert.errors import ConversionError
from engine.errors import RequestError
from engine.tokenizer import Tokenizer


def read_text(path: Path) -> str:
    """Raises ConversionError unless it is a UTF-8 file with something in it."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ConversionError(f"{path}: is empty; give a file with text")
    return text


def window_bos(tokenizer: Tokenizer) -> int | None:
    """The token every window begins with: BOS if this tokenizer begins a text with it, else None."""
    return tokenizer.bos_id if tokenizer.encode("a")[:1] == [tokenizer.bos_id] else None


def encode(tokenizer: Tokenizer, text: str, path: Path, vocab_size: int) -> list[int]:
    """Token ids without a BOS of their own. Raises ConversionError where the model lacks one of them."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except RequestError as error:
        raise ConversionError(f"{path}: {error}") from None
    if ids and max(ids) >= vocab_size:
        raise ConversionError(f"{path}: has token {max(ids)}, which the model's vocabulary of {vocab_size} lacks")
    return ids


def cut_windows(ids: Sequence[int], length: int, bos: int | None) -> list[list[int]]:
    """Windows of `length` tokens, the last one maybe shorter, each with at least one token to predict."""
    lead = [] if bos is None else [bos]
    step = length - 1
    windows = [[*lead, *ids[start : start + length - len(lead)]] for start in range(0, len(ids), step)]
    return [window for window in windows if len(window) > 1]
