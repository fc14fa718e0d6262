"""``--overlap-moe-expert-parallel-comm``: the same numbers, bit for bit, in the same layout."""

import pytest

from tests.harness import lane
from tests.harness.injection import OTHER, PROVEN, RECIPE, inject
from tests.harness.material import make_material, student_flags

OVERLAP = ("--overlap-moe-expert-parallel-comm",)
LAYOUTS = {
    "ep2": dict(nproc=2, ep=2),
    "pp2-vpp2-ep2": dict(
        nproc=4, pp=2, ep=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")
    ),
}
EVERYTHING = (
    RECIPE.replace("{{2: [3], 3: [3]}}", "{{1: [0], 2: [1]}}").replace("beta: 0.3", "beta: 0.3, gamma: 1.0")
    + "steering: {{coeff: 0.05, target_mass: 0.5, retention: 0.1, confidence: domain}}\n"
    + "train: {{router: true, output_layer: true}}\n"
    + "retention: {{l2: 0.01}}\n"
)
NO_EXPERT = RECIPE + "train: {{experts: none, norms: true}}\n"
RECIPES = {
    "last expert rank": RECIPE,
    "first expert rank, everything": EVERYTHING,
    "no expert": NO_EXPERT,
    "last layer": RECIPE.replace("2: [3], 3: [3]", "3: [0]"),
}


def pair(material, recipe, layout, *extra, **options):
    """A run without the flag and one with it, in bf16, each with the frozen check."""
    given = dict(LAYOUTS[layout], **options)
    extra = ("--bf16", *given.pop("extra", ()), *extra)
    without = inject(material, recipe, extra=extra, **given)
    return without, inject(material, recipe, extra=(*extra, *OVERLAP), **given)


def assert_alike(without, overlapped):
    lane.same_runs(without, overlapped)
    for run in (without, overlapped):
        assert PROVEN.search(run.output)
    assert "kd loss" in overlapped.iterations[0]


@pytest.mark.parametrize("name", RECIPES)
def test_terms_and_gradients(material, name):
    assert_alike(*pair(material, RECIPES[name], "ep2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_virtual_stages(material, name):
    assert_alike(*pair(material, RECIPES[name], "pp2-vpp2-ep2"))
