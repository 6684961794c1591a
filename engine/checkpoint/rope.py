"""Rotary frequencies from a Hugging Face config: the kinds of RoPE scaling, in `transformers`' arithmetic (fp32)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from engine.checkpoint.json_file import Positive, Size, typed
from engine.errors import CheckpointError
from engine.spec import RopeSpec


class _Default(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """RoFormer (arXiv 2104.09864)."""

    rope_type: str = "default"
    type: str | None = None  # rope_type's older name
    rope_theta: Annotated[float, Meta(gt=1, le=1e12)] = 10000.0
    partial_rotary_factor: float = 1.0

    def frequencies(self, dim: int, max_position: int) -> tuple[Tensor, float]:  # noqa: ARG002
        """inv_freq fp32 [dim/2], and what cos and sin are multiplied by."""
        return 1.0 / self.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0


class _Dynamic(_Default):
    """NTK scaling that starts where the context ends: within max_position_embeddings, which the engine never leaves,
    nothing is scaled."""

    factor: Positive


class _Linear(_Default):
    """Position interpolation (arXiv 2306.15595)."""

    factor: Positive

    def frequencies(self, dim: int, max_position: int) -> tuple[Tensor, float]:
        return super().frequencies(dim, max_position)[0] / self.factor, 1.0


class _Llama3(_Default):
    """Llama 3.1: low frequencies interpolated, high ones kept, a ramp between."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size | None = None

    def frequencies(self, dim: int, max_position: int) -> tuple[Tensor, float]:
        if self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError("low_freq_factor must be below high_freq_factor")
        inv_freq = super().frequencies(dim, max_position)[0]
        length = self.original_max_position_embeddings or max_position
        wavelength = 2 * math.pi / inv_freq
        scaled = torch.where(wavelength > length / self.low_freq_factor, inv_freq / self.factor, inv_freq)
        smooth = (length / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = ~(wavelength < length / self.high_freq_factor) * ~(wavelength > length / self.low_freq_factor)
        return torch.where(between, (1 - smooth) * scaled / self.factor + smooth * scaled, scaled), 1.0


class _Yarn(_Default):
    """YaRN (arXiv 2309.00071)."""

    factor: Positive
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    finetuned: bool | None = None  # says how a model came about, changes nothing

    def frequencies(self, dim: int, max_position: int) -> tuple[Tensor, float]:
        length = self.original_max_position_embeddings or max_position

        def turns_at(rotations: float) -> float:
            """The pair, as a fraction of dim, that turns `rotations` times over the original length."""
            return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = turns_at(self.beta_fast), turns_at(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        powers = self.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep, self._scale()

    def _scale(self) -> float:
        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            divisor = of(self.mscale_all_dim)
            return of(self.mscale) / divisor if divisor else math.inf
        return of(1.0)


class _LongRope(_Default):
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, one list for short contexts and one for long ones.

    `transformers` takes one or the other by each sequence's length. Here a cached key outlives that choice, so it is
    made once for the model: the long list where the model is meant for contexts beyond the original length.
    """

    short_factor: list[Positive]
    long_factor: list[Positive]
    factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None

    def frequencies(self, dim: int, max_position: int) -> tuple[Tensor, float]:
        length = self.original_max_position_embeddings or max_position
        name = "long_factor" if max_position > length else "short_factor"
        factors = torch.tensor(getattr(self, name), dtype=torch.float32)
        if len(factors) != dim // 2:
            raise CheckpointError(f"{name} has {len(factors)} numbers, expected {dim // 2}")
        powers = self.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        factor = self.factor or max_position / length
        scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 < length else 1.0
        return 1.0 / (factors * powers), self.attention_factor or scale


KINDS: dict[str, type[_Default]] = {
    "default": _Default, "dynamic": _Dynamic, "linear": _Linear, "llama3": _Llama3, "longrope": _LongRope,
    "yarn": _Yarn,
}  # fmt: skip


def read_rope(config: dict[str, Any], head_dim: int, max_position: int) -> RopeSpec:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` of older configs. Raises CheckpointError."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{key}: expected an object, not {given!r:.40}")
    outer = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    parameters = {name: value for name, value in {**outer, **given}.items() if value is not None}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{key}: rope_type {kind!r:.40} is not supported; supported: {', '.join(KINDS)}")
    rope = typed(parameters, KINDS[kind], key)
    if rope.partial_rotary_factor != 1:
        raise CheckpointError(f"partial_rotary_factor {rope.partial_rotary_factor} is not supported; supported: 1")
    try:
        inv_freq, scale = rope.frequencies(head_dim, max_position)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from None
    return RopeSpec(tuple(inv_freq.tolist()), "half", scale)
