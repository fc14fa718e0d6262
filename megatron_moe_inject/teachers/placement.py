"""Which pipeline stages hold a teacher: the last alone, or all, which then run it together.

``ranks: auto`` spreads a teacher over all stages where they have room for it. That is decided from
what does not change while a job runs or when it is started again: the memory of the devices, the
student's parameters and how many of them train. So a run that goes on does what it did before.

Pure decisions, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_moe_inject.host.text import memory_text

TRAINED_BYTES = 16
"""Of each parameter that trains, besides itself: a float32 gradient, a copy and two moments."""
SHARE = 4
"""All teachers may take one part in so many of what student and optimizer leave; activations need
the rest."""


@dataclass(frozen=True)
class Wish:
    """What decides where a teacher is held.

    Attributes:
        ranks: ``TeacherSpec.ranks``.
        size: bytes of its parameters.
        windowed: it runs by windows of micro-batches.
    """

    ranks: str
    size: int
    windowed: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a teacher is held.

    Attributes:
        spread: by all stages; else by the last alone.
        reason: why, as a clause.
    """

    spread: bool
    reason: str

    def stages(self, stages: int) -> range:
        """Which of so many stages hold it."""
        return range(0 if self.spread else stages - 1, stages)


def placements(wishes: Mapping[str, Wish], stages: int, spare: int | None) -> dict[str, Placement]:
    """Where each teacher is held, by name.

    Args:
        stages: of the pipeline.
        spare: ``spare_bytes`` of the fullest rank of all stages but the last; None where memory is
            the host's, which is not counted.
    """
    if stages == 1:
        return {name: Placement(False, "since there is one stage") for name in wishes}
    spread = sum(
        wish.size
        for wish in wishes.values()
        if wish.ranks == "pipeline" or (wish.ranks == "auto" and not wish.windowed)
    )
    fits = spare is None or spread * SHARE <= spare
    if spare is None:
        room = "since memory of the host is not counted"
    else:
        room = (
            f"since {memory_text(spread)} are {'at most' if fits else 'more than'} a quarter of "
            f"the {memory_text(max(0, spare))} that student and optimizer leave on the other stages"
        )
    found = {}
    for name, wish in wishes.items():
        if wish.ranks != "auto":
            found[name] = Placement(wish.ranks == "pipeline", "as the recipe says")
        elif wish.windowed:
            found[name] = Placement(False, "since its window runs inside the schedule")
        else:
            found[name] = Placement(fits, room)
    return found


def spare_bytes(memory: int, parameters: int, trained: int) -> int:
    """What a rank has left beside student and optimizer.

    Args:
        memory: bytes of its device.
        parameters: bytes of the student's parameters there.
        trained: how many of them train.
    """
    return memory - parameters - TRAINED_BYTES * trained
