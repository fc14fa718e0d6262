"""What ``fused_linear_distillation`` refuses, with the values in the message.

Shapes: t tokens, h student hidden, h_t teacher hidden, k stored ids per token, v vocabulary, p
tensor-parallel size.
"""

from torch import Tensor

from megatron_moe_inject.losses.committee import Committee
from megatron_moe_inject.losses.sparse import check_stored, check_tail


def may_be_nonzero(weight: float | Tensor) -> bool:
    """Whether a weight is anything but the number 0."""
    return isinstance(weight, Tensor) or weight != 0


def check_student(hidden, weight, **per_token) -> None:
    """Raise ValueError unless the tensors are [t, h], [v/p, h] and what is per token [t]."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"student_hidden {tuple(hidden.shape)} and student_weight {tuple(weight.shape)} "
            "must be [t, h] and [v/p, h]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"student_hidden is {hidden.dtype} and student_weight {weight.dtype}; use one dtype"
        )
    for name, value in per_token.items():
        if isinstance(value, Tensor) and value.shape != hidden.shape[:1]:
            raise ValueError(
                f"{name} {tuple(value.shape)} must be [t], t={len(hidden)} as in student_hidden"
            )


def check_teacher(hidden, weight, teacher_hidden, teacher_weight, alpha, weighting) -> None:
    """Raise ValueError unless the teacher's are [t, h_t] and [v/p, h_t], or absent and unused."""
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("give teacher_hidden and teacher_weight together, or neither")
    if teacher_hidden is None:
        if weighting:
            raise ValueError(f"{weighting} weighs distillation, so a teacher must be given")
        if may_be_nonzero(alpha):
            raise ValueError(
                "alpha is not the number 0, so teacher_hidden and teacher_weight must be given"
            )
        return
    _check_teacher_shapes(hidden, weight, teacher_hidden, teacher_weight)


def check_committee(hidden, weight, teacher_hidden, committee: Committee) -> None:
    """Raise ValueError unless a committee stands alone and each of its teachers fits."""
    if teacher_hidden is not None:
        raise ValueError("give teacher_hidden and teacher_weight or committee, not both")
    for member in committee.members:
        _check_teacher_shapes(hidden, weight, member.hidden, member.head)


def _check_teacher_shapes(hidden, weight, teacher_hidden, teacher_weight) -> None:
    expected = (len(hidden), len(weight))
    if (len(teacher_hidden), len(teacher_weight)) != expected or (
        teacher_hidden.shape[1:] != teacher_weight.shape[1:]
    ):
        raise ValueError(
            f"teacher_hidden {tuple(teacher_hidden.shape)} and teacher_weight "
            f"{tuple(teacher_weight.shape)} must be [t, h_t] and [v/p, h_t] with t={expected[0]} "
            f"and v/p={expected[1]}; pad the teacher's rows to the student's vocabulary shard and "
            "set valid_vocab_size"
        )
    if teacher_hidden.dtype != teacher_weight.dtype:
        raise ValueError(
            f"teacher_hidden is {teacher_hidden.dtype} and teacher_weight {teacher_weight.dtype}; "
            "use one dtype"
        )


def check_sparse_teacher(hidden, teacher_hidden, sparse, kind, weighting) -> None:
    """Raise ValueError unless a stored teacher [t, k] stands alone and fits the kind."""
    if teacher_hidden is not None:
        raise ValueError("give teacher_hidden and teacher_weight or sparse_teacher, not both")
    if weighting:
        raise ValueError(f"{weighting} needs a teacher's whole vocabulary, not a sparse_teacher")
    check_tail(kind, sparse.tail)
    check_stored(hidden, sparse.ids, sparse.log_probs)
