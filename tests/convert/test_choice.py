"""The choice among candidates: by KL as it is, or after a short refinement of the nearest."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from convert.choice import SHORTLIST, choose, trial
from convert.pipeline import Refinement
from convert.plan import Candidate


def entry(bare: list[float], refined: list[float]) -> list[Candidate]:
    return [Candidate({"bare": b, "refined": r}, (), ()) for b, r in zip(bare, refined, strict=True)]


class Bench:
    def __init__(self) -> None:
        self.rounds: list[tuple[bool, int]] = []

    def measure(self, group: list[Candidate], refinement: Refinement | None) -> list[Any]:
        self.rounds.append((refinement is not None, len(group)))
        key = "bare" if refinement is None else "refined"
        return [SimpleNamespace(kl=c.options[key], nll=c.options[key]) for c in group]


# The best of many after refinement is 0.1, of one that did not make the shortlist.
MANY = entry([float(i) for i in range(9)], [0.9, 0.8, 0.7, 0.3, 0.6, 0.5, 0.1, 0.1, 0.1])
FEW = entry([3.0, 1.0, 2.0], [0.1, 0.9, 0.5])


@pytest.mark.parametrize("refinement", [None, trial([[1, 2]], seed=0)])
def test_an_entry_of_one_or_none_is_not_measured(refinement: Refinement | None) -> None:
    bench, alone = Bench(), entry([1.0], [1.0])
    assert choose([[], alone], bench.measure, refinement) == [(None, []), (alone[0], [])]
    assert bench.rounds == []


def test_without_refinement_all_are_compared_at_once() -> None:
    bench = Bench()
    (many, tried), (few, _) = choose([MANY, FEW], bench.measure, None)
    assert (many, few) == (MANY[0], FEW[1])
    assert bench.rounds == [(False, 12)]
    assert [t.kl for t in tried] == [float(i) for i in range(9)]
    assert not any(t.refined for t in tried)


def test_of_many_the_nearest_are_refined() -> None:
    bench = Bench()
    (none, _), (many, tried), (few, tried_few) = choose([[], MANY, FEW], bench.measure, trial([[1, 2]], seed=0))
    assert none is None
    assert (many, few) == (MANY[3], FEW[0])
    assert bench.rounds == [(False, 9), (True, SHORTLIST + 3)]
    assert [t.refined for t in tried] == [True] * SHORTLIST + [False] * 3
    assert [t.kl for t in tried] == [0.9, 0.8, 0.7, 0.3, 0.6, 0.5, 6.0, 7.0, 8.0]
    assert [t.kl for t in tried_few] == [0.1, 0.9, 0.5]
    assert tried[0].perplexity == math.exp(0.9)
