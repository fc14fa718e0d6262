"""Architectures that a Megatron checkpoint's own arguments rule out as a teacher."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.megatron_args import (
    describe,
    low_precision_widths,
    refuse_states_across_documents,
    refuse_unsupported,
)

SOURCE = Source("coder", "megatron:/ckpt", "megatron", Path("/ckpt"))
STACK = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
DENSE = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 1,
    "num_experts": None,
    "spec": None,
    "yaml_cfg": None,
    "hybrid_layer_pattern": None,
    "position_embedding_type": "rope",
    "use_mup": False,
}


def test_a_model_of_layers_that_are_known_passes():
    refuse_unsupported(SOURCE, Namespace(**DENSE))
    refuse_unsupported(SOURCE, Namespace())
    refuse_unsupported(SOURCE, Namespace(**DENSE | {"num_experts": 8}))
    refuse_unsupported(SOURCE, Namespace(**DENSE | {"hybrid_layer_pattern": "M*-E"}))
    refuse_unsupported(SOURCE, Namespace(**DENSE | {"use_mup": True, "mup_output_mult": 0.5}))
    layers = {"hybrid_layer_pattern": "M*-|M-/*E", "is_hybrid_model": True}
    refuse_unsupported(SOURCE, Namespace(**DENSE | layers | {"spec": STACK}))
    refuse_unsupported(SOURCE, Namespace(**DENSE | {"hybrid_override_pattern": "M*+-"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "routers of type sinkhorn, which assign all tokens",
        ),
        ({"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}, "quantile_"),
        ({"moe_router_topk_limited_devices": 2}, "by the ranks that its experts lay on"),
        ({"hybrid_layer_pattern": "D-"}, "experimental attention"),
        ({"hybrid_layer_pattern": "*-", "spec": ["my", "stack"]}, "custom --spec"),
        ({"is_hybrid_model": True}, "without a pattern of layers"),
        ({"spec": STACK}, "custom --spec"),
        ({"heterogeneous_layers_config_path": "/x"}, "layers of different architectures"),
        ({"experimental_attention_variant": "dsa"}, "experimental attention"),
        ({"spec": ["my", "spec"]}, "custom --spec"),
        ({"yaml_cfg": "x.yaml"}, "--yaml-cfg"),
        ({"position_embedding_type": "mrope"}, r"'mrope'; supported: rope, learned_absolute"),
    ],
)
def test_others_are_refused_with_the_argument(changes, message):
    with pytest.raises(RecipeError, match=message):
        refuse_unsupported(SOURCE, Namespace(**DENSE | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"activation": "gelu", "kv_groups": 4, "tied_embeddings": True}),
        ({"swiglu": True, "group_query_attention": True}, {"activation": "swiglu", "kv_groups": 1}),
        ({"squared_relu": True}, {"activation": "squared_relu"}),
        ({"quick_geglu": True}, {"activation": "quick_geglu"}),
        ({"untie_embeddings_and_output_weights": True}, {"tied_embeddings": False}),
        ({"hybrid_layer_pattern": "*-|M-/*"}, {"layers": 4, "pattern": "*-M-"}),
    ],
)
def test_description(changes, expected):
    described = describe(Namespace(**DENSE | changes))
    assert expected.items() <= described.items()


def test_states_go_on_across_documents():
    refuse_states_across_documents(SOURCE, Namespace(**DENSE))
    refuse_states_across_documents(SOURCE, Namespace(**DENSE | {"hybrid_layer_pattern": "*-/M"}))
    for pattern in ("*-M-", "G-*-"):
        args = Namespace(**DENSE | {"hybrid_layer_pattern": pattern})
        with pytest.raises(RecipeError, match=r"a state \(.*--reset-attention-mask set apart"):
            refuse_states_across_documents(SOURCE, args)


def test_fp8_asks_for_the_widths_of_the_layers_that_are_there():
    mamba = {"mamba_num_heads": None, "mamba_head_dim": 4, "mamba_num_groups": 2}
    nets = {"linear_num_value_heads": 4, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    sizes = DENSE | mamba | nets | {"mamba_state_dim": 16, "linear_key_head_dim": 8}

    def widths(pattern):
        return low_precision_widths(Namespace(**sizes | {"hybrid_layer_pattern": pattern}))

    assert widths(None) == widths("*-") == {"hidden": 8, "ffn": 32}
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_latent_size": 16}
    sizes |= experts | {"moe_layer_freq": [1, 1], "moe_shared_expert_intermediate_size": 40}
    every = {"hidden": 8, "experts": 24, "shared experts": 40, "latent states": 16}
    assert widths(None) == every
    sizes |= {"moe_layer_freq": [0, 1]}
    assert widths(None) == widths("*E") == every | {"ffn": 32}
    sizes |= {"num_experts": None, "kv_channels": 4}
    assert widths(None) == {"hidden": 8, "ffn": 32, "attention": 16}
    latent = {"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 12}
    sizes |= latent | {"v_head_dim": 6}
    assert widths(None) == {"hidden": 8, "ffn": 32, "latent keys": 12, "attention": 24}
    sizes |= {"multi_latent_attention": False, "kv_channels": None}
    # The gate and x, B and C of two groups, one time step for each of four heads.
    projection = 2 * 16 + 2 * 2 * 16 + 4
    assert widths("M-") == widths("*-") | {
        "Mamba's channels": 16,
        "Mamba's input projection": projection,
    }
    assert widths("G-")["the delta net's values"] == 64
    assert widths("G-")["the delta net's input projection"] == 2 * 64 + 2 * 16 + 2 * 4
