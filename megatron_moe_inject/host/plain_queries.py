"""Multi-latent attention whose queries have no latent and no norm, as in DeepSeek-V2-Lite.

    --multi-latent-attention --qk-layernorm --spec megatron_moe_inject.host.plain_queries layers

Without ``--q-lora-rank`` the norm that ``--qk-layernorm`` asks for is that of the keys' and values'
latent alone. Megatron 0.19 with Transformer Engine puts one in front of the query projection too,
on hidden states that are normalised already: another function than the published model's, with a
weight that no folder has; its local layers refuse the combination. 0.18 builds it as published, and
needs no ``--spec``.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class PlainQueryAttention(MLASelfAttention):
    """Latent attention with the query projection that its spec names, and nothing in front."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The layers' classes by name: those of a model with a latent of queries, which are as they
        should be but for the projection that there is instead."""
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

        with_latent = copy.copy(self.config)
        with_latent.q_lora_rank = self.config.kv_lora_rank
        resolved = QKNormConfigResolver(with_latent, submodules).resolve()
        return {**resolved, "linear_q_proj": submodules.linear_q_proj}


def layers(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of Megatron's ``GPTModelConfig``, with the attention above.

    Raises:
        ValueError: queries have a latent.
    """
    from megatron.training.models.gpt import default_layer_spec

    if config.transformer.q_lora_rank is not None:
        raise ValueError(
            f"--spec {__name__} with --q-lora-rank {config.transformer.q_lora_rank}: it is for "
            "queries without a latent; leave one of them out"
        )
    block = default_layer_spec(config, vp_stage)
    for layer in getattr(block, "layer_specs", [block]):
        layer.submodules.self_attention.module = PlainQueryAttention
    return block
