"""A real HTTP server that says what a teacher thinks, as vLLM or SGLang would, and fails as asked.

It speaks what ``megatron_moe_inject.teachers.served`` reads of both, written from their sources:
``/v1/models``, ``/version``, ``/model_info``, ``/tokenize``, ``/v1/completions``, ``/generate``.
"""

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

Think = Callable[[list[int]], np.ndarray]
"""Log-probabilities [t, v] float32 of what follows each id of a text [t]."""


def thinker(model) -> Think:
    """What a causal model of ``transformers`` says, one text at a time."""
    import torch

    lock = threading.Lock()

    @torch.no_grad()
    def think(tokens):
        with lock:
            logits = model(torch.tensor([tokens])).logits[0]
        return logits.float().log_softmax(-1).numpy()

    return think


def random_thinker(vocab: int, seed: int = 0) -> Think:
    """What follows depends on the last two ids alone, at random."""
    table = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * 2

    def think(tokens):
        own = np.array(tokens)
        before = np.concatenate([[0], own[:-1]])
        logits = table[own] + table[before]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return think


class _Quiet(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that are gone are what tests are about."""


class TeacherServer:
    """One server on a free port of this machine, in threads.

    Args:
        think: the model.
        protocol: ``vllm`` or ``sglang``.
        model: its name.
        key: that requests must bring.
        max_logprobs: as of ``vllm serve --max-logprobs``.
        max_model_len: as there.
        tokenize: makes ids of a text; None for a server without tokenizer.
        flat: whether an SGLang server knows ``return_flat_raw_top_logprobs_b64``.
        seconds: that an answer takes.
        faults: of the number of a text (from 0), what goes wrong with it; see ``_fault``.

    Attributes:
        asked: texts that were asked for, in order.
        headers: of the requests.
        together: the most that were answered at once.
    """

    def __init__(self, think, protocol="vllm", *, model="tiny", key=None, max_logprobs=100_000,
                 max_model_len=1 << 16, tokenize=None, flat=True, seconds=0.0,
                 faults=lambda n: None):  # fmt: skip
        self.think, self.protocol, self.model, self.key = think, protocol, model, key
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.tokenize, self.flat, self.seconds, self.faults = tokenize, flat, seconds, faults
        self.asked, self.headers, self.together = [], [], 0
        self._running = 0
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    def start(self):
        """Listen; after ``stop`` at the same port."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *parts):
                pass

            def do_GET(self):
                server._get(self)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server._post(self, json.loads(body))

        self._http = _Quiet(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Be gone; connections that are open end with their next request."""
        self._http.shutdown()
        self._http.server_close()
        self._gone = self._http
        self._http = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._http is not None:
            self.stop()

    def _send(self, handler, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(body)

    def _error(self, handler, status, message, **headers):
        self._send(handler, {"error": {"message": message}}, status, **headers)

    def _admitted(self, handler):
        self.headers.append(dict(handler.headers))
        if self._http is None:  # stopped, but for this open connection
            handler.connection.close()
            handler.close_connection = True
            return False
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            told = handler.headers.get("Authorization", "no key")
            self._error(handler, 401, f"Unauthorized: {told}")
            return False
        return True

    def _get(self, handler):
        if not self._admitted(handler):
            return
        card = {"id": self.model, "owned_by": self.protocol, "root": f"/models/{self.model}",
                "max_model_len": self.max_model_len}  # fmt: skip
        answers = {"/v1/models": {"data": [card]}}
        if self.protocol == "vllm":
            answers["/version"] = {"version": "0.33.0"}
        elif self.protocol == "sglang":
            answers["/model_info"] = {"model_path": f"/models/{self.model}"}
        else:
            answers = {}
        if handler.path in answers:
            self._send(handler, answers[handler.path])
        else:
            self._error(handler, 404, "Not Found")

    def _post(self, handler, body):
        if not self._admitted(handler):
            return
        if handler.path == "/tokenize" and self.tokenize is not None:
            ids = self.tokenize(body["prompt"])
            self._send(handler, {"tokens": ids, "count": len(ids), "max_model_len": 1})
            return
        wanted = {"vllm": "/v1/completions", "sglang": "/generate"}.get(self.protocol)
        if handler.path != wanted:
            self._error(handler, 404, "Not Found")
            return
        if self.protocol == "vllm" and body["model"] != self.model:
            self._error(handler, 404, f"The model `{body['model']}` does not exist.")
            return
        with self._lock:
            number = len(self.asked)
            tokens = body["prompt"] if self.protocol == "vllm" else body["input_ids"]
            self.asked.append(list(tokens))
            self._running += 1
            self.together = max(self.together, self._running)
        try:
            self._answer(handler, body, tokens, self.faults(number))
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, handler, body, tokens, fault):
        time.sleep(self.seconds)
        top = body["prompt_logprobs"] if self.protocol == "vllm" else body["top_logprobs_num"]
        if top > self.max_logprobs:
            self._error(handler, 400, f"Requested prompt logprobs of {top}, which is greater than "
                        f"max allowed: {self.max_logprobs}")  # fmt: skip
            return
        if self._fault(handler, fault):
            return
        if fault == "other_tokens":
            tokens = [(t + 1) % 2 for t in tokens]
        elif fault == "shorter":
            tokens = tokens[:-1]
        try:
            log_probs = self.think(tokens)
        except IndexError:
            self._error(handler, 400, f"Token id {max(tokens)} is out of vocabulary")
            return
        if fault == "raw_logits":
            log_probs = log_probs + 9.0
        if fault == "nan":
            log_probs = np.full_like(log_probs, np.nan)
        rows = [_top(log_probs[n], top - (fault == "few")) for n in range(len(tokens) - 1)]
        write = self._vllm if self.protocol == "vllm" else self._sglang
        content = json.dumps(write(tokens, log_probs, rows, body))
        if fault == "nan":  # for which JSON has no word
            content = content.replace("NaN", "null")
        content = content.encode()
        if fault == "truncated":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
            return
        self._send(handler, content[: len(content) // 2] if fault == "half" else content)

    def _fault(self, handler, fault):
        """Whether a fault that needs no model was made."""
        statuses = {"400": 400, "404": 404, "429": 429, "500": 500, "503": 503}
        if fault in statuses:
            more = {"Retry_After": "1"} if fault == "503" else {}
            self._error(handler, statuses[fault], f"as the test asks: {fault}", **more)
        elif fault == "redirect":
            self._send(handler, b"", 307, Location="http://elsewhere.invalid/v1/completions")
        elif fault == "garbage":
            self._send(handler, b"<html>Bad gateway</html>")
        elif fault == "other_json":
            self._send(handler, {"choices": []})
        elif fault == "closed":
            handler.close_connection = True
            handler.connection.close()
        elif isinstance(fault, float):
            time.sleep(fault)
            return False
        else:
            return False
        return True

    def _vllm(self, tokens, log_probs, rows, body):
        places = [None]
        for n, (ids, values) in enumerate(rows):
            # The text's own id comes first, and is not repeated.
            own = {tokens[n + 1]: float(log_probs[n, tokens[n + 1]])}
            own |= dict(zip(ids, values, strict=True))
            places.append(
                {
                    str(i): {"logprob": max(v, -9999.0), "rank": r, "decoded_token": f"t{i}"}
                    for r, (i, v) in enumerate(own.items())
                }
            )
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
        choice |= {"prompt_logprobs": places, "prompt_token_ids": list(tokens)}
        return {"id": "cmpl", "object": "text_completion", "choices": [choice]}

    def _sglang(self, tokens, log_probs, rows, body):
        own = [[float(log_probs[n, t]), t, None] for n, t in enumerate(tokens[1:])]
        told = {"prompt_tokens": len(tokens)}
        told["input_token_logprobs"] = [[None, tokens[0], None], *own]
        if not body["top_logprobs_num"]:
            return {"text": "", "output_ids": [], "meta_info": told}
        if self.flat and body.get("return_flat_raw_top_logprobs_b64"):
            ids = np.array([ids for ids, _ in rows], np.int32)
            values = np.array([values for _, values in rows], np.float32)
            for name, array in (("val", values), ("idx", ids)):
                key = f"input_top_logprobs_{name}_flat_b64"
                told[key] = base64.b64encode(array.tobytes()).decode()
                told[f"{key}_dtype"] = str(array.dtype)
            told["input_top_logprobs_shape"] = list(values.shape)
            told["input_top_logprobs_null_prefix"] = 1
        else:
            told["input_top_logprobs"] = [
                None,
                *([[v, i, None] for i, v in zip(*row, strict=True)] for row in rows),
            ]
        return {"text": "", "output_ids": [], "meta_info": told}


def _top(log_probs, count):
    order = np.argsort(-log_probs, kind="stable")[:count]
    return order.tolist(), log_probs[order].tolist()
