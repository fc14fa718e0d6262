"""Rotary embeddings of a configuration as Megatron's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import key_of
from megatron_moe_inject.host.errors import fail, listing

_MEGATRON_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What ``--use-rope-scaling`` means. Megatron's scripts do not hand ``--rope-scaling-factor`` to
the model, and a hybrid model has no such scaling."""

_KEYS: Mapping[str, tuple[str, ...]] = {"default": (), "llama3": tuple(_MEGATRON_LLAMA3)}


def rope_flags(config: Any) -> dict[str, Any]:
    """Megatron's options of ``rope_parameters``: plain, or scaled as in Llama 3.1.

    Raises:
        RecipeError: Megatron has no option for it.
    """
    rope = rope_parameters(config, _KEYS)
    flags = {"--position-embedding-type": "rope", "--rotary-base": rotary_base(config)}
    if rope["rope_type"] == "llama3":
        _check_fixed(rope, _MEGATRON_LLAMA3)
        flags["--use-rope-scaling"] = True
    return flags


_MEGATRON_YARN = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
"""What multi-latent attention has no options for."""

_LATENT_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "yarn": ("factor", "mscale", "mscale_all_dim", *_MEGATRON_YARN),
}


def latent_rope_flags(config: Any) -> dict[str, Any]:
    """Megatron's options of ``rope_parameters`` with multi-latent attention: plain or YaRN.

    Raises:
        RecipeError: Megatron has no option for it.
    """
    rope = rope_parameters(config, _LATENT_KEYS)
    flags = {"--position-embedding-type": "rope", "--rotary-base": rotary_base(config)}
    if rope["rope_type"] == "default":
        # Megatron fuses the rotation of YaRN alone.
        return flags | {"--rope-type": "rope", "--no-rope-fusion": True}
    _check_fixed(rope, _MEGATRON_YARN)
    return flags | {
        "--rope-type": "yarn",
        "--rotary-scaling-factor": float(rope["factor"]),
        **_concentration(rope),
    }


def yarn_flags(config: Any) -> dict[str, Any]:
    """Megatron's options of YaRN with ordinary attention, whose ``original_...``, ``beta_...`` and
    ``truncate`` have options since 0.19.

    Raises:
        RecipeError: another kind of ``rope_parameters``, or a key that is not served.
    """
    rope = rope_parameters(config, {"yarn": _LATENT_KEYS["yarn"]})
    rounds = rope.get("truncate", True)
    word = "--yarn-correction-range-round-to-int"
    return {
        "--position-embedding-type": "yarn",
        "--rotary-base": rotary_base(config),
        "--rotary-scaling-factor": float(rope["factor"]),
        "--yarn-original-max-position-embeddings": rope["original_max_position_embeddings"],
        "--yarn-beta-fast": float(rope.get("beta_fast", 32)),
        "--yarn-beta-slow": float(rope.get("beta_slow", 1)),
        word if rounds else f"--no-{word[2:]}": True,
        **_concentration(rope),
    }


def _concentration(rope: Mapping[str, Any]) -> dict[str, float]:
    """Options of what YaRN multiplies cosines and sines by; the default is the same as without
    ``mscale`` in the configuration."""
    scale, everywhere = rope.get("mscale"), rope.get("mscale_all_dim")
    if not everywhere:
        return {}
    if not scale:
        raise fail(_key("mscale_all_dim"), everywhere, "needs mscale beside it", "give both")
    return {"--mscale": float(scale), "--mscale-all-dim": float(everywhere)}


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


def _check_fixed(rope: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """RecipeError for a value that Megatron has no option for."""
    for name, only in fixed.items():
        if rope.get(name, only) != only:
            raise fail(_key(name), rope[name], "is not served", f"Megatron's is {only}")


def rotary_base(config: Any) -> int:
    """``--rotary-base``, which takes a whole number."""
    return _whole("rope_theta", config.rope_parameters["rope_theta"])


def _whole(name: str, value: Any) -> int:
    if int(value) != value:
        raise fail(_key(name), value, "is no whole number", "Megatron's option takes no other")
    return int(value)


def _key(name: str) -> str:
    return key_of(f"rope_parameters.{name}")
