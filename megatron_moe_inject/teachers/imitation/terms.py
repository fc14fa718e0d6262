"""What imitates which layer of which teacher: from the recipe to terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_moe_inject.host.errors import (
    fail,
)
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.text import ranges, table
from megatron_moe_inject.losses.features import proportional_layer
from megatron_moe_inject.recipe.schema import Domain, Recipe
from megatron_moe_inject.teachers.imitation.section import IMITATION


@dataclass(frozen=True)
class ImitationTerm:
    """One layer of the student and the layer of a teacher that it imitates.

    Attributes:
        kind: ``hidden`` or ``experts``, see ``section.Imitation``.
        teacher: its key in the recipe.
        layer, teacher_layer: 0-based decoder layers.
        shares: by index of the domains whose tokens count, the layer's part of the mean over a
            domain's layers, times the teacher's weight where the domain has several.
        experts: global ids of the experts whose output is meant, for ``experts``.
        named: the layer in the projection's name, its number unless given.
    """

    kind: str
    teacher: str
    layer: int
    teacher_layer: int
    shares: Mapping[int, float] = field(hash=False)
    experts: frozenset[int] = frozenset()
    named: str | None = None

    @property
    def projection(self) -> str:
        """Name of its projection; domains of one teacher share it."""
        return f"{self.kind}_{self.named or self.layer}_{self.teacher}"


def imitation_terms(
    recipe: Recipe,
    teacher_layers: Mapping[str, int],
    num_layers: int,
    pattern: LayerPattern | None = None,
) -> list[ImitationTerm]:
    """All terms that ``imitation`` asks for, in the order of the student's layers.

    Args:
        recipe: checked by itself and against the student.
        teacher_layers: number of decoder layers of each teacher.
        num_layers: the student's.
        pattern: of a hybrid student. A projection behind a block of a GPT model has the block's
            number in its name, so that it is the same in both.

    Raises:
        RecipeError: a layer that student or teacher does not have, or one without chosen experts.
    """
    terms = []
    for kind in recipe[IMITATION].in_use():
        for name in recipe.teachers:
            pairs = _layer_pairs(recipe, name, teacher_layers[name], num_layers)
            taught = {i: d for i, d in enumerate(recipe.domains) if name in d.teacher_weights}
            if kind == "hidden":
                parts = {i: d.teacher_weights[name] / len(pairs) for i, d in taught.items()}
                terms += [
                    ImitationTerm(kind, name, student_layer, other, parts)
                    for student_layer, other in pairs.items()
                ]
            else:
                terms += _expert_terms(name, pairs, taught)
    terms.sort(key=lambda t: (t.layer, t.kind, t.teacher, sorted(t.experts)))
    if pattern is None:
        return terms
    return [replace(term, named=_named(term.layer, pattern)) for term in terms]


def _named(layer: int, pattern: LayerPattern) -> str:
    ends = {mlp: n for n, (_, mlp) in enumerate(pattern.blocks or ())}
    return str(ends[layer]) if layer in ends else f"layer{layer}"


def _layer_pairs(
    recipe: Recipe, teacher: str, teacher_layers: int, num_layers: int
) -> dict[int, int]:
    path, pairs = f"teachers.{teacher}.layers", recipe.teachers[teacher].layers
    for student_layer, other in pairs.items():
        if student_layer >= num_layers:
            remedy = f"the student's layers are 0 to {num_layers - 1}"
            raise fail(path, student_layer, "is no layer of the student", remedy)
        if other >= teacher_layers:
            remedy = f"the teacher's layers are 0 to {teacher_layers - 1}"
            raise fail(f"{path}.{student_layer}", other, "is no layer of the teacher", remedy)
    if pairs:
        return dict(sorted(pairs.items()))
    domains = [domain for domain in recipe.domains if teacher in domain.teacher_weights]
    chosen = {layer for domain in domains for layer in domain.experts.layers}
    layers = sorted(chosen) or range(num_layers)
    return {layer: proportional_layer(layer, num_layers, teacher_layers) for layer in layers}


def _expert_terms(
    teacher: str, pairs: Mapping[int, int], taught: Mapping[int, Domain]
) -> Iterable[ImitationTerm]:
    """Domains with the same experts in a layer share a term, and its exchange of outputs."""
    for student_layer in pairs:
        if not any(student_layer in domain.experts.layers for domain in taught.values()):
            raise fail(
                f"teachers.{teacher}.layers", student_layer, "has no experts that a domain chose",
                "remove the layer or set imitation.experts to 0",
            )  # fmt: skip
    groups: dict[tuple[int, frozenset[int]], dict[int, float]] = {}
    for index, domain in taught.items():
        layers = [layer for layer in pairs if layer in domain.experts.layers]
        for layer in layers:
            key = layer, frozenset(domain.experts.layers[layer])
            groups.setdefault(key, {})[index] = domain.teacher_weights[teacher] / len(layers)
    for (layer, experts), shares in groups.items():
        yield ImitationTerm("experts", teacher, layer, pairs[layer], shares, experts)


def imitation_lines(terms: Sequence[ImitationTerm]) -> list[str]:
    """The plan's table of what imitates what."""
    rows = [("student layer", "states", "teacher", "teacher layer")]
    for term in terms:
        states = "hidden" if term.kind == "hidden" else f"experts {ranges(sorted(term.experts))}"
        rows.append((str(term.layer), states, term.teacher, str(term.teacher_layer)))
    return table(rows, right=(0, 3)) if terms else []
