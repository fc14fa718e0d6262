"""What an evaluation found: sums for every sequence of held-out text, and what follows from them.

A class of data (each domain of a recipe, and ``general``) keeps its sequences apart, so that two
evaluations of the same text can be compared sequence by sequence. A sequence is known by a hash of
its tokens, labels and mask, and a class lists its sequences in the order of their hashes: the
result is the same at every parallel layout, in whatever order they were read.

Shapes: n sequences of a class, B = 15 bins of confidence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_moe_inject.host.errors import (
    RecipeError,
)

if TYPE_CHECKING:
    from megatron_moe_inject.preference.measured_pairs import MeasuredPairs

BINS = 15
"""Bins of equal width that the expected calibration error sorts confidences into."""

GENERAL_CLASS = "general"
ALWAYS = ("tokens", "loss", "correct")
TAUGHT = ("teacher_loss", "teacher_kl", "agreement")
PARTLY = ("taught_tokens", "taught_loss")
BARE = "teacher_loss_bare"
SUMS = (*ALWAYS, *TAUGHT, *PARTLY, BARE, "original_kl", "bytes")
"""Sums over the unmasked tokens of a sequence: their number, the student's cross-entropy in nats,
how often its most likely token was the label; the teacher's cross-entropy, KL(teacher || student),
how often both find the same token most likely; where the teacher lacks tokens of the text, the
tokens that those three are of and the student's cross-entropy there; the teacher's cross-entropy
without its prefix; KL(original || student); and the length of the labels as UTF-8 text. Only
``ALWAYS`` are always there."""
COUNTS = ("tokens", "correct", "agreement", "taught_tokens", "bytes")
"""Of them, those that count."""


@dataclass(frozen=True)
class ClassEvaluation:
    """One class of held-out text.

    Attributes:
        sequences: ``[n]`` hashes, sorted; a sequence that was read twice is there twice.
        sums: ``[n]`` float64 by name of ``SUMS``.
        bins: ``[3, B]``: tokens, confidence and correct predictions by bin of confidence.
        teacher: its key in the recipe, None without one.
        data: entries of the validation blend.
    """

    sequences: tuple[str, ...]
    sums: Mapping[str, np.ndarray]
    bins: np.ndarray
    teacher: str | None = None
    data: tuple[str, ...] = ()

    def mean(self, name: str, per: str = "tokens") -> float | None:
        """A sum of ``SUMS`` per token, or per another sum; None where it was not measured.

        What is of the teacher is per token that it was asked about.
        """
        partly = PARTLY[0] in self.sums and name in (*TAUGHT, PARTLY[1], BARE)
        if partly and per not in ("tokens", PARTLY[0]):
            return None
        per = PARTLY[0] if partly else per
        if name not in self.sums or per not in self.sums:
            return None
        count = self.sums[per].sum()
        return float(self.sums[name].sum() / count) if count else None

    def measured(self, name: str, per: str = "tokens") -> float:
        """``mean`` of what is known to have been measured."""
        value = self.mean(name, per)
        assert value is not None, f"{name} per {per} was not measured"
        return value

    def loss_beside_teacher(self) -> tuple[np.ndarray, np.ndarray]:
        """``[n]`` the student's loss and tokens, where the teacher was asked."""
        loss, tokens = reversed(PARTLY) if PARTLY[0] in self.sums else ("loss", "tokens")
        return self.sums[loss], self.sums[tokens]

    def summary(self) -> dict[str, float | None]:
        """The class in a few numbers: per token, in nats unless the name says otherwise."""
        loss, bits = self.mean("loss"), self.mean("loss", "bytes")
        return {
            "sequences": len(self.sequences),
            "tokens": int(self.sums["tokens"].sum()),
            "bytes": int(self.sums["bytes"].sum()) if "bytes" in self.sums else None,
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
            "bits_per_byte": None if bits is None else bits / math.log(2),
            "accuracy": self.mean("correct"),
            "calibration_error": self.calibration_error(),
            "teacher_loss": self.mean("teacher_loss"),
            "teacher_kl": self.mean("teacher_kl"),
            "teacher_agreement": self.mean("agreement"),
            "original_kl": self.mean("original_kl"),
        }

    def calibration_error(self) -> float | None:
        """Expected calibration error: the mean over tokens of |accuracy - confidence| of a bin."""
        tokens, confidence, correct = self.bins
        total = tokens.sum()
        return float(np.abs(correct - confidence).sum() / total) if total else None


@dataclass(frozen=True)
class Provenance:
    """What was measured, and how.

    Attributes:
        checkpoint: the directory that the run loaded; empty for a random start.
        checkpoint_iteration, checkpoint_sha256: see ``host.student_load.Origin``; ``None`` in files
            of earlier versions, too.
        iteration: optimiser steps that the student has taken.
        teachers: source by name of the recipe.
        tokenizer: ``--tokenizer-type`` and model, as on the command line.
        evaluated_batches: ``--eval-iters``, of ``batch_size`` sequences each.
        injection: identity of the injection whose list this is a line of (``host.lineage``).
    """

    checkpoint: str
    iteration: int
    megatron_version: str
    tokenizer: str
    sequence_length: int
    evaluated_batches: int
    batch_size: int
    teachers: dict[str, str] = field(default_factory=dict)
    injection: str = ""
    checkpoint_iteration: int | None = None
    checkpoint_sha256: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured at one moment; classes without a sequence are left out.

    Attributes:
        pairs: held-out pairs of answers by rising hash (``MeasuredPairs.in_order``); ``None``
            without.
    """

    provenance: Provenance
    classes: Mapping[str, ClassEvaluation]
    pairs: MeasuredPairs | None = None

    def text(self) -> str:
        """Hash of the text: equal where the same sequences were read, each as often and as the
        same class, and the same pairs of answers."""
        digest = hashlib.sha256()
        for name in sorted(self.classes):
            digest.update(f"{name}:{','.join(self.classes[name].sequences)};".encode())
        if self.pairs is not None:
            digest.update(f"\npairs:{','.join(self.pairs.hashes)};".encode())
        return digest.hexdigest()


def build_class(
    rows: Iterable[tuple[str, Mapping[str, float]]],
    bins: np.ndarray,
    teacher: str | None,
    data: Iterable[str],
) -> ClassEvaluation:
    """A class from hash and sums of its sequences, in any order."""
    ordered = sorted(rows, key=lambda row: row[0])
    names = [name for name in SUMS if ordered and name in ordered[0][1]]
    sums = {name: np.array([_rounded(row[name]) for _, row in ordered]) for name in names}
    return ClassEvaluation(
        tuple(key for key, _ in ordered), sums, np.asarray(bins, dtype=float), teacher, tuple(data)
    )


def _rounded(value: float) -> float:
    """Ten digits: beyond what float32 losses carry, and half of what float64 would write."""
    return float(f"{value:.10g}")


def same_text(before: Evaluation, after: Evaluation, names: tuple[str, str]) -> None:
    """Refuse to compare evaluations of different text.

    Raises:
        RecipeError: names what differs, and settings that may be the reason.
    """
    first, second = names
    _same_pairs(before, after, names)
    missing = set(before.classes) ^ set(after.classes)
    if missing:
        name = min(missing)
        having, lacking = (first, second) if name in before.classes else (second, first)
        raise RecipeError(
            f"{lacking}: has no class {name}, which {having} has;{_reasons(before, after)} measure "
            "both with one recipe on the same data"
        )
    for name, ours in before.classes.items():
        theirs = after.classes[name]
        if ours.sequences == theirs.sequences:
            if not np.array_equal(ours.sums["tokens"], theirs.sums["tokens"]):
                raise RecipeError(
                    f"{second}: class {name} counts other tokens in the sequences of {first}; "
                    "measure both again"
                )
            continue
        common = len(set(ours.sequences) & set(theirs.sequences))
        raise RecipeError(
            f"{second}: class {name} is not the text of {first}: {len(theirs.sequences)} sequences "
            f"here and {len(ours.sequences)} there, {common} in common;"
            f"{_reasons(before, after)} measure both with the same data, --split, --seed, "
            "--eval-iters, --global-batch-size, --seq-length and tokenizer"
        )


def _same_pairs(before: Evaluation, after: Evaluation, names: tuple[str, str]) -> None:
    ours, theirs = before.pairs, after.pairs
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        having, lacking = names if theirs is None else names[::-1]
        raise RecipeError(
            f"{lacking}: has no pairs of answers, which {having} has; measure both with one recipe "
            "on the same data"
        )
    if ours.hashes != theirs.hashes or not ours.tokens.equal(theirs.tokens):
        common = len(set(ours.hashes) & set(theirs.hashes))
        raise RecipeError(
            f"{names[1]}: its pairs of answers are not those of {names[0]}: {len(theirs.hashes)} "
            f"here and {len(ours.hashes)} there, {common} in common; measure both with the same "
            "data and tokenizer"
        )


def _reasons(before: Evaluation, after: Evaluation) -> str:
    settings = ("tokenizer", "sequence_length", "evaluated_batches", "batch_size")
    pairs: list[tuple[str, Any, Any]] = [
        (name, getattr(before.provenance, name), getattr(after.provenance, name))
        for name in settings
    ]
    pairs += [
        (f"data of {name}", list(results.data), list(after.classes[name].data))
        for name, results in before.classes.items()
        if name in after.classes
    ]
    changes = [f"{name} was {a} and is {b}" for name, a, b in pairs if a != b]
    return f" {'; '.join(changes)};" if changes else ""


LARGEST = 3.4028234663852886e38
"""Of float32, in which a run computes."""
