"""Measuring gain and forgetting: in a run that only evaluates, or beside training.

Both measure in Megatron's own evaluation, so that one forward pass serves its validation loss and
ours, at any parallel layout. What changes is the text: every evaluation reads the same
(``data.held_out``). With ``--skip-train`` nothing is frozen, the teachers are loaded, and the only
loss is the measured cross-entropy.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.held_out import HeldOutText
from megatron_moe_inject.evaluation.evaluation import (
    GENERAL_CLASS,
    Evaluation,
    Provenance,
    build_class,
)
from megatron_moe_inject.evaluation.evaluation_file import LIST, append_line, read_list, write_list
from megatron_moe_inject.evaluation.gate import judge
from megatron_moe_inject.evaluation.measurement import Collected, Measurement
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.lineage import Lineage
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.host.student_load import Origin
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.schema import Recipe

_NO_DATA = (
    "{}: there is no validation data to measure on; set --eval-iters above 0, and a --split or "
    "--valid-data-path that has some"
)
_ONE_PASS = {
    "full_validation": "evaluates as often as the fullest rank, which counts text twice",
    "multiple_validation_sets": "yields samples that do not say which dataset they are from",
    "sft": "packs documents into one sequence",
    "dataloader_inter_document_masking": "packs documents into one sequence",
    "hybrid_context_parallel": "regroups the micro-batches of a step",
    "perform_rl_step": "replaces Megatron's evaluation",
}


class Evaluator:
    """Measures Megatron's evaluations on held-out text that stays the same.

    Args:
        recipe: names the classes and the teachers.
        args: Megatron's arguments.
        facts: the student.
        valid_vocab_size: ids of the student's tokenizer.
        reason: what messages name as the reason, such as ``evaluation``.

    Attributes:
        origin: what was loaded, to be set before anything is measured.

    Raises:
        RecipeError: there is nothing to evaluate on, or an option that would not read it once.
    """

    def __init__(
        self,
        recipe: Recipe,
        args: Namespace,
        facts: StudentFacts,
        valid_vocab_size: int,
        reason: str = "evaluation",
    ) -> None:
        self.recipe = recipe
        self.args = args
        self._facts = facts
        self._valid_vocab_size = valid_vocab_size
        for name, problem in _ONE_PASS.items():
            if getattr(args, name, None):
                flag = "--" + name.replace("_", "-")
                raise RecipeError(f"{flag}: {problem}; remove it, or measure nothing ({reason})")
        if args.dataloader_type == "external":
            raise RecipeError(
                f"--dataloader-type external: cannot be read from its beginning again; use "
                f"Megatron's loaders, or measure nothing ({reason})"
            )
        if not args.eval_iters or not (facts.mock_data or facts.data_paths.get("valid")):
            raise RecipeError(_NO_DATA.format(reason))
        self.origin = Origin()
        self.samples = args.eval_iters * args.eval_global_batch_size
        self.text = HeldOutText(self.samples)
        self._names = {label: domain.name for label, domain in enumerate(recipe.domains)}
        self._names[GENERAL] = GENERAL_CLASS
        self._labels = split_labels(recipe, facts, "valid")
        self.measurement: Measurement | None = None

    def prepare(self, chunk: torch.nn.Module) -> None:
        """Make the measurement of this rank, which has this chunk of the built student."""
        groups = compat.process_groups(chunk)
        self._device = next(chunk.parameters()).device
        self.measurement = Measurement(
            self._names,
            sorted(set(self._labels)),
            [label for label, domain in enumerate(self.recipe.domains) if domain.teacher],
            tp_group=groups.tp,
            cp_group=groups.cp,
            valid_vocab_size=self._valid_vocab_size,
            text_length=compat.text_length(),
        )

    def evaluate(self, stock: Callable, *args, **kwargs) -> Any:
        """Megatron's ``evaluate_and_print_results``, measured where it reads the held-out text.

        Training goes on with the random numbers that it would have had without.

        Collectives: one all-reduce of one number over the whole world, and where it is measured
        those of ``Measurement.collect`` and ``record``.
        """
        given = compat.bound_arguments(stock, args, kwargs)
        if not self._on_any_rank(self.text.restart(given["data_iterator"])):
            return self.other_data(lambda: stock(*args, **kwargs))
        with self.measurement.running(), untouched_rng(self._device):
            result = stock(*args, **kwargs)
            collected = self.measurement.collect()
        if sum(map(len, collected.rows.values())) == self.samples:  # else the time was up
            self.measured(collected, self.iteration(given["iteration"]))
        return result

    def measured(self, collected: Collected, iteration: int) -> None:
        """Make an evaluation of what was measured; called on every rank with the same."""
        self.record(self._evaluation(collected, iteration))

    def _on_any_rank(self, mine: bool) -> bool:
        flag = torch.tensor([int(mine)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def iteration(self, told: int) -> int:
        """Optimiser steps that the student has taken, where Megatron's loop tells this number."""
        return told

    def other_data(self, evaluate: Callable[[], Any]) -> Any:
        """An evaluation on other text, such as the test data."""
        return evaluate()

    def record(self, evaluation: Evaluation) -> None:
        """Do something with what was measured; called on every rank with the same."""
        raise NotImplementedError

    def _evaluation(self, collected: Collected, iteration: int) -> Evaluation:
        args = self.args
        model = args.tokenizer_model or args.vocab_file or args.vocab_size or ""
        provenance = Provenance(
            checkpoint=self.origin.checkpoint,
            checkpoint_iteration=self.origin.iteration,
            checkpoint_sha256=self.origin.sha256,
            iteration=iteration,
            megatron_version=compat.megatron_version(),
            tokenizer=f"{args.tokenizer_type} {model}".strip(),
            sequence_length=args.seq_length,
            evaluated_batches=args.eval_iters,
            batch_size=args.eval_global_batch_size,
            teachers={name: spec.source for name, spec in self.recipe.teachers.items()},
        )
        classes = {}
        for label, name in self._names.items():
            if label in collected.rows:
                teacher = None if label == GENERAL else self.recipe.domains[label].taught_by
                classes[name] = build_class(
                    collected.rows[label], collected.bins[label], teacher, self._data(label)
                )
        for name, found in classes.items():
            for key, values in found.sums.items():
                if not values.sum() < float("inf"):
                    raise RecipeError(
                        f"evaluation: {key} of {name} is not finite at iteration {iteration}; the "
                        "student, a teacher, or a label beyond the vocabulary gave it"
                    )
        return Evaluation(provenance, classes)

    def _data(self, label: int) -> list[str]:
        if self._facts.mock_data:
            return ["(mock data)"]
        entries = self._facts.data_paths["valid"]
        return [entry for entry, own in zip(entries, self._labels, strict=True) if own == label]


class TrainingEvaluator(Evaluator):
    """Measures before the first step and whenever Megatron evaluates, into a list on disk.

    The list has one line for an iteration and belongs to one injection. A run that goes on, from
    whatever folder, goes on with it: lines beyond the iteration that it resumes from are dropped,
    since they will be measured again.

    Args:
        arguments: as for ``Evaluator``.
    """

    def __init__(
        self, recipe: Recipe, args: Namespace, facts: StudentFacts, valid_vocab_size: int
    ) -> None:
        super().__init__(recipe, args, facts, valid_vocab_size)
        named = recipe.evaluation.file
        if named is None and not args.save:
            raise RecipeError(
                "evaluation.file: missing, and there is no --save folder to write to; name a file"
            )
        self.path = Path(named) if named is not None else Path(args.save) / LIST
        if named is not None and not self.path.absolute().parent.is_dir():
            folder = self.path.absolute().parent
            raise RecipeError(f"evaluation.file: {folder} is no folder; create it first")
        self._seen: set[int] = set()
        self._text: str | None = None
        self._training = False
        self._failed: RecipeError | None = None

    def adopt(self, lineage: Lineage) -> str | None:
        """Find the list of the injection that goes on; a remark for the plan where there is none.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: what may be it is damaged.
        """
        self._lineage = lineage
        self._source = on_first_rank(lambda: lineage.find(self.path, LIST))
        if lineage.begins or self._source is not None:
            return None
        where = "was not measured from its beginning on"
        if lineage.was_kept(LIST):
            where = f"has a list that is in none of {lineage.sought(self.path, LIST)}"
        return (
            f"evaluation: the injection that goes on from {lineage.checkpoint} {where}; gains are "
            "counted from here"
        )

    def before_training(self, train: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Measure with what ``train`` will be called with, and ask the teacher gate.

        Collectives: those of ``on_first_rank`` and of an evaluation.

        Raises:
            RecipeError: on every rank: no validation data, the list cannot be continued, its
                lines are of other text, or a teacher is no better than the student.
        """
        if not self._on_any_rank(self.text.exists):
            raise RecipeError(_NO_DATA.format("evaluation"))
        self._seen, first = on_first_rank(self._continued)
        self._lineage.keep(LIST, self.path)
        self._text = None if first is None else first.text()
        self._measured: Evaluation | None = None
        asks = self._lineage.begins and self.recipe.evaluation.gate
        with self.measurement.comparing_prefix() if asks else contextlib.nullcontext():
            compat.evaluate_before_training(train, args, kwargs)
        self._training = True
        if self._measured is not None:
            lineage = self._lineage
            said, verdict = judge(
                self._measured,
                self.recipe,
                begins=lineage.begins,
                verdict=lineage.verdict,
                # With an identity the checkpoint has a verdict, if the beginning was measured.
                first=None if lineage.identity else first,
            )
            lineage.judge(verdict)
            if said and dist.get_rank() == 0:
                print("\n".join(said), flush=True)
        elif self._lineage.begins and self.recipe.evaluation.gate:
            raise RecipeError(
                "evaluation: the held-out text was not read to the end, so that no teacher was "
                "compared with the student; give --exit-duration-in-mins enough time"
            )
        self._measured = None

    def _continued(self) -> tuple[set[int], Evaluation | None]:
        """Iterations that the list keeps, and its first line."""
        now = compat.optimizer_steps(self.args)
        found = [] if self._source is None else read_list(self._source)
        found = [e for e in found if e.provenance.iteration <= now]
        moved = self._lineage.make_room(self.path)
        if moved is not None:
            print(f"evaluation: {moved}", flush=True)
        write_list(self.path, found)
        return {e.provenance.iteration for e in found}, found[0] if found else None

    def measured(self, collected: Collected, iteration: int) -> None:
        """Make a line of what was measured. In training, what is wrong with it is said, and is the
        run's error when its last checkpoint is saved (``finish``)."""
        try:
            super().measured(collected, iteration)
        except RecipeError as error:
            if not self._training:
                raise
            self._failed = self._failed or error
            if dist.get_rank() == 0:
                print(f"megatron_moe_inject: warning: {error}", flush=True)

    def finish(self) -> None:
        """The first error of an evaluation in training; found on every rank alike.

        Raises:
            RecipeError: there was one.
        """
        if self._failed is not None:
            raise self._failed

    def record(self, evaluation: Evaluation) -> None:
        """Add a line where the iteration has none yet.

        Collectives: before training those of ``agree``; none later, when a full disk is worth a
        warning and not the run.
        """
        provenance = replace(evaluation.provenance, injection=self._lineage.identity)
        evaluation = self._measured = replace(evaluation, provenance=provenance)
        if self._text is not None and evaluation.text() != self._text:
            raise RecipeError(
                f"evaluation: {self.path} was measured on other text than this run reads; keep "
                "--eval-iters, --global-batch-size, --seq-length, --seed, --split and the data, or "
                "name another evaluation.file"
            )
        self._text = evaluation.text()
        iteration = evaluation.provenance.iteration
        if iteration in self._seen:
            return
        self._seen.add(iteration)
        if not self._training:
            on_first_rank(lambda: append_line(self.path, evaluation))
        elif dist.get_rank() == 0:
            try:
                append_line(self.path, evaluation)
            except RecipeError as error:
                print(f"megatron_moe_inject: warning: evaluation: {error}", flush=True)


def describe(evaluation: Evaluation) -> str:
    """An evaluation as a table, a line for each class."""
    from megatron_moe_inject.host.text import (
        table,
    )

    shown = {
        "tokens": "{:,d}", "loss": "{:.4f}", "bits_per_byte": "{:.4f}", "accuracy": "{:.4f}",
        "calibration_error": "{:.4f}", "teacher_loss": "{:.4f}", "teacher_kl": "{:.4f}",
        "teacher_agreement": "{:.4f}",
    }  # fmt: skip
    rows = [("class", *(name.replace("_", " ") for name in shown))]
    for name, found in evaluation.classes.items():
        summary = found.summary()
        cells = ["-" if summary[k] is None else f.format(summary[k]) for k, f in shown.items()]
        rows.append((name, *cells))
    lines = table(rows, right=range(1, len(rows[0])))
    if not any("bytes" in found.sums for found in evaluation.classes.values()):
        lines.append("(no bits per byte: this tokenizer has no text)")
    return "\n".join(lines)
