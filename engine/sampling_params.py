"""SamplingParams: how one request's tokens are chosen and when it ends. Checked once, when it is made."""

from __future__ import annotations

import msgspec

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises RequestError, naming the field, where a value makes no sense."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL (arXiv 1909.05858)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None  # None: drawn at random for the request
    max_tokens: int | None = None  # None: up to the model's context
    min_tokens: int = 0  # end tokens cannot be chosen before
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # None: none; 0: of the chosen token alone; k: and of the k likeliest

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, expected: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {expected}, not {getattr(self, param)!r}", param)

        check(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        check(0 <= self.top_k < 2**31, "top_k", "0 (off) or a positive integer")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(0 < self.repetition_penalty <= 10, "repetition_penalty", "above 0 and at most 10")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        check(all(self.stop), "stop", "free of empty strings")
        check(all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", "non-negative token ids")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}")
