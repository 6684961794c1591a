"""Writing a checkpoint in this project's format, one layer at a time.

Invariant: the output folder appears whole or not at all. Everything is written to a temporary folder beside it, flushed
to the disk, and then renamed; until then an earlier output stands untouched, and on failure the temporary folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.generation import generation_config
from engine.checkpoint.layout import Shape, check_tensors, layer_tensors, outer_tensors, stored_name
from engine.checkpoint.mla_format import config_from_spec, format_config
from engine.checkpoint.tensor_files import INDEX, SINGLE
from engine.errors import CheckpointError
from engine.spec import LayerSpec, ModelSpec
from engine.tokenizer import copy_tokenizer

GENERATION = "generation_config.json"


class CheckpointWriter:
    """Use as a context manager: `add_outer` once, `add_layer` for each layer in any order, then `finish`."""

    def __init__(
        self,
        out: str | Path,
        spec: ModelSpec,
        source: Checkpoint,
        *,
        overwrite: bool = False,
        shard_bytes: int = 2 << 30,
    ) -> None:
        """`source` gives tokenizer, chat template and generation defaults. Weights are cast to spec.dtype.

        The layers of `spec` may be provisional (the source's, say) where `add_layer` brings each one's own.

        Raises CheckpointError where `out` exists and is not an empty folder, unless `overwrite` is given and it holds a
        checkpoint. At most `shard_bytes` of weights and one layer wait in memory.
        """
        self._out = Path(out).resolve()
        self._spec = spec
        self._source = source
        self._shard_bytes = shard_bytes
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._layers = list(spec.layers)
        self._check_out(overwrite)
        self._missing: set[int | None] = {None, *range(len(spec.layers))}  # None: what no layer owns
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []  # names of each shard's tensors
        with self._errors():
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.", dir=self._out.parent))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)  # renamed away, and so absent, once finished

    def add_outer(self, tensors: Mapping[str, Tensor]) -> None:
        """embed_tokens.weight, norm.weight and, unless tied, lm_head.weight."""
        self._add(tensors, outer_tensors(self._spec), None)

    def add_layer(self, index: int, tensors: Mapping[str, Tensor], spec: LayerSpec | None = None) -> None:
        """One layer's tensors, named without `model.layers.<i>.`, on any device, in any floating dtype.

        `spec`: what the layer is, where that came out only with its tensors; it takes the place of the constructor's.
        """
        if spec is not None:
            self._layers[index] = spec
        self._add(tensors, layer_tensors(self._layers[index], self._spec.hidden_size), index)

    def finish(self, conversion: Mapping[str, Any]) -> None:
        """Write what remains, `conversion` as conversion.json, and put the folder in its place."""
        if self._missing:
            raise CheckpointError(f"{self._out}: not written yet: {_part(min(self._missing, key=lambda i: i or -1))}")
        config = format_config(config_from_spec(replace(self._spec, layers=tuple(self._layers))))
        with self._errors():
            self._flush()
            self._name_shards()
            (self._temporary / "config.json").write_text(config)
            (self._temporary / "conversion.json").write_text(json.dumps(conversion, indent=2) + "\n")
            copy_tokenizer(self._source.path, self._temporary)
            if (self._source.path / GENERATION).exists():
                shutil.copyfile(self._source.path / GENERATION, self._temporary / GENERATION)
            else:  # config.json had it; the new one does not
                text = json.dumps(generation_config(self._source.generation), indent=2)
                (self._temporary / GENERATION).write_text(text + "\n")
            self._temporary.chmod(0o777 & ~_umask())
            for path in (*self._temporary.iterdir(), self._temporary):
                _sync(path)
            self._replace()

    def _add(self, tensors: Mapping[str, Tensor], expected: dict[str, Shape], index: int | None) -> None:
        if index not in self._missing:
            raise CheckpointError(f"{self._out}: {_part(index)} is already written")
        check_tensors(f"{self._out}: {_part(index)}", expected, tensors)
        for name, tensor in tensors.items():
            # A copy of its own: contiguous, sharing no memory, free of what the caller does next.
            copy = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
            if not torch.isfinite(copy).all():
                raise CheckpointError(
                    f"{self._out}: {_part(index)}: {name} has weights that are NaN or infinite in {self._spec.dtype}"
                )
            if self._pending and self._pending_bytes + copy.nbytes > self._shard_bytes:
                with self._errors():
                    self._flush()
            self._pending[stored_name(name, index)] = copy
            self._pending_bytes += copy.nbytes
        self._missing.remove(index)

    def _flush(self) -> None:
        """Write the waiting tensors as one shard, under a name to be settled when their number is known."""
        save_file(self._pending, self._temporary / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
        for i, name in enumerate(names):
            (self._temporary / f"shard-{i}").rename(self._temporary / name)
        if count > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _check_out(self, overwrite: bool) -> None:
        out, source = self._out, self._source.path.resolve()
        if out == source or out in source.parents:
            raise CheckpointError(f"{out}: is or holds the source model; choose another output folder")
        if not out.exists():
            return
        with self._errors():
            if not out.is_dir():
                raise CheckpointError(f"{out}: exists and is not a folder")
            if not any(out.iterdir()):
                return
        if not overwrite:
            raise CheckpointError(f"{out}: exists and is not empty; remove it or ask to overwrite it")
        if not (out / "config.json").exists():
            raise CheckpointError(f"{out}: holds no checkpoint (no config.json), so it is not overwritten")

    def _replace(self) -> None:
        """Rename the finished folder to its place. An earlier one is moved aside first, and back if that fails."""
        aside: Path | None = None
        if self._out.exists() and any(self._out.iterdir()):
            aside = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.old.", dir=self._out.parent))
            self._out.rename(aside)
        try:
            self._temporary.rename(self._out)
        except OSError:
            if aside is not None:
                aside.rename(self._out)
            raise
        _sync(self._out.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._out}: cannot be written: {error}") from None


def _part(index: int | None) -> str:
    return "embeddings and final norm" if index is None else f"layer {index}"


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
