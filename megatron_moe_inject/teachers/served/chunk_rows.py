"""``moe-inject store-teacher`` of a served teacher with a tokenizer of its own: chunks as rows.

The texts are what a model would read of documents (``store.chunk_rows``). Some are asked for ahead
of the one that is waited for, as many as the servers work on at once and as many again. As with ids
(``store_rows``) a store of servers does not have the same bytes twice.

Shapes: r texts, t tokens of all texts that are predicted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator

import numpy as np
import torch

from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.align.reading import Reading
from megatron_moe_inject.teachers.align.scores import Scores
from megatron_moe_inject.teachers.align.start import teacher_tokenizer, tokenizer_path
from megatron_moe_inject.teachers.served.answers import Answers, ServerFailure
from megatron_moe_inject.teachers.served.chunks import check_served, scores_of, texts_to_ask
from megatron_moe_inject.teachers.served.client import api_key
from megatron_moe_inject.teachers.served.probe import probe
from megatron_moe_inject.teachers.served.rules import addresses_of, ids_asked
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.chunk_plan import document_reader
from megatron_moe_inject.teachers.store.chunk_rows import ChunkProducer
from megatron_moe_inject.teachers.store.manifest import StorePlan
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags


class AskedScores(Scores):
    """What servers say of texts, each asked for when it is its turn.

    Args:
        answers: asks them.
        at_once: texts that are asked for ahead.
        failure: makes the error where servers fail.
    """

    def __init__(
        self, answers: Answers, at_once: int, failure: Callable[[str, str], Exception]
    ) -> None:
        self._answers = answers
        self._at_once = at_once
        self._failure = failure

    def __call__(self, reading: Reading, most: int) -> torch.Tensor:
        """See ``Scores``; no collective.

        Raises:
            RecipeError: the servers have failed. What was written before is kept.
        """
        texts, said = texts_to_ask(reading), []
        self._answers.hint(texts[: self._at_once])
        for number, text in enumerate(texts):
            self._answers.hint(texts[number + self._at_once : number + self._at_once + 1])
            try:
                said += self._answers.fetch([text])
            except ServerFailure as failure:
                raise self._failure(
                    f"no longer says what is needed: {failure}",
                    "see to the servers; the same command goes on with what is missing",
                ) from None
        return torch.from_numpy(scores_of(texts, said).astype(np.float32))


class ServedChunkStore:
    """The servers of a teacher with a tokenizer of its own, whose words a store is to keep; asked
    what they are when it is made.

    Args:
        recipe: with the teacher.
        name: its key.
        args: Megatron's flags.
        context: of the teacher's tokens that are read at once, behind its prefix.

    Attributes:
        architecture, told: see ``sources.ToldForStore``.

    Raises:
        RecipeError: what does not fit.
    """

    def __init__(self, recipe: Recipe, name: str, args: Namespace, context: int) -> None:
        spec = recipe.teachers[name]
        flags = TokenizerFlags.from_args(args)
        source = parse_source(name, spec.source)
        info = check_served(name, spec, flags)
        own = teacher_tokenizer(source, tokenizer_path(source, spec))
        length = len(info.prefix) + context + 1
        found = probe(
            name,
            dataclasses.replace(spec.server, top=ids_asked(spec)),
            addresses_of(recipe, name),
            api_key(spec.server.key_from, f"teachers.{name}.server.key_from"),
            length=length,
            vocab_size=len(own.pieces),
            tokenize=own.one,
            failure=source.error,
            own_files=spec.server.tokenizer,
        )
        if found.longest is not None and found.longest < length:
            raise source.error(
                f"takes {found.longest} tokens, and {length} are read at once",
                f"write --context {found.longest - len(info.prefix) - 1}",
            )
        self._name, self._spec, self._failure = name, spec.server, source.error
        self._reader = document_reader(name, spec, info, flags)
        self._settings, self.told = found.settings, found.told
        self.architecture = f"{found.settings.model} of {found.settings.protocol}"

    def check(self, plan: StorePlan) -> None:
        """Nothing more: a plan of chunks needs what servers say."""

    @contextlib.contextmanager
    def writing(self, plan: StorePlan) -> Iterator[ChunkProducer]:
        """What says the rows, by a process of its own that ends with this."""
        answers = Answers(self._settings, lambda text: print(f"{self._name}: {text}", flush=True))
        at_once = 2 * self._spec.concurrent * len(self._settings.addresses)
        try:
            scores = AskedScores(answers, at_once, self._failure)
            yield ChunkProducer(self._reader, scores, plan, pass_tokens=1)
        finally:
            answers.close()
