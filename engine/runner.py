"""A scheduled step -> tensors -> forward pass -> the next tokens, with one wait for the device at the very end."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add

import numpy as np
import torch

from engine.messages import TokenLogprobs
from engine.model.batch import Batch
from engine.model.transformer import Transformer
from engine.sampler import Sampler
from engine.scheduler import Scheduled
from engine.sequence import Sequence


@dataclass(frozen=True)
class StepResult:
    """What was sampled: of those sequences alone whose last token was computed."""

    seqs: list[Sequence]
    token_ids: list[int]  # or NOT_FINITE
    logprobs: dict[int, TokenLogprobs]  # by index in seqs


class Runner:
    """Owns the cache's memory; which block is whose is the scheduler's to say."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.cache = model.new_cache(num_blocks, block_size)
        self.sampler = Sampler(model.device)

    @torch.inference_mode()
    def run(self, step: list[Scheduled], block_tables: np.ndarray) -> StepResult:
        """Compute a step. `block_tables` int32 [rows, max_blocks]: a sequence's blocks are in its row."""
        decodes = [item for item in step if item.count == 1]
        if len(decodes) < len(step):
            step = decodes + [item for item in step if item.count != 1]
        token_ids, sampled = self._tokens(step, len(decodes))
        device = self.model.device
        ids = torch.from_numpy(np.array(token_ids)).to(device, non_blocking=True)
        hidden = self.model.forward(ids, self._batch(step, block_tables), self.cache)  # [T, hidden]
        if not sampled:
            return StepResult([], [], {})
        if len(sampled) < len(token_ids):
            last = torch.from_numpy(np.array([end for _, end in sampled])).to(device, non_blocking=True)
            hidden = hidden[last]
        seqs = [seq for seq, _ in sampled]
        result = self.sampler(self.model.logits(hidden), seqs)
        return StepResult(seqs, result.token_ids, result.logprobs)

    def _tokens(self, step: list[Scheduled], num_decodes: int) -> tuple[list[int], list[tuple[Sequence, int]]]:
        """The step's token ids end to end, and which sequences are to be sampled, each with the index of its last."""
        token_ids: list[int] = []
        sampled: list[tuple[Sequence, int]] = []
        for i, item in enumerate(step):
            seq, start = item.seq, item.seq.num_computed
            if i < num_decodes:
                token_ids.append(seq.token_ids[start])
            else:
                token_ids += seq.token_ids[start : start + item.count]
            if start + item.count == len(seq.token_ids):
                sampled.append((seq, len(token_ids) - 1))
        return token_ids, sampled

    def _batch(self, step: list[Scheduled], block_tables: np.ndarray) -> Batch:
        computed = [item.seq.num_computed for item in step]
        counts = [item.count for item in step]
        width = -(-max(map(add, computed, counts)) // self.block_size)
        tables = block_tables[[item.seq.row for item in step], :width]  # a copy
        return Batch.build(computed, counts, tables, self.block_size, self.model.device)
