"""JSON files of a checkpoint, into objects and typed values, with errors that name the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from engine.errors import CheckpointError

T = TypeVar("T")

# Bounds wide enough for any model and narrow enough that nothing computed from them overflows or fills the memory.
Size = Annotated[int, Meta(ge=1, le=2**24)]
LayerCount = Annotated[int, Meta(ge=1, le=4096)]
Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the file, where there is none."""

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(path.read_bytes(), parse_constant=no_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not {json.dumps(value)[:40]}")
    return value


def typed(value: object, kind: type[T], where: str = "") -> T:
    """`value`, as json.loads gives it, as a `kind`; the CheckpointError names the key, under `where`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, key = str(error).partition(" - at `$")
        place = (where + key.rstrip("`")).lstrip(".")
        raise CheckpointError(f"{place}: {what[0].lower()}{what[1:]}" if place else what) from None
