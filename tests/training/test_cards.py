"""Verification cards: each model of ``examples/models``, small, on its way by its own scripts.

From a Hugging Face folder to Megatron, with transformers' logits at every layout; ten steps with a
teacher; nothing frozen has moved; a folder again that transformers loads. What comes out is held
against the model's ``card.yaml``.
"""

import pytest

from tests.harness.cards import CHECKS, Card
from tests.harness.model_chain import ModelChain
from tests.harness.model_scripts import NAMES

IN_EVERY_RUN = {"qwen3_30b_a3b"}
MODELS = [
    pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in NAMES
]


@pytest.fixture(scope="module", params=MODELS)
def way(request, tmp_path_factory):
    card = Card.read(request.param)
    return card, ModelChain(request.param, card.tiny, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", CHECKS)
def test_what_the_card_says_comes_out_again(way, check):
    card, chain = way
    CHECKS[check].compare(CHECKS[check].measure(chain), card.run_here[check])
