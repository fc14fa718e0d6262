"""What is wrong with an evaluation ends a run before its first step, or when all is saved."""

from types import SimpleNamespace

import pytest

from megatron_moe_inject.evaluation import training_evaluator
from megatron_moe_inject.evaluation.evaluator import Evaluator
from megatron_moe_inject.evaluation.training_evaluator import TrainingEvaluator
from megatron_moe_inject.host.errors import (
    RecipeError,
)


@pytest.fixture
def evaluator(monkeypatch):
    """Each of whose evaluations goes wrong."""

    def measured(self, collected, iteration):
        raise RecipeError(f"evaluation: loss of code is not finite at iteration {iteration}")

    monkeypatch.setattr(Evaluator, "measured", measured)
    monkeypatch.setattr(training_evaluator, "dist", SimpleNamespace(get_rank=lambda: 0))
    found = object.__new__(TrainingEvaluator)
    found._failed = None
    return found


def test_before_training_it_is_an_error(evaluator):
    evaluator._training = False
    with pytest.raises(RecipeError, match="at iteration 0"):
        evaluator.measured(None, 0)
    evaluator.finish()


def test_in_training_it_is_said_and_the_first_is_the_error_of_the_end(evaluator, capsys):
    evaluator._training = True
    for iteration in (2, 4):
        evaluator.measured(None, iteration)
        assert f"warning: evaluation: loss of code is not finite at iteration {iteration}" in (
            capsys.readouterr().out
        )
    with pytest.raises(RecipeError, match="at iteration 2"):
        evaluator.finish()
