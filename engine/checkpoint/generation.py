"""What a checkpoint says about generating from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.checkpoint.json_file import read_json_object, typed
from engine.errors import CheckpointError

TokenId = Annotated[int, Meta(ge=0, le=2**31)]


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json (and, failing that, config.json) says; None where it says nothing."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


class _File(msgspec.Struct):
    """The keys that are read; generation_config.json has many more, which describe other ways of decoding."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None


def read_generation_defaults(folder: Path, config: dict[str, Any]) -> GenerationDefaults:
    """`config`: config.json, which older checkpoints keep these keys in."""
    path = folder / "generation_config.json"
    own = read_json_object(path) if path.exists() else {}
    merged = {key: own[key] if own.get(key) is not None else config.get(key) for key in _File.__struct_fields__}
    try:
        file = typed(merged, _File)
    except CheckpointError as error:
        raise CheckpointError(f"{path if own else folder / 'config.json'}: {error}") from None
    eos = file.eos_token_id
    return GenerationDefaults(
        bos_token_id=file.bos_token_id,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        temperature=file.temperature,
        top_k=None if file.top_k is None else max(file.top_k, 0),
        top_p=file.top_p,
        repetition_penalty=file.repetition_penalty,
    )


def generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """generation_config.json that reads back as `defaults`."""
    values = {key: getattr(defaults, key, None) for key in _File.__struct_fields__}
    values["eos_token_id"] = list(defaults.eos_token_ids) or None
    return {key: value for key, value in values.items() if value is not None}
