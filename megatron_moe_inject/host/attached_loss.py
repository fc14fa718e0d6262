"""How a loss inside the model joins the step: attached to a tensor, scaled, reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    """Passes a tensor on and adds a loss, whose gradient is ``scale``, to the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None


def attach_loss(tensor: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """``tensor``, with ``scale * loss`` added to whatever is minimised through it.

    The idea of Megatron's ``MoEAuxLossAutoScaler``, with the scale as an argument. The result is a
    view of ``tensor``.

    Args:
        tensor: a state on the way to the loss; it must require grad for the loss to be seen.
        loss: scalar.
        scale: scalar, a constant.
    """
    return _Attach.apply(tensor, loss, scale)


def step_scale(
    config: Any, groups: Any, tokens: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """What makes a sum over this rank's tokens one over the tokens of the step, a scalar.

    Megatron averages gradients over data- and context-parallel ranks, those of experts too; with
    ``calculate_per_token_loss`` it sums them and divides by all tokens whose loss counts.

    Args:
        config: the student's ``TransformerConfig``.
        groups: its ``ProcessGroupCollection``.
        tokens: those of the step whose loss counts, over all data- and context-parallel ranks.
        device: of the result.
    """
    scale = loss_scale(config, device)
    return scale * (tokens if config.calculate_per_token_loss else groups.dp_cp.size())


def loss_scale(config: Any, device: torch.device) -> torch.Tensor:
    """The optimizer's loss scale, a scalar; 1 where there is none, and where nothing trains."""
    scale = torch.ones((), device=device)
    if config.grad_scale_func is not None and torch.is_grad_enabled():
        scale = config.grad_scale_func(scale).detach().view(())
    return scale


_OWN = "megatron_moe_inject"
"""Our terms in the report of a micro-batch, a dictionary beside Megatron's values."""


_OF_STEP = "megatron_moe_inject step"
"""In the first report, our terms of a whole step."""


def sum_and_count(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """A report value, ``[2]``, from two scalars; what is logged is a quotient of sums of them."""
    return torch.stack([total, count])


def add_reports(reports: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Add terms of a whole step, ``[sum, count]`` each, to the reports of its micro-batches.

    Args:
        reports: what a schedule returned; anything but a list of dictionaries (other stages, or
            collected outputs) is left alone.
        values: counted once.
    """
    if reports and _are_reports(reports):
        reports[0].setdefault(_OF_STEP, {}).update(values)


def take_terms(reports: Any) -> tuple[list[str], torch.Tensor | None]:
    """Take our terms out of the reports of a step: K names, and their sums ``[K, 2]`` in fp32.

    Args:
        reports: as for ``add_reports``; without any there are no terms.
    """
    if not (reports and _are_reports(reports)):
        return [], None
    reported = [report.pop(_OWN, {}) for report in reports]
    of_step = reports[0].pop(_OF_STEP, {})
    assert all(list(terms) == list(reported[0]) for terms in reported), (
        "micro-batches report other terms"
    )
    sums = []
    if reported[0]:
        sums.append(torch.stack([v for terms in reported for v in terms.values()]).float())
        sums[0] = sums[0].view(len(reported), -1, 2).sum(0)
    if of_step:
        sums.append(torch.stack(list(of_step.values())).float())
    return [*reported[0], *of_step], torch.cat(sums) if sums else None


def _are_reports(reports: Any) -> bool:
    return isinstance(reports, list) and all(isinstance(report, dict) for report in reports)
