"""Weights that stay FP8: which do, that they are joined right, and whole models of them against `transformers`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import engine.model.load
from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import layer_tensors
from engine.model.fp8_weights import staying_fp8
from engine.model.linear import Linear, projection
from engine.model.load import load_model
from engine.model.transformer import Transformer
from tests.kernels.fp8 import multiplied_out, random_fp8
from tests.model.fp8_folders import make_fp8
from tests.model.test_llama_parity import CUTTINGS, LENGTHS, TOLERANCE, stepwise

HOPPER = (9, 0)


@pytest.fixture
def hopper(monkeypatch):
    """Any device says that it is one. FP8 weights stay FP8, and the CPU multiplies by them as kernels are defined."""
    monkeypatch.setattr(engine.model.load, "capability", lambda device: HOPPER)


@pytest.mark.parametrize("name", ["groups", "moonlight, an epsilon that the latent norms do not share"])
def test_which_stay(tmp_path, name):
    checkpoint = open_checkpoint(make_fp8(tmp_path, name)[0])
    for i, layer in enumerate(checkpoint.spec.layers):
        stored, shapes = checkpoint.fp8_weights(i), layer_tensors(layer, checkpoint.spec.hidden_size)
        assert checkpoint.fp8_block == (128, 128)
        for capability in (None, (7, 5), (8, 0), (8, 6)):
            assert not staying_fp8(stored, shapes, (128, 128), capability)
        for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
            assert staying_fp8(stored, shapes, (128, 128), capability) == stored - {"self_attn.kv_b_proj.weight"}
        assert not staying_fp8(stored, shapes, (64, 128), HOPPER)
        assert not staying_fp8(stored, shapes, None, HOPPER)
        attention = {n for n in stored if n.startswith("self_attn.")} - {"self_attn.kv_b_proj.weight"}
        some = stored - {sorted(n for n in stored if n.startswith("mlp."))[0]}
        assert staying_fp8(some, shapes, (128, 128), HOPPER) == attention


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(1, 300), st.booleans(), st.randoms())
def test_joined_rows_keep_their_scales(rows, columns, biased, random):
    """However many rows each projection has, and whatever order they are joined in."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    names, tensors, exact, biases = [], {}, [], []
    for i, count in enumerate(rows):
        weight, scale = random_fp8(count, columns, generator)
        names.append(f"p{i}")
        tensors |= {f"p{i}.weight": weight, f"p{i}.scale": scale.repeat_interleave(128, 0)[:count]}
        exact.append(multiplied_out(weight, scale))
        biases.append(torch.randn(count, generator=generator) if biased and i != 1 else torch.zeros(count))
        tensors[f"p{i}.bias"] = biases[-1]
    order = torch.randperm(sum(rows), generator=generator)

    def join(parts):
        assert parts[0].dtype in (torch.uint8, torch.float32)
        return torch.cat(parts)[order]

    with_bias = [name for i, name in enumerate(names) if biased and i != 1]
    x = torch.randn(3, columns, generator=generator)
    expected = (x.double() @ torch.cat(exact).T + torch.cat(biases).double())[:, order]
    found = projection(tensors, *names, biased=with_bias, join=join)(x)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_without_scales_nothing_is_fp8():
    tensors = {"p.weight": torch.randn(3, 4), "q.weight": torch.randn(2, 4), "q.bias": torch.ones(2)}
    x = torch.randn(5, 4)
    found = projection(tensors, "p", "q", biased=["q"])(x)
    expected = torch.cat((x @ tensors["p.weight"].T, x @ tensors["q.weight"].T + 1), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def linears(model: Transformer) -> list[Linear]:
    """Those of all layers."""
    found, seen = [], [vars(layer) for layer in model.layers]
    for members in seen:
        for value in members.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, list):
                    found += item
                elif isinstance(item, Linear):
                    found.append(item)
                elif type(item).__module__.startswith("engine.model."):
                    seen.append(vars(item))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "groups",
        "moonlight, an epsilon that the latent norms do not share",
        "half-split, weights as scored, biases",
    ],
)
@torch.inference_mode()
def test_against_transformers(tmp_path, hopper, name):
    fp8, plain = make_fp8(tmp_path, name)
    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    model = load_model(fp8, "cpu", "float32")
    kept = [linear._weight.dtype == torch.float8_e4m3fn for linear in linears(model)]
    assert all(kept)
    assert len(kept) >= 2 * (2 + 2) + 2 * 8  # attention and a dense or shared MLP in each layer, and a layer's experts
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(model.spec.vocab_size, (n,), generator=generator) for n in LENGTHS]
    expected = [oracle(sequence[None]).logits[0] for sequence in sequences]
    assert min(logits.std() for logits in expected) > 0.1
    for cuts in ("at once", "mixed"):
        for found, right in zip(stepwise(model, sequences, CUTTINGS[cuts]), expected, strict=True):
            assert (found - right).abs().max() < TOLERANCE  # NaN fails too


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_as_multiplied_out(tmp_path, monkeypatch, dtype):
    """On the same device, with and without: logits within the rounding of dtype, on average."""
    fp8, _ = make_fp8(tmp_path, "groups")
    ids = [torch.arange(n) for n in LENGTHS]
    without = stepwise(load_model(fp8, "cpu", dtype), ids, CUTTINGS["mixed"])
    monkeypatch.setattr(engine.model.load, "capability", lambda device: HOPPER)
    kept = load_model(fp8, "cpu", dtype)
    assert kept.dtype == getattr(torch, dtype)
    for found, right in zip(stepwise(kept, ids, CUTTINGS["mixed"]), without, strict=True):
        assert (found - right).float().norm() < 0.05 * right.float().norm()
