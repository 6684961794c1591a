"""A checkpoint on disk: what it is (ModelSpec), and its tensors by canonical name, read one layer at a time.

Invariant: a Checkpoint that could be opened has exactly the tensors its spec calls for, each in its shape; what is
missing, extra or mis-shaped was refused by name when it was opened, from the files' headers, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.spec import ModelSpec


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json (and, failing that, config.json) says; None where it says nothing."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


class Checkpoint:
    """An opened checkpoint folder."""

    path: Path
    spec: ModelSpec
    generation: GenerationDefaults
    config: dict[str, Any]  # config.json as it stands

    def outer(self) -> dict[str, Tensor]:
        """embed_tokens.weight, norm.weight and, unless tied, lm_head.weight, in the stored dtype, on the CPU."""
        raise NotImplementedError

    def layer(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors, named without `model.layers.<i>.`: input_layernorm.weight, self_attn.q_proj.weight, ..."""
        raise NotImplementedError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder or one in this project's format. Raises CheckpointError."""
    raise NotImplementedError
