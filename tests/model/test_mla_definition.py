"""The MLA path against docs/format.md taken literally: no cache, no absorption, one head at a time, float64."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.mla_format import config_from_spec
from engine.model.batch import Batch
from engine.model.load import load_model
from engine.spec import GatedMLPSpec, HeadNormSpec, LayerSpec, MLASpec, ModelSpec, RopeSpec
from tests.checkpoint.folders import random_tensors

YARN_LIKE = RopeSpec((1.0, 0.3, 0.05), "half", 1.2)
GROUPED = RopeSpec((1.0, 0.2, 0.7, 0.01), "interleaved")
ATTENTIONS = {
    "plain": MLASpec(6, 5, 4, 6, 3, 0.3, YARN_LIKE),
    "latent norm and biases": MLASpec(
        6, 5, 4, 6, 3, 0.3, YARN_LIKE, latent_norm_eps=1e-3, q_bias=True, kv_a_bias=True, o_bias=True
    ),
    "one bias": MLASpec(6, 5, 4, 6, 3, 0.3, YARN_LIKE, kv_a_bias=True),
    "groups that rotate differently": MLASpec(6, 5, 3, 4, 7, 0.3, GROUPED, rope_groups=2),
    "groups that rotate alike": MLASpec(6, 5, 3, 4, 7, 0.3, RopeSpec((1.0, 0.1) * 3, "half"), rope_groups=3),
    "rotated channels alone": MLASpec(6, 5, 0, 4, 7, 0.3, GROUPED, rope_groups=2),
    "no rotated channels": MLASpec(6, 9, 4, 0, 3, 0.3, RopeSpec(())),
    "a window of a block, capped scores": MLASpec(6, 5, 4, 6, 3, 0.3, YARN_LIKE, sliding_window=8, score_softcap=0.5),
    "a window within a block": MLASpec(6, 5, 3, 4, 7, 0.3, GROUPED, rope_groups=2, sliding_window=3),
    "a window of one": MLASpec(6, 5, 4, 6, 3, 0.3, YARN_LIKE, sliding_window=1, latent_norm_eps=1e-3),
    "normed heads": MLASpec(6, 5, 4, 6, 3, 0.3, YARN_LIKE, head_norm=HeadNormSpec(2, 4, 1e-3)),
    "normed heads, biases, rotated channels alone, a window, capped scores": MLASpec(
        6, 5, 0, 4, 7, 0.3, GROUPED, rope_groups=2, q_bias=True, kv_a_bias=True, o_bias=True, sliding_window=9,
        score_softcap=0.5, head_norm=HeadNormSpec(3, 5, 1e-3),
    ),
    "normed heads, no rotated channels": MLASpec(6, 9, 4, 0, 3, 0.3, RopeSpec(()), head_norm=HeadNormSpec(1, 4, 1e-3)),
}  # fmt: skip


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, inv_freq: tuple[float, ...], rope: RopeSpec) -> Tensor:
    """x [S, d] at positions 0 .. S - 1."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
    cos, sin = angle.cos() * rope.scale, angle.sin() * rope.scale
    half = x.shape[1] // 2
    first, second = (
        (slice(0, half), slice(half, None)) if rope.layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    )
    out = torch.empty_like(x)
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, first] * sin + x[:, second] * cos
    return out


def attention(s: MLASpec, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """x [S, hidden] -> [S, hidden]."""

    def project(name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    n, dr, r = s.qk_nope_head_dim, s.qk_rope_head_dim, s.kv_lora_rank
    if s.head_norm is None:
        queries, kv_a = project("q_proj"), project("kv_a_proj_with_mqa")
    else:
        queries, kv_a = normed_projections(s, s.head_norm, project, tensors)
    latent = kv_a[:, :r]
    if s.latent_norm_eps is not None:
        latent = norm(latent, tensors["kv_a_layernorm.weight"], s.latent_norm_eps)
    up = latent @ tensors["kv_b_proj.weight"].T
    outs = []
    for h in range(s.num_heads):
        g = h * s.rope_groups // s.num_heads
        inv_freq = s.rope.inv_freq[g * dr // 2 : (g + 1) * dr // 2]
        q = queries[:, h * (n + dr) : (h + 1) * (n + dr)]
        kv = up[:, h * (n + s.v_head_dim) : (h + 1) * (n + s.v_head_dim)]
        k_rope = rotate(kv_a[:, r + g * dr : r + (g + 1) * dr], inv_freq, s.rope)
        scores = (q[:, :n] @ kv[:, :n].T + rotate(q[:, n:], inv_freq, s.rope) @ k_rope.T) * s.softmax_scale
        if s.score_softcap is not None:
            scores = s.score_softcap * (scores / s.score_softcap).tanh()
        ages = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (ages < 0) | (ages >= (s.sliding_window or len(x)))
        outs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ kv[:, n:])
    return F.linear(torch.cat(outs, -1), tensors["o_proj.weight"], tensors.get("o_proj.bias"))


def normed_projections(
    s: MLASpec, of: HeadNormSpec, project: Callable[[str], Tensor], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """-> queries [S, H (n + dr)] and what is cached, before any rotation."""
    queries = []
    for h, q in enumerate(project("q_proj").split(of.head_dim, 1)):
        q = norm(q, tensors["q_norm.weight"], of.eps)
        own = tensors["q_rope_proj.weight"][h * s.qk_rope_head_dim : (h + 1) * s.qk_rope_head_dim]
        queries += [q, q @ own.T] if s.qk_nope_head_dim else [q @ own.T]
    keys = [norm(k, tensors["k_norm.weight"], of.eps) for k in project("k_proj").split(of.head_dim, 1)]
    kv = torch.cat((*keys, project("v_proj")), 1)
    row = kv @ tensors["kv_a_proj_with_mqa.weight"].T + tensors.get("kv_a_proj_with_mqa.bias", 0.0)
    return torch.cat(queries, 1), row


def logits(spec: ModelSpec, stored: dict[str, Tensor], ids: Tensor) -> Tensor:
    t = {name: tensor.double() for name, tensor in stored.items()}
    x = t["model.embed_tokens.weight"][ids]
    for i, layer in enumerate(spec.layers):
        under = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in t.items()}
        s = layer.attention
        assert isinstance(s, MLASpec)
        own = {name.removeprefix("self_attn."): tensor for name, tensor in under.items()}
        x = x + attention(s, norm(x, under["input_layernorm.weight"], spec.norm_eps), own)
        y = norm(x, under["post_attention_layernorm.weight"], spec.norm_eps)
        gate, up = (F.linear(y, under[f"mlp.{p}.weight"], under.get(f"mlp.{p}.bias")) for p in ("gate_proj", "up_proj"))
        x = x + F.linear(F.silu(gate) * up, under["mlp.down_proj.weight"], under.get("mlp.down_proj.bias"))
    return norm(x, t["model.norm.weight"], spec.norm_eps) @ t["lm_head.weight"].T


def check(tmp_path, layers: tuple[LayerSpec, ...]) -> None:
    spec = ModelSpec(31, 16, 1e-5, 64, False, "float32", layers)
    stored = {name: tensor * 4 for name, tensor in random_tensors(spec).items()}  # scores well away from uniform
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(spec)))
    save_file(stored, tmp_path / "model.safetensors")
    model = load_model(tmp_path, "cpu", "float32")
    ids = torch.randint(31, (29,), generator=torch.Generator().manual_seed(0))
    expected = logits(spec, stored, ids)
    for counts in ([29], [1] * 29, [11, 17, 1], [20] + [1] * 9):
        cache, done, found = model.new_cache(4, 8), 0, []
        for count in counts:
            batch = Batch.build(np.array([done]), np.array([count]), np.array([[2, 0, 3, 1]], np.int32), 8)
            found.append(model.logits(model.forward(ids[done : done + count], batch, cache)))
            done += count
        error = (torch.cat(found) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{counts}: {error}"


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(tmp_path, name):
    check(tmp_path, (LayerSpec(ATTENTIONS[name], GatedMLPSpec(20)),))


def test_every_layer_different(tmp_path):
    layers = [LayerSpec(a, GatedMLPSpec(20 + i, bool(i % 2))) for i, a in enumerate(ATTENTIONS.values())]
    check(tmp_path, tuple(layers))
