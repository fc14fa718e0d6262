"""``moe-inject plan --gpus``: the options, and what is printed beside the plan of the recipe."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import replace_file, try_file
from megatron_moe_inject.planning.calibrate import Rate, measured_arms, rate_of, read_results
from megatron_moe_inject.planning.client import Planner, planner
from megatron_moe_inject.planning.job_plan import as_json
from megatron_moe_inject.planning.remedies import remedy_lines
from megatron_moe_inject.planning.report import GIB, Memory, plan_lines, too_large
from megatron_moe_inject.planning.step_time import step_time
from megatron_moe_inject.planning.suggest import Model, Search, suggestion_lines
from megatron_moe_inject.recipe.load import dump_recipe
from megatron_moe_inject.recipe.schema import Recipe

EXAMPLES = """  moe-inject plan recipe.yaml --gpus 64 --tflops 300 -- --num-layers 24 ...
"""
_MEMORY = 80.0
_RESERVE = 4.0


@dataclass(frozen=True)
class Planned:
    """What is to be shown.

    Attributes:
        lines: by title.
        fits: whether every rank does.
    """

    lines: dict[str, list[str]]
    fits: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-inject plan`` that ask for a plan of every rank."""
    group = parser.add_argument_group("memory and time of every rank, without a GPU")
    group.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="plan a job of that many ranks: what each holds, what a step takes; exit status 3 "
        "where one does not fit",
    )
    for flag, default, text in (
        ("gpu-memory", _MEMORY, "memory of a GPU"),
        ("reserve", _RESERVE, "of it, what CUDA, NCCL and gaps of the allocator take"),
    ):
        group.add_argument(
            f"--{flag}",
            type=float,
            metavar="GIB",
            help=f"{text} (default {default:g})",
        )
    group.add_argument(
        "--tflops", type=float, metavar="RATE", help="10^12 operations a second that a GPU reaches"
    )
    group.add_argument(
        "--calibrate",
        metavar="RESULTS",
        help="take that rate from measured steps instead, such as "
        "examples/benchmarks/results/2026-11-26-step-h100-third.json",
    )
    group.add_argument(
        "--suggest",
        action="store_true",
        help="also search layouts and recompute: on the fewest GPUs, and the fastest on N",
    )
    group.add_argument("--json", metavar="FILE", help="write the plan of every rank to this file")


def check_options(options: argparse.Namespace, flags: Sequence[str] | None) -> None:
    """Raise ``RecipeError`` for options that do not go together."""
    others = ("gpu_memory", "reserve", "tflops", "calibrate", "suggest", "json")
    if options.gpus is None:
        for name in others:
            if getattr(options, name):
                raise RecipeError(f"--{name.replace('_', '-')}: is of a plan of ranks; add --gpus")
        return
    if not flags:
        raise RecipeError("--gpus: needs the model and its layout; add -- and the Megatron flags")
    for name in ("gpus", "gpu_memory", "reserve", "tflops"):
        value = getattr(options, name)
        if value is None or 0 < value < math.inf or (name == "reserve" and value == 0):
            continue
        problem = "positive" if value <= 0 else "finite"
        raise RecipeError(f"--{name.replace('_', '-')}: {value:g} is not {problem}")
    if options.tflops is not None and options.calibrate is not None:
        raise RecipeError("--calibrate: stands beside --tflops; leave one of them out")
    if options.calibrate is not None:
        read_results(options.calibrate)
    if options.json is not None:
        try_file(options.json, "--json")


def plan_ranks(
    options: argparse.Namespace, recipe: Recipe, args: argparse.Namespace, flags: Sequence[str]
) -> Planned:
    """The plan of every rank.

    Args:
        recipe: its experts resolved.
        args: Megatron's, parsed.
        flags: the same as they were written.

    Raises:
        RecipeError: experts are still to be chosen, or the flags do not fit that many GPUs.
    """
    for domain in recipe.domains:
        if domain.experts.profile is not None:
            raise RecipeError(
                f"--gpus: the experts of {domain.name} are still to be chosen from "
                f"{domain.experts.profile}; record it with moe-inject profile, or write layers"
            )
        if domain.experts.new is not None:
            raise RecipeError(
                f"--gpus: the new experts of {domain.name} are in no checkpoint yet; name the one "
                "that moe-inject add-experts wrote with --load behind --, or write layers"
            )
    memory = _memory(options)
    with planner() as process:
        answer = process.plan(dump_recipe(recipe), flags, options.gpus, memory=memory.total)
        rate = _rate(options, process, flags)
        fits = not too_large(answer.plan, memory)
        suggested, helps = [], []
        if not fits and not options.suggest:
            helps = remedy_lines(
                process, dump_recipe(recipe), flags, answer.plan, _model(args), memory
            )
        if options.suggest:
            _no_pattern(args)
            search = Search(
                process,
                dump_recipe(recipe),
                flags,
                answer.plan,
                _model(args),
                memory,
                rate.tflops if rate else None,
            )
            suggested = suggestion_lines([search.fewest(), search.fastest()])
    time = None if rate is None else step_time(answer.plan, rate.tflops, answer.steps)
    if options.json is not None:
        text = json.dumps(as_json(answer.plan), indent=1) + "\n"
        replace_file(options.json, text.encode())
    lines = plan_lines(answer.plan, memory, time, answer.remarks, rate.told if rate else "")
    lines["what helps"], lines["suggested"] = helps, suggested
    return Planned(lines, fits)


def _no_pattern(args: argparse.Namespace) -> None:
    if getattr(args, "hybrid_layer_pattern", None) is not None:
        raise RecipeError(
            "--suggest: a hybrid model's stages stand in --hybrid-layer-pattern, which it does not "
            "change; leave it out and plan the patterns one by one"
        )


def _model(args: argparse.Namespace) -> Model:
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    return Model(
        args.num_layers or 0,
        args.num_experts or 0,
        heads,
        groups,
        args.micro_batch_size,
        args.global_batch_size,
        bool(args.mtp_num_layers),
        pattern=getattr(args, "hybrid_layer_pattern", None) is not None,
    )


def _memory(options: argparse.Namespace) -> Memory:
    total = _MEMORY if options.gpu_memory is None else options.gpu_memory
    reserve = _RESERVE if options.reserve is None else options.reserve
    if reserve >= total:
        raise RecipeError(f"--reserve: {reserve:g} GiB is all of --gpu-memory {total:g}; give less")
    return Memory(int(total * GIB), int(reserve * GIB))


def _rate(options: argparse.Namespace, process: Planner, flags: Sequence[str]) -> Rate | None:
    if options.tflops is not None:
        rate = options.tflops
        return Rate(rate, rate, rate, f"at {rate:g} TFLOP/s a GPU")
    if options.calibrate is None:
        return None
    results = read_results(options.calibrate)
    precision = "fp8" if "--fp8-format" in flags else "bf16"
    return rate_of(measured_arms(process, results, precision), results.get("machine", "unknown"))
