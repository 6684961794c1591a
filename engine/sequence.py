"""One sequence: its tokens, how many of them are in the cache, and which blocks hold them."""

from __future__ import annotations

from enum import Enum

from engine.messages import Request


class State(Enum):
    WAITING = "waiting"  # holds no block
    RUNNING = "running"
    FINISHED = "finished"  # holds no block


class Sequence:
    """Invariant: the first `num_computed` of `token_ids` have their rows in `blocks`; the first `num_committed` blocks
    are full, computed, and offered to the prefix cache; only a running sequence holds blocks. A step that takes
    num_computed to len(token_ids) samples the next token."""

    def __init__(self, request: Request, seed: int, max_tokens: int, end_ids: frozenset[int]) -> None:
        """`seed`, `max_tokens`, `end_ids`: the request's own, or what stands in for them where it leaves them open."""
        params = request.params
        self.request_id = request.id
        self.params = params
        self.seed = seed
        self.max_tokens = max_tokens
        self.end_ids = end_ids  # tokens that end it
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.state = State.WAITING
        self.num_computed = 0
        self.num_committed = 0
        self.blocks: list[int] = []
        self.row = -1  # of the scheduler's block tables, while it runs
        self.num_cached: int | None = None  # prompt tokens found in the cache when it was first admitted
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        # For penalties: each token of prompt and output, with how often it is in the output.
        self.counts: dict[int, int] | None = dict.fromkeys(request.prompt_ids, 0) if penalised else None
        # Nothing but the likeliest token is wanted of its logits, once min_tokens are there.
        self.plain = params.temperature == 0 and not penalised and params.logprobs is None

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
