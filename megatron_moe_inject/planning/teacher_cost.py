"""What teachers and the original model cost a step, from their sizes and the blend's shares."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from megatron_moe_inject.data.mixing import blend_weights
from megatron_moe_inject.data.section import MIXING
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.planning.costs import TeacherCost
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.schedule import ever_positive, value_at
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.forward import MAX_SEQUENCES
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.imitation.terms import imitation_terms
from megatron_moe_inject.teachers.loading import states_dtype

_STATES_OF_A_LAYER = 12
"""Widths of hidden states that a layer of a dense model holds at once in a forward pass: those of
attention (4) and of a gated MLP of 3.5 times its width (2 x 3.5 + 1)."""


def class_shares(recipe: Recipe, facts: StudentFacts, args: Namespace) -> dict[int, float]:
    """The share of each domain (by index) and of ``GENERAL`` in the training blend."""
    from megatron.training.utils import get_blend_and_blend_per_split

    labels = split_labels(recipe, facts, "train")
    weights = None
    if not facts.mock_data:
        blend, per_split = get_blend_and_blend_per_split(args)
        entries = blend if per_split is None else per_split[0]
        weights = None if entries is None else entries[1]
    index = {domain.name: i for i, domain in enumerate(recipe.domains)} | {"general": GENERAL}
    shares = {index[name]: value_at(share, 0) for name, share in recipe[MIXING].items()}
    weighted = blend_weights(labels, weights, shares) if labels else []
    total = sum(weighted) or 1.0
    by_class: dict[int, float] = {}
    for label, weight in zip(labels, weighted, strict=True):
        by_class[label] = by_class.get(label, 0.0) + weight / total
    return by_class


def teacher_cost(
    recipe: Recipe,
    infos: Mapping[str, TeacherInfo],
    shares: Mapping[int, float],
    args: Namespace,
    micro_batches: int,
) -> TeacherCost:
    """Of the recipe's teachers.

    Args:
        infos: what their files say.
        shares: of ``class_shares``.
        args: Megatron's, validated.
        micro_batches: of a step, on each pipeline.
    """
    weights = states = working = 0
    flops, widest = 0.0, 0
    rows = micro_batches * args.micro_batch_size
    context = args.context_parallel_size
    sharing = args.tensor_model_parallel_size * context
    for name, info in infos.items():
        size = states_dtype(recipe.teachers[name].dtype, args.params_dtype).itemsize
        share = sum(
            part
            for label, part in shares.items()
            if label != GENERAL and name in recipe.domains[label].teacher_weights
        )
        weights += info.parameters * size
        kept = recipe.teachers[name].window * args.micro_batch_size or rows
        sequence = args.seq_length * info.hidden_size * size
        states += int(min(kept, rows) * share * sequence) // context
        working = max(working, MAX_SEQUENCES * sequence * _STATES_OF_A_LAYER)
        body = info.parameters - 2 * info.vocab_rows * info.hidden_size
        attention = 2 * info.num_layers * info.hidden_size * args.seq_length  # causal
        tokens = rows * share * args.seq_length / sharing
        flops += tokens * (2 * max(body, 0) + attention)
        widest = max(widest, info.hidden_size)
    return TeacherCost(weights, states, working, flops, widest or None)


def imitation_bytes(
    recipe: Recipe,
    infos: Mapping[str, TeacherInfo],
    facts: StudentFacts,
    shares: Mapping[int, float],
    args: Namespace,
    micro_batches: int,
) -> dict[int, tuple[int, int]]:
    """What imitation keeps beside the layers of the student, by 0-based global layer.

    Returns:
        Bytes of the teachers' states of a step, and of what the term's backward pass needs of a
        micro-batch: a float32 difference for each of its tokens, a share of the batch alike.
    """
    if not recipe[IMITATION].in_use():
        return {}
    layers = {name: info.num_layers for name, info in infos.items()}
    kept: dict[int, tuple[int, int]] = {}
    for term in imitation_terms(recipe, layers, facts.num_layers, facts.pattern):
        width = infos[term.teacher].hidden_size
        size = states_dtype(recipe.teachers[term.teacher].dtype, args.params_dtype).itemsize
        share = sum(shares.get(label, 0.0) for label in term.shares)
        tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
        states, terms = kept.get(term.layer, (0, 0))
        states += int(micro_batches * share * tokens * width * size)
        kept[term.layer] = states, terms + int(share * tokens * width * 4)
    return kept


def original_states(
    recipe: Recipe, shares: Mapping[int, float], args: Namespace, micro_batches: int
) -> tuple[int, float]:
    """With gamma: bytes of the original model's states that the last stage keeps in a step, and the
    share of a step's samples that it runs forward; zeros without."""
    if not ever_positive(recipe.objective.gamma):
        return 0, 0.0
    share = shares.get(GENERAL, 0.0)
    ranks = args.context_parallel_size
    ranks *= args.tensor_model_parallel_size if args.sequence_parallel else 1
    row = args.seq_length * args.hidden_size * args.params_dtype.itemsize
    return int(micro_batches * args.micro_batch_size * share * row) // ranks, share
