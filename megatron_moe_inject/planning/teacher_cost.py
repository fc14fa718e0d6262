"""What teachers and the original model cost a step, from their sizes and the blend's shares."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping

from megatron_moe_inject.data.mixing import blend_weights
from megatron_moe_inject.data.section import MIXING
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.planning.costs import TeacherCost
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.preference import CLASS
from megatron_moe_inject.recipe.schedule import ever_positive, value_at
from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.imitation.terms import imitation_terms
from megatron_moe_inject.teachers.loading import states_dtype
from megatron_moe_inject.teachers.placement import Placement, Wish, placements
from megatron_moe_inject.teachers.spread import MAX_SEQUENCES, UNKNOWN

_STATES_OF_A_LAYER = 12
"""Widths of hidden states that a layer of a dense model holds at once in a forward pass: those of
attention (4) and of a gated MLP of 3.5 times its width (2 x 3.5 + 1)."""


def _states_of_a_layer(info: TeacherInfo, spec: TeacherSpec) -> float:
    """Widths of hidden states that the fullest layer holds at once in a forward pass.

    One with experts has a row for each token and expert: in their order, as they arrive and are
    sorted where experts lie on several ranks, filled up in FP8, what comes out of them, likewise,
    and inside a gated MLP.
    """
    if info.experts is None:
        return _STATES_OF_A_LAYER
    each = info.experts.parameters / (info.experts.number * info.num_layers)
    inside = each / info.hidden_size**2
    rows = 2 * (1 + (spec.fp8 != "none") + 2 * (spec.ep > 1))
    return max(_STATES_OF_A_LAYER, 4 + info.experts.topk * (inside + rows))


def class_shares(recipe: Recipe, facts: StudentFacts, args: Namespace) -> dict[int, float]:
    """The share of each domain (by index), ``GENERAL`` and ``PREFERENCE`` in the training blend."""
    from megatron.training.utils import get_blend_and_blend_per_split

    labels = split_labels(recipe, facts, "train")
    weights = None
    if not facts.mock_data:
        blend, per_split = get_blend_and_blend_per_split(args)
        entries = blend if per_split is None else per_split[0]
        weights = None if entries is None else entries[1]
    index = {domain.name: i for i, domain in enumerate(recipe.domains)}
    index |= {"general": GENERAL, CLASS: PREFERENCE}
    shares = {index[name]: value_at(share, 0) for name, share in recipe[MIXING].items()}
    weighted = blend_weights(labels, weights, shares) if labels else []
    total = sum(weighted) or 1.0
    by_class: dict[int, float] = {}
    for label, weight in zip(labels, weighted, strict=True):
        by_class[label] = by_class.get(label, 0.0) + weight / total
    return by_class


def _share(recipe: Recipe, name: str, shares: Mapping[int, float]) -> float:
    """The part of the blend that a teacher teaches."""
    return sum(
        part
        for label, part in shares.items()
        if (label >= 0 and name in recipe.domains[label].teacher_weights)
        or (label == PREFERENCE and name == recipe.reference_teacher())
    )


def _size(recipe: Recipe, name: str, args: Namespace) -> int:
    """Bytes of one of its numbers."""
    return states_dtype(recipe.teachers[name].dtype, args.params_dtype).itemsize


def placed(
    recipe: Recipe,
    infos: Mapping[str, TeacherInfo],
    args: Namespace,
    stages: int,
    spare: int | None,
) -> dict[str, Placement]:
    """Which stages hold each teacher, by the run's own rule (``teachers.placement``)."""
    wishes = {}
    for name, info in infos.items():
        spec = recipe.teachers[name]
        held = info.held_bytes(_size(recipe, name, args), spec.ep, spec.fp8 != "none")
        wishes[name] = Wish.of(spec, info.runs_model, held)
    return placements(wishes, stages, spare)


def teacher_costs(
    recipe: Recipe,
    infos: Mapping[str, TeacherInfo],
    shares: Mapping[int, float],
    args: Namespace,
    micro_batches: int,
    where: Mapping[str, Placement],
    forward_flops: float,
) -> list[TeacherCost]:
    """Of the recipe's teachers, on the ranks of each pipeline stage.

    Args:
        infos: what their files say.
        shares: of ``class_shares``.
        args: Megatron's, validated.
        micro_batches: of a step, on each pipeline.
        where: of ``placed``.
        forward_flops: of a micro-batch through a chunk of the student; 0 where it is not known.
    """
    stages = args.pipeline_model_parallel_size
    costs = [TeacherCost() for _ in range(stages)]
    rows = micro_batches * args.micro_batch_size
    context = args.context_parallel_size
    sharing = args.tensor_model_parallel_size * context
    for name, info in infos.items():
        spec = recipe.teachers[name]
        size, share = _size(recipe, name, args), _share(recipe, name, shares)
        sequence = args.seq_length * info.hidden_size * size
        body = info.active_parameters - 2 * info.vocab_rows * info.hidden_size
        attention = 2 * info.num_layers * info.hidden_size * args.seq_length  # causal
        flops = args.seq_length * (2 * max(body, 0) + attention)
        measured = forward_flops and spec.ep == 1  # others are shared evenly
        ratio = flops / forward_flops if measured else UNKNOWN
        count = math.ceil(rows * share / sharing)
        parts = where[name].sequences(count, stages, args.seq_length, ratio)
        states = 0 if info.aligned else sequence
        kept = min(spec.window * args.micro_batch_size or rows, rows) * share
        for stage in where[name].stages(stages):
            cost, last = costs[stage], stage == stages - 1
            working = int(MAX_SEQUENCES * sequence * _states_of_a_layer(info, spec))
            working += 0 if last else parts[stage] * sequence
            costs[stage] = TeacherCost(
                weights=cost.weights + info.held_bytes(size, spec.ep, spec.fp8 != "none"),
                states=cost.states + (int(kept * states) // context if last else 0),
                working=max(cost.working, working),
                flops=cost.flops + parts[stage] * flops,
            )
    return costs


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
    share of a step's samples that the model runs forward besides, as the original, and for pairs
    as it is; zeros without either."""
    pairs = recipe.objective.preference
    besides = 0.0
    if pairs is not None:
        passes = 2 if pairs.reference == "original" else 1
        besides = passes * shares.get(PREFERENCE, 0.0)
    if not ever_positive(recipe.objective.gamma):
        return 0, besides
    share = shares.get(GENERAL, 0.0)
    ranks = args.context_parallel_size
    ranks *= args.tensor_model_parallel_size if args.sequence_parallel else 1
    row = args.seq_length * args.hidden_size * args.params_dtype.itemsize
    return int(micro_batches * args.micro_batch_size * share * row) // ranks, share + besides
