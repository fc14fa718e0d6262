"""What is compared: from where a student starts, and what it learns from, in every direction."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH = 512
"""Of the dense student's feed-forward: half of the quickstart's 8 experts of 128 neurons."""
DENSE = (
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4"),
    *("--ffn-hidden-size", str(WIDTH)),
)
SMALL = (
    *("--num-layers", "4", "--hidden-size", "96", "--num-attention-heads", "3"),
    *("--ffn-hidden-size", "128"),
)
"""The weaker dense model that becomes a mixture, trained here for ``SMALL_STEPS``."""
SMALL_STEPS, SMALL_RATE = 200, 3e-3
EXPERTS, TOPK, GRANULARITY = 8, 2, 2
"""Of the student that is upcycled from it: four copies in halves, of which a token passes one."""
ROUTER = (
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-dtype", "fp32", "--moe-token-dispatcher-type", "alltoall"),
)
CE, KD, FALLING, BESIDE = "CE", "KD", "KD, CE first", "KD, CE beside it"
"""What a student learns from: the text, the teacher, more and more from the teacher, or the teacher
with the text beside it at first."""

SCRATCH, DENSIFIED, UPCYCLED, SMALL_ON = "from scratch", "densify", "upcycle", "dense, goes on"
DRAWN = "densify, feed-forwards drawn"
DENSIFY = {
    DENSIFIED: (),
    "merge, by outputs": ("--method", "merge"),
    "keep, by outputs": ("--method", "keep"),
    "keep, most used": ("--method", "keep", "--score", "token"),
}
"""Starts that ``moe-inject densify`` makes, by its options; the first has none."""


@dataclass(frozen=True)
class Direction:
    """A teacher and its students.

    Attributes:
        text: of the quickstart's corpora that students learn.
        teacher: of the models that the quickstart ships.
        architecture: the teacher's, an array of the quickstart's flags.sh.
        experts: whether the teacher has experts.
        rate: peak learning rate.
        arms: (start, what it learns from), in the order of the table.
        steps: of a run, unless the command says otherwise.
        evaluations: while it trains, the last of them at the end.
    """

    text: str
    teacher: str
    architecture: str
    experts: bool
    rate: float
    arms: tuple[tuple[str, str], ...]
    steps: int = 100
    evaluations: int = 4


DIRECTIONS = {
    "moe_to_dense": Direction(
        "english",
        "student",
        "STUDENT",
        True,
        3e-3,
        (
            *((start, by) for start in (SCRATCH, DENSIFIED) for by in (CE, KD, FALLING, BESIDE)),
            (DRAWN, KD),
        ),
    ),
    "dense_to_moe": Direction(
        "code",
        "teacher",
        "TEACHER",
        False,
        1e-3,
        tuple((start, by) for start in (SMALL_ON, UPCYCLED) for by in (CE, KD)),
    ),
    "densify": Direction(
        "english",
        "student",
        "STUDENT",
        True,
        3e-3,
        tuple((start, CE) for start in DENSIFY),
        steps=25,
        evaluations=1,
    ),
}


def weights(by: str, steps: int) -> dict:
    """The recipe's ``objective``."""
    if by == FALLING:
        begin, end = 0.8, 0.2
        falling = {"points": {0: begin, steps: end}}
        return {"alpha": {"points": {0: 1 - begin, steps: 1 - end}}, "beta": falling}
    if by == BESIDE:
        return {"alpha": 1.0, "beta": {"points": {0: 0.8, steps: 0.0}}}
    return {"alpha": float(by == KD), "beta": float(by == CE)}


def recipe(
    direction: Direction, by: str, data: str, source: str, steps: int, processes: int = 1
) -> dict:
    """What a run is to do: the whole student trains.

    Args:
        data: folder of the corpora.
        source: of the teacher, whose experts are spread over the processes.
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
        if direction.experts and processes > 1:
            made["teachers"]["teacher"]["ep"] = processes
    return made
