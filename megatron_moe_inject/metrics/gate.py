"""The teacher gate: a teacher has something to teach only where it predicts better.

Judged by the mean loss over the held-out text of a domain. The paired interval is shown but does
not decide: with little held-out text it is wide, and a gate that then stopped every run would be
switched off rather than read.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.metrics.bootstrap import paired_difference
from megatron_moe_inject.metrics.comparison import show_interval
from megatron_moe_inject.metrics.evaluation import BARE, Evaluation
from megatron_moe_inject.recipe import Domain
from megatron_moe_inject.typed import RecipeError


def teacher_gate(evaluation: Evaluation, domains: Sequence[Domain]) -> list[str]:
    """Compare each teacher with the student on its domains; what to say of it, a line each.

    Raises:
        RecipeError: a teacher that is not better on one of its domains. The message shows every
            comparison that failed.
    """
    said, worse, key = [], [], None
    for index, domain in enumerate(domains):
        if domain.teacher is None:
            continue
        found = evaluation.classes.get(domain.name)
        if found is None or not found.sums["tokens"].sum():
            said.append(
                f"teacher gate: no held-out text of {domain.name}, so that teacher "
                f"{domain.taught_by} was not compared with the student"
            )
            continue
        loss, tokens = found.loss_beside_teacher()
        if not tokens.sum():
            said.append(
                f"teacher gate: teacher {domain.taught_by} can read none of the held-out text of "
                f"{domain.name}, so that it was not compared with the student"
            )
            continue
        lead = paired_difference(found.sums["teacher_loss"], loss, tokens)
        bare = found.mean(BARE)
        without = "" if bare is None else f" ({bare:.4f} without its prefix)"
        told = (
            f"{domain.name}: loss of teacher {domain.taught_by} {found.mean('teacher_loss'):.4f}"
            f"{without}, of the student {loss.sum() / tokens.sum():.4f} nats per token, lead "
            f"{show_interval(lead)} on {len(found.sequences)} sequences"
        )
        if tokens is not found.sums["tokens"]:
            share = tokens.sum() / found.sums["tokens"].sum()
            told += f", {100 * share:.1f} % of whose tokens the teacher can be asked about"
        if not lead.value > 0:
            worse.append(told)
            key = key or f"domains[{index}].teacher"
        elif lead.low <= 0:
            said.append(f"teacher gate: {told}; so small a lead may be chance")
        else:
            said.append(f"teacher gate: {told}")
    if worse:
        raise RecipeError(
            f"{key}: does not predict its domain better than its student ({'; '.join(worse)}); "
            "take another teacher, or go on with evaluation.gate: false",
            key,
        )
    return said
