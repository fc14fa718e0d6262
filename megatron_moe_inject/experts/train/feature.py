"""What trains, as a feature: all but that is frozen, and backward stops below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING

from megatron_moe_inject.experts.train import uses
from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.host.layer_pattern import LayerPattern, name_matches
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.refused_options import FP8_PARAMETERS, NO_PARTS, Refusal
from megatron_moe_inject.recipe.schema import FP8_SCALINGS, Recipe, Train

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_CLIPS = Refusal(
    "qk_clip",
    "changes the weights of attention after the optimizer's step, and attention is frozen",
)
_GRAPHS = Refusal(
    "cuda_graph_impl",
    "replays a backward of every layer between the forwards of others, and what lies below the "
    "first layer that trains has none",
)
_QUANTILE = Refusal(
    "moe_router_load_balancing_type",
    "goes on moving the bias of frozen routers",
    value="quantile_balancing",
)


def _selected(recipe: Recipe, facts: StudentFacts) -> bool:
    return recipe.train.experts == "selected" and not recipe.train.everything


def _by_patterns(recipe: Recipe, facts: StudentFacts) -> bool:
    """Whether ``train.patterns`` name some of a layer's experts and not others."""
    train = recipe.train
    experts = range(facts.num_moe_experts or 0)
    if train.experts != "none" or not train.patterns or not experts:
        return False
    return any(
        0 < len(_matching(train.patterns, layer, linear, experts, facts.pattern)) < len(experts)
        for layer in sorted(set(facts.moe_layers) - set(train.layers))
        for linear in ("linear_fc1", "linear_fc2")
    )


def _matching(
    patterns: Iterable[str],
    layer: int,
    linear: str,
    experts: range,
    layers: LayerPattern | None,
) -> set[str]:
    names = [f"decoder.layers.{layer}.mlp.experts.{e}.{linear}.weight" for e in experts]
    in_gpt = {name: name if layers is None else layers.gpt_name(name) for name in names}
    return {
        name for pattern in patterns for name in names if name_matches(pattern, name, in_gpt[name])
    }


def _no_parts(setting: str, asked: Callable[[Recipe, StudentFacts], bool]) -> list[RefusedBeside]:
    """What grouped experts cannot be trained in part with."""
    return [
        RefusedBeside(
            NO_PARTS,
            f"{setting}, with --moe-grouped-gemm",
            lambda recipe, facts: facts.precision.grouped_gemm and asked(recipe, facts),
            "train all experts",
            so_that=f", so that {setting} cannot train some of them",
        ),
        RefusedBeside(
            (FP8_PARAMETERS,),
            f"{setting}, with --moe-grouped-gemm and --fp8-recipe delayed",
            lambda recipe, facts: facts.precision.groups_with_histories and asked(recipe, facts),
            "use another --fp8-recipe",
            so_that=f", which with --fp8-recipe delayed and {setting} nobody has verified",
        ),
    ]


class Freezing(Feature):
    """``train``: what trains; everything else stays bitwise as it was."""

    refuses = (
        RefusedBeside(
            (_CLIPS,),
            "train.attention: false",
            lambda recipe, facts: not _attention_trains_whole(recipe, facts),
            "set train.attention: true",
        ),
        RefusedBeside(
            (_GRAPHS,),
            "--overlap-moe-expert-parallel-comm",
            lambda recipe, facts: (
                bool(facts.options.get("overlap_moe_expert_parallel_comm"))
                and not recipe.train.everything
            ),
            "remove --overlap-moe-expert-parallel-comm",
        ),
        *_no_parts("train.experts: selected", _selected),
        *_no_parts("train.patterns", _by_patterns),
        RefusedBeside(
            NO_PARTS,
            "train.frozen_experts: fp8",
            lambda recipe, facts: recipe.train.frozen_experts == "fp8",
            "set train.frozen_experts to params",
        ),
        RefusedBeside(
            (_QUANTILE,),
            "train.router: false",
            lambda recipe, facts: not (recipe.train.router or recipe.train.everything),
            "set train.router: true, or use another type",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """Something trains, each thing is named once, and FP8 has experts to keep."""
        train = recipe.train
        if train.everything:
            _check_everything(recipe)
            return
        if train.frozen_experts == "fp8" and train.experts == "all":
            raise fail(
                "train.frozen_experts", "fp8", "keeps no expert, since all of them train",
                "write params, or train.experts: selected",
            )  # fmt: skip
        if train.fp8_source is not None and train.frozen_experts != "fp8":
            raise fail(
                "train.fp8_source", train.fp8_source, "is used only by experts kept in FP8",
                "write train.frozen_experts: fp8, or remove it",
            )  # fmt: skip
        for name in ("layers", "patterns"):
            entries = getattr(train, name)
            for i, entry in enumerate(entries):
                if entry in entries[:i] or entry == "":
                    problem = "is empty" if entry == "" else "is there twice"
                    raise fail(f"train.{name}[{i}]", entry, problem, "remove it")
        for i, layer in enumerate(train.layers):
            if layer < 0:
                raise fail(
                    f"train.layers[{i}]", layer, "is negative", "decoder layers count from 0"
                )
        if not train.whole and not train.beside:
            names = [name for name, value in asdict(train).items() if value is False]
            raise fail(
                "train.experts", "none", "and nothing else leaves nothing to train",
                f"train.experts: selected, or set one of {listing(names)} to true",
            )  # fmt: skip
        for i, domain in enumerate(recipe.domains):
            chosen = domain.experts.layers or domain.experts.undecided
            if train.experts == "selected" and not chosen:
                raise fail(
                    f"domains[{i}].experts.layers", {},
                    "chooses no experts while train.experts is 'selected'",
                    "write {layer: [expert ids]} or profile: FILE, or set train.experts to all or "
                    "none",
                )  # fmt: skip

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """Every component that is to train must exist, and FP8 must be able to keep the rest."""
        _check_components(recipe, facts)
        if recipe.train.frozen_experts == "fp8":
            _check_frozen_fp8(recipe, facts)

    def warnings(self, recipe: Recipe) -> list[str]:
        """Experts that are chosen and do not train."""
        chosen = any(domain.experts.layers for domain in recipe.domains)
        adapted = any("experts" in entry.components for entry in recipe.train.adapters)
        if chosen and recipe.train.experts == "none" and not adapted:
            return ["train.experts is none: the experts chosen by the domains stay frozen"]
        return []

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """What trains in words, and how frozen experts are kept."""
        train = recipe.train
        if train.everything:
            return {"trains": ["everything, as without the plugin"]}
        names = [_trained_experts(recipe, facts)] if train.experts != "none" else []
        names += train.components()
        if train.layers:
            names.append(f"layers {ranges(train.layers)}")
        names += train.patterns
        names += ["adapters"] if train.adapters else []
        names += ["rows of the vocabulary"] if train.vocabulary_rows else []
        lines = [", ".join(names) + "; everything else is frozen"]
        if train.frozen_experts == "fp8":
            origin = "encoded as loaded" if train.fp8_source is None else f"from {train.fp8_source}"
            lines.append(f"frozen experts are kept in FP8 alone, {origin}")
        return {"trains": lines}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """The boundary and the optimizer; of grouped experts and FP8 where they are there."""
        if recipe.train.everything:
            return []
        parts = [uses.TRAIN]
        if facts is None or facts.pattern is not None:
            parts.append(uses.HYBRID_TRAIN)
        if facts is None or facts.precision.grouped_gemm:
            parts.append(uses.GROUPED)
        if recipe.train.frozen_experts == "fp8":
            parts.append(uses.FROZEN_FP8)
        return parts

    def start(self, run: RunContext) -> RunPart | None:
        """Applies the policy."""
        from megatron_moe_inject.experts.train.part import FreezingPart

        return FreezingPart(run)


class ForwardStages(Feature):
    """No gradients between pipeline stages below what trains."""

    def start(self, run: RunContext) -> RunPart | None:
        """Its part is the step's last but one, since other passes use stock communication."""
        from megatron_moe_inject.experts.train.part import ForwardStagesPart

        return ForwardStagesPart(run)


def _attention_trains_whole(recipe: Recipe, facts: StudentFacts) -> bool:
    """Options that change parameters outside the optimizer may do so where these train whole."""
    if recipe.train.everything:
        return True
    return recipe.train.attention or set(recipe.train.layers) >= set(range(facts.num_layers))


def _check_everything(recipe: Recipe) -> None:
    """Beside ``everything`` nothing else of ``train`` is written, and nothing is frozen to prove.

    The experts that domains chose stay useful: steering and imitation are of them.
    """
    for field in fields(Train):
        value = getattr(recipe.train, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name != "everything" and value != default:
            raise fail(
                f"train.{field.name}", value, "stands beside train.everything, which leaves "
                "nothing to choose", "keep one of them",
            )  # fmt: skip
    if recipe.verify_frozen:
        raise fail(
            "verify_frozen", True, "has nothing to prove, since train.everything freezes nothing",
            "remove it",
        )  # fmt: skip


def _check_frozen_fp8(recipe: Recipe, facts: StudentFacts) -> None:
    """Experts can be kept in FP8 where TE's grouped linear layers multiply in FP8."""
    has, source = facts.precision, recipe.train.fp8_source
    remedy = "add the flags, or write train.frozen_experts: params"
    for there, wanted in (
        (facts.num_moe_experts is not None, "a student with experts (--num-experts)"),
        (has.transformer_engine, "--transformer-impl transformer_engine"),
        (has.grouped_gemm, "--moe-grouped-gemm"),
        (has.fp8 is not None, "a student that trains in FP8 (--fp8-format)"),
        (has.fp8_recipe in FP8_SCALINGS, f"--fp8-recipe {' or '.join(FP8_SCALINGS)}"),
    ):
        if not there:
            raise fail("train.frozen_experts", "fp8", f"needs {wanted}", remedy)
    if source is None:
        return
    if has.fp8_recipe != "blockwise":
        raise fail(
            "train.fp8_source", source, "has scales for blocks, which --fp8-recipe "
            f"{has.fp8_recipe} cannot multiply by", "use --fp8-recipe blockwise",
        )  # fmt: skip
    if facts.parallel.etp > 1:
        raise fail(
            "train.fp8_source", source, "holds whole experts, but --expert-tensor-parallel-size is "
            f"{facts.parallel.etp}", "set it to 1",
        )  # fmt: skip


def _check_components(recipe: Recipe, facts: StudentFacts) -> None:
    """A component that matches nothing is an error."""
    train, moe = recipe.train, facts.num_moe_experts is not None
    if train.everything:
        return
    for name, exists, why in (
        ("router", moe, "the student is dense (no --num-experts)"),
        ("router_rows", moe, "the student is dense (no --num-experts)"),
        (
            "shared_experts",
            moe and facts.shared_experts,
            "the student has none (no --moe-shared-expert-intermediate-size)",
        ),
        ("mlp", facts.has_dense_layers, "every layer is a MoE layer"),
        (
            "mamba",
            facts.pattern is not None and bool(facts.pattern.where("M")),
            "the student has no Mamba layer (M in --hybrid-layer-pattern)",
        ),
    ):
        if getattr(train, name) and not exists:
            raise fail(f"train.{name}", True, "matches nothing", f"{why}; set it to false")
    for i, layer in enumerate(train.layers):
        if layer >= facts.num_layers:
            remedy = f"the student's layers are 0 to {facts.num_layers - 1}"
            raise fail(f"train.layers[{i}]", layer, "is no layer of the student", remedy)
    if train.experts == "all" and not moe:
        raise fail("train.experts", "all", "matches nothing", "the student is dense; write none")
    if facts.tied_embeddings and train.embedding != train.output_layer:
        raise RecipeError(
            f"train.embedding: {train.embedding} and train.output_layer: {train.output_layer} "
            "disagree about one matrix, which the student shares between both; set both alike "
            "or use --untie-embeddings-and-output-weights",
            "train.embedding",
        )


def _trained_experts(recipe: Recipe, facts: StudentFacts | None) -> str:
    if recipe.train.experts == "all":
        return "all experts"
    if any(domain.experts.undecided for domain in recipe.domains):
        return "experts still to be chosen"
    chosen = recipe.experts_by_layer()
    total = sum(len(ids) for ids in chosen.values())
    text = f"{_some(total, 'expert')} in {_some(len(chosen), 'layer')}"
    if facts is not None and facts.num_moe_experts is not None:
        text += f" (of {facts.num_moe_experts * len(facts.moe_layers)} in {len(facts.moe_layers)})"
    return text


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
