"""Is an engine right? Asked before its speed is reported.

Greedy tokens that the engine made in a batch, block by block, must be the likeliest ones of a single dense pass over
the finished text, which uses neither decode kernels nor a cache that outlives the pass; so must those that
`transformers` made of the same weights. "Likeliest" allows for rounding: the dense pass may score another token higher
by the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workload import run
from engine.core import EngineCore
from engine.model.batch import Batch
from engine.model.transformer import Transformer
from engine.sampling_params import SamplingParams

# Logit distance within which two tokens may change places: fp32 rounding, and that of 16-bit activations.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Check:
    """`worst` is the largest amount by which the dense pass preferred another token, in logits."""

    worst: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance  # False for NaN as well


@torch.inference_mode()
def dense_logits(model: Transformer, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab] of one whole pass."""
    block_size = 64
    cache = model.new_cache(-(-len(ids) // block_size), block_size)
    batch = Batch.dense(1, len(ids), block_size, model.device)
    return model.logits(model.forward(torch.tensor(ids, device=model.device), batch, cache)).float()


def written_prompts(core: EngineCore, start: int, count: int, length: int) -> list[list[int]]:
    """Prompts in the model's own words: sampled from `start`, reproducibly."""
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=length - 1, ignore_eos=True) for i in range(count)]
    return [[start, *run(core, [[start]], p)[0][0]] for p in params]


def check_engine(core: EngineCore, prompts: list[list[int]], output: int) -> Check:
    """Check what the engine continues the prompts with, all at once."""
    tokens, _ = run(core, prompts, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
    return check_tokens(core.runner.model, prompts, tokens)


def check_tokens(model: Transformer, prompts: list[list[int]], tokens: list[list[int]]) -> Check:
    """Check given continuations of the prompts."""
    gaps = []
    for prompt, continuation in zip(prompts, tokens, strict=True):
        logits = dense_logits(model, prompt + continuation)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(continuation, device=logits.device)[:, None])[:, 0]
        gaps.append(logits.max(-1).values - chosen)
    return Check(torch.cat(gaps).max().item(), TOLERANCE[model.dtype])  # the maximum of a NaN is NaN


def top1_agreement(model: Transformer, reference: Transformer, texts: list[list[int]]) -> float:
    """Share of positions at which both models find the same token likeliest."""
    same = [dense_logits(model, ids).argmax(-1) == dense_logits(reference, ids).argmax(-1) for ids in texts]
    return torch.cat([s.cpu() for s in same]).float().mean().item()
