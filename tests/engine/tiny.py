"""Small random models, and what a test needs to run requests on them. Nothing here asserts."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from engine.checkpoint.checkpoint import GenerationDefaults
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Output, Request
from engine.model.batch import Batch
from engine.model.transformer import Transformer
from engine.sampling_params import SamplingParams
from engine.spec import AttentionSpec, GatedMLPSpec, GQASpec, LayerSpec, MLASpec, ModelSpec, RopeSpec

VOCAB = 97
HIDDEN = 32
CONTEXT = 512
EOS = 7


def attention_spec(kind: str) -> AttentionSpec:
    inv_freq = tuple(10000.0 ** (-i / 4) for i in range(4))
    if kind == "gqa":
        return GQASpec(num_heads=4, num_kv_heads=2, head_dim=8, softmax_scale=8**-0.5, rope=RopeSpec(inv_freq))
    return MLASpec(
        num_heads=4, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=6, softmax_scale=0.25,
        rope=RopeSpec(inv_freq, "interleaved"), latent_norm_eps=1e-6,
    )  # fmt: skip


def tiny_model(kind: str, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> Transformer:
    """kind: "gqa" or "mla". Weights large enough that its greedy text depends on the whole context."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 1.5 * shape[-1] ** -0.5).to(dtype)

    spec = attention_spec(kind)
    heads = spec.num_heads
    if isinstance(spec, GQASpec):
        kv = spec.num_kv_heads * spec.head_dim
        shapes = {"q_proj": (heads * spec.head_dim, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN)}
        shapes["o_proj"] = (HIDDEN, heads * spec.head_dim)
    else:
        shapes = {
            "q_proj": (heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim), HIDDEN),
            "kv_a_proj_with_mqa": (spec.cache_width, HIDDEN),
            "kv_b_proj": (heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank),
            "o_proj": (HIDDEN, heads * spec.v_head_dim),
        }

    def layer() -> dict[str, Tensor]:
        tensors = {f"self_attn.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        if isinstance(spec, MLASpec):
            tensors["self_attn.kv_a_layernorm.weight"] = torch.ones(spec.kv_lora_rank, dtype=dtype)
        for name, shape in {"gate_proj": (48, HIDDEN), "up_proj": (48, HIDDEN), "down_proj": (HIDDEN, 48)}.items():
            tensors[f"mlp.{name}.weight"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.weight"] = torch.ones(HIDDEN, dtype=dtype)
        return tensors

    model_spec = ModelSpec(
        vocab_size=VOCAB, hidden_size=HIDDEN, norm_eps=1e-6, max_position_embeddings=CONTEXT, tie_embeddings=False,
        dtype="float32", layers=(LayerSpec(spec, GatedMLPSpec(48)),) * layers,
    )  # fmt: skip
    outer = {
        "embed_tokens.weight": weight(VOCAB, HIDDEN) * HIDDEN**0.5,
        "norm.weight": torch.ones(HIDDEN, dtype=dtype),
        "lm_head.weight": weight(VOCAB, HIDDEN) * 2,
    }
    return Transformer(model_spec, outer, iter([layer() for _ in range(layers)]))


def engine(model: Transformer, eos: tuple[int, ...] = (), **config: int | bool | None) -> EngineCore:
    defaults = {"block_size": 16, "cache_tokens": 4096, "max_num_seqs": 32}
    return EngineCore(model, GenerationDefaults(eos_token_ids=eos), EngineConfig(**{**defaults, **config}))


def run(core: EngineCore, requests: list[Request]) -> dict[str, list[Output]]:
    """All requests at once, beside what is in flight, to the end: outputs by request id."""
    for request in requests:
        core.add(request)
    outputs: dict[str, list[Output]] = defaultdict(list)
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def generate(core: EngineCore, prompt: list[int], **params: object) -> list[int]:
    """One request alone: its tokens."""
    request = Request(id="alone", prompt_ids=prompt, params=SamplingParams(**params))
    return tokens(run(core, [request])["alone"])


@torch.inference_mode()
def all_logits(model: Transformer, token_ids: list[int]) -> Tensor:
    """[T, vocab], from one pass over the whole text: no scheduler, no reuse, no chunks."""
    batch = Batch.dense(1, len(token_ids), 16)
    hidden = model.forward(torch.tensor(token_ids), batch, model.new_cache(-(-len(token_ids) // 16), 16))
    return model.logits(hidden)
