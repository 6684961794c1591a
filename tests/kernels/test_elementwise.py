"""RMSNorm, rotation, gated activations and the cache's rows, both implementations, against float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.kernels.cache import cache_gather_torch, cache_gather_triton, cache_write_torch, cache_write_triton
from engine.kernels.gated_mul import gated_mul_torch, gated_mul_triton
from engine.kernels.norm import (
    add_rms_norm,
    add_rms_norm_triton,
    head_norm_,
    head_norm_triton_,
    rms_norm,
    rms_norm_triton,
)
from engine.kernels.rope import rope_, rope_table, rope_torch_, rope_triton_

from .conftest import DEVICE
from .reference import assert_near, block_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rms(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("implementation", [rms_norm, rms_norm_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 192, 1024])
def test_rms_norm_of_a_slice(implementation, dtype, width):
    torch.manual_seed(0)
    x = torch.randn(4, width + 9).to(dtype).to(DEVICE)[:, 3 : 3 + width]
    weight = torch.randn(width).to(dtype).to(DEVICE)
    assert_near(implementation(x, weight, 1e-5), rms(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("implementation", [add_rms_norm, add_rms_norm_triton])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(implementation, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 96).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.randn(96).to(dtype).to(DEVICE)
    normed, total = implementation(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert_near(normed, rms(x + residual, weight, 1e-5), dtype)


@pytest.mark.parametrize("implementation", [rms_norm, rms_norm_triton])
def test_rms_norm_rounds_where_the_families_do(implementation):
    """bf16, to the bit but for a rare tie: a bf16 weight comes after the rounding, an fp32 one before."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 256).bfloat16(), 1 + 0.3 * torch.randn(256)
    llama, gemma = LlamaRMSNorm(256, 1e-6).bfloat16(), Gemma2RMSNorm(256, 1e-6)
    with torch.no_grad():
        llama.weight.copy_(weight)
        gemma.weight.copy_(weight - 1)
        for oracle, own in ((llama, llama.weight), (gemma, 1 + gemma.weight)):
            found = implementation(x.to(DEVICE), own.to(DEVICE), 1e-6).cpu()
            assert (found != oracle(x)).float().mean() < 0.005


def test_rms_norm_of_zeros_and_of_nothing():
    weight = torch.ones(48, device=DEVICE)
    assert torch.equal(rms_norm_triton(torch.zeros(2, 48, device=DEVICE), weight, 1e-5).cpu(), torch.zeros(2, 48))
    assert rms_norm_triton(torch.zeros(0, 48, device=DEVICE), weight, 1e-5).shape == (0, 48)


@pytest.mark.parametrize("implementation", [head_norm_, head_norm_triton_])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (19, 24), (5, 128)])
def test_head_norm_of_a_slice(implementation, dtype, heads, dim):
    torch.manual_seed(0)
    row, weight = torch.randn(3, heads * dim + 12).to(dtype), torch.randn(heads, dim).to(dtype)
    expected = row.double()
    expected[:, 8:-4] = rms(row[:, 8:-4].unflatten(1, (heads, dim)), weight, 1e-5).flatten(1)
    row = row.to(DEVICE)
    implementation(row[:, 8:-4].unflatten(1, (heads, dim)), weight.to(DEVICE), 1e-5)
    assert_near(row, expected, dtype)  # what lies around the slice is as it was
    implementation(row[:0, 8:-4].unflatten(1, (heads, dim)), weight.to(DEVICE), 1e-5)


@pytest.mark.parametrize("implementation", [rope_, rope_torch_, rope_triton_])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (5, 24), (19, 64)])
@pytest.mark.parametrize("per_head", [False, True])
def test_rotation_of_a_slice(implementation, dtype, heads, dim, per_head):
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 100_000])
    inv_freq = torch.rand(heads if per_head else 1, dim // 2, dtype=torch.float64)
    angle = positions[:, None, None] * inv_freq
    row = torch.randn(3, heads * dim + 12).to(dtype)
    a, b = row[:, 8:-4].unflatten(1, (heads, -1, 2)).double().unbind(-1)
    expected = row.double()
    turned = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    expected[:, 8:-4] = turned.flatten(1)
    row = row.to(DEVICE)
    implementation(row[:, 8:-4].unflatten(1, (heads, dim)), rope_table(positions, inv_freq).to(DEVICE))
    assert_near(row, expected, dtype)  # what lies around the slice is as it was


ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_tanh": lambda x: x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
    "relu_squared": lambda x: x.clamp_min(0) ** 2,
}


@pytest.mark.parametrize("implementation", [gated_mul_torch, gated_mul_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "width"), [("silu", 1), ("silu", 1500), ("gelu_tanh", 99), ("relu_squared", 7)])
@pytest.mark.filterwarnings("ignore:overflow")  # numpy, in the interpreter
def test_gated_mul(implementation, dtype, activation, width):
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * width) * 10).to(dtype).to(DEVICE)
    gate, up = gate_up.double().chunk(2, -1)
    assert_near(implementation(gate_up, activation), ACTIVATIONS[activation](gate) * up, dtype)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, in the interpreter
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_mul_of_extremes(activation):
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 1.0, 1.0, 1.0]], device=DEVICE)
    assert gated_mul_triton(gate_up, activation).tolist() == [[0.0, 1e4, 0.0]]


@pytest.mark.parametrize("write", [cache_write_torch, cache_write_triton])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_rows_and_no_others_change(write, dtype):
    torch.manual_seed(0)
    cache = torch.randn(5, 4, 24).to(dtype).to(DEVICE)
    rows = torch.randn(6, 40).to(dtype).to(DEVICE)[:, 8:32]
    slots = torch.tensor([19, 0, 7, 8, 3, 12])
    expected = cache.flatten(0, 1).clone()
    expected[slots.to(DEVICE)] = rows
    write(cache, rows, slots.to(DEVICE))
    assert torch.equal(cache.flatten(0, 1), expected)
    write(cache, rows[:0], slots[:0].to(DEVICE))
    assert torch.equal(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("gather", [cache_gather_torch, cache_gather_triton])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_gathered_pieces(gather, block_size):
    torch.manual_seed(0)
    sequences = [torch.randn(n, 24) for n in (40, 3, 0, 25)]
    starts, counts = [10, 0, 0, 24], [30, 3, 0, 1]
    cache, tables, _ = block_cache(sequences, block_size, torch.float32, DEVICE)
    cu_rows = torch.tensor([0, 30, 33, 33, 34], dtype=torch.int32, device=DEVICE)
    begin = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    expected = torch.cat([rows[s : s + n] for rows, s, n in zip(sequences, starts, counts, strict=True)])
    assert torch.equal(gather(cache, tables, begin, cu_rows, 34).cpu(), expected)
    assert gather(cache, tables, begin, torch.zeros_like(cu_rows), 0).shape == (0, 24)
