"""The ``--inject-*`` flags and what they say: nothing, a recipe file, or one plain domain.

Every default is None, so that an absent flag can be told from any value and a run without
``--inject-*`` is not touched. Values stay plain strings and lists until ``recipe_from_args``
reads them: Megatron pickles its namespace into checkpoints, and a wrong number then ends in
one ``RecipeError`` instead of argparse's thousand lines of usage.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.losses.kinds import KINDS
from megatron_moe_inject.recipe.load import load_recipe, located, recipe_from_flags
from megatron_moe_inject.recipe.schema import Recipe

_OBJECTIVE = ("alpha", "beta", "general_beta", "gamma", "temperature", "divergence")
_TRAIN = ("train_router", "train_everything")
_PLAIN = ("teacher", "domain_data", "domain_name", "experts", *_OBJECTIVE, *_TRAIN)
_PROFILE = ("profile", "profile_coselections", "profile_logits")
_CHECKS = ("from_scratch", "verify_frozen", "verify_inputs")
_RUN = ("dry_run", "progress", *_CHECKS, *_PROFILE, "evaluate", "rollouts")
_FLAG_OF_KEY = (
    (r"domains\[0\]\.experts\.layers\.(\d+)", r"--inject-experts (layer \1)"),
    (r"domains\[0\]\.experts(\.layers)?", "--inject-experts"),
    (r"domains\[0\]\.teacher|teachers\.teacher(\.source)?", "--inject-teacher"),
    (r"domains\[0\]\.data", "--inject-domain-data"),
    (r"domains\[0\]\.name", "--inject-domain-name"),
    (r"objective\.general_beta", "--inject-general-beta"),
    (r"objective\.(alpha|beta|gamma|temperature|divergence)", r"--inject-\1"),
)


def add_inject_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the plugin's flags to Megatron's parser as one group; returns the parser."""
    group = parser.add_argument_group(title="moe-inject")
    group.add_argument(
        "--inject-recipe",
        metavar="PATH",
        help="Recipe (YAML): domains, teachers, experts, objective, what trains.",
    )
    group.add_argument(
        "--inject-set",
        metavar="KEY=VALUE",
        action="append",
        nargs="+",
        help="Override recipe fields, e.g. teachers.coder.temperature=2 domains[0].data=[1,2].",
    )
    for flag, text in (
        ("dry-run", "Build everything, print the plan and exit."),
        ("from-scratch", "Let the student begin with random weights where --load has none."),
        ("verify-frozen", "At the end, prove by checksums that frozen parameters are unchanged."),
        (
            "verify-inputs",
            "At start, check the files of teachers against SHA256SUMS in their folders or "
            "FILE.sha256 beside them; the student's checkpoint too, where it has some.",
        ),
        (
            "progress",
            "Show the time left and the losses: a bar on a terminal, else a line after "
            "each of Megatron's. Our own entry does so by itself.",
        ),
        ("train-router", "Without a recipe: train the routers as well."),
        ("train-everything", "Without a recipe: train the whole student."),
    ):
        group.add_argument(f"--inject-{flag}", action="store_true", default=None, help=text)
    group.add_argument(
        "--inject-profile",
        metavar="PATH",
        help="Record how each class of data is routed, in training or with --skip-train in "
        "evaluation, and write it to this file (JSON).",
    )
    group.add_argument(
        "--inject-profile-coselections",
        action="store_true",
        default=None,
        help="Record besides which experts are chosen together.",
    )
    group.add_argument(
        "--inject-profile-logits",
        metavar="N",
        type=int,
        help="Keep besides the router logits of at most N tokens of each class, in a safetensors "
        "file beside the profile.",
    )
    group.add_argument(
        "--inject-evaluate",
        metavar="PATH",
        help="With --skip-train: measure student and teachers on the validation data and write "
        "the evaluation to this file (JSON).",
    )
    group.add_argument(
        "--inject-rollouts",
        metavar="JSON",
        help="With --skip-train: let the student go on from prompts, and write what it wrote, as "
        "moe-inject rollouts asks.",
    )
    for flag, metavar, text in (
        ("teacher", "SOURCE", "megatron:/dir or hf:/dir."),
        ("domain-name", "NAME", "name in the logs (default: domain)."),
        ("experts", "LAYER:IDS", 'experts by 0-based global layer, as in "12:3,40;13:1".'),
        ("alpha", "W", "weight of distillation (default 1)."),
        ("beta", "W", "weight of cross-entropy (default 0)."),
        ("general-beta", "W", "weight of cross-entropy on general tokens (default: beta)."),
        ("gamma", "W", "weight of KL to the original model on general tokens (default 0)."),
        ("temperature", "T", "distillation temperature (default 1)."),
        ("divergence", "KIND", f"{', '.join(KINDS)} (default {KINDS[0]})."),
    ):
        group.add_argument(f"--inject-{flag}", metavar=metavar, help=f"Without a recipe: {text}")
    group.add_argument(
        "--inject-domain-data",
        metavar="ENTRY",
        nargs="+",
        help="Without a recipe: blend entries of the domain, by 0-based position or path prefix.",
    )
    return parser


def recipe_from_args(args: Namespace, argv: Sequence[str] | None = None) -> Recipe | None:
    """The recipe that parsed flags ask for, checked as far as the flags alone allow.

    Experts that a profile is to choose are not resolved yet.

    Args:
        args: Megatron's namespace.
        argv: the command line, to notice flags that ``--yaml-cfg`` discarded; default
            ``sys.argv[1:]``.

    Returns:
        None when no ``--inject-*`` flag is given: the run is stock Megatron.

    Raises:
        RecipeError: any mistake in the flags or in the recipe file.
    """
    if not hasattr(args, "inject_recipe"):
        _refuse_lost_flags(args, sys.argv[1:] if argv is None else argv)
        return None
    for name in ("profile_coselections", "profile_logits"):
        if _given(args, name) and not _given(args, "profile"):
            raise RecipeError(f"{_flag(name)}: no profile is recorded; add --inject-profile PATH")
    if _given(args, "profile_logits") and args.inject_profile_logits < 1:
        raise RecipeError(
            f"--inject-profile-logits: {args.inject_profile_logits} is not a number of tokens; "
            "give 1 or more, or leave it out"
        )
    overrides = _overrides(args)
    if _given(args, "evaluate") and not getattr(args, "skip_train", False):
        raise RecipeError(
            "--inject-evaluate: the run trains; add --skip-train, or write evaluation: {} in the "
            "recipe to measure while training"
        )
    if _given(args, "rollouts"):
        others = [n for n in ("evaluate", "profile") if _given(args, n)]
        if others or not getattr(args, "skip_train", False):
            beside = f"stands beside {_flag(others[0])}" if others else "the run trains"
            raise RecipeError(f"--inject-rollouts: {beside}; use moe-inject rollouts")
    if _given(args, "evaluate") and _given(args, "profile"):
        raise RecipeError("--inject-evaluate: stands beside --inject-profile; run them one by one")
    plain = [name for name in _PLAIN if _given(args, name)]
    if args.inject_recipe is None and not plain:
        if overrides or any(_given(args, name) for name in _RUN):
            stray = "set" if overrides else next(name for name in _RUN if _given(args, name))
            raise RecipeError(
                f"{_flag(stray)}: there is no recipe; add --inject-recipe PATH "
                "or the plain flags --inject-teacher, --inject-domain-data, --inject-experts"
            )
        return None
    if args.inject_recipe is not None:
        if plain:
            raise RecipeError(
                f"{_flag(plain[0])}: cannot be combined with --inject-recipe; "
                "change the recipe with --inject-set KEY=VALUE, such as objective.alpha=0.7"
            )
        recipe = load_recipe(args.inject_recipe, overrides)
    else:
        recipe = _recipe_from_plain_flags(args, overrides)
    recipe.verify_frozen = recipe.verify_frozen or bool(args.inject_verify_frozen)
    return recipe


def name_error(error: RecipeError, args: Namespace) -> RecipeError:
    """The same error in terms of where its key was written: override, recipe file or flag.

    Applying it twice changes nothing more.
    """
    error = located(error, args.inject_recipe, _overrides(args))
    message = str(error)
    if args.inject_recipe is not None or message.startswith("--inject-set"):
        return error
    for pattern, flag in _FLAG_OF_KEY:
        message = re.sub(pattern, flag, message)
    return RecipeError(message, error.key)


def _recipe_from_plain_flags(args: Namespace, overrides: list[str]) -> Recipe:
    if args.inject_domain_data is None:
        raise RecipeError(
            "--inject-domain-data: missing; name the blend entries of the domain by 0-based "
            "position or path prefix (0 when there is one dataset)"
        )
    reads = any(_given(args, name) for name in ("profile", "evaluate", "rollouts"))
    only_reads = reads and bool(args.skip_train)
    trained = any(_given(args, name) for name in ("experts", *_TRAIN))
    if not trained and not only_reads:
        raise RecipeError(
            "--inject-experts: missing; choose experts as LAYER:ID,ID;LAYER:ID, such as 12:3,40, "
            "or add --inject-train-everything"
        )
    objective = {
        name: _number(args, name) if name != "divergence" else args.inject_divergence
        for name in _OBJECTIVE
        if _given(args, name)
    }
    named = {} if args.inject_domain_name is None else {"name": args.inject_domain_name}
    try:
        return recipe_from_flags(
            data=[_blend_entry(entry) for entry in args.inject_domain_data],
            experts=args.inject_experts,
            teacher=args.inject_teacher,
            router=bool(args.inject_train_router)
            or (only_reads and not args.inject_train_everything),
            everything=bool(args.inject_train_everything),
            overrides=overrides,
            **named,
            **objective,
        )
    except RecipeError as error:
        raise name_error(error, args) from None


def _overrides(args: Namespace) -> list[str]:
    return [item for group in args.inject_set or [] for item in group]


def _given(args: Namespace, name: str) -> bool:
    return getattr(args, f"inject_{name}", None) is not None


def _flag(name: str) -> str:
    return "--inject-" + name.replace("_", "-")


def _blend_entry(entry: Any) -> Any:
    return int(entry) if re.fullmatch(r"-?[0-9]{1,9}", str(entry)) else entry


def _number(args: Namespace, name: str) -> Any:
    value = getattr(args, f"inject_{name}")
    try:
        return typed.parse_scalar(value) if isinstance(value, str) else value
    except RecipeError as error:
        raise RecipeError(f"{_flag(name)}: {error}; write a number") from None


def _refuse_lost_flags(args: Namespace, argv: Sequence[str]) -> None:
    lost = next((arg for arg in argv if arg.startswith("--inject-")), None)
    if lost is not None and getattr(args, "yaml_cfg", None) is not None:
        raise RecipeError(
            f"--yaml-cfg {args.yaml_cfg}: replaces the command line, so {lost} is lost; "
            "give Megatron's options as flags instead"
        )
