"""A GQA layer as an MLA layer with the same function and a cache of the same size.

The latent is every KV head's value, side by side; the rope keys are every KV head's key, one rope group each. No score
comes from the latent (qk_nope_head_dim is 0), and the up-projection only picks a query head's value block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convert.methods import ConvertedLayer
from engine.spec import GQASpec, MLASpec, RopeSpec


def convert_layer(spec: GQASpec, tensors: Mapping[str, Tensor], _learnt: object = None) -> ConvertedLayer:
    """Exact but for the order of floating-point sums, whatever the statistics."""
    groups, width = spec.num_kv_heads, spec.num_kv_heads * spec.head_dim
    mla = MLASpec(
        num_heads=spec.num_heads,
        kv_lora_rank=width,
        qk_nope_head_dim=0,
        qk_rope_head_dim=spec.head_dim,
        v_head_dim=spec.head_dim,
        softmax_scale=spec.softmax_scale,
        rope=RopeSpec(spec.rope.inv_freq * groups, spec.rope.layout, spec.rope.scale),
        rope_groups=groups,
        q_bias=spec.qkv_bias,
        kv_a_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
    )
    v_weight = tensors["v_proj.weight"]
    blocks = torch.eye(width, dtype=v_weight.dtype, device=v_weight.device).unflatten(0, (groups, spec.head_dim))
    group_of_head = torch.arange(spec.num_heads, device=v_weight.device) * groups // spec.num_heads
    out = {name: t for name, t in tensors.items() if name.startswith(("q_proj.", "o_proj."))}
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        out[f"kv_a_proj_with_mqa.{kind}"] = torch.cat((tensors[f"v_proj.{kind}"], tensors[f"k_proj.{kind}"]))
    out["kv_b_proj.weight"] = blocks[group_of_head].flatten(0, 1)  # [H D, g D]
    return mla, out
