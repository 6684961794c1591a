"""Whole models on the Triton kernels: what the layers hand them, and that a CUDA tensor reaches them.

Without a GPU the tensors lie on the CPU and only say that they do not; the kernels run in the interpreter.
"""

from __future__ import annotations

import pytest
import torch

import engine.model.load
import engine.model.mla
from engine.kernels.sample import SamplingTensors, sample
from engine.model.batch import Batch
from engine.model.load import load_model
from tests.engine.tiny import tiny_model
from tests.model.fp8_folders import make_fp8

from .conftest import DEVICE

BLOCK = 16
# Steps of three sequences: (computed, counts). Prefills; then decodes and the third's prefill; then decodes.
STEPS = [([0, 0], [20, 3]), ([20, 3, 0], [1, 1, 33]), ([21, 4, 33], [1, 1, 1])]
FEW_STEPS = [([0], [5]), ([5], [1])]
TABLES = [[3, 9, 1], [7, 2, 11], [5, 10, 4]]


def run(model, device, steps=STEPS):
    """Hidden states of every step, end to end, on the CPU."""
    ids = torch.randint(model.spec.vocab_size, (3, 48), generator=torch.Generator().manual_seed(1))
    cache, outs = model.new_cache(12, BLOCK), []
    for layer in cache:
        layer[0] = float("nan")  # nobody's block
    for computed, counts in steps:
        batch = Batch.build(computed, counts, TABLES[: len(counts)], BLOCK, device)
        tokens = torch.cat([ids[b, s : s + n] for b, (s, n) in enumerate(zip(computed, counts, strict=True))])
        outs.append(model.logits(model.forward(tokens.to(device), batch, cache)).cpu())
    return torch.cat(outs)


DEFINITIONS = {
    "cache": ["cache_write_torch", "cache_gather_torch"],
    "gqa_decode": ["gqa_decode_torch"],
    "gqa_prefill": ["gqa_prefill_torch"],
    "mla_decode": ["mla_decode_torch"],
    "mla_prefill": ["mla_prefill_torch", "merge_partial_torch"],
    "norm": ["rms_norm_torch"],
    "rope": ["rope_torch_"],
    "sample": ["sample_torch"],
    "gated_mul": ["gated_mul_torch"],
    "fp8_linear": ["fp8_linear_torch"],
    "route": ["route_torch"],
}


@pytest.fixture
def claim_cuda(monkeypatch):
    """-> a function after whose call every tensor says that it is on a GPU, and the torch definitions are gone."""
    if DEVICE == "cuda":
        pytest.skip("this is for machines without a GPU")

    def claim():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        for name, functions in DEFINITIONS.items():
            for function in functions:
                monkeypatch.delattr(f"engine.kernels.{name}.{function}")

    return claim


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_a_model_on_triton_kernels_gives_the_same_logits(monkeypatch, claim_cuda, kind):
    monkeypatch.setattr(engine.model.mla, "EXPAND_TOKENS", 16)  # contexts in pieces, to be merged
    model = tiny_model(kind, layers=1)
    expected = run(model, DEVICE)
    claim_cuda()
    torch.testing.assert_close(run(model, DEVICE), expected, atol=2e-4, rtol=1e-4)


def test_weights_that_stay_fp8(monkeypatch, tmp_path, claim_cuda):
    """A DeepSeek-V3 with a dense layer and one of experts in fp16, against the same model multiplied out in fp32."""
    fp8, plain = make_fp8(tmp_path, "groups")
    expected = run(load_model(plain, DEVICE, "float32"), DEVICE, FEW_STEPS)
    monkeypatch.setattr(engine.model.load, "capability", lambda device: (9, 0))
    claim_cuda()
    model = load_model(fp8, DEVICE, "float16")
    assert [t.dtype for t in model.layers[1].mlp_half.mlp._stacked] == [torch.float8_e4m3fn] * 2 + [torch.float32] * 2
    found = run(model, DEVICE, FEW_STEPS)
    assert (found - expected).norm() < 0.01 * expected.norm()  # NaN fails too


def test_sampling_a_cuda_tensor_is_tritons(claim_cuda):
    logits, options = torch.randn(2, 50), SamplingTensors.build([0.0, 1.0], [0, 5], [1, 0.9], [0, 0], [1, 2], [3, 4])
    expected = sample(logits, options)
    claim_cuda()
    assert torch.equal(sample(logits, options), expected)
