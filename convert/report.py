"""What the commands print, and the JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.memory import conversations_that_fit

GPU_MEMORY = (24, 80)  # GiB
CONVERSATION = 8192  # tokens, or as many as the model's context has
METHOD_OPTIONS = ("freqfold", "basis", "ranks", "partial_rope", "svd")
WORST = 3  # layers the summary names


def check_json_target(path: Path | None) -> None:
    """Before the work is done: raises ConversionError where its report could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConversionError(f"--json {path}: cannot be written: name a file in a folder that exists")


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConversionError(f"--json {path}: cannot be written: {error.strerror}") from None


def conversion_summary(report: Mapping[str, Any], source: Path) -> str:
    """`report`: as `conversion.convert` gives it."""
    quality = report["quality"]
    ratio = report["cache_bytes_per_token"] / report["source_cache_bytes_per_token"]
    lines = _columns(
        [
            ("", "source", "converted"),
            ("perplexity", f"{quality['reference_perplexity']:.3f}", f"{quality['perplexity']:.3f}"),
            ("KL to the source, nats/token", "", f"{quality['kl']:.4g}"),
            ("same likeliest token", "", f"{quality['top1_agreement']:.1%}"),
            (
                "cache bytes per token",
                f"{report['source_cache_bytes_per_token']:,}",
                f"{report['cache_bytes_per_token']:,}",
            ),
            *(_fits(report, gib) for gib in GPU_MEMORY),
        ]
    )
    return "\n".join(
        [
            f"\n{report['source']} -> {report['out']}",
            ", ".join(filter(None, (report["method"], _options(report)))) + ", latent + rope per layer: "
            f"{_sizes(report)} ({ratio:.0%} of the cache)",
            *lines,
            *_refined(report["refinement"]),
            *_jointly(report.get("joint")),
            _worst_layers(quality["attention_errors"]),
            *(f"warning: {warning}" for warning in report["warnings"]),
            f"{report['seconds']:,.0f} s, at most {report['peak_memory_bytes'] / 2**30:.1f} GiB of host memory",
            f"Measured on {quality['tokens']:,} tokens held out of the calibration text. Measure on text of your own:",
            f"  python -m convert evaluate --model {report['out']} --reference {source} --text FILE.txt",
            "Serve it:",
            f"  python -m server --model {report['out']}",
        ]
    )


def _fits(report: Mapping[str, Any], gib: int) -> tuple[str, str, str]:
    """How many conversations fit on a GPU of so much memory, beside the weights."""
    tokens = min(CONVERSATION, report["context"])
    source, converted = (
        conversations_that_fit(gib << 30, report[f"{of}weight_bytes"], report[f"{of}cache_bytes_per_token"], tokens)
        for of in ("source_", "")
    )
    return f"conversations of {tokens:,} tokens in {gib} GiB", f"{source:,}", f"{converted:,}"


def _worst_layers(errors: Sequence[float]) -> str:
    worst = sorted(range(len(errors)), key=lambda i: -errors[i])[:WORST]
    named = ", ".join(f"layer {i} {errors[i]:.2g}" for i in worst)
    return f"relative error of the attention's output: mean {sum(errors) / len(errors):.2g}, worst {named}"


def evaluation_summary(report: Mapping[str, Any]) -> str:
    """`report`: as `evaluate.evaluate` gives it."""

    def row(name: str, key: str, form: str) -> tuple[str, str, str]:
        return name, format(report[f"reference_{key}"], form), format(report[key], form)

    lines = _columns(
        [
            ("", "reference", "model"),
            row("perplexity", "perplexity", ".4f"),
            row("bits per byte", "bits_per_byte", ".4f"),
            ("KL to the reference, nats/token", "", f"{report['kl']:.4g}"),
            ("same likeliest token", "", f"{report['top1_agreement']:.2%}"),
            row("cache bytes per token", "cache_bytes_per_token", ","),
        ]
    )
    where = f"{report['tokens']:,} predicted tokens of {report['text']}, windows of {report['window']}"
    return "\n".join([*lines, where, "", "KL by how many tokens came before:", *_by_position(report)])


def comparison_table(report: Mapping[str, Any]) -> str:
    """`report`: as `compare.compare` gives it."""
    rows = report["rows"]
    reference = next(row for row in rows if "error" not in row)
    cells = [
        ("cache", "method", "refined", "bytes/token", "perplexity", "KL", "same top token", "latent + rope, options")
    ]
    for row in rows:
        cells.append((f"{row['cache_ratio']:.1%}", row["method"], row["refine"], *_measured(row)))
    return "\n".join(
        [
            f"\n{report['model']}: perplexity {reference['reference_perplexity']:.3f}, "
            f"{reference['reference_cache_bytes_per_token']:,} cache bytes per token",
            *_columns(cells, left=(1, 7)),
            f"KL to the source in nats per token; {reference['tokens']:,} predicted tokens of {report['text']}, "
            f"windows of {reference['window']}.",
            f"Calibrated on {report['calibration']['tokens']:,} tokens ({report['calibration']['source']}); options of "
            "each method chosen on held-out calibration text.",
            *dict.fromkeys(
                f"{row['method']} at {row['cache_ratio']:.1%}: {row['error']}" for row in rows if "error" in row
            ),
        ]
    )


def _measured(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return ("", "", "", "", "not possible, see below")
    return (
        f"{row['cache_bytes_per_token']:,}", f"{row['perplexity']:.3f}", f"{row['kl']:.4g}",
        f"{row['top1_agreement']:.1%}", ", ".join(filter(None, (_sizes(row), _options(row)))),
    )  # fmt: skip


def _by_position(report: Mapping[str, Any]) -> list[str]:
    return [
        f"  {bucket['from']:>6,} to {bucket['to']:>6,}  {bucket['kl']:.4g}  ({bucket['tokens']:,} tokens)"
        for bucket in report["kl_by_position"]
    ]


def _sizes(report: Mapping[str, Any]) -> str:
    """Of every layer, or of all that differ in order of their sizes."""
    distinct = sorted({(layer["kv_lora_rank"], layer["rope_width"]) for layer in report["layers"]})
    return ", ".join(f"{rank} + {rope}" for rank, rope in distinct)


def export_summary(report: Mapping[str, Any]) -> str:
    """`report`: as `export.export_model` gives it."""
    cache, own = report["cache_bytes_per_token"], report["source_cache_bytes_per_token"]
    lines = [f"{report['out']}: a {report['format']} checkpoint, {cache:,} cache bytes per token"]
    if cache > own:
        lines.append(f"Padding makes that {cache / own - 1:.0%} more than here: its layers all have one shape.")
    if report["rope"] != "default":
        lines.append("Its frequencies are written as LongRoPE factors. transformers reads them; an engine that takes "
                     "DeepSeek-V3 with YaRN only does not.")  # fmt: skip
    return "\n".join(lines)


def _refined(records: Sequence[Mapping[str, float]] | None) -> list[str]:
    """A line for all layers together: the relative errors of their outputs."""
    if records is None:
        return []
    before, after = (sum(r[f"error_{when}"] for r in records) / len(records) for when in ("before", "after"))
    return [f"{len(records)} layers refined: error of their attention {before:.3f} -> {after:.3f} on average"]


def _jointly(record: Mapping[str, float] | None) -> list[str]:
    if record is None:
        return []
    return [f"jointly refined: KL on held-out text {record['kl_before']:.4g} -> {record['kl_after']:.4g}"]


def _options(report: Mapping[str, Any]) -> str:
    chosen = {name: report["options"].get(name) for name in METHOD_OPTIONS}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in chosen.items() if value is not None)


def _columns(rows: Sequence[tuple[str, ...]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of cells as lines; the cells numbered in `left` begin where their column does, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
