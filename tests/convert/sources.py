"""Small random GQA checkpoints, made and saved by `transformers`, with a byte-level tokenizer. Nothing here asserts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

BOS, EOS, USER, ASSISTANT = 0, 1, 2, 3
VOCAB = 260
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma2Config)
}
# Of the families that are more than Llama with biases: what sets each apart, at sizes that bite within 50 tokens.
APART: dict[str, dict[str, Any]] = {
    "mistral, a window": {"family": "mistral", "sliding_window": 7},
    "qwen2, a window in one layer": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 16,
                                     "max_window_layers": 1},
    "qwen3": {"family": "qwen3", "head_dim": 10},
    "qwen3, biases and a window": {"family": "qwen3", "head_dim": 12, "attention_bias": True,
                                   "use_sliding_window": True, "sliding_window": 9,
                                   "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"family": "gemma2", "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 9,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": True},
}  # fmt: skip
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, chat: bool = False, adds_bos: bool = True) -> None:
    """One token for each byte, and four special ones before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=specials[2:]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_source(
    folder: Path,
    *,
    family: str = "llama",
    same_kv_heads: bool = False,
    dtype: torch.dtype = torch.float32,
    chat: bool = False,
    adds_bos: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Random weights strong enough that every prediction depends on the context; biases, where there are any, as well.

    `same_kv_heads`: all KV heads of a layer are one and the same.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": BOS,
        "eos_token_id": EOS, "tie_word_embeddings": False, **config,
    }  # fmt: skip
    made = AutoModelForCausalLM.from_config(FAMILIES[family](**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.uniform_(0.7, 1.3)
            if same_kv_heads and ("k_proj" in name or "v_proj" in name):
                heads = parameter.unflatten(0, (settings["num_key_value_heads"], -1))
                heads.copy_(heads[:1].clone().expand_as(heads))
    made.to(dtype).save_pretrained(folder)
    save_tokenizer(folder, chat, adds_bos)
    return folder


def write_text(path: Path, chars: int = 20_000, seed: int = 0) -> Path:
    """Lines of words that repeat, so that there is something to predict."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(40)]
    text = ""
    while len(text) < chars:
        text += " ".join(rng.choices(words, k=9)) + "\n"
    path.write_text(text)
    return path


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `transformers`, plain attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
