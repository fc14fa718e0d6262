"""``moe-inject profile``: record a student's routing in a run that only evaluates.

Megatron evaluates as it does in training, in this process or, under ``torchrun``, in all of them;
``profile_run`` says what is recorded.
"""

from __future__ import annotations

import argparse

from megatron_moe_inject.host.commands import Commands, add_command

_EXAMPLES = """examples:
  moe-inject profile recipe.yaml --output code.json -- <flags of the training command>
  torchrun --nproc-per-node 8 -m megatron_moe_inject.cli profile recipe.yaml --output p.json -- ...

How much is read is Megatron's business: --eval-iters batches of --global-batch-size from the
validation and from the test data. Flags that train (--train-iters, --save ...) do nothing.
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``evaluates`` takes the options and returns our flags for
    a run that only evaluates."""
    profile = add_command(
        commands,
        "profile",
        "record how a student routes each class of data",
        "Record how the student of a training command routes each domain of a recipe "
        "and general data, and write the routing profile. Nothing is trained and no teacher is "
        "loaded.",
        _EXAMPLES,
        evaluates=_profile,
    )
    profile.usage = (
        "%(prog)s [-h] --output FILE [--coselections] [--logits N] [--cpu] RECIPE -- MEGATRON FLAGS"
    )
    profile.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML); names the domains")
    profile.add_argument("--output", metavar="FILE", required=True, help="the profile (JSON)")
    profile.add_argument(
        "--coselections", action="store_true", help="count which experts are chosen together too"
    )
    profile.add_argument(
        "--logits",
        metavar="N",
        help="keep the router logits of at most N tokens of each class too, beside the profile",
    )
    profile.add_argument("--cpu", action="store_true", help="gloo processes without a GPU")


def _profile(options: argparse.Namespace) -> list[str]:
    ours = ["--inject-recipe", options.recipe, "--inject-profile", options.output]
    if options.coselections:
        ours.append("--inject-profile-coselections")
    if options.logits is not None:
        ours += ["--inject-profile-logits", options.logits]
    return ours
