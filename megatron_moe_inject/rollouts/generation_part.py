"""A run that only writes rollouts: the student of a training command goes on from prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.lineage import identity_stored
from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.rollouts.file_format import Writer
from megatron_moe_inject.rollouts.identity import writer_of_folder
from megatron_moe_inject.rollouts.parts import (
    Completion,
    Part,
    missing,
    parts_of,
    say_begin,
    say_done,
    write_part,
)
from megatron_moe_inject.rollouts.prompts import Prompt, checksum, read_prompts
from megatron_moe_inject.rollouts.settings import Asked, told


class GenerationPart(RunPart):
    """Writes when Megatron has built and loaded the student, and has nothing else to do."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._asked = asked = Asked.of_plain(run.args.inject_rollouts)
        checkpoint = checkpoint_to_load(run.args)
        if checkpoint is None:
            raise RecipeError(
                "--load: missing; name the folder that training saves to, whose student writes"
            )
        if asked.checkpoint is not None:
            self._writer = writer_of_folder(asked.checkpoint, asked.step)
        else:
            identity = identity_stored(checkpoint.arguments())
            self._writer = Writer(identity, checkpoint.iteration)
            self.writes_about = identity is None  # then its weights are what it is known by
        end = compat.end_of_text()
        if end is not None and end not in asked.sampling.stop:
            sampling = replace(asked.sampling, stop=(*asked.sampling.stop, end))
            self._asked = asked = replace(asked, sampling=sampling)
        self._prompts: list[Prompt] = read_prompts(asked, compat.tokenize(), run.valid_vocab_size)
        room = run.args.seq_length
        long = next((prompt for prompt in self._prompts if len(prompt.ids) >= room), None)
        if long is not None:
            raise RecipeError(
                f"--prompts: the prompt of document or line {long.source} has {len(long.ids)} "
                f"tokens, which leaves none of --seq-length {room}; shorten it (--prompt-tokens)"
            )
        self._student: BuiltStudent | None = None
        self.around = {"build_train_valid_test_data_iterators": self._no_data}

    def _no_data(self, stock: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """No data are read, and nothing is evaluated."""
        run_args = self._run.args
        run_args.do_train = run_args.do_valid = run_args.do_test = False
        return None, None, None

    def try_outputs(self) -> None:
        """The first rank sees whether files can be written."""
        if dist.get_rank() == 0:
            try_file(self._asked.folder / "tried", "--output")

    def attach(self, student: BuiltStudent) -> None:
        """Keep the student until it writes. No collective."""
        self._student = student

    def finish(self) -> str:
        """Write all files that are not there.

        Collectives: those of ``on_first_rank``, and of ``Generator.complete`` for each batch; those
        of ``agree`` for each round of files.

        Raises:
            RecipeError: on every rank: a file cannot be written, or something else has its name.
        """
        from megatron_moe_inject.rollouts.generate import Generator

        assert self._student is not None, "Megatron has built the student"
        run, asked, student = self._run, self._asked, self._student
        begin = time.monotonic()
        writer = self._writer
        if self.writes_about:
            writer = replace(writer, sha256=run.origin.sha256)
        settings = told(asked, checksum(self._prompts), "megatron")
        parts = parts_of(asked.folder, self._prompts, asked.per_file, writer, settings)
        todo = on_first_rank(lambda: missing(parts, writer))
        if dist.get_rank() == 0:
            say_begin(todo, parts)
        lanes, lane = student.groups.dp.size(), student.groups.dp.rank()
        generator = Generator(student, run.args, run.valid_vocab_size, cache=asked.cache)
        writes = student.last is not None and student.groups.tp.rank() == 0
        tokens = 0
        for start in range(0, len(todo), lanes):
            own = todo[start + lane] if start + lane < len(todo) else None
            part = None if own is None else parts[own]
            completions = self._completed(generator, part)
            tokens += sum(map(len, completions))

            def write(part: Part | None = part, done: Any = completions) -> None:
                if part is not None and writes:
                    write_part(part, [Completion(ids) for ids in done], writer, settings)

            agree(write)
            if dist.get_rank() == 0:
                done = min(start + lanes, len(todo))
                say_done(done, len(todo), time.monotonic() - begin)
        there = len(parts) - len(todo)
        earlier = f", {there} were there" if there else ""
        return (
            f"rollouts: {len(todo)} files written to {asked.folder}{earlier}; "
            f"{len(self._prompts)} prompts, iteration {writer.iteration}, "
            f"{time.monotonic() - begin:.1f} s"
        )

    def _completed(self, generator: Any, part: Part | None) -> list[list[int]]:
        """Of one file; ranks without one go along."""
        asked = self._asked
        found: list[list[int]] = []
        prompts: Sequence[Prompt] = () if part is None else part.prompts
        for start in range(0, asked.per_file, asked.batch):
            own = prompts[start : start + asked.batch]
            found += generator.complete(
                [prompt.ids for prompt in own],
                [prompt.number for prompt in own],
                asked.sampling,
                asked.batch,
            )
        return found
