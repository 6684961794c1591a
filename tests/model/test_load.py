"""load_model: dtypes, devices, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import open_checkpoint
from engine.errors import CheckpointError, EngineError
from engine.model.load import load_model, resolve_dtype
from tests.checkpoint.folders import llama_folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtype(tmp_path, stored, dtype):
    folder, tensors = llama_folder(tmp_path, stored)
    model = load_model(folder, "cpu", dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert model.dtype == wanted
    assert torch.equal(model.embedding, tensors["model.embed_tokens.weight"].to(wanted))
    assert model.layers[1].mlp_half.norm.dtype == wanted


def test_auto_is_the_stored_dtype_on_a_gpu():
    assert resolve_dtype("auto", "bfloat16", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", "bfloat16", torch.device("cpu")) == torch.float32


def test_takes_an_open_checkpoint_and_shows_progress(tmp_path, capsys):
    folder, _ = llama_folder(tmp_path)
    load_model(open_checkpoint(folder))
    assert capsys.readouterr().err == ""
    load_model(open_checkpoint(folder), "cpu", progress=True)
    assert "2/2" in capsys.readouterr().err


def test_weights_beyond_float16(tmp_path):
    folder, tensors = llama_folder(tmp_path, torch.bfloat16)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    load_model(folder, "cpu")
    with pytest.raises(CheckpointError, match=r"layer 1: mlp.up_proj.weight.*float16"):
        load_model(folder, "cpu", "float16")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", ""])
def test_device(tmp_path, device):
    folder, _ = llama_folder(tmp_path)
    with pytest.raises(EngineError, match="device"):
        load_model(folder, device)


def test_unknown_dtype(tmp_path):
    folder, _ = llama_folder(tmp_path)
    with pytest.raises(EngineError, match="float8"):
        load_model(folder, "cpu", "float8")


def test_layer_that_cannot_be_read(tmp_path):
    folder, tensors = llama_folder(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_model(folder)
