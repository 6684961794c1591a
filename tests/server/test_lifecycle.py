"""How the server starts, drains, dies and fails, with the fake engine in place of a model."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.server.fake_engine import BROKEN_TOKEN, CRASH_TOKEN
from tests.server.running import ROOT, Server, launch, serving

SLOW = {"FAKE_STEP_SECONDS": "0.03"}


def gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended, and its new parent has not looked yet
            return True
        time.sleep(0.02)
    return False


def streamed(server: Server, tokens: int, **more) -> str:
    body = json.dumps({"prompt": "a", "max_tokens": tokens, "stream": True, **more}).encode()
    return server.request("POST", "/v1/completions", body)[1]


def wait_running(server: Server, count: int) -> None:
    deadline = time.monotonic() + 5
    while server.metric("mla_requests_running") != count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_cut_off(stream: str) -> None:
    *_, failure, done = stream.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "shutting_down"


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_refuses_new_ones(chat_folder, threads, signum: int):
    with serving("--model", str(chat_folder), env=SLOW) as server:
        engine = server.engine_pid()
        stream = threads.submit(streamed, server, 40)
        whole = threads.submit(server.post, "/v1/completions", {"prompt": "b", "max_tokens": 40})
        wait_running(server, 2)
        server.process.send_signal(signum)
        time.sleep(0.2)
        status, body = server.post("/v1/completions", {"prompt": "c"})
        assert (status, body["error"]["type"]) == (503, "service_unavailable_error")
        assert server.get("/health")[0] == 503
        assert stream.result().endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in stream.result()
        assert whole.result()[1]["usage"]["completion_tokens"] == 40
        assert server.wait()[0] == 0
        assert gone(engine)


def test_a_second_signal_ends_at_once(chat_folder, threads):
    with serving("--model", str(chat_folder), env=SLOW) as server:
        engine = server.engine_pid()
        stream = threads.submit(streamed, server, 500)
        wait_running(server, 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        start = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - start < 3
        assert_cut_off(stream.result())
        assert gone(engine)


def test_the_shutdown_timeout_ends_what_takes_longer(chat_folder, threads):
    with serving("--model", str(chat_folder), "--shutdown-timeout", "0.3", env=SLOW) as server:
        stream = threads.submit(streamed, server, 500)
        wait_running(server, 1)
        start = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - start < 3
        assert_cut_off(stream.result())


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_an_engine_that_dies_is_told_of_and_ends_the_server(chat_folder, threads, how: str):
    with serving("--model", str(chat_folder), env=SLOW) as server:
        stream = threads.submit(streamed, server, 500)
        whole = threads.submit(server.post, "/v1/completions", {"prompt": "b", "max_tokens": 500})
        wait_running(server, 2)
        if how == "killed":
            os.kill(server.engine_pid(), signal.SIGKILL)
        else:
            body = json.dumps({"prompt": [CRASH_TOKEN], "max_tokens": 5}).encode()
            assert server.request("POST", "/v1/completions", body)[0] == 503
        status, body = whole.result()
        assert (status, body["error"]["code"]) == (503, "engine_gone")
        assert server.get("/health")[0] == 503
        *_, failure, done = stream.result().strip().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "engine_gone"
        code, errors = server.wait()
        assert code == 1
        assert "the engine is gone" in errors


def test_a_request_the_engine_gives_up_is_told_why(chat_folder):
    with serving("--model", str(chat_folder)) as server:
        status, body = server.post("/v1/completions", {"prompt": [BROKEN_TOKEN], "max_tokens": 5})
        assert (status, body["error"]["message"]) == (500, "the logits are not finite")
        *_, failure, done = streamed(server, 5, prompt=[BROKEN_TOKEN]).strip().split("\n\n")
        assert (json.loads(failure.removeprefix("data: "))["error"]["type"], done) == ("server_error", "data: [DONE]")
        assert server.post("/v1/completions", {"prompt": [5], "max_tokens": 5})[0] == 200


def test_the_engine_does_not_outlive_a_killed_server(chat_folder):
    with serving("--model", str(chat_folder)) as server:
        engine = server.engine_pid()
        server.process.kill()
        assert gone(engine)


def engine_of(process: subprocess.Popen[str]) -> int:
    """The engine's process id, once the server has started it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not children.read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(children.read_text().split()[0])


def test_not_even_while_it_loads(chat_folder):
    process = launch("--model", str(chat_folder), "--port", "0", "--cache-tokens", "3")
    try:
        engine = engine_of(process)
        time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    assert gone(engine)


def test_a_signal_while_loading(chat_folder):
    process = launch("--model", str(chat_folder), "--port", "0", "--cache-tokens", "3")
    try:
        engine_of(process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0


def test_the_http_process_starts_without_torch():
    code = "import sys, server.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "/nowhere"], 2, "/nowhere: no such folder"),
        (["--model", "MODEL", "--cache-tokens", "1"], 2, "cache_tokens is 1; raise it"),
        (["--model", "MODEL", "--host", "nowhere.invalid"], 1, "cannot listen on nowhere.invalid:0"),
        (["--model", "MODEL", "--port", "PORT"], 1, "cannot listen on 127.0.0.1:PORT: Address already in use"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(chat_folder, options: list[str], code: int, message: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"MODEL": str(chat_folder), "PORT": str(taken.getsockname()[1])}
        process = launch("--port", "0", *(names.get(option, option) for option in options))
        output, errors = process.communicate(timeout=20)
        assert process.returncode == code
        assert output == ""
        assert errors.count("\n") == 1
        assert errors.startswith("error: ")
        assert message.replace("PORT", names["PORT"]) in errors


def test_a_fault_while_loading_keeps_its_traceback(chat_folder):
    process = launch("--port", "0", "--model", str(chat_folder), "--cache-tokens", "2")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ZeroDivisionError" in errors


@pytest.mark.parametrize(
    "options", [["--max-num-seqs", "0"], ["--max-num-seqs", "x"], ["--port", "-1"], ["--memory-fraction", "2"]]
)
def test_options_out_of_range(chat_folder, options: list[str]):
    process = launch("--model", str(chat_folder), *options)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "Traceback" not in errors


def test_the_banner(chat_folder, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    for file in chat_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "conversion.json").write_text('{"source_cache_bytes_per_token": 200, "cache_bytes_per_token": 50}')
    with serving("--model", str(folder), "--served-model-name", "tale") as server:
        assert server.banner[-1] == (
            f"Serving tale on {server.url}: 1600 tokens of cache, 100 bytes per token "
            "(its source took 400: 4.00 times that)"
        )
        (curl,) = [line.removeprefix("try ").strip() for line in server.banner if line.startswith("try ")]
        output = os.popen(curl).read()
        assert output.endswith("data: [DONE]\n\n")
        assert '"role":"assistant"' in output


def test_more_than_may_wait_are_turned_away(chat_folder, threads):
    options = ("--model", str(chat_folder), "--max-num-seqs", "2", "--max-waiting", "1")
    with serving(*options, env=SLOW) as server:
        running = [threads.submit(streamed, server, 60) for _ in range(3)]
        wait_running(server, 3)
        status, body = server.post("/v1/completions", {"prompt": "b", "max_tokens": 1})
        assert (status, body["error"]["type"], body["error"]["code"]) == (429, "rate_limit_error", "queue_full")
        assert all(future.result().endswith("[DONE]\n\n") for future in running)
        assert server.post("/v1/completions", {"prompt": "b", "max_tokens": 1})[0] == 200
        assert server.post("/v1/completions", {"prompt": "b", "n": 4})[0] == 400  # it could never come in


def test_api_keys(chat_folder):
    body = {"prompt": "a", "max_tokens": 1}
    with serving("--model", str(chat_folder), "--api-key", "Secret", "--api-key", "other") as server:
        for key, status in (("Secret", 200), ("other", 200), ("secret", 401), ("Secret2", 401), ("", 401), ("ä", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert server.post("/v1/completions", body, headers)[0] == status
        assert server.post("/v1/completions", body, {"Authorization": "Basic Secret"})[0] == 401
        for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nothing"):
            status, text = server.get(path)
            assert (status, json.loads(text)["error"]["type"]) == (401, "authentication_error")
        assert server.get("/health")[0] == 200


def test_one_port_and_no_pickle(chat_folder):
    """The engine is reached over an unnamed socket pair alone, and no code here can unpickle."""
    with serving("--model", str(chat_folder)) as server:
        inodes = {os.readlink(fd) for fd in Path(f"/proc/{server.process.pid}/fd").iterdir()}
        inodes |= {os.readlink(fd) for fd in Path(f"/proc/{server.engine_pid()}/fd").iterdir()}
        listening = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    listening.append(int(fields[1].rsplit(":", 1)[1], 16))
        assert listening == [int(server.url.rsplit(":", 1)[1])]
    for source in (ROOT / "server").glob("*.py"):
        assert "import pickle" not in source.read_text()
