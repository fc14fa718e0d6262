"""The teacher gate: a teacher has something to teach only where it predicts better.

Judged by the mean loss over the held-out text of a domain. The paired interval is shown but does
not decide: with little held-out text it is wide, and a gate that then stopped every run would be
switched off rather than read.

A teacher is compared with the student as its injection began, also in a run that goes on: what the
student has learned since is no reason to stop it. What that student's losses were, on which text,
and which teachers have passed is the verdict, which every checkpoint holds (``host.lineage``). A
run that goes on asks only teachers that have not passed; a run that was refused leaves no
checkpoint, and is refused again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from megatron_moe_inject.evaluation.bootstrap import paired_difference
from megatron_moe_inject.evaluation.comparison import show_interval
from megatron_moe_inject.evaluation.evaluation import BARE, Evaluation
from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.recipe.schema import Domain, Recipe

Verdict = dict[str, Any]
"""In plain values: ``text``, its hash; ``student``, the mean loss of its beginning by class;
``passed``, the teacher by domain."""


def judge(
    now: Evaluation,
    recipe: Recipe,
    *,
    begins: bool,
    verdict: Verdict | None = None,
    first: Evaluation | None = None,
) -> tuple[list[str], Verdict | None]:
    """Compare teachers that have not passed, unless the recipe leaves the gate open.

    Args:
        now: measured before the first step of this run.
        recipe: names domains and teachers.
        begins: whether the injection begins with this run.
        verdict: of the checkpoint that the run goes on from.
        first: the first line of the injection's list, where an earlier version left no verdict.

    Returns:
        What to say of it, a line each; and the verdict of checkpoints to come, ``None`` where the
        student was not measured as its injection began.

    Raises:
        RecipeError: a teacher that is not better on one of its domains.
    """
    taught = [domain for domain in recipe.domains if domain.teacher is not None]
    if begins:
        verdict = _begun(now)
    elif verdict is None and first is not None:
        verdict = _begun(first) | {"passed": {d.name: _teacher(d, first) for d in taught}}
    passed = {} if verdict is None else dict(verdict["passed"])
    teachers = {domain.name: _teacher(domain, now) for domain in taught}
    pending = {
        name for name, teacher in teachers.items() if teacher is None or teacher != passed.get(name)
    }
    lines = []
    spec = recipe[EVALUATION]
    if spec is None or spec.gate:
        start: Mapping[str, float | None] | None = None if begins else {}
        if not begins and verdict is not None and verdict["text"] == now.text():
            start = verdict["student"]
        lines = teacher_gate(now, recipe.domains, pending, start)
        compared = pending if start is None else pending & start.keys() - _read_in_part(now)
        passed |= {name: teachers[name] for name in compared if teachers[name] is not None}
    return lines, None if verdict is None else verdict | {"passed": passed}


def _teacher(domain: Domain, evaluation: Evaluation) -> dict[str, Any] | None:
    """Who taught the domain when it was measured, and where from; None where nobody did, or nobody
    of whom a loss was measured."""
    results = evaluation.classes.get(domain.name)
    if results is None or results.teacher is None or "teacher_loss" not in results.sums:
        return None
    sources = evaluation.provenance.teachers
    names = {name: sources.get(name) for name in domain.teacher_weights}
    return {"teacher": results.teacher, "sources": names}


def _read_in_part(evaluation: Evaluation) -> set[str]:
    """Classes of which the teacher can be asked about some tokens only."""
    classes = evaluation.classes.items()
    return {
        name
        for name, results in classes
        if results.loss_beside_teacher()[1] is not results.sums["tokens"]
    }


def _begun(evaluation: Evaluation) -> Verdict:
    student = {name: results.mean("loss") for name, results in evaluation.classes.items()}
    return {"text": evaluation.text(), "student": student, "passed": {}}


def teacher_gate(
    evaluation: Evaluation,
    domains: Sequence[Domain],
    asked: Container[str] | None = None,
    start: Mapping[str, float | None] | None = None,
) -> list[str]:
    """Compare each teacher with the student on its domains; what to say of it, a line each.

    Args:
        asked: names of the domains whose teachers are compared; ``None`` = all.
        start: mean loss of the student as its injection began, by domain; ``None``: it begins now,
            so that it is what ``evaluation`` says.

    Raises:
        RecipeError: a teacher that is not better on one of its domains. The message shows every
            comparison that failed.
    """
    lines, worse, key = [], [], None
    for index, domain in enumerate(domains):
        if domain.teacher is None or (asked is not None and domain.name not in asked):
            continue
        results = evaluation.classes.get(domain.name)
        if results is None or not results.sums["tokens"].sum():
            lines.append(
                f"teacher gate: no held-out text of {domain.name}, so that teacher "
                f"{domain.taught_by} was not compared with the student"
            )
            continue
        if "teacher_loss" not in results.sums:
            lines.append(
                f"teacher gate: teacher {domain.taught_by} of {domain.name} is a store of drawn "
                "ids, or without the label's probability, so that it was not compared"
            )
            continue
        loss, tokens = results.loss_beside_teacher()
        partly = tokens is not results.sums["tokens"]
        if not tokens.sum():
            lines.append(
                f"teacher gate: teacher {domain.taught_by} can read none of the held-out text of "
                f"{domain.name}, so that it was not compared with the student"
            )
            continue
        begun = None if start is None else start.get(domain.name)
        if start is not None and (partly or begun is None):
            what = f"what teacher {domain.taught_by} reads of this text" if partly else "this text"
            lines.append(
                f"teacher gate: {domain.name}: the student was not measured on {what} as its "
                f"injection began, so that teacher {domain.taught_by} was not compared with it"
            )
            continue
        teacher, chance = results.measured("teacher_loss"), False
        bare = results.mean(BARE)
        line = f"{domain.name}: loss of teacher {domain.taught_by} {teacher:.4f}"
        line += ", " if bare is None else f" ({bare:.4f} without its prefix), "
        if begun is None:
            interval = paired_difference(results.sums["teacher_loss"], loss, tokens)
            lead, chance = interval.value, interval.low <= 0
            line += f"of the student {loss.sum() / tokens.sum():.4f} nats per token, lead "
            line += show_interval(interval)
        else:
            lead = begun - teacher
            line += f"of the student as its injection began {begun:.4f} nats per "
            line += f"token, lead {lead:+.4f}"
        line += f" on {len(results.sequences)} sequences"
        if partly:
            share = tokens.sum() / results.sums["tokens"].sum()
            line += f", {100 * share:.1f} % of whose tokens the teacher can be asked about"
        if not lead > 0:
            worse.append(line)
            key = key or f"domains[{index}].teacher"
        else:
            lines.append(f"teacher gate: {line}{'; so small a lead may be chance' * chance}")
    if worse:
        raise RecipeError(
            f"{key}: does not predict its domain better than its student ({'; '.join(worse)}); "
            "take another teacher, or go on with evaluation.gate: false",
            key,
        )
    return lines
