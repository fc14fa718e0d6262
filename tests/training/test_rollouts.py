"""Rollouts in the real ``pretrain()``: late, twice, damaged, of other checkpoints, stale; resumes.

The covering array compares layouts, and resumes at more of them.
"""

import shutil
import threading
import time

import pytest

from megatron_moe_inject.rollouts.file_format import Writer, read_rollouts
from megatron_moe_inject.rollouts.identity import writer_of_folder
from tests.harness import lane
from tests.harness.injection import OTHER, RECIPE, TERMS, inject, recipe_file
from tests.harness.material import make_material, student_flags
from tests.harness.rollout_files import write

SHARE, AGE = "rollout share/code", "rollout age/code"
LOSS = "rollout lm loss/code"


def recipe(folder, settings="every: 2"):
    data = RECIPE.replace("data: [1]", f'data: [1, "rollouts:{folder}"]')
    return data + f"rollouts: {{{{{settings}}}}}\n"


@pytest.fixture
def start(material):
    return writer_of_folder(material.student)


def save_to(folder, stop):
    return ("--save", str(folder), "--save-interval", "1", "--exit-interval", str(stop))


def resume(material, text, save, *, nproc=1, check=True, **layout):
    ours = ("--inject-recipe", recipe_file(material, text), "--load", str(save))
    flags = student_flags(*material.blend, "--train-iters", "4", *ours, **layout)
    return lane.run(flags, nproc=nproc, check=check)


def said(run):
    return [line for line in run.output.splitlines() if "megatron_moe_inject: rollouts" in line]


def test_what_is_whole_and_the_students_own_is_read_once(material, start, tmp_path):
    clean, mixed = tmp_path / "clean", tmp_path / "mixed"
    for folder in (clean, mixed):
        write(folder, "b.jsonl", 6, writer=start)
        write(folder, "c.jsonl", 5, writer=start, seed=1)
    (mixed / "d.jsonl").write_bytes((mixed / "b.jsonl").read_bytes())
    (mixed / "e.jsonl").write_bytes((mixed / "b.jsonl").read_bytes()[:-50])
    write(mixed, "a.jsonl", 5, writer=Writer("ef" * 16, 0))
    one, two = (inject(material, recipe(folder)) for folder in (clean, mixed))
    assert one.losses(SHARE)[0] == 1
    assert 0 < one.losses(SHARE)[2] < 1
    assert one.losses(SHARE)[3] == 0
    assert one.losses(AGE)[:3] == [0, 1, 2]
    assert one.losses(LOSS)[0] == lane.approx([read_rollouts(clean / "b.jsonl").lm_loss])[0]
    for term in (*TERMS, LOSS):
        assert one.losses(term) == two.losses(term), term
    assert said(one) == []
    lines = said(two)
    assert len(lines) == 3
    for name, text in (
        ("a.jsonl", "was written by injection efefefef, not by this injection"),
        ("e.jsonl", "is half a file"),
        ("d.jsonl", "is a copy of b.jsonl, which is read once"),
    ):
        assert sum(name in line and text in line for line in lines) == 1, name


def test_a_resumed_run_reads_what_had_not_been_read(material, start, tmp_path):
    """Bitwise, on one rank and on another number of them; a copy that came meanwhile is one."""
    own, save = tmp_path / "own", tmp_path / "save"
    write(own, "a.jsonl", 8, writer=start)
    write(own, "b.jsonl", 6, writer=start, seed=1)
    text = recipe(own, "every: 4")
    whole = inject(material, text)
    first = inject(material, text, extra=save_to(save, 1))
    assert first.losses("total loss") == whole.losses("total loss")[:1]
    (own / "c.jsonl").write_bytes((own / "a.jsonl").read_bytes())
    again = tmp_path / "again"
    shutil.copytree(save, again)
    resumed = resume(material, text, save)
    for term in (*TERMS, SHARE):
        assert resumed.losses(term) == whole.losses(term)[1:], term
    wider = resume(material, text, again, nproc=2)
    for term in (*TERMS, SHARE):
        assert wider.losses(term) == lane.approx(whole.losses(term)[1:], rel=2e-5), term
    (own / "b.jsonl").unlink()
    shutil.rmtree(again / "iter_0000003", ignore_errors=True)
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    lost = resume(material, text, save, check=False)
    assert lost.returncode == 2
    assert "b.jsonl', which was whole, cannot be read (No such file or directory)" in lost.output
    assert "put it back as it was and go on from the checkpoint" in lost.output


def test_a_checkpoint_reads_what_it_wrote_itself(material, start, tmp_path):
    """Two steps, rollouts of that checkpoint, two steps; what the start wrote is too old by now."""
    own, save = tmp_path / "own", tmp_path / "save"
    text = recipe(own, "every: 2, max_age: 1")
    none = inject(material, text, extra=save_to(save, 2))
    assert none.losses(SHARE) == [0, 0]
    (line,) = said(none)
    assert f"'{own}' does not exist yet; until it does, domain code reads its fixed text" in line
    writer = writer_of_folder(str(save))
    assert (writer.iteration, len(writer.injection)) == (2, 32)
    write(own, "a.jsonl", 20, writer=writer)
    write(own, "b.jsonl", 20, writer=start, seed=1)
    write(own, "c.jsonl", 20, writer=Writer(writer.injection, 3), seed=2)
    run = resume(material, text, save)
    assert run.losses(SHARE) == [1, 1]
    assert run.losses(AGE) == [0, 1]
    (line,) = said(run)
    assert "b.jsonl' is of iteration 0, 2 steps ago, where rollouts.max_age is 1" in line


def test_a_step_waits_for_what_is_being_written(material, start, tmp_path):
    """Half of the file is there at first."""
    own = tmp_path / "own"
    path = write(own, "a.jsonl", 40, writer=start)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    log = tmp_path / "save"

    def complete():
        while not log.exists():  # the run has claimed it
            time.sleep(0.1)
        time.sleep(4)
        path.write_bytes(content)

    writer = threading.Thread(target=complete)
    writer.start()
    text = recipe(own, "every: 2, late: wait, patience: 120")
    run = inject(material, text, nproc=2, extra=("--save", str(log), "--save-interval", "100"))
    writer.join()
    assert run.losses(SHARE) == [1, 1, 1, 1]


def test_who_waits_in_vain_leaves_with_a_checkpoint(material, start, tmp_path):
    own, save = tmp_path / "own", tmp_path / "save"
    write(own, "a.jsonl", 6, writer=start)
    text = recipe(own, "every: 2, late: wait, patience: 0.1")
    keep = ("--save", str(save), "--save-interval", "100")
    run = inject(material, text, nproc=2, tp=2, check=False, extra=keep)
    assert run.returncode == 2
    assert "samples of iteration 1 after 0.1 s (rollouts.patience)" in run.output
    assert writer_of_folder(str(save)).iteration == 1
    write(own, "b.jsonl", 40, writer=start, seed=1)
    assert resume(material, text, save).losses(SHARE) == [1, 1, 1]


def test_a_faulty_file_stops_the_run_if_it_is_to(material, tmp_path):
    own = tmp_path / "own"
    write(own, "a.jsonl", 6, writer=Writer("ef" * 16, 0))
    run = inject(material, recipe(own, "faulty: stop"), check=False)
    assert run.returncode == 2
    assert "rollouts: " in run.output
    assert "was written by injection efefefef" in run.output
    assert "write faulty: skip" in run.output
    assert run.iterations == []


PACKED = ("--dataloader-inter-document-masking", "--micro-batch-size", "1")


@pytest.mark.parametrize("layout", [dict(nproc=2, tp=2), dict(nproc=2, pp=2)], ids=["tp2", "pp2"])
def test_packs_of_rollouts_at_layouts(material, start, tmp_path, layout):
    own = tmp_path / "own"
    write(own, "a.jsonl", 30, writer=start, longest=12)
    text = recipe(own)
    one, other = (inject(material, text, extra=PACKED, **at) for at in ({}, layout))
    assert 0 < one.losses(SHARE)[2] <= 1
    for term in (*TERMS, SHARE):
        assert other.losses(term) == lane.approx(one.losses(term), rel=2e-5), term


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no other Megatron")
def test_the_other_version_reads_the_same_at_two_stages(tmp_path):
    old, own = make_material(tmp_path, (OTHER,)), tmp_path / "own"
    write(own, "a.jsonl", 8, writer=writer_of_folder(old.student))
    one, two = (
        inject(old, recipe(own), path=(OTHER,), **layout) for layout in ({}, dict(nproc=2, pp=2))
    )
    assert one.losses(SHARE)[0] == 1
    for term in (*TERMS, SHARE):
        assert two.losses(term) == lane.approx(one.losses(term), rel=2e-5), term
