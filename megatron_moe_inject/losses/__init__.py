"""Distillation losses: exact at any tensor-parallel size, on explicit tensors and process groups.

``student`` and ``target`` say what a loss is given: the student's hidden states, head and labels,
and what a teacher says about the same tokens, as hidden states and a head, as a committee, as some
stored ids, or as how likely chunks of the text are (``aligned``). ``fused`` computes the loss of
both without ever holding the logits, ``objective`` that of a micro-batch of domain and general
samples, ``preference`` that of pairs of answers, and ``measure`` says how good predictions and how
sure a teacher is, without gradients.
``divergences`` and ``sparse`` take logits that exist.
``reference`` says what each loss means; the maths is in ``rows`` (for GPUs: ``triton_rows``).
"""

from typing import TYPE_CHECKING

from megatron_moe_inject.host.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_moe_inject.losses.aligned import aligned_loss
    from megatron_moe_inject.losses.chunk_size import default_chunk_tokens
    from megatron_moe_inject.losses.divergences import vocab_parallel_divergence
    from megatron_moe_inject.losses.fused import (
        FusedLoss,
        FusedOptions,
        fused_linear_distillation,
        fused_loss,
        label_margins,
    )
    from megatron_moe_inject.losses.head_rows import HeadRows, LowRankHead
    from megatron_moe_inject.losses.kinds import COMMITTEES, KINDS, TAILS
    from megatron_moe_inject.losses.measure import TokenMeasures, measure_tokens, target_confidence
    from megatron_moe_inject.losses.preference import (
        PairTerms,
        PreferenceSpec,
        answer_log_probs,
        preference_loss,
    )
    from megatron_moe_inject.losses.sparse import sample_teacher, vocab_parallel_sparse_divergence
    from megatron_moe_inject.losses.spec import Divergence, LogitTransform, TermWeights
    from megatron_moe_inject.losses.student import Student, Vocabulary
    from megatron_moe_inject.losses.target import Aligned, Dense, Mixed, Sparse, Target
    from megatron_moe_inject.losses.triton_rows import TritonRows

__all__ = [
    "COMMITTEES",
    "KINDS",
    "TAILS",
    "Aligned",
    "Dense",
    "Divergence",
    "FusedLoss",
    "FusedOptions",
    "HeadRows",
    "LogitTransform",
    "LowRankHead",
    "Mixed",
    "PairTerms",
    "PreferenceSpec",
    "Sparse",
    "Student",
    "Target",
    "TermWeights",
    "TokenMeasures",
    "TritonRows",
    "Vocabulary",
    "aligned_loss",
    "answer_log_probs",
    "default_chunk_tokens",
    "fused_linear_distillation",
    "fused_loss",
    "label_margins",
    "measure_tokens",
    "preference_loss",
    "sample_teacher",
    "target_confidence",
    "vocab_parallel_divergence",
    "vocab_parallel_sparse_divergence",
]

_HOMES = {
    "aligned": ("aligned_loss",),
    "chunk_size": ("default_chunk_tokens",),
    "divergences": ("vocab_parallel_divergence",),
    "fused": (
        "FusedLoss",
        "FusedOptions",
        "fused_linear_distillation",
        "fused_loss",
        "label_margins",
    ),
    "head_rows": ("HeadRows", "LowRankHead"),
    "kinds": ("COMMITTEES", "KINDS", "TAILS"),
    "measure": ("TokenMeasures", "measure_tokens", "target_confidence"),
    "preference": ("PairTerms", "PreferenceSpec", "answer_log_probs", "preference_loss"),
    "sparse": ("sample_teacher", "vocab_parallel_sparse_divergence"),
    "spec": ("Divergence", "LogitTransform", "TermWeights"),
    "student": ("Student", "Vocabulary"),
    "target": ("Aligned", "Dense", "Mixed", "Sparse", "Target"),
    "triton_rows": ("TritonRows",),
}
"""By module, the public names of the room."""

if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _HOMES)
