"""The shares of domains and general data in the training blend.

A recipe names the share of some classes of data. Where the command line gives no weights they are
built from the shares, and where it gives weights they are checked. Within a class, and for the
classes without a share, what the command line says stays: weights in proportion, or alike.

Shares that change by iteration give the blend the weights of their means over the run's samples, so
that Megatron builds enough of each entry, and an order of the samples beside it
(``scheduled_blend``); so do pairs of answers, both of which are to be in one batch. Without either
the order is Megatron's own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.data.scheduled_blend import SampleOrder
from megatron_moe_inject.data.section import MIXING, ordered, scheduled
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
)
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.preference import CLASS
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.recipe.schema import Recipe

TOLERANCE = 0.005
"""How far a blend's share may be from the recipe's."""
_GENERAL = "general"
_ROUNDING = 1e-6
"""How far sums of shares may be from 1."""


def blend_weights(
    labels: Sequence[int], given: Sequence[float] | None, shares: Mapping[int, float]
) -> list[float]:
    """Weights of the blend's entries, 1 in sum.

    Args:
        labels: class of each entry.
        given: weights so far; ``None`` = alike, as in a class whose weights are all 0.
        shares: by class, at most 1 in sum; the other classes get the rest.
    """
    weights = [1.0] * len(labels) if given is None else list(given)
    sums = dict.fromkeys(labels, 0.0)
    for label, weight in zip(labels, weights, strict=True):
        sums[label] += weight
    if 0 in sums.values():  # a class that was left out is mixed in alike
        weights = [w if sums[at] else 1.0 for at, w in zip(labels, weights, strict=True)]
        sums = {at: total or float(labels.count(at)) for at, total in sums.items()}
    rest = 1.0 - sum(shares.values())
    others = sum(total for label, total in sums.items() if label not in shares)

    def share(label: int) -> float:
        return shares[label] / sums[label] if label in shares else rest / others

    return [weight * share(label) for label, weight in zip(labels, weights, strict=True)]


def mix(recipe: Recipe, args: Namespace, facts: StudentFacts) -> SampleOrder | None:
    """Give the training blend its weights, or check those that it has.

    Args:
        recipe: with or without ``mixing``.
        args: Megatron's arguments, changed in place where the blend has no weights.
        facts: the student.

    Returns:
        The order of the samples where shares change by iteration or the blend has pairs of answers,
        else None.

    Raises:
        RecipeError: shares that the blend cannot have or does not have, or a blend that is given
            in a file without weights.
    """
    if not recipe[MIXING]:
        return None
    if facts.mock_data:
        raise fail("mixing", recipe[MIXING], "mixes a blend, but --mock-data has none", "remove it")
    labels = split_labels(recipe, facts, "train")
    index = {_GENERAL: GENERAL} | {domain.name: i for i, domain in enumerate(recipe.domains)}
    if recipe.objective.preference is not None:
        index[CLASS] = PREFERENCE
    shares = {index[name]: share for name, share in recipe[MIXING].items()}
    names = {label: name for name, label in index.items()}
    for label in shares:
        if label not in labels:
            raise fail(
                f"mixing.{names[label]}", shares[label], "is the share of data that the training "
                "blend lacks", "add some to --data-path, or remove it",
            )  # fmt: skip
    sizes = _batch_sizes(recipe, args)
    by_label = {
        label: np.array([value_at(share, i) for i in range(len(sizes))])
        for label, share in shares.items()
    }
    sums = sum(by_label.values(), np.zeros(len(sizes)))
    _check_sums(recipe, sums, whole=set(labels) == set(shares))
    means = {label: float(values @ sizes / sizes.sum()) for label, values in by_label.items()}
    for label in dict.fromkeys(labels):
        if means.get(label, 1 - sum(means.values())) < 1e-12:
            raise fail(
                "mixing", recipe[MIXING], f"leaves {names[label]} no sample in this run",
                "give it a share, or remove its data from --data-path",
            )  # fmt: skip
    flag, weights = _given(args)
    wanted = blend_weights(labels, weights, means)
    if weights is None:
        if flag is None:
            raise RecipeError(
                "mixing: the blend comes from a file without weights; add them there, or name the "
                "data with --data-path"
            )
        entries = facts.data_paths["train"]
        pairs = zip(wanted, entries, strict=True)
        setattr(args, flag, [text for weight, path in pairs for text in (repr(weight), path)])
    else:
        _check(names, labels, weights, wanted, facts.data_paths["train"])
    if not ordered(recipe):
        return None
    by_class = _of_all_classes(labels, by_label, wanted)
    together = 1 if packing_flag(args) else 2
    order = SampleOrder(sizes, labels, by_class, wanted, PREFERENCE, together)
    if together == 2:
        _check_pairs(recipe, order, sizes, by_label)
    return order


def _check_pairs(
    recipe: Recipe, order: SampleOrder, sizes: np.ndarray, shares: Mapping[int, np.ndarray]
) -> None:
    """The run's batches hold the pairs that are asked for; an odd one has a place for none."""
    if PREFERENCE not in shares:
        return
    due, given = float(shares[PREFERENCE] @ sizes), int(order.samples[order.paired].sum())
    if due - given > max(2.0, TOLERANCE * due) or not (given or sizes.max() > 1):
        odd = int(sizes[sizes % 2 == 1].max())
        raise fail(
            f"mixing.{CLASS}", recipe[MIXING][CLASS],
            f"is more than batches of {odd} can have, which hold {odd // 2} pairs each (two "
            f"answers to a pair): {given} of {due:.0f} samples in this run",
            "use an even --global-batch-size, or lower the share",
        )  # fmt: skip


def mix_held_out(recipe: Recipe, args: Namespace, facts: StudentFacts) -> None:
    """Let a run that only reads held-out data read what a training run of the same flags reads.

    Where both take their data from one blend without weights (``--data-path``), training gives it
    weights, which validation and test data get too. Changes ``args`` in place.

    Raises:
        RecipeError: as ``mix``.
    """
    if recipe[MIXING] and not facts.mock_data and _given(args) == ("data_path", None):
        mix(recipe, args, facts)


def _batch_sizes(recipe: Recipe, args: Namespace) -> np.ndarray:
    """Samples of each iteration of the run, ``[I]``; one stands for all where none differs."""
    if not ordered(recipe):
        return np.ones(1, dtype=np.int64)
    sizes = np.array(compat.batch_sizes(args), dtype=np.int64)
    if not len(sizes):
        raise fail(
            "mixing", recipe[MIXING], "changes over the iterations of a run, and this one has none",
            "add --train-iters or --train-samples, or write shares as numbers",
        )  # fmt: skip
    return sizes


def _check_sums(recipe: Recipe, sums: np.ndarray, whole: bool) -> None:
    """Check the sum of the shares in each iteration, ``[I]``; ``whole``: they name all classes."""
    wrong = np.abs(sums - 1) > _ROUNDING if whole else sums > 1 + _ROUNDING
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    where = f" at iteration {first}" if scheduled(recipe) else ""
    if whole:
        problem, remedy = "does not sum to 1", "leave one out, or let them sum to 1"
        raise fail(
            "mixing", recipe[MIXING], f"names all of the blend, but {problem}{where}", remedy
        )
    raise fail("mixing", recipe[MIXING], f"is {sums[first]:.4g} in sum{where}", "lower the shares")


def _of_all_classes(
    labels: Sequence[int], asked: Mapping[int, np.ndarray], weights: Sequence[float]
) -> dict[int, np.ndarray]:
    """The share of each class in each iteration, ``[I]``; those not named divide the rest."""
    sums = dict.fromkeys(labels, 0.0)
    for label, weight in zip(labels, weights, strict=True):
        sums[label] += weight
    others = sum(total for label, total in sums.items() if label not in asked)
    rest = np.clip(1 - sum(asked.values()), 0, None)
    return {
        label: asked[label] if label in asked else rest * (total / others)
        for label, total in sums.items()
    }


def _check(
    names: Mapping[int, str],
    labels: Sequence[int],
    given: Sequence[float],
    wanted: Sequence[float],
    entries: Sequence[str],
) -> None:
    total = sum(given)
    for label in dict.fromkeys(labels):
        share = (
            sum(w for w, entry_label in zip(given, labels, strict=True) if entry_label == label)
            / total
        )
        target = sum(
            w for w, entry_label in zip(wanted, labels, strict=True) if entry_label == label
        )
        if abs(share - target) > TOLERANCE:
            blend = " ".join(f"{w:.4g} {e}" for w, e in zip(wanted, entries, strict=True))
            raise RecipeError(
                f"mixing: {names[label]} has {share:.1%} of the training blend, but {target:.1%} "
                f"is asked for; leave out the weights, or write {blend}",
                "mixing",
            )


def _given(args: Namespace) -> tuple[str | None, list[float] | None]:
    """The argument that holds the training blend, ``None`` for a file, and its weights."""
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    train_blend = blend if per_split is None else per_split[0]
    named = ("data_path", "train_data_path")
    flag = next((name for name in named if getattr(args, name, None) is not None), None)
    return flag, train_blend[1]
