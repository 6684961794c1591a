"""The command line: `python -m convert ...` converts, `python -m convert evaluate ...` measures."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from convert.conversion import CALIBRATION_TOKENS, ConversionRequest, convert
from convert.evaluate import DEFAULT_WINDOW, EvaluationRequest, evaluate
from convert.methods import mha2mla
from convert.plan import DEFAULT_CACHE_RATIO, DEFAULT_METHOD, METHODS, MethodRequest
from convert.report import check_json_target, conversion_summary, evaluation_summary, write_json
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
        print("error: out of memory; use --device cpu, or fewer --calibration-tokens", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_convert(arguments: Sequence[str]) -> None:
    args = convert_parser().parse_args(arguments)
    check_json_target(args.json)
    sizes = MethodRequest(
        args.method, args.cache_ratio, args.kv_lora_rank, args.qk_rope_head_dim, args.freqfold, args.partial_rope,
        args.svd,
    )  # fmt: skip
    request = ConversionRequest(
        source=local_folder(args.model),
        out=args.out,
        method=sizes,
        calibration_files=tuple(args.calibration),
        calibration_tokens=args.calibration_tokens,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    report = convert(request)
    print(conversion_summary(report, args.model))
    write_json(args.json, report)


def run_evaluate(arguments: Sequence[str]) -> None:
    args = evaluate_parser().parse_args(arguments)
    check_json_target(args.json)
    model, reference = local_folder(args.model), local_folder(args.reference)
    report = evaluate(EvaluationRequest(model, reference, args.text, args.window, args.dtype, args.device))
    print(evaluation_summary(report))
    write_json(args.json, report)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"evaluate": run_evaluate}


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a model with grouped-query attention (GQA) to multi-head latent attention (MLA).\n"
        "Its cache then holds, per token and layer, one latent of --kv-lora-rank numbers and one rotated key\n"
        "of --qk-rope-head-dim numbers that all heads share, in place of every KV head's key and value.",
        epilog="methods:\n" + "\n".join(f"  {name:11} {text}" for name, text in METHODS.items()) + "\n\nexamples:\n"
        "  python -m convert --model ./llama --out ./mla --cache-ratio 0.28 --calibration book.txt\n"
        "  python -m convert --model ./llama --out ./mla --kv-lora-rank 448 --qk-rope-head-dim 128\n"
        "  python -m convert evaluate --model ./mla --reference ./llama --text other.txt\n"
        "\n`python -m convert evaluate --help` explains how a conversion is measured.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="SRC",
        help="the GQA checkpoint: a Hugging Face folder, or org/name on the hub",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; it appears only once it is complete")
    add("--method", choices=METHODS, default=DEFAULT_METHOD, help="see below (default: %(default)s)")
    size = parser.add_argument_group("size of the cache (one of the two; more is better quality)")
    size.add_argument(
        "--cache-ratio", type=float, metavar="X",
        help=f"cache per token as a fraction of the source's, split for you (default: {DEFAULT_CACHE_RATIO})",
    )  # fmt: skip
    size.add_argument("--kv-lora-rank", type=int, metavar="R", help="numbers in the latent")
    size.add_argument(
        "--qk-rope-head-dim",
        type=int,
        metavar="DR",
        help="numbers in the shared rotated key; transmla, care: a divisor of the head size; mha2mla: for each KV head",
    )
    options = parser.add_argument_group(
        "options of a method (left out, several are tried, and the one nearest to the source on held-out calibration "
        "text is kept)"
    )
    options.add_argument(
        "--freqfold", type=_freqfold, default=None, metavar="F|auto",
        help="transmla, care: how many neighbouring RoPE frequencies are treated as one",
    )  # fmt: skip
    options.add_argument(
        "--partial-rope", choices=mha2mla.PARTIAL_ROPE,
        help="mha2mla: which pairs of channels keep RoPE: the fastest, the slowest, evenly spaced, or those with the "
        "longest queries and keys",
    )  # fmt: skip
    options.add_argument(
        "--svd", choices=mha2mla.SVD,
        help="mha2mla: one low rank of keys and values together, or one of each",
    )  # fmt: skip
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE.txt",
        help="text like what the model will be used for (default: text sampled from the source model itself)",
    )  # fmt: skip
    text.add_argument(
        "--calibration-tokens", type=int, metavar="N",
        help=f"tokens to learn from; a quarter more are held out (default: {CALIBRATION_TOKENS}, or all there are)",
    )  # fmt: skip
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help="of the weights written (default: as in the source)")
    _add_common(parser)
    add("--seed", type=int, default=0, help="of sampling and of the order of the text (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a checkpoint that is in DIR already")
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert evaluate",
        description="Measure a converted model against its source on a text: perplexity and bits per byte of both, the "
        "KL divergence from source to converted (nats per token, 0 is identical), how often both put the same token "
        "first, and the cache each needs. Use text that the conversion was not calibrated on. The text is cut into "
        "windows that stand alone; each begins with BOS where the tokenizer adds one, else with the last token of the "
        "window before, and every other token is predicted once.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the converted model")
    add("--reference", type=Path, required=True, metavar="SRC", help="the model it was converted from")
    add("--text", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text")
    add("--window", type=int, metavar="N", help=f"tokens seen at once (default: {DEFAULT_WINDOW}, at most the context)")
    add(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="to compute in (default: float32 on a CPU, else as stored)",
    )
    _add_common(parser)
    return parser


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
