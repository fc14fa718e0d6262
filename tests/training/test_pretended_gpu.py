"""On a pretended GPU: every tensor lies where a device would want it, and no step waits for one.

A run ends at the first operation whose tensors lie in two places, so that it ends well says that
there is none. What the host waits for is counted in the last step of every rank.
"""

import functools
import math

import pytest

from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.array_runs import CLOCK, different, run_set
from tests.harness.newer_features import NEWER, make
from tests.harness.pretended_gpu import ENV
from tests.harness.pretended_gpu.reports import steady_waits
from tests.harness.pretended_gpu.rules import DISPATCHES, NEEDED

PACKAGE = "megatron_moe_inject/"
IN_TRANSFORMERS = {("transformers/masking_utils.py", "find_packed_sequence_indices")}
"""Whether documents are packed, asked in each forward pass of a teacher from Hugging Face."""


def of_package(waits):
    return {where: times for where, times in waits.items() if where[0].startswith(PACKAGE)}


def assert_no_other_wait(waits, stock):
    """Of the package those of ``NEEDED``, so often; of others those that stock Megatron has."""
    own = of_package(waits)
    assert set(own) <= set(NEEDED), own
    for where, times in own.items():
        bound = NEEDED[where]
        assert times <= (bound if isinstance(bound, int) else waits[bound]), own
    others = waits.keys() - own.keys() - IN_TRANSFORMERS
    assert others <= stock.keys(), others - stock.keys()


@pytest.fixture(scope="module")
def stock():
    """By layout, what Megatron waits for in a step without a recipe; its numbers are the lane's."""

    @functools.cache
    def at(layout=None):
        row = array.LAYOUTS[layout] if layout else array.Layout()
        flags = lane.moe("--num-layers", "4", *row.flags, **row.sizes)
        flags = [flag for flag in flags if flag != "--use-cpu-initialization"]
        run, on_lane = (lane.run(flags, nproc=row.nproc, env=env) for env in (ENV, {}))
        assert different(run.iterations, on_lane.iterations, {CLOCK}) == []
        return steady_waits(run.output, row.nproc)

    return at


def test_it_does_what_a_device_does():
    script = lane.HARNESS / "pretended_gpu" / "checks.py"
    run = lane.run([str(lane.free_port())], script=(str(script),))
    assert "all checks of the pretended GPU passed" in run.output


def test_without_a_recipe_megatron_alone_waits(stock):
    assert stock()[DISPATCHES] > 0
    assert of_package(stock()) == {}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("router", None),
        pytest.param("rows", "pp2", marks=pytest.mark.slow),
        pytest.param("everything", "ep2", marks=pytest.mark.slow),
        pytest.param("router", "tp2-sp", marks=pytest.mark.slow),
        pytest.param("rows, imitation", "cp2", marks=pytest.mark.slow),
        pytest.param("hybrid", "pp2-vpp2", marks=pytest.mark.slow),
        pytest.param("router, fp8", "dp2, distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_features_of_the_array(material, llama, tmp_path, stock, name, layout):
    run = run_set(material, llama, tmp_path, name, layout, env=ENV, flags=("--train-iters", "2"))
    assert all(math.isfinite(loss) for loss in run.losses("total loss"))
    waits = steady_waits(run.output, array.LAYOUTS[layout].nproc if layout else 1)
    assert_no_other_wait(waits, stock(layout))


QUICK = ("aligned teacher", "teacher with experts")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NEWER]
)
def test_what_has_not_run_on_a_gpu(material, stock, name):
    """The runs of ``tests/gpu/test_features.py``; what is for a GPU alone is left out."""
    run = lane.run(make(material.folder, [name]).flags(name), env=ENV)
    for term in NEWER[name].terms:
        assert math.isfinite(run.losses(term)[-1]), term
    assert_no_other_wait(steady_waits(run.output), stock())
