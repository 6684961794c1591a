"""The grouped experts, both implementations, against float64, one token and one expert at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.moe import moe_torch, moe_triton, rows_per_scale

from .conftest import DEVICE
from .fp8 import multiplied_out, random_fp8
from .reference import assert_near


def by_projection(x, experts, weights, gate_up, down):
    def apart(stacked):
        return [partial(F.linear, weight=w) for w in stacked]

    return moe_torch(x, experts, weights, apart(gate_up), apart(down))


def definition(x, experts, weights, gate_up, down):
    x, weights, gate_up, down = (t.double().cpu() for t in (x, weights, gate_up, down))
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(experts[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += w * (down[e] @ (gate / (1 + (-gate).exp()) * up))
    return out


def check(implementation, experts, hidden, width, num_experts, dtype):
    """`experts` [T][k]: who is chosen. x is a slice of wider rows that hold NaN elsewhere."""
    torch.manual_seed(0)
    experts = torch.tensor(experts, device=DEVICE)
    tokens, k = experts.shape
    wide = torch.full((tokens, hidden + 16), float("nan"))
    wide[:, 8 : 8 + hidden] = torch.randn(tokens, hidden)
    x = wide.to(dtype).to(DEVICE)[:, 8 : 8 + hidden]
    weights = torch.rand(tokens, k, device=DEVICE)
    gate_up = (torch.randn(num_experts, 2 * width, hidden) * hidden**-0.5).to(dtype).to(DEVICE)
    down = (torch.randn(num_experts, hidden, width) * width**-0.5).to(dtype).to(DEVICE)
    assert_near(
        implementation(x, experts, weights, gate_up, down), definition(x, experts, weights, gate_up, down), dtype
    )


def spread(tokens, k, num_experts, seed=0):
    """k distinct experts for each token, at random."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_experts, generator=generator)[:k].tolist() for _ in range(tokens)]


CHOICES = {
    "one token": (spread(1, 2, 5), 5),
    "one expert has all": ([[3]] * 19, 4),
    "most experts have none": ([[0, 6], [6, 0], [6, 0]], 7),
    "ragged": (spread(37, 3, 6) + [[5, 0, 1]] * 20, 6),
    "every expert": (spread(9, 4, 4), 4),
}


@pytest.mark.parametrize("implementation", [by_projection, moe_triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", CHOICES)
def test_against_float64(implementation, dtype, choice):
    experts, num_experts = CHOICES[choice]
    check(implementation, experts, 48, 33, num_experts, dtype)


@pytest.mark.parametrize("implementation", [by_projection, moe_triton])
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (130, 70), (64, 128)])
def test_sizes(implementation, hidden, width):
    check(implementation, spread(5, 2, 3), hidden, width, 3, torch.bfloat16)


def check_fp8(experts, hidden, width, num_experts, dtype):
    """Gates and ups have blocks of their own, whose scales end up in groups that no block of either crosses."""
    generator = torch.Generator().manual_seed(hidden + width)
    parts = [
        [random_fp8(*shape, generator) for shape in ((width, hidden), (width, hidden), (hidden, width))]
        for _ in range(num_experts)
    ]
    group = rows_per_scale(width)
    rows = torch.arange(0, width, group) // 128  # each group's row of blocks
    gate_up = torch.stack([torch.cat((gate[0], up[0])) for gate, up, _ in parts])
    gate_up_scale = torch.stack([torch.cat((gate[1][rows], up[1][rows])) for gate, up, _ in parts])
    down, down_scale = (torch.stack(tensors) for tensors in zip(*(part[2] for part in parts), strict=True))
    x = torch.randn(len(experts), hidden, generator=generator).to(dtype)
    weights = torch.rand(len(experts), len(experts[0]), generator=generator)
    exact_gate_up = [torch.cat((multiplied_out(*gate), multiplied_out(*up))) for gate, up, _ in parts]
    exact_down = [multiplied_out(*part[2]) for part in parts]
    experts = torch.tensor(experts)
    expected = definition(x, experts, weights, torch.stack(exact_gate_up), torch.stack(exact_down))
    given = (x, experts, weights, gate_up, down, gate_up_scale, down_scale)
    assert_near(moe_triton(*(t.to(DEVICE) for t in given)), expected, dtype)


@pytest.mark.parametrize(
    ("hidden", "width", "dtype"),
    [
        *((hidden, width, torch.bfloat16) for hidden, width in ((150, 40), (128, 128), (40, 192), (130, 33))),
        *((130, 192, dtype) for dtype in (torch.float32, torch.float16)),
    ],
)
def test_fp8(hidden, width, dtype):
    """Groups of 8, 128, 64 rows and of one."""
    check_fp8([*spread(4, 2, 4), [2, 0]], hidden, width, 4, dtype)


@pytest.mark.parametrize("tokens", [40, 150])
def test_fp8_tiles_for_many_rows_of_an_expert(tokens):
    check_fp8([[0, 1] if t % 3 else [1, 0] for t in range(tokens)], 200, 24, 3, torch.bfloat16)


@pytest.mark.parametrize("tokens", [40, 150])
def test_tiles_for_many_rows_of_an_expert(tokens):
    """Enough pairs for the tiles of 64 and of 128 rows; expert 2 has none."""
    check(moe_triton, [[0, 1] if t % 3 else [1, 0] for t in range(tokens)], 40, 24, 3, torch.bfloat16)


def test_no_tokens():
    x = torch.zeros(0, 8, device=DEVICE)
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    out = moe_triton(x, none, torch.zeros(0, 2), torch.zeros(3, 8, 8), torch.zeros(3, 8, 4))
    assert out.shape == (0, 8)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, in the interpreter
def test_extreme_gates():
    x = torch.tensor([[1e4], [-1e4]], device=DEVICE)
    experts, weights = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    out = moe_triton(x, experts, weights, torch.ones(1, 2, 1, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE))
    assert out.flatten().tolist() == [1e8, 0.0]
