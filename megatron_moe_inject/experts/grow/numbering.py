"""How many experts a layer can get, and which ids old and new ones have then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe_inject.host.errors import RecipeError, listing

_SHOWN = 6


@dataclass(frozen=True)
class Numbering:
    """Ids of a layer's experts before and after.

    Attributes:
        moved: by old id the new one.
        new: ids of the new experts, rising.
        groups: of the router; the experts of a group have ids that follow each other, and so has
            each as many new ones, behind its old ones.
    """

    moved: tuple[int, ...]
    new: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, experts: int, added: int, groups: int = 1) -> Numbering:
        """Of a layer that gets ``added`` more."""
        assert added % groups == 0 == experts % groups, "checked before"
        old, more = experts // groups, added // groups
        moved = tuple(e + (e // old) * more for e in range(experts))
        new = tuple(g * (old + more) + old + i for g in range(groups) for i in range(more))
        return cls(moved, new, groups)

    @property
    def experts(self) -> int:
        """Afterwards."""
        return len(self.moved) + len(self.new)

    def group_of_new(self, number: int) -> int:
        """The group of the new expert ``new[number]``."""
        return number // (len(self.new) // self.groups)

    def old_ids(self, group: int) -> range:
        """Old ids of a group's old experts."""
        size = len(self.moved) // self.groups
        return range(group * size, (group + 1) * size)


def check_count(experts: int, added: int, *, groups: int, domains: int, ep: int) -> None:
    """Check how many experts each layer gets.

    Args:
        experts: of a layer before.
        added: to each.
        groups: of the router.
        domains: whose new experts are as many in each group; at least 1.
        ep: expert-parallel ranks.

    Raises:
        RecipeError: naming numbers that go.
    """
    step = groups * domains
    possible = [n for n in range(step, 64 * step * ep + 1, step) if (experts + n) % ep == 0]
    if added >= 1 and added % step == 0 and (experts + added) % ep == 0:
        return
    reasons = []
    if added < 1:
        reasons.append("is below 1")
    elif added % step:
        needs = [
            f"{groups} groups" if groups > 1 else "",
            f"{domains} domains" if domains > 1 else "",
        ]
        reasons.append(f"cannot be shared evenly by {' and '.join(filter(None, needs))}")
    elif (experts + added) % ep:
        reasons.append(
            f"makes {experts + added} experts, which {ep} expert-parallel ranks cannot share"
        )
    numbers = f"use one of {listing(possible[:_SHOWN])}" if possible else "no number would go"
    other = ", or name another layout by --ep" if ep > 1 else ""
    raise RecipeError(f"--per-layer: {added} {'; '.join(reasons)}; {numbers}{other}", "--per-layer")


def restored(moved: Sequence[int], experts: int) -> list[int | None]:
    """By id now the id before, ``None`` of new experts."""
    before: list[int | None] = [None] * experts
    for old, now in enumerate(moved):
        before[now] = old
    return before
