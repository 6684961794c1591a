"""Which of several candidates to convert by: the one that comes nearest to the source on text kept for choosing.

Where the model is to be refined, candidates are compared after a short refinement, since the best before any is often
not the best after it (docs/conversion.md). Of many only those that are nearest without it get one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from convert.pipeline import Refinement, Windows
from convert.plan import Candidate
from convert.quality import Comparison
from convert.refine import RefineOptions

SHORTLIST = 6  # candidates that get a short refinement
# So little tells already where a candidate will stand in the end.
TRIAL = RefineOptions(learning_rates=(0.004,), passes=1, min_steps=16, checks=1)

# Candidates, and how all are refined, if they are -> how each compares with the source.
Measure = Callable[[list[Candidate], Refinement | None], list[Comparison]]


@dataclass(frozen=True)
class Tried:
    """What was found for one candidate, in its last round."""

    kl: float
    perplexity: float
    refined: bool


def trial(held_out: Windows, seed: int) -> Refinement:
    return Refinement(held_out, replace(TRIAL, seed=seed))


def choose(
    entries: Sequence[Sequence[Candidate]], measure: Measure, refinement: Refinement | None
) -> list[tuple[Candidate | None, list[Tried]]]:
    """-> of each entry the candidate with the least KL, None where there is none, and what was found for all of them:
    nothing for a single one. `refinement`: `trial`'s, or None where the model is not to be refined."""
    bare = 1 if refinement is None else SHORTLIST  # entries longer than this are compared without refinement
    found = _measured([range(len(entry)) if len(entry) > bare else () for entry in entries], entries, measure, None)
    if refinement is not None:
        shortlists = [
            sorted(tried, key=lambda i: tried[i].kl)[:SHORTLIST]
            if tried
            else range(len(entry) if len(entry) > 1 else 0)
            for entry, tried in zip(entries, found, strict=True)
        ]
        refined = _measured(shortlists, entries, measure, refinement)
        found = [before | after for before, after in zip(found, refined, strict=True)]
    return [_best(entry, tried, refinement is not None) for entry, tried in zip(entries, found, strict=True)]


def _best(entry: Sequence[Candidate], tried: dict[int, Tried], refined: bool) -> tuple[Candidate | None, list[Tried]]:
    if len(entry) <= 1:
        return (entry[0] if entry else None), []
    last = [i for i in tried if tried[i].refined == refined]
    return entry[min(last, key=lambda i: tried[i].kl)], [tried[i] for i in range(len(entry))]


def _measured(
    wanted: Sequence[Sequence[int]],
    entries: Sequence[Sequence[Candidate]],
    measure: Measure,
    refinement: Refinement | None,
) -> list[dict[int, Tried]]:
    """Of each entry those that are wanted, all in one go; each takes its own results off the row."""
    group = [entry[i] for entry, numbers in zip(entries, wanted, strict=True) for i in numbers]
    results = iter(measure(group, refinement) if group else [])
    return [
        {
            i: Tried(found.kl, math.exp(found.nll), refinement is not None)
            for i, found in zip(numbers, results, strict=False)
        }
        for numbers in wanted
    ]
