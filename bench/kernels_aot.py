"""Compile every Triton kernel for GPUs that need not be there, and fail on spilled registers or too much shared memory.

    python -m bench.kernels_aot [--arch 80 90] [--full] [--json FILE]

Kernels of FP8 weights are compiled for sm_90 alone: before sm_89, GPUs cannot widen FP8, and no weight stays so there.

The launch wrappers themselves run, on tensors without storage, and each launch they make is compiled instead: so what
is checked is what they would launch, tile sizes and alignment included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from engine.kernels.cache import cache_gather_triton, cache_write_triton
from engine.kernels.fp8_linear import BLOCK, fp8_linear_triton
from engine.kernels.gated_mul import gated_mul_triton
from engine.kernels.gqa_decode import gqa_decode_triton
from engine.kernels.gqa_prefill import gqa_prefill_triton
from engine.kernels.mla_decode import mla_decode_triton
from engine.kernels.mla_prefill import merge_partial_triton, mla_prefill_triton
from engine.kernels.moe import moe_triton, rows_per_scale
from engine.kernels.norm import add_rms_norm_triton, head_norm_triton_, rms_norm_triton
from engine.kernels.rope import rope_triton_
from engine.kernels.route import route_triton
from engine.kernels.sample import SamplingTensors, sample_triton
from engine.spec import MoESpec

FP8 = torch.float8_e4m3fn
FP8_ARCH = 89  # the first that widens FP8
Case = tuple[str, Callable[[], object]]  # what it is, and a call that launches it
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory one program may have


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes, as ptxas reports it."""

    kernel: str
    shape: str
    arch: int
    warps: int
    registers: int  # per thread
    spill_bytes: int  # stored, per thread
    shared_bytes: int

    def __str__(self) -> str:
        verdict = "" if self.fits else "  FAILS"
        return (
            f"sm_{self.arch} {self.shape}: {self.kernel} {self.warps} warps, {self.registers} registers, "
            f"{self.spill_bytes} bytes spilled, {self.shared_bytes / 1024:.0f} KB shared{verdict}"
        )

    @property
    def fits(self) -> bool:
        return (
            self.spill_bytes == 0
            and self.shared_bytes <= SHARED_LIMIT[self.arch]
            and self.registers * self.warps * 32 <= 65536
        )


@dataclass(frozen=True)
class Launch:
    kernel: Any  # triton.JITFunction
    args: dict[str, Any]
    options: dict[str, int]


def record(call: Callable[[], object]) -> list[Launch]:
    """The kernels that `call` would launch."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:  # noqa: ANN401, ARG001
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(kernel, values, {k: v for k, v in kwargs.items() if k not in names}))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def argument_types(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """-> signature, constants and attributes, as Triton's launcher would derive them from aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):  # a 1 becomes a constant, too
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = mangle_type(value) if isinstance(value, Tensor) else "i32"
            if special and (isinstance(value, Tensor) or value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int, shape: str) -> Usage:
    source = ASTSource(launch.kernel, *argument_types(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = ptxas_usage(compiled.asm["ptx"], arch)
    meta = compiled.metadata
    return Usage(launch.kernel.__name__, shape, arch, meta.num_warps, registers, spills, meta.shared)


def ptxas_usage(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def paged(width: int, batch: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of rows of `width`, block tables and lengths."""
    return meta(1000, 64, width), meta(batch, 128, dtype=torch.int32), meta(batch, dtype=torch.int32)


Limits = tuple[int | None, float | None]  # the sliding window, and the cap of scores
NO_LIMITS: Limits = (None, None)
GEMMA2: Limits = (4096, 50.0)


def mla_cases(rank: int, rope: int, heads: int, splits: int = 8, limits: Limits = NO_LIMITS) -> Iterator[Case]:
    q = meta(64, heads, rank + rope)
    yield (
        f"mla decode {rank}+{rope}, {heads} heads, {splits} splits{limited(limits)}",
        lambda: mla_decode_triton(q, *paged(rank + rope), rank, 1.0, 8192, *limits, splits),
    )


def limited(limits: Limits) -> str:
    return "" if limits == NO_LIMITS else f", window {limits[0]}, cap {limits[1]}"


def mla_prefill_cases(nope: int, rope: int, value: int, limits: Limits = NO_LIMITS) -> Iterator[Case]:
    def call() -> None:
        bounds, starts = meta(9, dtype=torch.int32), meta(8, dtype=torch.int32)
        q, kv, k_rope = meta(4096, 32, nope + rope), meta(8192, 32, nope + value), meta(8192, 1, rope)
        mla_prefill_triton(q, kv, k_rope, bounds, bounds, starts, starts, nope, 1.0, *limits)

    yield f"mla prefill keys {nope}+{rope}, values {value}{limited(limits)}", call


def gqa_cases(heads: int, kv_heads: int, dim: int, limits: Limits = NO_LIMITS) -> Iterator[Case]:
    width, bounds = 2 * kv_heads * dim, meta(65, dtype=torch.int32)
    shape = f"{heads}/{kv_heads} heads of {dim}{limited(limits)}"
    decode_q, prefill_q = meta(64, heads, dim), meta(4096, heads, dim)
    yield f"gqa decode {shape}", lambda: gqa_decode_triton(decode_q, *paged(width), kv_heads, 1.0, 8192, *limits, 8)
    cache, tables, lens = paged(width)
    prefill = prefill_q, cache, tables, bounds, lens, kv_heads, 1.0, *limits
    yield f"gqa prefill {shape}", lambda: gqa_prefill_triton(*prefill)


def moe_cases(tokens: int, experts: int, chosen: int, hidden: int, width: int, fp8: bool = False) -> Iterator[Case]:
    """`tokens` that choose `chosen` of `experts` experts: their number decides the tiles."""

    def call() -> None:
        who, weights = meta(tokens, chosen, dtype=torch.int64), meta(tokens, chosen, dtype=torch.float32)
        dtype = FP8 if fp8 else torch.bfloat16
        gate_up, down = meta(experts, 2 * width, hidden, dtype=dtype), meta(experts, hidden, width, dtype=dtype)
        shapes = (2 * width // rows_per_scale(width), -(-hidden // BLOCK)), (-(-hidden // BLOCK), -(-width // BLOCK))
        scales = [meta(experts, *shape, dtype=torch.float32) for shape in shapes if fp8]
        moe_triton(meta(tokens, hidden), who, weights, gate_up, down, *scales)

    yield f"{tokens} tokens to {chosen} of {experts}{' fp8' if fp8 else ''} experts {hidden} x {width}", call


def fp8_cases(
    rows: int, into: int, out: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> Iterator[Case]:
    def call() -> None:
        weight, scale = meta(out, into, dtype=FP8), meta(out, -(-into // BLOCK), dtype=torch.float32)
        fp8_linear_triton(meta(rows, into, dtype=dtype), weight, scale, meta(out, dtype=dtype) if bias else None)

    yield f"{rows} {dtype} rows times fp8 {into} x {out}{' + bias' if bias else ''}", call


def route_cases() -> Iterator[Case]:
    deepseek_v3 = MoESpec(
        256, 8, 2048, scoring="sigmoid", correction_bias=True, num_groups=8, groups_per_token=4, group_score="top2_sum"
    )
    deepseek_v2 = MoESpec(160, 6, 1536, num_groups=8, groups_per_token=3, normalize=False, scale=16.0)
    kimi_k2 = MoESpec(384, 8, 2048, scoring="sigmoid", correction_bias=True, scale=2.827)
    routings = {
        "DeepSeek-V3": deepseek_v3,
        "DeepSeek-V2": deepseek_v2,
        "Kimi-K2": kimi_k2,
        "Qwen3": MoESpec(128, 8, 768),
    }
    for name, spec in routings.items():
        logits = meta(64, spec.num_experts, dtype=torch.float32)
        yield f"routing of {name}", partial(route_triton, spec, logits, logits[0] if spec.correction_bias else None)


def other_cases() -> Iterator[Case]:
    """Kernels whose shape hardly matters."""
    hidden, bounds = meta(64, 4096), meta(65, dtype=torch.int32)
    yield "rms norm 4096", lambda: rms_norm_triton(hidden, hidden[0], 1e-5)
    yield "add + rms norm 4096", lambda: add_rms_norm_triton(hidden, hidden, hidden[0], 1e-5)
    yield "rotation 33 heads of 64", lambda: rope_triton_(meta(64, 33, 64), meta(64, 1, 32, 2, dtype=torch.float32))
    yield "gated silu 14336", lambda: gated_mul_triton(meta(64, 28672))
    yield "gated gelu 14336", lambda: gated_mul_triton(meta(64, 28672), "gelu_tanh")
    yield "head norm 40 heads of 128", lambda: head_norm_triton_(meta(64, 40, 128), meta(40, 128), 1e-6)
    cache, tables, lens = paged(576)
    yield "cache write 576", lambda: cache_write_triton(cache, meta(64, 576), meta(64, dtype=torch.int64))
    yield "cache gather 576", lambda: cache_gather_triton(cache, tables, lens, bounds, 4096)
    part, lse = meta(64, 32, 128), meta(64, 32, dtype=torch.float32)
    yield "merge of partial results 128", lambda: merge_partial_triton(part, lse, part, lse)
    floats, longs = meta(64, dtype=torch.float32), meta(64, dtype=torch.int64)
    options = SamplingTensors(floats, lens, floats, floats, longs, longs, False, True, True, True)
    yield "sample 128256", lambda: sample_triton(meta(64, 128256), options)


def cases(full: bool) -> Iterator[Case]:
    yield from mla_cases(512, 64, 16)
    yield from mla_cases(512, 64, 32)
    yield from mla_cases(448, 64, 28)
    yield from mla_cases(256, 256, 32)
    yield from mla_cases(192, 32, 64)
    yield from mla_cases(128, 32, 32, splits=1)
    yield from mla_prefill_cases(128, 64, 128)
    yield from gqa_cases(32, 8, 128)
    yield from mla_cases(512, 64, 16, limits=GEMMA2)
    yield from mla_prefill_cases(256, 64, 256, limits=GEMMA2)
    yield from gqa_cases(16, 8, 256, limits=GEMMA2)
    for tokens in (64, 2048, 8192):  # tiles of 16, 64 and 128 rows
        yield from moe_cases(tokens, 256, 8, 7168, 2048)
        yield from moe_cases(tokens, 256, 8, 7168, 2048, fp8=True)
    for rows in (16, 64, 4096):
        yield from fp8_cases(rows, 7168, 24576)
    yield from route_cases()
    yield from other_cases()
    if full:
        for rank, rope, heads in itertools.product((128, 192, 256, 448, 512), (32, 64), (8, 16, 28, 32, 64, 128)):
            yield from mla_cases(rank, rope, heads)
        for rank, rope in ((64, 16), (96, 24), (384, 64), (256, 256), (512, 512), (1024, 1024), (512, 0)):
            for heads in (14, 32, 64):
                yield from mla_cases(rank, rope, heads)
        for nope, rope, value in (
            (64, 32, 64),
            (128, 32, 128),
            (0, 128, 128),
            (0, 64, 64),
            (96, 32, 96),
            (256, 64, 256),
        ):
            yield from mla_prefill_cases(nope, rope, value)
        for limits in (GEMMA2, (4096, None)):
            yield from mla_cases(448, 64, 28, limits=limits)
            yield from mla_cases(512, 64, 128, limits=limits)
            yield from mla_prefill_cases(128, 64, 128, limits=limits)
            yield from gqa_cases(32, 8, 128, limits=limits)
        for experts, chosen, hidden, width in ((64, 6, 2048, 1408), (60, 4, 2048, 1408), (384, 8, 7168, 2048)):
            for tokens in (64, 512, 8192):
                yield from moe_cases(tokens, experts, chosen, hidden, width)
                yield from moe_cases(tokens, experts, chosen, hidden, width, fp8=True)
        for rows, dtype in itertools.product((16, 64, 4096), (torch.bfloat16, torch.float16, torch.float32)):
            for into, out in ((7168, 2112), (7168, 4096), (1408, 2048), (1500, 200)):
                yield from fp8_cases(rows, into, out, dtype, bias=out == 2112)
        for heads, kv_heads, dim in ((32, 4, 64), (28, 4, 128), (14, 2, 64), (8, 8, 80), (16, 8, 256)):
            yield from gqa_cases(heads, kv_heads, dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--full", action="store_true", help="the whole grid of shapes, some minutes")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    usages, seen = [], set()
    for shape, call in cases(options.full):
        for launch in record(call):
            key = repr((launch.kernel, argument_types(launch), launch.options))
            fp8 = any(isinstance(value, Tensor) and value.dtype == FP8 for value in launch.args.values())
            for arch in options.arch if key not in seen else ():
                if fp8 and arch < FP8_ARCH:
                    continue
                usages.append(compile_launch(launch, arch, shape))
                print(usages[-1], flush=True)
            seen.add(key)
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1))
    failures = [usage for usage in usages if not usage.fits]
    print(f"{len(usages)} kernels compiled by triton {triton.__version__}, {len(failures)} do not fit")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
