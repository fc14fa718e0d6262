"""Steering by the running mean of a windowed teacher's confidence, through the real ``pretrain()``.

Both entries of the blend are domains; one teacher is much surer of its own kind of text.
"""

import pytest

from tests.harness import lane
from tests.harness.injection import LAYOUTS, PROVEN, inject, recipe_file
from tests.harness.material import EVALUATES, student_flags

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
LONGER = ("--train-iters", "6", *EVALUATES)


@pytest.fixture(scope="module")
def both(material):
    return inject(material, BOTH, extra=LONGER)


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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2", "tp2-sp", "pp2"])
def test_means_of_two_domains_do_not_depend_on_the_layout(material, both, layout):
    sizes = dict(LAYOUTS[layout])
    run = inject(material, BOTH, extra=(*LONGER, *sizes.pop("extra", ())), **sizes)
    agrees(run, both)
    assert PROVEN.search(run.output)
    for name in SURE:
        ours, theirs = run.evaluations[-1][name], both.evaluations[-1][name]
        assert ours == pytest.approx(theirs, rel=2e-5), name


@pytest.mark.slow
def test_means_of_two_domains_go_on_bitwise_in_a_resumed_run(material, tmp_path):
    """At two pipeline stages, where the last one measures them."""
    keep = (*LONGER, "--save", str(tmp_path), "--save-interval", "3")
    whole = inject(material, BOTH, nproc=2, pp=2, extra=LONGER)
    inject(material, BOTH, nproc=2, pp=2, extra=(*keep, "--exit-interval", "3"))
    ours = ("--inject-recipe", recipe_file(material, BOTH), "--load", str(tmp_path))
    resumed = lane.run(student_flags(*material.blend, *keep, *ours, pp=2), nproc=2)
    assert [step["iteration"] for step in resumed.iterations] == [4, 5, 6]
    for term in TERMS:
        assert resumed.losses(term) == whole.losses(term)[3:], term
    assert "begins anew" not in resumed.output


@pytest.mark.parametrize("layout", [pytest.param("tp2-sp", marks=pytest.mark.slow), "pp2"])
def test_a_mean_beside_confidences_of_each_token(material, layout):
    one = inject(material, TWO)
    assert one.losses(SURE[1])[0] == pytest.approx(1.0, rel=1e-6)
    assert one.losses(SURE[0])[0] < 0.9
    agrees(inject(material, TWO, **LAYOUTS[layout]), one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_a_committee_of_which_one_has_a_window(material, layout):
    """The mixture's confidence, measured where the states of both are there."""
    recipe = TWO.replace("teacher: coder", "teacher: {{plain: 1, coder: 1}}")
    one = inject(material, recipe)
    assert "code: weighted by the teacher's confidence[label], its mean" in one.output
    assert 0 < one.losses(SURE[1])[1] < 0.95
    agrees(inject(material, recipe, **LAYOUTS[layout]), one)
