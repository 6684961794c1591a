"""This project's own format: config.json <-> ModelSpec. docs/format.md describes it; a change of it is a new version.

The keys of an object in the file are the fields of the dataclass in engine/spec.py, each of them given: nothing is left
to a default. Rotations are listed once and named by their number, since layers mostly share them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

from engine.checkpoint.json_file import typed
from engine.checkpoint.layout import check_spec
from engine.errors import CheckpointError
from engine.spec import (
    GatedMLPSpec,
    HeadNormSpec,
    LayerSpec,
    MLASpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    PlainMLPSpec,
    RopeSpec,
)

MODEL_TYPE = "mla_server"
FORMAT_VERSION = 1

MLPS: dict[str, type[MLPSpec]] = {"gated": GatedMLPSpec, "plain": PlainMLPSpec, "moe": MoESpec}
MLP_NAMES = {spec: name for name, spec in MLPS.items()}

T = TypeVar("T")


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a model all of whose layers are MLA; `spec_from_config` gives the same spec back, bit for bit."""
    ropes: dict[RopeSpec, int] = {}
    layers = []
    for i, layer in enumerate(spec.layers):
        if not isinstance(layer.attention, MLASpec):
            raise CheckpointError(f"layer {i}: the {MODEL_TYPE} format stores latent attention only")
        rope = ropes.setdefault(layer.attention.rope, len(ropes))
        attention = {"kind": "mla", **asdict(layer.attention), "rope": rope}
        mlp = {"kind": MLP_NAMES[type(layer.mlp)], **asdict(layer.mlp)}
        layers.append({"attention": attention, "mlp": mlp, "post_norms": layer.post_norms})
    outer = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "layers"}
    return {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        **outer,
        "ropes": [asdict(rope) for rope in ropes],
        "layers": layers,
    }


def spec_from_config(config: dict[str, Any], dtype: str) -> ModelSpec:
    """`dtype`: of the stored weights. Raises CheckpointError, naming the key, where anything is missing or unknown."""
    version = config.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(f"format_version {version!r:.40} is not supported; supported: {FORMAT_VERSION}")
    outer = {name: hint for name, hint in get_type_hints(ModelSpec).items() if name != "layers"}
    _check_keys(config, outer.keys() | {"model_type", "format_version", "ropes", "layers"}, "")
    if config["dtype"] != dtype:
        raise CheckpointError(f"dtype is {config['dtype']!r:.40}, but the weights are stored in {dtype}")
    ropes = _objects(config["ropes"], "ropes")
    for i, rope in enumerate(ropes):
        _read(rope, RopeSpec, f"ropes[{i}]")
    layers = []
    for i, layer in enumerate(_objects(config["layers"], "layers")):
        where = f"layers[{i}]"
        _check_keys(layer, {field.name for field in fields(LayerSpec)}, where)
        _, attention = _of_kind(layer["attention"], ("mla",), f"{where}.attention")
        attention["rope"] = _pick(ropes, attention.get("rope"), f"{where}.attention.rope")
        if isinstance(norm := attention.get("head_norm"), dict):
            _read(norm, HeadNormSpec, f"{where}.attention.head_norm")
        kind, mlp = _of_kind(layer["mlp"], tuple(MLPS), f"{where}.mlp")
        layers.append(
            LayerSpec(
                _read(attention, MLASpec, f"{where}.attention"),
                _read(mlp, MLPS[kind], f"{where}.mlp"),
                typed(layer["post_norms"], bool, f"{where}.post_norms"),
            )
        )
    spec = ModelSpec(**{name: typed(config[name], hint, name) for name, hint in outer.items()}, layers=tuple(layers))
    check_spec(spec)
    return spec


def format_config(config: dict[str, Any]) -> str:
    """JSON text with a line for each key, rotation and layer. Floats are written so that they read back exactly."""

    def value(item: object) -> str:
        if not isinstance(item, list):
            return json.dumps(item, allow_nan=False)
        return "[\n" + ",\n".join(f"    {json.dumps(entry, allow_nan=False)}" for entry in item) + "\n  ]"

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {value(item)}" for key, item in config.items()) + "\n}\n"


def _check_keys(found: dict[str, Any], expected: set[str], where: str) -> None:
    place = f"{where}: " if where else ""
    if missing := sorted(expected - found.keys()):
        raise CheckpointError(f"{place}missing keys: {', '.join(missing)}")
    if unknown := sorted(found.keys() - expected):
        raise CheckpointError(f"{place}unknown keys: {', '.join(unknown)[:200]}")


def _read(value: dict[str, Any], kind: type[T], where: str) -> T:
    _check_keys(value, {field.name for field in fields(kind)}, where)  # type: ignore[arg-type]
    return typed(value, kind, where)


def _objects(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CheckpointError(f"{where}: expected a list of objects")
    return value


def _of_kind(value: object, kinds: tuple[str, ...], where: str) -> tuple[str, dict[str, Any]]:
    """-> the object's `kind`, which must be one of `kinds`, and the rest of it."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{where}: kind {kind!r:.40} is not supported; supported: {', '.join(kinds)}")
    return kind, {key: item for key, item in value.items() if key != "kind"}


def _pick(ropes: list[dict[str, Any]], index: object, where: str) -> dict[str, Any]:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(ropes):
        raise CheckpointError(f"{where}: expected the number of one of the {len(ropes)} ropes, not {index!r:.40}")
    return ropes[index]
