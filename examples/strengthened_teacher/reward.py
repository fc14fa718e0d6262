"""A reward that a program can check: does the code that a model goes on with parse?

    python reward.py FOLDER ...        what models in Hugging Face folders earn on held-out modules

Prompts are cut out of the quickstart's modules at a line that a block must follow (``def f(x):``,
``if x:``), without its newline: the tokenizer keeps a newline and the indent behind it in one
token. The reward of a completion is the share of its whole lines that, with the prompt, parse; the
last line counts only where the model has ended it. Nothing is run. What such a reward cannot see is
whether the code means anything: lines that say little parse most easily, so the number of lines and
how many of them differ are measured beside it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import corpora

LONGEST_PROMPT = 96
COMPLETION_TOKENS = 48
LINES_OF_CONTEXT = 12
PROMPTS_OF_A_PLACE = 4
_PLACE = re.compile(r"(def|class) ")


def parses(text: str) -> bool:
    """Whether Python's parser takes the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def prompts_of(text: str) -> list[str]:
    """Beginnings of functions and classes of a module, each to the end of a line with a colon."""
    lines = text.splitlines(keepends=True)
    prompts = []
    for first, line in enumerate(lines):
        if not _PLACE.match(line):
            continue
        here: list[str] = []
        for last in range(first, min(first + LINES_OF_CONTEXT, len(lines))):
            if last > first and lines[last][:1].strip():
                break
            prompt = "".join(lines[first : last + 1]).rstrip()
            indent = len(lines[last]) - len(lines[last].lstrip()) + 4
            if prompt.endswith(":") and parses(f"{prompt}\n{' ' * indent}pass\n"):
                here.append(prompt)
        prompts += here[:PROMPTS_OF_A_PLACE]
    return prompts


def all_prompts(tokenizer: Any) -> tuple[list[str], list[str]]:
    """(training, held out): of the modules that the quickstart trains on, and of the others."""
    _, code, _ = corpora.read_documents(with_tests=False)

    def short(documents: Sequence[corpora.Document]) -> list[str]:
        found = dict.fromkeys(p for document in documents for p in prompts_of(document.text))
        return [p for p in found if len(tokenizer(p)["input_ids"]) <= LONGEST_PROMPT]

    training, held_out = corpora.split(code)
    return short(training), short(held_out)


def whole_lines(completion: str, ended: bool) -> list[str]:
    """Lines of a completion; the last counts only where the model ended the line or the text."""
    lines = completion.splitlines(keepends=True)
    if lines and not ended and not lines[-1].endswith("\n"):
        lines.pop()
    return lines


def reward(prompt: str, completion: str, ended: bool) -> float:
    """Share in [0, 1] of the whole lines, but for blank ones, that parse behind the prompt.

    The longest beginning that parses counts, so that what stands behind a mistake earns nothing.
    """
    lines = whole_lines(completion, ended)
    said = [number for number, line in enumerate(lines) if line.strip()]
    for count in range(len(said), 0, -1):
        if parses(prompt + "".join(lines[: said[count - 1] + 1])):
            return count / len(said)
    return 0.0


def measure(folder: Path, samples: int, seed: int) -> dict[str, float]:
    """What a model earns on held-out prompts, sampled as it is trained: at temperature 1.

    Returns:
        reward: its mean; whole: share of completions with reward 1; lines: whole lines of a
        completion, but for blank ones; distinct: different lines among all of them, as a share.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    held_out = all_prompts(tokenizer)[1]
    torch.manual_seed(seed)
    rewards: list[float] = []
    lines: list[str] = []
    for start in range(0, samples * len(held_out), 64):
        batch = [held_out[i % len(held_out)] for i in range(start, start + 64)]
        batch = batch[: samples * len(held_out) - start]
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        tokens = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=COMPLETION_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        for prompt, ids in zip(
            batch, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True
        ):
            ended = tokenizer.eos_token_id in ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            rewards.append(reward(prompt, text, ended))
            lines += [line.strip() for line in whole_lines(text, ended) if line.strip()]
    return {
        "reward": sum(rewards) / len(rewards),
        "whole": sum(r == 1 for r in rewards) / len(rewards),
        "lines": len(lines) / len(rewards),
        "distinct": len(set(lines)) / max(len(lines), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=2, help="completions of each prompt")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        found = measure(folder, arguments.samples, arguments.seed)
        print(f"{folder}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
