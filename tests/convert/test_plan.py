"""From a cache ratio to sizes, and which candidates are tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from convert.errors import ConversionError
from convert.plan import Allocation, Candidate, MethodRequest, candidates
from convert.sizes import rope_splits_by_head, split_budget
from engine.spec import GatedMLPSpec, GQASpec, LayerSpec, ModelSpec, RopeSpec


def gqa(kv_heads: int, dim: int) -> GQASpec:
    return GQASpec(4 * kv_heads, kv_heads, dim, 1.0, RopeSpec((1.0,) * (dim // 2)))


def model(*layers: GQASpec) -> ModelSpec:
    return ModelSpec(32, 32, 1e-5, 64, True, "float32", tuple(LayerSpec(a, GatedMLPSpec(8)) for a in layers))


def options_of(ways: list[Candidate | Allocation]) -> list[dict[str, Any]]:
    return [way.options for way in ways if isinstance(way, Candidate)]


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
    wide = [{"sizes": [[64, 64]], "freqfold": f} for f in (1, 2, 4, 8)]
    narrow = [{"sizes": [[96, 32]], "freqfold": f} for f in (2, 4, 8, 16)]
    assert options_of(tried) == wide + narrow
    assert all(len(c.layers) == 2 for c in tried if isinstance(c, Candidate))
    assert [o["freqfold"] for o in options_of(candidates(spec, MethodRequest("transmla", freqfold=32)))] == [32, 32]
    only_whole = candidates(spec, MethodRequest("transmla", freqfold=1))  # half the frequencies want an even one
    assert options_of(only_whole) == [{"sizes": [[64, 64]], "freqfold": 1}]


def test_layers_may_differ() -> None:
    spec = model(gqa(2, 64), gqa(4, 16))
    tried = candidates(spec, MethodRequest("transmla", cache_ratio=0.5))
    assert [o["freqfold"] for o in options_of(tried)] == [1, 2, 4, 8, 2, 4, 8]
    assert options_of(tried)[0]["sizes"] == [[64, 64], [48, 16]]
    with pytest.raises(ConversionError, match="--freqfold 32 does not fit"):
        candidates(spec, MethodRequest("transmla", freqfold=32))


@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 2), (2, 64), (3, 10), (8, 128), (32, 128)])
def test_splits_by_head_fit_their_budget_or_say_why(kv_heads: int, dim: int) -> None:
    spec = gqa(kv_heads, dim)
    for percent in (1, 2, 5, 10, 25, 50, 77, 100):
        budget = percent * spec.cache_width // 100
        if budget < 2 * kv_heads + 2:
            with pytest.raises(ConversionError, match="leaves no room"):
                rope_splits_by_head(spec, percent / 100)
            continue
        for rank, rope in rope_splits_by_head(spec, percent / 100):
            assert rank >= 2
            assert 2 <= rope <= dim
            assert rope % 2 == 0
            assert (budget - kv_heads * rope) * 7 // 8 - 1 <= rank <= budget - kv_heads * rope
            assert rank <= kv_heads * (2 * dim - rope)


def test_candidates_of_mha2mla() -> None:
    spec = model(gqa(2, 64), gqa(2, 64))
    tried = options_of(candidates(spec, MethodRequest("mha2mla", cache_ratio=0.5)))
    assert tried[0] == {"sizes": [[112, 8]], "partial_rope": "high", "svd": "joint"}
    assert len(tried) == len({str(options) for options in tried}) == 6 * 4 * 2
    one = MethodRequest("mha2mla", cache_ratio=0.5, partial_rope="2-norm", svd="split")
    assert {(o["partial_rope"], o["svd"]) for o in options_of(candidates(spec, one))} == {("2-norm", "split")}
    all_ratios = options_of(candidates(spec, MethodRequest("mha2mla", cache_ratio=1.0)))
    whole = [o for o in all_ratios if o["sizes"][0][1] == 64]
    assert len(whole) == 1  # RoPE on all channels leaves nothing to choose


def test_candidates_of_care() -> None:
    spec = model(gqa(2, 64), gqa(2, 64))
    tried = candidates(spec, MethodRequest("care", cache_ratio=0.5))
    assert len(options_of(tried)) == 8 * 2  # splits and FreqFolds as for transmla, two bases
    assert sum(isinstance(way, Allocation) for way in tried) == 8 * 2
    tiny = candidates(spec, MethodRequest("care", kv_lora_rank=3, qk_rope_head_dim=16))
    assert not any(isinstance(way, Allocation) for way in tiny)  # nothing to share out


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (MethodRequest("mha2mla", freqfold=2), "--freqfold is an option of --method transmla and care"),
        (MethodRequest("care", partial_rope="high"), "--partial-rope is an option of --method mha2mla"),
        (MethodRequest("exact", svd="joint"), "--svd is an option of --method mha2mla"),
        (MethodRequest("magic"), "--method magic is not known"),
    ],
)
def test_options_of_another_method(request_: MethodRequest, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        candidates(model(gqa(2, 64)), request_)


def test_layers_with_qk_norm() -> None:
    """What only looks at the weights of keys has nothing to look at; all else works on the keys themselves."""
    spec = model(replace(gqa(2, 16), qk_norm_eps=1e-6))
    for method in ("exact", "score-aware", "transmla", "care"):
        assert candidates(spec, MethodRequest(method))
    with pytest.raises(ConversionError, match=r"mha2mla.*QK norm"):
        candidates(spec, MethodRequest("mha2mla"))
