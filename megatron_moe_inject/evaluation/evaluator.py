"""Measuring gain and forgetting: in a run that only evaluates, or beside training.

Both measure in Megatron's own evaluation, so that one forward pass serves its validation loss and
ours, at any parallel layout. What changes is the text: every evaluation reads the same
(``data.held_out``). With ``--skip-train`` nothing is frozen, the teachers are loaded, and the only
loss is the measured cross-entropy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.held_out import HeldOutText
from megatron_moe_inject.data.packed import check_packed
from megatron_moe_inject.data.validation_sets import ValidationSets
from megatron_moe_inject.evaluation.evaluation import (
    GENERAL_CLASS,
    Evaluation,
    Provenance,
    build_class,
)
from megatron_moe_inject.evaluation.measurement import Collected, Measurement
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.preference.held_out import HeldOutMeasurement
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.teachers.align.rules import aligned_domains
from megatron_moe_inject.teachers.step_teachers import ComparesPrefix

NO_DATA = (
    "{}: there is no validation data to measure on; set --eval-iters above 0, and a --split or "
    "--valid-data-path that has some"
)
_ONE_PASS = {
    "hybrid_context_parallel": "regroups the micro-batches of a step",
    "perform_rl_step": "replaces Megatron's evaluation",
}


class Evaluator(RunPart, ABC):
    """Measures Megatron's evaluations on held-out text that stays the same; provides
    ``Measurement``.

    Args:
        run: what its parts share.
        reason: what messages name as the reason, such as ``evaluation``.

    Raises:
        RecipeError: there is nothing to evaluate on, or an option that would not read it once.
    """

    writes_about = True
    measured_splits = ("valid",)

    def __init__(self, run: RunContext, reason: str = "evaluation") -> None:
        self._run = run
        self.recipe, self.args = recipe, args = run.recipe, run.args
        self.measured_for = reason
        facts = run.facts
        self._facts = facts
        for name, problem in _ONE_PASS.items():
            if getattr(args, name, None):
                flag = "--" + name.replace("_", "-")
                raise RecipeError(f"{flag}: {problem}; remove it, or measure nothing ({reason})")
        check_packed(args, run.largest_micro_batch, reason)
        if args.dataloader_type == "external":
            raise RecipeError(
                f"--dataloader-type external: cannot be read from its beginning again; use "
                f"Megatron's loaders, or measure nothing ({reason})"
            )
        sets = run.get(ValidationSets)
        reads = args.eval_iters or sets is not None
        if not reads or not (facts.mock_data or facts.data_paths.get("valid")):
            raise RecipeError(NO_DATA.format(reason))
        self._names = {label: domain.name for label, domain in enumerate(recipe.domains)}
        self._names[GENERAL] = GENERAL_CLASS
        self._labels = run.labels["valid"]
        self._whole_sets = sets is not None
        self.around = {"evaluate_and_print_results": self.evaluate}
        if sets is not None:
            self.text: HeldOutText | ValidationSets = sets
            return
        self.text = text = HeldOutText(args.eval_iters * args.eval_global_batch_size)
        self.around |= {
            "get_train_valid_test_num_samples": lambda stock, *a, **k: text.num_samples(
                stock(*a, **k)
            ),
            "build_pretraining_data_loader": text.loader,
            "build_train_valid_test_datasets": lambda stock, *a, **k: text.datasets(stock(*a, **k)),
            "build_train_valid_test_data_iterators": lambda stock, *a, **k: text.iterators(
                compat.validation_loader, stock(*a, **k)
            ),
        }

    def attach(self, student: BuiltStudent) -> Measurement:
        """Make the measurement of this rank."""
        groups = student.groups
        self._device = student.device
        self.measurement = Measurement(
            self._names,
            sorted(set(self._labels)),
            [label for label, domain in enumerate(self.recipe.domains) if domain.teacher],
            tp_group=groups.tp,
            cp_group=groups.cp,
            text_length=compat.text_length(),
            drop_empty=self._whole_sets,
            of_text=aligned_domains(self.recipe),
        )
        self._run.provide(Measurement, self.measurement)
        self._run.provide(ComparesPrefix, self.measurement)
        return self.measurement

    def evaluate(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``evaluate_and_print_results``, measured where it reads the held-out text.

        Training goes on with the random numbers that it would have had without.

        Collectives: one all-reduce of one number over the whole world, and where it is measured
        those of ``Measurement.collect`` and ``record``.
        """
        arguments = compat.bound_arguments(stock, args, kwargs)
        if not self._on_any_rank(self.text.restart(arguments["data_iterator"])):
            return self.other_data(lambda: stock(*args, **kwargs))
        with self.measurement.running(), untouched_rng(self._device):
            result = stock(*args, **kwargs)
            collected = self.measurement.collect()
        whole = collected.sequences == self.text.samples
        if whole and (self._pairs is None or self._pairs.measured):  # else the time was up
            self.measured(collected, self.iteration(arguments["iteration"]))
        return result

    @property
    def _pairs(self) -> HeldOutMeasurement | None:
        return self._run.get(HeldOutMeasurement)

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

    @abstractmethod
    def record(self, evaluation: Evaluation) -> None:
        """Do something with what was measured; called on every rank with the same."""

    def _evaluation(self, collected: Collected, iteration: int) -> Evaluation:
        args = self.args
        model = args.tokenizer_model or args.vocab_file or args.vocab_size or ""
        provenance = Provenance(
            checkpoint=self._run.origin.checkpoint,
            checkpoint_iteration=self._run.origin.iteration,
            checkpoint_sha256=self._run.origin.sha256,
            iteration=iteration,
            megatron_version=compat.megatron_version(),
            tokenizer=f"{args.tokenizer_type} {model}".strip(),
            sequence_length=args.seq_length,
            evaluated_batches=self.text.samples // args.eval_global_batch_size,
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
        for name, results in classes.items():
            for key, values in results.sums.items():
                if not values.sum() < float("inf"):
                    raise RecipeError(
                        f"evaluation: {key} of {name} is not finite at iteration {iteration}; the "
                        "student, a teacher, or a label beyond the vocabulary gave it"
                    )
        pairs = None if self._pairs is None else self._pairs.measured
        if pairs is not None:
            pairs = pairs.in_order()
            if not torch.tensor(list(pairs.means().values())).isfinite().all():
                raise RecipeError(
                    f"evaluation: pairs of answers are not finite at iteration {iteration}; the "
                    "student or the reference gave it"
                )
        return Evaluation(provenance, classes, pairs)

    def _data(self, label: int) -> list[str]:
        if self._facts.mock_data:
            return ["(mock data)"]
        entries = self._facts.data_paths["valid"]
        return [
            entry
            for entry, entry_label in zip(entries, self._labels, strict=True)
            if entry_label == label
        ]
