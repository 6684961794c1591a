"""Small random checkpoints with FP8 weights in blocks of 128 x 128, beside the same with these multiplied out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kernels.fp8 import blocks, multiplied_out
from tests.model.native_folders import CONFIGS, make_native

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
# No size is a multiple of 128, so that blocks are partial and projections join within one.
SIZES: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 200, "q_lora_rank": 136, "kv_lora_rank": 60, "qk_nope_head_dim": 40,
    "v_head_dim": 36, "moe_intermediate_size": 136, "num_hidden_layers": 2,
}  # fmt: skip


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> float8 [out, in] and fp32 scales of its blocks, the largest of each block being e4m3's."""
    rows, columns = weight.shape
    padded = torch.zeros(blocks(rows) * 128, blocks(columns) * 128)
    padded[:rows, :columns] = weight
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [rows of blocks, 128, columns of blocks, 128]
    scale = tiles.abs().amax((1, 3)) / 448
    fp8 = (tiles / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
    return fp8.contiguous(), scale


def make_fp8(folder: Path, name: str, **settings: Any) -> tuple[Path, Path]:
    """A DeepSeek-V3 of `native_folders.CONFIGS`, all projections but the router's in FP8 -> its folder, and the folder
    of the same model with these multiplied out, in fp32."""
    plain, fp8 = folder / "plain", folder / "fp8"
    plain.mkdir()
    make_native(plain, "deepseek_v3", SIZES | CONFIGS["deepseek_v3", name] | settings)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for key, tensor in tensors.items():
        if tensor.dim() == 1 or "layers" not in key or "mlp.gate." in key:
            stored[key] = tensor
            continue
        # Blocks that differ by up to 16 in scale: to mix up two of them shows.
        spread = 4.0 ** torch.randint(
            -1, 2, [blocks(n) for n in tensor.shape], generator=torch.Generator().manual_seed(1)
        )
        weight, scale = quantized(tensor)
        stored[key], stored[f"{key}_scale_inv"] = weight, scale * spread
        tensors[key] = multiplied_out(weight, scale * spread).float()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(plain, fp8)
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return fp8, plain
