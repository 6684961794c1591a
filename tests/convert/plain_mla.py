"""The plain definition of an MLA checkpoint: unabsorbed, uncached, float64, from the files alone.

Reads config.json and the safetensors file directly and shares no code with the engine. Head h of a layer scores
    scale * (q_nope . k_up latent  +  rotate(q_rope, t) . rotate(k_rope, s))
and mixes v_up latent. With `head_norm`, q_nope is the head's normalised query, q_rope a map of it, and the latent and
k_rope are maps of [normalised keys; values].
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
        x = w["model.embed_tokens.weight"][token_ids] * self.config["embedding_scale"]
        for i, layer in enumerate(self.config["layers"]):
            p = f"model.layers.{i}."
            attended = self.attention(p + "self_attn.", layer["attention"], self.norm(x, p + "input_layernorm"))
            if layer["post_norms"]:
                x = x + self.norm(attended, p + "post_attention_layernorm")
                made = self.mlp(p + "mlp.", layer["mlp"], self.norm(x, p + "pre_feedforward_layernorm"))
                x = x + self.norm(made, p + "post_feedforward_layernorm")
            else:
                x = x + attended
                x = x + self.mlp(p + "mlp.", layer["mlp"], self.norm(x, p + "post_attention_layernorm"))
        logits = self.norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
        cap = self.config["logit_softcap"]
        return logits if cap is None else cap * (logits / cap).tanh()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms(x, self.config["norm_eps"]) * (self.config["norm_offset"] + self.weights[f"{name}.weight"])

    @staticmethod
    def rms(x: Tensor, eps: float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def mlp(self, p: str, m: dict[str, Any], x: Tensor) -> Tensor:
        gate, up = (self.linear(x, f"{p}{name}_proj") for name in ("gate", "up"))
        if m["activation"] == "silu":
            gate = gate / (1 + (-gate).exp())
        else:
            assert m["activation"] == "gelu_tanh"
            gate = gate / 2 * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh())
        return self.linear(gate * up, p + "down_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def attention(self, p: str, a: dict[str, Any], x: Tensor) -> Tensor:
        heads, n, dr, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        rope = self.config["ropes"][a["rope"]]
        inv_freq = torch.tensor(rope["inv_freq"], dtype=torch.float64).view(a["rope_groups"], -1)
        if a["head_norm"] is None:
            q = self.linear(x, p + "q_proj").unflatten(1, (heads, n + dr))
            row = self.linear(x, p + "kv_a_proj_with_mqa")
        else:
            q, kv = self.normed_heads(p, a, x)
            maps = self.weights[p + "q_rope_proj.weight"].unflatten(0, (heads, dr))
            q = torch.cat((q[..., :n], torch.einsum("thc,hdc->thd", q, maps)), -1)
            row = self.linear(kv, p + "kv_a_proj_with_mqa")
        latent, k_rope = row[:, :rank], row[:, rank:].unflatten(1, (a["rope_groups"], dr))
        up = self.linear(latent, p + "kv_b_proj").unflatten(1, (heads, n + a["v_head_dim"]))
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril().triu(1 - (a["sliding_window"] or len(x)))
        cap = a["score_softcap"]
        out = []
        for h in range(heads):
            group = h * a["rope_groups"] // heads
            turn = (inv_freq[group], rope["layout"], rope["scale"])
            scores = q[:, h, :n] @ up[:, h, :n].T + rotate(q[:, h, n:], *turn) @ rotate(k_rope[:, group], *turn).T
            scores = scores * a["softmax_scale"]
            scores = scores if cap is None else cap * (scores / cap).tanh()
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out.append(weights @ up[:, h, n:])
        return self.linear(torch.cat(out, 1), p + "o_proj")

    def normed_heads(self, p: str, a: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
        """-> queries [T, H, D] and [k; v] [T, 2 g D]."""
        of = a["head_norm"]
        q, k = (self.linear(x, f"{p}{name}_proj").unflatten(1, (-1, of["head_dim"])) for name in "qk")
        q, k = (self.rms(y, of["eps"]) * self.weights[f"{p}{name}_norm.weight"] for y, name in ((q, "q"), (k, "k")))
        return q, torch.cat((k.flatten(1), self.linear(x, p + "v_proj")), 1)
