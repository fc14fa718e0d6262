"""The servers of a run: asked what they are before the student is built, then for every step."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import HostWorld, agree, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.text import memory_text
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.server import ServerSpec
from megatron_moe_inject.teachers.align.start import teacher_tokenizer, tokenizer_path
from megatron_moe_inject.teachers.fit import taught_domains
from megatron_moe_inject.teachers.part import TeacherInfos
from megatron_moe_inject.teachers.served.answers import Answers
from megatron_moe_inject.teachers.served.chunks import reader_of
from megatron_moe_inject.teachers.served.client import api_key
from megatron_moe_inject.teachers.served.probe import Probed, Tokenize, probe
from megatron_moe_inject.teachers.served.rules import (
    addresses_of,
    check_temperature,
    ids_asked,
    served_names,
)
from megatron_moe_inject.teachers.served.step_answers import Asked, StepAnswers
from megatron_moe_inject.teachers.served.step_teacher import AnswersOfStep
from megatron_moe_inject.teachers.sources import parse_source

_MARGIN = 900.0
"""Seconds that ranks wait longer than servers are asked for."""
BYTES = 8
"""Of an id and its log-probability."""


def check_reading(recipe: Recipe, args: Namespace) -> None:
    """Refuse what a server cannot read as a model beside the student would.

    Raises:
        RecipeError: names the flag and the teacher.
    """
    names = [name for name in served_names(recipe) if not recipe.teachers[name].aligned]
    for flag in ("reset_position_ids", "reset_attention_mask") if names else ():
        if getattr(args, flag, False) and packing_flag(args) is None:
            raise RecipeError(
                f"--{flag.replace('_', '-')}: documents of a window are to be read apart, and "
                f"teacher {names[0]} is a server, which reads the window as one "
                "text; use --dataloader-inter-document-masking, or remove it"
            )


def work_of_step(recipe: Recipe, name: str, args: Namespace) -> str:
    """What a step asks of a teacher's servers, in one line; as far as flags tell, at most."""
    spec = recipe.teachers[name].server
    if recipe.teachers[name].aligned:
        return _chunks_of_step(name, spec, args)
    batch, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    if not batch or not length:
        return f"teacher {name}: asked for {spec.top} ids of each token"
    size = batch * length * (spec.top + 1) * BYTES
    whole = "a text is a document of a sample" if packing_flag(args) else "a text is a sample"
    return (
        f"teacher {name}: at most {batch} requests a step ({whole}, {batch * length:,} tokens in "
        f"all), answers of {memory_text(size)} in memory, as JSON about {_JSON[spec.protocol]} "
        f"times that; {spec.ahead} steps ahead"
    )


def _chunks_of_step(name: str, spec: ServerSpec, args: Namespace) -> str:
    """The same of a teacher with a tokenizer of its own."""
    batch, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    if not batch or not length:
        return f"teacher {name}: asked for the log-probabilities of the text as its own tokens"
    apart = packing_flag(args) is not None or getattr(args, "reset_attention_mask", False)
    texts = "each document of a sample is a text" if apart else f"at most {batch} texts"
    return (
        f"teacher {name}: {texts}, of {batch * length:,} of the student's tokens a step as the "
        f"teacher's own, of each of which {BYTES} bytes in memory, as JSON about "
        f"{_OWN_JSON[spec.protocol]}; {spec.ahead} steps ahead"
    )


_OWN_JSON = {"auto": "34 (SGLang) to 85 (vLLM)", "sglang": "34", "vllm": "85"}
_JSON = {"auto": "1.4 (SGLang) to 9 (vLLM)", "sglang": "1.4", "vllm": "9"}


def probed(recipe: Recipe, args: Namespace, name: str, vocab_size: int) -> Probed:
    """Ask the servers of a teacher what they are. No collective.

    Raises:
        RecipeError: what does not fit.
    """
    teacher = recipe.teachers[name]
    source, spec = parse_source(name, teacher.source), teacher.server
    tokenize: Tokenize | None = compat.tokenize()
    if teacher.aligned:
        own = teacher_tokenizer(source, tokenizer_path(source, teacher))
        tokenize, vocab_size = own.one, len(own.pieces)
    return probe(
        name,
        dataclasses.replace(spec, top=ids_asked(teacher)),
        addresses_of(recipe, name),
        api_key(spec.key_from, f"teachers.{name}.server.key_from"),
        length=args.seq_length + 1,
        vocab_size=vocab_size,
        tokenize=tokenize,
        failure=source.error,
        own_files=spec.tokenizer,
    )


class ServedPart(RunPart):
    """Provides ``AnswersOfStep``, and takes part in steps before all others."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._names = served_names(run.recipe)
        check_reading(run.recipe, run.args)
        for name in self._names:
            check_temperature(run.recipe, name, run.valid_vocab_size)
        self._probed: Mapping[str, Probed] = {}
        self._step: StepAnswers | None = None
        self._askers: list[Answers] = []
        self.around = {"build_pretraining_data_loader": self._loader}

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Ask the servers what they are, on the first rank.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: a server that is not there, or is not what is needed.
        """
        run = self._run
        self._probed = on_first_rank(
            lambda: {
                name: probed(run.recipe, run.args, name, run.valid_vocab_size)
                for name in self._names
            }
        )
        for name, found in self._probed.items():
            run.warnings.append(found.told)
            run.warnings.append(work_of_step(run.recipe, name, run.args))
            run.warnings += in_the_clear(run.recipe, name)
        yield

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Be ready to ask, on the first of the ranks of the last stage that share a sequence.

        Collectives: that of ``HostWorld``, and those of ``agree``.

        Raises:
            RecipeError: on every rank: a key is missing on one.
        """
        run, recipe = self._run, self._run.recipe
        specs = [recipe.teachers[name].server for name in self._names]
        longest = sum(spec.patience + 2 * spec.timeout for spec in specs) + _MARGIN
        world = HostWorld(datetime.timedelta(seconds=longest))
        asks = student.last is not None and student.groups.tp_cp.rank() == 0
        asked = agree(lambda: self._asked() if asks else {})
        self._askers = [teacher.answers for teacher in asked.values()]
        answers = AnswersOfStep({name: found.longest for name, found in self._probed.items()})
        run.provide(AnswersOfStep, answers)
        self._step = StepAnswers(
            asked,
            world,
            answers,
            entries=run.labels["train"],
            vocab_size=run.valid_vocab_size,
            is_packed=packing_flag(run.args) is not None,
            device=student.device,
        )
        return self._step

    def _asked(self) -> dict[str, Asked]:
        domains = taught_domains(self._run.recipe)
        asked = {}
        for name in self._names:
            teacher, probed = self._run.recipe.teachers[name], self._probed[name]
            spec, reads = teacher.server, None
            if teacher.aligned:
                info = self._run.need(TeacherInfos).by_name[name]
                reads = reader_of(self._run, info, probed.longest)
            api_key(spec.key_from, f"teachers.{name}.server.key_from")
            answers = Answers(probed.settings, _say_of(name))
            source, slots = parse_source(name, teacher.source), probed.settings.top + 1
            asked[name] = Asked(answers, domains[name], slots, spec.ahead, source.error, reads)
        return asked

    def _loader(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Notice the loader of training data; it is built first. No collective."""
        from megatron.core.datasets.utils import Split

        loader = stock(*args, **kwargs)
        dataset = compat.bound_arguments(stock, args, kwargs)["dataset"]
        split = getattr(dataset, "split", getattr(dataset, "index_split", None))
        step = self._step
        if step is None or not self._askers or step.coming.follows or dataset is None:
            return loader
        if split == Split.train and not step.coming.follow(
            loader, self._run.args.dataloader_type == "cyclic"
        ):
            _say_of(", ".join(self._names))(
                "the order of this script's data cannot be foreseen, so that each step asks when "
                "it begins"
            )
        return loader

    def finish(self) -> str | None:
        """End the processes that ask."""
        for answers in self._askers:
            answers.close()
        return None


def in_the_clear(recipe: Recipe, name: str) -> list[str]:
    """A remark where a key is sent so that others can read it."""
    where = [str(address) for address in addresses_of(recipe, name) if address.in_the_clear]
    if recipe.teachers[name].server.key_from is None or not where:
        return []
    return [f"teacher {name}: its key goes to {where[0]} without encryption; use https://"]


def _say_of(name: str) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"megatron_moe_inject: teacher {name}: {text}", file=sys.stderr, flush=True)

    return say
