"""What the student is, as far as a recipe cares, and whether the recipe fits it.

``student_facts_from_args`` reads Megatron's namespace once into ``StudentFacts``; everything
after it is pure, so that the same checks serve a training job, ``moe-inject plan`` and tests.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from fnmatch import fnmatchcase

from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    listing,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe.entries import SPLITS, data_paths, split_labels
from megatron_moe_inject.recipe.facts import (
    ParallelFacts,
    PrecisionFacts,
    StudentFacts,
    TokenizerFacts,
)
from megatron_moe_inject.recipe.refused_options import (
    CLIPS,
    COUNTS_ATTENTION,
    FP8_PARAMETERS,
    GRAPHS,
    GRAPHS_OF_LAYERS,
    NO_PARTS,
    NO_SCHEDULED_MIXING,
    NO_SECOND_COMBINE,
    NO_SECOND_RUN,
    NO_STEERING,
    REFUSED,
    Refusal,
    in_use,
)
from megatron_moe_inject.recipe.rules import FP8_SCALINGS, validate
from megatron_moe_inject.recipe.schedule import Schedule, ever_positive
from megatron_moe_inject.recipe.schema import Recipe


def student_facts_from_args(args: Namespace) -> StudentFacts:
    """Facts from Megatron's parsed flags, before or after its own validation.

    Raises:
        RecipeError: ``--moe-layer-freq`` or a file that lists data paths cannot be read.
    """
    hybrid = any(getattr(args, name, None) for name in ("hybrid_layer_pattern", "yaml_cfg"))
    if args.num_layers is None and not hybrid:
        raise RecipeError("--num-layers: missing; name it on the command line")
    experts = getattr(args, "num_experts", None) or None
    mock = bool(getattr(args, "mock_data", False))
    return StudentFacts(
        num_layers=args.num_layers or 0,
        num_moe_experts=experts,
        router_topk=getattr(args, "moe_router_topk", None) if experts else None,
        moe_layers=_moe_layers(args) if experts else (),
        shared_experts=bool(getattr(args, "moe_shared_expert_intermediate_size", None)),
        tied_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        data_paths={} if mock else data_paths(args),
        mock_data=mock,
        hidden_size=getattr(args, "hidden_size", None),
        padded_vocab_size=getattr(args, "padded_vocab_size", None),
        tokenizer=TokenizerFacts(
            kind=getattr(args, "tokenizer_type", None),
            model=getattr(args, "tokenizer_model", None),
            vocab_file=getattr(args, "vocab_file", None),
            merge_file=getattr(args, "merge_file", None),
        ),
        parallel=ParallelFacts(
            tp=getattr(args, "tensor_model_parallel_size", 1),
            pp=getattr(args, "pipeline_model_parallel_size", 1),
            vpp=getattr(args, "virtual_pipeline_model_parallel_size", None),
            cp=getattr(args, "context_parallel_size", 1),
            ep=getattr(args, "expert_model_parallel_size", 1),
            etp=getattr(args, "expert_tensor_parallel_size", None)
            or getattr(args, "tensor_model_parallel_size", 1),
            sequence_parallel=bool(getattr(args, "sequence_parallel", False)),
        ),
        precision=PrecisionFacts(
            fp8=getattr(args, "fp8", None) or None,
            fp8_recipe=getattr(args, "fp8_recipe", None),
            transformer_engine=getattr(args, "transformer_impl", None) == "transformer_engine",
            grouped_gemm=bool(getattr(args, "moe_grouped_gemm", False)),
        ),
        options=in_use(args),
    )


def _moe_layers(args: Namespace) -> tuple[int, ...]:
    """0-based MoE layers: every freq-th from layer 0, or the ones of a 0/1 pattern."""
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
    _check_layers(recipe, facts)
    _check_components(recipe, facts)
    _check_clipping(recipe, facts)
    for split in ("train", *(s for s in SPLITS[1:] if s in facts.data_paths)):
        split_labels(recipe, facts, split)
    _check_retention(recipe, facts)
    if how := _some_experts_train(recipe, facts):
        for option in NO_PARTS:
            if option.matches(facts.options):
                raise RecipeError(
                    f"{option.flag}: {option.reason}, so that {how} cannot train some of them; "
                    "remove it, or train all experts",
                    option.flag,
                )
        if facts.precision.groups_with_histories and FP8_PARAMETERS.matches(facts.options):
            raise RecipeError(
                f"{FP8_PARAMETERS.flag}: with --fp8-recipe delayed and {how} nobody has verified "
                "parameters that are kept in FP8; remove it, or use another --fp8-recipe",
                FP8_PARAMETERS.flag,
            )
    if recipe.train.frozen_experts == "fp8":
        _check_frozen_fp8(recipe, facts)
    _check_steering(recipe, facts)
    if any(isinstance(share, Schedule) for share in recipe.mixing.values()):
        _refuse(NO_SCHEDULED_MIXING, facts, "the shares of mixing", "numbers")
    for term in recipe.objective.features.in_use():
        extra = NO_SECOND_COMBINE if term == "experts" else ()
        _refuse((GRAPHS_OF_LAYERS, *extra), facts, f"objective.features.{term}")


def _some_experts_train(recipe: Recipe, facts: StudentFacts) -> str | None:
    """By which field of the recipe some of a layer's experts train and others not."""
    train = recipe.train
    if train.experts == "selected":
        return "train.experts: selected"
    experts = range(facts.num_moe_experts or 0)
    if train.experts == "all" or not train.patterns or not experts:
        return None
    for layer in sorted(set(facts.moe_layers) - set(train.layers)):
        for linear in ("linear_fc1", "linear_fc2"):
            names = [f"decoder.layers.{layer}.mlp.experts.{e}.{linear}.weight" for e in experts]
            found = {name for p in train.patterns for name in names if fnmatchcase(name, p)}
            if 0 < len(found) < len(names):
                return "train.patterns"
    return None


def _check_frozen_fp8(recipe: Recipe, facts: StudentFacts) -> None:
    """Experts can be kept in FP8 where TE's grouped linear layers multiply in FP8."""
    has = facts.precision
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
    _refuse(NO_PARTS, facts, "train.frozen_experts", "params")
    if recipe.train.fp8_source is not None:
        if has.fp8_recipe != "blockwise":
            raise fail(
                "train.fp8_source", recipe.train.fp8_source, "has scales for blocks, which "
                f"--fp8-recipe {has.fp8_recipe} cannot multiply by", "use --fp8-recipe blockwise",
            )  # fmt: skip
        if facts.parallel.etp > 1:
            raise fail(
                "train.fp8_source", recipe.train.fp8_source, "holds whole experts, but "
                f"--expert-tensor-parallel-size is {facts.parallel.etp}", "set it to 1",
            )  # fmt: skip


def _refuse(
    options: Iterable[Refusal], facts: StudentFacts, weight: str, without: str = "0"
) -> None:
    """Options that one part of the recipe does not work with, and its value without it."""
    for option in options:
        if option.matches(facts.options):
            raise RecipeError(
                f"{option.flag}: {option.reason}; remove it, or set {weight} to {without}",
                option.flag,
            )


def _check_retention(recipe: Recipe, facts: StudentFacts) -> None:
    if recipe.objective.retention.originals == "host":
        _refuse((FP8_PARAMETERS,), facts, "objective.retention.originals", "device")
    packed = (option for option in REFUSED if option.with_teacher)
    for key, weight, options in (
        ("objective.gamma", recipe.objective.gamma, (*packed, GRAPHS, *COUNTS_ATTENTION)),
        ("objective.retention.experts", recipe.objective.retention.experts, NO_SECOND_RUN),
    ):
        if ever_positive(weight):
            _refuse(options, facts, key)
            if GENERAL not in split_labels(recipe, facts, "train"):
                raise fail(
                    key, weight,
                    "weighs retention on general data, but every dataset belongs to a domain",
                    "add general data to --data-path (5 to 10 %) or set it to 0",
                )  # fmt: skip


def _check_steering(recipe: Recipe, facts: StudentFacts) -> None:
    steering = recipe.steering
    if not steering.watches:
        return
    used = {"coeff": steering.steers, "retention": steering.retains, "report": steering.report}
    name = next(name for name, value in used.items() if value)
    if facts.num_moe_experts is None:
        raise fail(
            f"steering.{name}", getattr(steering, name), "needs routers, but the student is dense",
            "set it to 0 or false",
        )  # fmt: skip
    if steering.steers or steering.retains:
        _refuse(NO_STEERING, facts, f"steering.{name}")
    if steering.retains and GENERAL not in split_labels(recipe, facts, "train"):
        raise fail(
            "steering.retention", steering.retention,
            "holds routers on general data, but every dataset belongs to a domain",
            "add general data to --data-path (5 to 10 %) or set it to 0",
        )  # fmt: skip


def check_options(recipe: Recipe, facts: StudentFacts) -> None:
    """RecipeError for a Megatron option that the plugin does not work with."""
    taught = any(domain.teacher is not None for domain in recipe.domains)
    for option in REFUSED:
        if option.matches(facts.options) and (taught or not option.with_teacher):
            remedy = "remove it"
            if option.with_teacher:
                remedy = "remove it, or use a recipe without teachers"
            raise RecipeError(f"{option.flag}: {option.reason}; {remedy}", option.flag)


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
                raise fail(
                    key,
                    layer,
                    "is a dense layer",
                    f"MoE layers: {ranges(facts.moe_layers)} (nearest {listing(sorted(near))})",
                )
            for expert in ids:
                if expert >= count:
                    raise fail(key, ids, f"names expert {expert}", f"experts are 0 to {count - 1}")


def _check_components(recipe: Recipe, facts: StudentFacts) -> None:
    """Every component that is to train must exist: a pattern that matches nothing is an error."""
    train, moe = recipe.train, facts.num_moe_experts is not None
    for name, exists, why in (
        ("router", moe, "the student is dense (no --num-experts)"),
        ("router_rows", moe, "the student is dense (no --num-experts)"),
        (
            "shared_experts",
            moe and facts.shared_experts,
            "the student has none (no --moe-shared-expert-intermediate-size)",
        ),
        ("mlp", len(facts.moe_layers) < facts.num_layers, "every layer is a MoE layer"),
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


def _check_clipping(recipe: Recipe, facts: StudentFacts) -> None:
    """Options that change parameters outside the optimizer may do so where these train whole."""
    whole = recipe.train.attention or set(recipe.train.layers) >= set(range(facts.num_layers))
    if CLIPS.matches(facts.options) and not whole:
        raise RecipeError(
            f"{CLIPS.flag}: {CLIPS.reason}; remove it, or set train.attention: true", CLIPS.flag
        )
