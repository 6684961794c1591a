"""From a checkpoint on disk to a Transformer on a device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.fp8 import scale_name
from engine.checkpoint.layout import layer_tensors
from engine.errors import CapacityError, CheckpointError, EngineError
from engine.model.fp8_weights import capability, staying_fp8
from engine.model.transformer import Transformer
from engine.tensor_map import TensorMap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTER = "mlp.gate."  # of a mixture of experts: computes in fp32, whatever the model's dtype


def load_model(
    model: Checkpoint | str | Path,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    progress: bool = False,
) -> Transformer:
    """Load a model, one tensor at a time where the device is a GPU: nothing is on it twice, and little on the host.

    FP8 weights stay FP8 where `staying_fp8` says so, whatever the dtype, and are multiplied out elsewhere.
    `device` None: cuda where there is one. `dtype` "auto": float32 on a CPU, the checkpoint's own on a GPU. Raises
    CheckpointError for a bad checkpoint or for weights beyond the dtype's range, CapacityError where the device is too
    small, EngineError for a device or dtype that does not exist.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    target = resolve_device(device)
    kind = resolve_dtype(dtype, checkpoint.spec.dtype, target)

    def placed(tensors: Mapping[str, Tensor], where: str, unrounded: Collection[str] = ()) -> Mapping[str, Tensor]:
        def make(name: str) -> Tensor:
            if name in unrounded:
                return tensors[name].to(target)
            dtype = torch.float32 if name.startswith(ROUTER) else kind
            return _cast(tensors[name], target, dtype, f"{checkpoint.path}: {where}{name}")

        return TensorMap(tensors, make)

    def layers() -> Iterator[Mapping[str, Tensor]]:
        for i in tqdm(range(len(checkpoint.spec.layers)), "loading", unit="layer", disable=not progress):
            shapes = layer_tensors(checkpoint.spec.layers[i], checkpoint.spec.hidden_size)
            fp8 = staying_fp8(checkpoint.fp8_weights(i), shapes, checkpoint.fp8_block, capability(target))
            yield placed(checkpoint.layer(i, fp8), f"layer {i}: ", fp8 | {scale_name(name) for name in fp8})

    try:
        return Transformer(checkpoint.spec, dict(placed(checkpoint.outer(), "")), layers())
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"the weights of {checkpoint.path} do not fit on {target} in {dtype_name(kind)}; use a smaller dtype"
        ) from None


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device meant; None: cuda where there is one. Raises EngineError where it does not exist."""
    available = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if available else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise EngineError(f"device {device!r} is not known; use cpu or cuda") from None
    if target.type not in ("cpu", "cuda"):
        raise EngineError(f"device {target.type} is not supported; use cpu or cuda")
    if target.type == "cuda" and (not available or (target.index or 0) >= torch.cuda.device_count()):
        raise EngineError(f"device {target} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return target


def resolve_dtype(dtype: str, stored: str, device: torch.device) -> torch.dtype:
    """The dtype meant; "auto": float32 on a CPU, `stored` on a GPU. Raises EngineError where it is not known."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else stored
    if dtype not in DTYPES:
        raise EngineError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(tensor: Tensor, device: torch.device, dtype: torch.dtype, where: str) -> Tensor:
    moved = tensor.to(device, dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.isfinite(moved).all():
        raise CheckpointError(f"{where}: has weights beyond float16's range; use bfloat16 or float32")
    return moved
