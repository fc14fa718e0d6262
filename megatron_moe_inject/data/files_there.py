"""Whether the files of a student's data are where its flags say.

Megatron looks for them when the model is built; here nothing is opened. What is in an object store,
or read by a loader of the script's own, is left to that.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    show,
)
from megatron_moe_inject.recipe.facts import StudentFacts

_REMOTE = ("s3://", "msc://")


def check_data_files(args: Namespace, facts: StudentFacts, *, other_formats: bool = False) -> None:
    """Check that each entry of each blend has its files: ``.bin`` and ``.idx``, or with ``--sft``
    the file itself.

    Args:
        args: Megatron's arguments.
        facts: the student.
        other_formats: leave an entry that is itself a file or a folder to a script that reads it
            in its own way.

    Raises:
        RecipeError: the first entry that lacks one, with its flag.
    """
    if getattr(args, "dataloader_type", None) == "external":
        return
    suffixes = ("",) if getattr(args, "sft", False) else (".bin", ".idx")
    for split, entries in facts.data_paths.items():
        for prefix in entries:
            files = [f"{prefix}{suffix}" for suffix in suffixes]
            missing = [file for file in files if not Path(file).is_file()]
            if other_formats and not prefix.endswith(suffixes) and Path(prefix).exists():
                continue
            if missing and not prefix.startswith(_REMOTE):
                text = show(prefix)
                if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
                    remedy = f"write it without its ending, as in {show(prefix[:-4])}"
                else:
                    remedy = "correct the path or prepare the data first"
                raise RecipeError(
                    f"{_flag(args, split)}: {text} has no {listing(missing)}; {remedy}"
                )


def _flag(args: Namespace, split: str) -> str:
    """Where the blend of a split is named."""
    names = ("data_path", "data_args_path", f"{split}_data_path", "per_split_data_args_path")
    name = next((name for name in names if getattr(args, name, None)), names[0])
    return f"--{name.replace('_', '-')}"
