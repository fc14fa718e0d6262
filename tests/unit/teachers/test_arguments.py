"""Architectures that a Megatron checkpoint's own arguments rule out as a teacher."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.megatron_args import describe, refuse_unsupported

SOURCE = Source("coder", "megatron:/ckpt", "megatron", Path("/ckpt"))
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


def test_a_dense_model_passes():
    refuse_unsupported(SOURCE, Namespace(**DENSE))
    refuse_unsupported(SOURCE, Namespace())
    refuse_unsupported(SOURCE, Namespace(**DENSE | {"use_mup": True, "mup_output_mult": 0.5}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"mixture of experts \(its argument num_experts is 8\)"),
        ({"num_experts": 8}, "not supported yet; name a dense GPT checkpoint"),
        ({"hybrid_layer_pattern": "M*-M"}, r"hybrid .* hybrid_layer_pattern is 'M\*-M'"),
        ({"is_hybrid_model": True}, "hybrid"),
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
    ],
)
def test_description(changes, expected):
    described = describe(Namespace(**DENSE | changes))
    assert expected.items() <= described.items()
