"""On a pretended GPU: every tensor lies where a device would want it, and no step waits for one.

A run ends at the first operation whose tensors lie in two places, so that it ends well says that
there is none. What the host waits for is counted in the last step of every rank.
"""

import math

import pytest

from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.array_runs import CLOCK, different, run_set
from tests.harness.pretended_gpu import ENV, steady_waits

PACKAGE = "megatron_moe_inject/"
DISPATCHES = (
    "megatron/core/transformer/moe/token_dispatcher.py",
    "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
)
"""Megatron's wait for the numbers of rows, in each forward pass of a layer of experts."""
NEEDED = {
    # How many rows of general tokens each expert has: the host sets the sizes of their products.
    (f"{PACKAGE}retention/experts.py", "ExpertRetention._hold"): DISPATCHES,
    # Of the step that ends, for the next one. Megatron waits for the gradient's norm right behind.
    (f"{PACKAGE}teachers/confidence.py", "RunningConfidence.end"): 1,
}
"""Where the package waits, and how often in a step: a number, or at most as often as that does."""


def of_package(waits):
    return {where: times for where, times in waits.items() if where[0].startswith(PACKAGE)}


def assert_no_wait_but(waits, *allowed):
    """The package waits nowhere else; these do, as often as ``NEEDED`` says."""
    own = of_package(waits)
    assert set(own) == set(allowed), own
    for where in allowed:
        bound = NEEDED[where]
        assert own[where] <= (bound if isinstance(bound, int) else waits[bound]), own


@pytest.fixture(scope="module")
def stock():
    """What Megatron waits for in a step without a recipe."""
    flags = lane.moe("--calculate-per-token-loss")
    run, on_cpu = (lane.run(flags, env=env) for env in (ENV, {"TESTS_DRAWN_ON_DEVICE": "1"}))
    assert different(run.iterations, on_cpu.iterations, {CLOCK}) == []
    return steady_waits(run.output)


def test_it_does_what_a_device_does():
    script = lane.HARNESS / "pretended_checks.py"
    run = lane.run([str(lane.free_port())], script=(str(script),))
    assert "all checks of the pretended GPU passed" in run.output


def test_stock_megatron_waits_and_the_plugin_without_a_recipe_does_not(stock):
    assert stock[DISPATCHES] > 0
    assert of_package(stock) == {}


@pytest.fixture(scope="module")
def run_of_set(material, llama, tmp_path_factory):
    def run(name, layout=None):
        folder = tmp_path_factory.mktemp("set")
        found = run_set(material, llama, folder, name, layout, env=ENV)
        ranks = array.LAYOUTS[layout].nproc if layout else 1
        return found, steady_waits(found.output, ranks)

    return run


SETS = {name: tuple(NEEDED) for name in array.SETS}
SETS["router"] = ()


@pytest.mark.parametrize(("name", "layout"), [("router", None), ("rows", "pp2")])
def test_features_of_the_array(run_of_set, stock, name, layout):
    run, waits = run_of_set(name, layout)
    assert all(math.isfinite(loss) for loss in run.losses("total loss"))
    allowed = [w for w in NEEDED if w in waits]
    assert_no_wait_but(waits, *allowed)
    others = {where for where in waits if where not in of_package(waits)}
    assert others <= set(stock), others - set(stock)
