"""Running means of teacher confidence: their definition, where they are kept, what they weigh."""

from argparse import Namespace

import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.losses import Dense, Mixed, Sparse, Vocabulary
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.run_part import RunContext
from megatron_moe_inject.routing import part
from megatron_moe_inject.routing.part import KEPT, SteeringPart
from megatron_moe_inject.routing.section import weighed_by_mean, weighed_by_token
from megatron_moe_inject.teachers.confidence import LATEST, RunningConfidence

GENERAL = -1
NAMES = {0: "code", 2: "prose"}
WEIGHTS = TermWeights(1.0, 0.0)
VOCABULARY = 7


def teacher(samples, seed=0):
    """A group of samples with states ``[k, 5, 4]`` of a teacher with a head ``[8, 4]``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(samples), 5, 4, generator=generator)
    return SampleGroup(samples, WEIGHTS, Dense(hidden, torch.randn(8, 4, generator=generator)))


def labels(samples):
    return torch.randint(0, VOCABULARY, (samples, 5), generator=torch.Generator().manual_seed(9))


def probs(group):
    return (group.target.hidden @ group.target.head[:VOCABULARY].t()).softmax(-1)


def measured(running, iteration, parts):
    running.begin(iteration)
    for groups, own, domains in parts:
        running.add(groups, own, domains, Vocabulary(None, VOCABULARY))
    running.end(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["label", "top"])
def test_a_step_gives_the_mean_over_its_tokens_by_domain(kind):
    """Two micro-batches; general samples and domains that are not watched do not count."""
    running = RunningConfidence(kind, NAMES)
    group, other = teacher([0, 2]), teacher([1], seed=1)
    own = labels(3)
    rest = SampleGroup([1], WEIGHTS)
    measured(
        running,
        0,
        [([group, rest], own, [0, GENERAL, 2]), ([teacher([0, 2]), other], own, [0, 1, 0])],
    )
    assert running.means == {0: 1.0, 2: 1.0}
    p = probs(group)
    sure = p.amax(-1) if kind == "top" else p.gather(-1, own[[0, 2]].unsqueeze(-1)).squeeze(-1)
    running.begin(1)
    expected = {0: (2 * sure[0].mean() + sure[1].mean()) / 3, 2: sure[1].mean()}
    for index, value in expected.items():
        assert running.means[index] == pytest.approx(value.item(), rel=1e-5)


def test_tokens_that_the_loss_mask_leaves_out_do_not_count():
    running, group, own = RunningConfidence("top", {0: "code"}), teacher([0, 1]), labels(2)
    mask = torch.tensor([[1.0, 0, 0, 1, 0], [0.0, 0, 0, 0, 0]])
    running.begin(0)
    running.add([group], own, [0, 0], Vocabulary(None, VOCABULARY), loss_mask=mask)
    running.end(torch.device("cpu"))
    expected = probs(group).amax(-1)[0, [0, 3]].mean()
    assert running.state["code"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_committees_mixture_is_measured():
    first, second = teacher([0]), teacher([0], seed=3)
    mixed = SampleGroup([0], WEIGHTS, Mixed((first.target, second.target), (0.25, 0.75)))
    running = RunningConfidence("top", {0: "code"})
    measured(running, 0, [([mixed], labels(1), [0])])
    expected = (0.25 * probs(first) + 0.75 * probs(second)).amax(-1).mean()
    assert running.state == {"code": [pytest.approx(expected.item(), rel=1e-5), 1]}


@pytest.mark.parametrize("kind", ["label", "top"])
def test_stored_ids_tell_how_sure_a_teacher_is(kind):
    """All of them as its whole distribution does; a label that is not stored counts 0."""
    group, own = teacher([0]), labels(1)
    p, ids = probs(group), torch.arange(VOCABULARY).expand(1, 5, -1)
    known = p[..., :3] if kind == "label" else p
    for k, expected in ((VOCABULARY, p), (3, known)):
        stored = SampleGroup([0], WEIGHTS, Sparse(ids[..., :k], p[..., :k].log()))
        running = RunningConfidence(kind, {0: "code"})
        measured(running, 0, [([stored], own, [0])])
        if kind == "top":
            sure = expected[..., :k].amax(-1)
        else:
            sure = torch.where(own < k, p.gather(-1, own[..., None]).squeeze(-1), 0.0)
        assert running.state["code"][0] == pytest.approx(sure.mean().item(), rel=1e-5)


def step(running, iteration, value):
    """A step whose tokens have the confidence ``value``; ``None``: it has none of the domain."""
    running.begin(iteration)
    if value is not None:
        running._sums = torch.tensor([[value * 10, 10.0]], dtype=torch.float64)
    running.end(torch.device("cpu"))


def test_steps_weigh_alike_first_and_later_ones_fade():
    running = RunningConfidence("label", {0: "code"})
    for iteration, value in enumerate((0.2, None, 0.4, 0.9)):
        step(running, iteration, value)
    assert running.state == {"code": [pytest.approx(0.5), 3]}
    running = RunningConfidence("label", {0: "code"}, {"code": [0.5, 400]})
    step(running, 400, 1.0)
    assert running.state["code"] == [pytest.approx(0.5 + LATEST * 0.5), 401]


def test_a_step_that_runs_again_or_an_evaluation_after_it_uses_the_same_mean():
    running = RunningConfidence("label", {0: "code"})
    step(running, 0, 0.2)
    step(running, 0, 0.2)
    assert running.means == {0: 1.0}
    assert running.state == {"code": [0.2, 1]}
    running.begin(0)
    assert running.means == {0: 1.0}
    running.begin(1)
    assert running.means == {0: 0.2}


RECIPE = """
domains:
  - {name: code, data: [0], teacher: coder, experts: {layers: {1: [0]}}}
  - {name: prose, data: [1], teacher: {coder: 1, plain: 1}, experts: {layers: {1: [1]}}}
  - {name: poems, data: [2], teacher: plain, experts: {layers: {1: [2]}}}
teachers:
  coder: {source: "hf:/coder"}
  plain: {source: "hf:/plain", window: 2}
train: {router: true}
steering: {coeff: 0.1, confidence: label}
"""


def test_one_windowed_teacher_leaves_a_domain_its_mean():
    recipe = recipe_from_yaml(RECIPE)
    assert weighed_by_token(recipe) == ["code"]
    assert weighed_by_mean(recipe) == ["prose", "poems"]
    shown = render_plan(Plan(recipe))
    assert "code: weighted by the teacher's confidence[label], of each token" in shown
    assert "prose and poems: weighted by the teacher's confidence[label], its mean over" in shown
    off = recipe_from_yaml(RECIPE.replace("coeff: 0.1", "coeff: 0.0"))
    assert not weighed_by_token(off) + weighed_by_mean(off)
    where = recipe_from_yaml(RECIPE.replace("confidence: label", "confidence: top, layers: [1]"))
    assert weighed_by_mean(where) == ["prose", "poems"]


def test_a_mean_that_can_change_nothing_is_remarked():
    remark = "leaves all its tokens one weight, which changes nothing"
    assert remark not in render_plan(Plan(recipe_from_yaml(RECIPE)))
    alone = RECIPE.replace("router: true", "router: true, experts: none")
    for expert in (0, 1):
        alone = alone.replace(f", experts: {{layers: {{1: [{expert}]}}}}", "")
    assert remark in render_plan(Plan(recipe_from_yaml(alone)))


def begun(monkeypatch, stored, folder="/saved/iter_0000003", recipe=RECIPE):
    """A set-up that goes on from ``stored``, and Megatron's arguments."""
    monkeypatch.setattr(part, "stored_argument", lambda args, name: (folder, stored))
    facts = StudentFacts(2, num_moe_experts=4, moe_layers=(0, 1))
    args = Namespace(inject_dry_run=None, micro_batch_size=1, load=None)
    run = RunContext("injection", recipe_from_yaml(recipe), args, facts, 8, {"train": []})
    SteeringPart(run).prepare()
    return run, args


def test_means_are_kept_in_megatrons_arguments(monkeypatch):
    stored = {"kind": "label", "means": {"prose": [0.25, 7], "poems": [0.5, 9]}}
    run, args = begun(monkeypatch, stored)
    assert getattr(args, KEPT) == stored
    assert run.need(RunningConfidence).means == {1: 0.25, 2: 0.5}
    assert not run.warnings
    run.need(RunningConfidence).begin(7)
    run.need(RunningConfidence).end(torch.device("cpu"))
    assert getattr(args, KEPT) == stored


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        (None, "prose and poems"),
        ({"kind": "top", "means": {"prose": [0.25, 7], "poems": [0.5, 9]}}, "prose and poems"),
        ({"kind": "label", "means": {"poems": [0.5, 9]}}, "prose"),
    ],
)
def test_what_a_checkpoint_lacks_begins_anew_and_is_said(monkeypatch, stored, named):
    run, _ = begun(monkeypatch, stored)
    (remark,) = run.warnings
    assert f"iter_0000003 holds no mean label confidence in {named}, which begins" in remark
    assert run.need(RunningConfidence).means[1] == 1.0


def test_a_new_run_and_one_without_windows_say_nothing(monkeypatch):
    assert not begun(monkeypatch, None, folder=None)[0].warnings
    run, args = begun(monkeypatch, None, recipe=RECIPE.replace(", window: 2", ""))
    assert run.get(RunningConfidence) is None
    assert not hasattr(args, KEPT)


@pytest.mark.parametrize("damage", [[], ["x", 1], [float("nan"), 1], [0.5, -1], None])
def test_damaged_means_are_an_error(monkeypatch, damage):
    stored = {"kind": "label", "means": {"prose": damage, "poems": [0.5, 9]}}
    with pytest.raises(RecipeError, match="iter_0000003 holds damaged means of it"):
        begun(monkeypatch, stored)
