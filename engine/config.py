"""EngineConfig: what a user may set about an engine. None means: decided from the machine and the model."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import CapacityError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    device: str | None = None  # "cuda", "cpu"; None: cuda where there is one
    dtype: str = "auto"  # "auto": float32 on a CPU, the checkpoint's own on a GPU
    max_num_seqs: int = 64  # sequences that run at once
    max_model_len: int | None = None  # tokens of one sequence, prompt and output; None: the model's own limit
    max_batched_tokens: int = 2048  # tokens computed in one step
    block_size: int = 64  # tokens a cache block holds
    cache_tokens: int | None = None  # tokens the cache holds; None: what memory allows
    memory_fraction: float = 0.9  # of the GPU's memory, for weights, cache and work space together
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        """Raises CapacityError, naming the setting, where a number makes no sense."""
        for name in ("max_num_seqs", "max_model_len", "max_batched_tokens", "block_size", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CapacityError(f"{name} must be at least 1, not {value}")
        if not 0 < self.memory_fraction <= 1:
            raise CapacityError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction}")
