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
    growth = source_cache_ratio(Path(state.model_path))
    saved = ""
    if growth is not None:
        saved = f" (its source took {round(info.cache_bytes_per_token * growth)}: {growth:.2f} times that)"
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


def source_cache_ratio(model: Path) -> float | None:
    """How many times the model's cache its source's was, where conversion.json says so.

    A ratio, as the bytes there are those of the stored dtype, which need not be the one served.
    """
    try:
        conversion: Any = json.loads((model / "conversion.json").read_text("utf-8"))
        return float(conversion["source_cache_bytes_per_token"] / conversion["cache_bytes_per_token"])
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError):
        return None


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
