"""Runs of a dense student that trains whole, taught by a model of its own size or another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe_inject.evaluation.evaluation_file import Evaluation, read_evaluation
from tests.harness import lane
from tests.harness.injection import recipe_file
from tests.harness.material import Material, student_flags

RECIPE = """
domains:
  - {{name: code, data: [1], teacher: coder}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, temperature: 2.0}}
train: {{everything: true}}
"""


def dense_flags(*extra: str, **layout: int) -> list[str]:
    """Flags of the student of the other tests without its experts, from random weights."""
    flags, experts = student_flags(*extra, **layout), lane.MOE
    start = next(i for i in range(len(flags)) if flags[i : i + len(experts)] == experts)
    return [*flags[:start], *flags[start + len(experts) :]]


def checkpoint(material: Material, pythonpath: Sequence[str] = ()) -> str:
    """The student's start, the same at every layout; made when first wanted."""
    path = material.folder / "dense student"
    if not path.exists():
        data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "3")
        lane.run(
            dense_flags(*data, "--save", str(path), "--save-interval", "100"), pythonpath=pythonpath
        )
    return str(path)


def teach(
    material: Material,
    recipe: str = RECIPE,
    *extra: str,
    nproc: int = 1,
    start: Sequence[str] | None = None,
    check: bool = True,
    pythonpath: Sequence[str] = (),
    script: Sequence[str] = lane.PRETRAIN,
    **layout: int,
) -> lane.Run:
    """Four steps of the dense student with a recipe, from ``checkpoint`` unless ``start`` says
    otherwise; later flags win."""
    if start is None:
        start = (
            "--load",
            checkpoint(material, pythonpath),
            "--finetune",
            "--no-load-optim",
            "--no-load-rng",
        )
    ours = ("--inject-recipe", recipe_file(material, recipe), *start, "--train-iters", "4")
    flags = dense_flags(*material.blend, *ours, *extra, **layout)
    return lane.run(flags, nproc=nproc, check=check, pythonpath=pythonpath, script=script)


def measure(
    material: Material, path: Path, *extra: str, recipe: str = RECIPE, nproc: int = 1, **layout: int
) -> Evaluation:
    """What a run that only evaluates writes of the dense student and its teacher."""
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-evaluate", str(path))
    start = ("--load", checkpoint(material), "--skip-train", "--eval-iters", "3")
    lane.run(dense_flags(*material.blend, *start, *ours, *extra, **layout), nproc=nproc)
    return read_evaluation(path)
