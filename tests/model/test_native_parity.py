"""Families with latent attention or experts against `transformers`, fp32: logits within 1e-4, and greedy tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.checkpoint.generation import GenerationDefaults
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Request
from engine.model.load import load_model
from engine.model.transformer import Transformer
from engine.sampling_params import SamplingParams
from tests.convert.engine_runs import assert_greedy
from tests.model.native_folders import CONFIGS, make_native
from tests.model.test_llama_parity import CUTTINGS, LENGTHS, TOLERANCE, stepwise

NEW_TOKENS = 64


def assert_logits(model: Transformer, oracle: PreTrainedModel, sequences: list[Tensor]) -> None:
    """Expanded (at once), absorbed (one by one) and mixed: each of them near the oracle, and so near the others."""
    expected = [oracle(sequence[None]).logits[0] for sequence in sequences]
    assert min(logits.std() for logits in expected) > 0.1
    found = {name: stepwise(model, sequences, CUTTINGS[name]) for name in ("at once", "one by one", "mixed")}
    for name, logits in found.items():
        for ours, right in zip(logits, expected, strict=True):
            error = (ours - right).abs().max().item()
            assert error < TOLERANCE, f"{name}: {error}"  # NaN fails too
    for expanded, absorbed in zip(found["at once"], found["one by one"], strict=True):
        assert (expanded - absorbed).abs().max() < TOLERANCE


def assert_tokens(model: Transformer, oracle: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Together, through the engine: chunks of at most 16 tokens, blocks of 8."""
    config = EngineConfig(block_size=8, max_batched_tokens=16, cache_tokens=512)
    core = EngineCore(model, GenerationDefaults(), config)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
        core.add(Request(id=str(i), prompt_ids=prompt, params=params))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id] += output.token_ids
    for i, prompt in enumerate(prompts):
        assert len(tokens[str(i)]) == NEW_TOKENS
        assert_greedy(tokens[str(i)], oracle, prompt)


@pytest.mark.parametrize(("family", "name"), CONFIGS)
@torch.inference_mode()
def test_against_transformers(tmp_path, family, name):
    oracle = make_native(tmp_path, family, CONFIGS[family, name])
    model = load_model(tmp_path, "cpu", "float32")
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, model.spec.vocab_size, (n,), generator=generator) for n in LENGTHS]
    assert_logits(model, oracle, sequences)
    assert_tokens(model, oracle, [sequence.tolist() for sequence in sequences])
