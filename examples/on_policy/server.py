"""vLLM with the newest checkpoint of a student, started anew each round.

A running server could read the weights anew (``reload_weights``), which is quicker. In the CPU
build of vLLM 0.32 that ended without an error, and it then wrote noise: the student's cross-entropy
on it was 15.3, on what a newly started server wrote 3.9.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from processes import Process
from runner import logged

SHAPES = Path(__file__).resolve().parent.parent / "strengthened_teacher" / "folders.py"
PATIENCE = 1800.0
"""Seconds that a server may take to begin."""
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": "",
}


class Server:
    """A student's.

    Args:
        python: of an environment with vLLM.
        out: folder for the model and logs.
        length: tokens of a text at most.
    """

    def __init__(self, python: str, out: Path, length: int) -> None:
        self._python, self._out, self._length = python, out, length
        self._process: Process | None = None
        self._ended = 0.0
        self.url = ""

    def serve(self, checkpoint: Path, step: int) -> float:
        """Export a checkpoint as a Hugging Face folder and start a server with it.

        Returns processor seconds of exporting.
        """
        self.stop()
        shapes, model = self._out / "shapes", self._out / "served"
        if not shapes.exists():
            logged(self._out / "shapes.log", str(SHAPES), str(shapes))
        shutil.rmtree(model, ignore_errors=True)
        spent = Process(
            self._out / "export.log",
            *("-m", "megatron_moe_inject.cli", "export-hf", str(checkpoint / f"iter_{step:07d}")),
            *("--hf", str(shapes / "student"), "--output", str(model)),
        ).end()
        self._start(model)
        return spent

    def seconds(self) -> float:
        """Processor seconds of all servers so far."""
        return self._ended + (0.0 if self._process is None else self._process.seconds())

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._ended += self._process.seconds()
            self._process.stop()
            self._process = None

    def _start(self, model: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._process = Process(
            self._out / "server.log",
            *(self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "student", "--dtype", "float32", "--enforce-eager"),
            # Its CPU build ends when the prompt of a text with a seed is read in two parts.
            "--no-enable-chunked-prefill",
            *("--max-model-len", str(self._length), "--host", "127.0.0.1", "--port", str(port)),
            environment=_ENVIRONMENT,
        )
        end = time.monotonic() + PATIENCE
        while self._process.running():
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            if time.monotonic() > end:
                self.stop()
                sys.exit(f"no server after {PATIENCE:.0f} s; its log is {self._out}/server.log")
        sys.exit(f"the server has ended; its log is {self._out}/server.log")
