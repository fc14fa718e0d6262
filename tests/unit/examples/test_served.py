"""A server is compared with the folder that it serves: a small server that answers as vLLM does."""

import http.server
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import huggingface

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "examples" / "models"))

import served  # noqa: E402

TOKENIZER = ROOT / "examples" / "quickstart" / "tokenizer"
LENGTH, WINDOWS = 24, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("served") / "model"
    ids = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    model = huggingface.save(path, LlamaConfig(**huggingface.SIZES | {"vocab_size": len(ids)}))
    for file in TOKENIZER.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path, model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("text") / "held_out"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    numbers = np.random.default_rng(0)
    for _ in range(5):
        builder.add_document(torch.from_numpy(numbers.integers(300, 900, 20)), [20])
    builder.finalize(f"{prefix}.idx")
    return prefix


def serve(model, shift):
    """A server of ``model`` whose log-probabilities are ``shift`` nats too small."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = torch.tensor([asked["prompt"]])
            with torch.inference_mode():
                log_probs = model(ids).logits[0].log_softmax(-1)
            entries = [None] + [
                {str(token): {"logprob": float(row[token]) - shift}}
                for row, token in zip(log_probs, asked["prompt"][1:], strict=False)
            ]
            content = json.dumps({"choices": [{"text": "", "prompt_logprobs": entries}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def run(folder, text, *more):
    sizes = ["--length", str(LENGTH), "--windows", str(WINDOWS)]
    return served.main(["--hf", str(folder), "--text", str(text), *sizes, *more])


def numbers_in(printed):
    return [float(found) for found in re.findall(r"([\d.]+) bits per byte", printed)]


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (0.5, 1)])
def test_a_server_that_says_something_else_is_found(folder, text, shift, status, capsys):
    path, model = folder
    server, address = serve(model, shift)
    try:
        assert run(path, text, "--server", address) == status
    finally:
        server.shutdown()
    printed = capsys.readouterr().out
    here, there = numbers_in(printed)
    tokens = WINDOWS * (LENGTH - 1)
    size = int(re.search(r"([\d,]+) bytes", printed)[1].replace(",", ""))
    assert there - here == pytest.approx(shift * tokens / size / np.log(2), abs=2e-4)


def test_no_server_there_is_one_line(folder, text):
    with pytest.raises(SystemExit, match=r"^served: http://127\.0\.0\.1:9/v1/completions"):
        run(folder[0], text, "--server", "http://127.0.0.1:9")
