"""A class that some steps have nothing of, in Megatron's line, TensorBoard and a run's list."""

import json
import re

import pytest

from megatron_moe_inject.evaluation.report.run_file import Step, read_run
from tests.harness.injection import RECIPE, inject
from tests.harness.runner import PREFIX

RARE = (
    RECIPE.replace("beta: 0.3", "beta: 0.3, gamma: 2.0")
    + "mixing: {{general: 0.06}}\nevaluation: {{gate: false}}\n"
)
CLASS = ("lm loss/general", "retention loss")
SHARE = "data share/general"


def rare(material, *extra, **options):
    """Ten steps of 4 samples, one or none of them general."""
    flags = ("--train-iters", "10", "--global-batch-size", "4", "--eval-iters", "1")
    flags += ("--save-interval", "100", *extra)
    blend = ("--data-path", material.general, material.domain)
    return inject(material, RARE, extra=(*blend, *flags), **options)


def exact(run):
    """What each step had by itself; Megatron's second line has the first step in it too."""
    lines = [x.removeprefix(PREFIX) for x in run.output.splitlines() if x.startswith(PREFIX)]
    return [step for step in map(json.loads, lines) if "iteration" in step]


def expected(steps, name):
    """Mean over the general tokens of some steps; None without one."""
    known = [(step[name], step[SHARE]) for step in steps if name in step]
    assert all((name in step) == (step[SHARE] > 0) for step in steps)
    return sum(v * c for v, c in known) / sum(c for _, c in known) if known else None


@pytest.mark.parametrize("layout", [dict(), dict(nproc=2, ep=2)], ids=["one", "dp2"])
def test_means_are_over_tokens_and_nothing_stands_where_there_were_none(material, tmp_path, layout):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    by_step = exact(rare(material, "--save", str(tmp_path / "a"), **layout))
    with_some = [step["iteration"] for step in by_step if step[SHARE] > 0]
    assert 0 < len(with_some) < len(by_step)
    board = tmp_path / "board"
    run = rare(
        material,
        *("--log-interval", "5", "--save", str(tmp_path / "b")),
        *("--tensorboard-dir", str(board), "--tensorboard-log-interval", "2"),
        **layout,
    )
    printed = {
        int(found[1]): dict(re.findall(r"([^|:]+): ([-+.\dE]+) \|", found[2]))
        for found in re.finditer(r"iteration\s+(\d+)/\s*\d+ \|(.*)", run.output)
    }
    listed = {
        line.iteration: line.terms
        for line in read_run(tmp_path / "b" / "inject_run.jsonl")
        if isinstance(line, Step)
    }
    events = accumulator.EventAccumulator(str(board)).Reload()
    for name in CLASS:
        scalars = {event.step: event.value for event in events.Scalars(name)}

        def check(found, first, last, name=name):
            wanted = expected(by_step[first - 1 : last], name)
            where = (name, first, last)
            assert found == (wanted and pytest.approx(wanted, rel=1e-4, abs=1e-7)), where

        for first, last in ((1, 1), (1, 5), (6, 10)):
            own = {key.strip(): float(value) for key, value in printed[last].items()}
            check(own.get(name), first, last)
        for first, last in ((1, 1), (2, 5), (6, 10)):
            check(listed[last].get(name), first, last)
        for last in range(2, 11, 2):
            check(scalars.get(last), last - 1, last)
