"""The entries of the student's blends: which files they are, and which class of data each is of.

Megatron's samples carry the position of their entry in the blend (``dataset_id``). A recipe claims
entries of the training blend; those of other blends are recognised.
"""

from __future__ import annotations

import difflib
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    listing,
    show,
)
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.facts import StudentFacts

SPLITS = ("train", "valid", "test")
ROLLOUTS_KIND = "rollouts:"
"""What an entry of a domain begins with that is a folder of the student's own text, and none of the
blend's."""


def data_paths(args: Namespace) -> dict[str, tuple[str, ...]]:
    """By split the entries of its blend, in order; a split without data is absent.

    Raises:
        RecipeError: a file that lists them cannot be read, or a weight is none.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        flag, path = next(
            (
                (f"--{name.replace('_', '-')}", getattr(args, name))
                for name in ("data_args_path", "per_split_data_args_path")
                if getattr(args, name, None)
            ),
            ("--data-path", args.data_path),
        )
        raise fail(
            flag, path, f"cannot be read ({show(error)})", "it lists the student's datasets"
        ) from None
    if blend is not None:
        _check_documents(args.split or "969, 30, 1", blend[0])
    blends = per_split if per_split is not None else [blend] * len(SPLITS)
    for split, entries in zip(SPLITS, blends, strict=True):
        _check_weights(args, split if per_split is not None else "", *(entries or ((), None)))
    return {
        split: tuple(entries[0])
        for split, entries in zip(SPLITS, blends, strict=True)
        if entries is not None
    }


def _check_documents(split: str, paths: Sequence[str]) -> None:
    """Megatron counts for ever how often it has to repeat no document at all.

    Args:
        split: ``--split``; its default is that of Megatron's flag.
        paths: entries of the one blend; those that are no indexed data sets here are left out.
    """
    from megatron.core.datasets import blended_megatron_dataset_config as config

    shares = config.parse_and_normalize_split(split)
    matrix = config.convert_split_vector_to_split_matrix(shares)
    for path in paths:
        documents = _documents(path)
        for part, name in zip(matrix, ("training", "validation", "test"), strict=True):
            if documents is None or part is None:
                continue
            if round(part[0] * documents) == round(part[1] * documents):
                raise fail(
                    "--split", split, f"leaves {path}, of {documents} documents, none for {name}",
                    "give each a share that has some, or 0, or a --valid-data-path of its own",
                )  # fmt: skip


def _documents(path: str) -> int | None:
    """How many documents Megatron splits an indexed data set into, by the header of its index."""
    magic = b"MMIDIDX\x00\x00"
    try:
        with open(f"{path}.idx", "rb") as file:
            header = file.read(len(magic) + 17)  # version, kind of tokens, number of sequences
    except OSError:
        return None
    whole = header.startswith(magic) and len(header) == len(magic) + 17
    return int.from_bytes(header[-8:], "little") if whole else None


def _check_weights(
    args: Namespace, split: str, paths: Sequence[str], weights: Sequence[float] | None
) -> None:
    """Megatron asserts that weights are positive, without saying which is not."""
    name = f"{split}_data_path" if split else "data_path"
    listed = "per_split_data_args_path" if split else "data_args_path"
    flag = "--" + (name if getattr(args, name, None) else listed).replace("_", "-")
    for path, weight in zip(paths, weights or (), strict=bool(weights)):
        if not 0 < weight < math.inf:
            raise fail(
                flag, weight, f"is no weight of {path}",
                "a weight is above 0; leave out the dataset, or all weights",
            )  # fmt: skip


def split_labels(recipe: Recipe, facts: StudentFacts, split: str) -> list[int]:
    """Domain index of each blend entry of ``split``, ``PREFERENCE`` (-2) of pairs of answers,
    ``GENERAL`` (-1) for the rest.

    Entry ``i`` is the sample's ``dataset_id``; a blend of one dataset has one label. An entry
    of a validation or test blend of its own is known by its prefix in the recipe, by the same
    prefix in the training blend, or, where both blends have equally many entries, those of pairs
    left out or not, by position. The position also tells the class of a prefix that training has
    in several.

    Raises:
        RecipeError: a claimed entry that no blend has, an entry claimed twice, a domain
            without training data, or an entry that cannot be matched.
    """
    train, named = _train_labels(recipe, facts)
    entries, train_entries = _entries(facts, split), _entries(facts, "train")
    if entries == train_entries:
        return train
    classes: dict[str, set[int]] = {entry: {label} for entry, label in named.items()}
    for entry, label in zip(train_entries, train, strict=True):
        if entry not in named:
            classes.setdefault(entry, set()).add(label)
    candidates = [classes.get(entry, set()) for entry in entries]
    open_ones = [entry for entry, known in zip(entries, candidates, strict=True) if len(known) != 1]
    if not open_ones:
        return [next(iter(known)) for known in candidates]
    texts = [label for label in train if label != PREFERENCE]
    aligned = next(
        (
            labels
            for labels in (train, texts)
            if len(entries) == len(labels)
            and all(not known or at in known for known, at in zip(candidates, labels, strict=True))
        ),
        None,
    )
    if aligned is None:
        entry = open_ones[0]
        order = f"the blend has {len(entries)} entries and training has {len(train)} in another"
        remedy = "name it in a domain's data or in general_data, or list the blends in one order"
        if classes.get(entry):
            order = f"it stands in the training blend in several classes, and {order}"
            remedy = "list the blends in one order, or keep each file in one class"
        raise RecipeError(
            f"--{split}-data-path: {show(entry)} cannot be matched to a domain, since {order} "
            f"order; {remedy}"
        )
    return list(aligned)


def _train_labels(recipe: Recipe, facts: StudentFacts) -> tuple[list[int], dict[str, int]]:
    """Labels of the training blend, and the label of every prefix that the recipe names."""
    entries = _entries(facts, "train")
    if not entries:
        raise RecipeError("--data-path: missing; a recipe needs training data or --mock-data")
    everywhere = [entry for split in SPLITS for entry in _entries(facts, split)]
    owners: list[str | None] = [None] * len(entries)
    labels = [GENERAL] * len(entries)
    named: dict[str, int] = {}
    claims = [(f"domains[{i}].data", i, domain.data) for i, domain in enumerate(recipe.domains)]
    if (pairs := recipe.objective.preference) is not None:
        claims.append(("objective.preference.data", PREFERENCE, pairs.data))
    for path, label, data in [*claims, ("general_data", GENERAL, recipe.general_data)]:
        for j, entry in enumerate(data):
            if isinstance(entry, str) and entry.startswith(ROLLOUTS_KIND):
                continue
            key = f"{path}[{j}]"
            positions = _positions(key, entry, entries, everywhere)
            if isinstance(entry, str):
                named[entry] = label
            for position in positions:
                if owners[position] is not None:
                    what = f"is entry {position}, already claimed by {owners[position]}"
                    raise fail(key, entry, what, "each entry has one owner")
                owners[position], labels[position] = key, label
    for path, label, data in claims:
        if label not in labels:
            raise fail(path, data, "has no training data", f"training has {_described(entries)}")
    return labels, named


def _positions(
    key: str, entry: int | str, entries: tuple[str, ...], everywhere: list[str]
) -> list[int]:
    if isinstance(entry, int):
        if entry >= len(entries):
            raise fail(key, entry, "is not in the training blend", f"it has {_described(entries)}")
        return [entry]
    if entry not in everywhere:
        close = difflib.get_close_matches(entry, everywhere, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        if entry.isdigit():
            hint = "a position is written without quotes; "
        remedy = f"{hint}the training blend has {_described(entries)}"
        raise fail(key, entry, "is no prefix of the student's data", remedy)
    return [i for i, known in enumerate(entries) if known == entry]


def _entries(facts: StudentFacts, split: str) -> tuple[str, ...]:
    return ("(mock data)",) if facts.mock_data else tuple(facts.data_paths.get(split, ()))


def _described(entries: tuple[str, ...]) -> str:
    return listing((f"{i}: {entry}" for i, entry in enumerate(entries)), limit=6)
