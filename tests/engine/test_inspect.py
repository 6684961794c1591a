"""Sizes on paper: against what is published, by hand, and against files; and the table in docs/models.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.model.load
from engine.checkpoint.mla_format import config_from_spec
from engine.inspect import inspect, main
from engine.model.load import load_model
from engine.model.rotary import Rotary
from tests.checkpoint.folders import random_tensors
from tests.checkpoint.test_mla_format import SMALL
from tests.checkpoint.test_native_families import write, write_fp8
from tests.model.fp8_folders import make_fp8

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONFIGS = sorted((DOCS / "configs").glob("*.json"))
# Parameters in billions as the model cards have them, and those for a token where they give more than one digit.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "DeepSeek-V2": (236, 21), "DeepSeek-V2-Lite": (15.7, 2.4), "DeepSeek-V3": (671, 36.6), "Kimi-K2": (1000, 32),
    "Moonlight-16B-A3B": (16, None), "GLM-4.7-Flash": (30, None), "Youtu-LLM-2B": (1.96, None),
    "MiniCPM3-4B": (4.07, None), "PLM-1.8B": (1.83, None), "Llama-2-7B": (6.74, None), "Llama-3-8B": (8.03, None),
    "Qwen2.5-7B": (7.61, None), "Qwen3-8B": (8.2, None), "Qwen3-30B-A3B": (30.5, None),
    "Mistral-7B-v0.3": (7.25, None), "Mixtral-8x7B": (46.7, 12.9),
}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_as_published(path):
    report = inspect(path)
    total, active = PUBLISHED[path.stem]
    assert report.parameters / 1e9 == pytest.approx(total, rel=0.03)
    if active is not None:
        assert report.active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert report.config


def test_the_table_in_the_documentation(capsys):
    page = (DOCS / "models.md").read_text()
    names = [row[1:].split("|")[0].strip() for row in page.splitlines() if row.startswith("|") and " GB |" in row]
    names = [name for name in names if name in PUBLISHED]
    assert sorted(names) == sorted(path.stem for path in CONFIGS)
    assert main(["--table", "--model", *(str(DOCS / "configs" / f"{name}.json") for name in names)]) == 0
    assert capsys.readouterr().out.strip() in page


def test_a_latent_lies_whole_on_each_gpu():
    report = inspect(DOCS / "configs" / "DeepSeek-V2-Lite.json")
    assert report.attention == "mla"
    assert (report.layers, report.moe_layers) == (27, 26)
    assert report.cache_bytes_per_token == 27 * (512 + 64) * 2
    for fit in report.fits:
        assert fit.cache_bytes_per_token_per_gpu == report.cache_bytes_per_token
    alone, _, _, eight = report.fits
    assert alone.tokens == (80e9 * 0.9 - report.weight_bytes) // 31104
    assert eight.tokens == (141e9 * 0.9 - -(-report.weight_bytes // 8)) // 31104
    assert report.weight_bytes == 2 * report.parameters + 2 * 26 * 64 * 2048  # routers in fp32


def test_kv_heads_are_divided_and_no_further():
    qwen, llama = (inspect(DOCS / "configs" / f"{name}.json") for name in ("Qwen2.5-7B", "Llama-3-8B"))
    assert [fit.cache_bytes_per_token_per_gpu for fit in llama.fits] == [131072, 131072, 16384, 16384]
    assert [fit.cache_bytes_per_token_per_gpu for fit in qwen.fits] == [57344, 57344, 14336, 14336]  # 4 KV heads
    assert llama.fits[2].tokens == (80e9 * 0.9 - llama.weight_bytes // 8) // 16384


def test_weights_that_do_not_fit(capsys):
    path = DOCS / "configs" / "Kimi-K2.json"
    assert [fit.tokens for fit in inspect(path).fits] == [None] * 4
    assert main(["--model", str(path)]) == 0
    assert capsys.readouterr().out.count("the weights do not") == 4


def test_fp8_bytes_are_those_of_the_file(tmp_path):
    folder, _ = write_fp8(tmp_path)
    report = inspect(folder)
    stored = load_file(folder / "model.safetensors")
    assert report.stored_weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.stored_dtype == "float8_e4m3fn"
    assert report.dtype == "bfloat16"


def test_fp8_weights_on_a_gpu_that_has_it_take_half():
    report = inspect(DOCS / "configs" / "DeepSeek-V3.json")
    assert report.weight_bytes_without_fp8 == 2 * report.parameters + 2 * 58 * 256 * (
        7168 + 1
    )  # routers and their biases
    assert 0.50 < report.weight_bytes / report.weight_bytes_without_fp8 < 0.51
    assert all(fit.weight_bytes_per_gpu == -(-report.weight_bytes // fit.gpus) for fit in report.fits)
    assert [fit.tokens is None for fit in report.fits] == [True, True, True, False]
    dense = inspect(DOCS / "configs" / "Qwen3-8B.json")
    assert dense.weight_bytes == dense.weight_bytes_without_fp8


def tensors_of(module: object) -> dict[int, int]:
    """Bytes of every tensor that a model holds, by where they lie, so that a view is not counted twice."""
    if isinstance(module, torch.Tensor):
        return {module.untyped_storage().data_ptr(): module.nbytes}
    found: dict[int, int] = {}
    own = type(module).__module__.startswith("engine.model.") and not isinstance(module, Rotary)
    members = module if isinstance(module, list | tuple) else vars(module).values() if own else ()
    for member in members:
        for where, size in tensors_of(member).items():
            found[where] = max(size, found.get(where, 0))
    return found


@pytest.mark.parametrize("without", [False, True])
def test_loaded_bytes_of_fp8_are_those_of_the_tensors(tmp_path, monkeypatch, without):
    folder, _ = make_fp8(tmp_path, "groups")
    monkeypatch.setattr(engine.model.load, "capability", lambda device: (8, 0) if without else (8, 9))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # experts are stacked
    model = load_model(folder, "cpu", "float32")
    report = inspect(folder)
    expected = report.weight_bytes_without_fp8 if without else report.weight_bytes
    assert sum(tensors_of(model).values()) == expected


def test_loaded_bytes_are_those_of_the_tensors(tmp_path):
    folder, tensors = write(tmp_path, "qwen2_moe", torch_dtype="bfloat16")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    routers = [layer.mlp_half.mlp.router for layer in load_model(folder, "cpu", "bfloat16").layers]
    assert all(router.dtype == torch.float32 for router in routers)
    assert inspect(folder).weight_bytes == sum(2 * t.numel() for t in tensors.values()) + sum(
        2 * r.numel() for r in routers
    )


def test_a_converted_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(SMALL)))
    save_file(random_tensors(SMALL), tmp_path / "model.safetensors")
    cache = 4 * (6 + 2 + 5 + 8)
    (tmp_path / "conversion.json").write_text(json.dumps({"source": "base", "source_cache_bytes_per_token": 2 * cache}))
    assert main(["--model", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    assert "(base): 50.0%" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "out.json").read_text())
    assert report["cache_bytes_per_token"] == cache
    assert report["conversion"] == {"source": "base", "source_cache_bytes_per_token": 2 * cache, "cache_ratio": 0.5}
    assert report["parameters"] == sum(tensor.numel() for tensor in random_tensors(SMALL).values())
    (tmp_path / "conversion.json").write_text("{}")
    assert inspect(tmp_path).conversion is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("[]", "object"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama"}', "vocab_size"),
    ],
)
def test_errors(tmp_path, capsys, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["--model", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert str(path) in output.err
    assert output.err.count("\n") == 1
