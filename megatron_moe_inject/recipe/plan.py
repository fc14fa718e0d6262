"""The plan of a run as text: what ``--inject-dry-run`` and ``moe-inject plan`` print.

Rendering only. The caller supplies the rows that exist at its point: none beyond the recipe for
a file on a laptop, the student's facts with Megatron's flags, parameter and teacher rows once
the model is built. Columns are aligned plain text, because a plan ends in job logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe_inject.host.errors import (
    listing,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.text import (
    count,
    memory_text,
    ranges,
    table,
)
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.expert_choice import describe_choice
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.retention_rules import keeps_originals
from megatron_moe_inject.recipe.schedule import ever_positive, show_weight
from megatron_moe_inject.recipe.schema import Domain, Recipe
from megatron_moe_inject.recipe.steering_rules import weighed_by_mean, weighed_by_token

_MAX_LAYERS = 16
_IMITATED = {"hidden": "hidden states", "experts": "expert outputs"}


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of one component, counted over the whole model.

    Attributes:
        component: a name such as ``experts`` or ``attention``.
        trained: elements that train, each counted once whatever the parallel layout.
        frozen: elements that do not.
        per_rank: elements that train on each rank, in rank order; empty when not known.
    """

    component: str
    trained: int
    frozen: int
    per_rank: Sequence[int] = ()


@dataclass(frozen=True)
class TeacherRow:
    """One teacher as found.

    Attributes:
        name: its key in the recipe.
        kind: ``megatron`` or ``hf``, with the architecture where known.
        parameters: elements, None when not known.
        memory: bytes on each rank that holds it, None when not known.
        held_by: the ranks that hold it, in words.
    """

    name: str
    kind: str
    parameters: int | None = None
    memory: int | None = None
    held_by: str = ""


@dataclass(frozen=True)
class ImitationRow:
    """One thing that a layer of the student imitates.

    Attributes:
        layer: 0-based decoder layer of the student.
        states: what of it, in words.
        teacher: its key in the recipe.
        teacher_layer: 0-based decoder layer of the teacher.
    """

    layer: int
    states: str
    teacher: str
    teacher_layer: int


@dataclass(frozen=True)
class Plan:
    """Everything a plan shows; what is None or empty is left out of the text.

    Attributes:
        recipe: with its experts resolved (``experts.choose.choice.resolve_experts``) as far as
            their profiles are there.
        boundary: first layer whose backward runs, agreed over all ranks; None when not known.
        imitation: which layers imitate which, where known.
        warnings: remarks of the caller, shown after ``recipe_warnings``.
    """

    recipe: Recipe
    facts: StudentFacts | None = None
    parameters: Sequence[ParameterRow] = ()
    teachers: Sequence[TeacherRow] = ()
    boundary: int | None = None
    imitation: Sequence[ImitationRow] = ()
    warnings: Sequence[str] = field(default_factory=tuple)


def render_plan(plan: Plan) -> str:
    """The plan as lines of plain text, without a trailing newline."""
    sections = [
        ("domains", _domain_lines(plan)),
        ("mixing", _mixing_lines(plan.recipe)),
        ("experts", _expert_lines(plan)),
        ("loss", _loss_lines(plan.recipe)),
        ("features", _feature_lines(plan)),
        ("steering", _steering_lines(plan.recipe)),
        ("trains", _train_lines(plan)),
        ("teachers", _teacher_lines(plan)),
        ("evaluation", _evaluation_lines(plan.recipe)),
        ("student", _student_lines(plan.facts)),
        ("warnings", [*recipe_warnings(plan.recipe), *plan.warnings]),
    ]
    lines = ["moe-inject plan"]
    for title, body in sections:
        if body:
            lines += ["", title, *(f"  {line}" for line in body)]
    return "\n".join(lines)


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
    for names, layers in shared.items():
        where = listing((f"layer {la}: {ranges(ids)}" for la, ids in layers.items()), limit=4)
        warnings.append(f"{' and '.join(names)} share experts ({where})")
    for domain in _undecided(recipe):
        file = domain.experts.profile
        warnings.append(
            f"{file} is no file yet (in {Path.cwd()}): training needs it, to choose the experts of "
            f"{domain.name}; moe-inject profile records it"
        )
    if recipe.teachers and not any(ever_positive(recipe.alpha(d)) for d in recipe.domains):
        warnings.append("alpha is 0: teachers run for the reported losses only")
    if owners and recipe.train.experts == "none":
        warnings.append("train.experts is none: the experts chosen by the domains stay frozen")
    if len(weighed_by_mean(recipe)) == 1 and not weighed_by_token(recipe):
        warnings.append(
            "steering.confidence: one domain is steered, and its teacher's window leaves all its "
            "tokens one weight, which changes nothing"
        )
    objective = recipe.objective
    held = (recipe.general_beta(), objective.gamma, objective.retention.experts)
    if not any(map(ever_positive, held)):
        warnings.append("general tokens have no loss: nothing holds general ability")
    return warnings


def _domain_lines(plan: Plan) -> list[str]:
    rows = [("domain", "teacher", "data")]
    for i, domain in enumerate(plan.recipe.domains):
        rows.append((domain.name, domain.taught_by or "(none: CE only)", _data_of(plan, i)))
    general = _data_of(plan, GENERAL)
    if general:
        held = ever_positive(plan.recipe.objective.gamma)
        rows.append(("(general)", "(the original)" if held else "(none: CE only)", general))
    return table(rows)


def _mixing_lines(recipe: Recipe) -> list[str]:
    """Shares of the training blend that the recipe asks for, in the order of the domains."""
    names = [*(domain.name for domain in recipe.domains), "general"]
    asked = [(name, recipe.mixing[name]) for name in names if name in recipe.mixing]
    rows = [(f"({n})" if n == "general" else n, "=", show_weight(share)) for n, share in asked]
    return table(rows) if rows else []


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
    ours = [f"{j}: {entries[j]}" for j, found in enumerate(labels) if found == label]
    return listing(ours, limit=4)


def _expert_lines(plan: Plan) -> list[str]:
    if plan.recipe.train.experts == "all":
        return ["all experts of all MoE layers"]
    rows = [("domain", "layer", "experts")]
    for domain in plan.recipe.domains:
        layers = sorted(domain.experts.layers.items())
        for layer, ids in layers[:_MAX_LAYERS]:
            rows.append((domain.name, str(layer), ranges(ids)))
        if len(layers) > _MAX_LAYERS:
            rest = layers[_MAX_LAYERS:]
            total = sum(len(ids) for _, ids in rest)
            rows.append((domain.name, ranges([layer for layer, _ in rest]), f"{total} in all"))
    origins = [f"{d.name}: {d.experts.origin}" for d in plan.recipe.domains if d.experts.origin]
    for domain in _undecided(plan.recipe):
        rule = describe_choice(domain.experts, domain.experts.domain or domain.name, None)
        origins.append(f"{domain.name}: still to be chosen by {rule}")
    return (table(rows, right=(1,)) if len(rows) > 1 else []) + origins


def _undecided(recipe: Recipe) -> list[Domain]:
    """Domains whose profile is not there yet."""
    return [domain for domain in recipe.domains if domain.experts.profile is not None]


def _loss_lines(recipe: Recipe) -> list[str]:
    objective, lines = recipe.objective, []
    mixture = {"jsd": objective.jsd_beta, "skew_kl": objective.skew}.get(objective.divergence)
    divergence = objective.divergence + ("" if mixture is None else f"[{mixture:g}]")
    if objective.confidence != "none":
        divergence = f"confidence[{objective.confidence}] * {divergence}"
    for domain in recipe.domains:
        terms = []
        alpha, beta = recipe.alpha(domain), recipe.beta(domain)
        if ever_positive(alpha):
            temperature = recipe.temperature(domain)
            terms.append(
                f"{show_weight(alpha)} * {temperature:g}^2 * "
                f"{divergence}({domain.taught_by} || student, T={temperature:g})"
            )
        if ever_positive(beta):
            terms.append(f"{show_weight(beta)} * CE")
        for name in objective.features.in_use() if domain.teacher else ():
            weight, loss = getattr(objective.features, name), objective.features.loss
            terms.append(f"{show_weight(weight)} * {loss}({_IMITATED[name]}, {domain.taught_by})")
        lines.append((domain.name, " + ".join(terms)))
    general = (
        (objective.gamma, "KL(original || student)"),
        (recipe.general_beta(), "CE"),
        (objective.retention.experts, "change of trained experts' outputs"),
    )
    terms = [f"{show_weight(weight)} * {name}" for weight, name in general if ever_positive(weight)]
    lines.append(("(general)", " + ".join(terms) or "0"))
    if "l2" in objective.retention.in_use():
        weight = show_weight(objective.retention.l2)
        lines.append(("(all)", f"{weight} / 2 * |parameters - start|^2"))
    shown = table([(name, "=", formula) for name, formula in lines])
    if objective.skip_worse:
        shown.append("no distillation where the teacher predicts the label worse than the student")
    return shown


def _steering_lines(recipe: Recipe) -> list[str]:
    steering, lines = recipe.steering, []
    if steering.steers:
        layers = {la for d in recipe.domains for la in d.experts.layers}
        layers = sorted(layers & set(steering.layers)) if steering.layers else sorted(layers)
        where = f"layers {ranges(layers)}"
        if _undecided(recipe):
            where = f"layers {ranges(steering.layers)}" if steering.layers else "all their layers"
        coeff, mass = show_weight(steering.coeff), f"{steering.target_mass:g}"
        lines.append(f"{coeff} * relu(log {mass} - log mass) on a domain's experts, {where}")
        for names, how in (
            (weighed_by_token(recipe), "of each token"),
            (weighed_by_mean(recipe), "its mean over earlier steps, as the teacher has a window"),
        ):
            if names:
                weight = f"weighted by the teacher's confidence[{steering.confidence}]"
                lines.append(f"{' and '.join(names)}: {weight}, {how}")
        if ever_positive(steering.balance):
            lines.append(f"{show_weight(steering.balance)} * balance within each domain's experts")
        if steering.stock_balance == "general":
            lines.append("Megatron's balance losses see general tokens only")
    if steering.retains:
        lines.append(f"{show_weight(steering.retention)} * KL(original router || router)")
    return lines


def _feature_lines(plan: Plan) -> list[str]:
    rows = [("student layer", "states", "teacher", "teacher layer")]
    for row in plan.imitation:
        rows.append((str(row.layer), row.states, row.teacher, str(row.teacher_layer)))
    return table(rows, right=(0, 3)) if len(rows) > 1 else []


def _evaluation_lines(recipe: Recipe) -> list[str]:
    if recipe.evaluation is None:
        return []
    gate = "a teacher that is no better than the student stops the run"
    return [
        f"before, between and after training, into {recipe.evaluation.file or 'the --save folder'}",
        gate if recipe.evaluation.gate else "no teacher gate",
    ]


def _train_lines(plan: Plan) -> list[str]:
    train = plan.recipe.train
    names = [_trained_experts(plan)] if train.experts != "none" else []
    names += train.components()
    if train.layers:
        names.append(f"layers {ranges(train.layers)}")
    lines = [", ".join(names + train.patterns) + "; everything else is frozen"]
    if plan.parameters:
        rows = [("component", "trained", "frozen", "trained per rank")]
        for row in plan.parameters:
            rows.append(_parameter_cells(row))
        ranks = {len(row.per_rank) for row in plan.parameters}
        total = ParameterRow(
            "total",
            sum(row.trained for row in plan.parameters),
            sum(row.frozen for row in plan.parameters),
            [sum(column) for column in zip(*(r.per_rank for r in plan.parameters), strict=True)]
            if len(ranks) == 1
            else (),
        )
        rows.append(_parameter_cells(total))
        lines += table(rows, right=(1, 2))
    if train.frozen_experts == "fp8":
        origin = "encoded as loaded" if train.fp8_source is None else f"from {train.fp8_source}"
        lines.append(f"frozen experts are kept in FP8 alone, {origin}")
    if keeps_originals(plan.recipe):
        places = {"device": "on the device", "host": "in host memory"}
        where = places[plan.recipe.objective.retention.originals]
        lines.append(f"the original values of what trains are kept {where}, for retention")
    if plan.boundary is not None:
        lines.append(f"backward stops at layer {plan.boundary}; below it only the forward runs")
    return lines


def _trained_experts(plan: Plan) -> str:
    if plan.recipe.train.experts == "all":
        return "all experts"
    if _undecided(plan.recipe):
        return "experts still to be chosen"
    chosen = plan.recipe.experts_by_layer()
    total = sum(len(ids) for ids in chosen.values())
    text = f"{_some(total, 'expert')} in {_some(len(chosen), 'layer')}"
    facts = plan.facts
    if facts is not None and facts.num_moe_experts is not None:
        text += f" (of {facts.num_moe_experts * len(facts.moe_layers)} in {len(facts.moe_layers)})"
    return text


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _parameter_cells(row: ParameterRow) -> tuple[str, str, str, str]:
    ranks = list(row.per_rank)
    if not ranks:
        spread = ""
    elif len(set(ranks)) == 1:
        spread = count(ranks[0])
    else:
        spread = f"{count(min(ranks))} to {count(max(ranks))}"
        if 0 in ranks:
            spread += f" (nothing on {ranks.count(0)} of {len(ranks)} ranks)"
    return row.component, count(row.trained), count(row.frozen), spread


def _teacher_lines(plan: Plan) -> list[str]:
    if not plan.recipe.teachers:
        return []
    found = {row.name: row for row in plan.teachers}
    rows = [("teacher", "source", "kind", "parameters", "memory", "held by")]
    for name, spec in plan.recipe.teachers.items():
        row = found.get(name, TeacherRow(name, spec.kind))
        rows.append(
            (
                name,
                spec.source,
                row.kind,
                "" if row.parameters is None else count(row.parameters),
                "" if row.memory is None else memory_text(row.memory),
                row.held_by,
            )
        )
    keep = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    return table([[row[i] for i in keep] for row in rows])


def _student_lines(facts: StudentFacts | None) -> list[str]:
    if facts is None:
        return []
    kind = "dense"
    if facts.num_moe_experts is not None:
        kind = f"{facts.num_moe_experts} experts in layers {ranges(facts.moe_layers)}"
    layout = facts.parallel
    sizes = [("TP", layout.tp), ("PP", layout.pp), ("VPP", layout.vpp), ("CP", layout.cp)]
    sizes += [("EP", layout.ep), ("ETP", layout.etp)]
    shown = " ".join(f"{name}={size}" for name, size in sizes if size and size > 1)
    return [f"{facts.num_layers} layers, {kind}", f"layout: {shown or 'no model parallelism'}"]
