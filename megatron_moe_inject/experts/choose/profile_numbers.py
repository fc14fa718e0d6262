"""A routing profile in the layer numbers of another run of the same student.

A profile says which pattern its layers are of; one of a GPT model counts blocks. The same weights
train as a GPT and as a hybrid model, and what was recorded of the one holds for the other.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_moe_inject.experts.choose.routing_profile import RoutingProfile
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.layer_pattern import LayerPattern


def in_numbers_of(
    profile: RoutingProfile, pattern: LayerPattern | None, key: str, file: str
) -> RoutingProfile:
    """The profile with its layers numbered as the student's.

    Args:
        profile: as it was read.
        pattern: the student's; ``None`` for a GPT model.
        key: of the recipe, which messages begin with.
        file: of the profile.

    Raises:
        RecipeError: the profile is of a pattern of other layers, or its layers are no blocks.
    """
    recorded = profile.provenance.pattern
    if recorded is None and pattern is None:
        return profile
    if recorded is not None and pattern is not None:
        if recorded.symbols == pattern.symbols:
            return profile
        raise fail(
            key, file, f"is of a student with the layers {recorded.symbols}, and this one has "
            f"{pattern.symbols}", "use a profile of this student",
        )  # fmt: skip
    one = recorded or pattern
    assert one is not None, "one of both is a hybrid model"
    if one.blocks is None:
        theirs, ours = ("hybrid", "GPT") if pattern is None else ("GPT", "hybrid")
        raise fail(
            key, file, f"is of a {theirs} model and this student is a {ours} model, but "
            f"{one.table()}", "record a profile of this student",
        )  # fmt: skip
    provenance = profile.provenance
    blocks = {mlp: n for n, (_, mlp) in enumerate(one.blocks)}
    if pattern is None:
        moe_layers = [blocks[layer] for layer in provenance.moe_layers]
        num_layers, text = len(blocks), None
    else:
        if provenance.num_layers != len(blocks):
            raise fail(
                key, file, f"is of a GPT model of {provenance.num_layers} blocks, and this student "
                f"has {len(blocks)} ({pattern.table()})", "use a profile of this student",
            )  # fmt: skip
        moe_layers = [one.blocks[block][1] for block in provenance.moe_layers]
        num_layers, text = pattern.num_layers, pattern.text
    number = dict(zip(provenance.moe_layers, moe_layers, strict=True))
    new = provenance.new_experts
    numbered = replace(
        provenance,
        moe_layers=moe_layers,
        num_layers=num_layers,
        hybrid_layer_pattern=text,
        new_experts=None if new is None else {number[layer]: ids for layer, ids in new.items()},
    )
    return replace(profile, provenance=numbered)
