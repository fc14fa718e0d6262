"""A feature and a kind of teacher that live outside the package, in this module alone.

The child processes of the runs begin with this module, which registers both as a lab's own training
script would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_part import RunPart
from megatron_moe_inject.recipe.schedule import Schedule, show_weight
from megatron_moe_inject.recipe.section import Section
from megatron_moe_inject.teachers.base import Teacher, TeacherInfo
from megatron_moe_inject.teachers.sources import SOURCES, SourceKind
from tests.harness import lane
from tests.harness.injection import LAYOUTS, PROVEN, recipe_file

LOGIT = 4.0
RECIPE = """
domains:
  - {{name: code, data: [1], teacher: likes, experts: {{layers: {{2: [3], 3: [0, 3]}}}}}}
teachers: {{likes: {{source: "constant:7"}}}}
objective: {{alpha: 0.7, beta: 0.3}}
counting: {{unit: domain, weight: {{points: {{0: 1.0, 2: 0.0}}}}}}
"""


@dataclass
class Counting:
    """What is counted.

    Attributes:
        unit: ``domain`` or ``general`` samples; null = nothing.
        weight: of a sample.
        most: the run's largest number.
    """

    unit: str | None = None
    weight: float | Schedule = 1.0
    most: int = 1000


COUNTING: Section[Counting] = Section("counting", Counting, Counting, "What is counted.")


class CountingFeature(Feature):
    """Counts samples."""

    section = COUNTING
    refuses = (
        RefusedBeside(
            (Refusal("empty_unused_memory_level", "forgets what was counted"),),
            "counting.unit",
            lambda recipe, facts: recipe[COUNTING].unit is not None,
            "leave counting out",
        ),
    )

    def rules(self, recipe):
        if recipe[COUNTING].most < 1:
            raise fail("counting.most", recipe[COUNTING].most, "counts nothing", "write 1 or more")

    def plan_lines(self, recipe, facts):
        counting = recipe[COUNTING]
        line = f"{counting.unit} samples, {show_weight(counting.weight)} each"
        return {"counting": [line]} if counting.unit else {}

    def start(self, run):
        return CountingPart(run.recipe[COUNTING]) if run.recipe[COUNTING].unit else None


class CountingPart(RunPart, StepPart):
    def __init__(self, spec):
        self._spec = spec
        self._count = 0

    def attach(self, student):
        return self

    def begin(self, step: Step):
        domain = step.labels >= 0
        if step.training:
            self._count += int((domain if self._spec.unit == "domain" else ~domain).sum())

    def finish(self):
        return f"counted: {self._count} {self._spec.unit} samples"


class ConstantTeacher(Teacher):
    """Likes one token, wherever it is."""

    hidden_size, num_layers, logit_transform = 2, 1, LogitTransform()

    def __init__(self, name, vocab_size, liked, dtype, device):
        self.name, self.vocab_size = name, vocab_size
        self._states = torch.tensor([1.0, 0.0], dtype=dtype, device=device)
        self._head = torch.zeros(vocab_size, 2, dtype=dtype, device=device)
        self._head[liked, 0] = LOGIT

    def states(self, tokens, position_ids=None, attention_mask=None, layers=()):
        return [self._states.expand(*tokens.shape, 2).contiguous()]

    def head_weight(self, start, stop):
        rows = self._head.new_zeros(stop - start, 2)
        known = self._head[start:stop]
        rows[: len(known)] = known
        return rows


VOCABULARY = 127


def check_constant(source, student, prefix):
    return TeacherInfo(
        name=source.name, source=source.text, kind=source.kind, path=str(source.path),
        architecture="constant", num_layers=1, hidden_size=2, vocab_rows=VOCABULARY,
        vocab_size=VOCABULARY, parameters=2 * VOCABULARY, max_positions=None,
        vocabulary="compared by nobody",
    )  # fmt: skip


def load_constant(source, *, params_dtype, device, resets_documents, fp8):
    liked = int(str(source.path))
    return ConstantTeacher(source.name, VOCABULARY, liked, params_dtype, device)


CONSTANT = SourceKind("constant:7", check_constant, load_constant, is_folder=False)


def run(material, *extra, recipe=RECIPE, script=("-m", __name__), **layout):
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    nproc = layout.pop("nproc", 1)
    extra = (*layout.pop("extra", ()), *extra)
    flags = material.flags(*ours, *extra, **layout)
    return lane.run(flags, nproc=nproc, script=script, check=False)


@pytest.fixture(scope="module")
def one(material):
    return run(material)


def test_they_take_part_in_a_run(one):
    assert one.returncode == 0, one.tail()
    for shown in (
        "domain samples, linear(0: 1, 2: 0) each",
        "constant:7",
        "0.7 * 1^2 * forward_kl(likes || student, T=1)",
    ):
        assert shown in one.output, shown
    assert PROVEN.search(one.output)
    kd = (
        one.losses("kd loss/code") if "kd loss/code" in one.iterations[0] else one.losses("kd loss")
    )
    assert kd[-1] < kd[0]
    assert re.search(r"training: step 2 of 4, \d+:\d\d left, .*kd loss ", one.output)
    counted = [line for line in one.output.splitlines() if line.startswith("counted: ")]
    assert len(counted) == 1
    assert int(counted[0].split()[1]) > 0


@pytest.mark.parametrize(
    "layout",
    ["tp2-sp", "ep2", *(pytest.param(at, marks=pytest.mark.slow) for at in ("pp2", "cp2"))],
)
def test_every_layout_gives_the_same(material, one, layout):
    other = run(material, **LAYOUTS[layout])
    assert other.returncode == 0, other.tail()
    assert PROVEN.search(other.output)
    for term in ("lm loss", "kd loss", "total loss", "grad norm"):
        assert other.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
    if layout != "ep2":  # whose ranks have halves of the samples, and the first one speaks
        counted = next(line for line in one.output.splitlines() if line.startswith("counted: "))
        assert counted in other.output


@pytest.mark.parametrize(
    ("recipe", "extra", "message"),
    [
        (RECIPE.replace("unit: domain", "most: 0"), (), "counting.most: 0 counts nothing; write 1"),
        (RECIPE.replace("0: 1.0, 2", "0: -1.0, 2"), (), "counting.weight: -1.0 is negative"),
        (RECIPE.replace("unit: domain", "units: domain"), (), "counting.units: unknown key; did"),
        (RECIPE.replace("constant:7", "constant: "), (), "server:http://host:8000 or constant"),
        (
            RECIPE,
            ("--empty-unused-memory-level", "1"),
            "--empty-unused-memory-level: forgets what was counted; remove it, or leave counting",
        ),
    ],
    ids=["rule", "weight", "key", "source", "refusal"],
)
def test_mistakes_are_one_error(material, recipe, extra, message):
    wrong = run(material, *extra, recipe=recipe)
    assert wrong.returncode != 0
    assert message in wrong.output, wrong.tail()
    assert "Traceback" not in wrong.output


def test_without_them_the_package_knows_neither():
    text = RECIPE.format()
    with pytest.raises(ValueError, match="counting: unknown key"):
        recipe_from_yaml(text)
    with FEATURES.registered("counting", CountingFeature()):
        with pytest.raises(ValueError, match="'constant:7' is no source"):
            recipe_from_yaml(text)
        with SOURCES.registered("constant", CONSTANT):
            assert recipe_from_yaml(text)[COUNTING].unit == "domain"
        with pytest.raises(ValueError, match="there already"):
            FEATURES.register("steering", CountingFeature())
    assert "counting" not in FEATURES


if __name__ == "__main__":
    from megatron_moe_inject.host import gpt_entry

    FEATURES.register("counting", CountingFeature())
    SOURCES.register("constant", CONSTANT)
    gpt_entry.main()
