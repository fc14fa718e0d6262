"""Distillation losses: exact at any tensor-parallel size, on explicit tensors and process groups.

``reference`` says what each loss means, ``divergences`` computes it on existing logits and
``fused`` from hidden states and heads without ever holding the logits, both with the maths in
``rows`` (for GPUs: ``triton_rows``). ``sparse`` compares with a teacher of which only some ids
per token are stored, ``committee`` mixes several teachers. ``objective`` composes them for a
micro-batch of domain and general samples.
``measure`` says how good a model's predictions are, without gradients.
"""

from megatron_moe_inject.losses.committee import COMMITTEES, Committee, Member
from megatron_moe_inject.losses.divergences import vocab_parallel_divergence
from megatron_moe_inject.losses.fused import (
    FusedLoss,
    default_chunk_tokens,
    fused_linear_distillation,
)
from megatron_moe_inject.losses.measure import TokenMeasures, measure_tokens
from megatron_moe_inject.losses.sparse import (
    TAILS,
    SparseTeacher,
    sample_teacher,
    vocab_parallel_sparse_divergence,
)
from megatron_moe_inject.losses.spec import KINDS
from megatron_moe_inject.losses.triton_rows import TritonRows

__all__ = [
    "COMMITTEES",
    "KINDS",
    "TAILS",
    "Committee",
    "FusedLoss",
    "Member",
    "SparseTeacher",
    "TokenMeasures",
    "TritonRows",
    "default_chunk_tokens",
    "fused_linear_distillation",
    "measure_tokens",
    "sample_teacher",
    "vocab_parallel_divergence",
    "vocab_parallel_sparse_divergence",
]
