"""Forms of a divergence under one name: from a whole teacher, and from what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe_inject.losses import (
    reference,
    vocab_parallel_divergence,
    vocab_parallel_sparse_divergence,
)
from tests.harness.losses_cases import KINDS, MIXTURE, REFERENCES
from tests.harness.losses_sparse_cases import TAIL_KINDS, stored_for


@dataclass(frozen=True)
class Form:
    """A kind of divergence from a teacher's logits or, with a tail treatment, from a store.

    Attributes:
        kind: one of ``KINDS``.
        tail: treatment of the ids that are not stored; ``None`` = all ids are known.
    """

    kind: str
    tail: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.tail or 'whole'}"

    @property
    def options(self) -> dict[str, object]:
        """What a call of it is told beside its tensors."""
        tail = {} if self.tail is None else {"tail": self.tail}
        return {"kind": self.kind, **tail, **MIXTURE}

    def teacher(self, y: Tensor, k: int = 4, temperature=1.0, **options) -> tuple[Tensor, ...]:
        """What is known of a teacher with logits ``y``: see ``stored_for``."""
        return (y,) if self.tail is None else stored_for(self.tail, y, k, temperature, **options)

    def loss(self, student: Tensor, teacher: tuple[Tensor, ...], **options) -> Tensor:
        """By the package's function."""
        own = vocab_parallel_divergence if self.tail is None else vocab_parallel_sparse_divergence
        return own(student, *teacher, **self.options | options)

    def naive(self, student: Tensor, teacher: tuple[Tensor, ...], **options) -> Tensor:
        """By the reference, in the student's precision."""
        if self.tail is None:
            return REFERENCES[self.kind](student, *teacher, **options)
        return reference.sparse_divergence(student, *teacher, **self.options | options)

    def value_and_gradient(
        self, x: Tensor, teacher: tuple[Tensor, ...], upstream: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """Of the package's function, the gradient in the student's logits."""
        return _value_and_gradient(self.loss, x.clone(), teacher, upstream, options)

    def expected(
        self, x: Tensor, teacher: tuple[Tensor, ...], upstream: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """Of the reference in float64."""
        teacher = tuple(t.double() if t.is_floating_point() else t for t in teacher)
        upstream = None if upstream is None else upstream.double()
        x = x.to(torch.float64, copy=True)
        return _value_and_gradient(self.naive, x, teacher, upstream, options)


def _value_and_gradient(loss_of, leaf, teacher, upstream, options):
    leaf.requires_grad_()
    loss = loss_of(leaf, teacher, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


WHOLE = [Form(kind) for kind in KINDS]
STORED = [Form(kind, tail) for tail, kind in TAIL_KINDS]
FORMS = [*WHOLE, *STORED]
