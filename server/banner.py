"""What the server prints when it is ready."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path
from typing import Any

from server.state import ServerState


def banner(state: ServerState, sock: socket.socket) -> str:
    """A few lines on what is served and how to try it; `sock` is the one listened on."""
    info = state.engine.info
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}"
    source = source_cache_bytes_per_token(Path(state.model_path))
    saved = (
        "" if source is None else f" (its source took {source}: {source / info.cache_bytes_per_token:.2f} times that)"
    )
    return "\n".join(
        [
            f"model    {state.model_path}: {info.num_layers} layers of {info.attention.upper()}, "
            f"{info.dtype} on {info.device}",
            f"limits   {info.max_len} tokens a sequence, {info.max_num_seqs} sequences at once",
            f"routes   {url}/v1/chat/completions /v1/completions /v1/models /health /metrics",
            f"try      {_curl(state, url)}",
            f"Serving {state.model_name} on {url}: {info.cache_tokens} tokens of cache, "
            f"{info.cache_bytes_per_token} bytes per token{saved}",
        ]
    )


def source_cache_bytes_per_token(model: Path) -> int | None:
    """What conversion.json says the model's source took, where it says so."""
    try:
        conversion: Any = json.loads((model / "conversion.json").read_text("utf-8"))
        value = conversion["source_cache_bytes_per_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and value > 0 else None


def _curl(state: ServerState, url: str) -> str:
    body: dict[str, Any] = {"model": state.model_name, "stream": True}
    route = "completions"
    if state.tokenizer.chat_template is None:
        body |= {"prompt": "Once upon a time", "max_tokens": 200}
    else:
        route = "chat/completions"
        body |= {"messages": [{"role": "user", "content": "Tell me a story about a little dog."}]}
    key = " -H 'Authorization: Bearer KEY'" if state.api_keys else ""
    data = shlex.quote(json.dumps(body))
    return f"curl -N {url}/v1/{route}{key} -H 'Content-Type: application/json' -d {data}"
