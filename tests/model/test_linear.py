"""Linear gives what F.linear gives, packed or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.model.linear import Linear, fits_fp16


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_float64_product(rows: int, stored: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96).to(stored).float()
    b = torch.randn(48) if bias else None
    x = torch.randn(rows, 96)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert (Linear(weight, b)(x) - exact).abs().max() < 1e-4


def test_a_strided_input() -> None:
    torch.manual_seed(0)
    weight, wide = torch.randn(8, 16).bfloat16().float(), torch.randn(5, 40)
    assert torch.allclose(Linear(weight)(wide[:, 3:19]), F.linear(wide[:, 3:19], weight), atol=1e-5)


def test_only_what_fp16_holds_is_packed() -> None:
    torch.manual_seed(0)
    assert fits_fp16((torch.randn(64, 64) * 0.02).bfloat16().float())
    assert not fits_fp16(torch.randn(64, 64))
    assert not fits_fp16(torch.full((4, 4), 1e6))  # beyond fp16's range
    assert not fits_fp16(torch.randn(64, 64) * 1e-9)  # would all become zero
