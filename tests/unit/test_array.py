"""The covering array has no gap, and is of the recipe that there is: no field is forgotten."""

import ast
import dataclasses
import typing

import pytest
import yaml

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import PrecisionFacts
from megatron_moe_inject.recipe.features import FEATURES, sections
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.schedule import Schedule
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.student import check_recipe
from tests.harness import covering_array as array
from tests.harness.docs import ROOT, assert_exists
from tests.harness.recipes import facts

TESTED_ALONE = {
    "data": "training/test_errors.py",
    "beginning": "unit/recipe/test_beginning.py",
    "new_experts": "training/test_new_experts.py",
    "door": "training/test_open_experts.py",
    "report": "training/test_report.py",
    "progress": "unit/host/test_progress.py",
    "stages": "training/test_boundary.py",
    "generation": "training/test_generation.py",
    "held_out_pairs": "training/test_preference.py",
    "servers": "training/test_servers.py",
    "validation_sets": "training/test_validation_sets.py",
}
"""Features of the package that no recipe asks for, or in the place of others, and their tests."""


def test_every_feature_of_the_package_is_in_the_array_or_tested_alone():
    assert not [name for name, feature in array.FEATURES.items() if feature.of not in FEATURES]
    assert {feature.of for feature in array.FEATURES.values()} == set(
        FEATURES.names()
    ) - TESTED_ALONE.keys()
    for file in TESTED_ALONE.values():
        assert_exists(file)


def test_no_pair_is_missing():
    assert array.gaps() == []


@pytest.mark.parametrize("layout", array.LAYOUTS)
def test_a_layout_that_runs_one_set_less_is_a_gap(layout):
    """Where everything trains, other features are shown once more; that is left aside."""
    features = set(array.FEATURES) - {array.EVERYTHING}
    frozen = [row for row in array.ROWS if array.SETS[row[1]].freezes]
    assert array.gaps(features, rows=frozen) == []
    for name in ("router", "rows"):
        rows = [row for row in frozen if row != (layout, name)]
        assert len(rows) == len(frozen) - 1
        assert layout in {at for _, at in array.gaps(features, rows=rows)}


@pytest.mark.parametrize("feature", array.FEATURES)
def test_a_set_that_loses_a_feature_is_a_gap(feature):
    """In whichever set it stands, or in those of them that run at most layouts."""
    sets = {
        name: dataclasses.replace(own, features=own.features - {feature})
        if name in ("router", "rows") or not own.freezes or feature == array.HYBRID
        else own
        for name, own in array.SETS.items()
    }
    assert {pair[0] for pair in array.gaps(sets=sets)} >= {feature}


def test_a_pair_that_no_set_has_is_a_gap():
    rows = [row for row in array.ROWS if row[1] != "rows, imitation"]
    missing = array.gaps(rows=rows)
    assert ("trained rows", "imitated states") in missing
    assert {frozenset(pair) for pair in missing} == {
        frozenset({"trained rows", other})
        for other in (array.TRAINED - {"trained router"})
        | array.IMITATED
        | {"expert retention", "adapters", "rollouts", array.WITH_EXPERTS}
    }
    new = [*array.FEATURES, "what nobody wrote"]
    assert len(array.gaps(features=new)) == len(array.FEATURES) + len(array.LAYOUTS)


def test_an_excuse_is_of_pairs_that_no_set_has():
    for pair in array.REFUSED:
        assert pair <= array.FEATURES.keys()
        assert not any(pair <= own.features for own in array.SETS.values())


@pytest.mark.parametrize("pair", array.REFUSED, ids=lambda pair: " and ".join(sorted(pair)))
def test_what_is_excused_is_refused(pair):
    """And each of the two alone is not."""
    needed = {"distillation", "committee", "hugging face teacher"}

    def check(features):
        made = recipe_from_yaml(array.recipe_of(array.FeatureSet({2: [3]}, needed | features)))
        options, precision = {}, PrecisionFacts()
        if "frozen experts in fp8" in features:
            options["fp8"] = "e4m3"
            precision = PrecisionFacts("e4m3", "blockwise", True, True)
        train = ("/d/en", "/d/code", "/d/pairs", "/d/prose")
        given = {"options": options, "precision": precision, "shared_experts": True}
        check_recipe(made, facts(train, **given))

    for feature in pair:
        check({feature})
    with pytest.raises(RecipeError, match=array.REFUSED[pair].says) as caught:
        check(set(pair))
    assert str(caught.value).startswith(array.REFUSED[pair].key)


@pytest.mark.parametrize("name", array.SETS)
def test_each_feature_of_a_set_is_in_its_recipe_or_flags(name):
    own = array.SETS[name]
    whole = yaml.safe_load(array.recipe_of(own))
    recipe_from_yaml(array.recipe_of(own))
    for feature in own.features:
        less = dataclasses.replace(own, features=own.features - {feature})
        changed = yaml.safe_load(array.recipe_of(less)) != whole
        assert changed or array.FEATURES[feature].flags, feature


def _leaves(kind, path=()):
    """Fields of a recipe by path, with a ``*`` for one of several."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get("written", True):
            yield from _within(hints[field.name], (*path, field.name))


def _within(hint, path):
    """The field itself, or those of the dataclass that its type has inside."""
    inner, several = _section(hint)
    if inner is None:
        yield ".".join(path)
    else:
        yield from _leaves(inner, (*path, *(("*",) if several else ())))


def _section(hint):
    """The dataclass that a type has inside, and whether as one of several."""
    if dataclasses.is_dataclass(hint) and hint is not Schedule:
        return hint, False
    sections = [_section(part)[0] for part in typing.get_args(hint)]
    inner = next((kind for kind in sections if kind is not None), None)
    return inner, typing.get_origin(hint) in (list, dict)


FIELDS = frozenset(
    [*_leaves(Recipe), *(f for key, own in sections().items() for f in _within(own.kind, (key,)))]
)
TESTED_ELSEWHERE = {
    "gpu/test_training.py": {"test_teachers_in_fp8": ["teachers.*.fp8"]},
    "parallel/test_losses_divergences.py": {"test_value_and_gradient": ["objective.skew"]},
    "parallel/test_teachers_megatron.py": {
        "test_shared_forward_equals_the_plain_forward_on_every_rank": ["teachers.*.dtype"]
    },
    "te/test_construction.py": {
        "test_a_published_student_is_saved_as_it_was_loaded": ["train.fp8_source"]
    },
    "training/test_adapters.py": {
        "test_a_layout_gives_what_one_process_gives": [
            "train.adapters.*.decay",
            "train.adapters.*.experts",
            "train.adapters.*.layers",
            "train.adapters.*.scaling",
        ],
        "test_rows_of_the_vocabulary": [
            "train.vocabulary_rows.budget",
            "train.vocabulary_rows.domain",
            "train.vocabulary_rows.lr",
        ],
        "test_rows_by_name_or_threshold_decay": [
            "train.vocabulary_rows.decay",
            "train.vocabulary_rows.ids",
            "train.vocabulary_rows.threshold",
        ],
    },
    "training/test_adapters_by_domain.py": {
        "test_a_layout_gives_what_one_process_gives": ["train.adapters.*.domains"],
    },
    "training/test_frozen_bias.py": {
        "test_frozen_routers_keep_their_bias_and_the_one_that_trains_does_not": [
            "steering.bias_counts"
        ]
    },
    "training/test_aligned_stores.py": {
        "test_a_server_is_its_teacher": ["teachers.*.server.tokenizer"],
    },
    "training/test_rollouts.py": {
        "test_a_checkpoint_reads_what_it_wrote_itself": ["rollouts.max_age"],
        "test_a_step_waits_for_what_is_being_written": ["rollouts.late"],
        "test_who_waits_in_vain_leaves_with_a_checkpoint": ["rollouts.patience"],
        "test_a_faulty_file_stops_the_run_if_it_is_to": ["rollouts.faulty"],
    },
    "unit/rollouts/test_shelf.py": {
        "test_older_text_is_read_more_rarely_by_half_each_max_age": ["rollouts.stale"],
    },
    "training/test_servers.py": {
        "test_servers_that_die_end_training_with_a_checkpoint": [
            *("teachers.*.server.ahead", "teachers.*.server.patience"),
            *("teachers.*.server.timeout", "teachers.*.server.top"),
        ],
        "test_two_tensor_parallel_ranks_a_key_and_sglang": ["teachers.*.server.key_from"],
    },
    "unit/teachers/served/test_pool.py": {
        "test_as_many_at_once_as_were_asked_for": ["teachers.*.server.concurrent"],
    },
    "unit/teachers/served/test_probe.py": {
        "test_a_server_that_does_not_fit": ["teachers.*.server.model"],
        "test_what_a_good_server_is": ["teachers.*.server.protocol"],
    },
    "training/test_stores.py": {
        "test_some_ids_and_the_rest_say_less_than_all": ["teachers.*.tail"],
    },
    "unit/teachers/store/test_command.py": {
        "test_a_store_that_is_signed_is_taken_by_who_trusts_its_signer": ["teachers.*.trusted"],
    },
    "training/test_moe_teachers.py": {
        "test_experts_on_several_ranks_teach_the_same": ["teachers.*.ep"],
    },
    "training/test_hybrid_mamba.py": {
        "test_mixers_and_chosen_experts_change_and_nothing_else": ["train.mamba"]
    },
    "training/test_imitation.py": {
        "test_a_dense_student_under_plain_tensor_parallelism": ["train.mlp"],
        "test_two_domains_with_teachers_layers_and_experts_of_their_own": [
            "imitation.loss",
            "teachers.*.layers",
        ],
    },
    "training/test_injection.py": {
        "test_a_single_component_trains_and_nothing_else": ["train.experts"],
        "test_a_trained_head_learns_the_same_from_one_pass_as_from_two": ["objective.masked_sum"],
        "test_experts_by_profile_are_the_experts_that_train": [
            "domains.*.experts.n",
            "domains.*.experts.only_layers",
        ],
        "test_layers_and_parameters_train_by_name": ["train.layers"],
    },
    "training/test_objective.py": {
        "test_all_that_goes_through_logits_is_told_which_kernels": ["objective.kernels"]
    },
    "training/test_open_experts.py": {
        "test_each_domain_finds_its_own_and_general_tokens_stay_away": ["routing.open"]
    },
    "training/test_packed.py": {
        "test_each_sample_of_a_row_has_the_loss_of_its_class": ["objective.general_beta"]
    },
    "training/test_preference.py": {
        "test_a_teacher_as_reference": [
            "objective.preference.label_smoothing",
            "objective.preference.length_normalised",
            "objective.preference.sft",
            "objective.preference.teacher",
        ],
    },
    "training/test_profile.py": {
        "test_what_it_records_chooses_the_experts_of_a_run": [
            "domains.*.experts.method",
            "domains.*.experts.profile",
            "domains.*.experts.threshold",
        ]
    },
    "training/test_steering.py": {
        "test_it_raises_the_share_until_the_target_mass_and_stops": ["steering.report"],
        "test_layers_are_detailed_in_tensorboard": ["steering.detail_every"],
        "test_mistakes": ["steering.layers"],
        "test_other_balance_losses_leave_domain_tokens_out": ["steering.stock_balance"],
    },
    "training/test_teacher_reading.py": {
        "test_a_megatron_teacher_reads_its_prefix_too": ["teachers.*.prefix"]
    },
    "unit/experts/choose/test_choice.py": {
        "test_another_class_of_the_profile": ["domains.*.experts.domain"],
        "test_methods": [
            "domains.*.experts.at_least",
            "domains.*.experts.at_most",
            "domains.*.experts.budget",
            "domains.*.experts.budget_of",
            "domains.*.experts.ep",
            "domains.*.experts.score",
        ],
        "test_resolved_recipe_is_plain_and_says_where_from": ["domains.*.experts.origin"],
    },
    "unit/experts/choose/test_new_experts.py": {
        "test_new_experts_by_name": ["domains.*.experts.new"],
        "test_old_ids_are_moved": ["domains.*.experts.numbering"],
    },
    "unit/recipe/test_recipe.py": {
        "test_good_recipe_and_its_defaults": ["verify_frozen"],
        "test_mistake_names_key_value_and_remedy": ["version"],
        "test_share_of_cross_entropy_is_a_shortcut": ["objective.ce_share"],
        "test_weights_and_temperatures_by_domain": [
            "domains.*.alpha",
            "domains.*.beta",
            "domains.*.temperature",
            "teachers.*.temperature",
        ],
    },
    "unit/recipe/test_student.py": {"test_validation_with_a_blend_of_its_own": ["general_data"]},
}
"""Fields that no set sets, by the test that does."""


def _set_by(own):
    """Fields that a set's recipe writes."""

    def walk(node, path):
        field = ".".join(path)
        if field in FIELDS:
            yield field
        elif isinstance(node, list) or field in ("teachers",):
            for inner in node if isinstance(node, list) else node.values():
                yield from walk(inner, (*path, "*"))
        else:
            assert isinstance(node, dict), f"{field} is no field of a recipe"
            for name, inner in node.items():
                yield from walk(inner, (*path, name))

    return set(walk(yaml.safe_load(array.recipe_of(own)), ()))


def test_every_field_of_a_recipe_is_in_a_set_or_tested_elsewhere():
    in_sets = set().union(*(_set_by(own) for own in array.SETS.values()))
    elsewhere = [
        field
        for tests in TESTED_ELSEWHERE.values()
        for fields in tests.values()
        for field in fields
    ]
    assert len(elsewhere) == len(set(elsewhere))
    assert FIELDS - in_sets == set(elsewhere)


def test_a_field_that_nobody_tests_is_noticed():
    assert {"objective.gamma", "steering.layers", "domains.*.experts.layers"} <= FIELDS
    assert "steering.layers" not in _set_by(array.SETS["router"])
    assert "objective.gamma" in _set_by(array.SETS["router"])


@pytest.mark.parametrize("file", TESTED_ELSEWHERE)
def test_what_is_tested_elsewhere_is(file):
    for name in TESTED_ELSEWHERE[file]:
        assert_exists(f"{file}::{name}")


def test_a_test_that_a_class_takes_from_the_harness_is_there():
    assert_exists("training/test_array_rows.py::TestRows::test_a_resumed_run_goes_on_bitwise")


def test_a_test_that_is_not_there_is_noticed():
    for named in (
        "training/test_nothing.py::test_a",
        "unit/test_array.py::test_nothing",
        "training/test_array_rows.py::TestRows::test_nothing",
        "training/test_array_rows.py::TestNothing::test_a_resumed_run_goes_on_bitwise",
        "training/test_array_rows.py::test_a_resumed_run_goes_on_bitwise",
    ):
        with pytest.raises(AssertionError, match=r"no file|no such function"):
            assert_exists(named)


def test_ranks_that_have_nothing_to_train_are_in_the_table():
    """The first of two stages and expert ranks in one set, the last in another."""
    trains_beside = {"pattern", *array.TRAINED, *array.IMITATED}
    first, last = array.SETS["nothing first"], array.SETS["rows"]
    layers, experts = set(first.experts), {e for own in first.experts.values() for e in own}
    assert min(layers) >= 2
    assert min(experts) >= 2
    assert not first.features & (trains_beside | {"trained rows"})
    assert max(last.experts) <= 1
    assert max(e for own in last.experts.values() for e in own) <= 1
    assert not last.features & (trains_beside - {"pattern"})
    assert array.FEATURES["pattern"].recipe["train.patterns"] == ["*.1.pre_mlp_layernorm.weight"]
    runs = set(array.ROWS)
    assert {(layout, "nothing first") for layout in ("ep2", "pp2", "pp2-vpp2")} <= runs
    assert {(layout, "rows") for layout in array.LAYOUTS} <= runs


def test_originals_are_on_the_device_and_on_the_host_at_every_layout():
    """The device is no feature: it is where they are without one."""
    for layout in array.LAYOUTS:
        own = [array.SETS[name].features for at, name in array.ROWS if at == layout]
        assert all("gamma" in features for features in own)
        assert {"originals on the host" in features for features in own} == {False, True}


@pytest.mark.parametrize("name", array.SETS)
def test_what_a_set_has_instead_is_of_its_features(name):
    own = array.SETS[name]
    values = {}
    for feature in own.features:
        values |= array.FEATURES[feature].recipe
    for field, value in own.instead.items():
        assert values[field] != value, field


def test_every_set_runs_in_one_file():
    files = sorted((ROOT / "tests" / "training").glob("test_array_*.py"))
    assigned = [
        ast.literal_eval(node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and node.targets[0].id == "sets"
    ]
    assert len(assigned) == len(files)
    assert sorted(name for names in assigned for name in names) == sorted(array.SETS)
