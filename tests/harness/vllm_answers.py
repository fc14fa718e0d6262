"""Run by a Python that has vLLM: its own code takes our requests for a text and writes the answers

Reads JSON from standard input: ``[{"request": ..., "log_probs": [t, v]}]``, what we send and what
some model says after each id. vLLM's ``CompletionRequest`` reads the request, its sampler gathers
the log-probabilities, its output processor and its server make the response. Prints one line of
JSON for each: ``{"answer": ..., "sampling": {...}}``.
"""

import json
import os
import sys

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_TARGET_DEVICE="cpu", TORCHDYNAMO_DISABLE="1")


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    for case in json.load(sys.stdin):
        answers.write(json.dumps(_answer(**case)) + "\n")


def _answer(request: dict, log_probs: list) -> dict:
    import torch
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.sample.sampler import Sampler

    read = CompletionRequest(**request)
    assert not read.model_extra, read.model_extra
    sampling = read.to_sampling_params(1)
    tokens = read.prompt
    gathered = Sampler.gather_logprobs(
        torch.tensor(log_probs)[:-1], sampling.prompt_logprobs, torch.tensor(tokens[1:])
    )
    processor = LogprobsProcessor(
        tokenizer=None, logprobs=None, cumulative_logprob=None, num_logprobs=None,
        prompt_logprobs=[None], num_prompt_logprobs=sampling.prompt_logprobs,
    )  # fmt: skip
    processor._update_prompt_logprobs(gathered)
    output = CompletionOutput(0, "x", [1], None, None, finish_reason="length")
    result = RequestOutput(
        "r", None, tokens, processor.pop_prompt_logprobs(), [output], finished=True
    )
    server = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    for name in ("enable_prompt_tokens_details", "enable_force_include_usage"):
        setattr(server, name, False)
    server.system_fingerprint = None
    server.enable_per_request_metrics = False
    response = server.request_output_to_completion_response(
        [result], read, "r", 0, "m", None, RequestResponseMetadata(request_id="r")
    )
    return {
        "answer": response.model_dump(mode="json"),
        "sampling": {
            "temperature": sampling.temperature,
            "prompt_logprobs": sampling.prompt_logprobs,
            "max_tokens": sampling.max_tokens,
            "truncate_prompt_tokens": getattr(read, "truncate_prompt_tokens", None),
        },
    }


if __name__ == "__main__":
    main()
