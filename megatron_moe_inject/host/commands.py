"""Adding a command to ``moe-inject``."""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.host.text import memory_text

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands, name: str, summary: str, description: str, examples: str = "", **does: Any
) -> argparse.ArgumentParser:
    """Add one; returns its parser.

    Args:
        summary: its line in the list of commands.
        examples: shown below its options as they are.
        does: ``run``, which takes the parsed options and returns the text to print, or
            ``evaluates``, which takes them and returns our flags for a run that only evaluates, or
            ``writes_store``, which takes them and Megatron's arguments behind ``--`` and returns
            the text.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**does)
    return parser


def must_not_exist(output: Path) -> None:
    """RecipeError where ``--output`` is there already."""
    if os.path.lexists(output):
        raise RecipeError(
            f"--output: {show_path(output)} is there already; name a new folder", "--output"
        )


def cost(begin: float) -> str:
    """What a command took since ``begin`` (``time.monotonic``), and the most memory, in words."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return f"{time.monotonic() - begin:.1f} s, at most {memory_text(peak)} of memory"


def progress_bar(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items, with a bar on a terminal that says how far they are."""
    from tqdm import tqdm

    return tqdm(items, total=total, disable=None, leave=False)
