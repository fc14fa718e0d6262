"""Options of the objective through the real ``pretrain()``."""

import re

import pytest

from tests.harness import lane
from tests.harness.injection import CE_ONLY, RECIPE, inject, recipe_file
from tests.harness.material import EVALUATES, student_flags

RAMP = RECIPE.replace("alpha: 0.7", "alpha: {{points: {{1: 0.0, 5: 1.0}}}}")
WEIGHTED = RECIPE.replace(
    "temperature: 2.0", "divergence: jsd, jsd_beta: 0.3, confidence: label, skip_worse: true"
)


def _share(step) -> float:
    """Of the tokens, those of the domain."""
    gap = step["lm loss/general"] - step["lm loss/code"]
    return (step["lm loss/general"] - step["lm loss"]) / gap


def test_a_scheduled_weight_follows_the_iteration(material):
    whole = inject(material, RAMP, nproc=2, ep=2, extra=("--train-iters", "6"))
    for number, step in enumerate(whole.iterations):
        alpha = min(max(number - 1, 0) / 4, 1.0)
        expected = 0.3 * step["lm loss"] + alpha * _share(step) * step["kd loss"]
        assert step["total loss"] == pytest.approx(expected, rel=1e-4)


TOLD = """
import functools

from megatron_moe_inject import loss_hook
from megatron_moe_inject.host import gpt_entry
from megatron_moe_inject.evaluation import measurement
from megatron_moe_inject.teachers import confidence


def tell(module, name):
    stock = getattr(module, name)

    @functools.wraps(stock)
    def told(*args, **kwargs):
        kernels = kwargs["kernels"] if "kernels" in kwargs else args[-1].kernels
        print(f"kernels of {module.__name__}:", kernels, flush=True)
        return stock(*args, **kwargs)

    setattr(module, name, told)


tell(loss_hook, "injection_loss")
tell(measurement, "measure_tokens")
tell(confidence, "target_confidence")
gpt_entry.main()
"""


def test_all_that_goes_through_logits_is_told_which_kernels(material, tmp_path):
    script = tmp_path / "told_gpt.py"
    script.write_text(TOLD)
    recipe = recipe_file(material, RECIPE + "evaluation: {{}}\n")
    steering = (
        f"evaluation.file={tmp_path / 'evaluation.json'}",
        "train.router=true",
        "steering.coeff=0.1",
        "steering.confidence=label",
    )
    flags = material.flags(*EVALUATES, "--inject-recipe", recipe, "--inject-set", *steering)
    for fields, told in (((), "auto"), (("objective.kernels=torch",), "None")):
        output = lane.run([*flags, *fields], script=(str(script),)).output
        found = set(re.findall(r"^kernels of megatron_moe_inject\.(.*)$", output, re.M))
        places = ("loss_hook", "evaluation.measurement", "teachers.confidence")
        assert found == {f"{place}: {told}" for place in places}


def test_weighted_tokens_count_less(material):
    plain = inject(material, WEIGHTED.replace("label", "none").replace("true", "false"))
    one = inject(material, WEIGHTED)
    assert all(0 < step["kd factor"] < 0.9 for step in one.iterations)
    assert "kd factor" not in plain.iterations[0]
    assert one.losses("kd loss")[0] == pytest.approx(plain.losses("kd loss")[0], rel=1e-6)
    assert one.losses("total loss")[0] < plain.losses("total loss")[0]


def test_logits_that_the_student_scales_are_scaled_in_our_loss_as_well(material):
    """MuP: cross-entropy alone, everything training, must stay stock training."""
    mup = ("--use-mup", "--mup-base-hidden-size", "16", "--vocab-size", "64")
    fresh = student_flags(*material.blend, *mup, "--train-iters", "3")
    stock = lane.run(fresh)
    anew = ("--inject-from-scratch", "--inject-recipe", recipe_file(material, CE_ONLY))
    ours = lane.run([*fresh, *anew])
    assert ours.losses("lm loss") == pytest.approx(stock.losses("lm loss"), rel=2e-5)
    assert ours.losses("grad norm") == pytest.approx(stock.losses("grad norm"), rel=2e-4)
