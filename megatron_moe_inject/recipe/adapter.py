"""What trains beside matrices that stay: low-rank adapters, and rows of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

TARGETS = ("experts", "attention", "shared_experts", "mlp", "router", "output_layer")
"""Components whose matrices can have adapters."""

SCALINGS = ("standard", "rslora")
EXPERTS = ("selected", "all")
BY = ("domain",)
OF_LOSS = "whose product is taken in the loss, where all tokens pass the same adapter"
"""Why the output layer has none by domain."""


@dataclass
class Adapter:
    """Low-rank adapters (LoRA, 2106.09685) on some matrices: W x + s B (A x), where W stays.

    Attributes:
        targets: ``experts``, ``attention``, ``shared_experts``, ``mlp``, ``router``,
            ``output_layer``, or names of weights with shell wildcards as in ``train.patterns``.
        rank: r, of A ``[r, in]`` and B ``[out, r]``.
        alpha: s = alpha / r; None = 2 r.
        scaling: ``standard``, or ``rslora`` (2312.03732): s = alpha / sqrt(r).
        experts: which of the experts: ``selected`` (those of the domains) or ``all``.
        layers: 0-based decoder layers; empty = all.
        lr: of A, in learning rates of the run, which is that of what trains whole beside them.
        lr_b: of B, in learning rates of A (LoRA+, 2402.12354).
        decay: in weight decays of the run.
        by: ``domain`` = each domain has factors of its own on these matrices, which its tokens
            alone pass; tokens of general text, and of domains without, pass none. ``None`` = all
            tokens pass the same factors.
        domains: with ``by: domain``, those that have some; empty = all.
    """

    targets: list[str] = field(
        metadata={"remedy": "name what gets adapters, such as targets: [experts, attention]"}
    )
    rank: int = 8
    alpha: float | None = None
    scaling: str = field(default="standard", metadata={"choices": SCALINGS})
    experts: str = field(default="selected", metadata={"choices": EXPERTS})
    layers: list[int] = field(default_factory=list)
    lr: float = 4.5
    lr_b: float = 1.0
    decay: float = 0.0
    by: str | None = field(default=None, metadata={"choices": BY})
    domains: list[str] = field(default_factory=list)

    @property
    def numerator(self) -> float:
        """alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """s."""
        return self.numerator / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    @property
    def components(self) -> list[str]:
        """Those of its targets that are components."""
        return [name for name in self.targets if name in TARGETS]

    @property
    def patterns(self) -> list[str]:
        """Those that are names of weights."""
        return [name for name in self.targets if name not in TARGETS]


@dataclass(frozen=True)
class FactorSet:
    """Factors on the matrices of one entry: for all tokens, or for those of one domain.

    Attributes:
        entry: of ``train.adapters``.
        number: the entry's position there.
        selected: by layer the experts that ``experts: selected`` means here: those of the domain,
            or of all domains.
        domain: whose tokens pass them; ``None`` = all tokens do.
        label: the domain's position in the recipe.
    """

    entry: Adapter
    number: int
    selected: Mapping[int, Collection[int]]
    domain: str | None = None
    label: int | None = None


@dataclass
class VocabularyRows:
    """Rows of embedding and output layer that train, all others staying as they are.

    Named by one of ``ids``, ``budget`` and ``threshold``. The last two take those ids whose share
    p of a domain's text most exceeds their share q of general text, by p log(p / q), as experts are
    chosen by their contrast.

    Attributes:
        domain: whose text is counted.
        ids: of the vocabulary.
        budget: at most so large a share of all ids.
        threshold: the fewest that make up this share of the sum of p log(p / q) over the ids where
            it is positive.
        lr: in learning rates of the run.
        decay: in weight decays of the run.
    """

    domain: str | None = None
    ids: list[int] = field(default_factory=list)
    budget: float | None = None
    threshold: float | None = None
    lr: float = 1.0
    decay: float = 0.0
