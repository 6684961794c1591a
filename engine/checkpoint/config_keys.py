"""Keys of a Hugging Face config.json: those a reader knows, those that are harmless, and the rest, which are refused.

Invariant: what changes the mathematics does not pass unseen. A key that a reader does not know is refused unless it is
unset (null, false, 0 or empty), is among the HARMLESS, or starts with "_"; one known to be harmless can be deleted.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import msgspec

from engine.checkpoint.json_file import typed
from engine.errors import CheckpointError

T = TypeVar("T", bound=msgspec.Struct)

# Keys that say nothing about what the model computes: bookkeeping, training, and defaults of decoding.
_BOOKKEEPING = (
    "architectures attention_dropout attn_implementation base_model_name_or_path bos_token_id cache_implementation "
    "chunk_size_feed_forward classifier_dropout diversity_penalty do_sample dtype early_stopping eos_token_id "
    "id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length max_new_tokens "
    "max_sequence_length min_length model_max_length model_type name_or_path num_beam_groups num_beams num_labels "
    "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id pretraining_tp "
    "problem_type repetition_penalty return_dict return_dict_in_generate suppress_tokens task_specific_params "
    "temperature tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p "
    "unsloth_fixed unsloth_version use_cache"
)
HARMLESS = frozenset(_BOOKKEEPING.split())


def typed_config(raw: dict[str, Any], kind: type[T], harmless: AbstractSet[str] = frozenset()) -> T:
    """config.json as a `kind`, whose fields are the keys understood; `harmless`: more keys that change nothing.

    Raises CheckpointError, naming the key.
    """
    for key, value in raw.items():
        known = key in kind.__struct_fields__ or key in HARMLESS or key in harmless or key.startswith("_")
        if not known and value not in (None, False, 0, "", [], {}):
            if key == "quantization_config":
                raise CheckpointError(
                    f"{key} ({value!r:.60}): quantised weights of this model_type are not read; use the checkpoint "
                    "that they were made from"
                )
            raise CheckpointError(
                f"{key} ({value!r:.60}) is not understood; delete it from the file if what the model computes does not "
                "depend on it"
            )
    return typed({key: value for key, value in raw.items() if value is not None}, kind)
