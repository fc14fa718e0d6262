"""Steering by the running mean of a windowed teacher's confidence, through the real ``pretrain()``.

Both entries of the blend are domains; one teacher is much surer of its own kind of text.
"""

import copy
import functools

import pytest

from tests.harness import lane
from tests.harness.injection import LAYOUTS, PROVEN, inject, recipe_file
from tests.harness.material import student_flags

TWO = """
domains:
  - {{name: prose, data: [0], teacher: plain, experts: {{layers: {{1: [1], 2: [1]}}}}}}
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{1: [2], 2: [0, 3], 3: [3]}}}}}}
teachers:
  plain: {{source: "megatron:{teacher}", window: 0}}
  coder: {{source: "megatron:{teacher}", window: 1}}
train: {{router: true}}
steering: {{coeff: 0.5, target_mass: 0.8, balance: 0.1, confidence: label, detail_every: 0}}
"""
BOTH = TWO.replace("window: 0", "window: 2")
AHEAD = TWO.replace("window: 1", "window: 0")
SURE = ("teacher confidence/prose", "teacher confidence/code")
TERMS = ("lm loss", "total loss", "steering loss", "target balance loss", "grad norm", *SURE)
LONGER = ("--train-iters", "6")


@pytest.fixture(scope="module")
def both(material):
    return inject(material, BOTH, extra=LONGER)


@pytest.fixture(scope="module")
def at_layout(material):
    """Runs of ``BOTH`` by layout, each once."""

    @functools.cache
    def run(layout):
        sizes = copy.deepcopy(LAYOUTS[layout])
        return inject(material, BOTH, **(sizes | {"extra": (*LONGER, *sizes.get("extra", ()))}))

    return run


def agrees(run, expected):
    for term in TERMS:
        assert run.losses(term) == pytest.approx(expected.losses(term), rel=2e-5, abs=1e-6), term


def test_it_begins_at_one_and_then_is_the_mean_of_earlier_steps(material, both):
    """Beside the confidences of each token, which a run without windows knows ahead."""
    ahead = inject(material, AHEAD, extra=LONGER)
    for name in SURE:
        seen = ahead.losses(name)
        means = [1.0, *(sum(seen[:step]) / step for step in range(1, len(seen)))]
        # Ahead of the step, the last of 32 tokens has no label and counts 0.
        assert both.losses(name) == pytest.approx(means, rel=0.08), name
        assert both.losses(name)[0] == pytest.approx(1.0, rel=1e-6)
    assert both.losses(SURE[0])[1] < 0.8 * both.losses(SURE[1])[1]
    assert "prose and code: weighted by the teacher's confidence[label], its mean" in both.output


def test_it_changes_what_is_steered_from_the_second_step_on(material, both):
    plain = inject(material, BOTH.replace("label", "none"), extra=LONGER)
    assert both.losses("steering loss")[:1] == pytest.approx(plain.losses("steering loss")[:1])
    assert both.losses("steering loss")[1] != pytest.approx(
        plain.losses("steering loss")[1], rel=1e-3
    )


@pytest.mark.parametrize(
    "layout",
    [
        "ep2",
        "tp2-sp",
        "pp2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cp2", "pp2-vpp2", "full recompute", "per-token loss")
        ),
    ],
)
def test_the_curve_does_not_depend_on_the_layout(both, at_layout, layout):
    run = at_layout(layout)
    agrees(run, both)
    assert PROVEN.search(run.output)
    for name in SURE:
        found = run.evaluations[-1][name], both.evaluations[-1][name]
        assert found[0] == pytest.approx(found[1], rel=2e-5), name


@pytest.mark.parametrize("layout", [pytest.param("tp2-sp", marks=pytest.mark.slow), "pp2"])
def test_a_mean_beside_confidences_of_each_token(material, layout):
    one = inject(material, TWO)
    assert one.losses(SURE[1])[0] == pytest.approx(1.0, rel=1e-6)
    assert one.losses(SURE[0])[0] < 0.9
    agrees(inject(material, TWO, **copy.deepcopy(LAYOUTS[layout])), one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_a_committee_of_which_one_has_a_window(material, layout):
    """The mixture's confidence, measured where the states of both are there."""
    recipe = TWO.replace("teacher: coder", "teacher: {{plain: 1, coder: 1}}")
    one = inject(material, recipe)
    assert "code: weighted by the teacher's confidence[label], its mean" in one.output
    assert 0 < one.losses(SURE[1])[1] < 0.95
    agrees(inject(material, recipe, **copy.deepcopy(LAYOUTS[layout])), one)


@pytest.mark.parametrize("layout", ["pp2", pytest.param("ep2", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_bitwise(material, tmp_path, at_layout, layout):
    resumed = _resumed(material, str(tmp_path / "saved"), LAYOUTS[layout])
    for term in TERMS:
        assert resumed.losses(term) == at_layout(layout).losses(term)[3:], term
    assert "begins anew" not in resumed.output


@pytest.mark.slow
def test_a_resumed_run_goes_on_bitwise_in_bf16_with_the_distributed_optimizer(material, tmp_path):
    optimizer = ("--bf16", *lane.DISTRIBUTED_OPTIMIZER)
    whole = inject(material, BOTH, nproc=2, ep=2, extra=(*optimizer, *LONGER))
    resumed = _resumed(material, str(tmp_path / "saved"), dict(nproc=2, ep=2), optimizer)
    for term in TERMS:
        assert resumed.losses(term) == whole.losses(term)[3:], term


def _resumed(material, save, layout, optimizer=()):
    """The last three of six steps, by a run of its own."""
    keep = (*optimizer, *LONGER, "--save", save, "--save-interval", "3")
    inject(material, BOTH, extra=(*keep, "--exit-interval", "3"), **layout)
    ours = ("--inject-recipe", recipe_file(material, BOTH), "--load", save)
    sizes = {name: size for name, size in layout.items() if name != "nproc"}
    flags = student_flags(*material.blend, *keep, *ours, **sizes)
    resumed = lane.run(flags, nproc=layout["nproc"])
    assert [step["iteration"] for step in resumed.iterations] == [4, 5, 6]
    return resumed
