"""``moe-inject store-teacher`` of a served teacher: what servers say, as rows of a store.

Documents are cut into the windows that a model would read (``store.produce``), and each window is a
text, with the token behind it, so that the servers say how likely that was. Some windows are asked
for ahead of the one that is waited for, as many as the servers work on at once and as many again.

How a server rounds depends on what it does at the same time, so a store of one does not have the
same bytes twice, and an interrupted one goes on with other roundings. Log-probabilities at other
temperatures than 1 cannot be known unless all ids are asked for.

Shapes: t tokens of a window, k ids of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.served.answers import Answers, ServerFailure
from megatron_moe_inject.teachers.served.client import api_key
from megatron_moe_inject.teachers.served.pool import log_probs_of_text
from megatron_moe_inject.teachers.served.probe import Tokenize, probe
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.served.rules import addresses_of
from megatron_moe_inject.teachers.served.step_teacher import of_student
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.manifest import StorePlan
from megatron_moe_inject.teachers.store.produce import Window, windows
from megatron_moe_inject.teachers.store.row_format import RowFormat, Rows
from megatron_moe_inject.teachers.store.writer import Content


class ServedRows:
    """Says what servers think of documents, as ``store.produce.Producer`` does of a model.

    Args:
        answers: asks them.
        plan: what is kept.
        at_once: windows that are asked for ahead.
        failure: makes the error where servers fail.
    """

    def __init__(
        self,
        answers: Answers,
        plan: StorePlan,
        at_once: int,
        failure: Callable[[str, str], Exception],
    ) -> None:
        self._answers = answers
        self._plan = plan
        layout = plan.row_format
        assert isinstance(layout, RowFormat), "states were refused, and chunks have other rows"
        self._layout = layout
        self._at_once = at_once
        self._failure = failure

    def rows(
        self, tokens: np.ndarray, lengths: Sequence[int], *, data: int = 0, first_token: int = 0
    ) -> Content:
        """Rows of some documents, in order; arguments as of ``Producer.rows``.

        Raises:
            RecipeError: the servers have failed. What was written before is kept.
        """
        count = sum(max(0, length - 1) for length in lengths)
        content = np.zeros((count, self._layout.widest), np.uint8)
        counts = np.zeros(count, np.int64)
        for window, answer in self._said(tokens, lengths):
            own = slice(window.row, window.row + window.end - window.first)
            packed, ids = self._layout.encode(self._rows(tokens, window, answer))
            content[own], counts[own] = packed.numpy(), ids.numpy()
        return content, counts

    def _said(self, tokens: np.ndarray, lengths: Sequence[int]) -> Iterator[tuple[Window, Answer]]:
        coming: deque[tuple[Window, np.ndarray]] = deque()
        every = windows(lengths, self._plan.context, self._plan.overlap)
        while True:
            while len(coming) < self._at_once and (window := next(every, None)) is not None:
                text = tokens[window.begin : window.end + 1].astype(np.int32)
                self._answers.hint([text])
                coming.append((window, text))
            if not coming:
                return
            window, text = coming.popleft()
            try:
                (answer,) = self._answers.fetch([text])
            except ServerFailure as failure:
                raise self._failure(
                    f"no longer says what is needed: {failure}",
                    "see to the servers; the same command goes on with what is missing",
                ) from None
            skip = window.first - window.begin
            yield window, Answer(answer.ids[skip:], answer.log_probs[skip:])

    def _rows(self, tokens: np.ndarray, window: Window, answer: Answer) -> Rows:
        """The k most likely ids of each token of a window that it is asked about."""
        plan, answer = self._plan, of_student(answer, self._plan.vocab_size)
        label = log_probs_of_text(answer, tokens[window.first : window.end + 1])
        ids, log_probs = (part[:, : plan.slots] for part in answer)
        probs = np.exp(log_probs.astype(np.float64))
        kept = ids >= 0
        if plan.mass is not None:
            kept &= probs.cumsum(1) - probs < plan.mass
        whole = plan.slots >= plan.vocab_size
        rest = np.maximum(1 - (probs * kept).sum(1), 0 if whole else np.finfo(np.float32).tiny)
        with np.errstate(divide="ignore"):
            log_rest = np.where(whole & kept.all(1), -np.inf, np.log(rest))
        ordered = np.where(kept, ids, np.iinfo(np.int32).max)
        order = np.argsort(ordered, 1, kind="stable")
        used = np.take_along_axis(kept, order, 1)
        return Rows(
            torch.from_numpy(tokens[window.first : window.end]),
            torch.from_numpy(np.where(used, np.take_along_axis(ids, order, 1), -1)).long(),
            torch.from_numpy(np.where(used, np.take_along_axis(log_probs, order, 1), -np.inf)),
            torch.from_numpy(log_rest.astype(np.float32))[:, None].repeat(
                1, len(plan.temperatures)
            ),
            torch.from_numpy(label) if plan.labels else None,
        )


class ServedStore:
    """The servers of a teacher whose words a store is to keep; asked what they are when it is made.

    Args:
        recipe: with the teacher.
        name: its key.
        args: Megatron's flags.
        top: ids of each token.
        length: the longest text.
        vocab_size: ids of the student.

    Attributes:
        architecture, told: see ``sources.ToldForStore``.

    Raises:
        RecipeError: what does not fit.
    """

    def __init__(
        self, recipe: Recipe, name: str, args: Namespace, top: int, length: int, vocab_size: int
    ) -> None:
        self._spec = recipe.teachers[name].server
        self._name = name
        source = parse_source(name, recipe.teachers[name].source)
        self._failure = source.error
        found = probe(
            name,
            dataclasses.replace(self._spec, top=top),
            addresses_of(recipe, name),
            api_key(self._spec.key_from, f"teachers.{name}.server.key_from"),
            length=length,
            vocab_size=vocab_size,
            tokenize=_tokenize(args),
            failure=source.error,
        )
        self._settings, self.told = found.settings, found.told
        self.architecture = f"{found.settings.model} of {found.settings.protocol}"

    def check(self, plan: StorePlan) -> None:
        """Refuse states, drawn ids, and temperatures other than 1 without all ids."""
        for flag, asked in (("--states", plan.states is not None), ("--draw", plan.drawn)):
            if asked:
                raise RecipeError(f"{flag}: servers give the most likely ids alone; remove it")
        if plan.temperatures != [1.0] and plan.slots < plan.vocab_size:
            raise fail(
                "--temperatures", plan.temperatures[-1],
                f"cannot be had from {plan.slots} ids at temperature 1, which is what servers give",
                "write --temperatures 1, and distil at that",
            )  # fmt: skip

    @contextlib.contextmanager
    def writing(self, plan: StorePlan) -> Iterator[ServedRows]:
        """What says the rows, by a process of its own that ends with this."""
        answers = Answers(self._settings, lambda text: print(f"{self._name}: {text}", flush=True))
        at_once = 2 * self._spec.concurrent * len(self._settings.addresses)
        try:
            yield ServedRows(answers, plan, at_once, self._failure)
        finally:
            answers.close()


def _tokenize(args: Namespace) -> Tokenize | None:
    """Ids of a text by the flags' tokenizer, where transformers builds it from files here."""
    if getattr(args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_model)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
