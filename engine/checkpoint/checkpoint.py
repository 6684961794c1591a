"""A checkpoint on disk: what it is (ModelSpec), and its tensors by canonical name, read one layer at a time.

Invariant: a Checkpoint that could be opened has exactly the tensors its spec calls for, each in its shape; what is
missing, extra or mis-shaped was refused by name when it was opened, from the files' headers, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import mla_format
from engine.checkpoint.deepseek import read_deepseek_v2, read_deepseek_v3, read_glm4_moe_lite
from engine.checkpoint.fp8 import Fp8Files, read_fp8_block, scale_name
from engine.checkpoint.gemma2 import read_gemma2
from engine.checkpoint.generation import GenerationDefaults, read_generation_defaults
from engine.checkpoint.gqa_moe import mixtral_name, qwen_moe_name, read_mixtral, read_qwen2_moe, read_qwen3_moe
from engine.checkpoint.json_file import read_json_object
from engine.checkpoint.layout import DTYPES, check_tensors, expected_tensors, layer_tensors, outer_tensors, stored_name
from engine.checkpoint.llama import read_llama, read_mimo, read_mistral, read_qwen2, read_qwen3
from engine.checkpoint.minicpm3 import read_minicpm3
from engine.checkpoint.plm import read_plm
from engine.checkpoint.tensor_files import StoredTensor, TensorFiles
from engine.errors import CheckpointError
from engine.spec import ModelSpec
from engine.tensor_map import TensorMap

__all__ = ["Checkpoint", "GenerationDefaults", "open_checkpoint"]


@dataclass(frozen=True)
class Family:
    """How a family's folders are read."""

    read: Callable[[dict[str, Any], str], ModelSpec]  # (config.json, dtype of the stored weights) -> ModelSpec
    rename: Callable[[str], str] = str  # canonical name of a layer's tensor -> the family's own
    unused: re.Pattern[str] = re.compile("(?!)")  # tensors that the forward pass has no part for; by default none
    has_mtp: bool = False  # after its layers may be num_nextn_predict_layers that predict further tokens; not loaded


# By model_type. Families are told apart here alone.
FAMILIES = {
    "llama": Family(read_llama),
    "mistral": Family(read_mistral),
    "qwen2": Family(read_qwen2),
    "qwen3": Family(read_qwen3),
    "gemma2": Family(read_gemma2),
    "mimo": Family(read_mimo, unused=re.compile(r"model\.mtp_layers\..*")),
    "mixtral": Family(read_mixtral, mixtral_name),
    "qwen2_moe": Family(read_qwen2_moe, qwen_moe_name),
    "qwen3_moe": Family(read_qwen3_moe),
    "deepseek_v2": Family(read_deepseek_v2),
    "deepseek_v3": Family(read_deepseek_v3, has_mtp=True),
    "kimi_k2": Family(read_deepseek_v3, has_mtp=True),
    "glm4_moe_lite": Family(read_glm4_moe_lite, has_mtp=True),
    "youtu": Family(read_deepseek_v3, has_mtp=True),
    "minicpm3": Family(read_minicpm3),
    "plm": Family(read_plm),
    mla_format.MODEL_TYPE: Family(mla_format.spec_from_config),
}

EMBEDDING, HEAD = stored_name("embed_tokens.weight"), stored_name("lm_head.weight")
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
# Buffers that older versions of `transformers` stored along with the weights; the config says the same.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. A tensor that holds NaN or infinity is a CheckpointError when it is read."""

    path: Path
    spec: ModelSpec
    generation: GenerationDefaults
    config: dict[str, Any]  # config.json as it stands
    _files: TensorFiles | Fp8Files
    _rename: Callable[[str], str]

    def outer(self) -> dict[str, Tensor]:
        """embed_tokens.weight, norm.weight and, unless tied, lm_head.weight, in the stored dtype, on the CPU."""
        stored, load = self._files.entries, self._files.load
        names = {name: stored_name(name) for name in outer_tensors(self.spec)}
        if EMBEDDING not in stored:  # a tied pair stored as its other copy
            names["embed_tokens.weight"] = HEAD
        tensors = {name: load(source) for name, source in names.items()}
        both = self.spec.tie_embeddings and EMBEDDING in stored and HEAD in stored
        if both and not torch.equal(tensors["embed_tokens.weight"], load(HEAD)):
            raise CheckpointError(f"{self.path}: config.json ties the embeddings, but {EMBEDDING} and {HEAD} differ")
        return tensors

    @property
    def fp8_block(self) -> tuple[int, ...] | None:
        """Rows and columns that share a scale, where weights are stored in FP8."""
        return self._files.block if isinstance(self._files, Fp8Files) else None

    def fp8_weights(self, index: int) -> frozenset[str]:
        """Which of a layer's tensors are stored in FP8, named as by `layer`."""
        if not isinstance(self._files, Fp8Files):
            return frozenset()
        names = layer_tensors(self.spec.layers[index], self.spec.hidden_size)
        return frozenset(name for name in names if self._stored(name, index) in self._files.scaled)

    def layer(self, index: int, keep_fp8: Collection[str] = ()) -> Mapping[str, Tensor]:
        """One layer's tensors, named without `model.layers.<i>.`: self_attn.q_proj.weight and so on.

        Each is read when it is asked for, and again when asked for again. FP8 is multiplied out, but for `keep_fp8`,
        some of `fp8_weights`: they are float8_e4m3fn, and self_attn.q_proj.scale goes with self_attn.q_proj.weight,
        fp32 [out, ceil(in / columns of a block)].
        """
        names = layer_tensors(self.spec.layers[index], self.spec.hidden_size)
        makers = dict.fromkeys(names, self._files.load)
        sources = {name: self._stored(name, index) for name in names}
        if isinstance(self._files, Fp8Files):
            for name in keep_fp8:
                makers[name] = self._files.load_fp8
                makers[scale_name(name)] = self._files.load_scale
                sources[scale_name(name)] = sources[name]
        return TensorMap(sources, lambda name: makers[name](sources[name]))

    def layer_dtypes(self, index: int) -> frozenset[str]:
        """All that tensors of `layer` come in; none is read to find out."""
        names = layer_tensors(self.spec.layers[index], self.spec.hidden_size)
        return frozenset(self._files.entries[self._stored(name, index)].dtype for name in names)

    def _stored(self, name: str, index: int) -> str:
        return stored_name(self._rename(name), index)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder or one in this project's format. Raises CheckpointError."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a model is given as the folder that holds its config.json")
    config = read_json_object(folder / "config.json")
    family = family_of(folder / "config.json", config)
    stored = TensorFiles(folder)
    dtype = _model_dtype(folder, stored.entries)
    try:
        spec = family.read(config, dtype)
        further = mtp_layers(config) if family.has_mtp else 0
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    quantized = config.get("quantization_config")  # which the reader has let pass
    files = Fp8Files(stored, read_fp8_block(config), dtype) if quantized else stored
    entries = _used(files.entries, range(len(spec.layers), len(spec.layers) + further), family.unused)
    _check_stored(folder, spec, entries, family.rename)
    return Checkpoint(folder, spec, read_generation_defaults(folder, config), config, files, family.rename)


def _used(
    entries: Mapping[str, StoredTensor], skipped_layers: range, unused: re.Pattern[str]
) -> dict[str, StoredTensor]:
    used = {}
    for name, entry in entries.items():
        layer = LAYER.match(name)
        if not (IGNORED.fullmatch(name) or unused.fullmatch(name) or (layer and int(layer[1]) in skipped_layers)):
            used[name] = entry
    return used


def read_config(path: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """What a config.json says of a model whose weights need not be there, and the file as it stands.

    Its own word for the dtype is taken; bfloat16 where it has none. Raises CheckpointError.
    """
    config = read_json_object(path)
    family = family_of(path, config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        if not isinstance(dtype, str):
            raise CheckpointError(f"dtype {dtype!r:.40} is not supported; supported: {', '.join(DTYPES)}")
        return family.read(config, dtype), config
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def family_of(where: Path, config: dict[str, Any]) -> Family:
    """By the model_type of `where`, a config.json. Raises CheckpointError where it is not supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {model_type!r:.60} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def mtp_layers(config: dict[str, Any]) -> int:
    """How many layers, after the model's own, predict further tokens (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    count = config.get("num_nextn_predict_layers") or 0
    if not isinstance(count, int) or not 0 <= count <= 64:
        raise CheckpointError(f"num_nextn_predict_layers {count!r:.40} is not supported; supported: 0 to 64")
    return count


def _model_dtype(folder: Path, entries: Mapping[str, StoredTensor]) -> str:
    """The embedding's dtype, which is taken for the model's."""
    for name in (EMBEDDING, HEAD):
        if name in entries:
            _check_dtype(folder, name, entries[name])
            return entries[name].dtype
    raise CheckpointError(f"{folder}: missing tensors: {EMBEDDING}")


def _check_dtype(folder: Path, name: str, entry: StoredTensor) -> None:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{folder / entry.file}: tensor {name} has dtype {entry.dtype}; supported: {', '.join(DTYPES)}"
        )


def _check_stored(
    folder: Path, spec: ModelSpec, entries: dict[str, StoredTensor], rename: Callable[[str], str]
) -> None:
    for name, entry in entries.items():
        _check_dtype(folder, name, entry)
    expected = expected_tensors(spec, rename)
    if spec.tie_embeddings and HEAD in entries:  # either copy of a tied pair will do, or both
        expected[HEAD] = expected[EMBEDDING]
        if EMBEDDING not in entries:
            del expected[EMBEDDING]
    check_tensors(folder, expected, entries)
