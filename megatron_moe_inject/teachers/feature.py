"""The teachers of the domains as a feature: their rules, their lines of the plan, their start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import NAME, fail
from megatron_moe_inject.host.text import table
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.fields import check_choice, check_temperature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION
from megatron_moe_inject.recipe.schedule import ever_positive
from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
from megatron_moe_inject.teachers import uses
from megatron_moe_inject.teachers.placement import needless
from megatron_moe_inject.teachers.sources import SOURCES, examples

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

PREFIXES = ("auto", "none", "bos")
_OF_KINDS = {"tail": ("store", "server"), "trusted": ("store",), "server": ("server",)}
"""Fields that only some kinds of teachers have."""


class Teachers(Feature):
    """``teachers``: from whom each domain learns."""

    runs = (INJECTION, EVALUATION)

    def rules(self, recipe: Recipe) -> None:
        """Each has a name, a source of a known kind, and a domain that it teaches."""
        used = {name for domain in recipe.domains for name in domain.teacher_weights}
        used.add(recipe.reference_teacher() or "")
        for name, spec in recipe.teachers.items():
            path, usual = f"teachers.{name}", type(spec)(spec.source)
            if not NAME.fullmatch(name):
                raise fail("teachers", name, "is no name", "use letters, digits, _ and -")
            if spec.kind not in SOURCES or not spec.path.strip():
                raise fail(f"{path}.source", spec.source, "is no source", examples())
            check_temperature(f"{path}.temperature", spec.temperature)
            takes_fp8 = spec.fp8 == "none" or SOURCES[spec.kind].takes_fp8
            if not takes_fp8 or (spec.fp8 != "none" and spec.dtype == "fp32"):
                raise fail(
                    f"{path}.fp8", spec.fp8, f"is not for a teacher of {spec.kind}, {spec.dtype}",
                    "FP8 is for megatron: teachers with dtype params or bf16; write none",
                )  # fmt: skip
            if spec.ep != 1:
                _check_ep(f"{path}.ep", spec)
            _check_prefix(f"{path}.prefix", spec.prefix)
            for key, kinds in _OF_KINDS.items():
                if spec.kind not in kinds and getattr(spec, key) != getattr(usual, key):
                    raise fail(
                        f"{path}.{key}", getattr(spec, key), f"is for a {' or '.join(kinds)}",
                        f"write such as source: {SOURCES[kinds[0]].example}, or remove it",
                    )  # fmt: skip
            if spec.window < 0:
                raise fail(f"{path}.window", spec.window, "is negative", "0 keeps the whole step")
            for student, teacher in spec.layers.items():
                if min(student, teacher) < 0:
                    raise fail(
                        f"{path}.layers.{student}", teacher, "has a negative layer",
                        "decoder layers count from 0, in the student and in the teacher",
                    )  # fmt: skip
            if name not in used:
                raise fail(
                    path, spec.source, "is used by no domain", f"write teacher: {name} in one"
                )

    def warnings(self, recipe: Recipe) -> list[str]:
        """Teachers that no loss listens to."""
        if recipe.teachers and not any(ever_positive(recipe.alpha(d)) for d in recipe.domains):
            return ["alpha is 0: teachers run for the reported losses only"]
        return []

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Names and sources."""
        rows = [("teacher", "source", "kind")]
        rows += [(name, spec.source, spec.kind) for name, spec in recipe.teachers.items()]
        return {"teachers": table(rows)} if recipe.teachers else {}

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Teachers that all of one stage are to run."""
        return needless(recipe.teachers, facts.parallel.pp)

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Data files, and building a teacher of Megatron's."""
        kinds = {spec.kind for spec in recipe.teachers.values()}
        parts = [uses.DATA_FILES] if kinds else []
        parts += [uses.MEGATRON] if "megatron" in kinds else []
        in_fp8 = any(spec.fp8 != "none" for spec in recipe.teachers.values())
        return [*parts, uses.IN_FP8] if in_fp8 else parts

    def start(self, run: RunContext) -> RunPart | None:
        """Look at the teachers' files."""
        from megatron_moe_inject.teachers.part import TeachersPart

        return TeachersPart(run)


def _check_ep(path: str, spec: TeacherSpec) -> None:
    """Whose experts can lie on several ranks."""
    if spec.ep < 1:
        raise fail(path, spec.ep, "is no number of ranks", "write 1 or more")
    if not SOURCES[spec.kind].takes_ep:
        raise fail(
            path, spec.ep, f"is not for a teacher of {spec.kind}",
            "moe-inject import-hf makes a megatron: checkpoint of a folder; or remove it",
        )  # fmt: skip


def _check_prefix(path: str, prefix: str | list[int]) -> None:
    if isinstance(prefix, str):
        check_choice(path, prefix, PREFIXES)
        return
    if not prefix:
        raise fail(path, prefix, "is empty", "write none, or list ids, such as [1]")
    for i, token in enumerate(prefix):
        if token < 0:
            raise fail(f"{path}[{i}]", token, "is negative", "ids count from 0")
