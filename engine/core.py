"""EngineCore: requests in, tokens out. One step = schedule -> run -> sample -> emit.

Invariant: between steps every request in flight is either waiting or running, and every block that is not free belongs
to a running one. Whatever ends a request (its own end, an abort, a failing step) gives its blocks back at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from engine.block_pool import BlockPool
from engine.cache_budget import num_cache_blocks
from engine.checkpoint.checkpoint import GenerationDefaults
from engine.config import EngineConfig
from engine.errors import CapacityError, RequestError
from engine.messages import EngineStats, FinishReason, Output, Request, TokenLogprobs
from engine.model.transformer import Transformer
from engine.runner import Runner
from engine.sampler import NOT_FINITE
from engine.scheduler import Scheduler
from engine.sequence import Sequence


class EngineCore:
    """Single-threaded: whoever drives it calls add, abort and step in turn."""

    def __init__(self, model: Transformer, generation: GenerationDefaults, config: EngineConfig) -> None:
        """Allocates the cache. Raises CapacityError where the configuration does not fit model or machine."""
        limit = model.spec.max_position_embeddings
        if config.max_model_len is not None and config.max_model_len > limit:
            raise CapacityError(f"max_model_len is {config.max_model_len}, but the model knows {limit} positions")
        max_model_len = config.max_model_len or limit
        num_blocks = num_cache_blocks(model, config, max_model_len)
        self.config = config
        self.spec = model.spec
        self.eos_ids = frozenset(token for token in generation.eos_token_ids if token < model.spec.vocab_size)
        self.max_len = min(max_model_len, num_blocks * config.block_size)  # tokens of the longest sequence possible
        self.pool = BlockPool(num_blocks, config.block_size, config.prefix_cache)
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, config.max_batched_tokens, self.max_len)
        self.runner = Runner(model, num_blocks, config.block_size)
        self._in_flight: dict[str, Sequence] = {}
        self._prompt_tokens = self._generated_tokens = self._prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError where it can never be served; nothing is queued then.

        One whose max_tokens exceed what is left of max_model_len, or of the whole cache, ends there, by "length".
        """
        if request.id in self._in_flight:
            raise RequestError(f"a request named {request.id!r} is in flight already")
        prompt, params = request.prompt_ids, request.params
        vocab = self.spec.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty; it must have at least one token", "prompt")
        worst = min(prompt) if min(prompt) < 0 else max(prompt)
        if not 0 <= worst < vocab:
            raise RequestError(f"token id {worst} is not in the vocabulary of {vocab}", "prompt")
        if len(prompt) >= self.max_len:
            what = f"the model's context is {self.max_len}"
            if self.max_len == self.pool.num_blocks * self.pool.block_size:
                what = f"the cache holds {self.max_len} tokens"
            raise RequestError(f"the prompt has {len(prompt)} tokens and needs room for one more, but {what}", "prompt")
        if any(token >= vocab for token in params.stop_token_ids):
            worst = max(params.stop_token_ids)
            raise RequestError(f"token id {worst} is not in the vocabulary of {vocab}", "stop_token_ids")
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        if params.min_tokens and len(end_ids) >= vocab:
            raise RequestError("every token is a stop token: min_tokens cannot be met", "stop_token_ids")
        room = self.max_len - len(prompt)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        seq = self._in_flight[request.id] = Sequence(request, seed, max_tokens, end_ids)
        self.scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests in whatever state; those not in flight are passed over. No Output follows."""
        for request_id in request_ids:
            if request_id in self._in_flight:
                self._drop(self._in_flight[request_id])

    def step(self) -> list[Output]:
        """Compute one step; an Output for every request that got a token. Without work: [].

        Should it raise, which only a fault of the program or the machine can cause, every request in flight is dropped,
        and the engine is idle and whole.
        """
        try:
            step = self.scheduler.schedule()
            if not step:
                return []
            result = self.runner.run(step, self.scheduler.block_tables)
            for item in step:
                self.scheduler.computed(item)
            outputs = [
                self._emit(seq, token, result.logprobs.get(i))
                for i, (seq, token) in enumerate(zip(result.seqs, result.token_ids, strict=True))
            ]
        except BaseException:
            self.abort(list(self._in_flight))
            raise
        if not self._in_flight and self.pool.num_free != self.pool.num_blocks:
            raise RuntimeError(f"{self.pool.num_blocks - self.pool.num_free} cache blocks leaked")
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            total_blocks=self.pool.num_blocks,
            free_blocks=self.pool.num_free,
            cached_blocks=self.pool.num_reusable,
            block_size=self.pool.block_size,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self.scheduler.num_preemptions,
        )

    def _drop(self, seq: Sequence) -> None:
        del self._in_flight[seq.request_id]
        self.scheduler.finish(seq)

    def _emit(self, seq: Sequence, token: int, logprob: TokenLogprobs | None) -> Output:
        """Take in a sampled token; finish the sequence where it is the last."""
        cached = seq.num_cached or 0
        if token == NOT_FINITE:
            self._drop(seq)
            error = "the model's logits are not finite; its weights are broken, or overflow in this dtype"
            return Output(request_id=seq.request_id, token_ids=[], finish_reason="abort", error=error)
        if seq.num_output == 0:
            self._prompt_tokens += seq.num_prompt
            self._prefix_hit_tokens += cached
        self._generated_tokens += 1
        seq.append(token)
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if token in seq.end_ids:  # before min_tokens there is none
            reason = "stop"
            stop_reason = token if token in seq.params.stop_token_ids else None
        elif seq.num_output >= seq.max_tokens:
            reason = "length"
        if reason is not None:
            self._drop(seq)
        return Output(
            request_id=seq.request_id,
            token_ids=[token],
            logprobs=None if logprob is None else [logprob],
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=cached,
        )
