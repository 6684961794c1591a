"""Reading and writing checkpoints: the only place that knows model families, tensor names and file formats."""

from engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.generation import GenerationDefaults
from engine.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "GenerationDefaults", "open_checkpoint"]
