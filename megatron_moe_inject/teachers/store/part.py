"""The stores of a run: looked at before anything is built, and the data that they are about."""

from __future__ import annotations

import contextlib
import functools
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_moe_inject.data.token_places import TokenPlaces, number_data_sets
from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.host.text import memory_text
from megatron_moe_inject.recipe.entries import SPLITS, split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.run_part import RunContext
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.manifest import (
    Manifest,
    StorePlan,
    read_manifest,
    sample_sha256,
)
from megatron_moe_inject.teachers.store.rules import check_use, stored_names, taught_by
from megatron_moe_inject.teachers.store.signing import signer_of
from megatron_moe_inject.teachers.store.step_teacher import OpenStores
from megatron_moe_inject.teachers.store.writer import file_sha256


def checked_stores(recipe: Recipe) -> dict[str, Manifest]:
    """The manifests of the recipe's stores, by teacher.

    Raises:
        RecipeError: one cannot be read, is not trusted, or does not have what the recipe needs.
    """
    manifests = {}
    for name in stored_names(recipe):
        source = parse_source(name, recipe.teachers[name].source)
        spec = recipe.teachers[name]
        key = f"teachers.{name}.trusted"
        manifests[name] = read_manifest(source.path, source.error, spec.trusted, key)
        check_use(recipe, name, manifests[name].plan)
    return manifests


def told_of(name: str, recipe: Recipe, manifest: Manifest, args: Namespace) -> str:
    """A remark for the plan: whose knowledge a store is, how much, who vouches for it, and what a
    step reads of it at most."""
    plan, spec = manifest.plan, recipe.teachers[name]
    source = parse_source(name, spec.source)
    signer = signer_of(source.path, source.error)
    vouched = "not signed"
    if signer is not None:
        vouched = f"signed by {signer}" + ("" if spec.trusted else " (not checked)")
    each = manifest.bytes / max(1, manifest.rows)
    batch, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    step = f", at most {memory_text(int(batch * length * each))} a step" if batch and length else ""
    return (
        f"teacher {name}: a store of {plan.teacher.source} ({plan.teacher.architecture}): "
        f"{manifest.rows:,} tokens, {what_is_kept(plan)}, "
        f"{memory_text(manifest.bytes)}, {each:.0f} bytes a token{step}, {vouched}"
    )


def what_is_kept(plan: StorePlan) -> str:
    """Of each token, in a few words."""
    if plan.chunks is not None:
        return f"chunks of text by a tokenizer of {plan.chunks.ids:,} ids, {plan.log_probs}"
    if plan.states is not None:
        kind = "fp8" if plan.log_probs == "fp8" else plan.states.dtype
        return f"states of {plan.states.hidden_size} {kind}"
    if plan.drawn:
        return f"{plan.slots} drawn ids at temperature {plan.temperatures[0]:g}"
    ids = f"{plan.slots} ids"
    if plan.mass is not None:
        ids = f"ids of {plan.mass:g} of the probability, at most {plan.slots}"
    return f"{ids}, {plan.log_probs} log-probabilities"


def data_in_store(
    recipe: Recipe, facts: StudentFacts, manifests: Mapping[str, Manifest]
) -> dict[str, dict[str, int]]:
    """By teacher, and by path prefix of the data of its domains, which data set of the store it is.

    Args:
        manifests: of the recipe's stores.

    Raises:
        RecipeError: a store that lacks data of its domains, or has another version of it.
    """
    found: dict[str, dict[str, int]] = {}
    digests = functools.cache(_digests)
    for name, manifest in manifests.items():
        own = {recipe.domains.index(domain) for domain in taught_by(recipe, name)}
        found[name] = {}
        for split in (split for split in SPLITS if split in facts.data_paths):
            labels = split_labels(recipe, facts, split)
            for entry, label in zip(facts.data_paths[split], labels, strict=True):
                path = os.path.normpath(entry)
                if label in own and path not in found[name]:
                    found[name][path] = _place(name, recipe, manifest, path, digests(path))
    return found


def _digests(path: str) -> tuple[str, int, str]:
    """By which a data set is known: of its index, the size of its tokens, and of some of them."""

    def failure(problem: str, remedy: str) -> RecipeError:
        return RecipeError(f"--data-path: {path} {problem}; {remedy}")

    tokens = Path(f"{path}.bin")
    sample = sample_sha256(tokens, failure)
    return file_sha256(Path(f"{path}.idx"), failure), tokens.stat().st_size, sample


def _place(
    name: str, recipe: Recipe, manifest: Manifest, path: str, digests: tuple[str, int, str]
) -> int:
    data = manifest.plan.data
    for place, stored in enumerate(data):
        if (stored.idx_sha256, stored.bin_bytes, stored.bin_sample_sha256) == digests:
            return place
    same = [stored for stored in data if stored.name == os.path.basename(path)]
    about = f"another version of {same[0].name}" if same else listing(d.name for d in data)
    raise fail(
        f"teachers.{name}.source", recipe.teachers[name].source,
        f"says nothing about {path}, the text of its domain; it is about {about}",
        "write a store of this data, or train on that of the store",
    )  # fmt: skip


class StoresPart(TokenPlaces):
    """Provides ``OpenStores``, and lets samples say where their tokens stand."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._manifests = checked_stores(run.recipe)
        names = list(self._manifests)
        super().__init__(number_data_sets(run.facts.data_paths), f"teachers.{names[0]}.source")

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Find the data in the stores before the student is built, by checksums of its index files
        on the first rank.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: a store is about other data.
        """
        run = self._run
        found = on_first_rank(lambda: data_in_store(run.recipe, run.facts, self._manifests))
        run.provide(OpenStores, OpenStores(self._manifests, found))
        for name, manifest in self._manifests.items():
            run.warnings.append(told_of(name, run.recipe, manifest, run.args))
        yield
