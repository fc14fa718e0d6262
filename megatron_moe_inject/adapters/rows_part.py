"""Rows of the vocabulary in a run: which they are, and what keeps two copies of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.adapters.contrast import chosen, contrast, count_ids
from megatron_moe_inject.adapters.rates import Rate, mark
from megatron_moe_inject.adapters.stored import Stored
from megatron_moe_inject.adapters.uses import FINALIZE
from megatron_moe_inject.adapters.vocabulary import OfLayer, of_chunk
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.wrap import Call, wrap_method, wrap_of
from megatron_moe_inject.recipe.adapter import VocabularyRows
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext


class RowsOfVocabulary:
    """The rows of one student.

    Args:
        run: its recipe has ``train.vocabulary_rows``.
        spec: which.
        stored: what checkpoints say of them.
    """

    def __init__(self, run: RunContext, spec: VocabularyRows, stored: Stored) -> None:
        self._run, self._spec, self._stored = run, spec, stored
        self.layers: list[OfLayer] = []

    def asked(self) -> Mapping[str, Any]:
        """How they were chosen, in plain values."""
        return {n: v for n, v in asdict(self._spec).items() if n not in ("lr", "decay")}

    def choose(self) -> list[int]:
        """The ids, counted where they are not named. No collective.

        Raises:
            RecipeError: none are chosen, or the text cannot be read.
        """
        run, spec = self._run, self._spec
        size = run.valid_vocab_size
        if spec.ids:
            beyond = [i for i in spec.ids if i >= size]
            if beyond:
                raise RecipeError(
                    f"train.vocabulary_rows.ids: {beyond[0]} is beyond the {size} ids of the "
                    "tokenizer; take it out"
                )
            return sorted(spec.ids)
        index = next(i for i, d in enumerate(run.recipe.domains) if d.name == spec.domain)
        entries = list(zip(run.facts.data_paths["train"], run.labels["train"], strict=True))
        bodies = [
            [prefix for prefix, label in entries if label == wanted] for wanted in (index, GENERAL)
        ]
        share = _training_share(run.args)
        try:
            counts = [count_ids(body, size, share) for body in bodies]
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"train.vocabulary_rows: the ids of {bodies[0] + bodies[1]} cannot be counted "
                f"({error}); name the rows by ids"
            ) from error
        scores = contrast(*counts)
        return chosen(scores, budget=spec.budget, threshold=spec.threshold)

    def foreseen(self) -> list[int]:
        """As many ids as will be chosen, evenly over the vocabulary, for a plan. No collective.

        Raises:
            RecipeError: nobody knows how many.
        """
        if self._spec.ids:
            return sorted(self._spec.ids)
        if self._spec.budget is None:
            raise RecipeError(
                "train.vocabulary_rows.threshold: how many rows it takes is not planned; plan with "
                "a budget"
            )
        size = self._run.valid_vocab_size
        count = int(self._spec.budget * size)
        return [i * size // count for i in range(count)]

    def before_ddp(self, chunk: Chunk) -> None:
        """Give the layers of a bare chunk their rows. No collective."""
        ids = self._stored.rows
        assert ids is not None, "chosen before anything is built"
        tied = self._run.facts.tied_embeddings
        layers = of_chunk(chunk, ids, tied, lambda: self._stored.holds)
        for layer in layers:
            mark(layer.rows.rows, Rate(self._spec.lr, self._spec.decay))
        self.layers += layers

    def loaded(self, student: BuiltStudent, resumed: bool) -> None:
        """Begin as the layers' own rows, unless they were in the checkpoint.

        Collectives: those of ``TrainedIds.take`` for each layer.
        """
        if resumed:
            return
        for layer in self.layers:
            layer.rows.take(layer.module.weight)
        if self.layers and student.optimizer is not None:
            student.optimizer.reload_model_params()

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Keep copies on two stages alike. No collective."""
        two = self._run.facts.tied_embeddings and student.groups.pp.size() > 1
        if not two or not self.layers:
            return None
        return _Alike(student.chunks, self.layers[0].rows.rows, student.groups.embd)


class _Alike(StepPart):
    """Sums the gradients of two copies of the rows, as Megatron those of a tied matrix."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        rows: torch.nn.Parameter,
        group: dist.ProcessGroup,
    ) -> None:
        self._config, self._rows, self._group = chunks[0].config, rows, group

    def begin(self, step: Step) -> None:
        """Stand around what finishes the gradients, once Megatron has set it. No collective."""
        finalize = self._config.finalize_model_grads_func
        if step.training and wrap_of(finalize) is None:
            wrap_method(self._config, FINALIZE, self._finalize)

    def _finalize(self, call: Call) -> Any:
        """Collectives besides stock's: one all-reduce of the rows over first and last stage."""
        result = call()
        gradient = getattr(self._rows, "main_grad", self._rows.grad)
        if gradient is not None:
            dist.all_reduce(gradient, group=self._group)
        return result


def _training_share(args: Any) -> float:
    """The part of each file's documents that is for training."""
    if not getattr(args, "split", None):
        return 1.0
    parts = [float(part) for part in str(args.split).split(",")]
    return parts[0] / sum(parts) if sum(parts) > 0 else 1.0
