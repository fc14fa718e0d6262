"""Who writes rollouts: the identity of a checkpoint, for the first line of their files."""

from __future__ import annotations

from argparse import Namespace

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.lineage import identity_stored
from megatron_moe_inject.host.stored_checkpoint import (
    StoredCheckpoint,
    checkpoint_to_load,
    joined_checksum,
)
from megatron_moe_inject.rollouts.file_format import Writer


def vocabulary_of(folder: str, step: int | None = None) -> int | None:
    """Rows of the word table of a student that Megatron saved, with padding; None where its
    arguments do not say. Arguments as of ``writer_of_folder``."""
    rows = getattr(_checkpoint(folder, step).arguments(), "padded_vocab_size", None)
    return rows if isinstance(rows, int) else None


def writer_of_folder(folder: str, step: int | None = None) -> Writer:
    """Of a folder that Megatron saved to, without loading it. No collective.

    A student that no injection has trained yet is known by the SHA-256 of its weights, which are
    read whole.

    Args:
        step: the iteration; None = the newest.

    Raises:
        RecipeError: there is no checkpoint, or it cannot be read.
    """
    checkpoint = _checkpoint(folder, step)
    identity = identity_stored(checkpoint.arguments())
    return Writer(
        identity, checkpoint.iteration, _checksum(checkpoint) if identity is None else None
    )


def _checkpoint(folder: str, step: int | None) -> StoredCheckpoint:
    args = Namespace(
        load=folder, ckpt_step=step, ckpt_format="torch_dist", finetune=False,
        use_dist_ckpt=True, auto_detect_ckpt_format=True,
    )  # fmt: skip
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None:
        raise RecipeError(
            f"--checkpoint: {folder} holds no checkpoint; name the folder that training saves to"
        )
    return checkpoint


def _checksum(checkpoint: StoredCheckpoint) -> str:
    """As ``host.stored_checkpoint.model_checksum``, by one process."""
    try:
        return joined_checksum((part.name, part.digest()) for part in checkpoint.parts())
    except (OSError, EOFError) as error:
        raise checkpoint.damaged(error) from error
