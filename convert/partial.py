"""What a command has finished, kept beside its output so that the same command goes on after a kill at any point.

Invariant: every file in the folder is whole; the folder belongs to one request, and to one process at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convert.errors import ConversionError
from engine.checkpoint.shards import output_errors, write_json
from engine.checkpoint.writer import PLACING, restore
from engine.errors import EngineError, OutputError

LOCK, REQUEST = "lock", "request.json"
EXPORT = "export"  # kept under this name once the output is in its place and an export of it begins


def partial_folder(out: Path) -> Path:
    """Where what is not finished of `out` is kept."""
    out = out.resolve()
    return out.with_name(f".{out.name}.partial")


def is_placed(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether an earlier process put the result of this very request at `out`, and was killed before it cleaned up."""
    folder = partial_folder(out)
    placing = _read(folder / PLACING)
    if placing is None or _read(folder / REQUEST) != request:
        return False
    return not (folder / placing["folder"]).exists() and (out / "config.json").exists()


def folder_state(folder: Path) -> list[list[int]]:
    """Sizes and times of its files: what has changed has another."""
    files = [path.stat() for path in sorted(folder.iterdir()) if path.is_file()]
    return [[file.st_size, file.st_mtime_ns] for file in files]


def versions() -> dict[str, str]:
    """Of what the result depends on: another may compute otherwise."""
    try:
        own = version("mla-server")
    except PackageNotFoundError:  # run from a source tree
        own = "uninstalled"
    return {"torch": str(torch.__version__), "mla-server": own}


class PartialWork:
    """Results by name, as JSON, in a folder that others may write to as well (`folder`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Any:  # noqa: ANN401 (JSON)
        """What was kept under this name, or None."""
        return _read(self.folder / f"{name}.json")

    def keep(self, name: str, value: object) -> None:
        """Raises OutputError."""
        with output_errors(self.folder):
            write_json(self.folder / f"{name}.json", value)


@contextmanager
def partial_work(out: Path, request: Mapping[str, Any], costly: str | None) -> Iterator[tuple[PartialWork, list[str]]]:
    """-> the work of this request so far, and which parts of `request` differ from that of work that was thrown away.

    The folder goes when the body succeeds or fails on account of its input, which it would again. It stays when the
    body is interrupted or the disk is full, provided that it holds a result named `costly` (None: there is none that is
    worth it). Raises ConversionError where another process is at work on the same output.
    """
    folder = partial_folder(out)
    with output_errors(out):
        lock = _locked(folder, out)
    try:
        with output_errors(out):
            differing = _claim(folder, out.resolve(), request)
        yield PartialWork(folder), differing
    except BaseException as error:
        restore(out.resolve(), folder)  # an earlier output does not go with the folder
        wrong_input = isinstance(error, EngineError) and not isinstance(error, OutputError)
        if wrong_input or costly is None or not (folder / f"{costly}.json").exists():
            _remove(folder)
        else:
            say(f"not finished: the same command continues, from what is in {folder}")
        raise
    else:
        _remove(folder)
    finally:
        os.close(lock)


def _locked(folder: Path, out: Path) -> int:
    """-> the handle whose closing, or whose process's end however it comes, gives the folder free."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had it may have removed the folder since it was opened.
            if (folder / LOCK).exists() and os.fstat(handle).st_ino == (folder / LOCK).stat().st_ino:
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConversionError(f"{out}: another process is writing to it; wait for it or stop it") from None
            raise
        os.close(handle)


def _claim(folder: Path, out: Path, request: Mapping[str, Any]) -> list[str]:
    """Empty the folder unless it is of this request; -> what differs, where that threw work away."""
    found = _read(folder / REQUEST)
    restore(out, folder)
    if found == request:
        return []
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(folder / REQUEST, request)
    return [] if found is None else [key for key in request if found.get(key) != request[key]]


def _remove(folder: Path) -> None:
    """What a later process goes by is the last to go."""
    last = [f"{EXPORT}.json", PLACING, REQUEST, LOCK]
    for path in sorted(folder.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):  # another process has begun to use it
        folder.rmdir()


def _read(path: Path) -> Any:  # noqa: ANN401 (JSON)
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}; remove {path.parent} to start over") from None


def say(message: str) -> None:
    """On stderr, above a progress bar that may be there."""
    tqdm.write(message, file=sys.stderr)
