"""`python -m bench`: what MLA buys, in time and in memory."""

from __future__ import annotations

import argparse
import sys

from bench import compare, serve
from engine.errors import EngineError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, summary in (
        ("compare", compare, "a converted model against its source, on the same engine"),
        ("serve", serve, "load on any OpenAI-compatible server"),
    ):
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args()
    try:
        args.run(args)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
