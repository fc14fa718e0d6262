"""Whether tokenizer and weights belong together: of a folder, and of a checkpoint and the folder.

Files are read as data; what cannot be read is not compared.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags, vocabulary_of_files

_SHOWN = 3


def check_folder(folder: HfFolder, rows: int) -> None:
    """Compare a folder's tokenizer with its embedding.

    Args:
        rows: of the embedding, without padding.

    Raises:
        RecipeError: ordinary tokens have no row.
    """
    own = vocabulary_of_files(folder.path, origin=str(folder.path), rows=rows)
    beyond = {
        token: number
        for token, number in (own.ids or {}).items()
        if number >= rows and token not in own.added
    }
    if beyond:
        raise folder.error(
            f"has {rows} rows of vocabulary for a tokenizer of {own.size} ids, such as "
            f"{_some(beyond)}",
            "take tokenizer and weights of one model",
        )


def check_trained(args: Namespace, saved: Path, folder: HfFolder) -> list[str]:
    """Compare the tokenizer that a model was trained with with the folder's.

    Args:
        args: stored in the checkpoint.
        saved: where the checkpoint has a copy of the tokenizer, if it has one.
        folder: that the model is exported to.

    Returns:
        What the user should know: tokens that the folder's tokenizer lacks.

    Raises:
        RecipeError: an id stands for other text.
    """
    trained = TokenizerFlags.from_args(args).vocabulary(saved)
    own = vocabulary_of_files(folder.path, origin=str(folder.path), rows=None)
    if trained.ids is None or own.ids is None:
        return []
    by_number = {number: token for token, number in own.ids.items()}
    other = {
        token: number
        for token, number in trained.ids.items()
        if own.ids.get(token, number) != number or by_number.get(number, token) != token
    }
    if other:
        raise folder.error(
            f"has another tokenizer than the checkpoint was trained with ({trained.origin}): "
            f"{len(other)} tokens differ, such as {_some(other)}",
            "name the folder that its training began from",
        )
    more = {token: number for token, number in trained.ids.items() if token not in own.ids}
    if not more:
        return []
    return [
        f"{len(more)} tokens that it was trained with are not in the folder's tokenizer "
        f"({_some(more)}): copy the tokenizer's files from {trained.origin}"
    ]


def _some(ids: dict[str, int]) -> str:
    """The first tokens, by number."""
    first = sorted(ids.items(), key=lambda item: item[1])[:_SHOWN]
    return ", ".join(f"{number} {token!r}" for token, number in first)
