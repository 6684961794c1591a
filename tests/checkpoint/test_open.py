"""Files of a checkpoint folder: what is read, and what is refused with a message that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.errors import CheckpointError
from tests.checkpoint.folders import edit_config, llama_folder, write_shards


def refused(folder: Path, *names: str) -> None:
    """Opening fails with a CheckpointError that names all of `names`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for name in names:
        assert name in str(caught.value)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.outer()
    for i in range(len(checkpoint.spec.layers)):
        tensors |= {f"{i}.{name}": tensor for name, tensor in checkpoint.layer(i).items()}
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_file(tmp_path, dtype):
    folder, tensors = llama_folder(tmp_path, dtype)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.spec.dtype == str(dtype).removeprefix("torch.")
    outer = checkpoint.outer()
    assert set(outer) == {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    assert torch.equal(outer["norm.weight"], tensors["model.norm.weight"])
    assert torch.equal(outer["lm_head.weight"], tensors["lm_head.weight"])
    for i in range(2):
        layer = checkpoint.layer(i)
        assert layer.keys() == {n.split(".", 3)[3] for n in tensors if n.startswith(f"model.layers.{i}.")}
        for name, tensor in layer.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, tensors[f"model.layers.{i}.{name}"])


def test_shards_give_what_one_file_gives(tmp_path):
    one, tensors = llama_folder(tmp_path / "one")
    many, _ = llama_folder(tmp_path / "many")
    names = list(tensors)
    write_shards(many, {f"part-{i}.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)})
    expected, found = all_tensors(one), all_tensors(many)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_weights_in_another_format(tmp_path):
    folder, _ = llama_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, str(folder), "*.bin", "save_pretrained")


class TestTies:
    EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

    def save(self, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, folder / "model.safetensors")
        return folder

    @pytest.mark.parametrize("copies", ["embed", "head", "both"])
    def test_tied_with_either_copy(self, tmp_path, copies):
        folder, tensors = llama_folder(tmp_path, tie_word_embeddings=True)
        embedding = tensors.pop(self.EMBED)
        if copies != "head":
            tensors[self.EMBED] = embedding
        if copies != "embed":
            tensors[self.HEAD] = embedding.clone()
        outer = open_checkpoint(self.save(folder, tensors)).outer()
        assert set(outer) == {"embed_tokens.weight", "norm.weight"}
        assert torch.equal(outer["embed_tokens.weight"], embedding)

    def test_tied_copies_that_differ(self, tmp_path):
        folder, tensors = llama_folder(tmp_path, tie_word_embeddings=True)
        tensors[self.HEAD] = tensors[self.EMBED] + 1
        checkpoint = open_checkpoint(self.save(folder, tensors))
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight and lm_head.weight differ"):
            checkpoint.outer()

    @pytest.mark.parametrize("name", [EMBED, HEAD])
    def test_untied_needs_both(self, tmp_path, name):
        folder, tensors = llama_folder(tmp_path)
        del tensors[name]
        refused(self.save(folder, tensors), "missing", name)

    def test_tied_needs_one(self, tmp_path):
        folder, tensors = llama_folder(tmp_path, tie_word_embeddings=True)
        del tensors[self.EMBED]
        refused(self.save(folder, tensors), "missing", self.EMBED)


def test_old_rotary_buffers_are_ignored(tmp_path):
    folder, tensors = llama_folder(tmp_path)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    assert "self_attn.rotary_emb.inv_freq" not in open_checkpoint(folder).layer(0)


class TestTensors:
    NAME = "model.layers.1.mlp.down_proj.weight"

    def test_missing(self, tmp_path):
        folder, tensors = llama_folder(tmp_path)
        del tensors[self.NAME]
        save_file(tensors, folder / "model.safetensors")
        refused(folder, "missing", self.NAME)

    def test_extra(self, tmp_path):
        folder, tensors = llama_folder(tmp_path)
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(4)
        save_file(tensors, folder / "model.safetensors")
        refused(folder, "model.layers.1.self_attn.q_norm.weight", "lacks")

    def test_layer_beyond_the_last(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        edit_config(folder, num_hidden_layers=1)
        refused(folder, "model.layers.1.", "more")

    def test_shape(self, tmp_path):
        folder, tensors = llama_folder(tmp_path)
        tensors[self.NAME] = tensors[self.NAME].T.contiguous()
        save_file(tensors, folder / "model.safetensors")
        refused(folder, self.NAME, "[24, 16]", "[16, 24]")

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
    def test_dtype(self, tmp_path, dtype):
        folder, tensors = llama_folder(tmp_path)
        tensors[self.NAME] = tensors[self.NAME].to(dtype)
        save_file(tensors, folder / "model.safetensors")
        refused(folder, self.NAME, "dtype", "bfloat16")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [NAME, "model.norm.weight"])
    def test_weights_that_are_not_finite(self, tmp_path, value, name):
        folder, tensors = llama_folder(tmp_path, torch.bfloat16)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            checkpoint.outer() if "norm" in name else dict(checkpoint.layer(1))


class TestSafetensors:
    def damaged(self, folder: Path, data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        refused(folder, "model.safetensors", "truncated or corrupt")

    def test_every_truncation(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        data = (folder / "model.safetensors").read_bytes()
        for length in [*range(0, 12), 100, int.from_bytes(data[:8], "little") + 8, len(data) // 2, len(data) - 1]:
            self.damaged(folder, data[:length])

    def test_trailing_bytes(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        self.damaged(folder, (folder / "model.safetensors").read_bytes() + b"\0")

    @pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 0])
    def test_header_length(self, tmp_path, length):
        folder, _ = llama_folder(tmp_path)
        data = (folder / "model.safetensors").read_bytes()
        self.damaged(folder, length.to_bytes(8, "little") + data[8:])

    @pytest.mark.parametrize("header", [b"{]", b"[]", b"nul", b'{"a": 1}', b"\xff\xfe", b"{" * 60000])
    def test_header_is_no_header(self, tmp_path, header):
        folder, _ = llama_folder(tmp_path)
        self.damaged(folder, len(header).to_bytes(8, "little") + header)

    @pytest.mark.parametrize(
        "change",
        [
            {"data_offsets": [0, 10**12]},
            {"data_offsets": [-4, 0]},
            {"data_offsets": [8, 0]},
            {"data_offsets": [4, 68]},  # overlaps its neighbour
            {"dtype": "F33"},
            {"shape": [10**12]},
            {"shape": [2**40, 2**40]},
            {"shape": [-16]},
        ],
    )
    def test_header_entry(self, tmp_path, change):
        folder, _ = llama_folder(tmp_path)
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["model.norm.weight"] |= change
        text = json.dumps(header).encode()
        self.damaged(folder, len(text).to_bytes(8, "little") + text + data[8 + length :])

    def test_no_weights(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        refused(folder, "model.safetensors")

    def test_git_lfs_pointer(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        refused(folder, "model.safetensors", "Git LFS")

    def test_weights_are_a_folder(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").mkdir()
        refused(folder, "model.safetensors")


class TestIndex:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        folder, tensors = llama_folder(tmp_path)
        names = list(tensors)
        write_shards(
            folder, {f"{part}.safetensors": {n: tensors[n] for n in names[i::2]} for i, part in enumerate("ab")}
        )
        return folder

    def edit(self, folder: Path, **weight_map: object) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = {n: f for n, f in (index["weight_map"] | weight_map).items() if f is not ...}
        path.write_text(json.dumps(index))

    def test_shard_absent(self, folder):
        (folder / "b.safetensors").unlink()
        refused(folder, "b.safetensors", "no such file")

    def test_shard_truncated(self, folder):
        path = folder / "b.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        refused(folder, "b.safetensors", "truncated")

    def test_names_a_tensor_the_shard_lacks(self, folder):
        self.edit(folder, ghost="a.safetensors")
        refused(folder, "index.json", "ghost", "a.safetensors")

    def test_names_the_wrong_shard(self, folder):
        in_a = next(iter(load_file(folder / "a.safetensors")))
        self.edit(folder, **{in_a: "b.safetensors"})
        refused(folder, in_a, "b.safetensors")

    def test_lacks_a_tensor_that_is_stored(self, folder):
        self.edit(folder, **{"lm_head.weight": ...})
        refused(folder, "index.json", "lm_head.weight")

    def test_tensor_in_two_shards(self, folder):
        a, b = (load_file(folder / f"{part}.safetensors") for part in "ab")
        name = next(iter(a))
        save_file(b | {name: a[name]}, folder / "b.safetensors")
        refused(folder, name, "a.safetensors", "b.safetensors")

    @pytest.mark.parametrize(
        "file", ["../a.safetensors", "/etc/passwd", "", "sub/a.safetensors", 3, None, "a\0b", ".."]
    )
    def test_names_a_file_outside_the_folder(self, folder, file):
        self.edit(folder, **{"lm_head.weight": file})
        refused(folder, "index.json", "lm_head.weight")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
    def test_is_no_index(self, folder, text):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, "index.json")


class TestConfigFile:
    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b"3", b"null", b'"llama"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a": NaN}', b"1" * 9999],
    )
    def test_is_no_object(self, tmp_path, data):
        folder, _ = llama_folder(tmp_path)
        (folder / "config.json").write_bytes(data)
        refused(folder, "config.json")

    def test_absent(self, tmp_path):
        folder, _ = llama_folder(tmp_path)
        (folder / "config.json").unlink()
        refused(folder, "config.json", "no such file")

    def test_is_a_folder(self, tmp_path):
        (tmp_path / "config.json").mkdir()
        refused(tmp_path, "config.json")

    @pytest.mark.parametrize("model_type", ["mamba", "", "Llama", 3, ["llama"], None, ...])
    def test_model_type(self, tmp_path, model_type):
        folder, _ = llama_folder(tmp_path)
        edit_config(folder, model_type=model_type)
        refused(folder, "config.json", "model_type", "llama", "mla_server")


@pytest.mark.parametrize("name", ["absent", "file", "file/below"])
def test_no_such_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    refused(tmp_path / name, name, "no such folder")


class TestGeneration:
    def defaults(self, folder: Path, text: str | None = None, **config: object):
        edit_config(folder, **config)
        if text is not None:
            (folder / "generation_config.json").write_text(text)
        return open_checkpoint(folder).generation

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return llama_folder(tmp_path)[0]

    def test_from_config_alone(self, folder):
        found = self.defaults(folder, bos_token_id=1, eos_token_id=[2, 3], temperature=0.6)
        assert (found.bos_token_id, found.eos_token_ids, found.temperature) == (1, (2, 3), 0.6)
        assert (found.top_k, found.top_p, found.repetition_penalty) == (None, None, None)

    def test_generation_config_comes_first_key_by_key(self, folder):
        text = '{"eos_token_id": 7, "top_p": 0.9, "top_k": 20, "bos_token_id": null, "num_beams": "x"}'
        found = self.defaults(folder, text, bos_token_id=1, eos_token_id=2)
        assert (found.bos_token_id, found.eos_token_ids, found.top_p, found.top_k) == (1, (7,), 0.9, 20)

    def test_says_nothing(self, folder):
        found = self.defaults(folder, "{}", eos_token_id=...)
        assert (found.bos_token_id, found.eos_token_ids, found.temperature) == (None, (), None)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("eos_token_id", "</s>"), ("eos_token_id", -1), ("eos_token_id", [1, "x"]), ("temperature", -1),
            ("temperature", "hot"), ("top_p", 0), ("top_k", 1.5), ("repetition_penalty", 0), ("bos_token_id", True),
        ],
    )  # fmt: skip
    def test_refused(self, folder, key, value):
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        refused(folder, "generation_config.json", key)
