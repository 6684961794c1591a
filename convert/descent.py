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
from torch.optim.adam import adam as adam_step
from tqdm import tqdm

from convert.memory import give_back

Tensors = dict[str, Tensor]
Example = TypeVar("Example")

BETAS = (0.9, 0.95)
EPSILON = 1e-8
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
    """-> the best state found with the learning rate that short trials of all do best with, and that rate.

    Where none of them gets below the start's error, the least. Of the trials no weights are kept.
    """
    trial = min(steps, max(MIN_TRIAL, steps // options.trial))

    def tried(rate: float) -> tuple[float, float]:
        return by_error(_run(problem, start, rate, trial, 1, options.seed)), rate

    rates = options.learning_rates
    rate = min(rates, key=tried) if len(rates) > 1 else rates[0]
    return _run(problem, start, rate, steps, options.checks, options.seed), rate


def by_error(state: State) -> float:
    return math.inf if math.isnan(state.error) else state.error


def _run(problem: Problem[Example], start: State, learning_rate: float, steps: int, checks: int, seed: int) -> State:
    """-> the best state at a check. Errors that rise at first are not the end of it: large steps come early, and what
    is gained shows when they shrink."""
    give_back()
    weights = {name: t.to(torch.float32, copy=True).requires_grad_() for name, t in start.tensors.items()}
    adam = _Adam(weights, learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    best = start
    description = f"  fitting, learning rate {learning_rate:g}"
    for step in tqdm(range(1, steps + 1), description, unit="step", leave=False, disable=None):
        if not order:
            order = torch.randperm(len(problem.examples), generator=generator).tolist()
        problem.loss(weights, problem.examples[order.pop()]).backward()
        adam.step(_schedule(step, steps))
        if step * checks // steps > (step - 1) * checks // steps:
            rounded = {name: t.detach().to(start.tensors[name].dtype, copy=True) for name, t in weights.items()}
            error = problem.error(rounded)
            if error < by_error(best):
                best = State(rounded, error, step)
            if not math.isfinite(error):
                break
    return best


class _Adam:
    """Adam (arXiv 1412.6980), with a learning rate for each tensor.

    torch.optim.Adam computes the same, but it loads torch's compiler, which takes 160 MB, and the first one of a
    process is not freed, moments and all, before Python looks for cycles.
    """

    def __init__(self, weights: Mapping[str, Tensor], learning_rate: float) -> None:
        rates = _relative_rates(weights, learning_rate)
        self._parts = [
            (t, torch.zeros_like(t), torch.zeros_like(t), torch.zeros((), device=t.device), rate)
            for t, rate in zip(weights.values(), rates, strict=True)
        ]

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """With `schedule` of the learning rates; takes the gradients away."""
        for t, mean, square, count, rate in self._parts:
            if t.grad is None:  # the loss does not depend on it
                continue
            adam_step(
                [t], [t.grad], [mean], [square], [], [count], fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
                lr=rate * schedule, weight_decay=0.0, eps=EPSILON, maximize=False,
            )  # fmt: skip
            t.grad = None


def _schedule(step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ... over the largest: a linear warm-up, and half a cosine to nothing."""
    return min(1.0, step / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def _relative_rates(weights: Mapping[str, Tensor], learning_rate: float) -> list[float]:
    """`learning_rate` of the root mean square of each tensor's matrix; a bias is as a column of its weight."""
    matrices = (weights.get(name.replace(".bias", ".weight"), t) for name, t in weights.items())
    return [learning_rate * float(matrix.detach().square().mean().sqrt()) for matrix in matrices]
