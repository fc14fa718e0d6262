"""Whether a student, a target and the weights of a loss fit each other; errors show the values.

Each checks itself when it is made (``student.py``, ``target.py``, ``spec.py``); here is what only
shows where they meet. Nothing is read from a device.

Shapes: t tokens, h_t teacher hidden, k stored ids per token, v vocabulary, p tensor-parallel size.
"""

from torch import Tensor

from megatron_moe_inject.losses.spec import TermWeights
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.target import Aligned, Mixed, Sparse, Target


def may_be_nonzero(weight: float | Tensor) -> bool:
    """Whether a weight is anything but the number 0."""
    return isinstance(weight, Tensor) or weight != 0


def check_flat(student: Student) -> None:
    """Raise ValueError unless the student's tokens are in one dimension."""
    if student.hidden.dim() != 2:
        raise ValueError(
            f"student's hidden {tuple(student.hidden.shape)} must be [t, h] here: lay the tokens "
            "of student and target out flat, in one order"
        )


def check_per_token(student: Student, **values: float | Tensor | None) -> None:
    """Raise ValueError unless each value that is a tensor has one number for each token, [t]."""
    tokens = student.labels.shape
    for name, value in values.items():
        if isinstance(value, Tensor) and value.shape != tokens:
            raise ValueError(
                f"{name} {tuple(value.shape)} must be [t], t={len(student.hidden)} as in the "
                "student's hidden"
            )


def check_fits(student: Student, target: Target | None) -> None:
    """Raise ValueError unless a target is about the student's tokens and vocabulary ids."""
    if target is None:
        return
    if target.tokens != student.labels.shape:
        shapes = [tuple(tensor.shape) for tensor in target.parts()[0]]
        raise ValueError(
            f"the target's tensors per token, {shapes}, must have the tokens "
            f"{tuple(student.labels.shape)} of the student's hidden {tuple(student.hidden.shape)}"
        )
    if isinstance(target, Sparse | Aligned):
        return
    heads = [member.head for member in target.dense] if isinstance(target, Mixed) else [target.head]
    for head in heads:
        if len(head) != len(student.head):
            raise ValueError(
                f"teacher's head {tuple(head.shape)} must be [v/p, h_t] with v/p="
                f"{len(student.head)} as in the student's; pad the teacher's rows to the student's "
                "vocabulary shard and set valid_size of the vocabulary"
            )


def check_distilled(student: Student, target: Target | None, weights: TermWeights) -> None:
    """Raise ValueError unless the target can be distilled by these weights."""
    check_fits(student, target)
    if target is None:
        if weights.weighting:
            raise ValueError(f"{weights.weighting} weighs distillation, so a target must be given")
        if may_be_nonzero(weights.alpha):
            raise ValueError("alpha is not the number 0, so a target must be given")
    if isinstance(target, Aligned):
        _check_aligned(weights)
    members = target.sparse if isinstance(target, Mixed) else (target,)
    for member in members:
        if isinstance(member, Sparse):
            _check_stored(member, weights)


def _check_stored(target: Sparse, weights: TermWeights) -> None:
    weighting = weights.weighting
    if weighting and weighting.confidence == "entropy":
        raise ValueError(f"{weighting} needs a teacher's whole vocabulary, not Sparse")
    if weighting and target.label_log_probs is None:
        raise ValueError(f"{weighting} needs label_log_probs of a Sparse target")
    check_tail(weights.divergence.kind, target.tail)
    if isinstance(weights.temperature, Tensor) or weights.temperature != target.temperature:
        temperature = (
            "one per token" if isinstance(weights.temperature, Tensor) else weights.temperature
        )
        raise ValueError(
            f"temperature: {temperature}, but the teacher's log_probs were stored at one "
            f"temperature, {target.temperature}; distil at that"
        )


def _check_aligned(weights: TermWeights) -> None:
    """Raise ValueError for what cannot be asked of chunks."""
    if isinstance(weights.temperature, Tensor):
        raise ValueError("temperature: one per token, but a chunk has one; give a number")
    if weights.weighting and weights.weighting.confidence == "entropy":
        raise ValueError(
            f"{weights.weighting} needs a teacher's whole vocabulary, and Aligned knows how likely "
            "the text is; use label"
        )


def check_tail(kind: str, tail: str) -> None:
    """Raise ValueError for a tail that a divergence of this kind cannot have."""
    if kind != "forward_kl" and tail != "bucket":
        raise ValueError(
            f"kind={kind!r} with tail={tail!r}: only forward_kl can do without the teacher's "
            'probability of the ids that are not stored; use tail="bucket"'
        )
