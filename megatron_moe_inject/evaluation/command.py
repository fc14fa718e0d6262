"""``moe-inject evaluate`` and ``moe-inject compare``.

``evaluate`` becomes a run of the training command that only evaluates, in this process or, under
``torchrun``, in all of them; ``evaluation_run`` says what is measured. ``compare`` sets two such
files side by side.
"""

from __future__ import annotations

import argparse

from megatron_moe_inject.evaluation.comparison import compare
from megatron_moe_inject.evaluation.evaluation_file import read_evaluation
from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.files import replace_file

_EXAMPLES = """examples:
  moe-inject evaluate recipe.yaml --output before.json -- <flags of the training command>
  torchrun --nproc-per-node 8 -m megatron_moe_inject.cli evaluate recipe.yaml --output e.json -- ...

How much is read is Megatron's business: --eval-iters batches of --global-batch-size from the
beginning of the validation data. Flags that train (--train-iters, --save ...) do nothing.
"""
_COMPARE_EXAMPLES = """examples:
  moe-inject compare before.json after.json
  moe-inject compare save/inject_evaluation.jsonl save/inject_evaluation.jsonl --output gain.md

Of a run's list (.jsonl), BEFORE is its first line and AFTER its last.
"""


def add_commands(commands: Commands) -> None:
    """Add both commands to ``moe-inject``; ``run`` takes the options and returns the text,
    ``evaluates`` takes them and returns our flags for a run that only evaluates."""
    evaluate = add_command(
        commands,
        "evaluate",
        "measure a student and its teachers on held-out text",
        "Measure the student of a training command, and the teachers of a recipe, on "
        "the validation data of each domain and of general data. Nothing is trained.",
        _EXAMPLES,
        evaluates=_evaluate,
    )
    evaluate.usage = "%(prog)s [-h] --output FILE [--cpu] RECIPE -- MEGATRON FLAGS"
    evaluate.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML)")
    evaluate.add_argument("--output", metavar="FILE", required=True, help="the evaluation (JSON)")
    evaluate.add_argument("--cpu", action="store_true", help="gloo processes without a GPU")

    comparison = add_command(
        commands,
        "compare",
        "two evaluations of the same text side by side",
        "Set two evaluations of the same text side by side, with paired bootstrap "
        "intervals and the share of the teacher's lead that was taken over.",
        _COMPARE_EXAMPLES,
        run=_compare,
    )
    comparison.add_argument("before", metavar="BEFORE", help="an evaluation (JSON), or a .jsonl")
    comparison.add_argument("after", metavar="AFTER", help="an evaluation (JSON), or a .jsonl")
    comparison.add_argument("--output", metavar="FILE", help="write the table (Markdown) here too")


def _evaluate(options: argparse.Namespace) -> list[str]:
    return ["--inject-recipe", options.recipe, "--inject-evaluate", options.output]


def _compare(options: argparse.Namespace) -> str:
    before = read_evaluation(options.before, last=False)
    after = read_evaluation(options.after)
    text = compare(before, after, (options.before, options.after))
    if options.output is not None:
        replace_file(options.output, (text + "\n").encode())
    return text
