"""Adam on some tensors, from where they stand: what refinement of one layer and of all of them together share.

Invariant: a pure function of the problem, the start and the options, the seed included; and what comes back has, on
text that the problem holds out, an error no larger than the start's. Learning rate and stopping are chosen by it.
Weights move in fp32, and what is measured and kept is rounded as the start is stored. In fp32 there are at most four of
each at a time: the weight, Adam's two moments, and its gradient or, while errors are measured, the rounded one widened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Tensors = dict[str, Tensor]
Example = TypeVar("Example")

BETAS = (0.9, 0.95)
WARM_UP = 0.1  # of the steps


class Problem(Protocol, Generic[Example]):
    @property
    def examples(self) -> Sequence[Example]:
        """To fit to: one is one step's worth."""

    def loss(self, tensors: Tensors, example: Example) -> Tensor:
        """Scalar, with gradients."""

    def error(self, tensors: Tensors) -> float:
        """On what is held out, with tensors as they are stored."""


@dataclass(frozen=True)
class State:
    """Tensors as they are stored, their error, and after how many steps it was reached."""

    tensors: Tensors
    error: float
    steps: int = 0


@dataclass(frozen=True)
class DescentOptions:
    learning_rates: tuple[float, ...]  # a step's change of a weight, over its matrix's RMS
    trial: int = 20  # each learning rate is tried for one part in so many of the steps, and at least MIN_TRIAL
    checks: int = 8  # times that the error is looked at
    seed: int = 0


MIN_TRIAL = 10


def descend(problem: Problem[Example], start: State, steps: int, options: DescentOptions) -> tuple[State, float]:
    """-> the best state found, and the learning rate taken: the one that short trials of all do best with.

    Where none of them gets below the start's error, the least.
    """
    trial = min(steps, max(MIN_TRIAL, steps // options.trial))
    best, best_rate = start, min(options.learning_rates)
    for rate in options.learning_rates if len(options.learning_rates) > 1 else ():
        found = _run(problem, start, rate, trial, 1, options.seed)
        if by_error(found) < by_error(best):
            best, best_rate = found, rate
    run = _run(problem, start, best_rate, steps, options.checks, options.seed)
    return min(best, run, key=by_error), best_rate


def by_error(state: State) -> float:
    return math.inf if math.isnan(state.error) else state.error


def _run(problem: Problem[Example], start: State, learning_rate: float, steps: int, checks: int, seed: int) -> State:
    """-> the best state at a check; ends once two in a row are worse."""
    weights = {name: t.to(torch.float32, copy=True).requires_grad_() for name, t in start.tensors.items()}
    rates = _relative_rates(weights, learning_rate)
    optimiser = torch.optim.Adam([{"params": [t]} for t in weights.values()], betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    best, worse = start, 0
    description = f"  fitting, learning rate {learning_rate:g}"
    for step in tqdm(range(1, steps + 1), description, unit="step", leave=False, disable=None):
        if not order:
            order = torch.randperm(len(problem.examples), generator=generator).tolist()
        problem.loss(weights, problem.examples[order.pop()]).backward()
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, steps)
        optimiser.step()
        optimiser.zero_grad()  # gradients are dropped, not zeroed
        if step * checks // steps > (step - 1) * checks // steps:
            rounded = {name: t.detach().to(start.tensors[name].dtype, copy=True) for name, t in weights.items()}
            error = problem.error(rounded)
            if error < by_error(best):
                best, worse = State(rounded, error, step), 0
            else:
                worse += 1
                if worse == 2:
                    break
    return best


def _schedule(step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ... over the largest: a linear warm-up, and half a cosine to nothing."""
    return min(1.0, step / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def _relative_rates(weights: Mapping[str, Tensor], learning_rate: float) -> list[float]:
    """`learning_rate` of the root mean square of each tensor's matrix; a bias is as a column of its weight."""
    matrices = (weights.get(name.replace(".bias", ".weight"), t) for name, t in weights.items())
    return [learning_rate * float(matrix.detach().square().mean().sqrt()) for matrix in matrices]
