"""What the loss hook makes of what changes the output layer, without a training run.

Shapes: s sequence, b batch, h hidden, v vocabulary.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.loss_hook import LossHook
from megatron_moe_inject.losses import TermWeights
from megatron_moe_inject.losses.objective import SampleGroup
from megatron_moe_inject.losses.report import LossReport

S, B, H, V = 5, 2, 6, 16
COLUMNS = torch.tensor([1, 4, 7])
SCALE = 2.0


class _Teachers:
    """General samples alone, without the original model."""

    def groups(self, micro_batch, domains, labels, weights, head):
        return [SampleGroup(range(len(domains)), weights[GENERAL])]


class _Run:
    """A hook on a layer, and one micro-batch."""

    def __init__(self, masked_sum=True):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.layer = torch.nn.Linear(H, V, bias=False).requires_grad_(False)
        self.hidden = normal(S, B, H).requires_grad_()
        self.values = normal(len(COLUMNS), H).requires_grad_()
        self.a, self.b = normal(3, H).requires_grad_(), normal(V, 3).requires_grad_()
        self.labels = torch.randint(0, V, (B, S), generator=generator)
        self.mask = (normal(B, S) > -0.5).float()
        self.seam = SimpleNamespace(process=None, head_rows=None, head_low_rank=None)
        self.hook = LossHook(
            self.seam,
            lambda iteration: {GENERAL: TermWeights(0.0, 1.0)},
            _Teachers(),
            LossReport([], [], by_class=False),
            tp_group=SimpleNamespace(size=lambda: 1),
            valid_vocab_size=V,
            masked_sum=masked_sum,
        )

    def loss(self, loss_func):
        """What the script's loss function makes of a training step's micro-batch."""
        labels = torch.full((1, B), GENERAL)
        step = SimpleNamespace(
            labels=labels, iteration=0, forward_step=lambda: (self._output(), loss_func)
        )
        self.hook.begin(step)
        output, wrapped = step.forward_step()
        return wrapped(output)[0]

    def _output(self):
        return self.seam.process(
            hidden_states=self.hidden,
            output_layer=self.layer,
            output_weight=None,
            labels=self.labels,
            loss_mask=self.mask,
            config=SimpleNamespace(
                params_dtype=torch.float32,
                sequence_parallel=False,
                gradient_accumulation_fusion=True,
            ),
        )

    def masked(self, output):
        """Megatron's own loss function."""
        loss = (output * self.mask).sum()
        return loss, self.mask.sum(), {"lm loss": loss.detach()}

    def expected(self, weight):
        logits = self.hidden @ weight.t()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(0, 1).flatten(0, 1), self.labels.flatten(), reduction="none"
        )
        return (loss * self.mask.flatten()).sum()


@pytest.mark.parametrize("masked_sum", [True, False])
@pytest.mark.parametrize("change", ["none", "rows", "low rank", "both"])
def test_the_head_is_that_of_the_seam(change, masked_sum):
    run = _Run(masked_sum)
    weight, leaves = run.layer.weight.detach(), [run.hidden]
    run.seam.head_rows = lambda: None  # the layer's own rows are in force
    if change in ("rows", "both"):
        run.seam.head_rows = lambda: (COLUMNS, run.values)
        weight = weight.index_copy(0, COLUMNS, run.values)
        leaves.append(run.values)
    if change in ("low rank", "both"):
        run.seam.head_low_rank = lambda: (run.a, run.b, SCALE)
        weight = weight + SCALE * run.b @ run.a
        leaves += [run.a, run.b]
    expected = run.expected(weight)
    wanted = torch.autograd.grad(expected, leaves)
    loss = run.loss(run.masked)
    torch.testing.assert_close(loss, expected)
    for found, gradient in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_a_loss_function_of_another_kind_is_told_what_to_set():
    def squared(output):
        loss = (output**2 * run.mask).sum()
        return loss, run.mask.sum(), {"lm loss": loss.detach()}

    run = _Run()
    run.seam.head_rows = lambda: (COLUMNS, run.values)
    with pytest.raises(ValueError, match=r"set objective.masked_sum: false"):
        run.loss(squared)
    run = _Run(masked_sum=False)
    run.seam.head_rows = lambda: (COLUMNS, run.values)
    weight = run.layer.weight.index_copy(0, COLUMNS, run.values)
    found = torch.autograd.grad(run.loss(squared), run.values)[0]
    losses = torch.nn.functional.cross_entropy(
        (run.hidden @ weight.t()).transpose(0, 1).flatten(0, 1),
        run.labels.flatten(),
        reduction="none",
    )
    wanted = torch.autograd.grad((losses**2 * run.mask.flatten()).sum(), run.values)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
