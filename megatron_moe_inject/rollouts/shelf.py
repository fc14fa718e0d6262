"""Which rollouts each step reads: the same on every rank, and the same after a resume.

A shelf is the state of one folder: files that were found and are not read to the end, in the order
in which they are read, and the checksums of those that were. It changes in two ways alone, by what
all ranks are told of the folder (``add``) and by how many samples a step has (``take``), so it is
the same on every rank. It is kept in Megatron's arguments, so that each checkpoint has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

_DIGITS = 32
"""Of a checksum, enough to tell files apart."""


@dataclass(frozen=True)
class ShelfFile:
    """A file that was found whole and is of this injection.

    Attributes:
        name: in the folder.
        sha256: of its content.
        iteration: of the checkpoint that wrote it.
        samples: how many it gives.
        lm_loss: of its tokens by who wrote it; None where that is not told.
    """

    name: str
    sha256: str
    iteration: int
    samples: int
    lm_loss: float | None = None


class Place(NamedTuple):
    """What a sample of a step reads.

    Attributes:
        file: which.
        sample: of it, from 0.
    """

    file: ShelfFile
    sample: int


@dataclass(frozen=True)
class AgePolicy:
    """What becomes of rollouts of a student that has moved on.

    Attributes:
        max_age: optimizer steps since the checkpoint that wrote; None = any number.
        weighed: older ones are read with a chance of 2^-(steps beyond / max_age), else not.
    """

    max_age: int | None = None
    weighed: bool = False

    def too_old(self, age: int) -> bool:
        """Whether nothing of a file is read at that age."""
        return self.max_age is not None and age > self.max_age and not self.weighed

    def reads(self, file: ShelfFile, sample: int, iteration: int) -> bool:
        """Whether a sample is read at an iteration; by checksum and number, so that every rank and
        every run says the same."""
        if self.max_age is None or iteration - file.iteration <= self.max_age:
            return True
        if self.too_old(iteration - file.iteration):
            return False
        beyond = (iteration - file.iteration - self.max_age) / self.max_age
        drawn = hashlib.sha256(f"{file.sha256}:{sample}".encode()).digest()[:8]
        return int.from_bytes(drawn, "big") < 2.0**64 * 2.0**-beyond


@dataclass
class Shelf:
    """The state of one folder.

    Attributes:
        files: to be read, in order.
        next: the sample of the first of them that is read next.
        read: by the beginning of its checksum, each file that was ever put here, with the
            iteration of its checkpoint.
        taken, stale: samples that were read, and that were too old by then.
        told: whether a file has told the loss of its tokens by who wrote it.
    """

    files: list[ShelfFile] = field(default_factory=list)
    next: int = 0
    read: dict[str, int] = field(default_factory=dict)
    taken: int = 0
    stale: int = 0
    told: bool = False

    def knows(self, sha256: str) -> bool:
        """Whether a file of this content was put here before."""
        return sha256[:_DIGITS] in self.read

    def add(self, files: Iterable[ShelfFile]) -> None:
        """Put files behind those that are here."""
        for file in files:
            if not self.knows(file.sha256):
                self.read[file.sha256[:_DIGITS]] = file.iteration
                self.files.append(file)
                self.told |= file.lm_loss is not None

    def take(self, samples: int, iteration: int, age: AgePolicy) -> list[Place]:
        """The next samples, at most as many as asked for; what is too old is left out for good."""
        places: list[Place] = []
        while self.files and len(places) < samples:
            file = self.files[0]
            if self.next >= file.samples:
                self.files, self.next = self.files[1:], 0
                continue
            if age.reads(file, self.next, iteration):
                places.append(Place(file, self.next))
            else:
                self.stale += 1
            self.next += 1
        self.taken += len(places)
        return places

    def waiting(self, iteration: int, age: AgePolicy, at_most: int) -> int:
        """How many samples could be taken now, counted up to some number."""
        return len(self.copy().take(at_most, iteration, age))

    def copy(self) -> Shelf:
        """One that changes by itself."""
        return Shelf(
            list(self.files), self.next, dict(self.read), self.taken, self.stale, self.told
        )

    def plain(self) -> dict[str, Any]:
        """In plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> Self:
        """Of ``plain``."""
        return cls(**values | {"files": [ShelfFile(**file) for file in values["files"]]})
