"""The results of a comparison, as a table for a terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import EngineError

LABELS = {"mla": "MLA", "gqa": "GQA", "transformers": "transformers"}


def columns(results: dict[str, Any]) -> list[str]:
    return [name for name in LABELS if name in results["rows"][0]]


def table(results: dict[str, Any]) -> str:
    names = columns(results)
    env = results["environment"]
    lines = [
        f"{results['models']['mla']} (MLA) against {results['models']['gqa']} (GQA) on {env['device_name']}, "
        f"{env['dtype']}, {env['threads']} threads; outputs right, top-1 agreement {results['top1_agreement']:.1%}",
        "",
        *_sizes(results),
        "",
        f"{'context':>7} {'batch':>5}"
        + "".join(f" | {LABELS[n]:>12}: ttft ms  tpot ms    tok/s" for n in names)
        + " |  MLA vs GQA"
        + ("  MLA, GQA vs transformers" if "transformers" in names else "")
        + "  (tpot)",
    ]
    for row in results["rows"]:
        cells = "".join(
            f" | {1e3 * row[n]['ttft']:>21.2f} {1e3 * row[n]['tpot']:>8.2f} {row[n]['throughput']:>8.1f}" for n in names
        )
        tpot = {n: row[n]["tpot"] for n in names}
        ratios = f" | {tpot['gqa'] / tpot['mla']:>10.2f}x"
        if "transformers" in names:
            ratios += f"  {tpot['transformers'] / tpot['mla']:>10.2f}x {tpot['transformers'] / tpot['gqa']:>11.2f}x"
        lines.append(f"{row['context']:>7} {row['batch']:>5}{cells}{ratios}")
    return "\n".join(lines)


def _sizes(results: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("mla", "gqa"):
        size = results["sizes"][name]
        lines.append(
            f"{LABELS[name]}: {size['cache_bytes_per_token']:,} cache bytes per token, "
            f"{size['weight_bytes'] / 2**20:,.1f} MiB of weights; "
            f"{size['tokens_that_fit']:,} tokens fit in {results['memory_gib']:g} GiB"
        )
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per output token and throughput by batch size, a line for each engine and context."""
    try:
        import matplotlib
    except ImportError:
        raise EngineError("--plot needs matplotlib: pip install 'mla-server[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colours = {"mla": "tab:blue", "gqa": "tab:orange", "transformers": "tab:gray"}
    contexts = sorted({row["context"] for row in results["rows"]})
    quantities = (("ttft", 1e3, "time to first token, ms"), ("tpot", 1e3, "time per output token, ms"),
                  ("throughput", 1, "output tokens per second"))  # fmt: skip
    for axis, (quantity, factor, title) in zip(axes, quantities, strict=True):
        for name in columns(results):
            for context, style in zip(contexts, ("-", "--", ":", "-.") * len(contexts), strict=False):
                rows = [row for row in results["rows"] if row["context"] == context]
                axis.plot(
                    [row["batch"] for row in rows], [factor * row[name][quantity] for row in rows], style,
                    color=colours[name], marker="o", label=f"{LABELS[name]}, context {context}",
                )  # fmt: skip
        axis.set(title=title, xlabel="batch", xscale="log", yscale="log")
        axis.grid(True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    env = results["environment"]
    figure.suptitle(
        f"{results['models']['mla']} against {results['models']['gqa']}, {env['device_name']}, {env['dtype']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
