"""The tests of the covering array, for the sets that a subclass names.

``tests/training/test_array_*.py`` are these tests, with the sets of each; every file is one
process's share of the suite (``pytest --dist loadfile``).
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import pytest

from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.experts.choose.profile_file import read_profile
from tests.harness import covering_array as array
from tests.harness.array_runs import (
    CLOCK,
    STEPS,
    assert_same_routing,
    decided,
    different,
    reference_of,
)
from tests.harness.evaluating import assert_same
from tests.harness.injection import PROVEN

SGD = ("--optimizer", "sgd", "--lr", "0.5")
"""Of slow layouts: their ranks sum gradients up in other orders, of which Adam makes more than
rounding where they are small."""


class ArrayTests:
    """What each set has to show; ``sets`` names those of a subclass."""

    sets: ClassVar[tuple[str, ...]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Rows and resumed runs of the sets, those of slow layouts marked so."""
        if "flags" in metafunc.fixturenames:
            cases = [
                pytest.param(
                    *(run.layout, run.name, run.flags),
                    id=f"{run.name}: {' '.join((run.layout, *run.flags))}",
                    marks=_marks(run.slow),
                )
                for run in array.RESUMED
                if run.name in self.sets
            ]
            metafunc.parametrize(("layout", "name", "flags"), cases)
        elif "layout" in metafunc.fixturenames:
            cases = [
                pytest.param(
                    layout, name, id=f"{name}: {layout}", marks=_marks(array.is_slow(layout, name))
                )
                for layout, name in array.ROWS
                if name in self.sets
            ]
            metafunc.parametrize(("layout", "name"), cases)
        else:
            metafunc.parametrize("name", self.sets)

    def test_a_layout_gives_what_one_process_gives(self, known_run, layout, name):
        """Not one choice of an expert, no term and no evaluation differs; nothing frozen moves."""
        at = array.LAYOUTS[layout]
        if array.is_slow(layout, name) and "--use-distributed-optimizer" not in at.flags:
            known_run = functools.partial(known_run, flags=SGD)
        one, one_folder = reference_of(known_run, name, layout)
        run, folder = known_run(name, layout)
        assert bool(PROVEN.search(run.output)) is array.SETS[name].freezes
        assert_same_routing(*(read_profile(path / "profile.json") for path in (folder, one_folder)))
        assert len(run.iterations) == STEPS
        logs = [decided(log.iterations) for log in (run, one)]
        assert different(*logs, {CLOCK}, rel=2e-5, abs=1e-6) == []
        assert len(run.evaluations) > 0
        assert different(run.evaluations, one.evaluations, {CLOCK}, rel=2e-5, abs=1e-6) == []
        ours, theirs = (read_list(path / "evaluation.jsonl") for path in (folder, one_folder))
        assert [measured.provenance.iteration for measured in ours] == [0, 2, 4]
        for measured, expected in zip(ours, theirs, strict=True):
            assert_same(measured, expected, rtol=2e-5)

    def test_each_feature_of_a_set_shows_in_the_log(self, known_run, name):
        """Or it has no term of its own."""
        last = known_run(name)[0].iterations[-1]
        terms = {
            term for feature in array.SETS[name].features for term in array.FEATURES[feature].terms
        }
        assert len(terms) > 8
        assert terms <= last.keys()
        assert {
            term for term in terms if not (math.isfinite(last[term]) and last[term] > 0)
        } == set()

    def test_a_resumed_run_goes_on_bitwise(self, known_run, stopped_run, layout, name, flags):
        """One that was stopped after two steps, as if nothing had happened."""
        whole, folder = known_run(name, layout, flags=flags)
        run, own = stopped_run(name, layout, flags=flags)
        assert bool(PROVEN.search(run.output)) is array.SETS[name].freezes
        assert [step["iteration"] for step in run.iterations] == [3, 4]
        assert different(run.iterations[:1], whole.iterations[2:3], {CLOCK}) == []
        # Megatron's second line of a run has its first one's sum, too.
        assert (
            different(run.iterations[1:], whole.iterations[3:], {CLOCK, "load_balancing_loss"})
            == []
        )
        ours, theirs = (read_list(path / "evaluation.jsonl") for path in (own, folder))
        assert [measured.provenance.iteration for measured in ours] == [0, 2, 4]
        for measured, expected in zip(ours, theirs, strict=True):
            assert_same(measured, expected, rtol=0)


def _marks(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if slow else []
