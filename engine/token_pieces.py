"""What each token adds to a text: the decoder of a tokenizer.json, taken apart so that text can be streamed.

Invariant: a tokenizer's decoder is one of two machines, and both are run here exactly as the `tokenizers` library runs
them over a whole sequence:

- bytes (ByteLevel: GPT-2, Llama 3, Qwen, DeepSeek): every token is some bytes; the text is their UTF-8, lossy.
- pieces (SentencePiece: Llama 1/2, Mistral): every token is a string or, `<0xE2>`, one raw byte. A run of raw bytes is
  text if the *whole* run is UTF-8 and one U+FFFD a byte if not. One leading space of the text may be dropped.

Any other decoder is refused by name when the tokenizer is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.errors import CheckpointError

Piece = bytes | str  # bytes: raw, to be decoded with its neighbours; str: text as it stands


@dataclass(frozen=True)
class PieceDecoder:
    """How a token's vocabulary entry becomes its piece, and what is dropped from the start of a text."""

    byte_level: bool  # every piece is bytes and U+FFFD stands for each ill-formed sequence; else see above
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: str = ""  # dropped once from the start of a text, where it starts so
    metaspace: str = ""  # a space's mark that is dropped, not replaced, in a sequence's first token

    def piece(self, entry: str, first: bool = False) -> Piece:
        """The piece of a vocabulary entry; `first`: of the first token of a sequence."""
        if self.byte_level:
            table = _byte_of_char()
            try:
                return bytes([table[char] for char in entry])
            except KeyError:  # an added token that is not spelled in the byte alphabet stands for itself
                return entry.encode()
        if first and self.metaspace:
            entry = entry.replace(self.metaspace, "")
        for old, new in self.replacements:
            entry = entry.replace(old, new)
        if self.byte_fallback and len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
            try:
                return bytes([int(entry[3:5], 16)])
            except ValueError:
                return entry
        return entry


def parse_decoder(decoder: dict[str, Any] | None, origin: str) -> PieceDecoder:
    """The PieceDecoder of tokenizer.json's `decoder`. Raises CheckpointError, naming it, where there is none."""
    steps = _flatten(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceDecoder(byte_level=True)
    if kinds == ["Metaspace"]:
        mark = steps[0].get("replacement", "▁")
        drops = steps[0].get("prepend_scheme", "always") != "never" and steps[0].get("add_prefix_space", True)
        return PieceDecoder(byte_level=False, replacements=((mark, " "),), metaspace=mark if drops else "")
    replacements: list[tuple[str, str]] = []
    while steps and steps[0].get("type") == "Replace" and "String" in steps[0].get("pattern", {}):
        replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        steps = steps[1:]
    kinds = [step.get("type") for step in steps]
    strips = kinds[2:] == ["Strip"] and not steps[2].get("stop")
    if kinds[:2] == ["ByteFallback", "Fuse"] and (len(kinds) == 2 or strips):
        strip_left = steps[2]["content"] * steps[2]["start"] if strips else ""
        if len(strip_left) <= 1:
            return PieceDecoder(False, tuple(replacements), byte_fallback=True, strip_left=strip_left)
    found = " + ".join(str(step.get("type")) for step in _flatten(decoder)) or "none"
    raise CheckpointError(
        f"{origin}: decoder {found} is not supported; supported: ByteLevel, Metaspace, and "
        "Replace + ByteFallback + Fuse [+ Strip of one leading character]"
    )


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders", []) for step in _flatten(part)]


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
