"""A real HTTP server that writes, as vLLM or SGLang would with a copy of a student."""

from __future__ import annotations

import numpy as np

from tests.harness.teacher_server import TeacherServer


class WritingServer(TeacherServer):
    """Goes on from prompts, at temperature 0 with the most likely id, else by the seed it is sent.

    Args:
        ids: whether answers have ids.
        told: whether they have log-probabilities.

    Attributes:
        bodies: of what was asked for.
    """

    def __init__(self, think, protocol="vllm", *, ids=True, told=True, **more):
        self.ids, self.told = ids, told
        self.seeds, self.bodies = [], []
        super().__init__(think, protocol, **more)

    def _answer(self, handler, body, tokens, fault):
        if self._fault(handler, fault):
            return
        vllm = self.protocol == "vllm"
        asked = body if vllm else body["sampling_params"]
        most = asked["max_tokens"] if vllm else asked["max_new_tokens"]
        seed = asked["seed"] if vllm else asked["sampling_seed"]
        self.seeds.append(seed)
        self.bodies.append(body)
        if len(tokens) + most > self.max_model_len:
            self._error(handler, 400, f"{len(tokens)} + {most} is more than max_model_len")
            return
        if vllm and not body.get("return_tokens_as_token_ids"):
            self._error(handler, 400, "no tokenizer, as with --skip-tokenizer-init")
            return
        rng, written, told = np.random.default_rng(seed), [], []
        while len(written) < most:
            log_probs = self.think([*tokens, *written])[-1].astype(np.float64)
            if asked["temperature"] == 0:
                written.append(int(log_probs.argmax()))
            else:
                probs = np.exp(log_probs / asked["temperature"])
                written.append(int(rng.choice(len(probs), p=probs / probs.sum())))
            told.append(float(log_probs[written[-1]]))
            if written[-1] in asked["stop_token_ids"]:
                break
        if vllm:
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            choice |= {"token_ids": written} if self.ids else {}
            choice["logprobs"] = {"token_logprobs": told} if self.told else None
            self._send(handler, {"id": "cmpl", "choices": [choice]})
        else:
            known = [[value, one, None] for value, one in zip(told, written, strict=True)]
            meta = {"output_token_logprobs": known} if self.told else {}
            self._send(handler, {"text": "x", "output_ids": written, "meta_info": meta})
