"""The part of a recipe that says how a student's own text is read, and from which folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_moe_inject.recipe.entries import ROLLOUTS_KIND
from megatron_moe_inject.recipe.schema import Domain
from megatron_moe_inject.recipe.section import Section

LATE = ("corpus", "wait")
STALE = ("refuse", "weight")
FAULTY = ("skip", "stop")


@dataclass
class Rollouts:
    """How folders of rollouts (``data: [1, "rollouts:/dir"]``) are read.

    Attributes:
        every: steps between two looks into the folders.
        late: where there are too few, ``corpus`` (a step reads the domain's fixed text instead) or
            ``wait`` (until there are enough).
        patience: seconds that a step waits, until training ends with a checkpoint.
        max_age: optimizer steps since the checkpoint that wrote a file, at most; None = any.
        stale: what is older is refused (``refuse``), or read with a chance that halves each
            ``max_age`` steps (``weight``).
        faulty: a file that is damaged, too old or of another student is left aside with a line
            (``skip``), or ends training with a checkpoint (``stop``).
    """

    every: int = 10
    late: str = field(default="corpus", metadata={"choices": LATE})
    patience: float = 900.0
    max_age: int | None = None
    stale: str = field(default="refuse", metadata={"choices": STALE})
    faulty: str = field(default="skip", metadata={"choices": FAULTY})


ROLLOUTS: Section[Rollouts] = Section(
    "rollouts", Rollouts, Rollouts, "How text that the student wrote (rollouts:/dir) is read."
)


def folder_of(domain: Domain) -> str | None:
    """The folder of a domain's rollouts; None without one."""
    named = [e for e in domain.data if isinstance(e, str) and e.startswith(ROLLOUTS_KIND)]
    return named[0].removeprefix(ROLLOUTS_KIND) if named else None
