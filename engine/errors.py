"""Every error the engine raises on account of its input. The message names the thing and says what to do."""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors that are the input's fault, not the program's. Commands print the message and exit with 2."""


class CheckpointError(EngineError):
    """A checkpoint folder cannot be used: a file, a tensor or a config key, always named, is missing or wrong."""


class OutputError(CheckpointError):
    """A checkpoint cannot be written: a disk is full, or a folder cannot be written to. The input is not at fault."""


class RequestError(EngineError):
    """A request cannot be served as asked; `param` is the offending field, or None."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(EngineError):
    """The machine has too little memory for what was configured; the message says which setting to lower."""
