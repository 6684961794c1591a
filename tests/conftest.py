"""Where the real checkpoints and texts are, for the tests that want them; and how Triton runs in tests.

Without a GPU its kernels run in Triton's interpreter, which must be chosen before anything imports triton. Every test
process, and what it starts, computes with one thread, chosen before anything imports torch: the models are tiny, and
several processes run side by side, where threads that share a core wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = ("stories260K", "TinyStories-656K", "tinystories-gqa64")


def shared(relative: str) -> Path:
    """A file or folder under ../shared; skips the test, saying so, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}")
    return path


@pytest.fixture(params=MODELS)
def shared_model(request: pytest.FixtureRequest) -> Path:
    """Each of the real checkpoints in turn."""
    return shared(f"models/{request.param}")
