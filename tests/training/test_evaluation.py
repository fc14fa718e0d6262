"""Gain and forgetting measured through the real ``pretrain()``, alone and beside training."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_inject import cli
from megatron_moe_inject.evaluation.evaluation_file import (
    read_evaluation,
    read_list,
    write_evaluation,
    write_list,
)
from megatron_moe_inject.losses import reference
from tests.harness import lane
from tests.harness.evaluating import (
    BATCHES,
    EVALUATIONS,
    GAMMA,
    MEASURED,
    assert_same,
    evaluate,
    plain,
)
from tests.harness.injection import LAYOUTS, OTHER, inject, recipe_file
from tests.harness.material import EVALUATES, make_material, student_flags

TOKENIZER = str(lane.ROOT / "examples" / "quickstart" / "tokenizer")
KEEP = ("--save-interval", "100")


def train(material, folder, recipe=GAMMA, extra=(), **options):
    """A run of four iterations that measures at 0, 2 and 4; the run and its list."""
    path = Path(folder, "inject_evaluation.jsonl")
    keep = ("--save", str(folder), *KEEP, *EVALUATIONS, *extra)
    return inject(material, recipe, extra=keep, **options), read_list(path)


@pytest.fixture(scope="module")
def single(material, tmp_path_factory):
    return evaluate(material, tmp_path_factory.mktemp("evaluation") / "one.json")


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    return train(material, tmp_path_factory.mktemp("trained"))


def sequence_hash(tokens, labels, mask):
    found = hashlib.blake2b(digest_size=16)
    for value in (tokens.long(), labels.long(), mask > 0):
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_it_is_a_plain_loop_over_the_data(material, single, tmp_path):
    student = plain(material, tmp_path / "s.pt", student_flags("--load", material.student))
    dense = [f for f in lane.dense() if f != "--mock-data"]
    sizes = "--hidden-size 48 --ffn-hidden-size 64 --vocab-size 61 --make-vocab-size-divisible-by 8"
    teacher = plain(
        material, tmp_path / "t.pt", [*dense, *sizes.split(), "--load", material.teacher]
    )
    assert torch.equal(student["tokens"], teacher["tokens"])
    x, y, labels = student["logits"].float(), teacher["logits"].float(), student["labels"]
    measures = reference.measures(x, y[..., : x.shape[-1]], labels, valid_vocab_size=61)
    mask = student["loss_mask"].double()
    right, same = measures["top"] == labels, measures["top"] == measures["teacher_top"]
    expected = {
        "tokens": mask,
        "loss": measures["loss"],
        "correct": right,
        "teacher_loss": measures["teacher_loss"],
        "teacher_kl": measures["kl"],
        "agreement": same,
    }
    expected = {name: (value.double() * mask).sum(1) for name, value in expected.items()}
    names = [
        sequence_hash(*parts)
        for parts in zip(student["tokens"], labels, student["loss_mask"], strict=True)
    ]
    counts_up = ((labels - student["tokens"]) == 1).double().mean(1) > 0.5
    for name, found in single.classes.items():
        own = [i for i, up in enumerate(counts_up.tolist()) if up == (name == "general")]
        own.sort(key=lambda i: names[i])
        assert found.sequences == tuple(names[i] for i in own)
        assert ("teacher_kl" in found.sums) == (name == "code")
        for key, values in found.sums.items():
            np.testing.assert_allclose(values, expected[key][own], 1e-5, 1e-4, err_msg=key)
        # Calibration, written out for the class.
        rows = torch.tensor(own)
        confidence, hit = measures["confidence"][rows].flatten(), right[rows].flatten().float()
        place = (confidence * 15).long().clamp(0, 14)
        error = sum(
            abs(hit[place == b].sum() - confidence[place == b].sum()).item() for b in range(15)
        )
        assert found.calibration_error() == pytest.approx(error / len(place), abs=1e-5)
    assert sum(len(found.sequences) for found in single.classes.values()) == len(names)


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2)], ids=str)
def test_alone_it_does_not_depend_on_the_layout(material, single, tmp_path, layout):
    assert_same(evaluate(material, tmp_path / "e.json", nproc=2, **layout), single)


def test_the_command_measures_the_same(material, single, tmp_path):
    path = tmp_path / "e.json"
    flags = student_flags(
        *(*material.blend, "--load", str(tmp_path / "nothing yet")),
        *("--pretrained-checkpoint", material.student, "--eval-iters", str(BATCHES)),
        cp=2,
    )
    at = flags.index("--train-iters")
    del flags[at : at + 2]
    ours = ["evaluate", recipe_file(material), "--output", str(path)]
    run = lane.run(flags, nproc=2, script=("-m", "megatron_moe_inject.cli", *ours, "--cpu", "--"))
    assert "no bits per byte" in run.output
    found = read_evaluation(path)
    assert_same(found, single)
    assert found.provenance == single.provenance
    assert single.provenance.checkpoint == material.student
    assert single.provenance.checkpoint_iteration == 3


def test_a_run_measures_before_between_and_after(trained, single):
    run, found = trained
    assert [e.provenance.iteration for e in found] == [0, 2, 4]
    assert len({e.text() for e in found}) == 1
    assert single.provenance.iteration == 3  # the student's own
    told = [e.provenance.checkpoint_sha256 for e in (*found, single)]
    assert told == 4 * [single.provenance.checkpoint_sha256] != 4 * [None]
    # Before the first step it is what a run that only evaluates finds.
    before, after = found[0].classes, found[-1].classes
    for name, alone in single.classes.items():
        assert before[name].sequences == alone.sequences
        np.testing.assert_allclose(before[name].sums["loss"], alone.sums["loss"], rtol=1e-6)
    assert before["general"].mean("original_kl") == pytest.approx(0, abs=1e-6)
    assert after["general"].mean("original_kl") > 1e-5
    assert after["code"].mean("loss") < before["code"].mean("loss")
    assert "accuracy/code value: " in run.output
    assert "lm loss/code PPL: " in run.output
    assert "accuracy/code PPL: " not in run.output
    # Megatron's own line of the same evaluation has the same numbers.
    log = run.evaluations[0]
    assert log["lm loss/code"] == pytest.approx(before["code"].mean("loss"), rel=1e-5)
    assert log["accuracy/general"] == pytest.approx(before["general"].mean("correct"), rel=1e-5)
    assert log["teacher loss/code"] == pytest.approx(before["code"].mean("teacher_loss"), rel=1e-5)
    retained = run.evaluations[-2]["retention loss"]  # the last is on the test data
    assert retained == pytest.approx(after["general"].mean("original_kl"), rel=1e-3)


def test_training_is_the_same_with_and_without(material, tmp_path):
    """Bit for bit, with dropout, whose masks a stray random number would change."""
    noisy = ("--hidden-dropout", "0.1", *EVALUATIONS)
    without = inject(material, extra=noisy)
    run, _ = train(material, tmp_path, MEASURED, extra=noisy)
    for term in ("lm loss", "kd loss", "total loss", "grad norm"):
        assert run.losses(term) == without.losses(term), term


def test_a_resumed_run_goes_on_with_the_list(material, trained, tmp_path):
    """Killed at 3 having measured at 2, with a line of a future that never was."""
    folder, path = tmp_path / "resumed", tmp_path / "resumed" / "inject_evaluation.jsonl"
    extra = ("--save-interval", "1", "--exit-interval", "3")
    _, found = train(material, folder, extra=extra, nproc=2, ep=2)
    assert [e.provenance.iteration for e in found] == [0, 2]
    future = trained[1][-1]
    write_list(path, [*found, future])
    with path.open("a") as file:
        file.write('{"format": "megatron_moe_inj')
    ours = ("--inject-recipe", recipe_file(material, GAMMA), "--load", str(folder))
    keep = ("--save", str(folder), "--save-interval", "1", "--train-iters", "4", *EVALUATIONS)
    lane.run(student_flags(*material.blend, *keep, *ours, ep=2), nproc=2)
    found = read_list(path)
    assert [e.provenance.iteration for e in found] == [0, 2, 3, 4]
    for ours, theirs in zip([found[0], found[1], found[3]], trained[1], strict=True):
        assert_same(ours, theirs, rtol=1e-4)


def test_a_resumed_run_with_other_text_is_told(material, tmp_path):
    extra = ("--save-interval", "1", "--exit-interval", "1")
    train(material, tmp_path, MEASURED, extra=extra)
    before = (tmp_path / "inject_evaluation.jsonl").read_bytes()
    ours = ("--inject-recipe", recipe_file(material, MEASURED), "--load", str(tmp_path))
    keep = ("--save", str(tmp_path), "--save-interval", "1", "--train-iters", "4")
    keep += ("--eval-iters", "2", "--eval-interval", "2")
    run = lane.run(student_flags(*material.blend, *keep, *ours), check=False)
    assert run.returncode == 2, run.tail()
    assert "was measured on other text than this run reads" in run.output
    assert "Traceback" not in run.output
    assert (tmp_path / "inject_evaluation.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def ignorant(material):
    """A dense model that knows the general text only, as a teacher of code."""
    folder = str(material.folder / "ignorant")
    flags = [f for f in lane.dense() if f != "--mock-data"]
    sizes = "--hidden-size 48 --ffn-hidden-size 64 --vocab-size 61 --make-vocab-size-divisible-by 8"
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "40")
    data += (*lane.ONE_BATCH, "--eval-iters", "0")
    lane.run(
        [*flags, *sizes.split(), *data, "--lr", "1e-2", "--save", folder, "--save-interval", "100"]
    )
    return f"teachers.coder.source=megatron:{folder}"


@pytest.mark.parametrize("layout", [dict(ep=2), dict(pp=2)], ids=str)
def test_the_gate_stops_a_run_whose_teacher_is_no_better(material, ignorant, tmp_path, layout):
    """One message, on every rank the same end, nothing trained."""
    extra = ("--inject-set", ignorant)
    run, found = train(material, tmp_path, MEASURED, extra, check=False, nproc=2, **layout)
    assert run.returncode == 2, run.tail()
    assert run.output.count("does not predict its domain better than its student") == 1
    assert "evaluation.gate: false" in run.output
    assert "loss of teacher coder" in run.output
    assert "Traceback" not in run.output
    assert not run.iterations
    assert [e.provenance.iteration for e in found] == [0]


def test_the_gate_can_be_opened(material, ignorant, tmp_path):
    extra = ("--inject-set", ignorant, "evaluation.gate=false")
    run, found = train(material, tmp_path, MEASURED, extra)
    assert len(run.iterations) == 4
    assert len(found) == 3


def test_the_gate_says_what_it_found(trained):
    assert "teacher gate: code: loss of teacher coder" in trained[0].output


@pytest.mark.parametrize("none", [("--eval-iters", "0"), ("--split", "90,0,10")], ids=str)
def test_a_run_without_validation_data(material, tmp_path, none):
    run = inject(
        material, MEASURED, extra=("--save", str(tmp_path), *KEEP, *EVALUATES, *none), check=False
    )
    assert run.returncode == 2, run.tail()
    assert "evaluation: there is no validation data to measure on" in run.output


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2"])
def test_text_that_would_count_twice_is_an_error(material, tmp_path, layout):
    """Each entry holds 18 samples out: 3 batches read 10 and 15, 4 would read 13 and 20."""
    options = dict(LAYOUTS[layout])
    extra = ("--save", str(tmp_path), *KEEP, *options.pop("extra", ()), "--eval-iters", "200")
    run = inject(material, MEASURED, extra=extra, check=False, **options)
    assert run.returncode == 2, run.tail()
    assert "--eval-iters 200: takes 1600 samples of validation text" in run.output
    assert f"18 of {material.general}, 18 of {material.domain}" in run.output
    assert "set it to 3 or less" in run.output
    assert "Traceback" not in run.output
    assert not run.iterations


def test_a_run_without_a_place_to_write_to(material):
    run = inject(material, MEASURED, extra=EVALUATES, check=False)
    assert run.returncode == 2, run.tail()
    assert "evaluation.file: missing, and there is no --save folder" in run.output


def test_the_list_compares_with_itself_and_with_nothing_else(trained, single, tmp_path, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.json"
    write_list(before, trained[1])
    write_evaluation(after, single)
    table = tmp_path / "table.md"
    assert cli.main(["compare", str(before), str(before), "--output", str(table)]) == 0
    text = capsys.readouterr().out
    assert text == table.read_text()
    assert "KL to the original" in text
    assert "(iteration 0, --load" in text
    row = next(line for line in text.splitlines() if line.startswith("| code"))
    assert row.rstrip("| ").endswith("%")


def test_bytes_are_those_of_the_labels_as_text(material, tmp_path):
    """A tokenizer with text: bits per byte, for masked ends of documents too."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "e.json"
    tokens = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", TOKENIZER)
    no_teacher = "domains: [{{name: code, data: [1]}}]\nobjective: {{alpha: 0, beta: 1}}\n"
    recipe = no_teacher + "train: {{experts: all}}\n"
    flags = [f for f in student_flags(*material.blend) if f not in ("--vocab-size", "61", "127")]
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-evaluate", str(path))
    ours += ("--inject-from-scratch", "--skip-train", "--eval-iters", str(BATCHES))
    lane.run([*flags, *tokens, *ours])
    found = read_evaluation(path)
    logits = tmp_path / "logits.pt"
    data = plain(material, logits, [*flags, *tokens])
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = {}
    parts = (data["tokens"], data["labels"], data["loss_mask"])
    for tokens, labels, mask in zip(*parts, strict=True):
        text = tokenizer.decode(labels[mask > 0].tolist(), skip_special_tokens=True)
        lengths[sequence_hash(tokens, labels, mask)] = len(text.encode())
    for known in found.classes.values():
        assert known.sums["bytes"].tolist() == [lengths[name] for name in known.sequences]
        bits = known.sums["loss"].sum() / known.sums["bytes"].sum() / np.log(2)
        assert known.summary()["bits_per_byte"] == pytest.approx(bits)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron_finds_the_same(tmp_path, trained):
    material = make_material(tmp_path, [OTHER])
    _, found = train(material, tmp_path / "run", nproc=2, ep=2, path=[OTHER])
    for ours, theirs in zip(found, trained[1], strict=True):
        assert_same(ours, theirs, rtol=1e-4)


def test_the_summary_is_there_to_read(material, single, tmp_path):
    path = tmp_path / "e.json"
    write_evaluation(path, single)
    summary = json.loads(path.read_text())["classes"]["code"]["summary"]
    assert summary["loss"] == pytest.approx(single.classes["code"].mean("loss"))
    assert summary["bits_per_byte"] is None
