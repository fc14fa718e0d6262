"""What the student is, as far as a recipe cares, and whether the recipe fits it.

``student_facts_from_args`` reads Megatron's namespace once into ``StudentFacts``; everything
after it is pure, so that the same checks serve a training job, ``moe-inject plan`` and tests.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.host.layer_pattern import LayerPattern, pattern_of
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe.entries import SPLITS, data_paths, split_labels
from megatron_moe_inject.recipe.facts import ParallelFacts, PrecisionFacts, StudentFacts
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.refused_options import REFUSED
from megatron_moe_inject.recipe.rules import validate
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.schema import Recipe

_NO_BALANCE = "set --moe-router-load-balancing-type none without --moe-z-loss-coeff"


def student_facts_from_args(args: Namespace) -> StudentFacts:
    """Facts from Megatron's parsed flags, before or after its own validation.

    Raises:
        RecipeError: ``--moe-layer-freq`` or a file that lists data paths cannot be read.
    """
    pattern = pattern_of(args)
    if args.num_layers is None and pattern is None and not getattr(args, "yaml_cfg", None):
        raise RecipeError("--num-layers: missing; name it on the command line")
    experts = getattr(args, "num_experts", None) or None
    mock = bool(getattr(args, "mock_data", False))
    tp = getattr(args, "tensor_model_parallel_size", 1)
    return StudentFacts(
        num_layers=pattern.num_layers if pattern else args.num_layers or 0,
        num_moe_experts=experts,
        router_topk=getattr(args, "moe_router_topk", None) if experts else None,
        moe_layers=_moe_layers(args, pattern) if experts else (),
        shared_experts=bool(getattr(args, "moe_shared_expert_intermediate_size", None)),
        tied_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        data_paths={} if mock else data_paths(args),
        mock_data=mock,
        hidden_size=getattr(args, "hidden_size", None),
        parallel=ParallelFacts(
            tp=tp,
            pp=getattr(args, "pipeline_model_parallel_size", 1),
            vpp=getattr(args, "virtual_pipeline_model_parallel_size", None),
            cp=getattr(args, "context_parallel_size", 1),
            ep=getattr(args, "expert_model_parallel_size", 1),
            etp=getattr(args, "expert_tensor_parallel_size", None) or tp,
        ),
        precision=PrecisionFacts(
            fp8=getattr(args, "fp8", None) or None,
            fp8_recipe=getattr(args, "fp8_recipe", None),
            transformer_engine=getattr(args, "transformer_impl", None) == "transformer_engine",
            grouped_gemm=bool(getattr(args, "moe_grouped_gemm", False)),
        ),
        options=vars(args),
        pattern=pattern,
    )


def _moe_layers(args: Namespace, pattern: LayerPattern | None) -> tuple[int, ...]:
    """0-based MoE layers: ``E`` of a hybrid pattern, else every freq-th from layer 0, or the ones
    of a 0/1 pattern."""
    if pattern is not None:
        return pattern.moe_layers
    freq, layers = getattr(args, "moe_layer_freq", 1), args.num_layers or 0
    if isinstance(freq, int):
        return tuple(i for i in range(layers) if i % freq == 0)
    if len(freq) != layers:
        raise fail(
            "--moe-layer-freq", freq, f"has {len(freq)} entries", f"--num-layers is {layers}"
        )
    return tuple(i for i, is_moe in enumerate(freq) if is_moe)


def check_recipe(recipe: Recipe, facts: StudentFacts) -> None:
    """Check the recipe, its experts resolved (but for a plan), against the student.

    Raises:
        RecipeError: a Megatron option that the plugin does not work with, a dataset, layer or
            expert that the student does not have, or a split whose datasets have no domain.
    """
    validate(recipe)
    check_options(recipe, facts)
    _check_pattern(facts)
    _check_plans(facts)
    _check_layers(recipe, facts)
    for split in ("train", *(s for s in SPLITS[1:] if s in facts.data_paths)):
        split_labels(recipe, facts, split)
    for feature in FEATURES:
        feature.check(recipe, facts)


def check_options(recipe: Recipe, facts: StudentFacts, kind: str = INJECTION) -> None:
    """Check Megatron's options.

    Args:
        kind: of the run.

    Raises:
        RecipeError: one that the plugin, or a feature of such a run, does not work with.
    """
    for option in REFUSED:
        if option.matches(facts.options):
            raise RecipeError(f"{option.flag}: {option.reason}; remove it", option.flag)
    for feature in FEATURES:
        for refused in feature.refuses if kind in feature.runs else ():
            refused.check(recipe, facts)


def _check_pattern(facts: StudentFacts) -> None:
    """A hybrid student with ``--num-experts`` has experts, where Megatron logs them on each stage.

    Stages without a layer of experts make Megatron's log wait for ever: they sum up another number
    of balance losses than the others (``training_log`` of 0.18 and 0.19). Experts of multi-token
    prediction that stand further back in a depth than there are depths have no place in that log
    (``IndexError`` in the first step of 0.20).
    """
    pattern = facts.pattern
    if pattern is None or facts.num_moe_experts is None:
        return
    flag = "--hybrid-layer-pattern"
    if not facts.moe_layers:
        remedy = "write E where experts are, or leave --num-experts out"
        raise fail(flag, pattern.text, "has no layer of experts (E)", remedy)
    balanced = facts.options.get("moe_router_load_balancing_type") not in (None, "none", ["none"])
    logged = balanced or facts.options.get("moe_z_loss_coeff") is not None
    without = pattern.stages_without_experts(facts.parallel.pp)
    if without and logged and not compat.logs_balance_of_any_stage():
        raise fail(
            flag, pattern.text, f"gives pipeline {_stages(without)} no layer of experts (E), for "
            f"which Megatron-Core {compat.megatron_version()} waits for ever when it logs balance "
            "losses", f"move a |, or {_NO_BALANCE}",
        )  # fmt: skip
    depths = pattern.prediction
    unlogged = any("E" in depth[len(depths) :] for depth in depths)
    if unlogged and logged and compat.numbers_experts_of_prediction():
        raise fail(
            flag, pattern.text, "predicts through experts (E) that stand further back in a depth "
            "than there are depths, and whose balance losses have no place in the log of "
            f"Megatron-Core {compat.megatron_version()}", f"put E first, or {_NO_BALANCE}",
        )  # fmt: skip


def _check_plans(facts: StudentFacts) -> None:
    """Where experts overlap, micro-batches go through schedule plans, which only GPT models have.

    Megatron's scripts hand no borders of packed documents to them: the student would read across
    the borders, and its teachers would not.
    """
    if not facts.options.get("overlap_moe_expert_parallel_comm"):
        return
    flag = "--overlap-moe-expert-parallel-comm"
    if facts.pattern is not None:
        raise RecipeError(
            f"{flag}: a hybrid model ({facts.pattern.text}) has no schedule plan; remove it", flag
        )
    for name in ("sft", "dataloader_inter_document_masking"):
        if facts.options.get(name):
            packing = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{flag}: Megatron's scripts leave the borders of packed documents ({packing}) out "
                "of schedule plans; remove one of them",
                flag,
            )


def _stages(ranks: list[int]) -> str:
    return f"{'stage' if len(ranks) == 1 else 'stages'} {ranges(ranks)}"


def _check_layers(recipe: Recipe, facts: StudentFacts) -> None:
    count = facts.num_moe_experts
    for i, domain in enumerate(recipe.domains):
        for layer, ids in domain.experts.layers.items():
            key = f"domains[{i}].experts.layers.{layer}"
            if count is None:
                raise fail(key, ids, "chooses experts of a dense student", "set --num-experts")
            if layer >= facts.num_layers:
                raise fail(key, layer, "is not a layer", f"layers are 0 to {facts.num_layers - 1}")
            if layer not in facts.moe_layers:
                near = sorted(facts.moe_layers, key=lambda moe: abs(moe - layer))[:2]
                kind = "a dense layer" if facts.pattern is None else facts.pattern.kind(layer)
                known = ranges(facts.moe_layers) or "(none)"
                nearest = f" (nearest {listing(sorted(near))})" if near else ""
                raise fail(key, layer, f"is {kind}", f"MoE layers: {known}{nearest}")
            for expert in ids:
                if expert >= count:
                    raise fail(key, ids, f"names expert {expert}", f"experts are 0 to {count - 1}")
