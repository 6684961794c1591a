"""What a model takes on paper, from its config.json alone: weights, cache, and the tokens that fit on GPUs.

    python -m engine.inspect --model DIR_OR_CONFIG [MORE ...] [--table] [--json FILE]

On one GPU the figures are this engine's. For several they assume tensor parallelism: weights divided evenly, KV heads
of GQA divided as far as they go, and the latent of MLA, which every head reads, whole on each GPU. Of each GPU's
memory 90 % is taken for weights and cache, as EngineConfig has it; the work space of a step comes out of the rest.
They are GPUs with FP8 (H100, H200), on which weights that are stored in it stay so; elsewhere, on A100s for one, these
are multiplied out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.checkpoint.checkpoint import read_config
from engine.checkpoint.fp8 import read_fp8_block
from engine.checkpoint.json_file import read_json_object
from engine.checkpoint.layout import expected_tensors, layer_tensors
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.kernels.fp8_linear import BLOCK
from engine.kernels.moe import rows_per_scale
from engine.model.fp8_weights import CAPABILITY as FP8_CAPABILITY
from engine.model.fp8_weights import staying_fp8
from engine.model.load import DTYPES, ROUTER
from engine.spec import AttentionSpec, GQASpec, ModelSpec, MoESpec

GPUS = ((1, 80), (1, 141), (8, 80), (8, 141))  # how many, and the memory of each in GB, 10^9 bytes


@dataclass(frozen=True)
class Fit:
    """So many GPUs of so much memory: what each of them holds, and for how many tokens there is room."""

    gpus: int
    gpu_gigabytes: int
    weight_bytes_per_gpu: int
    cache_bytes_per_token_per_gpu: int
    tokens: int | None  # None: not even the weights fit


@dataclass(frozen=True)
class Conversion:
    """What conversion.json says of the model's source."""

    source: str
    source_cache_bytes_per_token: int
    cache_ratio: float


@dataclass(frozen=True)
class Report:
    """The keys of the JSON output; bytes and tokens are exact for what is assumed."""

    model: str
    config: str | None  # where the config was taken from, if it says so under "_source"
    attention: str  # "mla" or "gqa"
    layers: int
    moe_layers: int
    parameters: int
    active_parameters: int  # that a token meets: neither experts it does not choose nor, unless tied, the embedding
    max_position_embeddings: int
    stored_dtype: str  # "float8_e4m3fn": that of the projections; the rest is in `dtype`
    stored_weight_bytes: int
    dtype: str  # of the cache and, but for those that stay FP8, of the weights once loaded
    weight_bytes: int  # once loaded, on a GPU with FP8
    weight_bytes_without_fp8: int  # once loaded elsewhere; the same unless stored_dtype is FP8
    cache_bytes_per_token: int
    conversion: Conversion | None
    fits: tuple[Fit, ...]


def inspect(path: Path) -> Report:
    """`path`: a model's folder, or a config.json by any name. Raises CheckpointError."""
    spec, config = read_config(path / "config.json" if path.is_dir() else path)
    shapes = expected_tensors(spec)
    parameters = sum(map(math.prod, shapes.values()))
    unused = sum(
        (m.num_experts - m.experts_per_token) * 3 * m.intermediate_size * spec.hidden_size for m in _mixtures(spec)
    )
    size = DTYPES[spec.dtype].itemsize
    router = sum(math.prod(shape) for name, shape in shapes.items() if f".{ROUTER}" in name)
    multiplied_out = parameters * size + router * (4 - size)  # routers compute in fp32
    quantized = bool(config.get("quantization_config"))
    weight_bytes = multiplied_out - (_saved_by_fp8(spec, read_fp8_block(config), size) if quantized else 0)
    return Report(
        model=path.resolve().name.removesuffix(".json"),
        config=config.get("_source"),
        attention=spec.attention_kind,
        layers=len(spec.layers),
        moe_layers=sum(1 for _ in _mixtures(spec)),
        parameters=parameters,
        active_parameters=parameters - unused - (0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size),
        max_position_embeddings=spec.max_position_embeddings,
        stored_dtype="float8_e4m3fn" if quantized else spec.dtype,
        stored_weight_bytes=_stored_fp8_bytes(shapes, read_fp8_block(config), size) if quantized else parameters * size,
        dtype=spec.dtype,
        weight_bytes=weight_bytes,
        weight_bytes_without_fp8=multiplied_out,
        cache_bytes_per_token=spec.cache_bytes_per_token(size),
        conversion=_conversion(path, spec.cache_bytes_per_token(size)),
        fits=tuple(_fit(spec, weight_bytes, gpus, gigabytes) for gpus, gigabytes in GPUS),
    )


def _mixtures(spec: ModelSpec) -> Iterator[MoESpec]:
    return (layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec))


def _stored_fp8_bytes(shapes: dict[str, tuple[int, ...]], block: tuple[int, ...], size: int) -> int:
    """The layers' projections but for routers take a byte each and an fp32 scale a block; the rest is as it is."""
    total = 0
    for name, shape in shapes.items():
        if ".layers." in name and _is_projection(name, shape):
            total += math.prod(shape) + 4 * math.prod(-(-n // b) for n, b in zip(shape, block, strict=True))
        else:
            total += math.prod(shape) * size
    return total


def _is_projection(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and ROUTER not in name


def _saved_by_fp8(spec: ModelSpec, block: tuple[int, ...], size: int) -> int:
    """Bytes by which the projections that stay FP8 take less, with their scales, than multiplied out."""
    saved = 0
    for layer in spec.layers:
        shapes = layer_tensors(layer, spec.hidden_size)
        stored = [name for name, shape in shapes.items() if _is_projection(name, shape)]
        for name in staying_fp8(stored, shapes, block, FP8_CAPABILITY):
            rows, columns = shapes[name]
            if ".experts." in name:  # whose scales serve groups of rows
                rows = -(-rows // (BLOCK if ".down_proj." in name else rows_per_scale(rows)))
            saved += math.prod(shapes[name]) * (size - 1) - 4 * rows * -(-columns // BLOCK)
    return saved


def _fit(spec: ModelSpec, weight_bytes: int, gpus: int, gigabytes: int) -> Fit:
    size = DTYPES[spec.dtype].itemsize
    cache = size * sum(_cache_width(layer.attention, gpus) for layer in spec.layers)
    weights = -(-weight_bytes // gpus)
    room = int(EngineConfig().memory_fraction * gigabytes * 10**9) - weights
    return Fit(gpus, gigabytes, weights, cache, room // cache if room >= 0 else None)


def _cache_width(attention: AttentionSpec, gpus: int) -> int:
    """Numbers that one GPU caches for a token: all of a latent, its share of KV heads."""
    if isinstance(attention, GQASpec):
        return 2 * -(-attention.num_kv_heads // gpus) * attention.head_dim
    return attention.cache_width


def _conversion(path: Path, cache_bytes: int) -> Conversion | None:
    if not (path / "conversion.json").is_file():
        return None
    record = read_json_object(path / "conversion.json")
    source, before = record.get("source"), record.get("source_cache_bytes_per_token")
    if not isinstance(source, str) or not isinstance(before, int) or before < 1:
        return None  # for people and reports: whatever it says, the model is what config.json says
    return Conversion(source, before, cache_bytes / before)


def text(report: Report) -> str:
    """For one model, as lines."""
    experts = f", {report.moe_layers} with experts" if report.moe_layers else ""
    lines = [
        f"{report.model}: {report.layers} {report.attention.upper()} layers{experts}, "
        f"up to {report.max_position_embeddings:,} tokens",
        f"parameters              {_billions(report.parameters)}, {_billions(report.active_parameters)} for a token",
        f"weights as stored       {_gigabytes(report.stored_weight_bytes)} ({report.stored_dtype})",
        f"weights as loaded       {_gigabytes(report.weight_bytes)} ({_loaded_as(report)})",
        f"cache bytes per token   {report.cache_bytes_per_token:,}",
    ]
    if (conversion := report.conversion) is not None:
        lines.append(
            f"    of the source's     {conversion.source_cache_bytes_per_token:,} ({conversion.source}): "
            f"{conversion.cache_ratio:.1%}"
        )
    lines.append("GPUs            weights each   cache bytes per token each   tokens that fit")
    for fit in report.fits:
        name = f"{fit.gpus} of {fit.gpu_gigabytes} GB"
        tokens = "the weights do not" if fit.tokens is None else f"{fit.tokens:,}"
        weights = _gigabytes(fit.weight_bytes_per_gpu)
        lines.append(f"{name:15} {weights:>12}   {fit.cache_bytes_per_token_per_gpu:>26,}   {tokens:>18}")
    return "\n".join(lines)


def _loaded_as(report: Report) -> str:
    if report.weight_bytes == report.weight_bytes_without_fp8:
        return report.dtype
    elsewhere = f"{_gigabytes(report.weight_bytes_without_fp8)} in {report.dtype} elsewhere"
    return f"{report.stored_dtype} on a GPU that has it, {elsewhere}"


def table(reports: list[Report]) -> str:
    """For many models, as a table in Markdown."""
    head = ["model", "attention", "parameters", "for a token", "stored", "loaded", "without FP8"]
    head += ["cache bytes per token", f"on each of {GPUS[-1][0]} GPUs"]
    head += [f"{gpus} x {gigabytes} GB" for gpus, gigabytes in GPUS]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for r in reports:
        fits = ["–" if fit.tokens is None else f"{fit.tokens:,}" for fit in r.fits]
        weights = (r.stored_weight_bytes, r.weight_bytes, r.weight_bytes_without_fp8)
        cache = (r.cache_bytes_per_token, r.fits[-1].cache_bytes_per_token_per_gpu)
        sizes = [*map(_gigabytes, weights), *(f"{count:,}" for count in cache)]
        rows.append(
            [r.model, r.attention.upper(), _billions(r.parameters), _billions(r.active_parameters), *sizes, *fits]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _billions(count: int) -> str:
    return f"{count / 1e9:.4g} B" if count >= 1e9 else f"{count / 1e6:.4g} M"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.4g} GB" if count >= 1e9 else f"{count / 1e6:.4g} MB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders, or files like config.json")
    parser.add_argument("--table", action="store_true", help="a table in Markdown, a row for each model")
    parser.add_argument("--json", type=Path, help="write the figures there: a list, an object for each model")
    options = parser.parse_args(arguments)
    try:
        reports = [inspect(path) for path in options.model]
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(reports) if options.table else "\n\n".join(map(text, reports)))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
