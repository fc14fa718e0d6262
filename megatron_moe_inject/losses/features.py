"""Losses between states of the student and of the teacher, one number per token.

Shapes: t tokens (any leading shape), h_t teacher hidden.

The student's states come through a projection to the teacher's width where the widths differ.
``normalized`` is the squared error in units of the teacher's own size, so that layers whose states
grow along the residual stream weigh alike; ``mse`` is FitNets' hint loss (1412.6550) and is
dominated by the few channels in which transformers keep their largest activations; ``cosine``
leaves the length of the states free (DistilBERT, 1910.01108).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe_inject.losses.kinds import FEATURE_LOSSES

_TINY = 1e-12


def feature_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Distance of ``student`` [..., h_t] from ``teacher`` [..., h_t], [...] in float32.

    - ``mse``: mean over channels of the squared difference.
    - ``cosine``: 1 - cosine of the angle; 1 where one of them is zero.
    - ``normalized``: squared length of the difference over the squared length of the teacher's.

    All three are 0 at student = teacher. float64 input is computed and returned in float64.
    ``teacher`` is a constant.

    Raises:
        ValueError: another kind, or shapes that differ.
    """
    if kind not in FEATURE_LOSSES:
        known = ", ".join(FEATURE_LOSSES)
        raise ValueError(f"kind={kind!r} is no feature loss; use one of {known}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if kind == "cosine":
        lengths = student.square().sum(-1) * teacher.square().sum(-1)
        return 1 - (student * teacher).sum(-1) * (lengths + _TINY**2).rsqrt()
    error = (student - teacher).square()
    if kind == "mse":
        return error.mean(-1)
    return error.sum(-1) / teacher.square().sum(-1).clamp(min=_TINY)


def proportional_layer(student_layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher's 0-based layer at the same relative depth: last to last, rounded half up."""
    depth = (student_layer + 1) * teacher_layers / student_layers
    return min(max(int(depth + 0.5), 1), teacher_layers) - 1
