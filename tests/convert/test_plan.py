"""From a cache ratio to sizes, and which candidates are tried."""

from __future__ import annotations

import pytest

from convert.errors import ConversionError
from convert.plan import MethodRequest, candidates, split_budget
from engine.spec import GatedMLPSpec, GQASpec, LayerSpec, ModelSpec, RopeSpec


def gqa(kv_heads: int, dim: int) -> GQASpec:
    return GQASpec(4 * kv_heads, kv_heads, dim, 1.0, RopeSpec((1.0,) * (dim // 2)))


def model(*layers: GQASpec) -> ModelSpec:
    return ModelSpec(32, 32, 1e-5, 64, True, "float32", tuple(LayerSpec(a, GatedMLPSpec(8)) for a in layers))


@pytest.mark.parametrize(
    ("kv_heads", "dim", "ratio", "expected"),
    [
        (8, 128, 0.28125, (448, 128)),  # Llama-3-8B at 576 of 2048
        (32, 128, 576 / 8192, (448, 128)),  # Llama-2-7B at 576 of 8192
        (8, 128, 1.0, (1920, 128)),
        (2, 64, 0.5, (64, 64)),
        (2, 64, 0.375, (32, 64)),  # RoPE on every channel as long as that takes no more than two thirds
        (2, 64, 0.3125, (48, 32)),
        (2, 64, 0.25, (32, 32)),
        (4, 8, 0.1, (2, 4)),
        (1, 16, 0.5, (8, 8)),
        (2, 10, 0.3, (2, 10)),  # 5 pairs cannot be halved
        (8, 128, 0.3, (480, 128)),  # 614: the rank gives up 6 to be a multiple of 16
    ],
)
def test_split_of_the_budget(kv_heads: int, dim: int, ratio: float, expected: tuple[int, int]) -> None:
    assert split_budget(gqa(kv_heads, dim), ratio) == expected


@pytest.mark.parametrize("dim", [2, 6, 8, 10, 16, 64, 80, 128])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_every_ratio_fits_its_budget_or_says_why(kv_heads: int, dim: int) -> None:
    spec = gqa(kv_heads, dim)
    smallest = 2 * (dim // (dim & -dim)) + 1  # the odd part of dim, in pairs, and a rank of 1
    for percent in range(1, 101):
        budget = percent * spec.cache_width // 100
        if budget < smallest:
            with pytest.raises(ConversionError, match="leaves no room"):
                split_budget(spec, percent / 100)
            continue
        rank, rope = split_budget(spec, percent / 100)
        assert rank >= 1
        assert rope % 2 == 0
        assert dim % rope == 0
        assert budget * 7 // 8 - rope // 8 - 1 <= rank + rope <= budget


@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 16), (3, 8), (1, 80), (32, 128)])
def test_the_smallest_ratio_named_works(kv_heads: int, dim: int) -> None:
    with pytest.raises(ConversionError, match="smallest ratio that works is ") as caught:
        split_budget(gqa(kv_heads, dim), 1e-5)
    assert split_budget(gqa(kv_heads, dim), float(str(caught.value).split()[-1]))[0] >= 1


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, float("nan"), float("inf")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConversionError, match="out of range"):
        split_budget(gqa(2, 16), ratio)


def test_candidates_of_transmla() -> None:
    spec = model(gqa(2, 64), gqa(2, 64))
    tried = candidates(spec, MethodRequest("transmla", cache_ratio=0.5))
    assert [c.options for c in tried] == [{"freqfold": f} for f in (1, 2, 4, 8)]
    assert all(len(c.layers) == 2 for c in tried)
    assert [c.options for c in candidates(spec, MethodRequest("transmla", freqfold=32))] == [{"freqfold": 32}]


def test_layers_may_differ() -> None:
    spec = model(gqa(2, 64), gqa(4, 16))
    tried = candidates(spec, MethodRequest("transmla", cache_ratio=0.5))
    assert [c.options for c in tried] == [{"freqfold": f} for f in (1, 2, 4, 8)]
    with pytest.raises(ConversionError, match="--freqfold 32 does not fit"):
        candidates(spec, MethodRequest("transmla", freqfold=32))
