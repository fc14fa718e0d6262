"""Patterns of hybrid models, their GPT blocks, and the names of tensors by both."""

from argparse import Namespace

import pytest

from megatron_moe_inject.host.gpt_names import pattern_of_names, to_gpt, to_hybrid
from megatron_moe_inject.host.layer_pattern import LayerPattern, pattern_of


def test_layers_are_symbols_without_borders_and_what_follows_a_slash():
    pattern = LayerPattern("M*E|M*-|*E/*E/*E")
    assert pattern.symbols == "M*EM*-*E"
    assert pattern.num_layers == 8
    assert pattern.segments == ("M*E", "M*-", "*E")
    assert pattern.moe_layers == (2, 7)
    assert pattern.where("M") == (0, 3)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("*E*E", ((0, 1), (2, 3))),
        ("*|E*|E", ((0, 1), (2, 3))),
        ("M*EM*-/*E", ((1, 2), (4, 5))),
        ("+E+-", ((0, 1), (2, 3))),
        ("*MGE", ((0, 3),)),
        ("*E-", None),
        ("E*E*", None),
        ("**EE", None),
        ("MM", None),
        ("*E*", None),
    ],
)
def test_blocks_are_an_attention_and_the_mlp_behind_it(text, blocks):
    pattern = LayerPattern(text)
    assert pattern.blocks == blocks
    for layer in range(pattern.num_layers):
        owners = [n for n, pair in enumerate(blocks or ()) if layer in pair]
        assert pattern.block_of(layer) == (owners[0] if owners else None)
    shown = "do not take turns" if blocks is None else f"block 0 = layers {blocks[0][0]} and"
    assert shown in pattern.table()


@pytest.mark.parametrize(
    ("text", "size", "without"),
    [
        ("*E*E", 2, []),
        ("*|E*E", 2, [0]),
        ("*E|*", 2, [1]),
        ("*|E|*|E", 2, [0]),
        ("*E|*|E*|E", 2, []),
        ("**EE", 2, [0]),
        ("*E*E/*E", 1, []),
        ("M|M|E|M", 4, [0, 1, 3]),
    ],
)
def test_stages_without_experts(text, size, without):
    assert LayerPattern(text).stages_without_experts(size) == without


def test_the_pattern_of_options_by_its_new_and_its_old_name():
    assert pattern_of(Namespace(num_layers=4)) is None
    assert (
        pattern_of(Namespace(hybrid_layer_pattern=None, hybrid_override_pattern="*E")).text == "*E"
    )
    assert pattern_of({"hybrid_layer_pattern": "*-", "hybrid_override_pattern": None}).text == "*-"


EXPERTS = "mlp.experts.experts.linear_fc1.weight"
QKV = "self_attention.linear_qkv.weight"
PAIRS = [
    ((f"decoder.layers.4.{QKV}", ()), (f"decoder.layers.{QKV}", (1,))),
    ((f"decoder.layers.2.{EXPERTS}", (5,)), (f"decoder.layers.{EXPERTS}", (0, 5))),
    (("decoder.layers.5.mlp.router.weight", ()), ("decoder.layers.mlp.router.weight", (1,))),
    (("decoder.final_norm.weight", ()), ("decoder.final_layernorm.weight", ())),
    (("embedding.word_embeddings.weight", ()), ("embedding.word_embeddings.weight", ())),
]


@pytest.mark.parametrize(("hybrid", "gpt"), PAIRS)
def test_names_lead_both_ways(hybrid, gpt):
    pattern = LayerPattern("M*EM*E")
    assert to_gpt(*hybrid, pattern) == gpt
    assert to_hybrid(*gpt, pattern) == hybrid


def test_what_a_gpt_model_has_not_has_no_name():
    assert to_gpt("decoder.layers.0.mixer.in_proj.weight", (), LayerPattern("M*E")) is None


def test_the_pattern_by_the_names_of_tensors():
    names = [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mixer.in_proj.weight",
        f"decoder.layers.1.{QKV}",
        "decoder.layers.2.mlp.router.weight",
        f"decoder.layers.2.{EXPERTS}",
        "decoder.layers.2.mlp.shared_experts.linear_fc2.weight",
        "decoder.layers.3.self_attention.A_log",
        "decoder.layers.3.self_attention.out_proj.weight",
        "decoder.layers.10.mlp.linear_fc2.weight",
    ]
    assert pattern_of_names(names) is None
    assert pattern_of_names([*names, "decoder.final_norm.weight"]).symbols == "M*EG??????-"
