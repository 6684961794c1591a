"""Writing a checkpoint in this project's format, one layer at a time.

Invariant: the output folder appears whole or not at all. Everything is written to a working folder on the same file
system, flushed to the disk, and then renamed; until then an earlier output stands untouched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from engine.checkpoint.checkpoint import Checkpoint
from engine.checkpoint.generation import generation_config
from engine.checkpoint.layout import Shape, check_tensors, layer_tensors, outer_tensors, stored_name
from engine.checkpoint.mla_format import config_from_spec, format_config
from engine.checkpoint.shards import SINGLE_BYTES, ShardWriter, output_errors, sync, write_json
from engine.errors import CheckpointError
from engine.spec import LayerSpec, ModelSpec
from engine.tensor_map import TensorMap
from engine.tokenizer import copy_tokenizer

GENERATION = "generation_config.json"
PLACING = "placing.json"  # in the working folder from just before the first rename
REPLACED = "replaced"  # in the working folder: the earlier output, while it is being replaced


class CheckpointWriter:
    """Use as a context manager: `add_outer` once, `add_layer` for each layer in any order, then `finish`."""

    def __init__(
        self,
        out: str | Path,
        spec: ModelSpec,
        source: Checkpoint,
        *,
        overwrite: bool = False,
        work: Path | None = None,
        single_bytes: int = SINGLE_BYTES,
    ) -> None:
        """`source` gives tokenizer, chat template and generation defaults. Weights are cast to spec.dtype.

        The layers of `spec` may be provisional (the source's, say) where `add_layer` brings each one's own.
        Weights of at most `single_bytes` end up in one file; more are one file for each layer and one for the rest.

        `work`: an existing folder beside `out`, in which what is written stays when this process ends, so that another
        writer of the same model goes on from there; it is the caller's to remove. None: a temporary one.

        Raises CheckpointError where `out` exists and is not an empty folder, unless `overwrite` is given and it holds a
        checkpoint.
        """
        self._out = Path(out).resolve()
        self._spec = spec
        self._source = source
        self._single_bytes = single_bytes
        self._layers = list(spec.layers)
        check_output(self._out, source.path, overwrite)
        with output_errors(self._out):
            if work is None:
                self._out.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = work is None
            self._work = work or Path(tempfile.mkdtemp(prefix=f".{self._out.name}.", dir=self._out.parent))
            self._shards = ShardWriter(self._work / "shards", len(spec.layers), spec.dtype)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary:
            shutil.rmtree(self._work, ignore_errors=True)

    def has(self, index: int | None) -> bool:
        """Whether a layer (None: what no layer owns) is written, now or by an earlier writer in the same folder."""
        return _part(index) in self._shards.written

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

    def read_layer(self, index: int, spec: LayerSpec, prefix: str = "") -> dict[str, Tensor]:
        """Those tensors of a layer that `has` been written whose names begin with `prefix`, in spec.dtype.

        `spec`: as given to `add_layer`. Raises CheckpointError where the tensors are not its.
        """
        self._layers[index] = spec
        expected = layer_tensors(spec, self._spec.hidden_size)
        wanted = {name: shape for name, shape in expected.items() if name.startswith(prefix)}
        with output_errors(self._out):
            stored = self._shards.read(_part(index), [stored_name(name, index) for name in wanted])
        tensors = {name: stored[stored_name(name, index)] for name in wanted}
        check_tensors(f"{self._work}: layer {index}", wanted, tensors)
        return tensors

    def finish(self, conversion: Mapping[str, Any]) -> None:
        """Write what remains, `conversion` as conversion.json, and put the folder in its place."""
        for index in (None, *range(len(self._layers))):
            if not self.has(index):
                raise CheckpointError(f"{self._out}: not written yet: {_named(index)}")
        config = format_config(config_from_spec(replace(self._spec, layers=tuple(self._layers))))
        with output_errors(self._out):
            folder = self._shards.gather(self._work, self._single_bytes)
            (folder / "config.json").write_text(config)
            write_json(folder / "conversion.json", conversion)
            copy_side_files(self._source, folder)
            place(folder, self._out, self._work)

    def _add(self, tensors: Mapping[str, Tensor], expected: dict[str, Shape], index: int | None) -> None:
        where = f"{self._out}: {_named(index)}"
        if self.has(index):
            raise CheckpointError(f"{where} is already written")
        check_tensors(where, expected, tensors)
        with output_errors(self._out):
            try:
                names = {stored_name(name, index): name for name in tensors}
                self._shards.write(_part(index), TensorMap(names, lambda stored: tensors[names[stored]]))
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}") from None


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Raises CheckpointError where a checkpoint made of `source` may not be put at `out`."""
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents:
        raise CheckpointError(f"{out}: is or holds the source model; choose another output folder")
    if not out.exists():
        return
    with output_errors(out):
        if not out.is_dir():
            raise CheckpointError(f"{out}: exists and is not a folder")
        if not any(out.iterdir()):
            return
    if not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; remove it or ask to overwrite it")
    if not (out / "config.json").exists():
        raise CheckpointError(f"{out}: holds no checkpoint (no config.json), so it is not overwritten")


def copy_side_files(source: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template and generation defaults. Raises OSError, CheckpointError."""
    copy_tokenizer(source.path, folder)
    if (source.path / GENERATION).exists():
        shutil.copyfile(source.path / GENERATION, folder / GENERATION)
    else:  # config.json had it; the new one does not
        write_json(folder / GENERATION, generation_config(source.generation))


def place(folder: Path, out: Path, work: Path) -> None:
    """Flush `folder`, which lies in `work`, to the disk and rename it to `out`. Raises OSError.

    An earlier `out` is moved aside into `work` first, and back if that fails; `restore` does the same after a kill.
    """
    folder.chmod(0o777 & ~_umask())
    for path in (*folder.iterdir(), folder):
        sync(path)
    write_json(work / PLACING, {"folder": folder.name})
    if out.exists() and any(out.iterdir()):
        out.rename(work / REPLACED)
    try:
        folder.rename(out)
    except BaseException:
        restore(out, work)
        raise
    sync(out.parent)


def restore(out: Path, work: Path) -> None:
    """Undo the first half of a `place` that did not come to its second."""
    if (work / REPLACED).exists() and not out.exists():
        (work / REPLACED).rename(out)


def _part(index: int | None) -> int:
    """The number of a layer's file (None: what no layer owns) in the ShardWriter."""
    return 0 if index is None else index + 1


def _named(index: int | None) -> str:
    return "embeddings and final norm" if index is None else f"layer {index}"


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
