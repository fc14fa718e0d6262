"""Several validation sets: each sample counts once, as it does where one blend holds them all."""

from pathlib import Path

import pytest

from megatron_moe_inject.evaluation.evaluation_file import read_evaluation, read_list
from tests.harness import lane
from tests.harness.corpus import write_corpora
from tests.harness.evaluating import GAMMA, assert_same
from tests.harness.injection import LAYOUTS, OTHER, RECIPE, assert_clean_end, recipe_file
from tests.harness.material import EVALUATES, make_material, student_flags

SETS = ("--full-validation", "--multiple-validation-sets", "--validation-set-names", "en", "py")
SAMPLES = 28
"""Of each set: three batches of 8, and one that has to be filled up."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("held_out"), documents=3)


def flags(material, held_out, *extra, **layout):
    start = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
    data = ("--train-data-path", *material.blend[1:5], "--valid-data-path", *held_out)
    return student_flags(*data, *start, *EVALUATES, *extra, **layout)


def train(material, folder, held_out, *extra, recipe=GAMMA, nproc=1, path=(), check=True, **layout):
    """A run of two iterations that measures before and after them, and its list."""
    ours = ("--inject-recipe", recipe_file(material, recipe), "--save", str(folder))
    steps = ("--train-iters", "2", "--eval-interval", "2", "--save-interval", "100")
    given = flags(material, held_out, *ours, *steps, *extra, **layout)
    run = lane.run(given, nproc=nproc, pythonpath=path, check=check)
    listed = Path(folder, "inject_evaluation.jsonl")
    return run, read_list(listed) if listed.exists() else []


@pytest.fixture(scope="module")
def blended(material, held_out, tmp_path_factory):
    """One blend of both, read whole."""
    whole = ("--eval-iters", str(2 * SAMPLES // 8))
    return train(material, tmp_path_factory.mktemp("blended"), held_out, *whole)


def assert_sets(found, blended):
    (run, lines), (reference, expected) = found, blended
    assert [line.provenance.iteration for line in lines] == [0, 2]
    for ours, theirs in zip(lines, expected, strict=True):
        assert_same(ours, theirs)
        assert ours.provenance.evaluated_batches == 8
        assert all(len(known.sequences) == SAMPLES for known in ours.classes.values())
    # Before, between and after training: general text, then code.
    general, code = run.evaluations[:6:2], run.evaluations[1:6:2]
    for en, py, both in zip(general, code, reference.evaluations, strict=True):
        assert "lm loss/code" not in en
        assert "lm loss/general" not in py
        assert "retention loss" not in py
        for name, value in both.items():
            if name.endswith("/general") or name == "retention loss":
                assert en[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            if name.endswith("/code") or name == "kd loss":
                assert py[name] == pytest.approx(value, rel=1e-4), name
    for name, of_class in (("en", "general"), ("py", "code")):
        line = f" validation-{name} loss at iteration 2 | "
        assert run.output.count(line) == 2  # Megatron's, and our terms without a perplexity
        assert f"{line}accuracy/{of_class} value: " in run.output


def test_ranks_with_unequal_shares_of_a_set(material, held_out, blended, tmp_path):
    layout = dict(nproc=2, ep=2)
    assert_sets(train(material, tmp_path, held_out, *SETS, **layout), blended)


def test_virtual_stages_and_test_data(material, held_out, blended, tmp_path):
    """With neither of which Megatron itself evaluates several sets."""
    options = dict(LAYOUTS["pp2-vpp2"])
    more = (*SETS, *options.pop("extra"), "--test-data-path", material.domain, "--eval-iters", "2")
    found = train(material, tmp_path, held_out, *more, **options)
    assert_sets(found, blended)
    run, _ = found
    assert len(run.evaluations) == 7
    assert " validation loss at iteration 2 on test set | " in run.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-sp", "cp2", "pp4"])
def test_more_layouts(material, held_out, blended, tmp_path, name):
    options = dict(LAYOUTS[name])
    more = (*SETS, *options.pop("extra"))
    assert_sets(train(material, tmp_path, held_out, *more, **options), blended)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron(tmp_path, held_out, blended):
    material = make_material(tmp_path, [OTHER])
    found = train(material, tmp_path / "run", held_out, *SETS, nproc=2, ep=2, path=[OTHER])
    assert_sets(found, blended)


def test_without_a_measurement_they_are_megatrons(material, held_out, tmp_path):
    """Where Megatron reads each sample once, and no id is padding, its losses are the same."""
    one = ("--eval-micro-batch-size", "1", "--eval-global-batch-size", "2")
    given = (*SETS, *one, "--train-iters", "1")
    alone = "domains: [{{name: code, data: [1]}}]\nobjective: {{alpha: 0, beta: 1}}\n"
    recipe = recipe_file(material, alone + "train: {{experts: all}}\n")
    given = flags(material, held_out, *given, "--lr", "0", "--vocab-size", "64")
    stock = lane.run(given, nproc=2, env={"STOCK_MEGATRON": "1"}, fresh=True)
    ours = lane.run([*given, "--inject-recipe", recipe], nproc=2)
    totals = [found["total loss"] for found in ours.evaluations]
    expected = [found["lm loss"] for found in stock.evaluations]
    assert totals == pytest.approx(expected, rel=1e-6)
    classes = zip(ours.evaluations, ("general", "code"), strict=True)
    by_class = [found[f"lm loss/{name}"] for found, name in classes]
    assert by_class == pytest.approx(expected, rel=1e-6)


def test_alone_it_finds_the_same(material, held_out, blended, tmp_path):
    path = tmp_path / "e.json"
    ours = ("--inject-recipe", recipe_file(material, RECIPE), "--inject-evaluate", str(path))
    lane.run(flags(material, held_out, *ours, *SETS, "--skip-train", pp=2), nproc=2)
    first = blended[1][0]
    found = read_evaluation(path)
    assert found.text() == first.text()
    assert found.classes["code"].mean("teacher_loss") == pytest.approx(
        first.classes["code"].mean("teacher_loss"), rel=1e-6
    )


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (("--full-validation",), ("--full-validation: ", "add --multiple-validation-sets")),
        (("--multiple-validation-sets",), ("--multiple-validation-sets: ", "--full-validation")),
        (
            (*SETS, "--valid-data-path", "1", "x", "1", "y"),
            ("without a weight", "--valid-data-path"),
        ),
    ],
    ids=str,
)
def test_mistakes(material, held_out, tmp_path, given, fragments):
    run, _ = train(material, tmp_path, held_out, *given, check=False, nproc=2, ep=2)
    assert_clean_end(run, fragments)
