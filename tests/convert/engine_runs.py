"""Running a checkpoint folder on the engine, and comparing its tokens with those of an oracle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.checkpoint.generation import GenerationDefaults
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Request
from engine.model.batch import Batch
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from tests.convert.plain_mla import PlainMLA

TOLERANCE = 1e-4
TIE = 1e-4  # two logits this close may come out in either order


@torch.inference_mode()
def prefill_logits(folder: Path, token_ids: list[int], dtype: str = "float32") -> Tensor:
    """[T, vocab], all tokens in one step: the expanded path."""
    model = load_model(folder, "cpu", dtype)
    batch = Batch.dense(1, len(token_ids), 16)
    hidden = model.forward(torch.tensor(token_ids), batch, model.new_cache(-(-len(token_ids) // 16), 16))
    return model.logits(hidden)


@torch.inference_mode()
def decode_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """[T, vocab] in fp32, one token in each step: the absorbed path."""
    model = load_model(folder, "cpu", "float32")
    blocks = -(-len(token_ids) // 16)
    cache = model.new_cache(blocks, 16)
    table = torch.arange(blocks, dtype=torch.int32).numpy()[None]
    out = []
    for i, token in enumerate(token_ids):
        start, count = torch.tensor([i]).numpy(), torch.tensor([1]).numpy()
        batch = Batch.build(start, count, table, 16)
        out.append(model.logits(model.forward(torch.tensor([token]), batch, cache)))
    return torch.cat(out)


def assert_engine_is_plain(folder: Path, ids: list[int]) -> None:
    expected = PlainMLA(folder).logits(ids)
    assert expected.std() > 0.1
    for logits in (prefill_logits(folder, ids), decode_logits(folder, ids)):
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=TOLERANCE)


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    core = EngineCore(load_model(folder, "cpu", "float32"), GenerationDefaults(), EngineConfig(cache_tokens=512))
    core.add(Request(id="r", prompt_ids=prompt, params=SamplingParams(temperature=0.0, max_tokens=count)))
    tokens: list[int] = []
    while core.has_work:
        tokens += [token for output in core.step() for token in output.token_ids]
    return tokens


@torch.inference_mode()
def assert_greedy(found: list[int], model: PreTrainedModel, prompt: list[int]) -> None:
    """Every token is the oracle's best after those before it, or within TIE of it; says where it is not the best."""
    logits = model(torch.tensor([prompt + found[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.max(-1)
    gaps = best.values - logits[torch.arange(len(found)), torch.tensor(found)]
    for i in gaps.nonzero().flatten().tolist():
        print(f"token {i}: {found[i]} in place of {best.indices[i]}, whose logit is {gaps[i]:.1e} higher")
    assert gaps.max() <= TIE
