"""Does a server say what the exported folder says? Bits per byte of held-out text, from both.

    python examples/models/served.py --hf runs/models/olmoe/hf \\
      --text runs/models/olmoe/data/domain_held_out --server http://localhost:8000

Reads the first windows of a token file, has ``transformers`` (``--hf``) and a server that speaks
OpenAI's completions with ``prompt_logprobs`` (``--server``: vLLM) predict each token from those
before it in its window, and prints both numbers and the largest difference between two
probabilities' logarithms. Either alone gives its number. Ends with status 1 where the mean
difference exceeds ``--allow`` nats.

A run's own number, in inject_evaluation.jsonl, is that of whole samples of ``--seq-length``; with
windows of that length and all of the text (``--windows 0``) it lies within its interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

LOG2 = math.log(2)


def windows(prefix: Path, length: int, most: int) -> list[list[int]]:
    """The text's tokens in file order in windows of ``length``; ``most`` of them, 0 = all."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(prefix))
    tokens: list[int] = []
    cut: list[list[int]] = []
    for document in range(len(documents)):
        tokens += documents[document].tolist()
        while len(tokens) >= length and (not most or len(cut) < most):
            cut.append(tokens[:length])
            tokens = tokens[length:]
        if most and len(cut) >= most:
            break
    return cut


def of_folder(folder: Path, cut: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """Log-probability of each token but the first of each window, in nats, by ``transformers``."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model = model.to(device).eval()
    for window in cut:
        ids = torch.tensor([window], device=device)
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].float()
        log_probs = logits.log_softmax(-1)
        yield log_probs.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def of_server(server: str, model: str, cut: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """The same by a server; its first entry is null, each other names the token of the prompt."""
    for window in cut:
        request = {"model": model, "prompt": list(window), "max_tokens": 1, "temperature": 0}
        answer = _post(f"{server.rstrip('/')}/v1/completions", request | {"prompt_logprobs": 0})
        entries = answer["choices"][0].get("prompt_logprobs")
        if not entries or len(entries) != len(window):
            sys.exit(f"served: {server} gave no prompt_logprobs of {len(window)} tokens")
        yield [
            entry[str(token)]["logprob"]
            for token, entry in zip(window[1:], entries[1:], strict=True)
        ]


def _post(url: str, content: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read(300).decode(errors="replace")
        sys.exit(f"served: {url} answers {error.code}: {text}")
    except OSError as error:
        sys.exit(f"served: {url} cannot be reached ({error}); start the server, or see --server")


def text_bytes(tokenizer_folder: Path, cut: Sequence[Sequence[int]]) -> int:
    """UTF-8 bytes of the tokens that are predicted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    return sum(len(tokenizer.decode(list(window[1:])).encode()) for window in cut)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a server with the folder that it serves.")
    parser.add_argument("--hf", type=Path, required=True, help="the exported folder")
    parser.add_argument("--text", type=Path, required=True, help="a token file, without .bin")
    parser.add_argument("--server", help="such as http://localhost:8000; none: the folder alone")
    parser.add_argument("--model", help="its name on the server; default: the folder's path")
    parser.add_argument("--windows", type=int, default=32, help="how many; 0 = the whole text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--allow", type=float, default=0.01, help="mean difference in nats a token")
    options = parser.parse_args(argv)
    cut = windows(options.text, options.length, options.windows)
    if not cut:
        sys.exit(f"served: {options.text} has fewer than {options.length} tokens; lower --length")
    size = text_bytes(options.hf, cut)
    here = [value for row in of_folder(options.hf, cut) for value in row]
    print(f"{len(cut)} windows of {options.length} tokens, {size:,} bytes")
    print(f"transformers  {-sum(here) / LOG2 / size:.4f} bits per byte")
    if options.server is None:
        return 0
    name = options.model or str(options.hf)
    there = [value for row in of_server(options.server, name, cut) for value in row]
    differences = [abs(a - b) for a, b in zip(here, there, strict=True)]
    mean = abs(sum(here) - sum(there)) / len(here)
    print(f"server        {-sum(there) / LOG2 / size:.4f} bits per byte")
    print(f"difference    {mean:.2g} nats a token in the mean, {max(differences):.2g} at most")
    if mean > options.allow:
        print(f"served: more than --allow {options.allow}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
