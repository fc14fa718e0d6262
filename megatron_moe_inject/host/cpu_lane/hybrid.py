"""A hybrid model (``--hybrid-layer-pattern``) of Megatron's own modules.

The stack that Megatron ships names Transformer Engine's modules, and takes its norm for the end of
the decoder. Here ``*`` is the first half of ``GPTModel``'s local layer, ``E`` and ``-`` the second,
so that ``*E`` is one local GPT block, digit for digit, with the same names in checkpoints. ``M`` is
Megatron's Mamba layer around local linear layers (``mamba`` has its kernels).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

WITHOUT = "DG"
"""Symbols of layers that the local stack has not: they need Transformer Engine or ``fla``."""


def local_stack_spec() -> Any:
    """The ``ModuleSpec`` of a ``HybridStack`` for ``*``, ``E``, ``-``, ``M``, also behind ``/``.

    And for ``+``, with norms of both latents, where Megatron has it (0.19 on).
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec_for_backend,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    # What is called RMSNorm follows the config, as the number of experts does.
    block = functools.partial(get_gpt_layer_local_submodules, normalization="RMSNorm")
    no_attention = {
        "input_layernorm": IdentityOp,
        "self_attention": IdentityOp,
        "self_attn_bda": IdentityFuncOp,
    }
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    attention = dataclasses.replace(block(), **no_mlp)
    # As in Megatron's stack: norms of queries and keys where the config asks for them.
    by_config = {"q_layernorm": None, "k_layernorm": None}
    inside = attention.self_attention
    inside.submodules = dataclasses.replace(inside.submodules, **by_config)
    of_latents = {}
    if "mla_layer" in {field.name for field in dataclasses.fields(HybridStackSubmodules)}:
        half = dataclasses.replace(block(multi_latent_attention=True, qk_layernorm=True), **no_mlp)
        of_latents["mla_layer"] = ModuleSpec(module=TransformerLayer, submodules=half)
    # What comes after the slash: Megatron fills in the layers by the pattern.
    mtp = get_mtp_layer_spec_for_backend(None, LocalSpecProvider())
    for name in ("enorm", "hnorm", "layer_norm"):
        setattr(mtp.submodules, name, WrappedTorchNorm)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=WrappedTorchNorm,
                    mixer=ModuleSpec(
                        module=MambaMixer,
                        submodules=MambaMixerSubmodules(
                            in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                        ),
                    ),
                    mamba_bda=get_bias_dropout_add,
                    # As Transformer Engine's layer has it: the norm in the projection behind it.
                    sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
                ),
            ),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            **of_latents,
            mlp_layer=ModuleSpec(
                module=MLPLayer, submodules=dataclasses.replace(block(), **no_attention)
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=dataclasses.replace(block(num_experts=1), **no_attention),
            ),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[mtp]),
            ),
        ),
    )


def install() -> None:
    """The local stack in the place of Megatron's own, and local norms where it asks for TE's.

    Builders take their default by its name in two modules; scripts name it after ``--spec``
    (those of 0.18 must), by its new or its old name.
    """
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
    from megatron.core.transformer import attention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.training.models import hybrid as builder

    hybrid_block.TENorm = attention.TENorm = WrappedTorchNorm
    stack = local_stack_spec()
    hybrid_layer_specs.hybrid_stack_spec = hybrid_layer_specs.mamba_stack_spec = stack
    builder.default_hybrid_stack_spec = stack
