"""Starting real server processes on loopback ports, for tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import shared

ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}Once upon{% endif %}"
)


def chat_model(folder: Path) -> Path:
    """stories260K with a chat template."""
    source = shared("models/stories260K")
    if not folder.exists():
        folder.mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, folder / file.name)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


class Server:
    """A running server process, and plain requests to it."""

    def __init__(self, process: subprocess.Popen[str], url: str, banner: list[str]) -> None:
        self.process, self.url, self.banner = process, url, banner

    def get(self, path: str) -> tuple[int, str]:
        return self.request("GET", path)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self.request("POST", path, data, headers)
        return status, json.loads(text)

    def request(
        self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def engine_pid(self) -> int:
        """The server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def wait_idle(self, seconds: float = 5) -> None:
        """Until the engine has nothing to do and every block is free; fails where that does not come."""
        deadline = time.monotonic() + seconds
        while True:
            busy = self.metric("mla_requests_running") + self.metric("mla_requests_waiting")
            total, free = self.metric("mla_cache_blocks"), self.metric("mla_cache_blocks_free")
            if busy == 0 and total == free > 0:
                return
            assert time.monotonic() < deadline, f"{busy} requests busy, {free} of {total} blocks free"
            time.sleep(0.05)

    def end(self, signum: int = signal.SIGTERM, seconds: float = 10) -> tuple[int, str]:
        """Exit status and what is left of stderr."""
        self.process.send_signal(signum)
        return self.wait(seconds)

    def wait(self, seconds: float = 10) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


def launch(*options: str, fake: bool = True, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    module = "tests.server.fake_server" if fake else "server"
    return subprocess.Popen(
        [sys.executable, "-m", module, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


@contextmanager
def serving(*options: str, fake: bool = True, env: dict[str, str] | None = None) -> Iterator[Server]:
    process = launch(*options, "--port", "0", fake=fake, env=env)
    try:
        banner: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            banner.append(line.rstrip())
            if found := re.match(r"Serving \S+ on (http://\S+):", line):
                yield Server(process, found[1], banner)
                break
        else:
            raise AssertionError(f"the server did not start: {process.communicate()[1]}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
