"""Layer-wise refinement: all attention weights of one converted layer, fitted to what its source layer puts out.

Least squares on calibration text, no gradient through any other layer, no training of the model as a whole. The output
projection is fitted in closed form; then Adam fits all weights together; then o_proj again. The text is the caller's:
batches to fit on, and others, held out, that choose the learning rate and where to stop.

Invariant: a pure function of its arguments, the seed included; and what it returns, rounded as it is stored, is on the
held-out batches no worse than what it was given, rounded likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from convert.differentiable import mla_attention
from convert.output_fit import fit_output
from engine.spec import MLASpec

# Normed inputs of the layer and what its attention should put out, both [windows, length, hidden]: one step's worth.
Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class RefineOptions:
    passes: int = 16  # over the text, at least min_steps steps in all
    min_steps: int = 100
    learning_rates: tuple[float, ...] = (0.06, 0.02, 0.006, 0.002)  # a step's change of a weight, over its matrix's RMS
    trial: int = 10  # each learning rate is tried for one part in so many of the steps
    checks: int = 8  # times that the held-out error is looked at
    seed: int = 0


@dataclass(frozen=True)
class _State:
    """Weights in fp32, and their held-out error as stored."""

    tensors: Tensors
    error: float
    steps: int = 0


class _Task:
    """One layer's fit: what all of its descents share."""

    def __init__(
        self,
        spec: MLASpec,
        fit: Sequence[Batch],
        held_out: Sequence[Batch],
        stored: torch.dtype,
        options: RefineOptions,
    ) -> None:
        self.spec, self.stored, self.options = spec, stored, options
        self.fit, self.held_out = _owned(fit), _owned(held_out)
        self.scale = sum(y.square().mean().item() for _, y in self.fit) / len(self.fit) or 1.0

    def measured(self, tensors: Tensors, steps: int = 0) -> _State:
        rounded = {name: t.detach().to(self.stored).float() for name, t in tensors.items()}
        return _State(tensors, held_out_error(self.spec, rounded, self.held_out), steps)

    def output_fitted(self, state: _State) -> _State:
        """With o_proj in closed form, where that is better."""
        with torch.no_grad():
            fitted = self.measured(fit_output(self.spec, state.tensors, self.fit), state.steps)
        return min(state, fitted, key=_error)

    def descend(self, start: _State, learning_rate: float, steps: int, checks: int) -> _State:
        """Adam from `start` under a cosine schedule -> the best state at a check; ends once two in a row are worse."""
        weights = {name: t.clone().requires_grad_() for name, t in start.tensors.items()}
        groups = [{"params": [t], "lr": rate} for t, rate in relative_rates(weights, learning_rate)]
        rates = [rate for _, rate in relative_rates(weights, learning_rate)]
        optimiser = torch.optim.Adam(groups, betas=BETAS)
        generator = torch.Generator().manual_seed(self.options.seed)
        order: list[int] = []
        best, worse = start, 0
        description = f"  fitting, learning rate {learning_rate:g}"
        for step in tqdm(range(1, steps + 1), description, unit="step", leave=False, disable=None):
            if not order:
                order = torch.randperm(len(self.fit), generator=generator).tolist()
            x, target = self.fit[order.pop()]
            optimiser.zero_grad()
            loss = (mla_attention(self.spec, weights, x) - target).square().mean() / self.scale
            loss.backward()
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimiser.step()
            if step * checks // steps > (step - 1) * checks // steps:
                state = self.measured({name: t.detach().clone() for name, t in weights.items()}, step)
                worse = 0 if state.error < best.error else worse + 1
                if worse == 2:
                    break
                best = min(best, state, key=_error)
        return best


def refine_layer(
    spec: MLASpec,
    tensors: Mapping[str, Tensor],
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    stored: torch.dtype,
    options: RefineOptions,
) -> tuple[Tensors, dict[str, Any]]:
    """-> the layer's tensors in `stored`, and the record of it: relative errors on `held_out` before and after.

    The error is |converted - source| / |source|, as everywhere. Batches and tensors lie on one device.
    """
    with torch.inference_mode(False), torch.enable_grad():
        task = _Task(spec, fit, held_out, stored, options)
        given = task.measured({name: t.detach().float().clone() for name, t in tensors.items()})
        start = task.output_fitted(given)
        steps = max(options.passes * len(fit), options.min_steps)
        trials = {rate: task.descend(start, rate, max(1, steps // options.trial), 1) for rate in options.learning_rates}
        rate = min(trials, key=lambda rate: _error(trials[rate]))
        best = min(trials[rate], task.descend(start, rate, steps, options.checks), key=_error)
        best = task.output_fitted(best)
    record = {"error_before": given.error, "error_after": best.error, "learning_rate": rate, "steps": best.steps}
    return {name: t.to(stored) for name, t in best.tensors.items()}, record


def held_out_error(spec: MLASpec, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """|converted - source| / |source| over all batches."""
    error = norm = 0.0
    with torch.no_grad():
        for x, target in batches:
            error += (mla_attention(spec, tensors, x) - target).double().square().sum().item()
            norm += target.double().square().sum().item()
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def _error(state: _State) -> float:
    return math.inf if math.isnan(state.error) else state.error


def relative_rates(weights: Mapping[str, Tensor], learning_rate: float) -> list[tuple[Tensor, float]]:
    """Each tensor with `learning_rate` of the root mean square of its matrix; a bias is as a column of its weight."""
    matrices = (weights.get(name.replace(".bias", ".weight"), t) for name, t in weights.items())
    sizes = (float(matrix.detach().square().mean().sqrt()) for matrix in matrices)
    return [(t, learning_rate * size) for t, size in zip(weights.values(), sizes, strict=True)]


def _owned(batches: Sequence[Batch]) -> list[Batch]:
    """Copies that autograd may keep: what inference mode makes it may not."""
    return [(x.float().clone(), y.float().clone()) for x, y in batches]
