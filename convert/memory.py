"""What a model takes on a device, and so how many conversations fit beside it."""

from __future__ import annotations

import math

from engine.checkpoint.layout import expected_tensors
from engine.model.load import DTYPES
from engine.spec import ModelSpec


def weight_bytes(spec: ModelSpec) -> int:
    """Of the weights as stored."""
    return DTYPES[spec.dtype].itemsize * sum(math.prod(shape) for shape in expected_tensors(spec).values())


def conversations_that_fit(memory: int, weights: int, cache_bytes_per_token: int, tokens: int) -> int:
    """Conversations of `tokens` tokens whose cache fits in `memory` bytes beside the weights."""
    return max(0, memory - weights) // (tokens * cache_bytes_per_token)
