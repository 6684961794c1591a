"""`convert compare`: several methods at several cache sizes, each at its best options, against the source on one text.

Options are chosen on held-out calibration text and results measured on another text, which must be another. Nothing is
written but the report. All conversions ride on the same passes over the source's layers: one to choose, one to
measure, and one before them for methods that share out a budget; a pass carries at most GROUP_BYTES of activations.
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
BARE, REFINED = ("none",), ("layer", "joint")  # each with a choice of options of its own

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
    calibrated = _calibrate(request, source)
    settled = iter(settle(source, calibrated.fit, [way for entry in entries for way in entry.ways], precision))
    tried = [[next(settled) for _ in entry.ways] for entry in entries]
    found: list[dict[str, _Result]] = [{} for _ in entries]
    for kinds in (BARE, REFINED):
        if wanted := [refine for refine in request.refine if refine in kinds]:
            refinement = trial(calibrated.select, request.seed) if kinds == REFINED else None
            choosing = partial(_compared, source, calibrated, precision)
            chosen = [candidate for candidate, _ in choose(tried, choosing, refinement)]
            measuring = partial(
                _measure, source, calibrated, text.windows, precision=precision, refine=wanted, seed=request.seed
            )
            able = [candidate for candidate in chosen if candidate]
            measured = iter(_grouped(able, text.windows, source, precision, measuring))
            for results, candidate in zip(found, chosen, strict=True):
                if candidate is not None:
                    results |= {refine: (candidate, comparison) for refine, comparison in next(measured).items()}
    rows = [
        _row(request, source, entry, refine, results.get(refine), text, precision)
        for entry, results in zip(entries, found, strict=True)
        for refine in request.refine
    ]
    return {
        "model": source.path.resolve().name,
        "text": str(request.text),
        "calibration": calibrated.record,
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


def _compared(
    source: Checkpoint, text: Calibration, precision: Precision, tried: list[Candidate], refinement: Refinement | None
) -> list[Comparison]:
    """A choice's Measure."""

    def compared(group: Sequence[Candidate]) -> list[Comparison]:
        return sweep(
            source, text.fit, text.select, group, precision,
            description=f"choosing among {len(tried)}", refinement=refinement, fit_outputs=False,
        )  # fmt: skip

    return _grouped(tried, text.select, source, precision, compared)


def _measure(
    source: Checkpoint,
    calibrated: Calibration,
    text: Windows,
    group: Sequence[Candidate],
    precision: Precision,
    refine: Sequence[str],
    seed: int,
) -> list[dict[str, Comparison]]:
    """Each candidate on `text` after each refinement of `refine`, which has one of BARE or some of REFINED."""
    measuring = partial(sweep, source, calibrated.fit, text)
    found: dict[str, list[Comparison]] = {}
    if refine == list(BARE):
        found["none"] = measuring(group, precision, description="measuring")
    else:
        refinement = Refinement(calibrated.select, RefineOptions(seed=seed))
        staged = Staged() if "joint" in refine else None
        found["layer"] = measuring(group, precision, staged, description="refining", refinement=refinement)
        if staged is not None:
            options = JointOptions(seed=seed)
            joint = [
                jointly_refined(source, c, staged.layers[i], calibrated.fit, calibrated.select, precision, options)[0]
                for i, c in enumerate(group)
            ]
            found["joint"] = measuring(joint, precision, description="measuring")
    return [{kind: found[kind][i] for kind in refine} for i in range(len(group))]


def _grouped(
    tried: Sequence[Candidate],
    check: Windows,
    source: Checkpoint,
    precision: Precision,
    how: Callable[[Sequence[Candidate]], list[Measured]],
) -> list[Measured]:
    """`how` of the candidates in groups, of which the activations over `check` fit GROUP_BYTES."""
    each = sum(map(len, check)) * source.spec.hidden_size * precision.compute.itemsize
    size = max(1, GROUP_BYTES // each)
    groups = [tried[start : start + size] for start in range(0, len(tried), size)]
    return [measured for group in groups for measured in how(group)]


def _row(
    request: CompareRequest,
    source: Checkpoint,
    entry: _Entry,
    refine: str,
    result: _Result | None,
    text: EvaluationText,
    precision: Precision,
) -> dict[str, Any]:
    asked = {"method": entry.method, "cache_ratio": entry.ratio, "refine": refine}
    if result is None:
        return asked | {"error": entry.error}
    candidate, comparison = result
    itemsize = precision.stored.itemsize
    return {
        **asked,
        "model": None,  # nothing is written
        "reference": str(request.source),
        **text.measured(comparison),
        "cache_bytes_per_token": itemsize * sum(map(sum, candidate.cached)),
        "reference_cache_bytes_per_token": source.spec.cache_bytes_per_token(itemsize),
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
