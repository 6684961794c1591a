"""How many tokens the cache is to hold, where the user does not say."""

from __future__ import annotations

import os

import numpy as np
import torch

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.kernels.sample import SamplingTensors, sample
from engine.model.batch import Batch
from engine.model.transformer import Transformer

CPU_CACHE_BYTES = 2**30


def num_cache_blocks(model: Transformer, config: EngineConfig, max_model_len: int) -> int:
    """`cache_tokens` of the config; else what memory allows, and on a CPU no more than could ever be used.

    Raises CapacityError where not even one block fits.
    """
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // config.block_size)
    block_bytes = config.block_size * model.spec.cache_bytes_per_token(model.dtype.itemsize)
    if model.device.type == "cuda":
        available = _free_cuda_bytes(model, config, max_model_len)
        advice = f"raise memory_fraction (now {config.memory_fraction}) or lower max_batched_tokens"
        return _at_least_one(available // block_bytes, available, block_bytes, advice)
    available = min(CPU_CACHE_BYTES, _free_host_bytes() // 4)
    blocks = _at_least_one(available // block_bytes, available, block_bytes, "lower block_size or set cache_tokens")
    return min(blocks, config.max_num_seqs * -(-max_model_len // config.block_size))


def _at_least_one(blocks: int, available: int, block_bytes: int, advice: str) -> int:
    if blocks < 1:
        raise CapacityError(
            f"{max(available, 0) / 2**20:.0f} MiB are left for the cache, but one block takes "
            f"{block_bytes / 2**20:.1f} MiB; {advice}"
        )
    return blocks


def _free_host_bytes() -> int:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@torch.inference_mode()
def _free_cuda_bytes(model: Transformer, config: EngineConfig, max_model_len: int) -> int:
    """Memory left for the cache once weights and the largest step have theirs; the step is run, and its peak measured.

    Not yet run on a GPU.
    """
    device = model.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _largest_step(model, config, max_model_len)
    torch.cuda.synchronize(device)
    work = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - total * (1 - config.memory_fraction)) - work


def _largest_step(model: Transformer, config: EngineConfig, max_model_len: int) -> None:
    """A whole budget of tokens at the end of contexts as long as may be, and a token drawn for every sequence.

    Every block table entry is block 0 of a one-block cache: what is computed does not matter, only how much.
    """
    num_seqs = -(-config.max_batched_tokens // max_model_len)
    count = -(-config.max_batched_tokens // num_seqs)
    tables = np.zeros((num_seqs, -(-max_model_len // config.block_size)), np.int32)
    computed, counts = [max_model_len - count] * num_seqs, [count] * num_seqs
    batch = Batch.build(computed, counts, tables, config.block_size, model.device)
    token_ids = torch.zeros(num_seqs * count, dtype=torch.int64, device=model.device)
    hidden = model.forward(token_ids, batch, model.new_cache(1, config.block_size))
    n = config.max_num_seqs
    logits = model.logits(hidden[:1].expand(n, -1))
    sample(logits, SamplingTensors.build([1.0] * n, [50] * n, [0.9] * n, [0.1] * n, [0] * n, [0] * n, model.device))
