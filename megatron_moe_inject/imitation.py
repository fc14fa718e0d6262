"""What imitates which layer of which teacher, and the projections between their widths.

Pure of communication: from the recipe to terms, and the parameters that the terms need. The
projections are trainable parameters of the model chunk that holds the student's layer, so they
have optimizer state and are in the checkpoint, under names of their own: plain Megatron, which
does not ask for them, loads the checkpoint without them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moe_inject.experts.freeze import PROJECTIONS
from megatron_moe_inject.losses.features import proportional_layer
from megatron_moe_inject.recipe import Domain, Recipe
from megatron_moe_inject.typed import fail


@dataclass(frozen=True)
class ImitationTerm:
    """One layer of the student and the layer of a teacher that it imitates.

    Attributes:
        kind: ``hidden`` or ``experts``, see ``recipe.Features``.
        teacher: its key in the recipe.
        layer, teacher_layer: 0-based decoder layers.
        shares: by index of the domains whose tokens count, the layer's part of the mean over a
            domain's layers.
        experts: global ids of the experts whose output is meant, for ``experts``.
    """

    kind: str
    teacher: str
    layer: int
    teacher_layer: int
    shares: Mapping[int, float] = field(hash=False)
    experts: frozenset[int] = frozenset()

    @property
    def projection(self) -> str:
        """Name of its projection; domains of one teacher share it."""
        return f"{self.kind}_{self.layer}_{self.teacher}"


def imitation_terms(
    recipe: Recipe, teacher_layers: Mapping[str, int], num_layers: int
) -> list[ImitationTerm]:
    """All terms that ``objective.features`` asks for, in the order of the student's layers.

    Args:
        recipe: checked by itself and against the student.
        teacher_layers: number of decoder layers of each teacher.
        num_layers: the student's.

    Raises:
        RecipeError: a layer that student or teacher does not have, or one without chosen experts.
    """
    terms = []
    for kind in recipe.objective.features.in_use():
        for name in recipe.teachers:
            pairs = _layer_pairs(recipe, name, teacher_layers[name], num_layers)
            taught = {i: d for i, d in enumerate(recipe.domains) if d.teacher == name}
            if kind == "hidden":
                terms += [
                    ImitationTerm(kind, name, own, other, dict.fromkeys(taught, 1 / len(pairs)))
                    for own, other in pairs.items()
                ]
            else:
                terms += _expert_terms(name, pairs, taught)
    return sorted(terms, key=lambda t: (t.layer, t.kind, t.teacher, sorted(t.experts)))


def _layer_pairs(
    recipe: Recipe, teacher: str, teacher_layers: int, num_layers: int
) -> dict[int, int]:
    path, given = f"teachers.{teacher}.layers", recipe.teachers[teacher].layers
    for own, other in given.items():
        if own >= num_layers:
            remedy = f"the student's layers are 0 to {num_layers - 1}"
            raise fail(path, own, "is no layer of the student", remedy)
        if other >= teacher_layers:
            remedy = f"the teacher's layers are 0 to {teacher_layers - 1}"
            raise fail(f"{path}.{own}", other, "is no layer of the teacher", remedy)
    if given:
        return dict(sorted(given.items()))
    domains = [domain for domain in recipe.domains if domain.teacher == teacher]
    chosen = {layer for domain in domains for layer in domain.experts.layers}
    layers = sorted(chosen) or range(num_layers)
    return {layer: proportional_layer(layer, num_layers, teacher_layers) for layer in layers}


def _expert_terms(
    teacher: str, pairs: Mapping[int, int], taught: Mapping[int, Domain]
) -> Iterable[ImitationTerm]:
    """Domains with the same experts in a layer share a term, and its exchange of outputs."""
    for own in pairs:
        if not any(own in domain.experts.layers for domain in taught.values()):
            raise fail(
                f"teachers.{teacher}.layers", own, "has no experts that a domain chose",
                "remove the layer or set objective.features.experts to 0",
            )  # fmt: skip
    groups: dict[tuple[int, frozenset[int]], dict[int, float]] = {}
    for index, domain in taught.items():
        layers = [layer for layer in pairs if layer in domain.experts.layers]
        for layer in layers:
            key = layer, frozenset(domain.experts.layers[layer])
            groups.setdefault(key, {})[index] = 1 / len(layers)
    for (layer, experts), shares in groups.items():
        yield ImitationTerm("experts", teacher, layer, pairs[layer], shares, experts)


class Projections(torch.nn.ModuleDict):
    """Linear maps from the student's width to teachers', by ``ImitationTerm.projection``.

    The start is a function of the name and the seed alone, the same at every layout, and takes
    nothing from the student's random number generators.

    Args:
        terms: those of the layers of one model chunk.
        widths: teacher hidden size by teacher.
        hidden_size: the student's h.
        like: a parameter, for type and device.
        seed: any number; Megatron's ``--seed``.
        sequence_parallel: whether ranks see parts of the sequence, so that Megatron has to sum
            the gradients over the tensor-parallel group.
        tp_group: that group.
    """

    def __init__(
        self,
        terms: Sequence[ImitationTerm],
        widths: Mapping[str, int],
        *,
        hidden_size: int,
        like: torch.Tensor,
        seed: int,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self._tp_group = tp_group
        self.stored = True
        for term in terms:
            width = widths[term.teacher]
            if width == hidden_size or term.projection in self:
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(term.projection.encode()))
            start = torch.randn(width, hidden_size, generator=generator) * hidden_size**-0.5
            linear = torch.nn.Linear(hidden_size, width, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(start.to(like))
            linear.weight.sequence_parallel = sequence_parallel
            self[term.projection] = linear
        self.register_load_state_dict_post_hook(_forgive_missing)

    def project(self, term: ImitationTerm, states: torch.Tensor) -> torch.Tensor:
        """``[..., h] -> [..., h_t]``; as they are where the widths agree."""
        if term.projection not in self:
            return states
        linear = self[term.projection]
        return linear(states.to(linear.weight.dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For ``dist_checkpointing``; empty unless ``stored``, so that a checkpoint without
        projections can be loaded."""
        from megatron.core.transformer.utils import sharded_state_dict_default

        state: dict[str, Any] = {}
        for name, linear in self.items() if self.stored else ():
            state |= sharded_state_dict_default(
                linear, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self._tp_group
            )
        return state


def _forgive_missing(projections: Projections, incompatible: Any) -> None:
    """Not an error: what was not asked of the checkpoint."""
    if not projections.stored:
        own = [key for key in incompatible.missing_keys if f"{PROJECTIONS}." in key]
        for key in own:
            incompatible.missing_keys.remove(key)
