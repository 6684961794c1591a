"""Adam, and the choice of its learning rate, on problems whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from convert.descent import BETAS, DescentOptions, State, Tensors, _Adam, descend


class Nearest:
    """Weights are to become a target; what is held out may ask for another."""

    def __init__(self, target: Tensors, held_out: Tensors) -> None:
        self.examples: Sequence[Tensors] = [target]
        self.held_out = held_out

    def loss(self, tensors: Tensors, example: Tensors) -> Tensor:
        return torch.stack([(t - example[name]).square().mean() for name, t in tensors.items()]).sum()

    def error(self, tensors: Tensors) -> float:
        with torch.no_grad():
            return self.loss({name: t.float() for name, t in tensors.items()}, self.held_out).item()


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(4, 3, generator=generator).to(dtype) for name in "ab"}


def test_steps_are_those_of_torchs_adam() -> None:
    target = normal(1)
    own, theirs = ({name: t.clone().requires_grad_() for name, t in normal(0).items()} for _ in range(2))
    problem, adam = Nearest(target, target), _Adam(own, 0.1)
    rms = [0.1 * float(t.detach().square().mean().sqrt()) for t in theirs.values()]
    optimiser = torch.optim.Adam([{"params": [t]} for t in theirs.values()], betas=BETAS)
    for step in range(6):
        schedule = 1 / (1 + step)
        problem.loss(own, target).backward()  # type: ignore[no-untyped-call]
        adam.step(schedule)
        assert all(t.grad is None for t in own.values())
        optimiser.zero_grad()
        problem.loss(theirs, target).backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(optimiser.param_groups, rms, strict=True):
            group["lr"] = rate * schedule
        optimiser.step()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(own[name], normal(0)[name], atol=0.1)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_as_stored_and_so_is_its_error(stored: torch.dtype) -> None:
    problem = Nearest(normal(1), normal(1))
    start = State(normal(0, stored), problem.error(normal(0, stored)))
    best, rate = descend(problem, start, 60, DescentOptions(learning_rates=(0.001, 0.1)))
    assert rate == 0.1  # the other would take too long
    assert best.error == problem.error(best.tensors) < 0.1 * start.error
    assert {t.dtype for t in best.tensors.values()} == {stored}
    assert all(torch.equal(t, normal(0, stored)[name]) for name, t in start.tensors.items())


def test_where_every_step_leads_away_the_start_is_kept() -> None:
    problem = Nearest(normal(1), normal(0))
    start = State(normal(0), 0.0)
    best, rate = descend(problem, start, 20, DescentOptions(learning_rates=(0.1, 0.001)))
    assert best is start
    assert rate == 0.001


class Told(Nearest):
    """Its errors are told beforehand."""

    def __init__(self, errors: Sequence[float]) -> None:
        super().__init__(normal(1), normal(1))
        self.errors = list(errors)

    def error(self, tensors: Tensors) -> float:
        return self.errors.pop(0)


def test_errors_that_rise_at_first_are_not_the_end() -> None:
    problem = Told([2.0, 3.0, 3.0, 0.5])
    best, _ = descend(problem, State(normal(0), 1.0), 20, DescentOptions(learning_rates=(0.1,), checks=4))
    assert (best.error, best.steps) == (0.5, 20)


def test_errors_that_are_not_numbers_are() -> None:
    problem = Told([0.5, float("nan"), 0.1])
    best, _ = descend(problem, State(normal(0), 1.0), 30, DescentOptions(learning_rates=(0.1,), checks=3))
    assert (best.error, best.steps, problem.errors) == (0.5, 10, [0.1])
