"""Small checkpoint folders made in code, for tests to break in one way each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.layout import expected_tensors
from engine.checkpoint.llama import read_llama
from engine.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def random_tensors(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for name, shape in expected_tensors(spec).items()
    }


def llama_folder(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A Llama checkpoint of random weights, CONFIG changed by `config`, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = CONFIG | config
    tensors = random_tensors(read_llama(merged, "float32"), dtype)
    (folder / "config.json").write_text(json.dumps(merged))
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> None:
    """Replace a folder's single file by `shards` (file name -> tensors) and an index, by default a true one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    true_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": true_map if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
