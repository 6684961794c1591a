"""The product with an FP8 weight, both implementations, against float64 of the weight multiplied out."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.fp8_linear import BLOCK, fp8_linear_torch, fp8_linear_triton

from .conftest import DEVICE
from .fp8 import multiplied_out, random_fp8
from .reference import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = [fp8_linear_torch, fp8_linear_triton]


def check(implementation, rows, into, out, dtype, bias=False):
    """x is a slice of wider rows that hold NaN elsewhere."""
    generator = torch.Generator().manual_seed(rows + into + out)
    weight, blocks = random_fp8(out, into, generator)
    scale = blocks.repeat_interleave(BLOCK, 0)[:out]
    wide = torch.full((rows, into + 16), float("nan"))
    wide[:, 8 : 8 + into] = torch.randn(rows, into, generator=generator)
    x = wide.to(dtype).to(DEVICE)[:, 8 : 8 + into]
    b = torch.randn(out, generator=generator).to(dtype) if bias else None
    expected = x.double().cpu() @ multiplied_out(weight, blocks).T + (0 if b is None else b.double())
    found = implementation(x, weight.to(DEVICE), scale.to(DEVICE), None if b is None else b.to(DEVICE))
    assert found.dtype == dtype
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 65])  # each with tiles of its own
def test_against_float64(implementation, dtype, rows):
    check(implementation, rows, 300, 150, dtype, bias=rows == 17)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("into", "out"), [(1, 1), (127, 129), (128, 128), (129, 5), (256, 40)])
def test_sizes(implementation, into, out):
    check(implementation, 3, into, out, torch.bfloat16, bias=out == 5)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty(rows):
    scale = torch.ones(0 if rows else 4, 1)
    weight = torch.zeros(len(scale), 8).to(torch.float8_e4m3fn)
    out = fp8_linear_triton(*(t.to(DEVICE) for t in (torch.zeros(rows, 8), weight, scale)))
    assert out.shape == (rows, len(scale))


def test_every_number_that_e4m3_holds():
    """As weights of one column each: subnormals, both zeros and 448 come out as they are; bf16 holds them all."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()]
    out = fp8_linear_triton(
        torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE),
        every[:, None].contiguous().to(DEVICE),
        torch.ones(len(every), 1, device=DEVICE),
    )
    assert torch.equal(out[0].cpu().float(), every.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_weight_is_rounded(dtype):
    """A scale that the dtype holds but its products with weights not: still one rounding, of the result."""
    weight = torch.tensor([[1.0, 1.125, -448.0, 448.0]]).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 1 / 3)
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    found = fp8_linear_triton(x.to(DEVICE), weight.to(DEVICE), scale.to(DEVICE))
    assert found.item() == torch.tensor(2.125 / 3).to(dtype).item()
