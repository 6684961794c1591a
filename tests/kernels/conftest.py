"""Kernel tests run the Triton kernels on the GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    triton = pytest.importorskip("triton", reason="there is no Triton for this platform")
    if DEVICE == "cpu":
        assert triton.knobs.runtime.interpret, "tests/conftest.py sets TRITON_INTERPRET before triton is imported"
        from .interpreter import install_bfloat16, install_single_patching

        install_bfloat16(monkeypatch)
        install_single_patching(monkeypatch)


@pytest.fixture(autouse=True)
def poison(monkeypatch, interpreter):
    """Whatever a kernel does not write is NaN (or the least integer), and shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)
