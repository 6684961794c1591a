"""What can be wrong with a request to convert or to evaluate."""

from __future__ import annotations

from engine.errors import EngineError


class ConversionError(EngineError):
    """A model cannot be converted or evaluated as asked; the message says which option or file to change."""
