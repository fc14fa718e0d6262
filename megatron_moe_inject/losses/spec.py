"""What a loss compares and which part of the vocabulary this rank holds."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.kinds import CONFIDENCES, KINDS


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and the teacher's weight in its mixture M (jsd and skew_kl)."""

    kind: str
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no divergence; use one of {', '.join(KINDS)}")
        if self.mixture is not None and not 0 < self.mixture < 1:
            name = {"jsd": "beta", "skew_kl": "skew"}[self.kind]
            raise ValueError(
                f"{name}={self.mixture} of {self.kind} must lie strictly between 0 and 1; "
                "use forward_kl or reverse_kl for an unmixed divergence"
            )

    @property
    def mixture(self) -> float | None:
        """w of M = w P + (1 - w) Q, None for the kinds without a mixture."""
        return {"jsd": self.beta, "skew_kl": self.skew}.get(self.kind)


_FORWARD_KL = Divergence("forward_kl")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to ``head @ hidden`` before it calls it logits.

    z = softcap * tanh(scale * (head @ hidden) / softcap), without the tanh where ``softcap`` is
    None. ``scale`` is MuP's output multiplier, Cohere's logit_scale, 1 / Granite's logits_scaling;
    ``softcap`` is Gemma's final_logit_softcapping.

    ``excluded`` [e] int64 are columns of these logits that the model has no id for: they become
    -inf, so that they get no probability.
    """

    scale: float = 1.0
    softcap: float | None = None
    excluded: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} of the logits must be positive and finite")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap={self.softcap} of the logits must be positive and finite")

    def __bool__(self) -> bool:
        return self.scale != 1 or self.softcap is not None or self.excluded is not None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform ``head @ hidden`` [..., v] in place, in its own dtype."""
        if self.softcap is not None:
            logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1:
            logits.mul_(self.scale)
        if self.excluded is not None:
            logits.index_fill_(-1, self.excluded, -torch.inf)
        return logits

    def pull_back_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turn a gradient by the transformed ``logits`` into one by ``head @ hidden``, in place.

        Only models that have all ids train.
        """
        assert self.excluded is None, "a student has all of its ids"
        if self.softcap is not None:
            gradient.mul_((logits / self.softcap).square_().neg_().add_(1))
        if self.scale != 1:
            gradient.mul_(self.scale)


@dataclass(frozen=True)
class TokenWeighting:
    """How much of the distillation each token gets; the factor is a constant for the gradient.

    Attributes:
        confidence: ``label``: the teacher's probability of the label, 0 where there is no label.
            ``entropy``: 1 - H / log(v), with H the entropy of the teacher's distribution. Both at
            temperature 1.
        skip_worse: 0 where the teacher's cross-entropy of the label exceeds the student's.
    """

    confidence: str = "none"
    skip_worse: bool = False

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"confidence={self.confidence!r} is not known; use one of {', '.join(CONFIDENCES)}"
            )

    def __bool__(self) -> bool:
        return self.confidence != "none" or self.skip_worse


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary ids of this rank's columns, ``start`` to ``start + columns``, no padding.

    ``group`` is None where nothing is sharded, also for a group of one rank; ``valid`` counts
    the ids of the whole vocabulary.
    """

    start: int
    columns: int
    group: ProcessGroup | None
    valid: int

    @classmethod
    def of(cls, width: int, group: ProcessGroup | None, valid_vocab_size: int | None) -> Self:
        """The shard of this rank in ``group`` when every rank holds ``width`` columns, v/p.

        Raises ValueError for a ``valid_vocab_size`` that the shards cannot hold.
        """
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        valid = width * size if valid_vocab_size is None else valid_vocab_size
        if not 0 < valid <= width * size:
            raise ValueError(
                f"valid_vocab_size={valid_vocab_size} must lie between 1 and the {width * size} "
                f"ids that {size} shard(s) of {width} columns hold"
            )
        start = rank * width
        columns = min(max(valid - start, 0), width)
        return cls(start, columns, group if size > 1 else None, valid)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each label [t], any where it is not here, and whether it is here [t]."""
        column = labels - self.start
        in_shard = (column >= 0) & (column < self.columns)
        return column.clamp(0, max(self.columns - 1, 0)), in_shard


@dataclass(frozen=True)
class TermWeights:
    """How the terms of a loss are weighted and shaped.

        total = alpha * factor * T^2 * D(teacher || student) + beta * CE      per token

    Attributes:
        alpha: of the divergence from the target, a number or [t]; a constant. The number 0 skips
            its gradient; its value is still reported.
        beta: of the cross-entropy, likewise.
        divergence: which D.
        temperature: T > 0 of the divergence, a number or [t]. The cross-entropy is always at 1.
        weighting: distils some tokens more, by a factor between 0 and 1; None for a factor of 1.

    Raises:
        ValueError: a temperature given as a number that is not positive and finite.
    """

    alpha: float | Tensor
    beta: float | Tensor
    divergence: Divergence = _FORWARD_KL
    temperature: float | Tensor = 1.0
    weighting: TokenWeighting | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError unless a temperature given as a number is positive and finite."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
