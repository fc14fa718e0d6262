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
from megatron_moe_inject.recipe.schema import TeacherSpec
from megatron_moe_inject.teachers.spread import UNKNOWN, sequences_by_stage

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

    @classmethod
    def of(cls, spec: TeacherSpec, runs_model: bool, size: int) -> Wish:
        """Of a teacher of the recipe: what runs no model, and what is aligned, is the last
        stage's."""
        alone = spec.aligned or not runs_model
        return cls("last" if alone else spec.ranks, size, bool(spec.window))


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
        """Which of so many stages hold it, on each of their ranks."""
        return range(0 if self.spread else stages - 1, stages)

    def sequences(self, count: int, stages: int, length: int, ratio: float = UNKNOWN) -> list[int]:
        """How many sequences of a step a rank of each stage runs.

        Args:
            count: of what the teacher teaches in a step of a data-parallel rank, the part of one
                of its TP x CP ranks.
            stages: of the pipeline.
            length: tokens of each.
            ratio: time of one through the teacher / time of a micro-batch's forward through a
                chunk of the student; as it will be measured.
        """
        if not self.spread:
            return [0] * (stages - 1) + [count]
        return sequences_by_stage(count, stages, length, ratio)


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


def needless(teachers: Mapping[str, TeacherSpec], stages: int) -> list[str]:
    """Remarks for the plan on teachers that all of one stage are to run."""
    return [
        f"teachers.{name}.ranks: pipeline: there is one stage, which runs the teacher alone"
        for name, spec in teachers.items()
        if spec.ranks == "pipeline" and stages == 1
    ]


def spare_bytes(memory: int, parameters: int, trained: int) -> int:
    """What a rank has left beside student and optimizer.

    Args:
        memory: bytes of its device.
        parameters: bytes of the student's parameters there.
        trained: how many of them train.
    """
    return memory - parameters - TRAINED_BYTES * trained
