"""What a teacher says about tokens: one type, whatever the teacher is and wherever it runs.

    Target = Dense    hidden states and a head, of which logits are made chunk by chunk
           | Sparse   some ids of each token with their log-probabilities, as a store keeps them
           | Mixed    several of these, whose distributions are mixed
           | Aligned  how likely it finds pieces of the text, by a tokenizer of its own

A loss, a measure or a confidence takes a ``Target`` and knows by its class what to do. A target
checks itself when it is made; what fits a student, a divergence and a temperature is checked once
where they meet (``checks.py``).

Shapes: t tokens, h_t teacher hidden, v vocabulary, p tensor-parallel size, k stored ids per token.
Where a tensor is [t, ...] here, any leading dimensions do, such as samples and positions; losses
take them flat.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.kinds import COMMITTEES, TAILS
from megatron_moe_inject.losses.products import head_logits
from megatron_moe_inject.losses.spec import LogitTransform


class TeacherLogits(NamedTuple):
    """A teacher's logits of a chunk.

    Attributes:
        logits: [t, c] of this rank's c columns with real ids; their softmax at the temperature that
            they were asked for is the teacher's distribution.
        ce: [t], -log P(label) at temperature 1, +inf without a label; None where it has to be
            computed from the logits.
        entropy: [t], of P at temperature 1; None likewise.
    """

    logits: Tensor
    ce: Tensor | None = None
    entropy: Tensor | None = None


class PerToken(ABC):
    """Tensors that belong to tokens, beside what is the same for all of them."""

    @abstractmethod
    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., Self]]:
        """The tensors per token, and what makes an object like this one of such tensors.

        What makes it keeps none of the tensors that it is given beside, so that they can be freed.
        """

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor per token changed, such as cut or laid out flat."""
        tensors, made_of = self.parts()
        return made_of(*map(change, tensors))

    @property
    def tokens(self) -> torch.Size:
        """The dimensions of the tokens, all but the last."""
        return self.parts()[0][0].shape[:-1]


@dataclass(frozen=True)
class Dense(PerToken):
    """A teacher by its hidden states and its head; all are constants.

    Attributes:
        hidden: [t, h_t], what its head reads.
        head: [v/p, h_t], the same vocabulary ids as the student's head on this rank; rows that the
            teacher has no id for are there, too. Same dtype as ``hidden``.
        transform: what makes logits of ``hidden @ head.T``; None for nothing.

    Raises:
        ValueError: widths or dtypes that differ.
    """

    hidden: Tensor
    head: Tensor
    transform: LogitTransform | None = None

    def __post_init__(self) -> None:
        hidden, head = self.hidden, self.head
        if hidden.dim() < 2 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
            raise ValueError(
                f"teacher's hidden {tuple(hidden.shape)} and head {tuple(head.shape)} must be "
                "[t, h_t] and [v/p, h_t]"
            )
        if hidden.dtype != head.dtype:
            raise ValueError(
                f"teacher's hidden is {hidden.dtype} and its head {head.dtype}; use one dtype"
            )

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., "Dense"]]:
        """``hidden``; see ``PerToken``."""
        head, transform = self.head, self.transform
        return (self.hidden,), lambda hidden: Dense(hidden, head, transform)

    def logits(self, columns: int) -> Tensor:
        """Logits for the first ``columns`` rows of the head, [t, columns]; no gradients."""
        logits = head_logits(self.hidden, self.head[:columns])
        return self.transform.apply_(logits) if self.transform else logits


@dataclass(frozen=True)
class Mixed(PerToken):
    """A committee: teachers of the same tokens and vocabulary ids, with weights.

    With a ``Sparse`` member it is one where a loss takes it, see ``sparse_committee``.

    Attributes:
        members: the teachers; widths and dtypes may differ.
        weights: one for each, positive; only their ratios matter.
        by: ``fixed``: these weights for every token. ``label``: times the teacher's probability of
            the label, where there is one. ``top``: times the probability of its most likely id.

    Raises:
        ValueError: no member, another number of weights, a weight that is not positive and
            finite, an unknown ``by``, members of other tokens or shards; ``Sparse`` ones of other
            tails or temperatures, of drawn ids beside a ``Dense`` one, or that do not know what
            ``by`` asks.
    """

    members: "tuple[Dense | Sparse, ...]"
    weights: tuple[float, ...]
    by: str = "fixed"

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.weights):
            raise ValueError(
                f"a committee of {len(self.members)} teachers with {len(self.weights)} weights; "
                "give at least one teacher and a weight for each"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights} of a committee must be positive and finite")
        if self.by not in COMMITTEES:
            raise ValueError(f"by={self.by!r} is not known; use one of {', '.join(COMMITTEES)}")
        if len({tuple(member.tokens) for member in self.members}) > 1:
            tokens = [tuple(member.tokens) for member in self.members]
            raise ValueError(f"tokens of a committee's teachers differ: {tokens}")
        heads = [tuple(member.head.shape) for member in self.dense]
        if len({rows for rows, _ in heads}) > 1:
            raise ValueError(f"rows of the heads of a committee's teachers differ: {heads}")
        self._check_sparse()

    def _check_sparse(self) -> None:
        for name in ("tail", "temperature"):
            values = sorted({getattr(member, name) for member in self.sparse})
            if len(values) > 1:
                raise ValueError(f"{name}s {values} of a committee's stored teachers; use one")
        for member in self.sparse:
            if member.tail == "sample" and self.dense:
                raise ValueError(
                    "drawn ids (tail 'sample') beside a teacher by hidden states: its log-"
                    "probabilities of ids that another has drawn are no draws of its own; "
                    "use tail 'bucket' or 'renormalize'"
                )
            lacks = {"label": member.label_log_probs, "top": member.unit}
            if self.by in lacks and lacks[self.by] is None:
                raise ValueError(
                    f"by={self.by!r} of a stored teacher that does not know its probability of the "
                    f"{'label' if self.by == 'label' else 'most likely id'} at temperature 1; "
                    "use by='fixed'"
                )

    @property
    def dense(self) -> tuple[Dense, ...]:
        """Members that know all ids."""
        return tuple(member for member in self.members if isinstance(member, Dense))

    @property
    def sparse(self) -> "tuple[Sparse, ...]":
        """Members that know some."""
        return tuple(member for member in self.members if isinstance(member, Sparse))

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., "Mixed"]]:
        """Those of the members; see ``PerToken``."""
        of_each = [member.parts() for member in self.members]
        counts = [len(tensors) for tensors, _ in of_each]
        makers = [made_of for _, made_of in of_each]
        weights, by = self.weights, self.by

        def made_of(*tensors: Tensor) -> Mixed:
            left = iter(tensors)
            members = (
                maker(*itertools.islice(left, count))
                for maker, count in zip(makers, counts, strict=True)
            )
            return Mixed(tuple(members), weights, by)

        return tuple(tensor for tensors, _ in of_each for tensor in tensors), made_of

    def blind(self) -> "Mixed":
        """What can be measured on a text: with ``label`` the weights would know the answer."""
        return Mixed(self.members, self.weights) if self.by == "label" else self


@dataclass(frozen=True)
class Sparse(PerToken):
    """A teacher of which only k ids per token are known, such as one stored on disk; constants.

    Attributes:
        ids: [t, k] int64 global ids, the same on every rank; a negative id is an unused slot. The
            used ids of a token differ, except for tail ``sample``.
        log_probs: [t, k], the teacher's log-probabilities over its whole vocabulary at
            ``temperature``, or for tail ``sample`` the log of importance weights, see
            ``sparse.sample_teacher``. -inf is an unused slot.
        tail: what becomes of the ids that are not known: ``renormalize``, ``bucket`` or
            ``sample``, see ``sparse.py``.
        temperature: what the teacher's logits were divided by before ``log_probs`` was made of
            them. Nothing is tempered later, so a loss at another temperature is refused.
        unit_log_probs: [t, k], those of the same ids at temperature 1, for what is measured at that
            beside a loss at another; None where they are not known, or ``temperature`` is 1.
        label_log_probs: [t, 1], that of the label at temperature 1, whether or not it is among the
            ids; None where it is not known.

    Raises:
        ValueError: shapes or a dtype that do not fit, an unknown tail, or a temperature that is not
            positive and finite.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "renormalize"
    temperature: float = 1.0
    unit_log_probs: Tensor | None = None
    label_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        ids, log_probs = self.ids, self.log_probs
        if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
            raise ValueError(
                f"teacher's ids {tuple(ids.shape)} and log_probs {tuple(log_probs.shape)} must "
                "have one shape: an id and its log-probability per slot, at least one slot"
            )
        if ids.dtype != torch.int64:
            raise ValueError(f"teacher's ids are {ids.dtype}; give int64")
        if self.tail not in TAILS:
            raise ValueError(
                f"tail={self.tail!r} is no tail treatment; use one of {', '.join(TAILS)}"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} of stored log_probs must be positive and finite"
            )

        shapes = {"unit_log_probs": ids.shape, "label_log_probs": (*ids.shape[:-1], 1)}
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(
                    f"teacher's {name} {tuple(values.shape)} must be {tuple(shape)}, as ids "
                    f"{tuple(ids.shape)} have it"
                )

    @property
    def unit(self) -> "Sparse | None":
        """The same at temperature 1; None where that is not known. Drawn ids have no such thing."""
        if self.tail == "sample":
            return None
        if self.temperature == 1:
            return self
        if self.unit_log_probs is None:
            return None
        return Sparse(
            self.ids, self.unit_log_probs, self.tail, label_log_probs=self.label_log_probs
        )

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., "Sparse"]]:
        """All its tensors; see ``PerToken``."""
        tail, temperature = self.tail, self.temperature
        optional = {
            name: tensor
            for name in ("unit_log_probs", "label_log_probs")
            if (tensor := getattr(self, name)) is not None
        }
        names = tuple(optional)

        def made_of(ids: Tensor, log_probs: Tensor, *others: Tensor) -> Sparse:
            return Sparse(
                ids, log_probs, tail, temperature, **dict(zip(names, others, strict=True))
            )

        return (self.ids, self.log_probs, *optional.values()), made_of


@dataclass(frozen=True)
class Aligned(PerToken):
    """A teacher with another tokenizer, by what it says of chunks: pieces of text that begin and
    end where a token of either side does; constants. See ``aligned.py``.

    Attributes:
        chunk: [t] int64, which chunk the label belongs to, from 0 to ``chunks`` - 1; -1: to none.
            All labels of a chunk are among the tokens of a loss, or of its ``cp_group``'s ranks.
        log_probs: [t] float, at each label of a chunk the teacher's log-probability of the whole
            chunk after all that stands before it; any where there is none.
        labels: [t] float, how many labels the chunk has, at each of them; any positive number where
            there is none.
        chunks: above all numbers of chunks.
        cp_group: over whose ranks sequences, and with them chunks, are divided; None if they are
            whole.

    Raises:
        ValueError: shapes or a dtype that do not fit.
    """

    chunk: Tensor
    log_probs: Tensor
    labels: Tensor
    chunks: int
    cp_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(part.shape) for part in self.parts()[0]]
        if len(set(shapes)) > 1 or self.chunk.dtype != torch.int64:
            raise ValueError(
                f"chunk {self.chunk.dtype}, log_probs and labels of chunks have shapes {shapes}; "
                "give one of each for each token, chunk as int64"
            )

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., "Aligned"]]:
        """``chunk``, ``log_probs`` and ``labels``; see ``PerToken``."""
        chunks, group = self.chunks, self.cp_group
        return (
            (self.chunk, self.log_probs, self.labels),
            lambda chunk, log_probs, labels: Aligned(chunk, log_probs, labels, chunks, group),
        )

    @property
    def tokens(self) -> torch.Size:
        """See ``PerToken``."""
        return self.chunk.shape

    @property
    def covered(self) -> Tensor:
        """[t] bool, where a label belongs to a chunk."""
        return self.chunk >= 0

    def per_label(self) -> Tensor:
        """[t], the log-probability of a chunk divided among its labels; 0 where there is none."""
        return torch.where(self.covered, self.log_probs / self.labels, 0.0)


Target = Dense | Mixed | Sparse | Aligned


@overload
def single(target: None) -> None: ...
@overload
def single(target: Target) -> Target: ...
def single(target: Target | None) -> Target | None:
    """A committee of one as that teacher; any other target as it is."""
    if isinstance(target, Mixed) and len(target.members) == 1:
        return target.members[0]
    return target
