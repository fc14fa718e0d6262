"""Before and after side by side, and the teacher gate."""

from dataclasses import replace

import pytest

from megatron_moe_inject import cli
from megatron_moe_inject.evaluation.comparison import compare, lead_taken_over
from megatron_moe_inject.evaluation.evaluation_file import write_evaluation
from megatron_moe_inject.evaluation.gate import teacher_gate
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.recipe.schema import Domain
from tests.harness.evaluations import evaluation, with_pairs

NAMES = ("before.json", "after.json")
BEFORE = evaluation({"loss": 3.0, "teacher": 1.0, "length": 100}, {"original": 0.0, "length": 90})
AFTER = evaluation(
    {"loss": 2.5, "teacher": 1.0, "length": 100},
    {"loss": 3.1, "original": 0.02, "length": 90},
    iteration=100,
)


def cells(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_table():
    header, rule, *rows = cells(compare(BEFORE, AFTER, NAMES))
    assert header[:5] == ["class", "", "before", "after", "teacher"]
    assert set("".join(rule)) == {"-", ":"}
    shown, name = {}, ""
    for row in rows:
        name = row[0] or name
        shown[name, row[1]] = row[2:]
    loss = shown["code", "loss"]
    values = [float(value) for value in loss[:3]]
    assert values[1] - values[0] == pytest.approx(-0.5, abs=2e-4)
    assert loss[3] == "-0.5000 [-0.5000, -0.5000]"  # each sequence gained as much
    assert loss[4] == "25 %"
    assert shown["general", "loss"][3].startswith("+0.1000 [")
    assert shown["general", "loss"][2] == shown["general", "loss"][4] == ""
    assert shown["general", "KL to the original"][:2] == ["0.0000", "0.0200"]
    bits = [float(value) for value in shown["code", "bits per byte"][:3]]
    assert bits[0] == pytest.approx(values[0] * 32 / 100 / 0.693147, rel=1e-3)
    assert bits[2] == pytest.approx(values[2] * 32 / 100 / 0.693147, rel=1e-3)
    assert ("general", "KL to the teacher") not in shown
    text = compare(BEFORE, AFTER, NAMES)
    assert "Before: before.json (iteration 0" in text
    assert "After: after.json (iteration 100" in text
    assert "No bits per byte" not in text


def pair_rows(text):
    rows = cells(text)[2:]
    begin = next(i for i, row in enumerate(rows) if row[0] == "pairs")
    return {row[1]: row[2:] for row in rows[begin:]}


@pytest.mark.parametrize("sides", [("original", "original"), (None, "original"), (None, None)])
def test_pairs_of_answers(sides):
    """Against the reference of the two files, of either, or else the student before."""
    before, after = (
        with_pairs(side, gain, against)
        for side, gain, against in zip((BEFORE, AFTER), (0.0, 0.4), sides, strict=True)
    )
    text = compare(before, after, NAMES)
    rows = pair_rows(text)
    assert rows["loss"][:2] == ["0.6931", "0.5981"]  # -log sigmoid(0.5 * 0.4)
    assert rows["margin"][1] == rows["reward/chosen"][1] == "0.2000"
    assert rows["accuracy"][:2] == ["0.0000", "1.0000"]
    assert rows["log prob/chosen"][3] == "+0.4000 [+0.4000, +0.4000]"
    assert "ranking accuracy" in rows
    whose = "original" if sides[1] else "Before"
    assert f"Pairs of answers: 3; loss and rewards against {whose}, beta 0.5" in text


def test_pairs_against_other_references_have_log_probabilities_alone():
    text = compare(with_pairs(BEFORE), with_pairs(AFTER, against="coder"), NAMES)
    assert "loss" not in pair_rows(text)
    assert "other references" in text


def test_pairs_of_a_teacher_stand_beside_it():
    sides = with_pairs(BEFORE, 0.3, "coder"), with_pairs(AFTER, 0.1, "coder")
    rows = pair_rows(compare(*sides, NAMES))
    before, _, teacher = (float(cell) for cell in rows["log prob/chosen"][:3])
    assert before - teacher == pytest.approx(0.3, abs=2e-4)


def test_other_pairs_are_not_compared():
    with pytest.raises(RecipeError, match=r"after\.json: has no pairs"):
        compare(with_pairs(BEFORE), AFTER, NAMES)
    other = with_pairs(AFTER)
    hashes = ("a" * 32, *other.pairs.hashes[:2])
    other = replace(other, pairs=replace(other.pairs, hashes=hashes))
    with pytest.raises(RecipeError, match=r"not those of before\.json: 3 here and 3 there, 2 in"):
        compare(with_pairs(BEFORE), other, NAMES)


def test_without_text_the_table_says_so():
    one, other = evaluation({"teacher": 1.0}), evaluation({"teacher": 1.0, "loss": 2.0})
    text = compare(one, other, NAMES)
    assert "bits per byte |" not in text
    assert "No bits per byte: a tokenizer without text" in text


def test_a_teacher_without_a_lead_has_none_to_give():
    before, after = (evaluation({"loss": loss, "teacher": 3.5}) for loss in (3.0, 2.9))
    assert lead_taken_over(before.classes["code"], after.classes["code"]) is None
    untaught = evaluation({"loss": 3.0}).classes["code"]
    assert lead_taken_over(untaught, untaught) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            evaluation({"n": 19, "teacher": 1.0}, {}),
            "after.json: class code is not the text of before.json: 19 sequences here and 20 "
            "there, 19 in common",
        ),
        (evaluation({"teacher": 1.0}), "after.json: has no class general, which before.json has"),
        (
            evaluation({"n": 16}, {"n": 16}, evaluated_batches=2, sequence_length=64),
            "sequence_length was 32 and is 64; evaluated_batches was 3 and is 2",
        ),
    ],
)
def test_other_text_is_refused(other, message):
    with pytest.raises(RecipeError) as error:
        compare(BEFORE, other, NAMES)
    assert message in str(error.value)


def test_the_command(tmp_path, capsys):
    files = [str(tmp_path / name) for name in NAMES]
    for path, found in zip(files, (BEFORE, AFTER), strict=True):
        write_evaluation(path, found)
    table = tmp_path / "table.md"
    assert cli.main(["compare", *files, "--output", str(table)]) == 0
    assert capsys.readouterr().out == table.read_text()
    write_evaluation(files[1], evaluation({"teacher": 1.0}))
    assert cli.main(["compare", *files]) == 2
    assert "has no class general" in capsys.readouterr().err
    assert cli.main(["compare", files[0], "/nowhere.json"]) == 2
    assert capsys.readouterr().err.startswith("moe-inject: /nowhere.json: cannot be read")


DOMAINS = [Domain("general-domain", [0]), Domain("code", [1], teacher="coder")]


def test_a_better_teacher_passes_the_gate_and_the_lead_is_told():
    (said,) = teacher_gate(evaluation({"loss": 3.0, "teacher": 2.9}), DOMAINS)
    assert "code: loss of teacher coder 2.8" in said or "code: loss of teacher coder 2.9" in said
    assert "lead +0.1000 [+0.1000, +0.1000] on 20 sequences" in said


@pytest.mark.parametrize("teacher", [3.0, 3.5])
def test_a_teacher_that_is_no_better_stops_the_run(teacher):
    with pytest.raises(RecipeError) as error:
        teacher_gate(evaluation({"loss": 3.0, "teacher": teacher}), DOMAINS)
    assert error.value.key == "domains[1].teacher"
    for part in ("domains[1].teacher: ", "coder", "code: loss", "evaluation.gate: false"):
        assert part in str(error.value)


def test_a_lead_that_may_be_chance_is_told():
    found = evaluation({"loss": 3.0, "teacher": 2.999})
    sums = found.classes["code"].sums
    sums["teacher_loss"][::2] += 40
    sums["teacher_loss"][1::2] -= 40
    (said,) = teacher_gate(found, DOMAINS)
    assert "so small a lead may be chance" in said


def test_a_domain_without_held_out_text_is_not_judged():
    (said,) = teacher_gate(evaluation(None, {}), DOMAINS)
    assert "no held-out text of code" in said
