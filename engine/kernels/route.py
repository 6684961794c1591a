"""Which experts of a mixture a token goes to, and with what weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

On a GPU one program routes one token, in one launch of what would be a dozen. Experts lie as [groups, members], padded
to powers of two with what is never chosen; the best are taken one at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels._triton import jit, next_power_of_2, tl


class Routing(Protocol):
    """What of a mixture's spec decides the routing; `engine.spec.MoESpec` says what each is."""

    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def scoring(self) -> str: ...  # "softmax" or "sigmoid"
    @property
    def num_groups(self) -> int: ...
    @property
    def groups_per_token(self) -> int: ...
    @property
    def group_score(self) -> str: ...  # "max" or "top2_sum"
    @property
    def normalize(self) -> bool: ...
    @property
    def scale(self) -> float: ...


def route_torch(spec: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, as `route`."""
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if spec.groups_per_token < spec.num_groups:
        groups = choice.unflatten(-1, (spec.num_groups, -1))
        best = groups.amax(-1) if spec.group_score == "max" else groups.topk(2, -1, sorted=False).values.sum(-1)
        kept = best.topk(spec.groups_per_token, -1, sorted=False).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        choice = groups.masked_fill(outside[..., None], float("-inf")).flatten(-2)
    experts = choice.topk(spec.experts_per_token, -1, sorted=False).indices
    weights = scores.gather(-1, experts)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # as DeepSeek: sigmoids may all be 0
    return experts, weights * spec.scale


@jit
def _route_kernel(
    logits_ptr: tl.tensor,  # fp32 [T, EXPERTS]
    bias_ptr: tl.tensor,  # fp32 [EXPERTS]; not read unless BIASED
    experts_ptr: tl.tensor,  # int64 [T, CHOSEN]
    weights_ptr: tl.tensor,  # fp32 [T, CHOSEN]
    scale: float,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,  # groups
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    TOP2: tl.constexpr,  # a group's score is the sum of its two best
    NORMALIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,  # of a group
    CHOSEN_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = EXPERTS // GROUPS
    group, member = tl.arange(0, GROUPS_PADDED), tl.arange(0, SIZE_PADDED)
    inside = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    experts = group[:, None] * SIZE + member[None, :]
    logits = tl.load(logits_ptr + token * EXPERTS + experts, mask=inside, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores /= tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + experts, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if KEPT < GROUPS:
        best = tl.max(choice, 1)
        if TOP2:
            first = member[None, :] == tl.argmax(choice, 1)[:, None]
            best += tl.max(tl.where(first, float("-inf"), choice), 1)
        kept = group < 0
        for _ in range(KEPT):
            is_best = group == tl.argmax(best, 0)
            kept = kept | is_best
            best = tl.where(is_best, float("-inf"), best)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    PADDED: tl.constexpr = GROUPS_PADDED * SIZE_PADDED
    choice, scores = tl.reshape(choice, [PADDED]), tl.reshape(scores, [PADDED])
    place, slot = tl.arange(0, PADDED), tl.arange(0, CHOSEN_PADDED)
    places = tl.zeros([CHOSEN_PADDED], tl.int32)
    weights = tl.zeros([CHOSEN_PADDED], tl.float32)
    for i in range(CHOSEN):
        best_place = tl.argmax(choice, 0)
        is_best = place == best_place
        places = tl.where(slot == i, best_place, places)
        weights = tl.where(slot == i, tl.sum(tl.where(is_best, scores, 0.0), 0), weights)
        choice = tl.where(is_best, float("-inf"), choice)
    if NORMALIZE:
        weights /= tl.sum(weights, 0) + 1e-20
    # Scores that are NaN may choose padding; whatever they choose, it is an expert that exists.
    chosen = tl.minimum(places // SIZE_PADDED * SIZE + places % SIZE_PADDED, EXPERTS - 1)
    out = token * CHOSEN + slot
    tl.store(experts_ptr + out, chosen.to(tl.int64), mask=slot < CHOSEN)
    tl.store(weights_ptr + out, weights * scale, mask=slot < CHOSEN)


def route_triton(spec: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, k = len(logits), spec.experts_per_token
    experts = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    if tokens:
        padded = {
            "GROUPS_PADDED": next_power_of_2(spec.num_groups),
            "SIZE_PADDED": next_power_of_2(spec.num_experts // spec.num_groups),
            "CHOSEN_PADDED": next_power_of_2(k),
        }
        _route_kernel[(tokens,)](
            logits, logits if bias is None else bias, experts, weights, float(spec.scale),
            EXPERTS=spec.num_experts, CHOSEN=k, GROUPS=spec.num_groups, KEPT=spec.groups_per_token,
            SIGMOID=spec.scoring == "sigmoid", BIASED=bias is not None, TOP2=spec.group_score == "top2_sum",
            NORMALIZE=spec.normalize, num_warps=1, **padded,
        )  # fmt: skip
    return experts, weights


def route(spec: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Router logits [T, E], contiguous and on a GPU fp32 -> each token's experts, int64 [T, k] in no order, and their
    weights [T, k].

    `bias` [E] moves what is selected and no weight (the loss-free balancing of DeepSeek-V3).
    """
    return route_triton(spec, logits, bias) if logits.is_cuda else route_torch(spec, logits, bias)
