"""Conversions that are not about refinement refine for a few steps only."""

from __future__ import annotations

from functools import partial

import pytest

from convert import compare, conversion
from convert.joint import JointOptions
from convert.refine import RefineOptions


@pytest.fixture(autouse=True)
def brief_refinement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition(".")[2] != "test_refine":
        for module in (compare, conversion):
            monkeypatch.setattr(module, "RefineOptions", partial(RefineOptions, passes=1, min_steps=10))
            monkeypatch.setattr(module, "JointOptions", partial(JointOptions, steps=10))
