"""Writing a checkpoint: what was given reads back, and the output folder appears whole or not at all."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from engine.checkpoint.layout import layer_tensors, outer_tensors, stored_name
from engine.checkpoint.writer import restore
from engine.errors import CheckpointError
from engine.spec import ModelSpec
from tests.checkpoint.folders import edit_config, llama_folder
from tests.checkpoint.test_mla_format import SMALL

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.fixture
def source(tmp_path) -> Checkpoint:
    folder, _ = llama_folder(tmp_path / "source")
    for name in SIDE_FILES:
        (folder / name).write_text(f"text of {name}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.7}')
    return open_checkpoint(folder)


def parts(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Random tensors: what no layer owns, and each layer's."""
    generator = torch.Generator().manual_seed(0)

    def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return random(outer_tensors(spec)), [random(layer_tensors(layer, spec.hidden_size)) for layer in spec.layers]


def write(out: Path, source: Checkpoint, spec: ModelSpec = SMALL, **options: object):
    outer, layers = parts(spec)
    with CheckpointWriter(out, spec, source, **options) as writer:
        writer.add_outer(outer)
        for i, layer in enumerate(layers):
            writer.add_layer(i, layer)
        writer.finish({"method": "none"})
    return outer, layers


def assert_same(found: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_back(tmp_path, source, sharded, tied):
    spec = replace(SMALL, tie_embeddings=tied)
    outer, layers = write(tmp_path / "out", source, spec, **({"single_bytes": 1500} if sharded else {}))
    found = open_checkpoint(tmp_path / "out")
    assert found.spec == spec
    assert found.generation == source.generation
    assert_same(found.outer(), outer)
    for i, layer in enumerate(layers):
        assert_same(found.layer(i), layer)
    files = sorted(path.name for path in (tmp_path / "out").glob("model*"))
    shards = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert files == ([*shards, "model.safetensors.index.json"] if sharded else ["model.safetensors"])
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == {"method": "none"}
    for name in SIDE_FILES:
        assert (tmp_path / "out" / name).read_text() == f"text of {name}"
    leftovers(tmp_path, "source", "out")


@pytest.mark.parametrize("single_bytes", [0, 2**30])
def test_the_library_reads_the_same(tmp_path, source, single_bytes):
    """Files written here against safetensors' own reader, metadata included; the data is aligned for any dtype."""
    outer, layers = write(tmp_path / "out", source, single_bytes=single_bytes)
    given = {stored_name(name): t for name, t in outer.items()}
    for i, layer in enumerate(layers):
        given |= {stored_name(name, i): t for name, t in layer.items()}
    found: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56
    assert_same(found, given)


class TestGoingOn:
    """A second writer in the folder of one that was stopped."""

    @pytest.mark.parametrize("single_bytes", [0, 2**30])
    def test_what_is_written_is_kept(self, tmp_path, source, single_bytes):
        write(tmp_path / "whole", source, single_bytes=single_bytes)
        outer, layers = parts(SMALL)
        (tmp_path / "work").mkdir()
        options = {"work": tmp_path / "work", "single_bytes": single_bytes}
        with CheckpointWriter(tmp_path / "out", SMALL, source, **options) as writer:
            writer.add_outer(outer)
            writer.add_layer(1, layers[1])
            with pytest.raises(CheckpointError, match=r"o_proj\.weight has weights that are NaN"):
                writer.add_layer(0, {n: t * math.nan if "o_proj.w" in n else t for n, t in layers[0].items()})
        (tmp_path / "work" / "shards" / "model-00002-of-00003.safetensors.unfinished").write_bytes(b"half a fi")
        with CheckpointWriter(tmp_path / "out", SMALL, source, **options) as writer:
            assert [writer.has(i) for i in (None, 0, 1)] == [True, False, True]
            assert_same(writer.read_layer(1, SMALL.layers[1]), layers[1])
            with pytest.raises(CheckpointError, match="layer 1 is already written"):
                writer.add_layer(1, layers[1])
            writer.add_layer(0, layers[0])
            writer.finish({"method": "none"})
        assert files(tmp_path / "out") == files(tmp_path / "whole")

    def test_stopped_between_the_two_renames(self, tmp_path, source):
        """The earlier output has moved aside, the new one has not come: `restore` brings the earlier one back."""
        write(tmp_path / "out", source)
        before = files(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "replaced")
        restore(tmp_path / "out", tmp_path)
        assert files(tmp_path / "out") == before
        restore(tmp_path / "out", tmp_path)
        assert files(tmp_path / "out") == before


def test_layers_in_any_order_from_any_dtype_and_memory(tmp_path, source):
    """Views of one buffer, transposed, in fp64: written as fp32, and what the caller does later changes nothing."""
    outer, layers = parts(SMALL, torch.float64)
    with CheckpointWriter(tmp_path / "out", SMALL, source) as writer:
        for i in (1, 0):
            given = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in layers[i].items()}
            writer.add_layer(i, given)
            for tensor in given.values():
                tensor.fill_(0)
        shared = torch.randn(2, *outer["lm_head.weight"].shape, dtype=torch.float64)
        writer.add_outer(outer | {"lm_head.weight": shared[0], "embed_tokens.weight": shared[1]})
        writer.finish({})
    found = open_checkpoint(tmp_path / "out")
    assert torch.equal(found.outer()["lm_head.weight"], shared[0].float())
    for i in (0, 1):
        assert_same(found.layer(i), {name: t.float() for name, t in parts(SMALL, torch.float64)[1][i].items()})


def test_source_without_side_files(tmp_path, source):
    """Generation defaults survive where the source kept them in config.json, which the new one does not."""
    for path in source.path.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    edit_config(source.path, bos_token_id=1, eos_token_id=5)
    bare = open_checkpoint(source.path)
    write(tmp_path / "out", bare)
    assert open_checkpoint(tmp_path / "out").generation == bare.generation
    leftovers(
        tmp_path / "out", "config.json", "conversion.json", "generation_config.json", "model.safetensors"
    )  # fmt: skip


class TestGivenWrong:
    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"self_attn.o_proj.weight": None}, ("missing", "self_attn.o_proj.weight")),
            ({"self_attn.q_norm.weight": torch.ones(2)}, ("self_attn.q_norm.weight",)),
            ({"self_attn.o_proj.weight": torch.ones(2, 2)}, ("self_attn.o_proj.weight", "[2, 2]", "[8, 24]")),
            ({"input_layernorm.weight": torch.full((8,), float("nan"))}, ("input_layernorm.weight", "NaN")),
        ],
    )
    def test_tensors(self, tmp_path, source, change, names):
        layer = {k: v for k, v in (parts(SMALL)[1][0] | change).items() if v is not None}
        with pytest.raises(CheckpointError) as caught, CheckpointWriter(tmp_path / "out", SMALL, source) as writer:
            writer.add_layer(0, layer)
        for name in ("layer 0", *names):
            assert name in str(caught.value)
        leftovers(tmp_path, "source")

    def test_beyond_the_range_of_float16(self, tmp_path, source):
        outer, _ = parts(SMALL)
        outer["norm.weight"][0] = 1e6
        half = replace(SMALL, dtype="float16")
        with (
            pytest.raises(CheckpointError, match=r"norm\.weight .* float16"),
            CheckpointWriter(tmp_path / "out", half, source) as writer,
        ):
            writer.add_outer(outer)
        leftovers(tmp_path, "source")

    def test_unfinished(self, tmp_path, source):
        outer, layers = parts(SMALL)
        with CheckpointWriter(tmp_path / "out", SMALL, source) as writer:
            writer.add_outer(outer)
            writer.add_layer(0, layers[0])
            with pytest.raises(CheckpointError, match="not written yet: layer 1"):
                writer.finish({})
        leftovers(tmp_path, "source")

    def test_twice(self, tmp_path, source):
        with CheckpointWriter(tmp_path / "out", SMALL, source) as writer:
            writer.add_layer(0, parts(SMALL)[1][0])
            with pytest.raises(CheckpointError, match="layer 0 is already written"):
                writer.add_layer(0, parts(SMALL)[1][0])
        leftovers(tmp_path, "source")


class TestOutputFolder:
    def test_empty_folder_is_used_and_parents_are_made(self, tmp_path, source):
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", source)
        write(tmp_path / "deep" / "er" / "out", source)
        assert open_checkpoint(tmp_path / "deep" / "er" / "out").spec == open_checkpoint(tmp_path / "out").spec

    def test_overwriting_is_asked_for(self, tmp_path, source):
        write(tmp_path / "out", source)
        (tmp_path / "out" / "old").write_text("")
        with pytest.raises(CheckpointError, match="out: exists and is not empty"):
            write(tmp_path / "out", source)
        assert (tmp_path / "out" / "old").exists()
        write(tmp_path / "out", source, overwrite=True)
        assert not (tmp_path / "out" / "old").exists()
        leftovers(tmp_path, "source", "out")

    def test_failure_leaves_the_earlier_output(self, tmp_path, source):
        write(tmp_path / "out", source)
        before = files(tmp_path / "out")
        with (
            pytest.raises(CheckpointError),
            CheckpointWriter(tmp_path / "out", SMALL, source, overwrite=True) as writer,
        ):
            writer.add_layer(0, {})
        assert files(tmp_path / "out") == before
        leftovers(tmp_path, "source", "out")

    def test_a_folder_of_something_else_is_never_overwritten(self, tmp_path, source):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "letters").write_text("dear")
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            write(tmp_path / "home", source, overwrite=True)

    def test_a_file_is_never_overwritten(self, tmp_path, source):
        (tmp_path / "out").write_text("")
        with pytest.raises(CheckpointError, match="not a folder"):
            write(tmp_path / "out", source, overwrite=True)

    @pytest.mark.parametrize("out", ["source", "source/../source", "."])
    def test_the_source_is_never_overwritten(self, tmp_path, source, out):
        shutil.copy(source.path / "config.json", tmp_path / "config.json")
        with pytest.raises(CheckpointError, match="source"):
            write(tmp_path / out, source, overwrite=True)
        open_checkpoint(source.path)

    def test_below_a_file(self, tmp_path, source):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="out: cannot be written"):
            write(tmp_path / "file" / "out", source)


class TestDisk:
    """The disk fails while an earlier output stands: one clear error, and the earlier output stands still."""

    def fails(self, tmp_path: Path, source: Checkpoint, during: Callable[[], AbstractContextManager[object]]) -> None:
        out = tmp_path / "out"
        write(out, source)
        before = (out / "model.safetensors").read_bytes()
        with during(), pytest.raises(CheckpointError, match="out: cannot be written"):
            write(out, source, overwrite=True)
        assert (out / "model.safetensors").read_bytes() == before
        open_checkpoint(out)
        leftovers(tmp_path, "source", "out")

    def test_weights(self, tmp_path, source):
        """The kernel refuses to let the file grow, as it does when the disk is full."""

        @contextmanager
        def limited() -> Iterator[None]:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        self.fails(tmp_path, source, limited)

    @pytest.mark.parametrize("call", ["shutil.copyfile", "os.fsync"])
    def test_side_files(self, tmp_path, source, monkeypatch, call):
        @contextmanager
        def full() -> Iterator[None]:
            def fail(*_: object) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(call, fail)
                yield

        self.fails(tmp_path, source, full)

    def test_putting_it_in_place(self, tmp_path, source, monkeypatch):
        """The first rename to the output's name fails; the second is the earlier output moving back."""
        rename, tried = Path.rename, []

        def fail_once(path: Path, target: Path) -> Path:
            if Path(target).name == "out" and not tried:
                tried.append(path)
                raise OSError(18, "Invalid cross-device link")
            return rename(path, target)

        @contextmanager
        def crossing() -> Iterator[None]:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", fail_once)
                yield

        self.fails(tmp_path, source, crossing)
        assert len(tried) == 1
