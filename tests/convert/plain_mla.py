"""The plain definition of an MLA checkpoint: unabsorbed, uncached, float64, from the files alone.

Reads config.json and the safetensors file directly and shares no code with the engine. Head h of a layer scores
    scale * (q_nope . k_up latent  +  rotate(q_rope, t) . rotate(k_rope, s))
and mixes v_up latent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def rotate(x: Tensor, inv_freq: Tensor, layout: str, scale: float) -> Tensor:
    """x [T, d] at positions 0 .. T-1, pair by pair as complex numbers."""
    pairs = torch.stack(x.chunk(2, -1), -1) if layout == "half" else x.unflatten(-1, (-1, 2))
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * inv_freq
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.full_like(angle, scale), angle)
    return torch.view_as_real(turned).flatten(-2)  # the order of pairs does not matter to a dot product


class PlainMLA:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}

    def logits(self, token_ids: list[int]) -> Tensor:
        """[T, vocab]."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token_ids]
        for i, layer in enumerate(self.config["layers"]):
            p = f"model.layers.{i}."
            x = x + self.attention(p + "self_attn.", layer["attention"], self.norm(x, p + "input_layernorm"))
            h = self.norm(x, p + "post_attention_layernorm")
            gate, up = (self.linear(h, f"{p}mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self.linear(gate / (1 + (-gate).exp()) * up, p + "mlp.down_proj")
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self.norm(x, "model.norm") @ head.T

    def norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"]).sqrt()
        return x / rms * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def attention(self, p: str, a: dict[str, Any], x: Tensor) -> Tensor:
        heads, n, dr, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        rope = self.config["ropes"][a["rope"]]
        inv_freq = torch.tensor(rope["inv_freq"], dtype=torch.float64).view(a["rope_groups"], -1)
        q = self.linear(x, p + "q_proj").unflatten(1, (heads, n + dr))
        row = self.linear(x, p + "kv_a_proj_with_mqa")
        latent, k_rope = row[:, :rank], row[:, rank:].unflatten(1, (a["rope_groups"], dr))
        up = self.linear(latent, p + "kv_b_proj").unflatten(1, (heads, n + a["v_head_dim"]))
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        out = []
        for h in range(heads):
            group = h * a["rope_groups"] // heads
            turn = (inv_freq[group], rope["layout"], rope["scale"])
            scores = q[:, h, :n] @ up[:, h, :n].T + rotate(q[:, h, n:], *turn) @ rotate(k_rope[:, group], *turn).T
            weights = (scores * a["softmax_scale"]).masked_fill(~causal, float("-inf")).softmax(-1)
            out.append(weights @ up[:, h, n:])
        return self.linear(torch.cat(out, 1), p + "o_proj")
