"""Pairs of answers in JSON Lines files as a data set of Megatron's, see ``pairs``.

A line has a prompt and two answers, of which one is preferred. Each is a text, a list of ids, or a
list of chat messages, which the tokenizer's chat template makes a text of. A prompt and an answer
become ids apart from each other, so that both answers stand behind the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.data.json_lines import Lines, read_lines
from megatron_moe_inject.data.prepare import refuse_existing
from megatron_moe_inject.host.errors import RecipeError, listing, show
from megatron_moe_inject.host.files import new_files
from megatron_moe_inject.host.text import is_whole

_LAST = (".json", ".idx")
Answered = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids of prompt, chosen and rejected answer."""


@dataclass(frozen=True)
class PairEncoding:
    """How pairs become ids.

    Attributes:
        fields: keys of prompt, chosen and rejected answer in a line.
        special_tokens: whether the tokenizer's own tokens are put around a prompt that is a text.
        end: id that ends an answer, unless it is of chat messages or ids; ``None`` for none.
        rows: of the model's embedding; an id beyond is an error. ``None`` where it is not known,
            and then ids of the tokenizer alone are taken.
        max_length: pairs of which prompt and an answer are longer together are left out; ``None``
            keeps all.
    """

    fields: tuple[str, str, str] = ("prompt", "chosen", "rejected")
    special_tokens: bool = True
    end: int | None = None
    rows: int | None = None
    max_length: int | None = None


@dataclass
class PreparedPairs:
    """What was written.

    Attributes:
        pairs: in the data set.
        tokens: of prompts and answers, each once.
        longest: tokens of the longest prompt with its longer answer.
        alike: pairs whose answers are the same, which were left out.
        too_long: pairs longer than ``max_length``, which were left out.
    """

    pairs: int = 0
    tokens: int = 0
    longest: int = 0
    alike: int = 0
    too_long: int = 0


def pair_outputs(prefix: Path) -> list[Path]:
    """The files that ``prepare_pairs`` writes."""
    return [prefix.with_name(prefix.name + end) for end in (".bin", ".idx", ".json")]


def prepare_pairs(
    inputs: Sequence[Path], prefix: Path, tokenizer: Any, encoding: PairEncoding
) -> PreparedPairs:
    """Write ``prefix``.bin, .idx, and .json with sizes and settings.

    Args:
        inputs: JSON Lines files.
        tokenizer: of ``document_ids.load_tokenizer``.
        encoding: how.

    Raises:
        RecipeError: an output that exists or cannot be written, a line that holds no pair, or files
            without any. Nothing is left then.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    refuse_existing(pair_outputs(prefix))
    done = PreparedPairs()
    encoder = _PairEncoder(tokenizer, encoding)
    with new_files(prefix, _LAST) as folder:
        largest = max(tokenizer.get_vocab().values())
        dtype = DType.optimal_dtype(max(largest + 1, encoding.rows or 0))
        builder = IndexedDatasetBuilder(str(folder / f"{prefix.name}.bin"), dtype=dtype)
        for lines in read_lines(inputs):
            for parts in _kept(encoder.pairs(lines), encoding, done):
                builder.add_document(np.concatenate(parts), [len(part) for part in parts])
        if not done.pairs:
            left = done.alike + done.too_long
            what = f"all of the {left} pairs were left out" if left else "no pair is in these files"
            raise RecipeError(f"--input: {what}; name others", "--input")
        builder.finalize(str(folder / f"{prefix.name}.idx"))
        record = {**asdict(done), "inputs": [str(path) for path in inputs]}
        record |= {"tokenizer": tokenizer.name_or_path, **asdict(encoding)}
        text = json.dumps(record, indent=1) + "\n"
        (folder / f"{prefix.name}.json").write_text(text, "utf-8")
    return done


def _kept(
    pairs: Iterable[Answered], encoding: PairEncoding, done: PreparedPairs
) -> Iterable[Answered]:
    """The pairs that are written, which are counted, as are those that are not."""
    for prompt, chosen, rejected in pairs:
        length = len(prompt) + max(len(chosen), len(rejected))
        if np.array_equal(chosen, rejected):
            done.alike += 1
        elif encoding.max_length is not None and length > encoding.max_length:
            done.too_long += 1
        else:
            done.pairs += 1
            done.tokens += len(prompt) + len(chosen) + len(rejected)
            done.longest = max(done.longest, length)
            yield prompt, chosen, rejected


class _PairEncoder:
    """Makes ids of lines."""

    def __init__(self, tokenizer: Any, encoding: PairEncoding) -> None:
        self._tokenizer = tokenizer
        self._how = encoding
        known = max(tokenizer.get_vocab().values()) + 1
        self._below = known if encoding.rows is None else encoding.rows

    def pairs(self, lines: Lines) -> Iterable[Answered]:
        """The pairs of some lines.

        Raises:
            RecipeError: names file, line and key.
        """
        for number, content in lines.objects():
            try:
                yield self._pair(content)
            except _Unfit as problem:
                raise lines.error(number, *problem.args) from None

    def _pair(self, content: Mapping[str, Any]) -> Answered:
        prompt_key, *answer_keys = self._how.fields
        for key in answer_keys:
            if key not in content:
                known = listing(map(show, content), 6) or "(none)"
                remedy = f"name its keys with --fields PROMPT CHOSEN REJECTED: {known}"
                raise _Unfit(f"has no {show(key)}", remedy)
        answers = [content[key] for key in answer_keys]
        prompt = content.get(prompt_key)
        kinds = {_kind(key, content[key]) for key in answer_keys}
        if prompt is None and kinds == {"messages"}:
            prompt, answers = _common_messages(answers)
        if not prompt:
            raise _Unfit(
                f"has no {show(prompt_key)}, behind which both answers stand",
                "correct it, or name the key with --fields PROMPT CHOSEN REJECTED",
            )
        kinds.add(_kind(prompt_key, prompt))
        if len(kinds) > 1:
            raise _Unfit(f"is of {' and '.join(sorted(kinds))}", "write prompt and answers alike")
        made = self._by_kind(kinds.pop(), prompt, answers)
        for key, ids in zip(self._how.fields, made, strict=True):
            self._check(key, ids)
        return tuple(np.array(ids, np.int64) for ids in made)  # type: ignore[return-value]

    def _by_kind(self, kind: str, prompt: Any, answers: Sequence[Any]) -> list[list[int]]:
        end = [] if self._how.end is None else [self._how.end]
        if kind == "ids":
            return [prompt, *answers]
        if kind == "text":
            first = self._ids(prompt, special=self._how.special_tokens)
            others = [self._ids(answer, special=False) + end for answer in answers]
        else:
            first, others = self._of_messages(prompt, answers)
        return [first, *others]

    def _of_messages(
        self, prompt: Sequence[Any], answers: Sequence[Any]
    ) -> tuple[list[int], list[list[int]]]:
        asked = self._templated(prompt, answered=False)
        others = []
        for answer in answers:
            whole = self._templated([*prompt, *answer], answered=True)
            if not whole.startswith(asked):
                raise _Unfit(
                    "becomes another prompt with an answer than without one by the tokenizer's "
                    "chat template",
                    "write prompt and answers as texts, as they are to be read",
                )
            others.append(self._ids(whole[len(asked) :], special=False))
        return self._ids(asked, special=False), others

    def _templated(self, messages: Sequence[Any], *, answered: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise _Unfit(
                "has chat messages, and the tokenizer has no chat template",
                "write texts, or name a tokenizer with one",
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=not answered
                )
            )
        except Exception as problem:  # whatever a template raises
            raise _Unfit(f"does not fit the chat template ({problem})", "correct it") from None

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if not is_whole(text):
            raise _Unfit("has text with half a character (a lone surrogate)", "correct it")
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _check(self, key: str, ids: Sequence[int]) -> None:
        if not len(ids):
            raise _Unfit(f"has no token under {show(key)}", "correct it, or leave it out")
        bad = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= bad < self._below:
            whose = "tokenizer" if self._how.rows is None else "model of its folder"
            raise _Unfit(
                f"has id {bad} under {show(key)}, and the {whose} has ids below {self._below}",
                "use the tokenizer that belongs to the model",
            )


class _Unfit(Exception):
    """What is wrong with a line, and the remedy."""


def _kind(key: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        if all(isinstance(x, int) and not isinstance(x, bool) for x in value):
            return "ids"
        if all(isinstance(x, dict) for x in value):
            return "messages"
    raise _Unfit(
        f"has {show(value)} under {show(key)}", "it takes a text, a list of ids or chat messages"
    )


def _common_messages(answers: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Sequence[Any]]]:
    """The messages that both conversations begin with, and what is left of each."""
    chosen, rejected = answers
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        common -= 1  # the same conversation twice, which is left out later
    return list(chosen[:common]), [chosen[common:], rejected[common:]]
