"""Direct preference optimisation (DPO, 2305.18290): of two answers to a prompt, one is preferred.

With log pi and log ref the log-probabilities of an answer by the student and by a fixed reference,
each the sum of those of its tokens, c the chosen answer and r the rejected one,

    reward of an answer = beta (log pi - log ref)          margin m = reward_c - reward_r
    loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)     e = label_smoothing

which without smoothing is the cross-entropy of a Bradley-Terry model whose rewards these are.
``length_normalised`` divides each log-probability, of student and reference, by the answer's
tokens. ``sft`` adds -log pi_c / tokens_c, the cross-entropy of chosen answers (as the RPO term of
2404.19733).

**Two passes.** The loss of a pair needs both answers' sums before the gradient of either's first
token is known, and the answers need not be in one micro-batch, nor on one rank. But by an answer's
tokens it is linear, once the margin is known: its gradient by log pi_c is
-g = -beta ((1 - e) sigmoid(-m) - e sigmoid(m)) at each of the chosen answer's tokens, g at the
rejected one's. So the sums come first, without a graph, and then each token's cross-entropy has a
weight (``weights``) and goes through the fused loss as any other. The weighted cross-entropies have
the gradient of the loss, not its value.

All is float64, on two numbers for each pair. Shapes: p pairs, k samples, s positions, h hidden.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_moe_inject.losses.fused import FusedOptions, label_margins
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.triton_rows import AUTO


@dataclass(frozen=True)
class PreferenceSpec:
    """What is minimised.

    Attributes:
        beta: above 0.
        length_normalised: whether log-probabilities are means over tokens.
        label_smoothing: e, from 0 to below 0.5.

    Raises:
        ValueError: a number out of these bounds.
    """

    beta: float
    length_normalised: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} of a preference must be positive and finite")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5; from "
                "there on the rejected answer would be preferred"
            )


@dataclass(frozen=True)
class PairTerms:
    """The loss of p pairs and what it is made of, float64, [p] or [p, 2], chosen before rejected.

    Attributes:
        loss: of each pair, [p].
        rewards: beta (log pi - log ref), [p, 2].
        margins: the chosen answers' rewards less the rejected ones', [p].
        weights: what multiplies the cross-entropy of each token of an answer, so that the sum has
            the gradient of the sum of the losses, [p, 2].
    """

    loss: Tensor
    rewards: Tensor
    margins: Tensor
    weights: Tensor


def answer_log_probs(student: Student, kernels: RowKernels | str | None = AUTO) -> Tensor:
    """Log-probability of each label, float64 ``[s, k]``, 0 where there is none.

    An answer's is the sum over its tokens. Context-parallel ranks hold parts of it.

    Args:
        student: a model by hidden states ``[s, k, h]``, its head, and labels ``[s, k]``, which are
            negative but at an answer's tokens.
        kernels: see ``losses.FusedOptions``.

    Collectives: those of ``label_margins``.
    """
    hidden, labels = student.hidden.flatten(0, 1), student.labels.flatten()
    flat = replace(student, hidden=hidden, labels=labels)
    margins = label_margins(flat, FusedOptions(kernels=kernels))
    log_probs = logsigmoid(margins.double()).view(student.labels.shape)
    return torch.where(student.labels >= 0, log_probs, 0.0)


def preference_loss(
    log_probs: Tensor, reference: Tensor, tokens: Tensor, spec: PreferenceSpec
) -> PairTerms:
    """The loss of pairs from the log-probabilities of their answers.

    Args:
        log_probs: by the student, [p, 2], chosen before rejected, sums over an answer's tokens;
            constants.
        reference: by the reference, likewise.
        tokens: of each answer, [p, 2], at least 1.
        spec: which loss.

    No collectives.
    """
    log_probs, reference, tokens = (x.double() for x in (log_probs, reference, tokens))
    each = 1 / tokens if spec.length_normalised else torch.ones_like(tokens)
    rewards = spec.beta * (log_probs - reference) * each
    margins = rewards[:, 0] - rewards[:, 1]
    e = spec.label_smoothing
    loss = -(1 - e) * logsigmoid(margins) - e * logsigmoid(-margins)
    slope = spec.beta * ((1 - e) * torch.sigmoid(-margins) - e * torch.sigmoid(margins))
    return PairTerms(loss, rewards, margins, torch.stack([slope, -slope], dim=1) * each)
