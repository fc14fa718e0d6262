"""Stored names of a hybrid model's tensors, as a GPT model of the same weights stores them.

A ``GPTModel`` stores ``decoder.layers.x`` of all its blocks as one tensor, with the block as its
first axis; a ``HybridModel`` stores ``decoder.layers.7.x`` of each layer alone, and calls the
decoder's last norm ``final_norm``. A place is the indices on a tensor's leading axes that number
layers and experts. Megatron renames in the same way where it loads a GPT checkpoint into a hybrid
run (``megatron.core.dist_checkpointing.gpt_checkpoint_interop``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_moe_inject.host.layer_pattern import LayerPattern

Place = tuple[int, ...]

_HYBRID_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_GPT_LAYER = "decoder.layers."
_NORMS = ("decoder.final_norm.", "decoder.final_layernorm.")
_PARTS = (
    ("mixer.", "M"),
    ("self_attention.A_log", "G"),
    ("self_attention.", "*"),
    ("mlp.experts.", "E"),
    ("mlp.linear_fc2.", "-"),
)
"""Beginnings of names that tell what a layer is, in an order in which the first decides."""
_ATTENTION = ("self_attention.", "input_layernorm.")


def stacked_axes(name: str) -> int:
    """Leading axes of a stored tensor that number layers and experts, not part of a weight.

    Megatron stacks ``decoder.layers.3.x`` of all layers as ``decoder.layers.x``, and experts as
    ``experts.experts.x``, unless the checkpoint says otherwise in the name.
    """
    layers = bool(re.search(r"(^|\.)layers\.(?!\d)", name))
    experts = bool(re.search(r"\.experts\.experts\.(?!\d)", name))
    return layers + experts


def pattern_of_names(names: Iterable[str]) -> LayerPattern | None:
    """The layers of a hybrid model, one symbol each, by the names of its stored tensors; ``None``
    for a GPT model. Attention is ``*`` of whatever kind."""
    kinds: dict[int, str] = {}
    hybrid = False
    for name in sorted(names):
        hybrid = hybrid or name.startswith(_NORMS[0])
        match = _HYBRID_LAYER.match(name)
        if match is not None:
            rest = name[match.end() :]
            kind = next((symbol for part, symbol in _PARTS if rest.startswith(part)), None)
            if kind is not None:
                kinds.setdefault(int(match[1]), kind)
    if not hybrid:
        return None
    return LayerPattern(
        "".join(kinds.get(layer, "?") for layer in range(max(kinds, default=-1) + 1))
    )


def to_gpt(name: str, place: Place, pattern: LayerPattern) -> tuple[str, Place] | None:
    """A hybrid model's tensor and place as a GPT model has them; ``None`` for what it has not."""
    match = _HYBRID_LAYER.match(name)
    if match is None:
        return name.replace(*_NORMS) if name.startswith(_NORMS[0]) else name, place
    block = pattern.block_of(int(match[1]))
    return None if block is None else (_GPT_LAYER + name[match.end() :], (block, *place))


def to_hybrid(name: str, place: Place, pattern: LayerPattern) -> tuple[str, Place]:
    """A GPT model's tensor and place as a hybrid model of ``pattern``, made of blocks, has them."""
    if not name.startswith(_GPT_LAYER):
        return name.replace(*_NORMS[::-1]) if name.startswith(_NORMS[1]) else name, place
    assert pattern.blocks is not None, "the pattern was checked"
    rest = name.removeprefix(_GPT_LAYER)
    attention, mlp = pattern.blocks[place[0]]
    layer = attention if rest.startswith(_ATTENTION) else mlp
    return f"{_GPT_LAYER}{layer}.{rest}", place[1:]
