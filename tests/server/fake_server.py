"""The real HTTP server over the fake engine."""

from __future__ import annotations

import sys

from server.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], [sys.executable, "-m", "tests.server.fake_engine"]))
