"""What a model takes on a device and so how many conversations fit beside it; what a process takes."""

from __future__ import annotations

import ctypes
import math
import resource
import sys

from engine.checkpoint.layout import expected_tensors
from engine.model.load import DTYPES
from engine.spec import ModelSpec


def weight_bytes(spec: ModelSpec) -> int:
    """Of the weights as stored."""
    return DTYPES[spec.dtype].itemsize * sum(math.prod(shape) for shape in expected_tensors(spec).values())


def peak_memory() -> int:
    """The most bytes of host memory that this process has taken so far, mapped files included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """To the system, what was freed: before a step that takes much.

    glibc keeps it, and what next comes in other sizes does not fit into the gaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def conversations_that_fit(memory: int, weights: int, cache_bytes_per_token: int, tokens: int) -> int:
    """Conversations of `tokens` tokens whose cache fits in `memory` bytes beside the weights."""
    return max(0, memory - weights) // (tokens * cache_bytes_per_token)
