"""Conversions that are killed again and again until one comes to its end. A process of its own, for `test_resume`.

    python -m tests.convert.killed_runs (writes|moments) SEED OUT ARGUMENT...

Children are forked before this process has computed anything, so that each starts at once. Prints what it did, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from convert import conversion
from convert.cli import main
from convert.refine import RefineOptions

conversion.RefineOptions = partial(RefineOptions, passes=1, min_steps=10)  # type: ignore[misc]  # as conftest.py has it
KILLED = -signal.SIGKILL
LONGEST = 60.0  # seconds


def attempt(arguments: list[str], writes: int | None = None, seconds: float = LONGEST) -> int:
    """Convert in a child; -> its exit code. Killed before the file after `writes` appears, or after `seconds`."""
    child = os.fork()
    if not child:
        if writes is not None:
            die_after(writes)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after(writes: int) -> None:
    """SIGKILL in place of the next rename but `writes`: every file and the output folder appear by one."""
    rename = Path.rename
    left = writes

    def counted(path: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return rename(path, target)

    Path.rename = counted  # type: ignore[method-assign, assignment]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run(how: str, seed: int, out: Path, arguments: list[str]) -> dict[str, object]:
    """-> the last exit code, and what stood in the output's folder after each attempt."""
    rng, states, writes = random.Random(seed), [files(out.parent)], 1
    began = time.monotonic()
    if how == "moments":
        assert attempt([*arguments, "--out", str(out.with_name("measured"))]) == 0
        shutil.rmtree(out.with_name("measured"))
    whole = time.monotonic() - began
    code = KILLED
    while code == KILLED and len(states) < 100:
        if how == "writes":
            code = attempt([*arguments, "--out", str(out)], writes=writes)
        else:
            code = attempt([*arguments, "--out", str(out)], seconds=rng.uniform(0, whole))
        further = len(files(out.parent)) > max(map(len, states))
        writes = 1 if further else writes + 1  # the last steps are taken in one go or not at all
        states.append(files(out.parent))
    return {"code": code, "states": states}


if __name__ == "__main__":
    how, seed, out, *rest = sys.argv[1:]
    print(json.dumps(run(how, int(seed), Path(out), rest)))
