"""`convert compare`: several methods at several cache sizes, each at its best options, against the source on one text.

Options are chosen on held-out calibration text and results measured on another text, which must be another. Nothing is
written but the report. All conversions ride on the same passes over the source's layers: one before any for methods
that share out a budget, one to choose, one to measure; refined conversions have their own of the last two. A pass
carries at most GROUP_BYTES of activations.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from convert import calibration
from convert.calibration import Calibration
from convert.choice import choose, trial
from convert.conversion import CALIBRATION_TOKENS
from convert.errors import ConversionError
from convert.evaluate import EvaluationText, evaluation_text
from convert.joint import JointOptions, Staged, check_joint, jointly_refined
from convert.pipeline import Precision, Refinement, Windows, sweep
from convert.plan import Allocation, Candidate, MethodRequest, candidates
from convert.quality import Comparison
from convert.refine import RefineOptions
from convert.survey import settle
from convert.text import read_text
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.model.load import DTYPES, resolve_device

METHODS = ("score-aware", "transmla", "mha2mla", "care")  # compared where none are named
CACHE_RATIOS = (1.0, 0.5, 0.25, 0.125)
GROUP_BYTES = 4 << 30

_Result = tuple[Candidate, Comparison]

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class CompareRequest:
    source: Path
    text: Path  # to measure on
    methods: tuple[str, ...] = METHODS
    cache_ratios: tuple[float, ...] = CACHE_RATIOS
    calibration_files: tuple[Path, ...] = ()  # none: the source model writes its own
    calibration_tokens: int = CALIBRATION_TOKENS
    window: int | None = None  # None: the context, at most evaluate.DEFAULT_WINDOW
    device: str | None = None
    refine: tuple[str, ...] = ("none",)  # of conversion.REFINEMENTS; each method is measured after each
    seed: int = 0


@dataclass(frozen=True)
class _Entry:
    """One row to be: a method at a cache ratio."""

    method: str
    ratio: float
    ways: list[Candidate | Allocation]  # none where the method cannot make that ratio
    error: str | None


@torch.inference_mode()
def compare(request: CompareRequest) -> dict[str, Any]:
    """-> the report, as it is printed and written. Raises EngineError where nothing can be compared."""
    source = open_checkpoint(request.source)
    calibration.check_tokens(request.calibration_tokens)
    if "joint" in request.refine:
        check_joint(source.spec)
    _check_texts_differ(request)
    text = evaluation_text(source, request.text, request.window)
    precision = Precision(resolve_device(request.device), DTYPES[source.spec.dtype])
    entries = [_entry(source, method, ratio) for ratio in request.cache_ratios for method in request.methods]
    if not any(entry.ways for entry in entries):
        raise ConversionError("; ".join(dict.fromkeys(entry.error for entry in entries if entry.error is not None)))
    run = _Run(request, source, _calibrate(request, source), text, precision)
    settled = iter(settle(source, run.calibrated.fit, [way for entry in entries for way in entry.ways], precision))
    tried = [[next(settled) for _ in entry.ways] for entry in entries]
    bare = run.results(tried, [refine for refine in request.refine if refine == "none"])
    refined = run.results(tried, [refine for refine in request.refine if refine != "none"])
    rows = [
        run.row(entry, refine, (results | others).get(refine))
        for entry, results, others in zip(entries, bare, refined, strict=True)
        for refine in request.refine
    ]
    return {
        "model": source.path.resolve().name,
        "text": str(request.text),
        "calibration": run.calibrated.record,
        "dtype": source.spec.dtype,
        "seed": request.seed,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": str(torch.__version__)},
        "rows": rows,
    }


def _entry(source: Checkpoint, method: str, ratio: float) -> _Entry:
    try:
        return _Entry(method, ratio, candidates(source.spec, MethodRequest(method, cache_ratio=ratio)), None)
    except ConversionError as error:
        return _Entry(method, ratio, [], str(error))


@dataclass(frozen=True)
class _Run:
    """What all conversions of a comparison share."""

    request: CompareRequest
    source: Checkpoint
    calibrated: Calibration
    text: EvaluationText
    precision: Precision

    def results(self, tried: Sequence[Sequence[Candidate]], wanted: Sequence[str]) -> list[dict[str, _Result]]:
        """Of each entry's candidates the best, measured after each of the refinements `wanted`: all of them or none of
        them "none", since what is best differs. Nothing for an entry without candidates."""
        if not wanted:
            return [{} for _ in tried]
        refinement = None if "none" in wanted else trial(self.calibrated.select, self.request.seed)
        chosen = [candidate for candidate, _ in choose(tried, self.compared, refinement)]
        able = [candidate for candidate in chosen if candidate]
        measured = iter(self.grouped(able, self.text.windows, partial(self.measured, wanted)))
        return [
            {refine: (candidate, found) for refine, found in next(measured).items()} if candidate else {}
            for candidate in chosen
        ]

    def compared(self, tried: list[Candidate], refinement: Refinement | None) -> list[Comparison]:
        """On the text kept for choosing: a choice's Measure."""
        text, description = self.calibrated, f"choosing among {len(tried)}"

        def compared(group: Sequence[Candidate]) -> list[Comparison]:
            return sweep(
                self.source, text.fit, text.select, group, self.precision,
                description=description, refinement=refinement, fit_outputs=False,
            )  # fmt: skip

        return self.grouped(tried, text.select, compared)

    def measured(self, wanted: Sequence[str], group: Sequence[Candidate]) -> list[dict[str, Comparison]]:
        """Each candidate on the text that is reported."""
        fit, select, seed = self.calibrated.fit, self.calibrated.select, self.request.seed
        measuring = partial(sweep, self.source, fit, self.text.windows)
        if "none" in wanted:
            return [{"none": found} for found in measuring(group, self.precision, description="measuring")]
        staged = Staged() if "joint" in wanted else None
        refinement = Refinement(select, RefineOptions(seed=seed))
        layer = measuring(group, self.precision, staged, description="refining", refinement=refinement)
        results = [{"layer": found} for found in layer]
        if staged is not None:
            options = JointOptions(seed=seed)
            joint = [
                jointly_refined(self.source, c, staged.layers[i], fit, select, self.precision, options)[0]
                for i, c in enumerate(group)
            ]
            for result, found in zip(results, measuring(joint, self.precision, description="measuring"), strict=True):
                result["joint"] = found
        return results

    def grouped(
        self, tried: Sequence[Candidate], check: Windows, how: Callable[[Sequence[Candidate]], list[Measured]]
    ) -> list[Measured]:
        """`how` of the candidates in groups, of which the activations over `check` fit GROUP_BYTES."""
        each = sum(map(len, check)) * self.source.spec.hidden_size * self.precision.compute.itemsize
        size = max(1, GROUP_BYTES // each)
        groups = [tried[start : start + size] for start in range(0, len(tried), size)]
        return [measured for group in groups for measured in how(group)]

    def row(self, entry: _Entry, refine: str, result: _Result | None) -> dict[str, Any]:
        asked = {"method": entry.method, "cache_ratio": entry.ratio, "refine": refine}
        if result is None:
            return asked | {"error": entry.error}
        candidate, comparison = result
        itemsize = self.precision.stored.itemsize
        return {
            **asked,
            "model": None,  # nothing is written
            "reference": str(self.request.source),
            **self.text.measured(comparison),
            "cache_bytes_per_token": itemsize * sum(map(sum, candidate.cached)),
            "reference_cache_bytes_per_token": self.source.spec.cache_bytes_per_token(itemsize),
            "options": candidate.options,
            "layers": [{"kv_lora_rank": rank, "rope_width": rope} for rank, rope in candidate.cached],
        }


def _calibrate(request: CompareRequest, source: Checkpoint) -> Calibration:
    if request.calibration_files:
        return calibration.from_files(source, request.calibration_files, request.calibration_tokens, request.seed)
    return calibration.from_model(source, request.calibration_tokens, request.seed, request.device)


def _check_texts_differ(request: CompareRequest) -> None:
    wanted = read_text(request.text).strip()
    for path in request.calibration_files:
        if path.resolve() == request.text.resolve() or read_text(path).strip() == wanted:
            raise ConversionError(
                f"--calibration {path} and --text {request.text} are the same text: a comparison is measured on text "
                "that no method was calibrated on; give another file"
            )
