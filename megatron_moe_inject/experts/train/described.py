"""What trained in a GPT model, said of a hybrid model of the same weights.

Checkpoints and originals carry a description of what trained (``FreezePolicy.described``). One of a
GPT model numbers blocks; a hybrid run that goes on from it numbers layers.
"""

from __future__ import annotations

from typing import Any

from megatron_moe_inject.host.layer_pattern import GPT_NAMES, LayerPattern


def in_layers_of(described: dict[str, Any], pattern: LayerPattern) -> dict[str, Any]:
    """A GPT model's description in the numbers of a pattern; as it is where both do not fit.

    Args:
        described: plain JSON values; what does not number layers is kept.
        pattern: of the run that goes on.
    """
    blocks = pattern.blocks
    if blocks is None:
        return described

    def known(number: int) -> bool:
        return number < len(blocks)

    def mlps(by_block: Any) -> Any:
        if not isinstance(by_block, dict) or not all(known(int(n)) for n in by_block):
            return by_block
        return {str(blocks[int(n)][1]): ids for n, ids in by_block.items()}

    changes: dict[str, Any] = {
        name: mlps(described[name]) for name in ("experts", "router_rows") if name in described
    }
    if "patterns" in described:
        changes["patterns"] = sorted(GPT_NAMES + name for name in described["patterns"])
    if "layers" in described and all(map(known, described["layers"])):
        changes["layers"] = sorted(layer for n in described["layers"] for layer in blocks[n])
    return described | changes
