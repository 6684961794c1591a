"""`python -m bench`: what MLA buys, in time and in memory."""

from __future__ import annotations

import argparse
import sys

from bench import compare
from engine.errors import EngineError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "compare", help="a converted model against its source, on the same engine", description=compare.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare.add_arguments(command)
    command.set_defaults(run=compare.main)
    args = parser.parse_args()
    try:
        args.run(args)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
