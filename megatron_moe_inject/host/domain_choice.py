"""Of which domains adapters are merged, where each domain has its own on the same matrices.

Their model differs from text to text, so whoever makes one of them says by which: by one domain's
adapters, or by those of several, each with a weight that multiplies its change.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_moe_inject.host.errors import RecipeError, listing, show, suggest


@dataclass(frozen=True)
class DomainChoice:
    """What was chosen.

    Attributes:
        weights: of each domain's change, by name; empty = nothing was chosen. Domains that it has
            not are left out.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    def weight(self, domain: str | None) -> float:
        """Of a change: that of the domain whose it is, 1 for one of all tokens."""
        return 1.0 if domain is None else self.weights.get(domain, 0.0)

    def check(
        self,
        domains: Sequence[str],
        error: Callable[[str, str], RecipeError],
        *,
        weighs: bool = True,
    ) -> None:
        """See that it fits what there is.

        Args:
            domains: that have adapters of their own.
            error: makes an error that begins with what holds them, of a problem and a remedy.
            weighs: whether ``--weights`` is a remedy.

        Raises:
            RecipeError: it does not.
        """
        if domains and not self.weights:
            remedy = f"choose one of them, such as --domain {domains[0]}"
            if weighs:
                even = " ".join(f"{name}={1 / len(domains):.2g}" for name in domains)
                remedy += f", or weigh them: --weights {even}"
            raise error(f"holds adapters of each domain apart ({listing(domains)})", remedy)
        for name in self.weights:
            if not domains:
                raise error(
                    f"holds no adapters of single domains, such as {show(name)}",
                    "leave out --domain and --weights",
                )
            if name not in domains:
                raise error(
                    f"holds no adapters of the domain {show(name)}",
                    suggest(name, domains, "domains"),
                )


NOTHING_CHOSEN = DomainChoice()


def add_choice(parser: argparse.ArgumentParser, *, weighs: bool = True) -> None:
    """Add ``--domain`` and, unless one alone can be taken, ``--weights`` to a command."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--domain", metavar="NAME", help="of adapters by domain, those of this one alone"
    )
    if weighs:
        group.add_argument(
            "--weights", metavar="NAME=W", nargs="+",
            help="of adapters by domain, the sum of these domains' changes, each times its weight",
        )  # fmt: skip


def choice_of(options: argparse.Namespace) -> DomainChoice:
    """What the options of ``add_choice`` say.

    Raises:
        RecipeError: a weight is no number, or a domain is named twice.
    """
    if options.domain is not None:
        return DomainChoice({options.domain: 1.0})
    weights: dict[str, float] = {}
    for word in getattr(options, "weights", None) or ():
        name, _, number = word.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight) or weight == 0:
            problem = "names a domain twice" if name in weights else "is no domain with a weight"
            raise RecipeError(
                f"--weights: {show(word)} {problem}; write code=0.7 html=0.3", "--weights"
            )
        weights[name] = weight
    return DomainChoice(weights)
