"""Adding a command to ``moe-inject``."""

from __future__ import annotations

import argparse
from typing import Any

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
