"""What a loss compares and which part of the vocabulary this rank holds."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.distributed import ProcessGroup

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and the teacher's weight in its mixture M (jsd and skew_kl)."""

    kind: str
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self):
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


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary ids of this rank's columns, ``start`` to ``start + columns``, no padding.

    ``group`` is None where nothing is sharded, also for a group of one rank.
    """

    start: int
    columns: int
    group: ProcessGroup | None

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
        return cls(start, min(max(valid - start, 0), width), group if size > 1 else None)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each label [t], any where it is not here, and whether it is here [t]."""
        column = labels - self.start
        here = (column >= 0) & (column < self.columns)
        return column.clamp(0, max(self.columns - 1, 0)), here


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError unless a temperature given as a number is positive and finite."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
