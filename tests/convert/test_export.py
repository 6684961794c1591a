"""A converted model, exported and loaded by `transformers`' DeepSeek-V3: the same logits as on the engine here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from convert.cli import main
from convert.errors import ConversionError
from convert.export import check_exportable, rope_config
from engine.checkpoint import open_checkpoint
from engine.spec import GatedMLPSpec, HeadNormSpec, MLASpec, ModelSpec, MoESpec, RopeSpec
from tests.convert.engine_runs import TOLERANCE, prefill_logits
from tests.convert.sources import make_source, write_text

IDS = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
TRANSMLA = ["--method", "transmla", "--kv-lora-rank", "20", "--qk-rope-head-dim", "6"]
CASES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "transmla": ({}, TRANSMLA, "default"),
    "transmla, llama3": ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}, "head_dim": 24}, TRANSMLA, "longrope"),
    "transmla, yarn": ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, TRANSMLA, "longrope"),
    "transmla, query biases": ({"family": "qwen2"}, TRANSMLA, "default"),
    "score-aware": ({}, ["--cache-ratio", "0.5"], "longrope"),
    "score-aware, query biases": ({"family": "qwen2", "num_hidden_layers": 3}, ["--cache-ratio", "0.5"], "longrope"),
    "exact, tied": ({"tie_word_embeddings": True}, ["--method", "exact"], "longrope"),
    "one KV head, all of its channels rotated": (
        {"num_key_value_heads": 1}, ["--method", "transmla", "--kv-lora-rank", "9", "--qk-rope-head-dim", "12"],
        "default",
    ),
}  # fmt: skip


@torch.inference_mode()
def stock_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()(IDS).logits[0].float()


@pytest.mark.parametrize(("config", "options", "rope"), CASES.values(), ids=CASES.keys())
def test_logits_of_transformers(tmp_path: Path, config: dict[str, Any], options: list[str], rope: str) -> None:
    source = make_source(tmp_path / "source", **config)
    text = write_text(tmp_path / "text.txt", 3000)
    out, exported = tmp_path / "out", tmp_path / "out-deepseek_v3"
    arguments = ["--model", str(source), "--out", str(out), "--calibration", str(text), "--export", "deepseek_v3"]
    assert main([*arguments, *options]) == 0
    written = json.loads((exported / "config.json").read_text())
    assert (written["rope_scaling"] or {"rope_type": "default"})["rope_type"] == rope
    assert (exported / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    expected = prefill_logits(out, IDS[0].tolist())
    assert expected.std() > 0.1
    torch.testing.assert_close(stock_logits(exported, torch.float32), expected, rtol=0, atol=TOLERANCE)
    # And by the reader of DeepSeek-V3 here, which knows nothing of where it came from.
    torch.testing.assert_close(prefill_logits(exported, IDS[0].tolist()), expected, rtol=0, atol=TOLERANCE)


def test_bfloat16(tmp_path: Path) -> None:
    """Queries and the latent's norm are rounded once more: less than computing in bf16 costs anyway."""
    source = make_source(tmp_path / "source", dtype=torch.bfloat16)
    out, exported = tmp_path / "out", tmp_path / "exported"
    text = write_text(tmp_path / "text.txt", 3000)
    assert main(["--model", str(source), "--out", str(out), "--calibration", str(text)]) == 0
    assert main(["export", "--model", str(out), "--out", str(exported), "--json", str(tmp_path / "e.json")]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["cache_bytes_per_token"] >= report["source_cache_bytes_per_token"]
    ids = IDS[0].tolist()
    exact = prefill_logits(out, ids)

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    own = error(prefill_logits(out, ids, "bfloat16").float())
    assert 0.001 < error(stock_logits(exported, torch.float32)) < own / 2
    assert error(stock_logits(exported, torch.bfloat16)) < 2 * own


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return open_checkpoint(make_source(tmp_path / "source")).spec


@pytest.mark.parametrize(
    ("model", "attention", "mlp", "reason"),
    [
        ({"dtype": "float16"}, {}, None, "float16 has no room"),
        ({"logit_softcap": 30.0}, {}, None, "soft cap on logits"),
        ({"embedding_scale": 12.0}, {}, None, "no embedding_scale"),
        ({}, {"sliding_window": 64}, None, "layer 1 has a sliding window"),
        ({}, {"score_softcap": 50.0}, None, "layer 1 has a soft cap on scores"),
        ({}, {"qk_norm_eps": 1e-6}, None, "layer 1 normalises queries and keys"),
        ({}, {"num_heads": 2}, None, "different heads: 2, 4"),
        ({}, {}, GatedMLPSpec(64, bias=True), "layer 1 has biases in its MLP"),
        ({}, {}, GatedMLPSpec(32), "different MLP sizes: 32, 64"),
        ({}, {}, MoESpec(4, 2, 64), "layer 1 has an MLP other than gated SiLU"),
    ],
)
def test_refused_before_any_work(
    spec: ModelSpec, model: dict[str, Any], attention: dict[str, Any], mlp: Any, reason: str
) -> None:
    first, second = spec.layers
    second = replace(second, attention=replace(second.attention, **attention), mlp=mlp or second.mlp)
    check_exportable(spec)
    with pytest.raises(ConversionError, match=reason):
        check_exportable(replace(spec, layers=(first, second), **model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_norm": HeadNormSpec(2, 12, 1e-6)}, "normalises queries and keys"),
        ({"q_lora_rank": 16, "q_norm_eps": 1e-6}, "has a low-rank query projection already"),
        ({"latent_norm_eps": 1e-6}, "normalises its latent already"),
        ({"qk_rope_head_dim": 0, "rope": RopeSpec(())}, "has no rotated key"),
    ],
)
def test_latent_attention_that_is_refused(spec: ModelSpec, change: dict[str, Any], reason: str) -> None:
    latent = MLASpec(4, 8, 12, 4, 12, 0.3, RopeSpec((1.0, 0.1), "interleaved"))
    check_exportable(replace(spec, layers=tuple(replace(layer, attention=latent) for layer in spec.layers)))
    changed = replace(spec.layers[1], attention=replace(latent, **change))
    with pytest.raises(ConversionError, match=reason):
        check_exportable(replace(spec, layers=(spec.layers[0], changed)))


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source", dtype=torch.float16)
    text = write_text(tmp_path / "text.txt", 3000)
    arguments = ["--model", str(source), "--out", str(tmp_path / "out"), "--calibration", str(text)]
    assert main([*arguments, "--export", "deepseek_v3"]) == 2
    assert "float16 has no room for the latent's norm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", "--model", str(source), "--out", str(tmp_path / "e"), "--latent-norm-eps", "0"]) == 2
    assert "--latent-norm-eps 0 is out of range" in capsys.readouterr().err
    float32 = make_source(tmp_path / "float32")
    assert main(["export", "--model", str(float32), "--out", str(tmp_path / "e")]) == 2
    assert "is not converted yet" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float32", "source", "text.txt"]


def test_frequencies_that_a_theta_expresses() -> None:
    thetas = [5e5 ** (-i / 8) for i in range(8)]
    assert rope_config(thetas, 64)["rope_theta"] == pytest.approx(5e5)
    assert rope_config(thetas, 64)["rope_scaling"] is None
    assert rope_config([*thetas, thetas[-1]], 64)["rope_scaling"]["rope_type"] == "longrope"
    assert rope_config([1.0], 64)["rope_scaling"] is None
    assert rope_config([0.5], 64)["rope_scaling"]["short_factor"] == [2.0]
