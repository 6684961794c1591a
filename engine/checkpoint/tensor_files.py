"""The safetensors files of a checkpoint folder, one or many with an index.

Invariant: a TensorFiles that could be opened has consistent headers: every tensor lies whole inside its file, in
exactly one file, and the index, where there is one, says the same. No weight is read before it is asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.json_file import read_json_object
from engine.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says: dtype as in torch ("float32") where supported, else the file's."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # of its bytes in the file
    end: int


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
            raise CheckpointError(
                f"{folder}: has neither {SINGLE} nor {INDEX}; other weight files (*.bin, *.pt, *.gguf) are not read: "
                "load the model in transformers and save it with save_pretrained, which writes safetensors"
            )
        self.entries: dict[str, StoredTensor] = {}
        for name in names:
            _check_file(folder / name)
            for tensor, entry in read_header(folder / name).items():
                if tensor in self.entries:
                    other = self.entries[tensor].file
                    raise CheckpointError(f"{folder}: tensor {tensor} is stored in both {other} and {name}")
                self.entries[tensor] = entry
        if weight_map is not None:
            _check_index(index, weight_map, self.entries)

    def load(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU, mapped from its file. Raises CheckpointError for NaN or Inf.

        The mapping is the tensor's own and goes with it: what was read and dropped takes no memory.
        """
        entry = self.entries[name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        try:
            data = np.memmap(self._folder / entry.file, np.uint8, "c", entry.start, (entry.end - entry.start,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._folder / entry.file}: tensor {name} cannot be read: {error}") from None
        tensor = torch.from_numpy(data).view(dtype).view(entry.shape)
        if dtype != torch.float8_e4m3fn and not all_finite(tensor):  # FP8: once it is multiplied out
            raise CheckpointError(f"{self._folder / entry.file}: tensor {name} has weights that are NaN or infinite")
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinity among the numbers; nothing of the tensor's size is made to find out."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that has been checked, in the order of their data."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (first, last) = entry["dtype"], entry["data_offsets"]
        shape = tuple(entry["shape"])
        entries[name] = StoredTensor(path.name, shape, DTYPES.get(dtype, dtype), start + first, start + last)
    return entries


def _check_file(path: Path) -> None:
    """By safetensors' own reader, which checks the header against itself and against the file's length."""
    try:
        safe_open(path, framework="pt")
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
