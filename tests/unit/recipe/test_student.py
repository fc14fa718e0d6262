"""A recipe against its student: facts from Megatron's flags, layers, dataset labels."""

import dataclasses
import json

import pytest

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.text import (
    ranges,
)
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import (
    ParallelFacts,
    PrecisionFacts,
    StudentFacts,
)
from megatron_moe_inject.recipe.student import check_recipe, student_facts_from_args
from tests.harness.recipes import facts, message_of, recipe, two_domains

# facts from flags


def test_facts_from_flags(parse):
    line = (
        "--num-layers 4 --hidden-size 64 --num-experts 8 --moe-router-topk 6 "
        "--data-path 9 /d/en 1 /d/code "
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel "
        "--context-parallel-size 3 --expert-model-parallel-size 8 "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /tok --mtp-num-layers 1 "
        "--moe-shared-expert-intermediate-size 32 --untie-embeddings-and-output-weights"
    )
    found = student_facts_from_args(parse(line))
    blend = ("/d/en", "/d/code")
    assert dataclasses.replace(found, options={}) == StudentFacts(
        num_layers=4,
        num_moe_experts=8,
        router_topk=6,
        moe_layers=(0, 1, 2, 3),
        shared_experts=True,
        tied_embeddings=False,
        data_paths={"train": blend, "valid": blend, "test": blend},
        hidden_size=64,
        parallel=ParallelFacts(tp=2, pp=4, cp=3, ep=8, etp=2),
        precision=PrecisionFacts(fp8_recipe="delayed", transformer_engine=True),
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("", (0, 1, 2, 3, 4, 5)),
        ("--moe-layer-freq 1", (0, 1, 2, 3, 4, 5)),
        ("--moe-layer-freq 2", (0, 2, 4)),
        ("--moe-layer-freq 4", (0, 4)),
        ("--moe-layer-freq ([0]+[1]*5)", (1, 2, 3, 4, 5)),
        ("--moe-layer-freq ([1]*1+[0]*2)*2", (0, 3)),
        ("--mtp-num-layers 2", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_moe_layers_follow_the_frequency(parse, flag, expected):
    found = student_facts_from_args(parse(f"--num-layers 6 --num-experts 4 {flag}"))
    assert found.moe_layers == expected


def test_moe_layers_agree_with_megatron(parse):
    """The same answer as the layer specs that Megatron builds."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    for freq in ("3", "([0]*2+[1]*3)"):
        args = parse(f"--num-layers 5 --num-experts 4 --moe-layer-freq {freq}")
        config = TransformerConfig(
            num_layers=5,
            hidden_size=8,
            num_attention_heads=2,
            num_moe_experts=4,
            moe_layer_freq=args.moe_layer_freq,
            add_bias_linear=False,
        )
        specs = get_gpt_decoder_layer_specs(
            config, use_transformer_engine=False, normalization="RMSNorm"
        )
        built = []
        for i, spec in enumerate(specs):
            mlp = spec.submodules.mlp
            module = getattr(mlp, "module", None) or getattr(mlp, "func", None)
            if module is MoELayer:
                built.append(i)
        assert built
        assert student_facts_from_args(args).moe_layers == tuple(built)


def test_dense_student(parse):
    for flags in ("", "--num-experts 0"):
        found = student_facts_from_args(parse(f"--num-layers 4 {flags}"))
        assert found.num_moe_experts is None
        assert found.moe_layers == ()
        assert found.tied_embeddings


def test_pattern_of_the_wrong_length(parse):
    args = parse("--num-layers 4 --num-experts 2 --moe-layer-freq [1]*3")
    message = message_of(lambda: student_facts_from_args(args))
    assert "--moe-layer-freq: [1, 1, 1] has 3 entries; --num-layers is 4" in message


def test_missing_layers(parse):
    assert "--num-layers: missing" in message_of(lambda: student_facts_from_args(parse("")))


def test_data_of_each_split(parse, tmp_path):
    base = "--num-layers 2 "
    per_split = parse(base + "--train-data-path 1 a 2 b --valid-data-path c")
    assert student_facts_from_args(per_split).data_paths == {"train": ("a", "b"), "valid": ("c",)}
    listed = tmp_path / "blend.txt"
    listed.write_text("3 a\n4 b\n")
    from_file = student_facts_from_args(parse(base + f"--data-args-path {listed}"))
    assert from_file.data_paths["train"] == from_file.data_paths["test"] == ("a", "b")
    listed = tmp_path / "splits.json"
    listed.write_text(json.dumps({"train": "1 a 1 b", "valid": ["c"], "test": ["d"]}))
    from_file = student_facts_from_args(parse(base + f"--per-split-data-args-path {listed}"))
    assert from_file.data_paths == {"train": ("a", "b"), "valid": ("c",), "test": ("d",)}
    listed.write_text("{")
    args = parse(base + f"--per-split-data-args-path {listed}")
    assert f"--per-split-data-args-path: '{listed}' cannot be read" in message_of(
        lambda: student_facts_from_args(args)
    )
    args = parse(base + "--data-args-path /no/such/file")
    assert "'/no/such/file' cannot be read" in message_of(lambda: student_facts_from_args(args))


def test_mock_data_is_one_dataset(parse):
    found = student_facts_from_args(parse("--num-layers 8 --num-experts 16 --mock-data"))
    assert found.mock_data
    assert [split_labels(recipe(0), found, split) for split in ("train", "valid")] == [[0], [0]]
    message = message_of(lambda: check_recipe(recipe(1), found))
    assert "domains[0].data[0]: 1 is not in the training blend; it has 0: (mock data)" in message


# recipe against facts


def test_a_recipe_that_fits():
    check_recipe(recipe(1), facts())


@pytest.mark.parametrize(
    ("experts", "changes", "parts"),
    [
        ("8:0", {}, ["domains[0].experts.layers.8: 8 is not a layer", "0 to 7"]),
        ("0:1", {}, ["layers.0: 0 is a dense layer", "MoE layers: 1-7", "nearest 1, 2"]),
        ("3:1,16", {}, ["layers.3: [1, 16] names expert 16", "0 to 15"]),
        ("3:1", {"num_moe_experts": None, "moe_layers": ()}, ["dense student", "--num-experts"]),
    ],
)
def test_experts_that_the_student_lacks(experts, changes, parts):
    message = message_of(lambda: check_recipe(recipe(1, experts=experts), facts(**changes)))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "changes", "parts"),
    [
        ("train.shared_experts=true", {}, ["train.shared_experts: True matches nothing"]),
        ("train.mlp=true", {"moe_layers": tuple(range(8))}, ["train.mlp: True matches nothing"]),
        ("train.embedding=true", {"tied_embeddings": True}, ["train.output_layer: False", "alike"]),
    ],
)
def test_components_that_the_student_lacks(override, changes, parts):
    wrong = recipe(1, overrides=[override])
    message = message_of(lambda: check_recipe(wrong, facts(**changes)))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "losses", "refused"),
    [
        ("*E*E/*E", "aux_loss", True),
        ("*E*E/*E", "none", False),
        ("*E*E/*E/*E", "aux_loss", False),
        ("*E*E/**E/**E", "aux_loss", True),
        ("*E*E/E*", "aux_loss", False),
        ("*E*E/*-", "aux_loss", False),
        ("*E*E", "aux_loss", False),
    ],
)
def test_experts_of_prediction_that_megatron_cannot_log(monkeypatch, text, losses, refused):
    """Also in the very step in which Megatron 0.20 ends with an IndexError (``*E*E/*E``)."""
    pattern = LayerPattern(text)
    options = {"moe_router_load_balancing_type": losses}
    student = facts(num_layers=4, moe_layers=pattern.moe_layers, pattern=pattern, options=options)
    monkeypatch.setattr(compat, "logs_balance_of_any_stage", lambda: False)
    check_recipe(recipe(1, experts="3:1"), student)
    monkeypatch.setattr(compat, "logs_balance_of_any_stage", lambda: True)
    if not refused:
        check_recipe(recipe(1, experts="3:1"), student)
        return
    message = message_of(lambda: check_recipe(recipe(1, experts="3:1"), student))
    for part in (f"--hybrid-layer-pattern: '{text}' predicts through experts", "put E first"):
        assert part in message


def test_components_of_a_dense_student():
    dense = facts(num_moe_experts=None, moe_layers=())
    free = ["domains[0].experts={}", "train.experts=none", "train.attention=true"]
    check_recipe(recipe(1, overrides=[*free, "train.mlp=true"]), dense)
    router = recipe(1, overrides=[*free, "train.router=true"])
    assert "train.router: True matches nothing" in message_of(lambda: check_recipe(router, dense))
    everything = recipe(1, overrides=[*free, "train.experts=all"])
    assert "train.experts: 'all' matches nothing" in message_of(
        lambda: check_recipe(everything, dense)
    )


def test_expert_retention_needs_general_data():
    held = recipe(0, 1, retention={"experts": 0.5})
    with pytest.raises(RecipeError, match=r"retention.experts: 0.5 weighs retention"):
        check_recipe(held, facts())


# labels


def test_labels_of_the_training_blend():
    three = facts(["/en", "/code", "/math"])
    assert split_labels(recipe(1), three, "train") == [GENERAL, 0, GENERAL]
    assert split_labels(recipe("/math", 1), three, "train") == [GENERAL, 0, 0]
    assert split_labels(two_domains(["/math"], [0]), three, "train") == [1, GENERAL, 0]
    assert split_labels(recipe(0), facts(["/only"]), "train") == [0]
    assert split_labels(recipe(1), three, "valid") == [GENERAL, 0, GENERAL]
    assert split_labels(recipe("/en"), facts(["/en", "/code", "/en"]), "train") == [0, -1, 0]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([2], ["domains[0].data[0]: 2 is not in the training blend", "0: /d/en, 1: /d/code"]),
        (["/d/cod"], ["data[0]: '/d/cod' is no prefix", "did you mean /d/code?", "1: /d/code"]),
        (["1"], ["domains[0].data[0]: '1'", "a position is written without quotes"]),
        ([1, "/d/code"], ["data[1]: '/d/code' is entry 1", "claimed by domains[0].data[0]"]),
    ],
)
def test_claims_that_do_not_fit(data, parts):
    message = message_of(lambda: check_recipe(recipe(*data), facts()))
    for part in parts:
        assert part in message


def test_two_domains_cannot_claim_one_entry():
    message = message_of(lambda: check_recipe(two_domains([1], ["/d/code"]), facts()))
    assert "domains[1].data[0]: '/d/code' is entry 1, already claimed by domains[0]" in message


def test_no_training_data():
    message = message_of(lambda: check_recipe(recipe(0), facts(data_paths={"train": None})))
    assert "--data-path: missing" in message


def test_validation_with_a_blend_of_its_own():
    def labels(recipe, valid, train=("/en", "/code")):
        found = facts(train, data_paths={"valid": tuple(valid), "test": None})
        check_recipe(recipe, found)
        assert split_labels(recipe, found, "test") == []
        return split_labels(recipe, found, "valid")

    assert labels(recipe(1), ["/v_en", "/v_code"]) == [GENERAL, 0]  # by position
    assert labels(recipe("/code"), ["/v_en", "/v_code"]) == [GENERAL, 0]
    assert labels(recipe(1), ["/code", "/en"]) == [0, GENERAL]  # by the training prefix
    assert labels(recipe(1), ["/code"]) == [0]
    assert labels(recipe(1, "/v_code"), ["/v_code", "/en", "/v_code"]) == [0, GENERAL, 0]
    assert labels(two_domains([1], ["/en", "/v_en"]), ["/code", "/v_en"]) == [0, 1]
    assert labels(two_domains([1], [0]), ["/x", "/y"]) == [1, 0]
    general = two_domains(["/a"], ["/b", "/v_b"], general=["/v_en"])
    assert labels(general, ["/v_en", "/v_b", "/a"], ["/en", "/a", "/b"]) == [GENERAL, 1, 0]


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        ([1], ["/v_code"]),  # fewer entries, unknown
        ([1], ["/code", "/other"]),  # as many, but plainly in another order
        (["/code", "/v_code"], ["/v_code", "/v_en", "/x"]),
    ],
)
def test_validation_that_cannot_be_matched(data, valid):
    found = facts(["/en", "/code"], data_paths={"valid": tuple(valid)})
    message = message_of(lambda: check_recipe(recipe(*data), found))
    assert message.startswith("--valid-data-path: ")
    assert "general_data" in message


def test_weights_that_are_none(parse):
    def paths(flags):
        return student_facts_from_args(parse(f"--num-layers 2 {flags}")).data_paths

    assert paths("--data-path 0.1 a 0.9 b")["valid"] == ("a", "b")
    assert paths("--data-path a b")["test"] == ("a", "b")
    for weight in ("0", "0.0", "1e-400", "nan", "inf"):
        message = message_of(lambda weight=weight: paths(f"--data-path 1 a {weight} b"))
        assert message.startswith(f"--data-path: {float(weight)} is no weight of b")
    flags = "--train-data-path 1 a --valid-data-path 0 b 1 c"
    assert message_of(lambda: paths(flags)).startswith("--valid-data-path: 0.0 is no weight of b")


def test_domain_with_validation_data_only():
    found = facts(data_paths={"valid": ("/d/en", "/v_code")})
    message = message_of(lambda: check_recipe(two_domains([1], ["/v_code"]), found))
    assert "domains[1].data: ['/v_code'] has no training data; training has 0: /d/en" in message


def test_ranges():
    assert ranges([]) == ""
    assert ranges((5, 0, 2, 3, 4)) == "0, 2-5"
