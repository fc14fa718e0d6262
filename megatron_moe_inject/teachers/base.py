"""What a teacher is: pre-head hidden states and a head, whatever the model behind them.

A teacher's logits are ``hidden_states @ head.T``, scaled or soft-capped where the model does so.
The hidden state is much smaller than the logits, so it is what is computed, exchanged and kept;
the loss projects it with the head chunk by chunk. A model that does more to its logits (a bias,
another projection) does not fit and is refused when it is checked or loaded.

Shapes: n sequences, s sequence length, h_t teacher hidden, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
)
from megatron_moe_inject.losses.spec import LogitTransform


@runtime_checkable
class Teacher(Protocol):
    """A whole model on this rank, in eval mode, outside every module of the student.

    Attributes:
        name: its key in the recipe.
        hidden_size: h_t.
        num_layers: decoder layers.
        vocab_size: rows of the head that stand for tokens; padding is left out where the
            teacher's tokenizer tells it.
        logit_transform: what its logits are of ``hidden_states @ head.T``.
    """

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    logit_transform: LogitTransform

    def hidden_states(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States after the final norm, ``[n, s] -> [n, s, h_t]`` in the parameters' dtype.

        No graph, no collective, random number generators as before. ``position_ids`` is
        ``[n, s]`` and ``attention_mask`` Megatron's bool ``[n or 1, 1, s, s]`` with True where
        attention is forbidden; without them positions count from 0 and attention is causal.
        """
        return self.states(tokens, position_ids, attention_mask)[0]

    def states(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """``hidden_states``, then the states after each of ``layers``, ``[n, s, h_t]`` each.

        ``layers`` are 0-based decoder layers. What stands after a layer is the residual stream;
        after the last one of a Hugging Face model it is what ``transformers`` lists there, which
        for most architectures has gone through the final norm.
        """
        ...

    def passes(self, own: int) -> AbstractContextManager[None]:
        """Stands around ``own`` calls of ``states``, on each rank that holds the teacher, also of
        none. One whose experts lie on several ranks makes as many of each (``expert_parallel``).

        Collectives: none, but for such a teacher.
        """
        return contextlib.nullcontext()

    def head_weight(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of the head, ``[stop - start, h_t]``.

        Rows from ``vocab_size`` on are zero, also beyond the teacher's own rows, so that a
        student with more padding can ask for its slice. A view where no such row is asked for,
        else a new tensor: ask once and keep it. No collective.
        """
        ...


@dataclass(frozen=True)
class Comparison:
    """What student and teacher share.

    Attributes:
        told: one sentence that says how they were compared.
        by_token: whether every id was.
        student_size: the student's largest id and 1; None where it cannot be read.
        unknown: added tokens of the student that the teacher has no id for, by id.
        dropped: tokens of the teacher that the student has no id for, by id.
    """

    told: str
    by_token: bool = False
    student_size: int | None = None
    unknown: Mapping[int, str] = field(default_factory=dict)
    dropped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of a teacher.

    Attributes:
        number: of each layer that has some.
        topk: of them, how many each token passes.
        parameters: of all together.
    """

    number: int
    topk: int
    parameters: int


@dataclass(frozen=True)
class TeacherInfo:
    """What is known about a teacher before it is loaded.

    Attributes:
        name: its key in the recipe.
        source: as written in the recipe.
        kind: one of ``teachers.sources.SOURCES``.
        path: the directory that holds the weights.
        architecture: class of the model.
        num_layers: decoder layers; 0 where no model runs.
        hidden_size: h_t; 0 where it hands out no states.
        vocab_rows: rows of the head, padding included.
        vocab_size: rows that stand for tokens; equal to ``vocab_rows`` where unknown.
        parameters: number of parameters, head and embedding included.
        max_positions: longest sequence that learned positions allow; None without such a limit.
        trained_positions: longest sequence that rotary positions were made for, as far as its files
            say; None without rotary positions or where unknown.
        vocabulary: one sentence that says how the vocabularies were compared.
        shared: what the comparison found.
        prefix: ids that stand in front of what it reads, see ``prefix``.
        prefix_told: one clause that says where they are from.
        aligned: whether it has a tokenizer of its own, and texts are aligned.
        config: sizes and switches of the architecture, for a report.
        experts: its routed experts; None of a dense model.
    """

    name: str
    source: str
    kind: str
    path: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_rows: int
    vocab_size: int
    parameters: int
    max_positions: int | None
    vocabulary: str
    config: dict[str, Any] = field(default_factory=dict)
    shared: Comparison = Comparison("not compared")
    trained_positions: int | None = None
    prefix: tuple[int, ...] = ()
    prefix_told: str = ""
    aligned: bool = False
    experts: RoutedExperts | None = None

    def held_parameters(self, ep: int) -> int:
        """Parameters that a rank holds, where the experts lie on so many."""
        routed = 0 if self.experts is None else self.experts.parameters
        return self.parameters - routed + routed // ep

    def held_bytes(self, number: int, ep: int, in_fp8: bool) -> int:
        """Bytes of the parameters that a rank holds, of so many each, and of FP8 copies of those
        that layers multiply by."""
        held = self.held_parameters(ep)
        copies = max(0, held - 2 * self.vocab_rows * self.hidden_size)
        return held * number + (copies if in_fp8 else 0)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes."""
        if self.experts is None:
            return self.parameters
        passed = self.experts.parameters * self.experts.topk // self.experts.number
        return self.parameters - self.experts.parameters + passed

    @property
    def runs_model(self) -> bool:
        """Whether a model runs beside the student."""
        return self.num_layers > 0


@dataclass(frozen=True)
class Source:
    """Where the recipe says that a teacher is, such as ``megatron:/dir`` or ``hf:/dir``."""

    name: str
    text: str
    kind: str
    path: Path

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error that a problem with this source is reported as."""
        return fail(f"teachers.{self.name}.source", self.text, problem, remedy)


def padded_rows(head: torch.Tensor, vocab_size: int, start: int, stop: int) -> torch.Tensor:
    """Rows ``[start, stop)`` of ``head`` ``[rows, h_t]``, zero from ``vocab_size`` on."""
    assert 0 <= start <= stop, (start, stop)
    if stop <= vocab_size:
        return head[start:stop]
    rows = head.new_zeros(stop - start, head.shape[1])
    known = max(0, vocab_size - start)
    rows[:known] = head[start : start + known]
    return rows
