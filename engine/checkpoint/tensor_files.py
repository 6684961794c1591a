"""The safetensors files of a checkpoint folder, one or many with an index.

Invariant: a TensorFiles that could be opened has consistent headers: every tensor lies whole inside its file, in
exactly one file, and the index, where there is one, says the same. No weight is read before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.json_file import read_json_object
from engine.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says: dtype as in torch ("float32") where supported, else the file's."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """`entries`: every stored tensor by its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / INDEX
        if (folder / SINGLE).exists():
            weight_map, names = None, [SINGLE]
        elif index.exists():
            weight_map = _read_index(index)
            names = sorted(set(weight_map.values()))
        else:
            raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; other weight files are not read")
        self._handles = {name: _open(folder / name) for name in names}
        self.entries: dict[str, StoredTensor] = {}
        for name, handle in self._handles.items():
            for tensor in handle.keys():  # noqa: SIM118 (not a mapping)
                if tensor in self.entries:
                    other = self.entries[tensor].file
                    raise CheckpointError(f"{folder}: tensor {tensor} is stored in both {other} and {name}")
                part = handle.get_slice(tensor)
                dtype = part.get_dtype()
                self.entries[tensor] = StoredTensor(name, tuple(part.get_shape()), DTYPES.get(dtype, dtype))
        if weight_map is not None:
            _check_index(index, weight_map, self.entries)

    def load(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU, mapped from its file. Raises CheckpointError for NaN or Inf."""
        entry = self.entries[name]
        try:
            tensor: Tensor = self._handles[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / entry.file}: tensor {name} cannot be read: {error}") from None
        if tensor.dtype != torch.float8_e4m3fn and not torch.isfinite(tensor).all():  # FP8: once it is multiplied out
            raise CheckpointError(f"{self._folder / entry.file}: tensor {name} has weights that are NaN or infinite")
        return tensor


def _open(path: Path) -> safe_open:
    """A safetensors handle; the library checks the header against itself and against the file's length."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though {INDEX} names it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except SafetensorError as error:
        hint = "; it is a Git LFS pointer, fetch the file itself" if _is_lfs_pointer(path) else ""
        raise CheckpointError(f"{path}: truncated or corrupt: {error}{hint}") from None


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(16) == b"version https://"
    except OSError:
        return False


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, every file in the folder itself."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise CheckpointError(
                f"{path}: weight_map: {tensor}: expected the name of a safetensors file, not {file!r:.60}"
            )
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], entries: dict[str, StoredTensor]) -> None:
    for tensor, file in weight_map.items():
        if tensor not in entries or entries[tensor].file != file:
            raise CheckpointError(f"{path}: weight_map has tensor {tensor} in {file}, which does not store it")
    for tensor, entry in entries.items():
        if tensor not in weight_map:
            raise CheckpointError(f"{path}: weight_map lacks tensor {tensor}, which {entry.file} stores")
