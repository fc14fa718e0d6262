"""``moe-inject schema``: the recipe as a JSON Schema."""

from __future__ import annotations

import argparse
import json

from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.recipe.json_schema import recipe_schema

_EXAMPLES = """examples:
  moe-inject schema --output recipe.schema.json

The first line of a recipe then tells editors with a YAML language server to use it:
  # yaml-language-server: $schema=recipe.schema.json
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the command to ``moe-inject``; ``run`` takes the options and returns the text."""
    schema = commands.add_parser(
        "schema",
        help="the recipe as a JSON Schema, for editors",
        description="Print a JSON Schema of the recipe, by which editors complete and check it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    schema.set_defaults(run=_run)
    schema.add_argument("--output", metavar="FILE", help="write it to this file instead")


def _run(options: argparse.Namespace) -> str:
    text = json.dumps(recipe_schema(), indent=2)
    if options.output is None:
        return text
    replace_file(options.output, (text + "\n").encode())
    return f"schema of the recipe: written to {options.output}"
