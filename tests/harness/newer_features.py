"""Runs of features that came after the last session on a GPU, one recipe each.

    python -m tests.harness.newer_features FOLDER    trains what they start from, on the CPU lane

``tests/gpu/test_features.py`` runs them on a GPU, ``tests/training/test_pretended_gpu.py`` on a
pretended one, so that a first session there is not about recipes and flags.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.rollouts.identity import writer_of_folder
from tests.harness import lane, rollout_files
from tests.harness.aligned import AlignedMaterial, make_aligned_material
from tests.harness.injection import RECIPE, recipe_file
from tests.harness.material import Material, make_material
from tests.harness.moe_teacher import flags_of
from tests.harness.pairs import data_flags, write_pairs
from tests.harness.training_recipes import ALIGNED

_WIDE = ("--hidden-size", "128", "--ffn-hidden-size", "128", "--moe-ffn-hidden-size", "128")
_ALONE = ("train.experts=none",)
FOLDERS = ("moe", "states", "ids", "rollouts")


@dataclass(frozen=True)
class Newer:
    """A feature.

    Attributes:
        fields: of ``injection.RECIPE``, or with ``aligned`` of ``training_recipes.ALIGNED``; in
            them ``FOLDERS`` in braces.
        terms: what the log then has.
        flags: of the run.
        pairs: whether entry 2 of the blend is pairs of answers.
        on_gpu: further fields on a GPU, which the CPU lane refuses.
        aligned: whether the teacher has a tokenizer of its own.
    """

    fields: tuple[str, ...] = ()
    terms: tuple[str, ...] = ("kd loss",)
    flags: tuple[str, ...] = ()
    pairs: bool = False
    on_gpu: tuple[str, ...] = ()
    aligned: bool = False

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen."""
        return "train.everything=true" not in self.fields


NEWER = {
    "adapters": Newer(
        (*_ALONE, "train.adapters=[{targets: [experts, attention], experts: all, rank: 8}]")
    ),
    "adapters of a domain": Newer(
        (*_ALONE, "train.adapters=[{targets: [experts], experts: all, rank: 8, by: domain}]")
    ),
    "everything": Newer(("train.everything=true", "objective.gamma=1.0"), ("retention loss",)),
    "retained experts": Newer(("retention.experts=2.0",), ("expert retention",)),
    "imitated experts": Newer(
        ("imitation.hidden=0.5", "imitation.experts=0.5"), ("expert imitation loss",)
    ),
    "preference": Newer(
        (
            *("objective.preference.data=[2]", "objective.preference.beta=0.5"),
            *("objective.preference.reference=original", "objective.preference.coeff=1.0"),
            "mixing.preference=0.25",
        ),
        ("preference loss",),
        pairs=True,
    ),
    "rollouts": Newer(
        ("domains.0.data=[1, 'rollouts:{rollouts}']", "rollouts.every=2"),
        ("kd loss", "rollout share/code"),
        flags=("--calculate-per-token-loss",),
    ),
    "store of states": Newer(("teachers.coder.source='store:{states}'",)),
    "store of ids": Newer(("teachers.coder.source='store:{ids}'",)),
    "teacher with experts": Newer(("teachers.coder.source='megatron:{moe}'",)),
    "teacher with experts in fp8": Newer(
        ("teachers.coder.source='megatron:{moe}'",), on_gpu=("teachers.coder.fp8=blockwise",)
    ),
    "aligned teacher": Newer(terms=("kd loss", "aligned share"), aligned=True),
}


@dataclass(frozen=True)
class Made:
    """What the runs start from, in a folder that ``make`` filled."""

    folder: Path

    @property
    def material(self) -> Material:
        names = ("general", "domain", "student", "teacher")
        return Material(self.folder, *(str(self.folder / name) for name in names))

    @property
    def of_text(self) -> AlignedMaterial:
        own = self.folder / "aligned"
        names = ("tokenizer", "general", "domain", "student", "teacher", "same")
        tokenizer, general, domain, student, teacher, same = (own / name for name in names)
        texts = (str(general), str(domain), str(student))
        return AlignedMaterial(own, tokenizer, *texts, teacher, same)

    def flags(self, name: str, *extra: str, on_gpu: bool = False) -> list[str]:
        """Of a feature's run; later ``extra`` flags win."""
        newer = NEWER[name]
        fields = [*newer.fields, *(newer.on_gpu if on_gpu else ())]
        for key in FOLDERS:
            fields = [one.replace(f"{{{key}}}", str(self.folder / key)) for one in fields]
        if newer.aligned:
            recipe = self.folder / "aligned.yaml"
            recipe.write_text(ALIGNED.format(teacher=self.of_text.teacher))
            flags, path = self.of_text.flags(), str(recipe)
        else:
            flags, path = self.material.flags(), recipe_file(self.material, RECIPE)
        if newer.pairs:
            at = flags.index("--data-path")
            end = flags.index("--split") + 2
            flags[at:end] = data_flags(self.material, str(self.folder / "pairs"))
        flags += ["--inject-recipe", path]
        flags += ["--inject-set", *fields] if fields else []
        flags += ["--inject-verify-frozen"] if newer.freezes else []
        return [*flags, *newer.flags, *extra]


def make(folder: Path, names: Iterable[str] = NEWER) -> Made:
    """Train and write what the runs of these features need and is not there yet."""
    made = Made(folder)
    if not (folder / "student").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_material(folder)
    for name in names:
        for what, write in _MAKERS.items():
            if what in _needs(NEWER[name]) and not _there(folder / what):
                write(made)
    return made


def _needs(newer: Newer) -> set[str]:
    folders = {key for key in FOLDERS if any(f"{{{key}}}" in one for one in newer.fields)}
    wanted = {"pairs": newer.pairs, "aligned": newer.aligned}
    return folders | {what for what, needed in wanted.items() if needed}


def _there(path: Path) -> bool:
    return path.exists() or path.with_suffix(".idx").exists()


def _rollouts(made: Made) -> None:
    writer = writer_of_folder(made.material.student)
    rollout_files.write(made.folder / "rollouts", "a.jsonl", 12, writer=writer)


def _moe(made: Made) -> None:
    data = ("--data-path", made.material.domain, "--split", "90,5,5", "--train-iters", "10")
    keep = ("--save", str(made.folder / "moe"), "--save-interval", "100")
    lane.run(flags_of("softmax", *_WIDE, *data, *keep))


def _store(name: str, *options: str) -> Callable[[Made], None]:
    """Writes what the teacher says of the domain's text."""

    def write(made: Made) -> None:
        material, output = made.material, str(made.folder / name)
        command = [sys.executable, "-m", "megatron_moe_inject.cli", "store-teacher"]
        command += [recipe_file(material, RECIPE), "--output", output, "--cpu", *options, "--"]
        text = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "61", "--seq-length", "32")
        subprocess.run(
            [*command, *material.blend, *text], check=True, timeout=600, capture_output=True
        )

    return write


def _aligned(made: Made) -> None:
    folder = made.folder / "aligned"
    folder.mkdir()
    make_aligned_material(folder)


_MAKERS: dict[str, Callable[[Made], object]] = {
    "pairs": lambda made: write_pairs(made.folder / "pairs"),
    "rollouts": _rollouts,
    "moe": _moe,
    "states": _store("states", "--states"),
    "ids": _store("ids", "--top", "16"),
    "aligned": _aligned,
}


def make_apart(folder: Path) -> Made:
    """``make`` in a process that sees no GPU, where the lane would not start beside one."""
    subprocess.run(
        [sys.executable, "-m", "tests.harness.newer_features", str(folder)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=900,
    )
    return Made(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
