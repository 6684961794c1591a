"""`python -m server --model DIR`: serve a checkpoint over an OpenAI-compatible HTTP API."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.hub import local_folder
from server.engine_client import ENGINE_COMMAND
from server.lifecycle import ServerConfig, run


def main(argv: Sequence[str] | None = None, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        engine = _engine_config(options)
        model = str(local_folder(options.model))
    except EngineError as error:
        parser.error(str(error))
    keys = tuple(options.api_key or filter(None, [os.environ.get("MLA_API_KEY")]))
    config = ServerConfig(
        model=model,
        model_name=options.served_model_name or Path(options.model).resolve().name,
        host=options.host,
        port=options.port,
        api_keys=keys,
        max_waiting=options.max_waiting,
        shutdown_timeout=options.shutdown_timeout,
        engine=engine,
        threads=options.threads,
    )
    return run(config, engine_command)


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        device=options.device,
        dtype=options.dtype,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        max_batched_tokens=options.max_batched_tokens,
        block_size=options.block_size,
        cache_tokens=options.cache_tokens,
        memory_fraction=options.memory_fraction,
        prefix_cache=options.prefix_cache,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a checkpoint over an OpenAI-compatible HTTP API. Any OpenAI client works: give it "
        "http://HOST:PORT/v1 as its base URL, and any key.",
        epilog="Stop it with Ctrl-C or SIGTERM: running requests finish, new ones get 503; a second ends at once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder, what convert wrote, or org/name on the hub",
    )
    web = parser.add_argument_group("HTTP")
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network interface")
    web.add_argument("--port", type=_at_least(0), default=8000, help="0 takes a free one and prints it")
    web.add_argument("--api-key", action="append", metavar="KEY", help="a key clients must send; repeatable. Better: "
                     "the environment variable MLA_API_KEY, which no list of processes shows")  # fmt: skip
    web.add_argument("--served-model-name", metavar="NAME", help="what clients call the model; else the folder's name")
    web.add_argument("--max-waiting", type=_at_least(0), default=1024, metavar="N",
                     help="sequences that may wait beside those that run; more get status 429")  # fmt: skip
    web.add_argument("--shutdown-timeout", type=float, default=60.0, metavar="SECONDS",
                     help="how long running requests may take to finish when the server is told to stop")  # fmt: skip
    _add_engine_options(parser.add_argument_group("engine"))
    return parser


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    default = EngineConfig()
    positive = _at_least(1)
    group.add_argument(
        "--device", choices=["cuda", "cpu"], help="where the model runs; else the GPU where there is one"
    )
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default=default.dtype,
                       help="of weights and cache; auto: float32 on a CPU, the checkpoint's own on a GPU")  # fmt: skip
    group.add_argument("--threads", type=positive, metavar="N",
                       help="CPU threads, where there is no GPU; else one less than there are cores: threads that "
                            "share a core wait for each other at every operation")  # fmt: skip
    group.add_argument("--max-num-seqs", type=positive, default=default.max_num_seqs, metavar="N",
                       help="sequences computed at once; more raise throughput and the time per token")  # fmt: skip
    group.add_argument("--max-model-len", type=positive, metavar="N",
                       help="tokens of one sequence, prompt and answer; else the model's own limit")  # fmt: skip
    group.add_argument("--max-batched-tokens", type=positive, default=default.max_batched_tokens, metavar="N",
                       help="tokens computed in one step; long prompts are cut into steps of it, so that less keeps "
                            "the others' tokens coming evenly, and more answers the prompt sooner")  # fmt: skip
    group.add_argument("--cache-tokens", type=positive, metavar="N",
                       help="tokens the cache holds over all sequences; else what memory allows")  # fmt: skip
    group.add_argument("--block-size", type=positive, default=default.block_size, metavar="N",
                       help="tokens in a cache block; prefixes are shared in whole blocks")  # fmt: skip
    group.add_argument("--memory-fraction", type=float, default=default.memory_fraction, metavar="F",
                       help="of the GPU's memory, for weights, cache and work space together")  # fmt: skip
    group.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, default=default.prefix_cache,
                       help="keep finished prompts' cache, so that prompts that begin alike skip ahead")  # fmt: skip


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "integer"  # what argparse calls it when the text is none
    return parse


if __name__ == "__main__":
    sys.exit(main())
