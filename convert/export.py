"""A converted model as a stock DeepSeek-V3 checkpoint, which engines that know nothing of this project load.

That class has one shape for all layers, one set of frequencies, a fixed softmax scale, a norm on the latent and no bias
on queries. What it lacks is made up for without changing the function:

- Scale: queries are multiplied by softmax_scale * sqrt(n + dr).
- Norm: the latent's projection is multiplied by 2^-SHIFT, so that RMSNorm's mean square vanishes beside its epsilon and
  all that it does is to multiply by 1 / sqrt(epsilon); its weight undoes both.
- Shape: layers of a smaller rank or fewer channels are padded with zeros.
- Frequencies: the rope key has as many pairs of each frequency as the layer that has the most; a layer leaves the
  others zero. What no theta expresses is written as LongRoPE factors. Rope groups lie side by side, and a head's query
  is zero in those of others.
- Biases on queries: a low-rank query projection that passes its input and a constant through.

Padding costs cache and nothing else. The result is exact but for rounding to the stored dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from convert.errors import ConversionError
from convert.partial import folder_state, is_placed, partial_work, versions
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.layout import stored_name
from engine.checkpoint.mla_format import format_config
from engine.checkpoint.shards import ShardWriter, output_errors
from engine.checkpoint.writer import check_output, copy_side_files, place
from engine.model.load import DTYPES
from engine.spec import GatedMLPSpec, GQASpec, LayerSpec, MLASpec, ModelSpec
from engine.tensor_map import under

FORMATS = ("deepseek_v3",)
LATENT_EPS = 1e-6  # of transformers' class, whatever rms_norm_eps says
SHIFT = 40  # bf16 and fp32 both have the exponents for it; even latents of 10^6 are then 10^-6 beside the epsilon
THETA = 10000.0  # where it says nothing
ALIGN = 64  # channels of the low-rank query projection are a multiple of this


@dataclass(frozen=True)
class Shapes:
    """What all layers of the exported model share."""

    num_heads: int
    rank: int
    nope: int
    value: int
    frequencies: tuple[float, ...]  # of the rope key's pairs
    intermediate: int
    biases: bool
    query_rank: int | None

    @property
    def rope(self) -> int:
        return 2 * len(self.frequencies)


def check_exportable(spec: ModelSpec) -> None:
    """Raises ConversionError, with the reason, where a model, or one converted from it, is no DeepSeek-V3."""

    def refuse(reason: str) -> None:
        raise ConversionError(
            f"{FORMATS[0]} cannot hold this model: {reason}; leave out --export, and serve it as it is"
        )

    if spec.dtype == "float16":
        refuse("float16 has no room for the latent's norm; convert with --dtype bfloat16")
    for name, plain in (("norm_offset", 0), ("embedding_scale", 1), ("residual_scale", 1), ("logit_scale", 1)):
        if getattr(spec, name) != plain:
            refuse(f"DeepSeek-V3 has no {name}")
    if spec.logit_softcap is not None:
        refuse("DeepSeek-V3 has no soft cap on logits")
    for i, layer in enumerate(spec.layers):
        if reason := _obstacle(layer):
            refuse(f"layer {i} {reason}")
    for what, values in (
        ("heads", {layer.attention.num_heads for layer in spec.layers}),
        ("MLP sizes", {layer.mlp.intermediate_size for layer in spec.layers}),
    ):
        if len(values) > 1:
            refuse(f"its layers have different {what}: {', '.join(map(str, sorted(values)))}")


def _obstacle(layer: LayerSpec) -> str | None:
    attention, mlp = layer.attention, layer.mlp
    if attention.sliding_window is not None:
        return "has a sliding window"
    if attention.score_softcap is not None:
        return "has a soft cap on scores"
    if not isinstance(mlp, GatedMLPSpec) or mlp.activation != "silu":
        return "has an MLP other than gated SiLU"
    if mlp.bias:
        return "has biases in its MLP"
    if layer.post_norms:
        return "normalises what attention and MLP add"
    normed = attention.qk_norm_eps if isinstance(attention, GQASpec) else attention.head_norm
    if normed is not None:
        return "normalises queries and keys"
    if isinstance(attention, GQASpec):
        return None
    if not attention.rope_width:
        return "has no rotated key"
    if attention.q_lora_rank is not None:
        return "has a low-rank query projection already"
    if attention.latent_norm_eps is not None:
        return "normalises its latent already"
    return None


def shapes(spec: ModelSpec) -> Shapes:
    """Of a model that `check_exportable` lets pass."""
    layers = [layer.attention for layer in spec.layers if isinstance(layer.attention, MLASpec)]
    most: Counter[float] = Counter()
    for layer in layers:
        most |= Counter(layer.rope.inv_freq)
    q_bias = any(layer.q_bias for layer in layers)
    return Shapes(
        num_heads=layers[0].num_heads,
        rank=max(layer.kv_lora_rank for layer in layers),
        nope=max(layer.qk_nope_head_dim for layer in layers),
        value=max(layer.v_head_dim for layer in layers),
        frequencies=tuple(sorted(most.elements(), reverse=True)),
        intermediate=spec.layers[0].mlp.intermediate_size,
        biases=q_bias or any(layer.kv_a_bias or layer.o_bias for layer in layers),
        query_rank=-(-(spec.hidden_size + 1) // ALIGN) * ALIGN if q_bias else None,
    )


def config(source: Checkpoint, s: Shapes) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    spec, ends = source.spec, source.generation.eos_token_ids
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_heads,
        "q_lora_rank": s.query_rank,
        "kv_lora_rank": s.rank,
        "qk_nope_head_dim": s.nope,
        "qk_rope_head_dim": s.rope,
        "v_head_dim": s.value,
        "attention_bias": s.biases,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_interleave": True,
        **rope_config(s.frequencies, spec.max_position_embeddings),
        "first_k_dense_replace": len(spec.layers),
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": source.generation.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
        "torch_dtype": spec.dtype,
    }


def rope_config(frequencies: Sequence[float], context: int) -> dict[str, Any]:
    """A theta where these are its frequencies, else LongRoPE, whose factors can say any."""
    count = len(frequencies)
    theta = frequencies[-1] ** (-count / (count - 1)) if count > 1 else THETA
    if all(math.isclose(f, theta ** (-i / count), rel_tol=1e-6) for i, f in enumerate(frequencies)):
        return {"rope_theta": theta, "rope_scaling": None}
    factors = [THETA ** (-i / count) / f for i, f in enumerate(frequencies)]
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
               "attention_factor": 1.0, "original_max_position_embeddings": context}  # fmt: skip
    return {"rope_theta": THETA, "rope_scaling": scaling}


def attention(spec: MLASpec, tensors: Mapping[str, Tensor], s: Shapes, eps: float) -> dict[str, Tensor]:
    """One layer's attention tensors under DeepSeek-V3's names, in float32. `tensors`: as in this project's format."""
    t = {name: tensor.float() for name, tensor in tensors.items()}
    hidden = t["q_proj.weight"].shape[1]
    pairs = _slots(spec, s)
    scale = spec.softmax_scale * math.sqrt(s.nope + s.rope)

    def queries(rows: Tensor) -> Tensor:
        """[H (n + dr), *] -> [H (n' + dr'), *]; YaRN's amplitude multiplies what rotates, once for its key."""
        heads = rows.unflatten(0, (spec.num_heads, -1)) * scale
        out = heads.new_zeros(spec.num_heads, s.nope + s.rope, *rows.shape[1:])
        out[:, : spec.qk_nope_head_dim] = heads[:, : spec.qk_nope_head_dim]
        rope = _in_pairs(heads[:, spec.qk_nope_head_dim :], spec.rope.layout) * spec.rope.scale**2
        places = out[:, s.nope :].unflatten(1, (-1, 2))
        for head in range(spec.num_heads):
            places[head, pairs[head * spec.rope_groups // spec.num_heads]] = rope[head]
        return out.flatten(0, 1)

    def keys(rows: Tensor) -> Tensor:
        """[r + G dr, *] -> [r' + dr', *]."""
        out = rows.new_zeros(s.rank + s.rope, *rows.shape[1:])
        out[: spec.kv_lora_rank] = rows[: spec.kv_lora_rank] * 2.0**-SHIFT
        groups = rows[spec.kv_lora_rank :].unflatten(0, (spec.rope_groups, -1))
        out[s.rank :].unflatten(0, (-1, 2))[pairs] = _in_pairs(groups, spec.rope.layout)
        return out

    out = {"kv_a_proj_with_mqa.weight": keys(t["kv_a_proj_with_mqa.weight"])}
    out["kv_a_layernorm.weight"] = torch.full((s.rank,), 2.0**SHIFT * math.sqrt(eps))
    up = t["kv_b_proj.weight"].unflatten(0, (spec.num_heads, -1))
    wide = up.new_zeros(spec.num_heads, s.nope + s.value, s.rank)
    wide[:, : spec.qk_nope_head_dim, : spec.kv_lora_rank] = up[:, : spec.qk_nope_head_dim]
    wide[:, s.nope : s.nope + spec.v_head_dim, : spec.kv_lora_rank] = up[:, spec.qk_nope_head_dim :]
    out["kv_b_proj.weight"] = wide.flatten(0, 1)
    o = t["o_proj.weight"].unflatten(1, (spec.num_heads, -1))
    out["o_proj.weight"] = torch.nn.functional.pad(o, (0, s.value - spec.v_head_dim)).flatten(1)
    if s.biases:
        out["kv_a_proj_with_mqa.bias"] = keys(t.get("kv_a_proj_with_mqa.bias", o.new_zeros(spec.cache_width)))
        out["o_proj.bias"] = t.get("o_proj.bias", o.new_zeros(hidden))
    q = queries(t["q_proj.weight"])
    if s.query_rank is None:
        return out | {"q_proj.weight": q}
    bias = queries(t["q_proj.bias"]) if spec.q_bias else q.new_zeros(len(q))
    return out | _through(q, bias, s.query_rank, eps)


def _through(weight: Tensor, bias: Tensor, rank: int, eps: float) -> dict[str, Tensor]:
    """weight x + bias by way of [x; 1; 0], which the norm between passes as it does the latent."""
    hidden = weight.shape[1]
    down, constant, up = weight.new_zeros(rank, hidden), weight.new_zeros(rank), weight.new_zeros(len(weight), rank)
    down[:hidden].fill_diagonal_(2.0**-SHIFT)
    constant[hidden] = 2.0**-SHIFT
    up[:, :hidden], up[:, hidden] = weight, bias
    return {
        "q_a_proj.weight": down,
        "q_a_proj.bias": constant,
        "q_a_layernorm.weight": torch.full((rank,), 2.0**SHIFT * math.sqrt(eps)),
        "q_b_proj.weight": up,
    }


def _slots(spec: MLASpec, s: Shapes) -> Tensor:
    """[G, dr/2]: which pair of the exported rope key each pair of each group becomes."""
    free = {f: iter([i for i, g in enumerate(s.frequencies) if g == f]) for f in s.frequencies}
    return torch.tensor([next(free[f]) for f in spec.rope.inv_freq], dtype=torch.long).view(spec.rope_groups, -1)


def _in_pairs(rows: Tensor, layout: str) -> Tensor:
    """[groups, dr, *] -> [groups, dr/2, 2, *]."""
    if layout == "half":
        return rows.unflatten(1, (2, -1)).transpose(1, 2)
    return rows.unflatten(1, (-1, 2))


def export_folder(out: Path) -> Path:
    """Where the export of a conversion to `out` goes."""
    return out.resolve().with_name(f"{out.resolve().name}-{FORMATS[0]}")


def export_model(model: Path, out: Path, *, overwrite: bool = False, latent_eps: float = LATENT_EPS) -> dict[str, Any]:
    """Write the converted model in folder `model` to `out`, which appears whole or not at all; -> what it became.

    `latent_eps`: of the RMSNorms within attention, in the engine that is to load it. Raises EngineError. The same call
    after a kill goes on from the layers that were written.
    """
    if not 0 < latent_eps < 1:
        raise ConversionError(f"--latent-norm-eps {latent_eps:g} is out of range: it must be between 0 and 1")
    source = open_checkpoint(model)
    check_exportable(source.spec)
    if source.spec.attention_kind != "mla":
        raise ConversionError(f"{model}: is not converted yet; convert it first")
    request = {
        "model": str(source.path.resolve()),
        "state of the model": folder_state(source.path),
        "latent norm eps": latent_eps,
        "version": versions(),
    }
    placed = is_placed(out, request)
    if not placed:
        check_output(out, source.path, overwrite)
    s = shapes(source.spec)
    written = config(source, s)
    with partial_work(out, request, None) as (work, _):
        if not placed:
            with output_errors(out):
                _write(source, s, written, out.resolve(), work.folder, latent_eps)
    itemsize = DTYPES[source.spec.dtype].itemsize
    return {
        "out": str(out.resolve()),
        "format": FORMATS[0],
        "rope": written["rope_scaling"]["rope_type"] if written["rope_scaling"] else "default",
        "cache_bytes_per_token": itemsize * len(source.spec.layers) * (s.rank + s.rope),
        "source_cache_bytes_per_token": source.spec.cache_bytes_per_token(itemsize),
    }


@torch.inference_mode()
def _write(source: Checkpoint, s: Shapes, written: dict[str, Any], out: Path, work: Path, eps: float) -> None:
    """`written`: config.json; `work`: a folder beside `out`, with the layers that an earlier process finished."""
    spec = source.spec
    shards = ShardWriter(work / "shards", len(spec.layers), spec.dtype)
    if 0 not in shards.written:
        shards.write(0, {stored_name(name): t for name, t in source.outer().items()})
    for i, layer in enumerate(tqdm(spec.layers, "exporting", unit="layer", disable=None)):
        if i + 1 in shards.written:
            continue
        assert isinstance(layer.attention, MLASpec)  # checked by export_model
        tensors = dict(source.layer(i))
        made = {n: t for n, t in tensors.items() if not n.startswith("self_attn.")}
        inner = attention(layer.attention, dict(under(tensors, "self_attn.")), s, eps)
        made |= {f"self_attn.{n}": t for n, t in inner.items()}
        shards.write(i + 1, {stored_name(name, i): t for name, t in made.items()})
    folder = shards.gather(work)
    (folder / "config.json").write_text(format_config(written))
    copy_side_files(source, folder)
    place(folder, out, work)
