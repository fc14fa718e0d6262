"""Which layers the numbers of a recipe count: a hybrid student's, or the blocks of a GPT model.

``layer_numbers: hybrid`` counts the symbols of ``--hybrid-layer-pattern``, ``gpt`` the blocks of
an attention and an MLP that a ``GPTModel`` has (``host.layer_pattern``), so that a recipe written
for one reads in the other. ``renumbered`` turns the second into the first, once the student is
known; everything behind it sees numbers of the student alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.layer_pattern import GPT_NAMES, LayerPattern
from megatron_moe_inject.recipe.adapter import TARGETS
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.schema import Recipe

NumberOf = Callable[[str, int], int]
"""The student's layer with the MLP of what a recipe numbers, given its key and that number."""

_NUMBERED = re.compile(r"layers\.\d")
_KEY = "layer_numbers"


def renumbered(recipe: Recipe, pattern: LayerPattern | None) -> Recipe:
    """The recipe in the numbers of its student.

    Args:
        recipe: as written; one that was renumbered comes back as it is.
        pattern: the student's; ``None`` for a GPT model.

    Raises:
        RecipeError: the recipe counts in a way that this student has not, does not say how it
            counts where both are possible, or names a block that the pattern does not have.
    """
    counts = recipe.layer_numbers
    if pattern is None:
        if counts == "hybrid":
            raise fail(
                _KEY, counts, "counts the layers of --hybrid-layer-pattern, which this student "
                "does not have", "number the blocks of its GPTModel, and write gpt",
            )  # fmt: skip
        return recipe
    if counts == "hybrid":
        return recipe
    blocks = pattern.blocks
    if counts is None:
        key = _first_number(recipe)
        if key is not None and blocks is not None:
            raise RecipeError(
                f"{_KEY}: missing, and {key} names a layer of a hybrid student; write hybrid if it "
                "counts the layers of --hybrid-layer-pattern, gpt if it counts the blocks of a GPT "
                f"model ({pattern.table()})",
                _KEY,
            )
        return replace(recipe, layer_numbers="hybrid")
    if blocks is None:
        raise fail(
            _KEY, counts, f"counts blocks of an attention and an MLP, but {pattern.table()}",
            "number the layers of the pattern from 0, and write hybrid",
        )  # fmt: skip

    def block(key: str, number: int) -> tuple[int, int]:
        if not 0 <= number < len(blocks):
            raise fail(key, number, "is no block of the student", pattern.table())
        return blocks[number]

    train = recipe.train
    changed = _with_numbers(recipe, lambda key, number: block(key, number)[1])
    return replace(
        changed,
        layer_numbers="hybrid",
        train=replace(
            train,
            layers=[
                layer
                for i, number in enumerate(train.layers)
                for layer in block(f"train.layers[{i}]", number)
            ],
            patterns=[GPT_NAMES + pattern for pattern in train.patterns],
            adapters=[
                replace(
                    entry,
                    targets=[t if t in TARGETS else GPT_NAMES + t for t in entry.targets],
                    layers=[
                        layer
                        for number in entry.layers
                        for layer in block(f"train.adapters[{i}].layers", number)
                    ],
                )
                for i, entry in enumerate(train.adapters)
            ],
        ),
    )


def _with_numbers(recipe: Recipe, number_of: NumberOf) -> Recipe:
    """The recipe with what it says of layers with an MLP, or of states behind it, renumbered."""

    def keys[T](path: str, by_layer: Mapping[int, T]) -> dict[int, T]:
        return {number_of(f"{path}.{n}", n): value for n, value in by_layer.items()}

    domains = []
    for i, domain in enumerate(recipe.domains):
        choice, path = domain.experts, f"domains[{i}].experts"
        only = [number_of(f"{path}.only_layers", n) for n in choice.only_layers]
        choice = replace(choice, layers=keys(f"{path}.layers", choice.layers), only_layers=only)
        domains.append(replace(domain, experts=choice))
    teachers = {
        name: replace(spec, layers=keys(f"teachers.{name}.layers", spec.layers))
        for name, spec in recipe.teachers.items()
    }
    changed = replace(recipe, domains=domains, teachers=teachers)
    for feature in FEATURES:
        changed = feature.renumbered(changed, number_of)
    return changed


def _first_number(recipe: Recipe) -> str | None:
    """The first key that numbers a layer."""
    keys: list[str] = []

    def note(key: str, number: int) -> int:
        keys.append(key)
        return number

    _with_numbers(recipe, note)
    keys += ["train.layers"] if recipe.train.layers else []
    adapters = list(enumerate(recipe.train.adapters))
    keys += [f"train.adapters[{i}].layers" for i, entry in adapters if entry.layers]
    patterns = [(f"train.patterns[{i}]", p) for i, p in enumerate(recipe.train.patterns)]
    patterns += [(f"train.adapters[{i}].targets", p) for i, e in adapters for p in e.patterns]
    keys += [k for k, p in patterns if _NUMBERED.search(p) and not p.startswith(GPT_NAMES)]
    return keys[0] if keys else None
