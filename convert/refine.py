"""Layer-wise refinement: all attention weights of one converted layer, fitted to what its source layer puts out.

Least squares on calibration text, no gradient through any other layer, no training of the model as a whole. The output
projection is fitted in closed form; then Adam fits all weights together; then o_proj again. The text is the caller's:
batches to fit on, and others, held out, that choose the learning rate and where to stop.

Invariant: a pure function of its arguments, the seed included; and what it returns is on the held-out batches no worse
than what it was given. Both are rounded as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.descent import DescentOptions, State, Tensors, by_error, descend
from convert.differentiable import mla_attention
from convert.output_fit import fit_output
from engine.spec import MLASpec

# Normed inputs of the layer and what its attention should put out, both [windows, length, hidden]: one step's worth.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RefineOptions(DescentOptions):
    learning_rates: tuple[float, ...] = (0.02, 0.01, 0.004, 0.0015)
    passes: int = 16  # over the text, at least min_steps steps in all
    min_steps: int = 100


class _LayerFit:
    """One layer's fit, as a problem to descend."""

    def __init__(self, spec: MLASpec, fit: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        self.spec = spec
        self.examples, self.held_out = fit, held_out
        self.scale = sum(y.square().mean().item() for _, y in self.examples) / len(self.examples) or 1.0

    def loss(self, tensors: Tensors, example: Batch) -> Tensor:
        x, target = example
        return (mla_attention(self.spec, tensors, x) - target).square().mean() / self.scale

    def error(self, tensors: Tensors) -> float:
        return held_out_error(self.spec, _widened(tensors), self.held_out)

    def output_fitted(self, state: State) -> State:
        """With o_proj in closed form, where that is better."""
        with torch.no_grad():
            fitted = fit_output(self.spec, _widened(state.tensors), self.examples)
            tensors = {n: fitted[n].to(t.dtype) if n.startswith("o_proj.") else t for n, t in state.tensors.items()}
            del fitted  # before the error is measured
            return min(state, State(tensors, self.error(tensors), state.steps), key=by_error)


def refine_layer(
    spec: MLASpec,
    tensors: Mapping[str, Tensor],
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    options: RefineOptions,
) -> tuple[Tensors, dict[str, Any]]:
    """tensors: as they are stored -> those of the refined layer, in the same dtypes, and the record of it: relative
    errors on `held_out` before and after.

    The error is |converted - source| / |source|, as everywhere. Batches and tensors lie on one device, the batches in
    fp32 and, since autograd keeps them, not made in inference mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        problem = _LayerFit(spec, fit, held_out)
        given = State(dict(tensors), problem.error(dict(tensors)))
        steps = max(options.passes * len(fit), options.min_steps)
        best, rate = descend(problem, problem.output_fitted(given), steps, options)
        best = problem.output_fitted(best)
    record = {"error_before": given.error, "error_after": best.error, "learning_rate": rate, "steps": best.steps}
    return best.tensors, record


def _widened(tensors: Tensors) -> Tensors:
    return {name: t.float() for name, t in tensors.items()}


def held_out_error(spec: MLASpec, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """|converted - source| / |source| over all batches."""
    error = norm = 0.0
    with torch.no_grad():
        for x, target in batches:
            error += (mla_attention(spec, tensors, x) - target).double().square().sum().item()
            norm += target.double().square().sum().item()
    return math.sqrt(error / norm) if norm else math.sqrt(error)
