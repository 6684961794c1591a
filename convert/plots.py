"""What the commands report, drawn: KL by position, and quality against cache size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("-", "--", "-.", ":")  # of cache ratios, in order
MARKERS = "os^vD"  # of methods
SUFFIXES = (".png", ".svg", ".pdf")
LEAST_KL = 1e-4  # what is less is drawn here: nobody reads it off, and it would leave the rest a third of the axis
KL_LABEL = "KL to the source, nats per token (1e-4: or less)"


def check_plot_target(path: Path | None) -> None:
    """Before the work is done: raises ConversionError where it could not be drawn."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConversionError(f"--plot {path}: cannot be written: name a file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConversionError("--plot needs matplotlib: pip install 'mla-server[plots]'") from None
    if path.suffix not in SUFFIXES:
        raise ConversionError(f"--plot {path}: the name must end in .png, .svg or .pdf")


def plot_evaluation(report: Mapping[str, Any], path: Path) -> None:
    """`report`: as `evaluate.evaluate` gives it."""
    with _figure(path, 1) as (axis,):
        _draw_by_position(axis, report, "C0", "-")
        axis.set(title=f"{Path(report['model']).name} against {Path(report['reference']).name}")


def plot_comparison(report: Mapping[str, Any], path: Path) -> None:
    """KL against cache size, and KL by position. `report`: as `compare.compare` gives it."""
    rows = [row for row in report["rows"] if "error" not in row]
    names = list(dict.fromkeys((row["method"], row["refine"]) for row in rows))
    ratios = list(dict.fromkeys(row["cache_ratio"] for row in rows))
    with _figure(path, 2) as (size, position):
        for i, name in enumerate(names):
            own = [row for row in rows if (row["method"], row["refine"]) == name]
            label = name[0] if name[1] == "none" else f"{name[0]}, refined ({name[1]})"
            size.plot([row["cache_bytes_per_token"] for row in own], [max(row["kl"], LEAST_KL) for row in own],
                      marker=MARKERS[i % len(MARKERS)], color=f"C{i}", label=label)  # fmt: skip
            for row in own:
                style = STYLES[ratios.index(row["cache_ratio"]) % len(STYLES)]
                _draw_by_position(position, row, f"C{i}", style)
        full = rows[0]["reference_cache_bytes_per_token"]
        size.axvline(full, color="tab:gray", linewidth=1, label="the source's cache")
        size.set(title=report["model"], xlabel="cache bytes per token", ylabel=KL_LABEL,
                 xscale="log", yscale="log")  # fmt: skip
        ticks = [ratio * full for ratio in ratios]
        size.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        size.minorticks_off()
        size.legend(fontsize=8)
        for i, ratio in enumerate(ratios):
            position.plot([], [], STYLES[i % len(STYLES)], color="black", label=f"{100 * ratio:g} % of the cache")
        position.set(title="by position")
        position.legend(fontsize=8)


def _draw_by_position(axis: Axes, row: Mapping[str, Any], colour: str, style: str) -> None:
    buckets = row["kl_by_position"]
    kl = [max(bucket["kl"], LEAST_KL) for bucket in buckets]
    axis.plot([bucket["from"] for bucket in buckets], kl, style, marker=".", color=colour)
    axis.set(xlabel="tokens that came before (at least)", ylabel=KL_LABEL)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(6.5 * panels, 4.5), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(True, which="both", alpha=0.2)
    try:
        yield axes[0]
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConversionError(f"--plot {path}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
