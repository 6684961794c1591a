"""Tokenizer: text to token ids and back, as `transformers`' AutoTokenizer does it for the same folder.

Special tokens spelled out in a text ("<|im_start|>") become those tokens, here as there; whoever puts untrusted text
into a prompt decides whether that is wanted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate
from engine.errors import CheckpointError, RequestError
from engine.token_pieces import Piece, PieceDecoder, parse_decoder

CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "chat_template.jinja")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Families whose `LlamaTokenizer` AutoTokenizer does not rebuild, but reads from tokenizer.json as it stands.
_AS_WRITTEN = frozenset({"mistral", "mixtral", "minicpm3", "qwen2", "glm4_moe_lite"})


class Tokenizer:
    """Immutable and safe to share between threads. Made by from_folder."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: PieceDecoder,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self.pieces = pieces
        self.special_tokens = dict(special_tokens)  # "bos_token" -> "<s>", ...
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)  # ids are below it
        self.max_token_chars = max(map(len, vocab), default=0)  # so many tokens cannot spell a longer text
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self._piece_of: dict[int, Piece] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where they exist, tokenizer_config.json and chat_template.jinja.

        Raises CheckpointError, naming the file.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = _read_json(folder / CONFIG) or {}
        special_tokens = _special_tokens(folder, config)
        source = folder / "tokenizer.json"
        definition = _read_json(source)
        if definition is None:
            raise CheckpointError(
                f"{source}: missing. A folder with tokenizer.model alone gets one from "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        _rebuild_llama(definition, config, _model_type(folder))
        pieces = parse_decoder(definition.get("decoder"), str(source))
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
            backend.no_truncation()
            backend.no_padding()
            _add_tokens(backend, config, special_tokens)
        except Exception as error:  # the library raises plain Exception for whatever it does not like
            raise CheckpointError(f"{source}: not a usable tokenizer: {error}") from None
        return cls(backend, pieces, special_tokens, _read_chat_template(folder, config, special_tokens))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` adds what the tokenizer adds to a fresh text (BOS, mostly), not a BOS more.

        Releases the GIL while it works.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("the text holds half a surrogate pair, which is no character") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a chat, with its special tokens written out: encode it with add_special_tokens=False.

        `variables`: what the template may ask for besides (enable_thinking, ...); see ChatTemplate.render.
        Raises RequestError where the checkpoint has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "use plain completions"
            )
        return self.chat_template.render(messages, add_generation_prompt, variables)

    def piece(self, token_id: int) -> Piece:
        """What the token adds to a text (see token_pieces); nothing for an id that is not in the vocabulary."""
        piece = self._piece_of.get(token_id)
        if piece is None:
            entry = self._backend.id_to_token(token_id)
            piece = self._piece_of[token_id] = "" if entry is None else self.pieces.piece(entry)
        return piece

    def first_piece(self, token_id: int) -> Piece:
        """The same, of the first token of a text."""
        entry = self._backend.id_to_token(token_id)
        return "" if entry is None else self.pieces.piece(entry, first=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, which need not be whole characters."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def _special_id(self, name: str) -> int | None:
        return self._backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy a folder's tokenizer and chat template, such that they read the same beside another config.json.

    Raises CheckpointError, OSError.
    """
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    if _model_type(source) in _AS_WRITTEN and (config := _read_json(source / CONFIG)) is not None:
        pinned = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}  # which is read as written, in any family
        (out / CONFIG).write_text(json.dumps(pinned, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _model_type(folder: Path) -> object:
    return (_read_json(folder / "config.json") or {}).get("model_type")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return value


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Names to tokens. special_tokens_map.json counts only beside a config that predates added_tokens_decoder."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named |= _read_json(folder / "special_tokens_map.json") or {}
    tokens = {name: _content(named.get(name)) for name in SPECIAL_NAMES}
    return {name: token for name, token in tokens.items() if token is not None}


def _content(token: object) -> str | None:
    """A token is written as its text or as {"content": its text, ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _rebuild_llama(definition: dict[str, Any], config: dict[str, Any], model_type: object) -> None:
    """Change `definition` as AutoTokenizer does for a `LlamaTokenizer` that is not byte-level.

    transformers 5 takes vocabulary, merges and post-processor from tokenizer.json but makes the rest itself: a
    Metaspace pre-tokenizer where old files have a Prepend normalizer, which differ after special tokens and spaces.
    """
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer" or model_type in _AS_WRITTEN:
        return
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or '"ByteLevel"' in json.dumps(
        [definition.get("pre_tokenizer"), definition.get("decoder")]
    ):
        return
    prefix = config.get("add_prefix_space") is not False
    scheme = ("first" if not config.get("legacy", False) else "always") if prefix else "never"
    definition["normalizer"] = None
    definition["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    definition["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
        ],
    }
    model |= {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None, "ignore_merges": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            special = bool(token.get("special"))
            options = {
                key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token
            }
            backend.add_tokens([tokenizers.AddedToken(token["content"], special=special, **options)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in [*special_tokens.values(), *names]
            if token is not None and token not in known
        ]
    )


def _read_chat_template(folder: Path, config: dict[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, or tokenizer_config.json's chat_template: a string, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text("utf-8"), special_tokens, str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: not readable: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        return None
    origin = str(folder / CONFIG)
    if not isinstance(template, str):
        raise CheckpointError(f"{origin}: chat_template must be a string")
    return ChatTemplate(template, special_tokens, origin)
