"""The weight files of a checkpoint as they are written: one for what no layer owns and one for each layer.

Invariant: a file that stands under its name is whole and on the disk, so a writer that is killed loses at most the file
it was writing, and the next one goes on from there. No more than one tensor is copied in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.tensor_files import DTYPES, INDEX, SINGLE, all_finite, read_header
from engine.errors import CheckpointError, OutputError

SINGLE_BYTES = 2 << 30  # of weights; more are a file for each layer
UNFINISHED = ".unfinished"  # suffix of a file that is being written
CODES = {name: code for code, name in DTYPES.items()}  # "bfloat16" -> "BF16"


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """An OSError while `out` is written, as an OutputError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out}: cannot be written: {error}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """`path` appears whole and on the disk, or not at all. Raises OSError."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Atomically; floats read back as they were. Raises OSError."""
    data = (json.dumps(value, indent=2) + "\n").encode()

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ShardWriter:
    """File 0 holds what no layer owns, file i + 1 layer i. `written`: the files that are whole."""

    def __init__(self, folder: Path, layers: int, dtype: str) -> None:
        """`folder`: new, or one that an earlier ShardWriter left. Raises OSError."""
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"*{UNFINISHED}"):
            path.unlink()
        self.folder = folder
        self._dtype = dtype
        self._paths = [folder / f"model-{i:05d}-of-{layers + 1:05d}.safetensors" for i in range(1, layers + 2)]
        self.written = {i for i, path in enumerate(self._paths) if path.exists()}

    def write(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` by their names in the file, on any device. Raises OSError, CheckpointError for NaN and infinity."""
        dtype: torch.dtype = getattr(torch, self._dtype)

        def write(file: BinaryIO) -> None:
            file.write(_header({name: t.shape for name, t in tensors.items()}, self._dtype))
            for name, tensor in tensors.items():
                stored = tensor.detach().to("cpu", dtype).contiguous()
                if not all_finite(stored):
                    raise CheckpointError(f"{name} has weights that are NaN or infinite in {self._dtype}")
                file.write(stored.flatten().view(torch.uint8).numpy().data)

        write_atomically(self._paths[part], write)
        self.written.add(part)

    def read(self, part: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of a file that was written, in memory of their own. Raises OSError, SafetensorError."""
        with safe_open(self._paths[part], framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}

    def total_bytes(self) -> int:
        """Of the weights, once all files are written."""
        return sum(entry.end - entry.start for path in self._paths for entry in read_header(path).values())

    def gather(self, work: Path, single_bytes: int = SINGLE_BYTES) -> Path:
        """-> the folder with the weights as they are handed out: this one, or one in `work` with a single file.

        All files are written. Raises OSError.
        """
        if self.total_bytes() > single_bytes:
            self._write_index()
            return self.folder
        folder = work / "single"
        folder.mkdir(exist_ok=True)
        self._merge(folder)
        return folder

    def _write_index(self) -> None:
        """Beside the files, which so are the shards of a checkpoint."""
        weight_map = {name: path.name for path in self._paths for name in read_header(path)}
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_bytes()}, "weight_map": weight_map})

    def _merge(self, folder: Path) -> None:
        """All weights as one file in another folder."""
        headers = [read_header(path) for path in self._paths]
        shapes = {name: entry.shape for header in headers for name, entry in header.items()}

        def write(file: BinaryIO) -> None:
            file.write(_header(shapes, self._dtype))
            for path, header in zip(self._paths, headers, strict=True):
                with path.open("rb") as part:
                    part.seek(min(entry.start for entry in header.values()))
                    shutil.copyfileobj(part, file, 1 << 22)

        write_atomically(folder / SINGLE, write)


def _header(shapes: Mapping[str, Sequence[int]], dtype: str) -> bytes:
    """safetensors' length and header of tensors that follow each other in this order; padded, so that they align."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, itemsize = 0, getattr(torch, dtype).itemsize
    for name, shape in shapes.items():
        end = position + math.prod(shape) * itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
