"""The next token of each sequence: what a request asks for, as tensors; and the answers, back on the host.

Invariant: a sequence's token depends on its own logits, parameters, seed and position, and on nothing else in the batch.
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
        finite = logits.sum(-1, dtype=torch.float32).isfinite()  # [B]; either of NaN and infinity spoils the sum
        params = self._tensors(seqs)
        plain = all([seq.plain for seq in seqs])
        wanted = [] if plain else [i for i, seq in enumerate(seqs) if seq.params.logprobs is not None]
        raw = logits[wanted] if wanted else None
        if not plain:
            self._penalise(logits, seqs)
        self._forbid_ends(logits, seqs)
        chosen = sample(logits, params)
        token_ids = torch.where(finite, chosen, NOT_FINITE)
        if raw is None:
            return Sampled(token_ids.tolist(), {})
        most = max(seqs[i].params.logprobs or 0 for i in wanted)
        of_chosen, top, top_ids = logprobs(raw, chosen[wanted], most)
        host_ids = token_ids.tolist()  # the one wait for the device; the rest is there by then
        rows = zip(wanted, of_chosen.tolist(), top.tolist(), top_ids.tolist(), strict=True)
        return Sampled(
            host_ids,
            {
                i: TokenLogprobs(value, list(zip(ids, values, strict=True))[: seqs[i].params.logprobs])
                for i, value, values, ids in rows
                if host_ids[i] != NOT_FINITE
            },
        )

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
