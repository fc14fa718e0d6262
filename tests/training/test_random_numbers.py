"""Routers that draw random numbers in eval mode too: training goes on as if nothing had run beside.

The original's pass runs in every step with weight 0, and each step is evaluated.
"""

import pytest

from tests.harness.injection import inject
from tests.harness.material import EVALUATES

PLAIN = """
domains:
  - {{name: code, data: [1], experts: {{layers: {{1: [0], 3: [3]}}}}}}
objective: {{alpha: 0.0, beta: 1.0, gamma: {gamma}}}
"""
BESIDE = PLAIN.replace("{gamma}", "{{points: {{0: 0.0, 8: 0.0, 9: 1.0}}}}") + "evaluation: {{}}\n"


DROPOUT = ("--hidden-dropout", "0.1")


@pytest.fixture(scope="module")
def quiet(material):
    """Losses with dropout and without, where no router draws numbers."""
    recipe = PLAIN.replace("{gamma}", "0.0")
    return [inject(material, recipe, extra=extra).losses("lm loss") for extra in (DROPOUT, ())]


@pytest.mark.parametrize(
    "noise",
    [("--moe-input-jitter-eps", "0.3"), ("--moe-router-force-load-balancing",)],
    ids=["jitter", "forced"],
)
def test_neither_gammas_pass_nor_evaluation_leaves_a_trace(material, quiet, tmp_path, noise):
    # Of both, as the loader of held-out text draws a number itself when training starts.
    noise = (*noise, *DROPOUT, *EVALUATES)
    plain = inject(material, PLAIN.replace("{gamma}", "0.0"), extra=noise)
    file = ("--inject-set", f"evaluation.file={tmp_path / 'list.jsonl'}", "--eval-interval", "1")
    beside = inject(material, BESIDE, extra=(*noise, *file))
    assert len(beside.evaluations) > 3
    assert beside.losses("lm loss") == pytest.approx(plain.losses("lm loss"), rel=1e-6)
    assert beside.losses("grad norm") == pytest.approx(plain.losses("grad norm"), rel=1e-6)
    # The original's pass did run, in each of the four steps, and its weight was 0.
    assert len(beside.iterations) == 4
    assert all(step["retention loss"] > 0 for step in beside.iterations)
    assert "retention loss" not in plain.iterations[0]
    # And random numbers do change the losses, the routers' and those of dropout.
    first = {round(losses[0], 5) for losses in (plain.losses("lm loss"), *quiet)}
    assert len(first) == 3
