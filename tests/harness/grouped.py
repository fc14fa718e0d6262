"""Runs of grouped experts around a stand-in for Transformer Engine's grouped linear layer."""

from tests.harness import lane
from tests.harness.injection import RECIPE, recipe_file

SCRIPT = (str(lane.HARNESS / "grouped_gpt.py"),)
TWO_OF_FOUR = RECIPE.replace("{{2: [3], 3: [3]}}", "{{2: [0, 3], 3: [1]}}")
GROUPED = ("--moe-grouped-gemm",)


def grouped(material, *extra, nproc=1, recipe=TWO_OF_FOUR, env=None, **layout):
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags(*ours, *GROUPED, *extra, **layout)
    return lane.run(flags, nproc=nproc, script=SCRIPT, env=env)
