"""What belongs to a checkpoint goes where it goes, and is never taken for another's.

One recipe with every retention runs whole, and in parts: saved in other folders, copied, and beside
what other injections left.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.evaluation.report.run_file import Step, read_run
from tests.harness import lane
from tests.harness.checkpoints import TRACKER
from tests.harness.injection import RECIPE, assert_clean_end, inject, recipe_file
from tests.harness.material import EVALUATES, student_flags
from tests.harness.training_recipes import EVERYTHING

HELD = (
    EVERYTHING + "retention: {{experts: 1.0, l2: 0.05}}\n"
    "steering: {{retention: 1.0}}\nevaluation: {{}}\n"
)
KEEP = ("--train-iters", "6", "--save-interval", "2", "--eval-interval", "2", "--log-interval", "1")
KEEP += EVALUATES
TERMS = ("lm loss", "kd loss", "total loss", "grad norm", "retention loss", "expert retention")
TERMS += ("l2 to start", "router retention")


def go_on(material, *extra, load, save=None, recipe=HELD, check=True, nproc=1, **layout):
    """A run that goes on from a checkpoint."""
    ours = ("--inject-recipe", recipe_file(material, recipe), "--load", str(load))
    keep = () if save is None else ("--save", str(save))
    flags = student_flags(*material.blend, *ours, *KEEP, *keep, *extra, **layout)
    return lane.run(flags, check=check, nproc=nproc)


def same(run, whole, first):
    numbers = [step["iteration"] for step in run.iterations]
    assert numbers
    assert numbers == [*range(first + 1, first + 1 + len(numbers))]
    # After a resume Megatron's second line repeats the first's sums, as after a beginning.
    for number, step in enumerate(run.iterations):
        for term in TERMS if number != 1 else ("lm loss", "grad norm"):
            assert step[term] == whole.iterations[first + number][term], (number, term)


def losses(folder):
    found = read_list(Path(folder, "inject_evaluation.jsonl"))
    return [
        (e.provenance.iteration, e.classes["code"].mean("loss"), e.classes["general"].mean("loss"))
        for e in found
    ]


def measured_at(folder):
    return [iteration for iteration, *_ in losses(folder)]


@pytest.fixture(scope="module")
def whole(material):
    save = material.folder / "whole"
    run = inject(material, HELD, extra=(*KEEP, "--save", str(save)))
    assert measured_at(save) == [0, 2, 4, 6]
    return run, save


@pytest.fixture(scope="module")
def moved(material):
    """To 2 in A, on to 4 in B, whose only copy of the state is then what it wrote there."""
    a, b = material.folder / "A", material.folder / "B"
    inject(material, HELD, extra=(*KEEP, "--exit-interval", "2", "--save", str(a)))
    run = go_on(material, "--exit-interval", "4", load=a, save=b)
    return run, a, b


def test_a_run_that_goes_on_in_another_folder_is_the_whole_run(material, whole, moved, tmp_path):
    run, a, b = moved
    same(run, whole[0], 2)
    away, c = tmp_path / "away", tmp_path / "C"
    a.rename(away)
    shutil.copytree(b, c)
    last = go_on(material, load=c, save=c)
    away.rename(a)
    same(last, whole[0], 4)
    assert losses(c) == losses(whole[1])
    steps = [line.iteration for line in read_run(c / "inject_run.jsonl") if isinstance(line, Step)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "teacher gate" not in last.output


def test_a_checkpoint_that_was_copied_alone_finds_its_state_or_says_where_it_was(
    material, whole, moved, tmp_path
):
    _, _, b = moved
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(b / "iter_0000004", alone / "iter_0000004")
    (alone / "latest_checkpointed_iteration.txt").write_text("4")
    run = go_on(material, "--exit-interval", "5", load=alone, save=tmp_path / "D")
    same(run, whole[0], 4)
    assert measured_at(tmp_path / "D")[:3] == [0, 2, 4]
    assert losses(tmp_path / "D")[:2] == losses(whole[1])[:2]

    b.rename(tmp_path / "B")
    lost = go_on(material, load=alone, save=tmp_path / "E", check=False)
    (tmp_path / "B").rename(b)
    found = (str(alone), f"last kept as {b / 'inject_original'}", "copy inject_original of that")
    assert_clean_end(lost, ("retention: the original parameters", *found, "--finetune"))


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_wrote(material, whole, moved, tmp_path):
    run = go_on(
        *(material, "--no-load-optim", "--no-load-rng", "--exit-interval", "5"),
        **dict(load=moved[2], save=tmp_path, nproc=2, pp=2),
    )
    for term in ("lm loss", "kd loss", "retention loss", "router retention"):
        assert run.losses(term)[0] == pytest.approx(whole[0].losses(term)[4], rel=2e-5), term


def test_another_injection_neither_takes_nor_destroys_what_it_finds(
    material, whole, moved, tmp_path
):
    """A new one in the same folder, which does not say any more that it has checkpoints; then the
    old one goes on from its checkpoint there."""
    b = tmp_path / "B"
    shutil.copytree(moved[2], b)
    before = losses(b)
    assert measured_at(b) == [0, 2, 4]
    over = inject(material, HELD, extra=(*KEEP, "--save", str(b)), check=False)
    assert_clean_end(over, (f"--save: '{b}' holds iteration", "of another injection", "--load"))
    assert losses(b) == before
    (b / TRACKER).unlink()
    new = inject(material, HELD, extra=(*KEEP, "--exit-interval", "2", "--save", str(b)))
    assert new.losses("retention loss")[0] == pytest.approx(0, abs=1e-6)
    assert "belongs to another injection, whose checkpoints may need it, and is now" in new.output
    assert measured_at(b) == [0, 2]
    step = ("--ckpt-step", "4", "--exit-interval", "5")
    run = go_on(material, *step, load=b, save=tmp_path / "C")
    same(run, whole[0], 4)
    assert losses(tmp_path / "C")[: len(before)] == before
    run = go_on(material, *step, load=b, save=b)
    same(run, whole[0], 4)
    assert losses(b)[: len(before)] == before
    assert len(list(b.glob("inject_original*"))) == 2


def test_what_an_earlier_attempt_left_is_not_the_original_of_another(material, tmp_path, moved):
    """Stock training went on beside it, and an injection then begins from there."""
    save = tmp_path / "save"
    shutil.copytree(material.student, save)
    shutil.copytree(moved[2] / "inject_original", save / "inject_original")
    run = go_on(material, "--no-load-optim", "--exit-interval", "5", load=save, save=save)
    assert run.losses("retention loss")[0] == pytest.approx(0, abs=1e-6)
    assert "is of no injection, so the original is the model as loaded" in run.output
    assert run.losses("l2 to start")[0] == 0


def test_a_checkpoint_of_an_earlier_version_takes_what_lies_beside_it(material, whole, tmp_path):
    """It has no identity, and neither has what lies beside it."""
    a, c = tmp_path / "A", tmp_path / "C"
    extra = (*KEEP, "--exit-interval", "2", "--save", str(a))
    inject(material, HELD, extra=extra, env={"TESTS_BEFORE_IDENTITIES": "1"})
    card = a / "inject_original" / "trains.json"
    card.write_text(json.dumps(json.loads(card.read_text())["trains"]))
    run = go_on(material, "--exit-interval", "3", load=a, save=c)
    same(run, whole[0], 2)
    assert "gave injections no identity" in run.output
    assert measured_at(a) == measured_at(c)[:2] == [0, 2]
    assert losses(c)[:2] == losses(a)
    shutil.rmtree(c / "inject_original")
    shutil.rmtree(a / "inject_original")
    lost = go_on(material, load=c, save=tmp_path / "D", check=False)
    assert_clean_end(lost, ("retention: the original parameters", str(c), "--finetune"))


MEASURED = RECIPE + "evaluation: {{}}\n"


@pytest.fixture(scope="module")
def ignorant(material):
    """A dense model that has hardly begun, as a teacher of code."""
    folder = str(material.folder / "hardly")
    flags = [f for f in lane.dense() if f != "--mock-data"]
    sizes = "--hidden-size 48 --ffn-hidden-size 64 --vocab-size 61 --make-vocab-size-divisible-by 8"
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "20")
    data += (*lane.ONE_BATCH, "--eval-iters", "0")
    lane.run(
        [*flags, *sizes.split(), *data, "--lr", "1e-2", "--save", folder, "--save-interval", "100"]
    )
    return f"teachers.coder.source=megatron:{folder}"


def test_what_the_gate_refused_it_refuses_again(material, ignorant, tmp_path):
    """A run that counts on from an iteration above 0; the second try finds the first one's list."""
    for _ in range(2):
        run = go_on(
            *(material, "--no-load-optim", "--inject-set", ignorant),
            **dict(load=material.student, save=tmp_path, recipe=MEASURED, check=False),
        )
        assert_clean_end(run, ("does not predict its domain better than its student",))
        assert measured_at(tmp_path) == [3]


def test_another_teacher_of_a_run_that_goes_on_is_asked(material, ignorant, tmp_path):
    save = tmp_path / "A"
    inject(material, MEASURED, extra=(*KEEP, "--exit-interval", "2", "--save", str(save)))
    same_teacher = go_on(
        *(material, "--exit-interval", "4"), **dict(load=save, save=save, recipe=MEASURED)
    )
    assert "teacher gate" not in same_teacher.output
    for _ in range(2):
        other = go_on(
            *(material, "--inject-set", ignorant),
            **dict(load=save, save=tmp_path / "B", recipe=MEASURED, check=False),
        )
        assert_clean_end(other, ("of the student as its injection began", "coder"))
        assert "recipe differs from that of iteration 4 in teachers.coder.source\n" in other.output


def test_what_fails_at_the_end_costs_no_checkpoint(material, tmp_path):
    """One message, on every rank the same end, and everything that failed is in it."""
    for leave in ((), ("--exit-interval", "3")):
        folder = tmp_path / "profiles"
        folder.mkdir(exist_ok=True)
        save = tmp_path / f"save{len(leave)}"
        extra = ("--save", str(save), "--save-interval", "100", "--train-iters", "4", *leave)
        run = inject(
            *(material, RECIPE),
            extra=(*extra, "--inject-profile", str(folder / "p.json")),
            env={"TESTS_FAIL_AT_THE_END": str(folder)},
            **dict(nproc=2, ep=2, check=False),
        )
        assert run.returncode == 2, run.tail()
        assert "Traceback" not in run.output
        message = [x for x in run.output.splitlines() if x.startswith("megatron_moe_inject: ")]
        assert len(message) == 1
        assert "--inject-profile: " in message[0]
        assert "frozen tensors changed during training on ranks [1]" in message[0]
        assert f"what was trained is saved in {save}" in message[0]
        last = 3 if leave else 4
        assert (save / f"iter_{last:07d}").is_dir()
        assert len(run.iterations) == last


@pytest.mark.parametrize("which", ["profile", "evaluation", "run"])
def test_outputs_are_tried_before_anything_is_built(material, tmp_path, which):
    extra = ["--save", str(tmp_path / "save"), "--save-interval", "100", *EVALUATES]
    taken = tmp_path / "save" / "inject_run.jsonl"
    if which == "profile":
        taken = tmp_path / "p.json"
        extra += ["--inject-profile", str(taken)]
    if which == "evaluation":
        taken = tmp_path / "e.jsonl"
        extra += ["--inject-set", f"evaluation.file={taken}"]
    taken.mkdir(parents=True)
    run = inject(material, MEASURED, nproc=2, ep=2, extra=extra, check=False)
    assert_clean_end(run, (str(taken), "cannot be written (Is a directory)"))
    assert "number of parameters on" not in run.output
