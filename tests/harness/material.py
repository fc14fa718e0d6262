"""What the injection tests train from: a blend of two corpora, a student and a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness import lane

SEQUENCE = 32
EVALUATES = ("--eval-iters", "1")
"""Of a run that is also evaluated, as Megatron does at its end; without, none of these is."""


@dataclass(frozen=True)
class Material:
    """Paths that the tests train from.

    Attributes:
        general, domain: prefixes of Megatron datasets.
        student: checkpoint of a 4-layer student with 4 experts, the same start at every layout.
        teacher: checkpoint of a dense model of other sizes, better than the student on the domain.
    """

    folder: Path
    general: str
    domain: str
    student: str
    teacher: str

    @property
    def blend(self) -> tuple[str, ...]:
        """Data flags: entry 0 is general, entry 1 the domain."""
        return ("--data-path", "0.4", self.general, "0.6", self.domain, "--split", "90,5,5")

    def flags(self, *extra: str, **layout: int) -> list[str]:
        """Flags of an injection run on the blend, from the student's checkpoint."""
        start = ("--load", self.student, "--finetune", "--no-load-optim", "--no-load-rng")
        return student_flags(*self.blend, *start, "--train-iters", "4", *extra, **layout)


def student_flags(*extra: str, **layout: int) -> list[str]:
    """A 4-layer student with weight decay high enough to be seen if it touched the frozen."""
    small = ("--num-layers", "4", "--tokenizer-type", "NullTokenizer", "--vocab-size", "61")
    optimizer = ("--lr", "1e-2", "--weight-decay", "0.1", "--make-vocab-size-divisible-by", "16")
    optimizer += ("--eval-iters", "0")
    return [f for f in lane.moe(**layout) if f != "--mock-data"] + [*small, *optimizer, *extra]


def make_student(path: str, general: str, *extra: str, pythonpath: Sequence[str] = ()) -> None:
    """Train a student on general text for three steps, with ``extra`` flags, and save it."""
    data = ("--data-path", general, "--split", "90,5,5", "--train-iters", "3")
    save = ("--save", path, "--save-interval", "100")
    lane.run(student_flags(*data, *save, *extra), pythonpath=pythonpath)


def make_material(folder: Path, pythonpath: Sequence[str] = ()) -> Material:
    """Write the corpora, and train student and teacher for a moment; see ``lane.run``."""
    from tests.harness.corpus import write_corpora

    general, domain = write_corpora(folder)
    student, teacher = str(folder / "student"), str(folder / "teacher")
    make_student(student, general, pythonpath=pythonpath)
    teacher_flags = [f for f in lane.dense() if f != "--mock-data"]
    lane.run(
        [
            *teacher_flags,
            *("--hidden-size", "48", "--ffn-hidden-size", "64", "--vocab-size", "61"),
            *("--make-vocab-size-divisible-by", "8", "--lr", "1e-2", "--train-iters", "40"),
            *("--data-path", domain, "--split", "90,5,5", "--eval-iters", "0"),
            *("--global-batch-size", "16", "--micro-batch-size", "16"),
            *("--save", teacher, "--save-interval", "100"),
        ],
        pythonpath=pythonpath,
    )
    return Material(folder, general, domain, student, teacher)
