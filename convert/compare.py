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
    refine: tuple[str, ...] = ("none",)  # of conversion.REFINEMENTS; what every method gives is measured after each
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
    chosen = _choose(source, calibrated, entries, precision)
    able = [candidate for candidate in chosen if candidate]
    measuring = partial(_measure, source, calibrated, text.windows, precision=precision, request=request)
    measured = iter(_grouped(able, text.windows, source, precision, measuring))
    rows = [
        _row(request, source, entry, refine, candidate, text, found.get(refine), precision)
        for entry, candidate in zip(entries, chosen, strict=True)
        for found in [next(measured) if candidate else {}]
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


def _choose(
    source: Checkpoint, text: Calibration, entries: Sequence[_Entry], precision: Precision
) -> list[Candidate | None]:
    """Of each entry the candidate nearest to the source on the text kept for choosing; None where there is none."""
    settled = settle(source, text.fit, [way for entry in entries for way in entry.ways], precision)
    several = [len(entry.ways) > 1 for entry in entries for _ in entry.ways]
    tried = [candidate for candidate, needed in zip(settled, several, strict=True) if needed]
    description = f"choosing among {len(tried)}"

    def choose(group: Sequence[Candidate]) -> list[Comparison]:
        return sweep(source, text.fit, text.select, group, precision, description=description, fit_outputs=False)

    found = iter(_grouped(tried, text.select, source, precision, choose))
    losses = [next(found).kl if needed else 0.0 for needed in several]
    chosen: list[Candidate | None] = []
    start = 0
    for entry in entries:
        own = range(start, start := start + len(entry.ways))
        chosen.append(settled[min(own, key=losses.__getitem__)] if own else None)
    return chosen


def _measure(
    source: Checkpoint,
    calibrated: Calibration,
    text: Windows,
    group: Sequence[Candidate],
    precision: Precision,
    request: CompareRequest,
) -> list[dict[str, Comparison]]:
    """Each candidate on `text` after every kind of refinement that was asked for."""
    measuring = partial(sweep, source, calibrated.fit, text)
    found: dict[str, list[Comparison]] = {}
    if "none" in request.refine:
        found["none"] = measuring(group, precision, description="measuring")
    if "layer" in request.refine or "joint" in request.refine:
        refinement = Refinement(calibrated.select, RefineOptions(seed=request.seed))
        staged = Staged() if "joint" in request.refine else None
        found["layer"] = measuring(group, precision, staged, description="refining", refinement=refinement)
        if staged is not None:
            options = JointOptions(seed=request.seed)
            joint = [
                jointly_refined(source, c, staged.layers[i], calibrated.fit, calibrated.select, precision, options)[0]
                for i, c in enumerate(group)
            ]
            found["joint"] = measuring(joint, precision, description="measuring")
    return [{refine: found[refine][i] for refine in found} for i in range(len(group))]


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
    candidate: Candidate | None,
    text: EvaluationText,
    comparison: Comparison | None,
    precision: Precision,
) -> dict[str, Any]:
    asked = {"method": entry.method, "cache_ratio": entry.ratio, "refine": refine}
    if candidate is None or comparison is None:
        return asked | {"error": entry.error}
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
