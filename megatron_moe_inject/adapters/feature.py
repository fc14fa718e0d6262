"""Adapters as a feature: ``train.adapters``, low-rank changes beside matrices that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_moe_inject.adapters import uses
from megatron_moe_inject.host.errors import fail, listing, suggest
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe.adapter import OF_LOSS, TARGETS, Adapter, VocabularyRows
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.numbers import SHARES, WEIGHTS, check_bounds
from megatron_moe_inject.recipe.refused_options import NO_PARTS, Refusal
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_OVERLAPPED = Refusal(
    "moe_shared_expert_overlap", "runs the layers of shared experts in pieces of its own"
)
_GRAPHS = Refusal("cuda_graph_impl", "replays layers, and cannot leave out what stands beside them")

_FLEX = Refusal(
    "moe_token_dispatcher_type", "does not send the domain of each row along", value="flex"
)

_MTP = Refusal("mtp_num_layers", "reads the vocabulary's matrices in further places")


def _adapts(recipe: Recipe, component: str) -> bool:
    """Whether entries name a component, or weights that may be of it."""
    entries = recipe.train.adapters
    return any(component in entry.components or entry.patterns for entry in entries)


class AdaptersFeature(Feature):
    """``train.adapters``: low-rank changes beside matrices that stay as they are."""

    refuses = (
        RefusedBeside(
            NO_PARTS,
            "train.adapters on experts, with --moe-grouped-gemm",
            lambda recipe, facts: facts.precision.grouped_gemm and _adapts(recipe, "experts"),
            "take experts out of train.adapters",
        ),
        RefusedBeside(
            (_OVERLAPPED,),
            "train.adapters on shared experts",
            lambda recipe, facts: facts.shared_experts and _adapts(recipe, "shared_experts"),
            "take shared_experts out of train.adapters",
        ),
        RefusedBeside(
            (_GRAPHS,),
            "train.adapters or train.vocabulary_rows",
            lambda recipe, facts: recipe.train.beside,
            "remove them",
        ),
        RefusedBeside(
            (_FLEX,),
            "by: domain of train.adapters on experts",
            lambda recipe, facts: any(
                entry.by is not None and ("experts" in entry.components or entry.patterns)
                for entry in recipe.train.adapters
            ),
            "take by: domain out",
        ),
        RefusedBeside(
            (_MTP,),
            "train.vocabulary_rows",
            lambda recipe, facts: recipe.train.vocabulary_rows is not None,
            "remove train.vocabulary_rows",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """Numbers make sense, targets are named once, and nothing trains twice."""
        for i, entry in enumerate(recipe.train.adapters):
            _check_numbers(f"train.adapters[{i}]", entry)
            _check_targets(f"train.adapters[{i}]", entry)
            _check_domains(f"train.adapters[{i}]", entry, [d.name for d in recipe.domains])
            _check_alone(i, recipe)
        if recipe.train.vocabulary_rows is not None:
            _check_rows(recipe, recipe.train.vocabulary_rows)

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """The student has what is named."""
        moe = facts.num_moe_experts is not None
        there = {
            "experts": (moe, "the student is dense (no --num-experts)"),
            "router": (moe, "the student is dense (no --num-experts)"),
            "shared_experts": (
                moe and facts.shared_experts,
                "the student has none (no --moe-shared-expert-intermediate-size)",
            ),
            "mlp": (facts.has_dense_layers, "every layer is a MoE layer"),
            "output_layer": (
                not facts.tied_embeddings,
                "it is one matrix with the embedding, which would move too; train some rows of it "
                "whole by train.vocabulary_rows",
            ),
            "attention": (
                facts.pattern is None or bool(facts.pattern.where("*+")),
                "the student has no attention layer",
            ),
        }
        rows = recipe.train.vocabulary_rows
        compared = rows is not None and not rows.ids
        if compared and (facts.mock_data or GENERAL not in split_labels(recipe, facts, "train")):
            raise fail(
                "train.vocabulary_rows", "a choice by contrast", "needs general text, of which "
                "--data-path has none", "add some, or name the rows by ids",
            )  # fmt: skip
        for i, entry in enumerate(recipe.train.adapters):
            for j, target in enumerate(entry.targets):
                exists, why = there.get(target, (True, ""))
                if not exists:
                    raise fail(
                        f"train.adapters[{i}].targets[{j}]", target, "matches nothing",
                        f"{why}; take it out",
                    )  # fmt: skip
            for layer in entry.layers:
                if layer >= facts.num_layers:
                    raise fail(
                        f"train.adapters[{i}].layers", entry.layers, f"names layer {layer}",
                        f"the student's layers are 0 to {facts.num_layers - 1}",
                    )  # fmt: skip

    def warnings(self, recipe: Recipe) -> list[str]:
        """General text that nothing learns from."""
        train = recipe.train
        apart = train.adapters and all(entry.by is not None for entry in train.adapters)
        if not apart or train.whole or train.vocabulary_rows is not None:
            return []
        return [
            "train.adapters: nothing but adapters of single domains trains, which general text "
            "does not pass: objective.gamma and losses on general text change nothing"
        ]

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Each entry in words."""
        lines = [_in_words(entry, recipe) for entry in recipe.train.adapters]
        rows = recipe.train.vocabulary_rows
        if rows is not None:
            lines.append(_rows_in_words(rows))
        return {"beside the student": lines} if lines else {}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Of the layers that get them."""
        train, parts = recipe.train, []
        if train.adapters:
            parts.append(uses.ADAPTERS)
            if facts is None or facts.precision.grouped_gemm:
                parts.append(uses.GROUPED_ADAPTERS)
            if any(entry.by is not None for entry in train.adapters):
                parts.append(uses.DOMAIN_ADAPTERS)
        if train.vocabulary_rows is not None:
            parts.append(uses.VOCABULARY_ROWS)
        return parts

    def start(self, run: RunContext) -> RunPart | None:
        """Makes them."""
        if not run.recipe.train.beside:
            return None
        from megatron_moe_inject.adapters.part import AdaptersPart

        return AdaptersPart(run)


def _check_rows(recipe: Recipe, rows: VocabularyRows) -> None:
    """One way of choosing, with what it needs, and no matrix that trains whole."""
    path, train = "train.vocabulary_rows", recipe.train
    ways = {"ids": bool(rows.ids), "budget": rows.budget, "threshold": rows.threshold}
    given = [name for name, value in ways.items() if value not in (None, False)]
    if len(given) != 1:
        raise fail(
            path, " and ".join(given) or "empty", "is not one way of choosing rows",
            "write one of ids, budget: 0.1 and threshold: 0.9",
        )  # fmt: skip
    if not rows.ids and rows.domain not in [domain.name for domain in recipe.domains]:
        raise fail(
            f"{path}.domain", rows.domain, "is no domain, whose text is to be counted",
            f"write one of {', '.join(domain.name for domain in recipe.domains)}",
        )  # fmt: skip
    if rows.ids and rows.domain is not None:
        raise fail(f"{path}.domain", rows.domain, "is of no use beside ids", "remove it")
    if len(set(rows.ids)) < len(rows.ids) or min(rows.ids, default=0) < 0:
        raise fail(f"{path}.ids", rows.ids, "has one twice or a negative one", "take it out")
    for name in ("budget", "threshold"):
        if getattr(rows, name) is not None:
            check_bounds(f"{path}.{name}", getattr(rows, name), SHARES)
    check_bounds(f"{path}.lr", rows.lr, WEIGHTS)
    check_bounds(f"{path}.decay", rows.decay, WEIGHTS, besides=(0,))
    for name in ("embedding", "output_layer"):
        if getattr(train, name):
            raise fail(
                path, given[0], f"stands beside train.{name}, which trains all rows",
                "keep one of them",
            )  # fmt: skip


def _check_numbers(path: str, entry: Adapter) -> None:
    if entry.rank < 1:
        raise fail(f"{path}.rank", entry.rank, "is no rank", "write a number from 1, such as 8")
    for name, value in (("alpha", entry.numerator), ("lr", entry.lr), ("lr_b", entry.lr_b)):
        check_bounds(f"{path}.{name}", value, WEIGHTS)
    check_bounds(f"{path}.decay", entry.decay, WEIGHTS, besides=(0,))
    for layer in entry.layers:
        if layer < 0:
            raise fail(f"{path}.layers", entry.layers, "names a negative layer", "count from 0")


def _check_targets(path: str, entry: Adapter) -> None:
    if not entry.targets:
        raise fail(f"{path}.targets", [], "is empty", f"name some of {', '.join(TARGETS)}")
    for j, target in enumerate(entry.targets):
        if target in entry.targets[:j]:
            raise fail(f"{path}.targets[{j}]", target, "is there twice", "remove it")
        if target == "embedding":
            raise fail(
                f"{path}.targets[{j}]", target, "has no adapter, which would move every row of it",
                "train some rows whole by train.vocabulary_rows",
            )  # fmt: skip
        if target not in TARGETS and not set(target) & set(".*?["):
            raise fail(
                f"{path}.targets[{j}]", target, "is not known",
                f"name some of {', '.join(TARGETS)}, or weights as in train.patterns",
            )  # fmt: skip


def _check_domains(path: str, entry: Adapter, names: Sequence[str]) -> None:
    """Those of ``by: domain`` are of the recipe, once each."""
    if entry.by is None:
        if entry.domains:
            raise fail(
                f"{path}.domains", entry.domains, "stands without by: domain, so that all tokens "
                "pass the same adapters", "write by: domain, or remove it",
            )  # fmt: skip
        return
    for j, name in enumerate(entry.domains):
        if name not in names:
            raise fail(
                f"{path}.domains[{j}]", name, "is no domain", suggest(name, names, "domains")
            )
        if name in entry.domains[:j]:
            raise fail(f"{path}.domains[{j}]", name, "is there twice", "remove it")
    if "output_layer" in entry.components:
        raise fail(
            f"{path}.targets", entry.targets, f"names output_layer, {OF_LOSS}",
            "give it an entry without by: domain",
        )  # fmt: skip


def _check_alone(number: int, recipe: Recipe) -> None:
    """What trains whole has no adapter."""
    train, path = recipe.train, f"train.adapters[{number}]"
    entry = train.adapters[number]
    for component in entry.components:
        whole = train.experts != "none" if component == "experts" else getattr(train, component)
        if component == "router":
            whole = train.router or train.router_rows
        if whole:
            name = "router_rows" if component == "router" and train.router_rows else component
            off = "none" if component == "experts" else "false"
            raise fail(
                f"{path}.targets", entry.targets, f"names {component}, while train.{name} trains "
                "their weights themselves", f"set train.{name}: {off}, or take {component} out",
            )  # fmt: skip
    if "output_layer" in entry.components and train.vocabulary_rows is not None:
        raise fail(
            f"{path}.targets", entry.targets, "names output_layer beside train.vocabulary_rows",
            "keep one of them",
        )  # fmt: skip
    own = [d for d in recipe.domains if not entry.domains or d.name in entry.domains]
    chosen = all(d.experts.layers or d.experts.profile for d in own)
    if "experts" in entry.components and entry.experts == "selected" and not chosen:
        raise fail(
            f"{path}.experts", "selected", "but not every domain chooses experts",
            "write domains[0].experts, or experts: all",
        )  # fmt: skip


def _rows_in_words(rows: VocabularyRows) -> str:
    if rows.ids:
        which = f"{len(rows.ids)} rows of the vocabulary"
    elif rows.budget is not None:
        which = f"{rows.budget:.3g} of the vocabulary's rows, by the contrast of {rows.domain}"
    else:
        which = f"rows with {rows.threshold:.3g} of the contrast of {rows.domain}"
    return which + (f", at {rows.lr:g} times the learning rate" if rows.lr != 1 else "")


def _in_words(entry: Adapter, recipe: Recipe) -> str:
    names = [f"{entry.experts} experts" if t == "experts" else t for t in entry.targets]
    where = f" of layers {ranges(entry.layers)}" if entry.layers else ""
    rate = f", at {entry.lr:g} times the learning rate" if entry.lr != 1 else ""
    rate += f" (B {entry.lr_b:g} times that)" if entry.lr_b != 1 else ""
    words = f"rank {entry.rank}, scaled by {entry.scale:g}, on {', '.join(names)}{where}{rate}"
    if entry.by is None:
        return words
    domains = listing(entry.domains or [domain.name for domain in recipe.domains])
    return f"{words}; of each domain its own ({domains}), general text passes none"
