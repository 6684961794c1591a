"""The source model in `transformers`: the baseline most people have, and an implementation nobody here wrote."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from bench.workload import Timing


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


class TransformersBaseline:
    """`generate` of a Hugging Face folder, greedy, with its default cache."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self._model.generation_config.eos_token_id = None
        self._device = device

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Exactly `output` greedy tokens for prompts of one length."""
        ids = torch.tensor(prompts, device=self._device)
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, **options
        )
        return out[:, ids.shape[1] :].tolist()

    def time(self, prompts: list[list[int]], output: int) -> Timing:
        start = time.perf_counter()
        self.generate(prompts, 1)
        ttft = time.perf_counter() - start
        start = time.perf_counter()
        self.generate(prompts, output)
        total = time.perf_counter() - start
        return Timing(ttft, (total - ttft) / (output - 1), len(prompts) * output / total)
