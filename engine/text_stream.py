"""TextStream: the text of a growing output, in pieces that are never taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.sampling_params import SamplingParams
from engine.stop_strings import StopStrings
from engine.tokenizer import Tokenizer


class TextStream:
    """Invariant: the pieces shown so far, joined, are a prefix of the output's final text; at the end they are it.

    The final text is `tokenizer.decode` of all output ids, cut at the first stop string. So a piece ends on a whole
    character, never on a tail that may become a stop string, and nothing of what was held back is lost at the end.
    Each token costs O(1), amortised: no part of the output is decoded twice.

    continues_text: the output goes on from visible text (a plain completion's prompt). A SentencePiece decoder drops
    the space at the start of a text; the start of a continuation is no such start, and keeps it.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, continues_text: bool = False) -> None:
        self.stopped: str | None = None  # the stop string that ended the text; nothing comes after
        self._tokenizer = tokenizer
        self._params = params
        self._assembler = _Assembler(tokenizer, continues_text)
        self._stops = StopStrings(params.stop)
        self._held = ""
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], finished: bool = False, ended_by_token: bool = False) -> str:
        """The text that has become safe to show. `finished` flushes what is held: there will be no more tokens.

        ended_by_token: the last id is the end or stop token that finished the output; as with stop strings, it is
        no part of the text unless include_stop_str_in_output.
        """
        if self.stopped is not None:
            return ""
        if ended_by_token and not self._params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        hidden = self._tokenizer.special_ids if self._params.skip_special_tokens else ()
        shown: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            if token_id not in hidden:
                shown.append(self._release(self._assembler.feed(token_id)))
                if self.stopped is not None:
                    return "".join(shown)
        if finished:
            shown.append(self._release(self._assembler.flush()))
            if self.stopped is None:
                shown.append(self._held)
                self._held = ""
        return "".join(shown)

    def _release(self, text: str) -> str:
        """Takes new text, returns what may be shown of it and of what was held before."""
        if not text or not self._params.stop or self._num_tokens <= self._params.min_tokens:
            return text  # stop strings do not count among the first min_tokens
        found = self._stops.feed(text)
        text, new_start = self._held + text, len(self._held)
        if found is None:
            safe = len(text) - self._stops.held
            self._held = text[safe:]
            return text[:safe]
        end, self.stopped = found
        self._held = ""
        end += new_start
        return text[: end if self._params.include_stop_str_in_output else end - len(self.stopped)]


class _Assembler:
    """Tokens to whole characters, as the tokenizer's decoder does over a whole sequence (see token_pieces)."""

    def __init__(self, tokenizer: Tokenizer, continues_text: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # of a byte-fallback decoder: the raw bytes since the last piece of text
        self._num_tokens = 0 if not continues_text else 1
        self._at_start = not continues_text  # no text yet, and the first is the start of a text

    def feed(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id) if self._num_tokens else self._tokenizer.first_piece(token_id)
        self._num_tokens += 1
        if self._decoder.byte_level:
            return self._utf8.decode(piece if isinstance(piece, bytes) else piece.encode())
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        return self._trim(self._end_run() + piece)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True) if self._decoder.byte_level else self._trim(self._end_run())

    def _end_run(self) -> str:
        """The run's text. Whole runs, because one bad byte turns the characters before it to U+FFFD as well."""
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _trim(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(self._decoder.strip_left)
