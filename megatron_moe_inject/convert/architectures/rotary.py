"""Rotary embeddings of a configuration as Megatron's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import key_of
from megatron_moe_inject.host.errors import fail, listing

_MEGATRON_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What ``RotaryEmbedding._apply_scaling`` has no options for."""

_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *_MEGATRON_LLAMA3),
}


def rope_flags(config: Any) -> dict[str, Any]:
    """Megatron's options of ``rope_parameters``: plain, interpolated, or scaled as in Llama 3.

    Raises:
        RecipeError: Megatron has no option for it.
    """
    rope = rope_parameters(config, _KEYS)
    flags = {"--position-embedding-type": "rope", "--rotary-base": rotary_base(config)}
    if rope["rope_type"] == "linear":
        flags["--rotary-seq-len-interpolation-factor"] = _whole("factor", rope["factor"])
    if rope["rope_type"] == "llama3":
        for name, only in _MEGATRON_LLAMA3.items():
            if rope[name] != only:
                raise fail(_key(name), rope[name], "is fixed in Megatron", f"served: {only}")
        flags |= {"--use-rope-scaling": True, "--rope-scaling-factor": float(rope["factor"])}
    return flags


def rope_parameters(config: Any, kinds: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
    """``rope_parameters``, of one of ``kinds`` and with no other keys than that kind's.

    Raises:
        RecipeError: another kind, or a key that is not served.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        raise fail(_key("rope_type"), kind, "is not served", f"served: {listing(kinds)}")
    served = {"rope_type", "type", "rope_theta", *kinds[kind]}
    if rope.get("partial_rotary_factor") == 1.0:
        served.add("partial_rotary_factor")
    for name in sorted(set(rope) - served):
        if rope[name] is not None:
            remedy = f"with {kind} are served: {listing(sorted(served))}"
            raise fail(_key(name), rope[name], "is not served", remedy)
    return rope


def rotary_base(config: Any) -> int:
    """``--rotary-base``, which takes a whole number."""
    return _whole("rope_theta", config.rope_parameters["rope_theta"])


def _whole(name: str, value: Any) -> int:
    if int(value) != value:
        raise fail(_key(name), value, "is no whole number", "Megatron's option takes no other")
    return int(value)


def _key(name: str) -> str:
    return key_of(f"rope_parameters.{name}")
