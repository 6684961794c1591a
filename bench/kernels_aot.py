"""Compile every Triton kernel for GPUs that need not be there, and fail on spilled registers or too much shared memory.

    python -m bench.kernels_aot [--arch 80 90] [--full] [--json FILE]

The launch wrappers themselves run, on tensors without storage, and each launch they make is compiled instead: so what is
checked is what they would launch, tile sizes and alignment included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

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
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(kernel, values, {k: v for k, v in kwargs.items() if k not in names}))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def compile_launch(launch: Launch, arch: int, shape: str) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # triton makes a 1 a constant, too
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + triton.runtime.jit.mangle_type(value).removeprefix("*")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = ptxas_usage(compiled.asm["ptx"], arch)
    meta = compiled.metadata
    return Usage(launch.kernel.__name__, shape, arch, meta.num_warps, registers, spills, meta.shared)


def ptxas_usage(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes per thread."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
