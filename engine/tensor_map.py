"""Tensors by name, each made when it is asked for: a layer of hundreds of experts is never whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor


class TensorMap(Mapping[str, Tensor]):
    """Keeps nothing: a tensor that is asked for twice is made twice."""

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the tensor
        return name in self._names


def under(tensors: Mapping[str, Tensor], prefix: str) -> TensorMap:
    """Those whose names begin with `prefix`, without it."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    return TensorMap(names, lambda name: tensors[prefix + name])
