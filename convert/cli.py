"""The command line: `python -m convert ...` converts, `... evaluate` measures, `... compare` compares."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from convert.compare import CACHE_RATIOS, CompareRequest, compare
from convert.compare import METHODS as COMPARED
from convert.conversion import CALIBRATION_TOKENS, REFINEMENTS, ConversionRequest, convert
from convert.evaluate import DEFAULT_WINDOW, EvaluationRequest, evaluate
from convert.export import FORMATS, LATENT_EPS, export_model
from convert.methods import mha2mla
from convert.plan import DEFAULT_CACHE_RATIO, DEFAULT_METHOD, METHODS, MethodRequest
from convert.plots import check_plot_target, plot_comparison, plot_evaluation
from convert.report import (
    check_json_target,
    comparison_table,
    conversion_summary,
    evaluation_summary,
    export_summary,
    write_json,
)
from engine.errors import EngineError
from engine.hub import local_folder
from engine.model.load import DTYPES

DTYPE_CHOICES = ("auto", *DTYPES)


def main(argv: Sequence[str] | None = None) -> int:
    """-> the exit code: 0, or 2 where the input was at fault and one line on stderr says how."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    try:
        if command is not None:
            command(arguments[1:])
        else:
            run_convert(arguments)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not _out_of_memory(error):
            raise
        print(
            "error: out of memory; use --device cpu, or less text (--calibration-tokens) or shorter windows (--window)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_convert(arguments: Sequence[str]) -> None:
    args = convert_parser().parse_args(arguments)
    check_json_target(args.json)
    method = MethodRequest(
        method=args.method,
        cache_ratio=args.cache_ratio,
        kv_lora_rank=args.kv_lora_rank,
        qk_rope_head_dim=args.qk_rope_head_dim,
        freqfold=args.freqfold,
        partial_rope=args.partial_rope,
        svd=args.svd,
    )
    request = ConversionRequest(
        source=local_folder(args.model),
        out=args.out,
        method=method,
        calibration_files=tuple(args.calibration),
        calibration_tokens=args.calibration_tokens,
        dtype=args.dtype,
        device=args.device,
        refine=args.refine,
        seed=args.seed,
        overwrite=args.overwrite,
        export=args.export,
    )
    report = convert(request)
    print(conversion_summary(report, args.model))
    if "export" in report:
        print(export_summary(report["export"]))
    write_json(args.json, report)


def run_export(arguments: Sequence[str]) -> None:
    args = export_parser().parse_args(arguments)
    check_json_target(args.json)
    report = export_model(args.model, args.out, overwrite=args.overwrite, latent_eps=args.latent_norm_eps)
    print(export_summary(report))
    write_json(args.json, report)


def run_evaluate(arguments: Sequence[str]) -> None:
    args = evaluate_parser().parse_args(arguments)
    check_json_target(args.json)
    check_plot_target(args.plot)
    model, reference = local_folder(args.model), local_folder(args.reference)
    report = evaluate(EvaluationRequest(model, reference, args.text, args.window, args.dtype, args.device))
    print(evaluation_summary(report))
    write_json(args.json, report)
    if args.plot is not None:
        plot_evaluation(report, args.plot)


def run_compare(arguments: Sequence[str]) -> None:
    args = compare_parser().parse_args(arguments)
    check_json_target(args.json)
    check_plot_target(args.plot)
    report = compare(
        CompareRequest(
            source=local_folder(args.model),
            text=args.text,
            methods=tuple(dict.fromkeys(args.methods)),
            cache_ratios=tuple(dict.fromkeys(args.cache_ratios)),
            calibration_files=tuple(args.calibration),
            calibration_tokens=args.calibration_tokens,
            window=args.window,
            device=args.device,
            refine=tuple(dict.fromkeys(args.refine)),
            seed=args.seed,
        )
    )
    print(comparison_table(report))
    write_json(args.json, report)
    if args.plot is not None:
        plot_comparison(report, args.plot)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "evaluate": run_evaluate,
    "compare": run_compare,
    "export": run_export,
}


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a model with grouped-query attention (GQA) to multi-head latent attention (MLA).\n"
        "Its cache then holds, per token and layer, one latent of --kv-lora-rank numbers and one rotated key\n"
        "of --qk-rope-head-dim numbers that all heads share, in place of every KV head's key and value.\n\n"
        "Stopped at any point, the same command goes on from there. What the conversion cost is measured on\n"
        "text held out of the calibration, printed, and kept in DIR/conversion.json.",
        epilog=f"{_method_list()}\n\nexamples:\n"
        "  python -m convert --model ./llama --out ./mla --cache-ratio 0.28 --calibration book.txt\n"
        "  python -m convert --model ./llama --out ./mla --kv-lora-rank 448 --qk-rope-head-dim 128\n"
        "  python -m convert evaluate --model ./mla --reference ./llama --text other.txt\n"
        "  python -m convert compare --model ./llama --calibration book.txt --text other.txt\n"
        "\n`python -m convert evaluate --help` explains how a conversion is measured,\n"
        "`python -m convert compare --help` how methods are compared.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="SRC",
        help="the GQA checkpoint: a Hugging Face folder, or org/name on the hub")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; it appears only once it is complete")
    add("--overwrite", action="store_true", help="replace a checkpoint that is in DIR already")
    add("--export", choices=FORMATS,
        help="also write the result as a checkpoint of this kind, beside DIR; see "
        "`python -m convert export --help`")  # fmt: skip
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help="of the weights written (default: as in the source)")
    _add_common(parser)
    _add_method(parser)
    _add_sizes(parser)
    _add_method_options(parser)
    _add_calibration(parser, None)
    return parser


def _method_list() -> str:
    return "methods:\n" + "\n".join(f"  {name:11} {text}" for name, text in METHODS.items())


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to convert")
    group.add_argument("--method", choices=METHODS, default=DEFAULT_METHOD, help="see below (default: %(default)s)")
    steps = "; ".join(f"{name}: {text}" for name, text in REFINEMENTS.items())
    group.add_argument(
        "--refine", choices=REFINEMENTS, default="layer",
        help=f"what follows the method. {steps} (default: %(default)s; exact is never refined)",
    )  # fmt: skip


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size of the cache (a ratio or both sizes; more is better quality)")
    group.add_argument(
        "--cache-ratio", type=float, metavar="X",
        help="cache per token as a fraction of the source's; how it is split between latent and rotated key is chosen "
        f"for you (default: {DEFAULT_CACHE_RATIO})",
    )  # fmt: skip
    group.add_argument("--kv-lora-rank", type=int, metavar="R", help="numbers in the latent")
    group.add_argument(
        "--qk-rope-head-dim", type=int, metavar="DR",
        help="numbers in the shared rotated key; transmla, care: a divisor of the head size; mha2mla: for each KV head",
    )  # fmt: skip


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "options of a method (left out, several are tried, and the one nearest to the source on held-out calibration "
        "text is kept)"
    )
    group.add_argument(
        "--freqfold", type=_freqfold, default=None, metavar="F|auto",
        help="transmla, care: how many neighbouring RoPE frequencies are treated as one",
    )  # fmt: skip
    group.add_argument(
        "--partial-rope", choices=mha2mla.PARTIAL_ROPE,
        help="mha2mla: which pairs of channels keep RoPE: the fastest, the slowest, evenly spaced, or those with the "
        "longest queries and keys",
    )  # fmt: skip
    group.add_argument(
        "--svd", choices=mha2mla.SVD, help="mha2mla: one low rank of keys and values together, or one of each"
    )


def _add_calibration(parser: argparse.ArgumentParser, tokens: int | None) -> None:
    """`tokens`: what is parsed where none are given."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE.txt",
        help="text to learn from and to choose options on, like what the model will be used for (default: text sampled "
        "from the source model itself)",
    )  # fmt: skip
    group.add_argument(
        "--calibration-tokens", type=int, metavar="N", default=tokens,
        help=f"tokens to learn from; a quarter more are held out (default: {CALIBRATION_TOKENS}, or all there are)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of sampling and of the order of the text (default: 0)")


def export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert export",
        description="Write a converted model as a stock DeepSeek-V3 checkpoint, which engines load that do not know "
        "this project's format. Where layers differ in rank or in frequencies they are padded, and its cache grows.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the converted model")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; it appears only once it is complete")
    add("--format", choices=FORMATS, default=FORMATS[0], help="(default: %(default)s)")
    add(
        "--latent-norm-eps", type=float, default=LATENT_EPS, metavar="E",
        help="epsilon that the engine to load it normalises latents with: transformers %(default)g in any model, "
        "others the model's own rms_norm_eps (default: %(default)g)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace a checkpoint that is in DIR already")
    add("--json", type=Path, metavar="FILE", help="also write what is printed, as JSON")
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert evaluate",
        description="Measure a converted model against its source on a text: perplexity and bits per byte of both, the "
        "KL divergence from source to converted (nats per token, 0 is identical; over all, and by how many tokens came "
        "before), how often both put the same token first, and the cache each needs. Use text that the conversion was "
        "not calibrated on. The text is cut into windows that stand alone; each begins with BOS where the tokenizer "
        "adds one, else with the last token of the window before, and every other token is predicted once.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the converted model")
    add("--reference", type=Path, required=True, metavar="SRC", help="the model it was converted from")
    add("--text", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text")
    _add_window(parser)
    add(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="to compute in (default: float32 on a CPU, else as stored)",
    )
    _add_common(parser)
    _add_plot(parser, "KL by position")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a model by several methods at several cache sizes, and measure all of them on one text:\n"
        "perplexity, KL divergence from the source (nats per token, 0 is identical), how often both put the\n"
        "same token first, and cache bytes per token. Nothing is written but the report.\n\n"
        "Methods learn from the calibration text alone. Each runs at its best options (how the cache is split,\n"
        "FreqFold, which channels keep RoPE, ...): all are tried, and the one nearest to the source on\n"
        "calibration text that was held out is taken. --text is measured on, and must be another text.\n"
        "`python -m convert evaluate --help` says more of how a text is measured on.",
        epilog=f"{_method_list()}\n\nexample:\n"
        "  python -m convert compare --model ./llama --cache-ratios 0.5 0.25 --calibration book.txt \\\n"
        "      --text other.txt --json compare.json --plot compare.png",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="SRC", help="the GQA checkpoint: a folder, or org/name on the hub")
    add("--text", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text to measure on")
    add("--methods", nargs="+", choices=METHODS, default=COMPARED, help=f"default: {' '.join(COMPARED)}")
    add(
        "--cache-ratios", type=float, nargs="+", default=CACHE_RATIOS, metavar="X",
        help="cache per token as a fraction of the source's; a method that cannot make one says why "
        f"(default: {' '.join(f'{ratio:g}' for ratio in CACHE_RATIOS)})",
    )  # fmt: skip
    add(
        "--refine", nargs="+", choices=REFINEMENTS, default=("none",),
        help="what follows every method, as for a conversion; each gets its own rows (default: none, methods bare)",
    )  # fmt: skip
    _add_window(parser)
    _add_common(parser)
    _add_plot(parser, "KL against cache size, and by position")
    _add_calibration(parser, CALIBRATION_TOKENS)
    return parser


def _add_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", type=int, metavar="N", help=f"tokens seen at once (default: the context, at most {DEFAULT_WINDOW})"
    )


def _add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"also draw {what} (needs matplotlib)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is printed, as JSON")


def _out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for a GPU's memory, and none for the host's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _freqfold(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor auto")
    return int(text)
