"""``moe-inject``: what can be done without starting a job.

``plan`` checks a recipe by itself and, with the flags of a training command after ``--``,
against the student that they describe, the teachers' directories and the files of the data.
A routing profile need not be there yet. Megatron's own parser reads those flags; nothing is built,
no process group, no GPU, no weights read. With ``--gpus`` every rank of the job is planned as well,
in a process of its own (``planning``). ``select`` chooses experts from a routing profile and
``merge-profiles`` adds profiles up (``select_command``). A mistake is one line on stderr and exit
status 2, and nobody else's remarks stand beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_moe_inject import __version__
from megatron_moe_inject.adapters import command as adapters_command
from megatron_moe_inject.convert import command as convert_command
from megatron_moe_inject.convert import densify_command, upcycle_command
from megatron_moe_inject.data import command as data_command
from megatron_moe_inject.evaluation import command as evaluate_command
from megatron_moe_inject.evaluation.report import command as report_command
from megatron_moe_inject.experts.choose import profile_command, select_command
from megatron_moe_inject.experts.choose.choice import resolve_experts
from megatron_moe_inject.experts.delta import command as delta_command
from megatron_moe_inject.experts.grow import command as grow_command
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.help_texts import make_printable
from megatron_moe_inject.host.text import count
from megatron_moe_inject.launch import only_evaluate
from megatron_moe_inject.planning import command as planning
from megatron_moe_inject.recipe import command as schema_command
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.flags import add_inject_arguments, name_error, recipe_from_args
from megatron_moe_inject.recipe.load import load_recipe, located
from megatron_moe_inject.recipe.plan import Plan, render_lines, render_plan
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.student import check_recipe, student_facts_from_args
from megatron_moe_inject.rollouts import command as rollouts_command
from megatron_moe_inject.routing import report as routing_report
from megatron_moe_inject.teachers.store import command as store_command
from megatron_moe_inject.teachers.store import convert as convert_store

_EXAMPLES = """examples:
  moe-inject plan recipe.yaml
  moe-inject plan recipe.yaml --inject-set objective.alpha=0.5
  moe-inject plan recipe.yaml --wraps
  moe-inject plan recipe.yaml -- --num-layers 24 --num-experts 64 --data-path 9 code 1 text ...
"""
_EXAMPLES += planning.EXAMPLES


class _TrainingParser(argparse.ArgumentParser):
    """Megatron's parser, except that an error is one line and not its whole usage."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"Megatron flags: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake in the input, or 3 where a
    plan's ranks do not fit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ours, flags = argv, None
    if "--" in argv:
        at = argv.index("--")
        ours, flags = argv[:at], argv[at + 1 :]
    parser = _parser()
    options, unknown = parser.parse_known_args(ours)
    takes_flags = any(
        (options.command == "plan", hasattr(options, "evaluates"), hasattr(options, "writes_store"))
    )
    status = 0
    if unknown and not takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if unknown:
            raise RecipeError(
                f"{options.command}: {listing(unknown, 4)}: not known here; put -- before the "
                f"Megatron flags, as in moe-inject {options.command} {options.recipe} ... -- "
                "--num-layers 24"
            )
        if hasattr(options, "evaluates") and not getattr(options, "server", None):
            _check_evaluates(options, flags or [])
            only_evaluate(flags or [], options.evaluates(options), cpu=options.cpu)
            return 0
        with _quiet():
            if options.command == "plan":
                text, status = _planned(options, flags)
            elif hasattr(options, "writes_store"):
                text = _store(options, flags)
            elif flags and not hasattr(options, "takes_flags"):
                raise RecipeError(
                    f"{options.command} takes no training flags; leave out -- and them"
                )
            else:
                options.flags = flags or []
                text = options.run(options)
    except RecipeError as error:
        print(f"moe-inject: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _planned(options: argparse.Namespace, flags: list[str] | None) -> tuple[str, int]:
    """The text of a plan, and the exit status: 3 where a rank does not fit."""
    planning.check_options(options, flags)
    plan, args = _plan(options, flags)
    text, status = render_plan(plan), 0
    if options.gpus is not None:
        assert args is not None, "check_options has asked for flags"
        ranks = planning.plan_ranks(options, plan.recipe, args, flags or [])
        text += render_lines(ranks.lines)
        status = 0 if ranks.fits else 3
    return text + (_wraps(plan, args) if options.wraps else ""), status


def _check_evaluates(options: argparse.Namespace, flags: list[str]) -> None:
    """Before anything is started: where ``--cpu`` stands, and that the output can be written.

    Raises:
        RecipeError: one of them is wrong.
    """
    if "--cpu" in flags:
        raise RecipeError("--cpu: is no flag of Megatron's; put it before --")
    if os.environ.get("RANK", "0") == "0":
        folder = options.command == "rollouts"
        try_file(Path(options.output, "tried" if folder else ""), "--output")


def _comparison(*measured: Any) -> Any:
    """``evaluation.grown.Comparison``, which needs torch."""
    from megatron_moe_inject.evaluation.grown import Comparison

    return Comparison(*measured)


def _feed_forwards(flag: str, path: Path) -> Any:
    """``convert.feed_forwards.open_folder``, which needs torch."""
    from megatron_moe_inject.convert.feed_forwards import open_folder

    return open_folder(flag, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-inject",
        description="Tools around training with megatron_moe_inject.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="check a recipe and print what it would do",
        usage="%(prog)s [-h] [--inject-set KEY=VALUE ...] [--wraps] [--gpus N ...] RECIPE "
        "[-- MEGATRON FLAGS]",
        description="Check a recipe and print what it would do. With the flags of a training "
        "command after --, check it against that student, the teachers' files and the data as "
        "well. A routing profile that it names need not be there yet.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML)")
    plan.add_argument(
        "--inject-set",
        metavar="KEY=VALUE",
        action="append",
        nargs="+",
        default=[],
        help="override recipe fields, as in training",
    )
    plan.add_argument(
        "--wraps",
        action="store_true",
        help="also print what of Megatron's the run would wrap, and what for",
    )
    planning.add_options(plan)
    data_command.add_commands(commands)
    select_command.add_commands(commands)
    delta_command.add_commands(commands)
    grow_command.add_commands(commands, _comparison, {"hf": _feed_forwards})
    convert_command.add_commands(commands)
    upcycle_command.add_commands(commands)
    densify_command.add_commands(commands)
    adapters_command.add_commands(commands)
    profile_command.add_commands(commands)
    routing_report.add_commands(commands)
    evaluate_command.add_commands(commands)
    rollouts_command.add_commands(commands)
    report_command.add_commands(commands)
    schema_command.add_commands(commands)
    store_command.add_commands(commands)
    convert_store.add_commands(commands)
    return parser


def _plan(
    options: argparse.Namespace, flags: list[str] | None
) -> tuple[Plan, argparse.Namespace | None]:
    """The plan, and the arguments of the training command where it is given."""
    overrides = [item for group in options.inject_set for item in group]
    if not flags:
        recipe = load_recipe(options.recipe, overrides)
        try:
            return Plan(resolve_experts(recipe, may_be_missing=True)), None
        except RecipeError as error:
            raise located(error, options.recipe, overrides) from None
    args, unknown = _training_arguments(options, flags)
    recipe_and_facts = recipe_for_student(args, profiles_may_be_missing=True)
    assert recipe_and_facts is not None
    recipe, facts = recipe_and_facts
    lines, remarks = _teacher_lines(recipe, args)
    for feature in FEATURES:
        remarks += feature.foresee(recipe, facts, args)
    if unknown:
        remarks.append(f"not Megatron flags, ignored: {' '.join(unknown)}")
    return Plan(recipe, facts, lines, remarks), args


def _training_arguments(
    options: argparse.Namespace, flags: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Megatron's namespace of a training command with the recipe in it, and flags that are not
    Megatron's."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _TrainingParser(prog=f"moe-inject {options.command}", allow_abbrev=False)
    make_printable(add_megatron_arguments(parser))
    if "--inject-recipe" not in parser._option_string_actions:
        add_inject_arguments(parser)
    args, unknown = parser.parse_known_args(flags)
    if args.inject_recipe is not None:
        raise RecipeError("--inject-recipe: the recipe is already named; leave it out after --")
    args.inject_recipe = options.recipe
    overrides = [item for group in options.inject_set for item in group]
    args.inject_set = [overrides, *(args.inject_set or [])]
    return args, unknown


def _store(options: argparse.Namespace, flags: list[str] | None) -> str:
    """Write a store; what to print."""
    if not flags:
        raise RecipeError(
            f"{options.command}: put -- and Megatron's flags for the data, its tokenizer and "
            "--seq-length behind the options"
        )
    args, unknown = _training_arguments(options, flags)
    if unknown:
        raise RecipeError(f"{options.command}: {listing(unknown, 4)}: no flags of Megatron's")
    return options.writes_store(options, args)


def _wraps(plan: Plan, args: argparse.Namespace | None) -> str:
    from megatron_moe_inject.contracts import in_use
    from megatron_moe_inject.host.wrap_list import render_table
    from megatron_moe_inject.run import run_kind

    kind = INJECTION if args is None else run_kind(args)
    return "\n\n" + render_table(in_use(plan.recipe, plan.facts, args, kind=kind))


def _teacher_lines(
    recipe: Recipe, args: argparse.Namespace
) -> tuple[dict[str, list[str]], list[str]]:
    """What the teachers' files say, as lines of the plan, and remarks on it; RecipeError where a
    run would refuse them at start."""
    from megatron_moe_inject.teachers.fit import checked_teachers, remarks
    from megatron_moe_inject.teachers.part import teacher_lines

    try:
        infos = checked_teachers(recipe, args)
    except RecipeError as error:
        raise name_error(error, args) from None
    rows = {
        name: (f"{info.kind} ({info.architecture})", count(info.parameters))
        for name, info in infos.items()
    }
    return teacher_lines(recipe, rows), remarks(infos, args.seq_length, {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks of Megatron, torch and matplotlib off the terminal, which speak of missing
    GPU libraries, caches and their own future; who asks Python for warnings (-W) gets them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def recipe_for_student(
    args: Namespace, *, profiles_may_be_missing: bool = False
) -> tuple[Recipe, StudentFacts] | None:
    """``recipe_from_args``, resolved and checked against the student of the same flags.

    Args:
        args: Megatron's namespace.
        profiles_may_be_missing: see ``resolve_experts``.

    No collective and no CUDA; every rank reaches the same verdict from the same flags.

    Raises:
        RecipeError: any mistake, in terms of flags where the recipe came from flags.
    """
    recipe = recipe_from_args(args)
    if recipe is None:
        return None
    facts = student_facts_from_args(args)
    try:
        recipe = resolve_experts(recipe, facts, may_be_missing=profiles_may_be_missing)
        check_recipe(recipe, facts)
    except RecipeError as error:
        raise name_error(error, args) from None
    return recipe, facts


if __name__ == "__main__":
    sys.exit(main())
