"""A conversion from beginning to end: open, calibrate, choose among candidates, convert, measure, write.

Invariant: the output folder appears whole or not at all, and an earlier one stands until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import calibration
from convert.calibration import Calibration
from convert.errors import ConversionError
from convert.memory import weight_bytes
from convert.pipeline import Precision, sweep
from convert.plan import Candidate, MethodRequest, candidates
from engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from engine.model.load import DTYPES, resolve_device
from engine.spec import LayerSpec, MLASpec, ModelSpec

CALIBRATION_TOKENS = 32768  # 128 windows of 256, as TransMLA has it
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
    seed: int = 0
    overwrite: bool = False


@torch.inference_mode()
def convert(request: ConversionRequest) -> dict[str, Any]:
    """Convert and write; -> what conversion.json says, and sizes. Raises EngineError, having written nothing."""
    source = open_checkpoint(request.source)
    tried = candidates(source.spec, request.method)
    precision = Precision(resolve_device(request.device), _stored_dtype(request.dtype, source))
    spec = replace(source.spec, dtype=str(precision.stored).removeprefix("torch."))
    tokens = _calibration_tokens(request)
    with CheckpointWriter(request.out, spec, source, overwrite=request.overwrite) as writer:
        writer.add_outer(source.outer())
        text = _calibrate(request, source, tokens)
        best, trials = _choose(source, text, tried, precision)
        layers: list[LayerSpec] = []
        errors: list[float] = []

        def sink(layer: LayerSpec, tensors: Mapping[str, Tensor], error: float) -> None:
            writer.add_layer(len(layers), tensors, layer)
            layers.append(layer)
            errors.append(error)

        result = sweep(source, text.fit, text.check, [best], precision, sink)[0]
        spec = replace(spec, layers=tuple(layers))
        conversion = {
            "source": source.path.resolve().name,
            "method": request.method.method,
            "options": {**asdict(request.method), **best.options, "dtype": spec.dtype, "seed": request.seed},
            "trials": trials,
            "calibration": text.record,
            "warnings": _warnings(text, source),
            "quality": {**result.report(), "tokens": result.tokens, "attention_errors": errors},
            "layers": [_sizes(layer) for layer in layers],
            "cache_bytes_per_token": _cache_bytes(spec),
            "source_cache_bytes_per_token": _cache_bytes(source.spec),
            "versions": {"torch": str(torch.__version__), "mla-server": _version()},
        }
        writer.finish(conversion)
    return conversion | {
        "out": str(request.out),
        "weight_bytes": weight_bytes(spec),
        "source_weight_bytes": weight_bytes(source.spec),
    }


def _choose(
    source: Checkpoint, text: Calibration, tried: list[Candidate], precision: Precision
) -> tuple[Candidate, list[dict[str, Any]]]:
    """-> the candidate nearest to the source on the text kept for choosing, and what was found for each."""
    if len(tried) == 1:
        return tried[0], []
    results = sweep(source, text.fit, text.select, tried, precision, description=f"choosing among {len(tried)}")
    trials = [
        {**c.options, "kl": r.kl, "perplexity": r.report()["perplexity"]} for c, r in zip(tried, results, strict=True)
    ]
    return tried[min(range(len(tried)), key=lambda i: results[i].kl)], trials


def _calibrate(request: ConversionRequest, source: Checkpoint, tokens: int) -> Calibration:
    if request.calibration_files:
        return calibration.from_files(source, request.calibration_files, tokens, request.seed)
    return calibration.from_model(source, tokens, request.seed, request.device)


def _calibration_tokens(request: ConversionRequest) -> int:
    if request.calibration_tokens is None:
        return EXACT_TOKENS if request.method.method == "exact" else CALIBRATION_TOKENS
    if request.calibration_tokens < calibration.MIN_TOKENS:
        raise ConversionError(
            f"--calibration-tokens {request.calibration_tokens} is too few: give at least {calibration.MIN_TOKENS}"
        )
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


def _version() -> str:
    try:
        return version("mla-server")
    except PackageNotFoundError:  # run from a source tree
        return "uninstalled"
