"""What a run whose training goes on stored in Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load


def stored_argument(args: Namespace, name: str) -> tuple[Path | None, Any]:
    """An argument of the run whose training goes on, as its checkpoint stores it. No collective.

    Returns:
        The checkpoint's folder, ``None`` where a run starts anew; and the value, ``None`` where the
        run had none.

    Raises:
        RecipeError: the checkpoint is damaged, or of a kind that cannot be read.
    """
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None or not checkpoint.resumes:
        return None, None
    return checkpoint.folder, checkpoint.argument(name)
