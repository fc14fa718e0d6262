"""What is compared: from where a student starts, and what it learns from, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH = 512
"""Of the dense student's feed-forward: half of the quickstart's 8 experts of 128 neurons."""
DENSE = (
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4"),
    *("--ffn-hidden-size", str(WIDTH)),
)
EXPERTS, TOPK, GRANULARITY = 8, 4, 2
"""Of the student that is upcycled from the quickstart's dense teacher: four copies in halves."""
ROUTER = (
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-dtype", "fp32", "--moe-token-dispatcher-type", "alltoall"),
)
CE, KD, FALLING = "CE", "KD", "KD, CE first"
"""What a student learns from: the text, the teacher, or more and more from the teacher."""


@dataclass(frozen=True)
class Direction:
    """A teacher and its students.

    Attributes:
        text: of the quickstart's corpora that students learn.
        teacher: of the models that the quickstart ships.
        architecture: the teacher's, an array of the quickstart's flags.sh.
        rates: peak learning rate by start.
        arms: (start, what it learns from), in the order of the table.
    """

    text: str
    teacher: str
    architecture: str
    rates: dict[str, float]
    arms: tuple[tuple[str, str], ...]


SCRATCH, DENSIFIED, UPCYCLED, ITSELF = "from scratch", "densify", "upcycle", "the teacher itself"
DRAWN = "densify, feed-forwards drawn"
DIRECTIONS = {
    "moe_to_dense": Direction(
        "english",
        "student",
        "STUDENT",
        {SCRATCH: 3e-3, DENSIFIED: 3e-3, DRAWN: 3e-3},
        (
            *((start, by) for start in (SCRATCH, DENSIFIED) for by in (CE, KD, FALLING)),
            (DRAWN, KD),
        ),
    ),
    "dense_to_moe": Direction(
        "code",
        "teacher",
        "TEACHER",
        {ITSELF: 1e-3, UPCYCLED: 1e-3},
        ((ITSELF, CE), (UPCYCLED, CE), (UPCYCLED, KD)),
    ),
}


def weights(by: str, steps: int) -> dict:
    """The recipe's ``objective``."""
    if by == FALLING:
        begin, end = 0.8, 0.2
        falling = {"points": {0: begin, steps: end}}
        return {"alpha": {"points": {0: 1 - begin, steps: 1 - end}}, "beta": falling}
    return {"alpha": float(by == KD), "beta": float(by == CE)}


def recipe(direction: Direction, by: str, data: str, source: str, steps: int) -> dict:
    """What a run is to do: the whole student trains.

    Args:
        data: folder of the corpora.
        source: of the teacher.
    """
    domain = {
        "name": direction.text,
        "data": [f"{data}/{direction.text}_{part}" for part in ("train", "held_out")],
    }
    made: dict = {
        "domains": [domain],
        "objective": weights(by, steps),
        "train": {"everything": True},
    }
    if by != CE:
        domain["teacher"] = "teacher"
        made["teachers"] = {"teacher": {"source": source}}
    return made
