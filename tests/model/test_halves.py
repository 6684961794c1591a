"""The two halves of a layer: each reads its own tensors, and one after the other they are the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.model.batch import Batch
from engine.model.rotary import Rotary
from engine.model.transformer import AttentionHalf, Layer, MLPHalf, rope_key
from engine.tensor_map import TensorMap
from tests.convert.sources import make_source


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # norms before, and after as well
@torch.inference_mode()
def test_halves(tmp_path: Path, family: str) -> None:
    source = open_checkpoint(make_source(tmp_path, family=family))
    spec, tensors = source.spec.layers[0], source.layer(0)
    read: list[str] = []

    def make(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    first = AttentionHalf(spec, source.spec, TensorMap(tensors, make))
    of_first = set(read)
    read.clear()
    second = MLPHalf(spec, source.spec, TensorMap(tensors, make))
    assert of_first.isdisjoint(read)
    assert of_first | set(read) == set(tensors)

    batch = Batch.dense(2, 5, 16)
    cache = torch.zeros(2, 16, spec.attention.cache_width)
    table = Rotary([rope_key(spec.attention)], batch.positions.device).tables(batch.positions)[0]
    x = torch.randn(10, source.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = Layer(spec, source.spec, tensors)(x, batch, cache, table)
    x = x + first.added(first.attention(first.normed(x), batch, cache, table))
    x = x + second.added(second.mlp(second.normed(x)))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
