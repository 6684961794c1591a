"""Names of hub models, with a stand-in for the library that downloads."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from engine.hub import local_folder


def install(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/name") == Path("org/name")
    assert local_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "absent", "a/b/c", "../a/b"])
def test_paths_are_never_looked_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    assert local_folder(path) == Path(path)


def test_a_name_is_downloaded_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "org/some-model.v1"
        assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in allow_patterns)
        return str(tmp_path)

    install(monkeypatch, download)
    assert local_folder("org/some-model.v1") == tmp_path


def test_what_goes_wrong_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no network")

    install(monkeypatch, download)
    with pytest.raises(CheckpointError, match=r"org/name.*no network"):
        local_folder("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"mla-server\[hub\]"):
        local_folder("org/name")
