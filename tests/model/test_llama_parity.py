"""The GQA path against `transformers`, fp32: logits within 1e-4, however the tokens are cut into steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from engine.checkpoint import open_checkpoint
from engine.messages import Request
from engine.model.batch import Batch
from engine.model.load import load_model
from engine.model.transformer import Transformer, embed
from engine.sampling_params import SamplingParams
from tests.convert.engine_runs import assert_greedy
from tests.engine.tiny import engine, run, tiny_model, tokens

BLOCK = 8
LENGTHS = (37, 20, 9)
TOLERANCE = 1e-4
DEMOS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "demo").glob("*/config.json"))


def stepwise(model: Transformer, sequences: list[Tensor], cuts: list[list[int]]) -> list[Tensor]:
    """Logits of every token; in step s, sequence b computes cuts[s][b] tokens. Block tables are shuffled."""
    per = -(-max(map(len, sequences)) // BLOCK)
    tables = np.random.default_rng(1).permutation(per * len(sequences)).astype(np.int32).reshape(-1, per)
    cache = model.new_cache(per * len(sequences), BLOCK)
    for layer in cache:
        layer.fill_(float("nan"))  # what was never written must never be read
    done = np.zeros(len(sequences), np.int64)
    out: list[list[Tensor]] = [[] for _ in sequences]
    for step in cuts:
        counts = np.array(step)
        order = sorted(np.flatnonzero(counts), key=lambda b: counts[b] != 1)
        batch = Batch.build(done[order], counts[order], tables[order], BLOCK)
        ids = torch.cat([sequences[b][done[b] : done[b] + counts[b]] for b in order])
        logits = model.logits(model.forward(ids, batch, cache))
        for b, part in zip(order, logits.split(counts[order].tolist()), strict=True):
            out[b].append(part)
        done += counts
    assert done.tolist() == [len(sequence) for sequence in sequences]
    return [torch.cat(parts) for parts in out]


def decode_after(prefill: list[int]) -> list[list[int]]:
    """Prefill so many tokens of each sequence, then one at a time until each is done."""
    rest = [n - p for n, p in zip(LENGTHS, prefill, strict=True)]
    return [prefill] + [[int(step < n) for n in rest] for step in range(max(rest))]


CUTTINGS = {
    "at once": [list(LENGTHS)],
    "one by one": decode_after([1, 1, 1]),
    "prefill then decode": decode_after([30, 12, 5]),
    "chunks": [[16, 7, 2], [16, 7, 2], [5, 6, 5]],
    "mixed": [[20, 0, 0], [1, 13, 0], [1, 6, 4], [14, 1, 1], [1, 0, 4]],
}


@torch.inference_mode()
def check_against_transformers(folder: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = load_model(folder, "cpu", "float32")
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(model.spec.vocab_size, (n,), generator=generator) for n in LENGTHS]
    expected = [oracle(sequence[None]).logits[0] for sequence in sequences]
    for name, cuts in CUTTINGS.items():
        for found, right in zip(stepwise(model, sequences, cuts), expected, strict=True):
            error = (found - right).abs().max().item()
            assert error < TOLERANCE, f"{name}: {error}"  # NaN fails too
    ids = torch.randint(model.spec.vocab_size, (3, 21), generator=generator)
    hidden = model.forward(ids.flatten(), Batch.dense(3, 21, BLOCK), model.new_cache(9, BLOCK))
    assert (model.logits(hidden).view(3, 21, -1) - oracle(ids).logits).abs().max() < TOLERANCE


def test_shared_checkpoints(shared_model):
    check_against_transformers(shared_model)


@pytest.mark.parametrize("folder", DEMOS, ids=lambda folder: folder.name)
def test_bundled_checkpoints(folder):
    check_against_transformers(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

SMALL: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gqa": (LlamaConfig, {}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mha": (LlamaConfig, {"num_key_value_heads": 6}),
    "mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "head_dim of its own": (LlamaConfig, {"head_dim": 10}),
    "yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "linear": (LlamaConfig, {"rope_parameters": LINEAR}),
    "dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC}),
    "gelu": (LlamaConfig, {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with a window": (MistralConfig, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, a window of one block in the upper layers": (
        Qwen2Config, {"use_sliding_window": True, "sliding_window": BLOCK, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 10}),
    "qwen3 with biases and a window": (
        Qwen3Config, {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 1,
                      "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma2": (
        Gemma2Config, {"head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": 9, "attn_logit_softcapping": 3.0,
                       "final_logit_softcapping": 5.0},
    ),
    "gemma2 without caps, untied": (
        Gemma2Config, {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                       "attention_bias": True, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def random_model(folder: Path, kind: type[PreTrainedConfig], sharded: bool = False, **changes: Any) -> None:
    """A model of `kind` whose every weight is random, norms and biases too, saved by `transformers`."""
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            weight.copy_(
                centre + torch.randn_like(weight) * (0.2 if weight.dim() == 1 else 1.5 * weight.shape[1] ** -0.5)
            )
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")


@pytest.mark.parametrize("name", SMALL)
def test_small_configs(tmp_path, name):
    kind, changes = SMALL[name]
    random_model(tmp_path, kind, **changes)
    check_against_transformers(tmp_path)


@pytest.mark.parametrize("name", ["mistral with a window", "qwen3 with biases and a window", "gemma2"])
def test_greedy_tokens_of_the_whole_engine(tmp_path, name):
    """Four requests side by side, prompts in chunks, contexts of several blocks and windows."""
    kind, changes = SMALL[name]
    random_model(tmp_path, kind, **changes)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    core = engine(load_model(tmp_path, "cpu", "float32"), block_size=BLOCK, max_batched_tokens=16)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (40, 3, 25, 17)]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    found = run(core, [Request(id=str(i), prompt_ids=p, params=params) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert_greedy(tokens(found[str(i)]), oracle, prompt)


def test_embedding_scale_is_rounded_as_transformers_rounds_it():
    theirs = Gemma2TextScaledWordEmbedding(61, 48, 0, 48**0.5).bfloat16()
    spec = replace(tiny_model("gqa").spec, embedding_scale=48**0.5)
    ids = torch.arange(61)
    assert torch.equal(embed(ids, theirs.weight, spec), theirs(ids))


def test_mimo_is_qwen2_with_layers_to_leave_out(tmp_path):
    random_model(tmp_path, Qwen2Config)
    path, tensors = tmp_path / "config.json", load_file(tmp_path / "model.safetensors")
    qwen = open_checkpoint(tmp_path)
    expected = dict(qwen.layer(1))
    own = {"model_type": "mimo", "num_nextn_predict_layers": 1, "auto_map": {"AutoModel": "modeling_mimo.MiMoModel"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    tensors |= {"model.mtp_layers.0.input_proj.weight": torch.zeros(48, 96)}
    save_file(tensors, tmp_path / "model.safetensors")
    mimo = open_checkpoint(tmp_path)
    assert mimo.spec == qwen.spec
    assert all(torch.equal(mimo.layer(1)[name], tensor) for name, tensor in expected.items())


def test_shards_as_transformers_writes_them(tmp_path):
    random_model(tmp_path, LlamaConfig, sharded=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_against_transformers(tmp_path)
