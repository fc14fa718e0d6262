"""Runs of the covering array through the real ``pretrain()``, side by side."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_inject.rollouts.identity import writer_of_folder
from tests.harness import aligned, lane, own_tokenizers, rollout_files
from tests.harness import covering_array as array
from tests.harness.array_features import SHARED_EXPERTS
from tests.harness.grouped import SCRIPT
from tests.harness.material import make_student, student_flags
from tests.harness.moe_teacher import with_teacher

STEPS = 4
CLOCK = "elapsed time per iteration (ms)"


def student_of(own, material):
    """The checkpoint that a set starts from; one with shared experts is made when first wanted."""
    if not own.shared_experts:
        return material.student
    path = material.folder / "student with shared experts"
    if not path.exists():
        make_student(str(path), material.general, *SHARED_EXPERTS)
    return str(path)


def store_of(llama, material):
    """States of the teacher of Hugging Face for the domain's data; written when first wanted."""
    folder = material.folder / "store of states"
    if folder.exists():
        return folder
    recipe = material.folder / "stored.yaml"
    recipe.write_text(
        "domains: [{name: code, data: [1], teacher: third, experts: {layers: {1: [0]}}}]\n"
        f"teachers: {{third: {{source: 'hf:{llama}'}}}}\nobjective: {{alpha: 0.5}}\n"
    )
    text = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "61", *material.blend)
    command = ["store-teacher", str(recipe), "--output", str(folder), "--states", "--cpu", "--"]
    subprocess.run(
        [sys.executable, "-m", "megatron_moe_inject.cli", *command, *text, "--seq-length", "64"],
        check=True,
        timeout=300,
        capture_output=True,
    )
    return folder


def tokenizer_of(material):
    """The student's ids as characters: the corpora are then text."""
    folder = material.folder / "letters"
    return folder if folder.exists() else own_tokenizers.letters(folder, 61)


def aligned_of(material):
    """A random teacher with a tokenizer of its own; made when first wanted."""
    folder = material.folder / "aligned teacher"
    if not folder.exists():
        own = own_tokenizers.byte_level(material.folder / "its tokenizer", 300)
        aligned.llama(folder, own, 300, seed=3)
    return folder


def rollouts_of(student):
    """A folder of what a student wrote before it was trained: enough for most samples."""
    folder = Path(f"{student} wrote")
    if not folder.exists():
        rollout_files.write(folder, "a.jsonl", 12, writer=writer_of_folder(student))
    return folder


def run_set(
    material,
    llama,
    folder,
    name,
    layout=None,
    *,
    like=None,
    flags=(),
    save=False,
    load=False,
    env=None,
):
    """One run of a set at a layout, on one process without one.

    Args:
        llama: folder of the teacher from Hugging Face.
        folder: what the run writes goes there.
        like: the layout that a run on one process is the reference of.
        flags: further ones.
        save: end after two of four steps, and save to ``folder``.
        load: go on from there.
        env: of the run, besides.
    """
    own, at = array.SETS[name], array.LAYOUTS[layout] if layout else array.Layout()
    if layout is None:
        own = replace(own, features=own.features - {array.HYBRID})
    shared = array.LAYOUTS[like or layout] if like or layout else at
    recipe = folder / "recipe.yaml"
    fields = dict(shared.recipe)
    if array.WITH_EXPERTS in own.features:
        fields["teachers.coder.ep"] = at.expert_ranks
    text = array.recipe_of(own, fields)
    paths = {
        "teacher": material.teacher,
        "llama": llama,
        "folder": folder,
        "rollouts": rollouts_of(student_of(own, material)),
    }
    if "store of states" in own.features:
        paths["store"] = store_of(llama, material)
    if array.ALIGNED in own.features:
        paths |= {"tokenizer": tokenizer_of(material), "other": aligned_of(material)}
    if array.WITH_EXPERTS in own.features:
        paths["experts"] = with_teacher(material, "deepseek").teacher

    def filled(text):
        for key, path in paths.items():
            text = text.replace(f"{{{key}}}", str(path))
        return text

    recipe.write_text(filled(text))
    start = ("--load", student_of(own, material), "--finetune", "--no-load-optim", "--no-load-rng")
    keep = ("--save", str(folder), "--save-interval", "2")
    if load:
        start = ("--load", str(folder), *keep)
    elif save:
        start += (*keep, "--exit-interval", "2")
    return lane.run(
        [
            *student_flags("--train-iters", str(STEPS), *start, *array.blend_of(own, material)),
            *("--inject-recipe", str(recipe)),
            *(("--inject-verify-frozen",) if own.freezes else ()),
            *(*map(filled, array.flags_of(own, at, folder)), *shared.shared, *flags),
        ],
        nproc=at.nproc,
        script=SCRIPT if own.grouped else lane.PRETRAIN,
        # As TE's layer: all weights are rounded, also where a rank has none that is frozen.
        env={**({"TESTS_FP8_PRODUCTS": "1"} if own.grouped else {}), **(env or {})},
    )


def reference_of(known_run, name, layout):
    """One process with what the layout shares with it; one run for all layouts that share none."""
    at = array.LAYOUTS[layout]
    return known_run(name, like=layout if at.shared or at.recipe else None)


def assert_same_routing(ours, theirs):
    """Two profiles of the same tokens: not one choice of an expert differs."""
    assert ours.classes.keys() == theirs.classes.keys()
    for name, counts in ours.classes.items():
        expected = theirs.classes[name]
        assert np.array_equal(counts.tokens, expected.tokens), name
        assert np.array_equal(counts.selections, expected.selections), name
        np.testing.assert_allclose(counts.gate_sums, expected.gate_sums, rtol=2e-5)


def different(ours, theirs, but=(), **bound):
    """Where two logs differ: the line's number, the term, and what each log has.

    Args:
        ours, theirs: iterations or evaluations of a run.
        but: terms that are not compared.
        bound: as ``pytest.approx`` takes it; without one every digit counts.
    """
    found = []
    for number, (line, expected) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in sorted((line.keys() | expected.keys()) - set(but)):
            values = line.get(name), expected.get(name)
            same = pytest.approx(values[1], **bound) if bound else values[1]
            if None in values or values[0] != same:
                found.append((number, name, *values))
    return found


def decided(iterations: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the share of pairs in the right order of the first step, where no answer has moved
    from the original yet and rounding decides."""
    first, *others = iterations
    name = "preference accuracy"
    return [{term: value for term, value in first.items() if term != name}, *others]
