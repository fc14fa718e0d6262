"""Injection runs through the real ``pretrain()``: the base recipe, layouts, one call for a run."""

import os
import re
import zlib
from collections.abc import Sequence

import pytest

from tests.harness import lane

RECIPE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{2: [3], 3: [3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, temperature: 2.0}}
"""
CE_ONLY = """
domains:
  - {{name: code, data: [1]}}
objective: {{alpha: 0.0, beta: 1.0}}
train:
  experts: all
  router: true
  attention: true
  norms: true
  embedding: true
  output_layer: true
"""
OTHER = os.environ.get("MEGATRON_OTHER")
TERMS = ("lm loss", "kd loss", "total loss", "lm loss/code", "lm loss/general", "grad norm")
PROVEN = re.compile(r"frozen check: \d+ frozen tensors on \d+ ranks bitwise unchanged")


def recipe_file(material, recipe: str = RECIPE) -> str:
    """``recipe`` with the material's teacher, as a file."""
    text = recipe.format(teacher=material.teacher)
    path = material.folder / f"recipe-{zlib.crc32(text.encode())}.yaml"
    path.write_text(text)
    return str(path)


def inject(
    material, recipe: str = RECIPE, *, nproc=1, extra=(), check=True, path=(), env=None, **layout
):
    """One run with ``recipe`` and the frozen check; later ``extra`` flags win."""
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags(*ours, *extra, **layout)
    return lane.run(flags, nproc=nproc, check=check, pythonpath=path, env=env)


LAYOUTS = {
    "ep2": dict(nproc=2, ep=2),
    "tp2-sp": dict(nproc=2, tp=2),
    "pp2": dict(nproc=2, pp=2),
    "cp2": dict(nproc=2, cp=2),
    "pp2-vpp2": dict(nproc=2, pp=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")),
    "full recompute": dict(
        extra=(
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        )
    ),
    "distributed optimizer, ep2": dict(nproc=2, ep=2, extra=tuple(lane.DISTRIBUTED_OPTIMIZER)),
    "selective recompute": dict(
        extra=(
            *("--recompute-granularity", "selective"),
            *("--recompute-modules", "core_attn", "moe"),
        )
    ),
    "teacher window, pp2": dict(nproc=2, pp=2, extra=("--inject-set", "teachers.coder.window=1")),
    "per-token loss": dict(extra=("--calculate-per-token-loss",)),
}
SLOW_LAYOUTS = {
    "tp2-pp2": dict(nproc=4, tp=2, pp=2),
    "tp2-ep2-dp2": dict(nproc=4, tp=2, ep=2),
    "pp2-vpp2-ep2": dict(
        nproc=4, pp=2, ep=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")
    ),
    "cp2-tp2": dict(nproc=4, cp=2, tp=2),
    "pp4": dict(nproc=4, pp=4),
    "tp4": dict(nproc=4, tp=4),
}


def every_layout(without: str = "nothing", slow: Sequence[str] = ()):
    """Parametrize ``layout`` by all layouts, those of four processes and ``slow`` ones slow."""
    quick = {k: v for k, v in LAYOUTS.items() if without not in k}
    marked = {**{k: quick.pop(k) for k in slow}, **SLOW_LAYOUTS}
    params = [pytest.param(v, id=k) for k, v in quick.items()]
    params += [pytest.param(v, id=k, marks=pytest.mark.slow) for k, v in marked.items()]
    return pytest.mark.parametrize("layout", params)


def assert_clean_end(run, fragments):
    """It ended before the first step, with one message of all ranks that has all ``fragments``."""
    assert run.returncode == 2, run.tail()
    assert "Traceback" not in run.output
    messages = {x for x in run.output.splitlines() if x.startswith("megatron_moe_inject: ")}
    assert len(messages) == 1
    for fragment in fragments:
        assert fragment in next(iter(messages))
    assert not run.iterations
