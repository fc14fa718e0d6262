"""The plan of a run as text: what ``--inject-dry-run`` and ``moe-inject plan`` print.

What each feature says stands with it (``Feature.plan_lines``, ``loss_terms``, ``warnings``); here
are the lines that belong to none. Columns are aligned plain text, because a plan ends in job logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe_inject.host.errors import listing
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.text import ranges, table
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.expert_choice import describe_choice
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import EVERYWHERE
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.schedule import ever_positive, show_weight
from megatron_moe_inject.recipe.schema import Domain, Recipe

_MAX_LAYERS = 16


@dataclass(frozen=True)
class Plan:
    """Everything a plan shows; what is None or empty is left out of the text.

    Attributes:
        recipe: with its experts resolved (``experts.choose.choice.resolve_experts``) as far as
            their profiles are there.
        facts: the student, where known.
        lines: the features' lines by title, where more is known than recipe and student tell.
        warnings: remarks of the caller, shown after ``recipe_warnings``.
    """

    recipe: Recipe
    facts: StudentFacts | None = None
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def feature_lines(recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
    """What the features say from recipe and student alone, by title."""
    lines: dict[str, list[str]] = {}
    for feature in FEATURES:
        for title, more in feature.plan_lines(recipe, facts).items():
            lines.setdefault(title, []).extend(more)
    return lines


def render_plan(plan: Plan) -> str:
    """The plan as lines of plain text, without a trailing newline."""
    lines = {
        "domains": _domain_lines(plan),
        "experts": _expert_lines(plan.recipe, plan.facts),
        "loss": _loss_lines(plan.recipe),
        **feature_lines(plan.recipe, plan.facts),
        **plan.lines,
        "student": _student_lines(plan.facts),
        "warnings": [*recipe_warnings(plan.recipe), *plan.warnings],
    }
    return "moe-inject plan" + render_lines(lines)


def render_lines(lines: Mapping[str, Sequence[str]]) -> str:
    """Titles behind an empty line each, and their lines below; what has no lines is left out."""
    blocks = ([title, *(f"  {line}" for line in body)] for title, body in lines.items() if body)
    return "".join("\n\n" + "\n".join(block) for block in blocks)


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What is allowed but worth a second look, one sentence each."""
    warnings = []
    owners: dict[tuple[int, int], list[str]] = {}
    for domain in recipe.domains:
        for layer, ids in domain.experts.layers.items():
            for expert in ids:
                owners.setdefault((layer, expert), []).append(domain.name)
    shared: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for (layer, expert), names in sorted(owners.items()):
        if len(names) > 1:
            shared.setdefault(tuple(names), {}).setdefault(layer, []).append(expert)
    for sharing, layers in shared.items():
        where = listing((f"layer {la}: {ranges(ids)}" for la, ids in layers.items()), limit=4)
        warnings.append(f"{' and '.join(sharing)} share experts ({where})")
    for domain in _undecided(recipe):
        file = domain.experts.profile
        if file is None:
            warnings.append(
                f"the new experts of {domain.name} are known once the student's checkpoint is: "
                "name it with --load behind --"
            )
            continue
        warnings.append(
            f"{file} is no file yet (in {Path.cwd()}): training needs it, to choose the experts of "
            f"{domain.name}; moe-inject profile records it"
        )
    warnings += recipe.remarks
    return warnings + [line for feature in FEATURES for line in feature.warnings(recipe)]


def _domain_lines(plan: Plan) -> list[str]:
    rows = [("domain", "teacher", "data")]
    for i, domain in enumerate(plan.recipe.domains):
        rows.append((domain.name, domain.taught_by or "(none: CE only)", _data_of(plan, i)))
    general = _data_of(plan, GENERAL)
    if general:
        held = ever_positive(plan.recipe.objective.gamma)
        rows.append(("(general)", "(the original)" if held else "(none: CE only)", general))
    return table(rows)


def _data_of(plan: Plan, label: int) -> str:
    """Training blend entries with a label, as paths where the student is known."""
    if plan.facts is None:
        if label == GENERAL:
            return "the rest of the blend"
        return listing(plan.recipe.domains[label].data, limit=4)
    if plan.facts.mock_data:
        return "mock data" if label != GENERAL else ""
    labels = split_labels(plan.recipe, plan.facts, "train")
    entries = plan.facts.data_paths["train"]
    paths = [f"{j}: {entries[j]}" for j, entry_label in enumerate(labels) if entry_label == label]
    return listing(paths, limit=4)


def _expert_lines(recipe: Recipe, facts: StudentFacts | None) -> list[str]:
    if recipe.train.experts == "all":
        return ["all experts of all MoE layers"]
    if recipe.train.everything and not any(d.experts.layers for d in recipe.domains):
        return []
    pattern = None if facts is None else facts.pattern
    paired = pattern is not None and pattern.blocks is not None
    rows = [("domain", "layer (GPT block)" if paired else "layer", "experts")]
    for domain in recipe.domains:
        layers = sorted(domain.experts.layers.items())
        for layer, ids in layers[:_MAX_LAYERS]:
            number = f"{layer} ({pattern.block_of(layer)})" if pattern and paired else str(layer)
            rows.append((domain.name, number, ranges(ids)))
        if len(layers) > _MAX_LAYERS:
            rest = layers[_MAX_LAYERS:]
            total = sum(len(ids) for _, ids in rest)
            rows.append((domain.name, ranges([layer for layer, _ in rest]), f"{total} in all"))
    origins = [f"{d.name}: {d.experts.origin}" for d in recipe.domains if d.experts.origin]
    for domain in _undecided(recipe):
        rule = describe_choice(domain.experts, domain.experts.domain or domain.name, None)
        origins.append(f"{domain.name}: still to be chosen by {rule}")
    return (table(rows, right=(1,)) if len(rows) > 1 else []) + origins


def _undecided(recipe: Recipe) -> list[Domain]:
    """Domains whose profile or checkpoint is not there yet."""
    return [domain for domain in recipe.domains if domain.experts.undecided]


def _loss_lines(recipe: Recipe) -> list[str]:
    """A formula for each domain, for general tokens, and for what concerns no token."""
    objective = recipe.objective
    mixture = {"jsd": objective.jsd_beta, "skew_kl": objective.skew}.get(objective.divergence)
    divergence = objective.divergence + ("" if mixture is None else f"[{mixture:g}]")
    if objective.confidence != "none":
        divergence = f"confidence[{objective.confidence}] * {divergence}"
    formulas: dict[str, list[str]] = {}
    for domain in recipe.domains:
        terms = formulas[domain.name] = []
        alpha, beta = recipe.alpha(domain), recipe.beta(domain)
        if ever_positive(alpha):
            temperature = recipe.temperature(domain)
            terms.append(
                f"{show_weight(alpha)} * {temperature:g}^2 * "
                f"{divergence}({domain.taught_by} || student, T={temperature:g})"
            )
        if ever_positive(beta):
            terms.append(f"{show_weight(beta)} * CE")
    general = (objective.gamma, "KL(original || student)"), (recipe.general_beta(), "CE")
    formulas["general"] = [f"{show_weight(w)} * {name}" for w, name in general if ever_positive(w)]
    for feature in FEATURES:
        for where, term in feature.loss_terms(recipe):
            formulas.setdefault(where, []).append(term)
    rows = []
    for where, terms in formulas.items():
        name = where if where == EVERYWHERE else f"({where})" if where == "general" else where
        rows.append((name, "=", " + ".join(terms) or "0"))
    lines = table(rows)
    if objective.skip_worse:
        lines.append("no distillation where the teacher predicts the label worse than the student")
    return lines


def _student_lines(facts: StudentFacts | None) -> list[str]:
    if facts is None:
        return []
    kind = "dense"
    if facts.num_moe_experts is not None:
        kind = f"{facts.num_moe_experts} experts in layers {ranges(facts.moe_layers)}"
    layout = facts.parallel
    sizes = [("TP", layout.tp), ("PP", layout.pp), ("VPP", layout.vpp), ("CP", layout.cp)]
    sizes += [("EP", layout.ep), ("ETP", layout.etp)]
    text = " ".join(f"{name}={size}" for name, size in sizes if size and size > 1)
    layers = f"{facts.num_layers} layers"
    if facts.pattern is not None:
        layers += f" {facts.pattern.symbols}"
    return [f"{layers}, {kind}", f"layout: {text or 'no model parallelism'}"]
