"""A conversion from beginning to end: open, calibrate, choose among candidates, convert, measure, write.

Invariant: the output folder appears whole or not at all, and an earlier one stands until then. Each costly step is kept
as soon as it is done (partial.py): the calibration text, the choice, each layer.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from convert import calibration
from convert.calibration import Calibration
from convert.choice import choose, trial
from convert.errors import ConversionError
from convert.export import check_exportable, export_folder, export_model
from convert.joint import JointOptions, Staged, check_joint, jointly_refined
from convert.layer_store import LayerStore, TrialStore, discard_trials
from convert.memory import peak_memory, weight_bytes
from convert.partial import EXPORT, PartialWork, folder_state, is_placed, partial_folder, partial_work, say, versions
from convert.pipeline import Precision, Refinement, sweep
from convert.plan import Allocation, Candidate, MethodRequest, candidates
from convert.quality import Comparison
from convert.refine import RefineOptions
from convert.survey import settle
from convert.text import read_text
from engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from engine.checkpoint.json_file import read_json_object
from engine.checkpoint.writer import check_output
from engine.model.load import DTYPES, dtype_name, resolve_device
from engine.spec import LayerSpec, MLASpec, ModelSpec

CALIBRATION_TOKENS = 65536  # more still pays; refinement takes as many more steps
CALIBRATION = "calibration"  # what it is kept under; nothing before it is costly
REFINEMENTS = {
    "layer": "fit each converted layer to its source layer's output, one by one",
    "joint": "then a few steps on all layers together, against the source's predictions (both models in memory)",
    "none": "write what the method gives",
}
EXACT_TOKENS = 2048  # an exact conversion learns nothing from the text; it is measured all the same


@dataclass(frozen=True)
class ConversionRequest:
    source: Path
    out: Path
    method: MethodRequest
    calibration_files: tuple[Path, ...] = ()  # none: the source model writes its own
    calibration_tokens: int | None = None
    dtype: str = "auto"  # of the weights written; "auto": the source's
    device: str | None = None
    refine: str = "layer"  # one of REFINEMENTS; an exact conversion is never refined
    seed: int = 0
    overwrite: bool = False
    export: str | None = None  # one of export.FORMATS: written as well, to `export_folder(out)`


@torch.inference_mode()
def convert(request: ConversionRequest) -> dict[str, Any]:
    """Convert and write, and export what was written; -> what conversion.json says, sizes, and the export's report.

    Raises EngineError. What an interrupted conversion had finished stays in `partial_folder(request.out)`; the same
    request goes on from there, to the same result bit by bit.
    """
    began = time.monotonic()
    source = open_checkpoint(request.source)
    if request.refine == "joint":
        check_joint(source.spec)
    ways = candidates(source.spec, request.method)
    precision = Precision(resolve_device(request.device), _stored_dtype(request.dtype, source))
    tokens = _calibration_tokens(request)
    fingerprint = request_fingerprint(request, source, precision)
    placed = is_placed(request.out, fingerprint)
    if not placed:
        check_output(request.out, source.path, request.overwrite)
    begun = placed and PartialWork(partial_folder(request.out)).read(EXPORT) is not None
    _check_export(request, source, precision, begun)
    with partial_work(request.out, fingerprint, CALIBRATION) as (work, differing):
        if differing:
            say(f"starting over: {work.folder} was begun with another {', '.join(differing)}")
        if not placed:
            text = _calibration(work, request, source, tokens)
            best, trials = _choice(work, request, source, text, ways, precision)
            _write(work, request, source, text, best, trials, precision)
        exported = _export(work, request, begun)
    return _report(request, source) | exported | {"seconds": time.monotonic() - began}


def _check_export(request: ConversionRequest, source: Checkpoint, precision: Precision, begun: bool) -> None:
    """Before any work. `begun`: by an earlier process, so that what is there may be what this request put there."""
    if request.export is not None:
        check_exportable(replace(source.spec, dtype=dtype_name(precision.stored)))
        if not begun:
            check_output(export_folder(request.out), source.path, request.overwrite)


def _export(work: PartialWork, request: ConversionRequest, begun: bool) -> dict[str, Any]:
    """While the partial work is there still: the same command after a kill finds the conversion done and exports it."""
    if request.export is None:
        return {}
    work.keep(EXPORT, request.export)
    target = export_folder(request.out)
    return {"export": export_model(request.out, target, overwrite=request.overwrite or begun)}


def _report(request: ConversionRequest, source: Checkpoint) -> dict[str, Any]:
    return read_json_object(request.out / "conversion.json") | {
        "out": str(request.out),
        "context": source.spec.max_position_embeddings,
        "weight_bytes": weight_bytes(open_checkpoint(request.out).spec),
        "source_weight_bytes": weight_bytes(source.spec),
        "peak_memory_bytes": peak_memory(),
    }


def request_fingerprint(request: ConversionRequest, source: Checkpoint, precision: Precision) -> dict[str, Any]:
    """All that decides what is written, as JSON. Raises ConversionError where a calibration file is no text."""
    said = asdict(request)
    for name in ("source", "out", "overwrite", "export", "calibration_files", "device"):
        del said[name]
    texts = [hashlib.sha256(read_text(path).encode()).hexdigest() for path in request.calibration_files]
    return {
        "source": str(source.path.resolve()),
        "state of the source": folder_state(source.path),
        "calibration text": texts,
        "device": str(precision.device),
        "version": versions(),
    } | json.loads(json.dumps({name.replace("_", " "): value for name, value in said.items()}))


def _calibration(work: PartialWork, request: ConversionRequest, source: Checkpoint, tokens: int) -> Calibration:
    if (kept := work.read(CALIBRATION)) is not None:
        say(f"continuing from {work.folder}")
        return Calibration(**kept)
    if request.calibration_files:
        text = calibration.from_files(source, request.calibration_files, tokens, request.seed)
    else:
        text = calibration.from_model(source, tokens, request.seed, request.device)
    work.keep(CALIBRATION, asdict(text))
    return text


def _choice(
    work: PartialWork,
    request: ConversionRequest,
    source: Checkpoint,
    text: Calibration,
    ways: list[Candidate | Allocation],
    precision: Precision,
) -> tuple[Candidate, list[dict[str, Any]]]:
    """-> the candidate nearest to the source on the text kept for choosing, and what was found for each."""
    if (kept := work.read("choice")) is not None:
        return settle(source, text.fit, [ways[kept["best"]]], precision)[0], kept["trials"]
    tried = settle(source, text.fit, ways, precision)
    spec = replace(source.spec, dtype=dtype_name(precision.stored))

    def measure(group: list[Candidate], refinement: Refinement | None) -> list[Comparison]:
        store = TrialStore(work, spec, len(group), "bare" if refinement is None else "refined")
        description = f"choosing among {len(group)}"
        return sweep(source, text.fit, text.select, group, precision, store, description, refinement, fit_outputs=False)

    refinement = trial(text.select, request.seed) if _refines(request) else None
    ((best, found),) = choose([tried], measure, refinement)
    assert best is not None  # there is a candidate
    trials = [{**candidate.options, **asdict(result)} for candidate, result in zip(tried, found, strict=False)]
    work.keep("choice", {"best": tried.index(best), "trials": trials})
    discard_trials(work)
    return best, trials


def _write(
    work: PartialWork,
    request: ConversionRequest,
    source: Checkpoint,
    text: Calibration,
    best: Candidate,
    trials: list[dict[str, Any]],
    precision: Precision,
) -> None:
    """Convert and write the layers that are not yet, measure the whole, and put it in its place."""
    spec = replace(source.spec, dtype=dtype_name(precision.stored))
    with CheckpointWriter(request.out, spec, source, overwrite=request.overwrite, work=work.folder) as writer:
        if not writer.has(None):
            writer.add_outer(source.outer())
        layers = LayerStore(work, writer, spec)
        refinement = Refinement(text.select, RefineOptions(seed=request.seed)) if _refines(request) else None
        refined: dict[str, Any] = {}
        if refinement is not None and request.refine == "joint":
            best, refined = _jointly(request, source, text, best, precision, refinement)
            refinement = None  # has taken place
        (result,) = sweep(source, text.fit, text.check, [best], precision, layers, refinement=refinement)
        if refinement is not None:
            refined = {"refinement": layers.measured("refinement")}
        others = {"dtype": spec.dtype, "seed": request.seed, "refine": request.refine if refined else "none"}
        record = {
            "source": source.path.resolve().name,
            "method": request.method.method,
            "options": asdict(request.method) | best.options | others,
            "trials": trials,
            "calibration": text.record,
            "warnings": _warnings(text, source),
            "quality": {
                **result.report(),
                "tokens": result.tokens,
                "attention_errors": layers.measured("attention_error"),
            },
            "refinement": None,
        }
        writer.finish(record | refined | _described(replace(spec, layers=layers.specs()), source.spec))


def _described(spec: ModelSpec, source: ModelSpec) -> dict[str, Any]:
    """What the converted model came to, and what made it."""
    return {
        "layers": [_sizes(layer) for layer in spec.layers],
        "cache_bytes_per_token": _cache_bytes(spec),
        "source_cache_bytes_per_token": _cache_bytes(source),
        "versions": versions(),
    }


def _refines(request: ConversionRequest) -> bool:
    """An exact conversion has nothing to gain."""
    return request.refine != "none" and request.method.method != "exact"


def _jointly(
    request: ConversionRequest,
    source: Checkpoint,
    text: Calibration,
    best: Candidate,
    precision: Precision,
    refinement: Refinement,
) -> tuple[Candidate, dict[str, Any]]:
    """Refine layer by layer, then jointly; -> the candidate whose layers are the result, and the records of both.

    Nothing is kept until it is done: an interrupted run does it again, to the same end.
    """
    staged = Staged()
    sweep(source, text.fit, text.check, [best], precision, staged, "refining", refinement=refinement)
    options = JointOptions(seed=request.seed)
    best, record = jointly_refined(source, best, staged.layers[0], text.fit, text.select, precision, options)
    return best, {"refinement": staged.records[0], "joint": record}


def _calibration_tokens(request: ConversionRequest) -> int:
    if request.calibration_tokens is None:
        return EXACT_TOKENS if request.method.method == "exact" else CALIBRATION_TOKENS
    calibration.check_tokens(request.calibration_tokens)
    return request.calibration_tokens


def _stored_dtype(dtype: str, source: Checkpoint) -> torch.dtype:
    name = source.spec.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConversionError(f"--dtype {name} is not known; there are: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _warnings(text: Calibration, source: Checkpoint) -> list[str]:
    width, tokens = max(layer.attention.cache_width for layer in source.spec.layers), text.record["tokens"]
    if tokens >= width:
        return []
    return [f"{tokens} calibration tokens cannot tell {width} dimensions of keys and values apart; give more text"]


def _sizes(layer: LayerSpec) -> dict[str, int]:
    attention = layer.attention
    assert isinstance(attention, MLASpec)  # a method makes nothing else
    return {"kv_lora_rank": attention.kv_lora_rank, "rope_width": attention.rope_width}


def _cache_bytes(spec: ModelSpec) -> int:
    return spec.cache_bytes_per_token(DTYPES[spec.dtype].itemsize)
