"""The tokenizers the text tests run over: those of the shared models, and the shared ones of larger families."""

from __future__ import annotations

import gzip
import shutil
from functools import cache
from pathlib import Path

import pytest

from engine.tokenizer import Tokenizer
from tests.conftest import MODELS, shared

FAMILIES = ("deepseek-llm", "llama2", "llama3", "mistral-v3", "qwen2", "smollm2")
ALL = (*MODELS, *FAMILIES)


def unpack(name: str, into: Path) -> Path:
    """The folder of a tokenizer; the packed ones are unpacked once per test run."""
    if name in MODELS:
        return shared(f"models/{name}")
    source, folder = shared(f"tokenizers/{name}"), into / name
    if not folder.exists():
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix == ".gz":
                (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
            else:
                shutil.copyfile(file, folder / file.name)
    return folder


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def tokenizers_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=ALL)
def tokenizer_folder(request: pytest.FixtureRequest, tokenizers_root: Path) -> Path:
    return unpack(request.param, tokenizers_root)
