"""A real HTTP server that writes, as vLLM or SGLang would with a copy of a student."""

from __future__ import annotations

import numpy as np

from tests.harness.teacher_server import TeacherServer


class WritingServer(TeacherServer):
    """Goes on from prompts, at temperature 0 with the most likely id, else by the seed it is sent.

    Args:
        ids: whether answers have ids.
    """

    def __init__(self, think, protocol="vllm", *, ids=True, **more):
        self.ids = ids
        self.seeds = []
        super().__init__(think, protocol, **more)

    def _answer(self, handler, body, tokens, fault):
        if self._fault(handler, fault):
            return
        vllm = self.protocol == "vllm"
        asked = body if vllm else body["sampling_params"]
        most = asked["max_tokens"] if vllm else asked["max_new_tokens"]
        seed = asked["seed"] if vllm else asked["sampling_seed"]
        self.seeds.append(seed)
        rng, written = np.random.default_rng(seed), []
        while len(written) < most:
            log_probs = self.think([*tokens, *written])[-1].astype(np.float64)
            if asked["temperature"] == 0:
                written.append(int(log_probs.argmax()))
            else:
                probs = np.exp(log_probs / asked["temperature"])
                written.append(int(rng.choice(len(probs), p=probs / probs.sum())))
            if written[-1] in asked["stop_token_ids"]:
                break
        if vllm:
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            choice |= {"token_ids": written} if self.ids else {}
            self._send(handler, {"id": "cmpl", "choices": [choice]})
        else:
            self._send(handler, {"text": "x", "output_ids": written, "meta_info": {}})
