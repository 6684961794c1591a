"""Every kernel compiles for sm_80 and sm_90 without a spilled register and within their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_fits():
    pytest.importorskip("triton.backends.nvidia.compiler", reason="there is no CUDA compiler for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels_aot"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 do not fit" in result.stdout
