"""Expert-output retention and L2 to the start through the real ``pretrain()``.

Experts of both of two expert-parallel ranks and both of two pipeline stages train, several in one
layer, so that the means over layers, ranks and experts are seen.
"""

import math

import pytest

from tests.harness import lane
from tests.harness.grouped import grouped
from tests.harness.injection import PROVEN, RECIPE, inject
from tests.harness.material import EVALUATES
from tests.harness.training_recipes import EVERYTHING

PLAIN = RECIPE.replace("{{2: [3], 3: [3]}}", "{{1: [1], 3: [0, 3]}}")
HELD = PLAIN + "retention: {{experts: 2.0, l2: 0.05}}\n"
OWN = ("expert retention", "l2 to start")
TERMS = ("lm loss", "kd loss", "total loss", "grad norm", *OWN)


@pytest.fixture(scope="module")
def single(material):
    return inject(material, HELD, extra=EVALUATES)


def same(run, other, rel=2e-5):
    for term in TERMS:
        assert run.losses(term) == pytest.approx(other.losses(term), rel=rel, abs=1e-7), term


def test_both_are_exactly_zero_at_the_first_step_and_leave_it_as_it_is(material, single):
    plain = inject(material, PLAIN)
    for term in ("lm loss", "kd loss", "total loss", "grad norm"):
        assert single.losses(term)[0] == plain.losses(term)[0], term
        assert single.losses(term)[2:] != plain.losses(term)[2:], term
    for term in OWN:
        assert single.losses(term)[0] == 0
        assert min(single.losses(term)[1:]) > 0
    assert single.evaluations[-1]["expert retention"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            dict(tp=2, extra=("--expert-tensor-parallel-size", "1")), id="tp2, experts whole"
        ),
        pytest.param(
            dict(ep=2, extra=("--moe-token-dispatcher-type", "allgather")), id="ep2, allgather"
        ),
    ],
)
def test_the_curve_does_not_depend_on_where_experts_are(material, single, layout):
    run = inject(material, HELD, nproc=2, **layout)
    assert len(run.iterations) == 4
    same(run, single)
    assert PROVEN.search(run.output)


def test_grouped_experts_give_the_same_curve(material, single):
    same(grouped(material, nproc=2, recipe=HELD, ep=2), single)


def test_each_holds_what_it_is_there_to_hold(material):
    """The same run with a weight that acts, and with one that only watches."""
    more = ("--train-iters", "12", *lane.ONE_BATCH)
    runs = [
        inject(material, HELD.replace("experts: 2.0, l2: 0.05", weights), extra=more)
        for weights in (
            "experts: 1.0e-9, l2: 1.0e-9",
            "experts: 50.0, l2: 1.0e-9",
            "experts: 1.0e-9, l2: 5.0",
        )
    ]
    watched, experts, start = ([run.losses(term)[-1] for term in OWN] for run in runs)
    assert experts[0] < 0.7 * watched[0]
    assert start[1] < 0.7 * watched[1]


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        pytest.param(dict(tp=2), (), id="tp2"),
        pytest.param(dict(pp=2), ("--bf16",), id="pp2, bf16", marks=pytest.mark.slow),
        pytest.param({}, ("--bf16", *lane.DISTRIBUTED_OPTIMIZER), id="dp2, distributed, bf16"),
        pytest.param(dict(ep=2), lane.DISTRIBUTED_OPTIMIZER, id="ep2", marks=pytest.mark.slow),
        pytest.param(dict(cp=2), (), id="cp2", marks=pytest.mark.slow),
    ],
)
def test_where_l2_rules_the_gradient_is_its_weight_times_the_way_from_the_start(
    material, layout, extra
):
    """Everything trains, a shared matrix too. Megatron's own norm counts each parameter once."""
    recipe = EVERYTHING.replace(", gamma: 2.0", "") + "retention: {{l2: 1.0e4}}\n"
    run = inject(material, recipe, nproc=2, extra=extra, **layout)
    for step in run.iterations[1:]:
        way = math.sqrt(2 * step["l2 to start"])
        assert step["grad norm"] == pytest.approx(1e4 * way, rel=2e-3)


@pytest.mark.slow
def test_sharded_and_whole_float32_values_of_16_bit_parameters_agree(material):
    bf16 = ("--bf16", "--train-iters", "6", "--inject-set", "objective.gamma=1.0")
    whole = inject(material, HELD, nproc=2, extra=bf16)
    split = inject(material, HELD, nproc=2, extra=(*bf16, *lane.DISTRIBUTED_OPTIMIZER))
    same(split, whole, rel=1e-3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--data-path", "{domain}", "--inject-set", "domains[0].data=[0]"),
            "retention.experts: 2.0 weighs retention on general data",
        ),
        (
            ("--inject-set", "train={{experts: none, patterns: ['*.router.weight']}}"),
            "retention.experts: holds experts, but none train",
        ),
    ],
    ids=["no general data", "no experts"],
)
def test_what_cannot_be_is_one_error(material, extra, message):
    extra = tuple(part.format(domain=material.domain) for part in extra)
    run = inject(material, HELD, extra=extra, check=False)
    assert run.returncode == 2, run.tail()
    assert message in run.output
    assert "Traceback" not in run.output
