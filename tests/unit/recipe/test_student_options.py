"""Options of Megatron beside a recipe: what is refused, with which, and what passes."""

import dataclasses
import json

import pytest

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import PrecisionFacts
from megatron_moe_inject.recipe.refused_options import NO_PARTS
from megatron_moe_inject.recipe.student import check_recipe, student_facts_from_args
from tests.harness.recipes import facts, message_of, recipe, two_domains


def parsed(parse, line):
    """The flags of a line; what only a newer Megatron knows skips the test on an older one."""
    try:
        return parse(line)
    except SystemExit:
        if not compat.megatron_version().startswith("0.18"):
            raise
        pytest.skip("Megatron 0.18 has no such flag")


def test_parameters_in_fp8_have_no_copies_in_host_memory():
    held = ["objective.gamma=1", "retention.originals=host"]
    fp8 = facts(options={"fp8_param_gather": True})
    message = message_of(lambda: check_recipe(recipe(1, overrides=held), fp8))
    for part in ("--fp8-param-gather: ", "retention.originals to device"):
        assert part in message
    check_recipe(recipe(1, overrides=held), facts())
    check_recipe(recipe(1, overrides=held[:1]), fp8)


ONE_LAYER = "decoder.layers.3.mlp.experts.5.linear_fc2.weight"


@pytest.mark.parametrize("option", NO_PARTS, ids=lambda option: option.name)
@pytest.mark.parametrize(
    ("experts", "train", "refused"),
    [
        ("3:0,5", {}, "train.experts: selected"),
        (None, {"experts": "all"}, None),
        (None, {"experts": "none", "patterns": [ONE_LAYER]}, "train.patterns"),
        (None, {"experts": "none", "patterns": ["*.3.mlp.experts.?.*"]}, "train.patterns"),
        (None, {"experts": "none", "patterns": ["*.experts.*"]}, None),
        (None, {"experts": "none", "patterns": [ONE_LAYER], "layers": [3]}, None),
        (None, {"experts": "none", "patterns": ["*.final_layernorm.*"]}, None),
    ],
)
def test_what_grouped_experts_cannot_do_in_part(option, experts, train, refused):
    fields = [f"train.{name}={json.dumps(value)}" for name, value in train.items()]
    made = recipe(experts=experts, overrides=fields)
    grouped = PrecisionFacts(grouped_gemm=True)
    student = facts(options={option.name: True}, precision=grouped)
    check_recipe(made, facts(options={option.name: True}))
    if refused is None:
        check_recipe(made, student)
        return
    message = message_of(lambda: check_recipe(made, student))
    for part in (option.flag, option.reason, f"so that {refused} cannot", "remove it, or"):
        assert part in message


def test_delayed_scaling_with_parameters_in_fp8_trains_experts_whole():
    precision = PrecisionFacts("hybrid", "delayed", transformer_engine=True, grouped_gemm=True)
    student = facts(precision=precision, options={"fp8_param_gather": True})
    assert (
        "which with --fp8-recipe delayed and train.experts: selected nobody has verified"
        in message_of(lambda: check_recipe(recipe(), student))
    )
    for changes in ({"precision": dataclasses.replace(precision, fp8_recipe="tensorwise")}, {}):
        options = student.options if changes else {}
        check_recipe(recipe(), dataclasses.replace(student, **changes, options=options))


REFUSED = [
    "--yaml-cfg x.yaml",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--hybrid-context-parallel",
    "--moe-use-upcycling",
    "--init-model-with-meta-device",
    "--perform-rl-step",
    "--logits-load-dir /x",
    "--multiple-validation-sets",
    "--full-validation",
    "--cuda-graph-impl full_iteration",
    "--freeze-all-layers",
    "--defer-embedding-wgrad-compute",
    "--fp8-output-proj",
    "--save-activations-interval 5",
    "--save-dgrads-interval 5",
    "--logits-save-dir /x",
    "--config-logger-dir /x",
    "--qk-clip",
]


@pytest.mark.parametrize("flag", REFUSED)
def test_megatron_options_that_do_not_fit(parse, flag):
    line = f"--num-layers 8 --num-experts 16 --data-path 1 /d/en 1 /d/code {flag}"
    args = parsed(parse, line)
    name = flag if "cuda-graph" in flag else flag.split()[0]
    found = student_facts_from_args(args)
    message = message_of(lambda: check_recipe(recipe(1), found))
    assert message.startswith(f"{name}: ")
    assert "remove it" in message
    assert message_of(lambda: check_recipe(two_domains([0], [1]), found)) == message


WHOLE_SETS = "--multiple-validation-sets --full-validation"


@pytest.mark.parametrize(
    ("data", "overrides", "fits"),
    [
        ("--train-data-path 1 /d/en 1 /d/code --valid-data-path /v/en /v/code", [], True),
        ("--train-data-path 1 /d/en 1 /d/code --valid-data-path 1 /v/en 1 /v/code", [], False),
        ("--data-path /d/en /d/code", [], True),
        ("--data-path 1 /d/en 1 /d/code", [], False),
        ("--data-path /d/en /d/code", ["mixing.general=0.2"], False),
    ],
)
def test_validation_sets_have_no_weights(parse, data, overrides, fits):
    line = f"--num-layers 8 --num-experts 16 {data} {WHOLE_SETS}"
    found = student_facts_from_args(parse(line))
    if fits:
        check_recipe(recipe(1, overrides=overrides), found)
        return
    message = message_of(lambda: check_recipe(recipe(1, overrides=overrides), found))
    assert message.startswith("--multiple-validation-sets: reads each set whole, without a weight")
    assert "--valid-data-path, the latter without weights" in message


def test_modelopt_is_refused():
    with pytest.raises(RecipeError, match="--modelopt-enabled: replaces the model"):
        check_recipe(recipe(1), facts(options={"modelopt_enabled": True}))


def test_harmless_options_pass(parse):
    line = (
        "--num-layers 8 --num-experts 16 --data-path 1 /d/en 1 /d/code --fim-data "
        "--cuda-graph-impl local"
    )
    check_recipe(recipe(1), student_facts_from_args(parse(line)))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (
            {"hidden": 1},
            {"cuda_graph_impl": "local"},
            "--cuda-graph-impl.*imitation.hidden",
        ),
        (
            {"hidden": 1},
            {"overlap_moe_expert_parallel_comm": True},
            "--overlap-moe-expert-parallel-comm: runs layers in parts.*imitation.hidden",
        ),
        (
            {"experts": 1},
            {"overlap_moe_expert_parallel_comm": True},
            "--overlap-moe-expert-parallel-comm: runs layers in parts.*imitation.experts",
        ),
        ({"experts": 1}, {"moe_token_dispatcher_type": "flex"}, "--moe-token-dispatcher-type flex"),
        ({"experts": 1}, {"moe_shared_expert_overlap": True}, "--moe-shared-expert-overlap"),
        ({"experts": 1}, {"moe_latent_size": 64}, "--moe-latent-size.*imitation.experts"),
    ],
)
def test_imitation_refuses_what_hides_its_states(features, options, message):
    imitating = recipe(1, overrides=[f"imitation.{k}={v}" for k, v in features.items()])
    check_recipe(recipe(1), facts(options=options))
    with pytest.raises(RecipeError, match=message):
        check_recipe(imitating, facts(options=options))
    if "experts" in features and "overlap_moe_expert_parallel_comm" not in options:
        check_recipe(recipe(1, overrides=["imitation.hidden=1"]), facts(options=options))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cuda-graph-impl local", "--cuda-graph-impl"),
        ("--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex"),
        ("--fp8-format e4m3", "--fp8-format"),
        ("--fine-grained-activation-offloading", "--fine-grained-activation-offloading"),
        ("--moe-grouped-gemm --moe-paged-stash", "--moe-paged-stash"),
    ],
)
def test_expert_retention_refuses_what_keeps_experts_from_running_twice(parse, flags, message):
    line = f"--num-layers 8 --num-experts 16 --data-path 1 /d/en 1 /d/code {flags}"
    found = student_facts_from_args(parse(line))
    if "grouped" not in flags:
        check_recipe(recipe(1), found)
    with pytest.raises(RecipeError, match=f"{message}.*retention.experts"):
        check_recipe(recipe(1, overrides=["train.experts=all", "retention.experts=1"]), found)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--hybrid-layer-pattern=-*-E*E*E", "a hybrid model (-*-E*E*E) has no schedule plan"),
        ("--sft", "the borders of packed documents (--sft)"),
        ("--dataloader-inter-document-masking", "(--dataloader-inter-document-masking) out of"),
    ],
)
def test_schedule_plans_are_of_gpt_models_and_whole_samples(parse, flags, what):
    line = f"--num-layers 8 --num-experts 16 --data-path 1 /d/en 1 /d/code {flags} "
    args = parsed(parse, line + "--overlap-moe-expert-parallel-comm")
    message = message_of(lambda: check_recipe(recipe(1), student_facts_from_args(args)))
    assert message.startswith("--overlap-moe-expert-parallel-comm: ")
    assert what in message
    check_recipe(recipe(1), student_facts_from_args(parse(line)))
