"""Text that a model writes by itself, through the engine: calibration data where there is no file of it.

A model with a chat template writes half of it as chats: the template up to where a user's words begin, which the model
supplies (arXiv 2406.08464), then the template around them, and its own reply. All else begins on an empty page.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tqdm import tqdm

from convert.errors import ConversionError
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import RequestError
from engine.messages import Request
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

SAMPLE_TOKENS = 1024  # of one sample, prompt and output, at most
MIN_SAMPLE = 16  # an end token cannot come before; keeps a model that is quick to end from stalling the loop
MAX_TOGETHER = 64  # samples that the engine runs at once
MARK = "USER-TEXT-GOES-HERE"


class Sampler:
    """Draws samples on an engine of its own, each with a seed of its own."""

    def __init__(self, source: Checkpoint, seed: int, device: str | None) -> None:
        self.limit = min(SAMPLE_TOKENS, source.spec.max_position_embeddings)
        self._seed = seed
        self._drawn = 0
        config = EngineConfig(
            device=device,
            max_num_seqs=MAX_TOGETHER,
            max_model_len=self.limit,
            cache_tokens=MAX_TOGETHER * (self.limit + 64),  # and at most a block that is not full
            prefix_cache=False,
        )
        self._core = EngineCore(load_model(source, device), source.generation, config)

    def draw(self, prompts: Sequence[Sequence[int]], caps: Sequence[int], progress: tqdm) -> list[list[int]]:
        """The outputs, in the order of the prompts, end token included; the i-th has at most caps[i] tokens."""
        outputs: dict[str, list[int]] = {}
        for prompt, cap in zip(prompts, caps, strict=True):
            self._drawn += 1
            params = SamplingParams(
                temperature=1.0,
                seed=self._seed * 1_000_003 + self._drawn & 0x7FFF_FFFF_FFFF_FFFF,
                max_tokens=cap,
                min_tokens=min(MIN_SAMPLE, cap),
            )
            request = Request(id=str(self._drawn), prompt_ids=list(prompt), params=params)
            self._core.add(request)
            outputs[request.id] = []
        while self._core.has_work:
            for output in self._core.step():
                if output.error is not None:
                    raise ConversionError(f"the source model cannot be sampled from: {output.error}")
                outputs[output.request_id] += output.token_ids
                progress.update(len(output.token_ids))
        return list(outputs.values())


def sample_tokens(source: Checkpoint, tokenizer: Tokenizer, count: int, seed: int, device: str | None) -> list[int]:
    """At least `count` token ids: samples in random order, end to end; the same for the same seed."""
    start, opening = [_empty_page(source)], _user_opening(tokenizer)
    sampler = Sampler(source, seed, device)
    user_tokens = sampler.limit // 4
    if opening is not None and len(opening) > user_tokens:
        opening = None  # no room for a chat
    samples: list[list[int]] = []
    with tqdm(total=count, desc="sampling calibration text", unit="tok", disable=None) as progress:
        while (have := sum(map(len, samples))) < count:
            length = have / len(samples) if samples else sampler.limit  # of a sample, on average, as far as is known
            together = math.ceil(1.1 * (count - have) / length)
            chats = 0 if opening is None else together // 2
            plain = together - chats
            prompts, caps = [start] * plain + [opening or []] * chats, [sampler.limit] * plain + [user_tokens] * chats
            drawn = sampler.draw(prompts, caps, progress)
            samples += drawn[:plain]
            chat_prompts = _chat_prompts(tokenizer, drawn[plain:], sampler.limit)
            replies = sampler.draw(chat_prompts, [sampler.limit] * len(chat_prompts), progress)
            samples += [[*prompt, *reply] for prompt, reply in zip(chat_prompts, replies, strict=True)]
    random.Random(seed).shuffle(samples)
    return [token for sample in samples for token in sample]


def _chat_prompts(tokenizer: Tokenizer, users: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """The template around each user's words, up to the reply; those that leave no room for one are dropped."""
    texts = [tokenizer.decode(user).strip() for user in users]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    prompts = [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]
    return [prompt for prompt in prompts if len(prompt) < limit]


def _empty_page(source: Checkpoint) -> int:
    """The token after which a model begins a new text: BOS, or the end token where there is no BOS."""
    ends = source.generation.eos_token_ids
    if source.generation.bos_token_id is not None:
        return source.generation.bos_token_id
    if ends:
        return ends[0]
    raise ConversionError(
        f"{source.path}: has no BOS or end token to start writing from; give calibration text with --calibration"
    )


def _user_opening(tokenizer: Tokenizer) -> list[int] | None:
    """A chat up to where the user's words begin; None without a template, or with one that hides where that is."""
    if tokenizer.chat_template is None:
        return None
    try:
        before, mark, _ = tokenizer.apply_chat_template([{"role": "user", "content": MARK}]).partition(MARK)
    except RequestError:  # a template that wants more than a user message
        return None
    return tokenizer.encode(before, add_special_tokens=False) or None if mark else None
