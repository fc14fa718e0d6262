"""A saved student writes: the same text at every layout, that of a plain loop over its logits."""

import shutil

import numpy as np
import pytest
import torch

from megatron_moe_inject.rollouts.file_format import read_rollouts
from megatron_moe_inject.rollouts.identity import writer_of_folder
from megatron_moe_inject.rollouts.settings import Asked, Sampling
from tests.harness import lane
from tests.harness.injection import OTHER, recipe_file
from tests.harness.material import make_material, student_flags

GREEDY = Sampling(max_tokens=8, temperature=0.0, stop=(20,))
DRAWN = Sampling(max_tokens=8, temperature=1.3, top_p=0.95, seed=5)
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
LAYOUTS = {
    "no cache": dict(more={"cache": False}),
    "tp2": dict(nproc=2, tp=2),
    "pp2": dict(nproc=2, pp=2),
    "pp2-vpp2": dict(nproc=2, pp=2, extra=VIRTUAL),
    "ep2": dict(nproc=2, ep=2),
}
SLOW = ("pp2",)


def write(
    material, output, sampling, *, nproc=1, extra=(), check=True, more=None, path=(), **layout
):
    asked = Asked(
        material.domain, str(output), prompt_tokens=6, count=10, per_file=3, batch=2,
        sampling=sampling, **(more or {}),
    )  # fmt: skip
    ours = ("--inject-recipe", recipe_file(material), "--inject-rollouts", asked.plain())
    load = ("--load", material.student, "--skip-train", "--train-iters", "1", "--eval-iters", "0")
    flags = student_flags(*material.blend, *load, *ours, *extra, **layout)
    return lane.run(flags, nproc=nproc, check=check, pythonpath=path)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def greedy(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("greedy")
    run = write(material, folder, GREEDY)
    assert "rollouts: 4 files written" in run.output
    return folder


@pytest.fixture(scope="module")
def drawn(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    write(material, folder, DRAWN)
    return folder


def test_greedy_text_is_that_of_a_plain_loop_over_the_logits(material, greedy, tmp_path):
    """Each token of each completion, by the logits of whole texts, with nothing of ours."""
    texts = [r for path in sorted(greedy.iterdir()) for r in read_rollouts(path).rollouts]
    assert len(texts) == 10
    tokens = torch.zeros(len(texts), 6 + GREEDY.max_tokens, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = np.concatenate([text.prompt, text.completion])
        row[: len(ids)] = torch.from_numpy(ids)
    torch.save(tokens, tmp_path / "tokens.pt")
    load = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
    lane.run(
        student_flags(*material.blend, *load, "--train-iters", "1"),
        script=(str(lane.HARNESS / "logits_gpt.py"),),
        env={"LOGITS": str(tmp_path), "LOGITS_THEN": "end"},
    )
    likely = torch.load(tmp_path / "megatron_logits.pt")[..., :61].argmax(-1)
    for text, own in zip(texts, likely, strict=True):
        begin, count = len(text.prompt) - 1, len(text.completion)
        assert text.completion.tolist() == own[begin : begin + count].tolist()
        assert text.completion[-1] == GREEDY.stop[0] or count == GREEDY.max_tokens
        assert GREEDY.stop[0] not in text.completion[:-1]
    assert any(len(text.completion) < GREEDY.max_tokens for text in texts)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS],
)
def test_a_layout_writes_what_one_process_writes(material, greedy, drawn, tmp_path, layout):
    sampling, expected = (
        (DRAWN, drawn) if layout in ("no cache", "tp2", "ep2") else (GREEDY, greedy)
    )
    write(material, tmp_path, sampling, **LAYOUTS[layout])
    assert content(tmp_path) == content(expected)


def test_files_say_whose_text_they_have(material, greedy, drawn):
    for folder, sampling in ((greedy, GREEDY), (drawn, DRAWN)):
        for path in folder.iterdir():
            found = read_rollouts(path)
            assert found.writer == writer_of_folder(material.student)
            assert found.settings["temperature"] == sampling.temperature
    assert content(greedy).keys().isdisjoint(content(drawn))


def test_what_is_there_is_not_written_again(material, drawn, tmp_path):
    expected = content(drawn)
    names = sorted(expected)
    for name in names[:2]:
        (tmp_path / name).write_bytes(expected[name])
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names[:2]}
    run = write(material, tmp_path, DRAWN)
    assert "rollouts: 2 files written" in run.output
    assert "2 were there" in run.output
    assert content(tmp_path) == expected
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names[:2]} == before


@pytest.mark.slow
def test_a_layout_that_cannot_write_is_refused(material, tmp_path):
    run = write(material, tmp_path, GREEDY, nproc=2, cp=2, check=False)
    assert run.returncode == 2
    assert "--context-parallel-size: divides the text" in run.output


def test_a_merged_copy_writes_for_the_checkpoint_that_it_is_of(material, drawn, tmp_path):
    """Its weights are elsewhere; the files say whose text it is."""
    copy = tmp_path / "copy"
    shutil.copytree(material.student, copy)
    load = ("--load", str(copy))
    write(material, tmp_path / "own", DRAWN, extra=load, more={"checkpoint": material.teacher})
    found = [read_rollouts(path) for path in sorted((tmp_path / "own").iterdir())]
    expected = [read_rollouts(path) for path in sorted(drawn.iterdir())]
    assert {file.writer for file in found} == {writer_of_folder(material.teacher)}
    assert {file.writer for file in found}.isdisjoint(file.writer for file in expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert np.array_equal(one.completion, other.completion)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no other Megatron")
def test_the_other_version_writes_the_same_at_two_tensor_parallel_ranks(tmp_path):
    old = make_material(tmp_path, (OTHER,))
    for name, layout in (("one", {}), ("two", dict(nproc=2, tp=2))):
        write(old, tmp_path / name, DRAWN, path=(OTHER,), **layout)
    assert content(tmp_path / "one") == content(tmp_path / "two")
