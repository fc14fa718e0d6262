"""What ``--spec`` takes for layers of published models: mistakes are told with the flag."""

from types import SimpleNamespace

import pytest

from megatron_moe_inject.host import gelu_gates, plain_queries, projection_norms


def config(**model):
    """Of Megatron's ``GPTModelConfig`` what is read before any layer is built."""
    return SimpleNamespace(transformer=SimpleNamespace(**model))


def norms(**changed):
    sizes = {"num_query_groups": 4, "tensor_model_parallel_size": 2}
    return config(**{"qk_layernorm": True, "normalization": "RMSNorm", **sizes, **changed})


@pytest.mark.parametrize(
    ("layers", "model", "message"),
    [
        (plain_queries.layers, config(q_lora_rank=24), r"with --q-lora-rank 24: .*; leave one"),
        (projection_norms.layers, norms(qk_layernorm=False), "add --qk-layernorm and"),
        (projection_norms.layers, norms(normalization="LayerNorm"), "--normalization RMSNorm"),
        (
            projection_norms.layers,
            norms(num_query_groups=1),
            "--tensor-model-parallel-size 2 does not divide the 1 key groups",
        ),
        (gelu_gates.layers, config(gated_linear_unit=False), "add --swiglu"),
    ],
    ids=["latent queries", "no norms", "other norms", "part of a group", "no gate"],
)
def test_what_a_spec_cannot_build(layers, model, message):
    with pytest.raises(ValueError, match=rf"--spec {layers.__module__}.*{message}"):
        layers(model)
