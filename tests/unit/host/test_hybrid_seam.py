"""The loss seam of a hybrid model: which of its last calls are the main loss's."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.host.loss_seam import LossSeam

LABELS = torch.tensor([[1, 2]])


class Head(torch.nn.Module):
    """An output layer whose logits are its states."""

    def forward(self, input_, weight=None, runtime_gather_output=None):
        return input_, None


class Hybrid(torch.nn.Module):
    """The end of Megatron's ``HybridModel.forward``: each depth's states are its number."""

    def __init__(self, depths):
        super().__init__()
        self.output_layer = Head()
        self.config = SimpleNamespace(mtp_num_layers=depths or None)
        self.mtp_process = depths > 0
        self.losses = []

    def compute_language_model_loss(self, labels, logits):
        self.losses.append(logits.clone())
        return logits + 100

    def forward(self, tokens, *, labels=None, loss_mask=None, compute_mtp_loss=True):
        if self.mtp_process and compute_mtp_loss:
            for depth in range(self.config.mtp_num_layers):
                logits, _ = self.output_layer(torch.full((1,), depth + 1.0), weight=None)
                self.compute_language_model_loss(labels, logits)
        logits, _ = self.output_layer(tokens, weight=None, runtime_gather_output=None)
        return logits if labels is None else self.compute_language_model_loss(labels, logits)


def process(**given):
    assert given["labels"] is LABELS
    assert given["loss_mask"] == "mask"
    return given["hidden_states"] + 1000


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("predicts", [True, False])
def test_the_last_loss_is_the_processors_and_predictions_are_stocks(depths, predicts):
    model = Hybrid(depths)
    seam, tokens = LossSeam(model), torch.zeros(1)
    given = {"labels": LABELS, "loss_mask": "mask", "compute_mtp_loss": predicts}
    for _ in range(2):
        model.losses.clear()
        with seam.using(process):
            assert model(tokens, **given) == 1000
        assert model.losses == [n + 1.0 for n in range(depths) if predicts]
    assert model(tokens, **given) == 100
    with seam.using(process):
        assert model(tokens) == 0


def test_a_forward_that_takes_an_output_processor_is_given_it():
    class Newer(Hybrid):
        def forward(self, tokens, *, labels=None, loss_mask=None, output_processor=None):
            if output_processor is None:
                return tokens
            return output_processor(hidden_states=tokens, labels=labels, loss_mask=loss_mask)

    model = Newer(1)
    seam, tokens = LossSeam(model), torch.zeros(1)
    with seam.using(process):
        assert model(tokens, labels=LABELS, loss_mask="mask") == 1000
        assert model(tokens) == 0
    assert model(tokens, labels=LABELS) == 0
    untouched = inspect.getattr_static(type(model.output_layer), "forward")
    assert model.output_layer.forward.__func__ is untouched
