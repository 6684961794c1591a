"""The next token of each sequence: what a request asks for, as tensors; and the answers, back on the host.

Invariant: a sequence's token depends on its own logits, parameters, seed and position, and on nothing else in the
batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.kernels.sample import Penalties, SamplingTensors, apply_penalties_, logprobs, sample
from engine.messages import TokenLogprobs
from engine.sequence import Sequence

NOT_FINITE = -1  # in place of a token: the row's logits hold NaN or infinity


@dataclass(frozen=True)
class Sampled:
    token_ids: list[int]  # one for each sequence, or NOT_FINITE
    logprobs: dict[int, TokenLogprobs]  # by index in token_ids, of those that want them


class Sampler:
    """Keeps the parameter tensors of the last batch: a decode step usually brings the same sequences again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seqs: list[Sequence] = []
        self._params: SamplingTensors | None = None

    def __call__(self, logits: Tensor, seqs: list[Sequence]) -> Sampled:
        """logits [len(seqs), vocab], the model's own, overwritten where a request modifies them. One device sync."""
        sums = logits.sum(-1)  # [B]: NaN or infinity anywhere in a row spoils its sum
        if all([seq.plain for seq in seqs]):
            self._forbid_ends(logits, seqs)
            return Sampled(_finite(self._choose(logits, seqs), sums), {})
        wanted = [i for i, seq in enumerate(seqs) if seq.params.logprobs is not None]
        raw = logits[wanted]
        self._penalise(logits, seqs)
        self._forbid_ends(logits, seqs)
        chosen = self._choose(logits, seqs)
        if not wanted:
            return Sampled(_finite(chosen, sums), {})
        most = max(seqs[i].params.logprobs or 0 for i in wanted)
        of_chosen, top, top_ids = logprobs(raw, chosen[wanted], most)
        token_ids = _finite(chosen, sums)  # the one wait for the device; the rest is there by then
        rows = zip(wanted, of_chosen.tolist(), top.tolist(), top_ids.tolist(), strict=True)
        found = {
            i: TokenLogprobs(value, list(zip(ids, values, strict=True))[: seqs[i].params.logprobs])
            for i, value, values, ids in rows
            if token_ids[i] != NOT_FINITE
        }
        return Sampled(token_ids, found)

    def _choose(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """int64 [B]."""
        params = self._tensors(seqs)
        if params.all_greedy and logits.device.type == "cpu" and logits.dtype == torch.float32:
            return torch.from_numpy(logits.numpy().argmax(-1))  # several times as fast as torch's
        return sample(logits, params)

    def _tensors(self, seqs: list[Sequence]) -> SamplingTensors:
        if self._params is None or seqs != self._seqs:
            self._seqs = seqs
            self._params = SamplingTensors.build(
                [seq.params.temperature for seq in seqs],
                [seq.params.top_k for seq in seqs],
                [seq.params.top_p for seq in seqs],
                [seq.params.min_p for seq in seqs],
                [seq.seed for seq in seqs],
                [len(seq.token_ids) for seq in seqs],
                self.device,
            )
        if self._params.all_greedy:  # no draw, no position
            return self._params
        position = torch.from_numpy(np.array([len(seq.token_ids) for seq in seqs]))
        return replace(self._params, position=position.to(self.device, non_blocking=True))

    def _penalise(self, logits: Tensor, seqs: list[Sequence]) -> None:
        rows = [i for i, seq in enumerate(seqs) if seq.counts is not None]
        if rows:
            penalties = Penalties.build(
                rows,
                [seqs[i].counts or {} for i in rows],
                [seqs[i].params.repetition_penalty for i in rows],
                [seqs[i].params.presence_penalty for i in rows],
                [seqs[i].params.frequency_penalty for i in rows],
                self.device,
            )
            apply_penalties_(logits, penalties)

    def _forbid_ends(self, logits: Tensor, seqs: list[Sequence]) -> None:
        """No end token before min_tokens."""
        short = [(i, seq) for i, seq in enumerate(seqs) if seq.num_output < seq.params.min_tokens]
        if short:
            pairs = [(i, token) for i, seq in short for token in seq.end_ids]
            if pairs:
                rows, tokens = torch.tensor(pairs, device=self.device).unbind(1)
                logits[rows, tokens] = -math.inf


def _finite(chosen: Tensor, sums: Tensor) -> list[int]:
    """The tokens on the host, NOT_FINITE where the row's sum is not."""
    rows = zip(chosen.tolist(), sums.tolist(), strict=True)
    return [token if math.isfinite(total) else NOT_FINITE for token, total in rows]
