"""Conversion methods, one file each: pure functions from one GQA layer to one MLA layer.

A method has two halves. `collect` learns what it needs of a source layer from the calibration text. `convert` reads a
GQASpec, that layer's attention tensors (named as in the checkpoint, without `model.layers.<i>.self_attn.`) and what was
learnt, and gives an MLASpec and MLA tensors under DeepSeek's names, in float64 or in the source's dtype. Neither
reads a file or knows another layer. What a budget shared among all layers is shared out by, a LayerSurvey finds first.
What the layer is to a method, and how what it gives becomes the layer that is written, is in `convert/linear_view.py`:
queries and keys that are normalised, windows, caps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from engine.spec import GQASpec, MLASpec

Learnt = TypeVar("Learnt")
Found = TypeVar("Found")
ConvertedLayer = tuple[MLASpec, dict[str, Tensor]]


@dataclass(frozen=True)
class LayerMethod(Generic[Learnt]):
    """A method with its options for one layer bound."""

    # Of the layer's spec and tensors, and what its projections see: normed [windows, length, hidden], part by part.
    # Candidates that share it share its result.
    collect: Callable[[GQASpec, Mapping[str, Tensor], Iterable[Tensor]], Learnt]
    convert: Callable[[GQASpec, Mapping[str, Tensor], Learnt], ConvertedLayer]
    fits_output: bool = False  # last of all, o_proj is fitted to the layer's outputs (convert/output_fit.py)


@dataclass(frozen=True)
class LayerSurvey(Generic[Learnt, Found]):
    """What a method wants to know of a layer before any is converted; Found is held for all layers, so it is small."""

    collect: Callable[[GQASpec, Mapping[str, Tensor], Iterable[Tensor]], Learnt]  # as LayerMethod's
    find: Callable[[GQASpec, Mapping[str, Tensor], Learnt], Found]


def learn_nothing(_spec: GQASpec, _tensors: Mapping[str, Tensor], _inputs: Iterable[Tensor]) -> None:
    """`collect` of a method that needs no statistics."""
