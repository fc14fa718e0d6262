"""What a served teacher costs: bytes and seconds of its answers, and how far ahead to ask.

    python examples/benchmarks/served_bench.py [--steps 12] [--latency 0.5] [--skip-training]

First table: an answer about one text, as vLLM's JSON and as SGLang's flat numbers; its bytes, and
how long the process that asks takes to read it. Second table: training steps of real Megatron on
the CPU lane from a live teacher, from a store of it, and from a server that takes ``--latency``
seconds for an answer (a stand-in that has no model, so that it takes no time of the cores), asked
some steps ahead.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from megatron_moe_inject.host.text import table
from megatron_moe_inject.teachers.served.protocols import PROTOCOLS

VOCABULARY, SEQUENCE, TOP, DOCUMENTS = 4096, 256, 64, 400
RECIPE = """
domains:
  - {{name: domain, data: [0], teacher: small}}
teachers:
  small: {{source: "{source}", {more}}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{experts: all}}
"""


def said(tokens: np.ndarray, top: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [t - 1, k] that differ, and log-probabilities of a long tail."""
    ids = (tokens[:-1, None] * 31 + np.arange(top) * 7) % vocabulary
    log_probs = np.log(0.9 / (1 + np.arange(top)) ** 1.5 / 2.612)
    return ids.astype(np.int32), np.broadcast_to(log_probs, ids.shape).astype(np.float32)


def flat(tokens: np.ndarray, top: int, vocabulary: int) -> dict:
    """What SGLang sends of it."""
    ids, values = said(tokens, top, vocabulary)
    told = {"input_token_logprobs": [[None, int(tokens[0]), None]]}
    told["input_token_logprobs"] += [[-9.5, int(token), None] for token in tokens[1:]]
    for name, array in (("val", values), ("idx", ids)):
        key = f"input_top_logprobs_{name}_flat_b64"
        told[key] = base64.b64encode(array.tobytes()).decode()
        told[f"{key}_dtype"] = str(array.dtype)
    told["input_top_logprobs_shape"] = list(ids.shape)
    told["input_top_logprobs_null_prefix"] = 1
    return {"text": "", "meta_info": told}


def by_id(tokens: np.ndarray, top: int, vocabulary: int) -> dict:
    """What vLLM sends of it."""
    ids, values = said(tokens, top, vocabulary)
    places: list = [None]
    for token, own, own_values in zip(
        tokens[1:].tolist(), ids.tolist(), values.tolist(), strict=True
    ):
        row = {token: -9.5} | dict(zip(own, own_values, strict=True))
        places.append(
            {
                str(i): {"logprob": value, "rank": rank, "decoded_token": " word"}
                for rank, (i, value) in enumerate(row.items(), 1)
            }
        )
    return {"choices": [{"prompt_token_ids": tokens.tolist(), "prompt_logprobs": places}]}


def answers_table() -> None:
    """The first table."""
    rows = [("protocol", "tokens", "ids", "MB", "bytes an id", "read in ms", "tokens a second")]
    rng = np.random.default_rng(0)
    for name, write in (("vllm", by_id), ("sglang", flat)):
        for length, top in ((4096, 20), (4096, 64)):
            tokens = rng.integers(0, 131_072, length).astype(np.int32)
            content = json.dumps(write(tokens, top, 131_072), separators=(",", ":")).encode()
            times = []
            for _ in range(3):
                begin = time.process_time()
                PROTOCOLS[name].answer(json.loads(content), tokens, top)
                times.append(time.process_time() - begin)
            size, best = len(content), min(times)
            rows.append(
                (
                    *(name, f"{length:,}", str(top), f"{size / 1e6:.1f}"),
                    *(f"{size / (length - 1) / top:.1f}", f"{1e3 * best:.0f}"),
                    f"{length / best:,.0f}",
                )
            )
    print("\n".join(table(rows)), flush=True)


class Server(ThreadingHTTPServer):
    """Says what SGLang would, each answer after some seconds."""

    daemon_threads = True
    latency = 0.0

    def handle_error(self, request: object, client_address: object) -> None:
        """A run that has ended hangs up."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *parts: object) -> None:
        """Nothing."""

    def _send(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The model."""
        known = self.path == "/v1/models"
        self._send(
            {"data": [{"id": "m", "owned_by": "sglang"}]} if known else {}, 200 if known else 404
        )

    def do_POST(self) -> None:
        """A text."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/generate":
            self._send({}, 404)
            return
        time.sleep(self.server.latency)
        tokens = np.array(body["input_ids"], np.int32)
        self._send(flat(tokens, body["top_logprobs_num"], VOCABULARY))


def flags(hidden: int, data: str, *more: str) -> list[str]:
    """Of student and teacher."""
    text = (
        f"--cpu --num-layers 4 --hidden-size {hidden} --num-attention-heads 4 "
        f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --swiglu "
        "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --num-workers 0 "
        "--untie-embeddings-and-output-weights --micro-batch-size 2 --global-batch-size 8 "
        f"--lr 1e-4 --eval-interval 100000 --eval-iters 0 --log-interval 1 --data-path {data} "
        "--split 100,0,0 "
    )
    return [*text.split(), *more]


def run(module: str, *arguments: str) -> str:
    """The output of a command of this package."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *module.split(), *arguments]
    done = subprocess.run(command, env=environment, text=True, stdout=-1, stderr=-2, check=False)
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def steps_table(steps: int, latency: float) -> None:
    """The second table."""
    pretrain = (
        "torch.distributed.run --standalone --nproc-per-node 1 -m megatron_moe_inject.pretrain"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        teacher = f"{folder}/teacher"
        run(
            pretrain,
            *flags(64, data, "--train-iters", "1", "--save", teacher, "--save-interval", "1"),
        )
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(RECIPE.format(source=f"megatron:{teacher}", more="temperature: 1.0"))
        run(
            "megatron_moe_inject.cli", "store-teacher", str(recipe), "--output", f"{folder}/store",
            "--top", str(TOP), "--cpu", "--", *flags(64, data)[1:],
        )  # fmt: skip
        server = Server(("127.0.0.1", 0), Handler)
        server.latency = latency
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"server:http://127.0.0.1:{server.server_address[1]}"
        cases = [
            ("live", f"megatron:{teacher}", "temperature: 1.0"),
            ("store", f"store:{folder}/store", "temperature: 1.0"),
        ]
        for ahead in (0, 1, 2, 4):
            asked = f"server: {{top: {TOP}, ahead: {ahead}, concurrent: 8}}"
            cases.append((f"server, {ahead} steps ahead", url, asked))
        rows = [("teacher", "a step, median", "server wait, median", "answers ready, median")]
        for name, source, more in cases:
            recipe.write_text(RECIPE.format(source=source, more=more))
            moe = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
            moe += f"--inject-recipe {recipe} --inject-from-scratch --train-iters {steps}"
            told = run(pretrain, *flags(128, data, *moe.split()))
            rows.append((name, *(median_of(told, what) for what in _WHAT)))
        print("\n".join(table(rows)), flush=True)


_WHAT = {
    "step": (r"elapsed time per iteration \(ms\): ([\d.]+)", "{:.0f} ms", 1.0),
    "wait": (r"server wait: ([\d.E+-]+)", "{:.0f} ms", 1e3),
    "ahead": (r"server ahead: ([\d.E+-]+)", "{:.0f}", 1.0),
}


def median_of(told: str, what: str) -> str:
    """Of a run's output the median of a line of ``_WHAT``, the first two steps left out."""
    pattern, form, factor = _WHAT[what]
    values = [float(value) for value in re.findall(pattern, told)][2:]
    return form.format(factor * statistics.median(values)) if values else ""


def write_data(folder: Path) -> str:
    """Random documents; their prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.uint16)
    for _ in range(DOCUMENTS):
        builder.add_document(
            torch.from_numpy(rng.integers(0, VOCABULARY - 1, SEQUENCE)), [SEQUENCE]
        )
    builder.finalize(f"{folder / 'text'}.idx")
    return str(folder / "text")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds for an answer")
    parser.add_argument("--skip-training", action="store_true")
    options = parser.parse_args()
    answers_table()
    if not options.skip_training:
        steps_table(options.steps, options.latency)


if __name__ == "__main__":
    main()
