"""Injection runs through the real ``pretrain()``: the base recipe, layouts, one call for a run."""

import copy
import os
import re
import zlib

from tests.harness import covering_array as array
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


_ENDED: dict[tuple, lane.Run] = {}


def inject(
    material, recipe: str = RECIPE, *, nproc=1, extra=(), check=True, path=(), env=None, **layout
):
    """One run with ``recipe`` and the frozen check; later ``extra`` flags win.

    A run that names no file or folder but the material's runs once in a test session: its numbers
    are those of the first time, bit for bit (``test_cpu_lane.py``).
    """
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags(*ours, *extra, **layout)
    environment = env or {}

    def run():
        return lane.run(flags, nproc=nproc, check=check, pythonpath=path, env=env)

    if any("/" in str(text) for text in (*extra, recipe, *path, *environment.values())):
        return run()
    key = (*map(str, flags), nproc, check, *environment.items())
    if key not in _ENDED:
        _ENDED[key] = run()
    return copy.deepcopy(_ENDED[key])


LAYOUTS = {
    name: dict(nproc=at.nproc, extra=at.flags, **at.sizes) for name, at in array.LAYOUTS.items()
}
"""Arguments of ``inject``, by the names of the covering array."""


def assert_clean_end(run, fragments):
    """It ended before the first step, with one message of all ranks that has all ``fragments``."""
    assert run.returncode == 2, run.tail()
    assert "Traceback" not in run.output
    messages = {x for x in run.output.splitlines() if x.startswith("megatron_moe_inject: ")}
    assert len(messages) == 1
    for fragment in fragments:
        assert fragment in next(iter(messages))
    assert not run.iterations
