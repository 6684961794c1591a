"""One server over the real engine for the tests of the protocol; others start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.running import Server, chat_model, serving


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "stories")


@pytest.fixture(scope="session")
def server(chat_folder: Path) -> Iterator[Server]:
    """The real thing, its cache so small that thirty requests preempt each other."""
    options = ("--model", str(chat_folder), "--block-size", "16", "--cache-tokens", "2048", "--max-num-seqs", "32")
    with serving(*options, fake=False) as running:
        yield running
