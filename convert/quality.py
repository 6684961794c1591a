"""How far a converted model is from its source: perplexity, KL divergence, top-1 agreement, error of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from convert.errors import ConversionError

LOGIT_ELEMENTS = 1 << 22  # logits of one model held at a time: 16 MiB in fp32, however large the vocabulary

Logits = Callable[[Tensor], Tensor]  # final normed hidden states [n, hidden] -> logits [n, vocab]


class Comparison:
    """Running sums over predicted tokens; a model is compared with its source on the same text."""

    def __init__(self, vocab_size: int) -> None:
        self._rows = max(1, LOGIT_ELEMENTS // vocab_size)
        self.tokens = 0
        self._reference_nll = self._nll = self._kl = 0.0  # nats, summed
        self._agreed = 0
        # By floor(log2(tokens seen)): KL, summed, and predicted tokens.
        self._kl_by_power, self._tokens_by_power = (torch.zeros(64, dtype=torch.float64) for _ in range(2))
        self._most_seen = 0

    def add(
        self,
        reference: Tensor,
        converted: Tensor,
        targets: Tensor,
        seen: Tensor,
        reference_logits: Logits,
        converted_logits: Logits,
    ) -> None:
        """reference, converted [n, hidden]: what predicts targets, int64 [n], after `seen` >= 1 tokens, int64 [n].

        Raises ConversionError on NaN and inf.
        """
        powers = torch.frexp(seen.double()).exponent.long().cpu() - 1
        for start in range(0, len(targets), self._rows):
            part = slice(start, start + self._rows)
            p = reference_logits(reference[part]).float().log_softmax(-1)  # [rows, vocab]
            q = converted_logits(converted[part]).float().log_softmax(-1)
            wanted = targets[part, None]
            self._reference_nll -= p.gather(1, wanted).double().sum().item()
            self._nll -= q.gather(1, wanted).double().sum().item()
            kl = p.exp().mul_(p - q).sum(-1).double().cpu()  # [rows]
            self._kl += kl.sum().item()
            self._kl_by_power.index_add_(0, powers[part], kl)
            self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum().item())
        self.tokens += len(targets)
        self._tokens_by_power += torch.bincount(powers, minlength=64)
        self._most_seen = max(self._most_seen, int(seen.max()))
        if not math.isfinite(self._kl + self._nll):
            raise ConversionError("the model computes logits that are not finite numbers: its weights are damaged")

    @property
    def reference_nll(self) -> float:
        """Nats per predicted token of the source."""
        return self._reference_nll / self.tokens

    @property
    def nll(self) -> float:
        return self._nll / self.tokens

    @property
    def kl(self) -> float:
        """KL(source || converted) in nats per predicted token; sums in fp32 may put an exact one a hair below 0."""
        return max(0.0, self._kl / self.tokens)

    @property
    def top1_agreement(self) -> float:
        """Fraction of predictions whose likeliest token is the same."""
        return self._agreed / self.tokens

    @property
    def kl_by_position(self) -> list[dict[str, float]]:
        """KL of what is predicted after `from` to `to` tokens, in powers of two up to the longest there was."""
        found = zip(self._kl_by_power.tolist(), self._tokens_by_power.tolist(), strict=True)
        return [
            {
                "from": 1 << i,
                "to": min((2 << i) - 1, self._most_seen),
                "tokens": int(tokens),
                "kl": max(0.0, kl / tokens),
            }
            for i, (kl, tokens) in enumerate(found)
            if tokens
        ]

    def report(self) -> dict[str, Any]:
        return {
            "perplexity": math.exp(self.nll),
            "reference_perplexity": math.exp(self.reference_nll),
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "kl_by_position": self.kl_by_position,
        }


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|converted - source| / |source| over pairs (source, converted), in the Frobenius norm of them all."""
    error = norm = 0.0
    for source, converted in pairs:
        error += (source.double() - converted.double()).pow(2).sum().item()
        norm += source.double().pow(2).sum().item()
    return math.sqrt(error / norm) if norm else math.sqrt(error)
