"""Architectures by the ``model_type`` of a ``config.json``: each is a table of one module.

Those built in are named here; an installed package adds its own as entry points of the group
``megatron_moe_inject.architectures``, each named like the model type and giving a function that
returns the ``Architecture``.
"""

from __future__ import annotations

from typing import Any

from megatron_moe_inject.convert.architectures.table import Architecture
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.registry import Registry

_HERE = __name__

ARCHITECTURES: Registry[Architecture] = Registry(
    "megatron_moe_inject.architectures",
    {
        "llama": f"{_HERE}.dense:Llama",
        "mistral": f"{_HERE}.dense:Mistral",
        "qwen2": f"{_HERE}.dense:Qwen2",
        "qwen3": f"{_HERE}.dense:Qwen3",
        "deepseek_v2": f"{_HERE}.deepseek:DeepSeekV2",
        "deepseek_v3": f"{_HERE}.deepseek:DeepSeekV3",
        "gemma": f"{_HERE}.gemma:Gemma",
        **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), f"{_HERE}.gemma:LaterGemma"),
        "gpt_oss": f"{_HERE}.gpt_oss:GptOss",
        "nemotron_h": f"{_HERE}.nemotron_h:NemotronH",
        "olmoe": f"{_HERE}.olmoe:Olmoe",
        "mixtral": f"{_HERE}.mixtral:Mixtral",
        "qwen2_moe": f"{_HERE}.qwen2_moe:Qwen2Moe",
        "qwen3_moe": f"{_HERE}.qwen3_moe:Qwen3Moe",
    },
)
"""Model type -> its table."""


def architecture_of(config: Any) -> Architecture:
    """The table of a configuration that ``transformers.AutoConfig`` read.

    Raises:
        RecipeError: there is none for its ``model_type``.
    """
    if config.model_type not in ARCHITECTURES:
        remedy = "there are tables of " + ", ".join(ARCHITECTURES.names())
        raise fail("config.json: model_type", config.model_type, "has no table here", remedy)
    return ARCHITECTURES[config.model_type]
