"""A feature's part in one run, and what the parts of a run share.

The run (``megatron_moe_inject.run``) asks its parts phase by phase, each in the order of the
features: all are made, ``prepare``, Megatron builds the student inside ``building`` with
``before_ddp``, ``loaded``, ``attach``, the steps, ``begin_training``, ``finish``.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.lineage import Lineage
from megatron_moe_inject.host.megatron_types import Chunk, Groups, Optimizer
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.student_load import Origin
from megatron_moe_inject.host.term_log import TermLog
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.run_kinds import PROFILE
from megatron_moe_inject.recipe.schema import Recipe


class RunContext:
    """What the parts of one run share.

    Attributes:
        kind: of the run, see ``run_kinds``.
        recipe: its experts resolved where the run trains.
        args: Megatron's arguments.
        facts: what is known of the student from them.
        valid_vocab_size: ids of the student's tokenizer; those beyond are padding.
        labels: by split, domain index or ``GENERAL`` of each entry of its blend.
        lineage: which injection the run begins or goes on with.
        terms: our terms in Megatron's log.
        warnings: remarks for the plan.
        parts: all parts, when they are made.
        plan: the plan in words, when all is attached.
        origin: what was loaded, from ``loaded`` on, where a part ``writes_about`` it.
        dry_run: nothing is to be written, and the run ends when all is attached.
    """

    def __init__(
        self,
        kind: str,
        recipe: Recipe,
        args: Namespace,
        facts: StudentFacts,
        valid_vocab_size: int,
        labels: Mapping[str, list[int]],
    ) -> None:
        self.kind = kind
        self.recipe = recipe
        self.args = args
        self.facts = facts
        self.valid_vocab_size = valid_vocab_size
        self.labels = labels
        self.lineage = Lineage(args)
        self.terms = TermLog(args)
        self.warnings: list[str] = []
        self.parts: list[RunPart] = []
        self.plan = ""
        self.origin = Origin()
        self.dry_run = bool(args.inject_dry_run)
        self._provided: dict[Any, Any] = {}

    @property
    def several_classes(self) -> bool:
        """Whether the training data has more than one kind of sample to report on."""
        return len(set(self.labels["train"])) > 1

    @property
    def largest_micro_batch(self) -> int:
        """Samples of the largest micro-batch, in training and evaluation."""
        evaluation = getattr(self.args, "eval_micro_batch_size", None) or 1
        return (
            evaluation if self.kind == PROFILE else max(self.args.micro_batch_size or 1, evaluation)
        )

    def provide[T](self, kind: type[T], thing: T) -> None:
        """Let parts behind find an object by its class, or by one above it."""
        assert kind not in self._provided, f"{kind.__name__} is provided already"
        self._provided[kind] = thing

    def get[T](self, kind: type[T]) -> T | None:
        """What a part before provided of that class, ``None`` without."""
        return self._provided.get(kind)

    def need[T](self, kind: type[T]) -> T:
        """The same where it must be there, as the order of the features sees to."""
        thing = self.get(kind)
        assert thing is not None, f"no part before provides {kind.__name__}"
        return thing


@dataclass(frozen=True)
class BuiltStudent:
    """The student once it is built and loaded.

    Attributes:
        chunks: this rank's bare model chunks.
        groups: its ``ProcessGroupCollection``.
        optimizer: Megatron's, ``None`` in a run that only evaluates.
    """

    chunks: Sequence[Chunk]
    groups: Groups
    optimizer: Optimizer = None

    @classmethod
    def of_chunks(cls, chunks: Sequence[Chunk], optimizer: Optimizer = None) -> BuiltStudent:
        """With the groups that the chunks were built with."""
        return cls(list(chunks), compat.process_groups(chunks[0]), optimizer)

    @property
    def last(self) -> Chunk | None:
        """The chunk with the output layer, ``None`` on other pipeline stages."""
        return next((chunk for chunk in self.chunks if chunk.post_process), None)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.chunks[0].parameters()).device


@dataclass(frozen=True)
class Boundary:
    """Where backward stops, agreed over all ranks.

    Attributes:
        position: the first that needs gradients on any rank: -1 the embedding, a 0-based global
            layer, or the number of layers where nothing below the final norm trains.
        forward_stages: leading pipeline stages, virtual ones counted, that run forward only.
    """

    position: int
    forward_stages: int


class RunPart:
    """A feature's part in one run; each method does nothing unless overridden.

    Every rank has the same parts in the same order, so that a part may run collectives where its
    methods say so; none may before ``loaded``, but those that end in an error on every rank.

    Attributes:
        around: Megatron's functions that the part stands around, by their names in the table of
            ``megatron_moe_inject.install``: called with the stock function, or what an earlier
            part has made of it, and its arguments.
        writes_about: whether files are written that say what was loaded.
        measured_splits: splits of held-out text whose numbers get error bars.
        measured_for: what messages name as the reason for reading them.
    """

    around: Mapping[str, Callable[..., Any]] = {}
    writes_about: bool = False
    measured_splits: Sequence[str] = ()
    measured_for: str = ""

    def describe(self) -> Mapping[str, Any]:
        """What all ranks must agree on besides recipe and flags: key -> value for JSON."""
        return {}

    def trains(self) -> Mapping[str, Any]:
        """What it lets train besides the freezing policy, in plain JSON values."""
        return {}

    def teacher_layers(self, teacher: Any) -> Sequence[int]:
        """Layers of a loaded teacher whose states it wants."""
        return ()

    def prepare(self) -> None:
        """When all parts are made and nothing is built.

        Raises:
            RecipeError: on every rank.
        """

    def try_outputs(self) -> None:
        """See that the files which this rank is to write can be written; no collective.

        Raises:
            RecipeError: one cannot.
        """

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """Surrounds Megatron's building and loading of the student."""
        return contextlib.nullcontext()

    def before_ddp(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Change bare chunks before DDP and the optimizer exist. No collective."""

    def loaded(self, student: BuiltStudent) -> None:
        """The student holds what was loaded."""

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Attach to the student; what takes part in steps on this rank."""
        return None

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """Lines of the plan by title, once attached.

        Args:
            given: what the feature says from recipe and student alone.
        """
        return given

    def begin_training(self) -> None:
        """Before the first step that trains."""

    def finish(self) -> str | None:
        """When all is saved: what to say.

        Raises:
            RecipeError: on every rank: something went wrong that costs no checkpoint.
        """
        return None
