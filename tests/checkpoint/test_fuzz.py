"""Whatever is in the files, opening and reading a checkpoint works or ends in a CheckpointError."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoint import open_checkpoint
from engine.checkpoint.llama import LlamaConfig
from engine.checkpoint.mla_format import config_from_spec
from engine.checkpoint.rope import KINDS
from engine.errors import CheckpointError
from engine.model.load import load_model
from tests.checkpoint.folders import llama_folder, random_tensors
from tests.checkpoint.test_mla_format import SMALL
from tests.checkpoint.test_native_families import write as native_folder

quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [0, 1, -1, 2, 2**31, 2**63, 2**64, 10**400, 1e-320, 1e300, "4", "", "silu", "yarn", "full_attention"]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
ropes = st.dictionaries(
    st.sampled_from(["other", *sorted({key for kind in KINDS.values() for key in kind.__struct_fields__})]),
    scalars | st.sampled_from(["linear", "llama3", "yarn", "default", 1.0, 2.0, 8192]),
)


def attempt(folder: Path) -> None:
    """Open and load; only a CheckpointError may come out."""
    with contextlib.suppress(CheckpointError):
        load_model(open_checkpoint(folder), "cpu")


@pytest.fixture
def llama(tmp_path) -> Path:
    return llama_folder(tmp_path)[0]


@pytest.fixture
def mla(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(SMALL)))
    save_file(random_tensors(SMALL), tmp_path / "model.safetensors")
    return tmp_path


@quick
@given(key=st.sampled_from([*LlamaConfig.__struct_fields__, "model_type", "other", "eos_token_id"]), value=values)
def test_llama_config_values(llama, key, value):
    config = json.loads((llama / "config.json").read_text())
    try:
        (llama / "config.json").write_text(json.dumps(config | {key: value}))
        attempt(llama)
    finally:
        (llama / "config.json").write_text(json.dumps(config))


@quick
@given(rope=ropes)
def test_llama_rope_values(llama, rope):
    config = json.loads((llama / "config.json").read_text())
    try:
        (llama / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
        attempt(llama)
    finally:
        (llama / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "qwen2_moe"])
@settings(quick, max_examples=60)
@given(data=st.data(), value=values | ropes)
def test_native_config_values(tmp_path, family, data, value):
    folder, _ = native_folder(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from([*config, "rope_scaling", "quantization_config", "num_nextn_predict_layers"]))
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    attempt(folder)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in list(items) for place in [(value, key), *places(item)]]


@quick
@given(data=st.data(), value=values, drop=st.booleans())
def test_mla_config_values(mla, data, value, drop):
    text = (mla / "config.json").read_text()
    config = json.loads(text)
    found = places(config)
    container, key = found[data.draw(st.integers(0, len(found) - 1))]
    if drop:
        del container[key]
    else:
        container[key] = value
    try:
        (mla / "config.json").write_text(json.dumps(config))
        attempt(mla)
    finally:
        (mla / "config.json").write_text(text)


@quick
@given(data=st.data())
def test_bytes_of_any_file(llama, data):
    """A byte anywhere in the header or the config changes, or the file ends early."""
    path = llama / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    original = path.read_bytes()
    length = len(original) if path.suffix == ".json" else 8 + int.from_bytes(original[:8], "little")
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    try:
        path.write_bytes(changed)
        attempt(llama)
    finally:
        path.write_bytes(original)
