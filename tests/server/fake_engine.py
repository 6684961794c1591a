"""An engine process with no model: every request is answered with the same text over and over, at a set pace.

The HTTP side cannot tell it from the real one, and it starts in no time. A prompt that holds CRASH_TOKEN kills it;
one that holds BROKEN_TOKEN gets two tokens and is given up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from engine.errors import CapacityError, RequestError
from engine.messages import EngineStats, Output, Request
from engine.tokenizer import Tokenizer
from server.engine_process import main
from server.wire import EngineInfo, Start

CRASH_TOKEN = 500
BROKEN_TOKEN = 499
BLOCKS = 100


class FakeCore:
    """One block a request; all in flight run."""

    def __init__(self, text_ids: list[int], max_len: int, step_seconds: float) -> None:
        self.text_ids, self.max_len, self.step_seconds = text_ids, max_len, step_seconds
        self.running: dict[str, tuple[Request, int]] = {}
        self.generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) >= self.max_len:
            raise RequestError(f"the prompt has {len(request.prompt_ids)} tokens", "prompt")
        self.running[request.id] = (request, 0)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def step(self) -> list[Output]:
        time.sleep(self.step_seconds)
        outputs = []
        for request_id, (request, count) in list(self.running.items()):
            if CRASH_TOKEN in request.prompt_ids:
                raise RuntimeError("a crash was asked for")
            if BROKEN_TOKEN in request.prompt_ids and count == 2:
                del self.running[request_id]
                error = "the logits are not finite"
                outputs.append(Output(request_id=request_id, token_ids=[], finish_reason="abort", error=error))
                continue
            token = self.text_ids[count % len(self.text_ids)]
            last = count + 1 == min(request.params.max_tokens or self.max_len, self.max_len - len(request.prompt_ids))
            outputs.append(Output(request_id=request_id, token_ids=[token], finish_reason="length" if last else None))
            self.running[request_id] = (request, count + 1)
            if last:
                del self.running[request_id]
        self.generated += len(outputs)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            total_blocks=BLOCKS,
            free_blocks=BLOCKS - len(self.running),
            cached_blocks=0,
            block_size=16,
            prompt_tokens=0,
            generated_tokens=self.generated,
            prefix_hit_tokens=0,
            preemptions=0,
        )


def load(start: Start) -> tuple[FakeCore, EngineInfo]:
    if start.config.cache_tokens == 1:
        raise CapacityError("cache_tokens is 1; raise it")
    if start.config.cache_tokens == 2:
        raise ZeroDivisionError("a fault of the program")
    if start.config.cache_tokens == 3:
        time.sleep(60)
    tokenizer = Tokenizer.from_folder(start.model)
    ids = tokenizer.encode("Once upon a time there was a dog. ", add_special_tokens=False)
    max_len = start.config.max_model_len or 512
    info = EngineInfo(
        attention="mla",
        num_layers=2,
        vocab_size=tokenizer.vocab_size,
        dtype="float32",
        device="cpu",
        max_len=max_len,
        max_num_seqs=start.config.max_num_seqs,
        cache_tokens=BLOCKS * 16,
        block_size=16,
        cache_bytes_per_token=100,
    )
    return FakeCore(ids, max_len, float(os.environ.get("FAKE_STEP_SECONDS", "0.005"))), info


if __name__ == "__main__":
    main(load)
