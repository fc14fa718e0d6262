"""Teachers that all stages of a pipeline run before the step, through the real ``pretrain()``.

The harness's script counts the passes of each rank. A ratio that is given stands for what the first
steps would measure: the larger it is, the more even the shares.
"""

import json
from pathlib import Path

import pytest

from megatron_moe_inject.host.torch_dist import stored_shapes
from tests.harness import lane
from tests.harness.injection import (
    LAYOUTS,
    OTHER,
    PROVEN,
    RECIPE,
    assert_clean_end,
    inject,
    recipe_file,
)
from tests.harness.material import make_material, student_flags

SPREAD_GPT = (str(lane.HARNESS / "spread_gpt.py"),)
COMMITTEE = """
domains:
  - name: code
    data: [1]
    teacher: {{coder: 0.7, second: 0.3}}
    experts: {{layers: {{0: [1], 2: [3], 3: [3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}", ranks: pipeline}}
  second: {{source: "megatron:{teacher}", ranks: pipeline}}
objective: {{alpha: 0.7, beta: 0.3, confidence: label}}
imitation: {{hidden: 0.5}}
train: {{router: true}}
steering: {{coeff: 0.5, target_mass: 0.8, confidence: label}}
"""
ALONE = RECIPE.replace('"}}', '", ranks: pipeline}}')
TERMS = ("lm loss", "kd loss", "imitation loss", "steering loss", "total loss", "grad norm")
PLAIN = ("lm loss", "kd loss", "total loss", "grad norm")
RESETS = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
EVEN, ALL_ON_THE_LAST = "inf", "0.01"


def train(material, recipe=COMMITTEE, *extra, ratio=None, nproc=2, pp=2, load=None, **layout):
    """A run, and by rank what teachers read there."""
    env = {} if ratio is None else {"TESTS_RATIO": ratio}
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags(*ours, *extra, pp=pp, **layout)
    if load is not None:
        flags = student_flags(*material.blend, *ours, "--load", load, *extra, pp=pp, **layout)
    run = lane.run(flags, nproc=nproc, script=SPREAD_GPT, env=env)
    assert PROVEN.search(run.output)
    lines = [x.partition(": ")[2] for x in run.output.splitlines() if x.startswith("teachers: ")]
    return run, sorted((json.loads(line) for line in lines), key=lambda read: read["rank"])


def passes(read, name="coder"):
    """By rank, the sizes of a teacher's passes before each step."""
    return [[step.get(name, []) for step in rank["before"]] for rank in read]


def sequences(read, name="coder"):
    """By rank, how many a teacher read before each step."""
    return [[sum(step) for step in rank] for rank in passes(read, name)]


def agrees(run, expected, terms=TERMS):
    for term in terms:
        assert run.losses(term) == pytest.approx(expected.losses(term), rel=2e-5, abs=1e-6), term


@pytest.fixture(scope="module")
def single(material):
    return inject(material, COMMITTEE)


@pytest.fixture(scope="module")
def even(material):
    return train(material, ratio=EVEN)


def test_two_stages_share_a_committee_and_give_what_one_process_gives(single, even):
    """The passes of both teachers, of which imitation and steering know on either stage."""
    run, read = even
    agrees(run, single)
    by_teacher = [sequences(read, name) for name in ("coder", "second")]
    for first, last in by_teacher:
        assert len(first) == 4
        assert all(a > 0 and b > 0 for a, b in zip(first, last, strict=True))
    coder, second = ([a + b for a, b in zip(*of_ranks, strict=True)] for of_ranks in by_teacher)
    assert coder == second


@pytest.mark.parametrize("ratio", [ALL_ON_THE_LAST, None])
def test_who_runs_a_pass_changes_no_bit(material, even, ratio):
    """None: what is measured before the third step."""
    run, read = train(material, ratio=ratio)
    lane.same_runs(run, even[0])
    if ratio == ALL_ON_THE_LAST:
        assert not any(sequences(read)[0])
    ours, theirs = (
        [sorted(first + last) for first, last in zip(*passes(ranks), strict=True)]
        for ranks in (read, even[1])
    )
    assert ours == theirs


def test_the_last_stage_alone_gives_the_same(material, single, even):
    run, read = train(material, COMMITTEE.replace("pipeline", "last"))
    agrees(run, single)
    agrees(run, even[0])
    assert not any(sequences(read)[0])
    assert all(sequences(read)[1])


def test_a_run_goes_on_bitwise_with_other_shares(material, even, tmp_path):
    keep = ("--save", str(tmp_path), "--save-interval", "2")
    train(material, COMMITTEE, *keep, "--exit-interval", "2", ratio=EVEN)
    resumed, _ = train(
        material, COMMITTEE, *keep, "--train-iters", "4", ratio=ALL_ON_THE_LAST, load=str(tmp_path)
    )
    assert [step["iteration"] for step in resumed.iterations] == [3, 4]
    for term in TERMS:
        assert resumed.losses(term) == even[0].losses(term)[2:], term


def test_steps_without_a_sample_and_with_fewer_than_stages(material):
    """A blend of which a fiftieth is the domain."""
    few = ("--data-path", "0.98", material.general, "0.02", material.domain)
    longer = (*few, "--train-iters", "8")
    one = inject(material, extra=longer)
    run, read = train(material, ALONE, *longer, ratio=EVEN)
    numbers = {a + b for a, b in zip(*sequences(read), strict=True)}
    assert {0, 1} <= numbers
    agrees(run, one, ("lm loss", "total loss", "grad norm"))


def test_a_window_is_shared_in_its_first_micro_batches(material):
    """Those behind run inside the schedule, where the last stage is alone."""
    run, read = train(material, ALONE.replace("pipeline", "pipeline, window: 1"), ratio=EVEN)
    agrees(run, inject(material), PLAIN)
    assert sum(sequences(read)[0]) > 0
    otherwise = [rank["else"].get("coder", 0) for rank in read]
    assert otherwise[0] < otherwise[1]


def test_positions_and_masks_of_documents_travel(material):
    run, read = train(material, RECIPE, *RESETS, ratio=EVEN)
    agrees(run, inject(material, extra=RESETS), PLAIN)
    assert all(all(own) for own in sequences(read))


def test_a_stage_that_helps_draws_its_own_random_numbers_and_saves_no_teacher(material, tmp_path):
    """With dropout; the projections are the student's."""
    runs, stored = [], []
    for ranks in ("pipeline", "last"):
        folder = tmp_path / ranks
        keep = ("--save", str(folder), "--save-interval", "100", "--hidden-dropout", "0.1")
        runs.append(train(material, COMMITTEE.replace("pipeline", ranks), *keep, ratio=EVEN)[0])
        stored.append(stored_shapes(folder / "iter_0000004"))
    agrees(*runs)
    assert stored[0] == stored[1]
    known = stored_shapes(next(Path(material.student).glob("iter_*")))
    assert known.keys() < stored[0].keys()
    added = stored[0].keys() - known.keys()
    assert all(name.startswith("inject_projections.") for name in added), added


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_megatron_shares_alike(tmp_path):
    there = make_material(tmp_path, [OTHER])
    one, two = (
        inject(there, COMMITTEE, path=[OTHER], **layout) for layout in (dict(), dict(nproc=2, pp=2))
    )
    assert "every rank of all 2 stages" in two.output
    agrees(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [EVEN, None])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LAYOUTS["pp2-vpp2"], id="pp2-vpp2"),
        pytest.param(LAYOUTS["pp4"], id="pp4"),
        pytest.param(LAYOUTS["tp2-pp2"], id="tp2-pp2"),
        pytest.param(dict(nproc=4, pp=2, cp=2, extra=()), id="pp2-cp2"),
        pytest.param(dict(nproc=4, pp=2, ep=2, extra=()), id="pp2-ep2"),
    ],
)
def test_more_layouts(material, single, layout, ratio):
    sizes = dict(layout)
    run, read = train(material, COMMITTEE, *sizes.pop("extra"), ratio=ratio, **sizes)
    agrees(run, single)
    assert len(read) == sizes["nproc"]
    assert sum(any(own) for own in sequences(read)) > 1


def test_the_plan_says_where_a_teacher_is_held_and_why(material, even, single):
    assert "every rank of all 2 stages, as the recipe says" in even[0].output
    assert "teachers.coder.ranks: pipeline: there is one stage" in single.output
    dry = ("--inject-dry-run",)
    run = inject(material, nproc=2, pp=2, extra=dry)
    assert "every rank of all 2 stages, since memory of the host is not counted" in run.output
    run = inject(material, RECIPE.replace('"}}', '", window: 2}}'), nproc=2, pp=2, extra=dry)
    assert "every rank of the last stage, since its window runs inside the sch" in run.output


def test_another_word_is_an_error(material):
    recipe = RECIPE.replace('"}}', '", ranks: first}}')
    run = inject(material, recipe, nproc=2, pp=2, check=False)
    assert_clean_end(run, ["teachers.coder.ranks", "first", "auto", "last", "pipeline"])
