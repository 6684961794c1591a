"""What goes into the engine and what comes out, as typed values; the same on a socket and in one process."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to continue. `id` is the caller's, unique among those in flight."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Of one sampled token, from the model's own logits (before temperature, penalties and filters)."""

    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, best first


class Output(msgspec.Struct, kw_only=True):
    """One request's news of one step. A request's last Output has a finish_reason, and nothing follows it."""

    request_id: str
    token_ids: list[int]  # new ones; includes the end or stop token that finished it
    logprobs: list[TokenLogprobs] | None = None  # one for each new token, where asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop_token_ids entry that ended it; None for the model's end token
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None  # why the engine itself had to end it; its finish_reason is then "abort"


class EngineStats(msgspec.Struct, kw_only=True):
    """A snapshot, for metrics and for whoever checks that the engine is whole."""

    num_running: int
    num_waiting: int
    total_blocks: int
    free_blocks: int  # empty ones and those that hold only reusable prefixes
    cached_blocks: int  # of the free ones, those that hold a reusable prefix
    block_size: int
    prompt_tokens: int  # totals since start
    generated_tokens: int
    prefix_hit_tokens: int
    preemptions: int
