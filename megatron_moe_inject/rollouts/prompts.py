"""What a student is to go on from: stretches of documents, or lines of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_moe_inject.host.errors import RecipeError, fail, show_path
from megatron_moe_inject.host.text import is_whole
from megatron_moe_inject.rollouts.file_format import Tokenize
from megatron_moe_inject.rollouts.settings import Asked

FLAG = "--prompts"


class Prompt(NamedTuple):
    """One of them.

    Attributes:
        number: among all that are asked for, which its draws depend on.
        ids: of its tokens.
        source: its document or line, from 0.
    """

    number: int
    ids: list[int]
    source: int


def read_prompts(asked: Asked, tokenize: Tokenize | None, vocab_size: int | None) -> list[Prompt]:
    """All prompts that are asked for, in the order in which they are written.

    Of a data set they are the first tokens of each document, and of each further stretch of it that
    is as long as a prompt with its completion, in an order drawn by the seed, so that another seed
    takes others; what is no longer than a prompt is left out. Of a file they are its lines in
    order, ``{"prompt": ids or text}``.

    Args:
        tokenize: ids of a text; None where there is no tokenizer with text.
        vocab_size: ids are below; None = any.

    Raises:
        RecipeError: there are none, or one is none.
    """
    if Path(f"{asked.prompts}.idx").is_file():
        prompts = _of_documents(asked)
    elif Path(asked.prompts).is_file():
        prompts = _of_lines(asked, tokenize)
    else:
        raise fail(
            FLAG, asked.prompts, "is no data set (.bin, .idx) and no file",
            "name the prefix of a data set, or a JSON Lines file with prompts",
        )  # fmt: skip
    if not prompts:
        raise fail(
            FLAG, asked.prompts, "has no prompt",
            f"lower --prompt-tokens {asked.prompt_tokens}, or name longer text",
        )  # fmt: skip
    for prompt in prompts:
        if vocab_size is not None and max(prompt.ids) >= vocab_size:
            raise fail(
                FLAG, asked.prompts,
                f"has id {max(prompt.ids)} in document or line {prompt.source}, and the student's "
                f"tokenizer has ids below {vocab_size}", "prepare it with that tokenizer",
            )  # fmt: skip
    return prompts


def checksum(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts."""
    hasher = hashlib.sha256()
    for prompt in prompts:
        hasher.update(json.dumps(prompt.ids).encode())
    return hasher.hexdigest()


def _of_documents(asked: Asked) -> list[Prompt]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(asked.prompts)
    documents = len(data.document_indices) - 1
    first, stop = asked.documents or (0, documents)
    if stop > documents:
        raise fail(
            "--documents", f"{first}:{stop}", f"is more than the {documents} of {asked.prompts}",
            f"write {first}:{documents} or less",
        )  # fmt: skip
    sequences = np.asarray(data.document_indices[first:stop], np.int64)
    lengths = np.asarray(data.sequence_lengths, np.int64)[sequences]
    stretch = asked.prompt_tokens + asked.sampling.max_tokens
    ends = np.cumsum(np.maximum(0, -(-(lengths - asked.prompt_tokens) // stretch)))
    there = int(ends[-1])
    count = there if asked.count is None else min(asked.count, there)
    order = np.random.default_rng(asked.sampling.seed).choice(there, count, replace=False)
    prompts: list[Prompt] = []
    for place in order.tolist():
        document = int(np.searchsorted(ends, place, side="right"))
        begin = (place - (int(ends[document - 1]) if document else 0)) * stretch
        ids = data.get(int(sequences[document]), offset=begin, length=asked.prompt_tokens)
        prompts.append(Prompt(len(prompts), [int(i) for i in ids], first + document))
    return prompts


def _of_lines(asked: Asked, tokenize: Tokenize | None) -> list[Prompt]:
    prompts: list[Prompt] = []
    path = Path(asked.prompts)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecipeError(f"{FLAG}: {show_path(path)} cannot be read ({error.strerror})") from None
    for line, content in enumerate(lines):
        if asked.count is not None and len(prompts) == asked.count:
            break
        if content.strip():
            prompts.append(Prompt(len(prompts), _ids(path, line, content, tokenize), line))
    return prompts


def _ids(path: Path, line: int, content: bytes, tokenize: Tokenize | None) -> list[int]:
    def wrong(problem: str, remedy: str) -> RecipeError:
        return RecipeError(f"{FLAG}: {show_path(path)} line {line + 1} {problem}; {remedy}", FLAG)

    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise wrong("is no JSON", "each line is an object of its own") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if isinstance(prompt, str):
        if tokenize is None:
            raise wrong("is text, for which there is no tokenizer here", "write ids")
        if not is_whole(prompt):
            raise wrong("has half a character (a lone surrogate)", "correct it")
        prompt = tokenize(prompt)
    whole = isinstance(prompt, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in prompt
    )
    if not whole or not prompt:
        raise wrong("has no ids and no text under 'prompt'", 'write {"prompt": [1, 2, 3]}')
    return prompt
