"""Whether a folder's tokenizer is its embedding's, and that of a checkpoint's training.

The exported folder is served with the base folder's tokenizer files, so an id must stand for the
same text there as in the data of training. Both are read as data; what cannot be read is told.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags, vocabulary_of_files

_SHOWN = 3


def check_own_tokenizer(folder: HfFolder, rows: int) -> None:
    """Compare a folder's tokenizer with its embedding; added tokens need no row.

    Args:
        rows: of the embedding, without padding.

    Raises:
        RecipeError: ordinary tokens have no row.
    """
    own = vocabulary_of_files(folder.path, origin=str(folder.path), rows=rows)
    ordinary = {index: t for t, index in (own.ids or {}).items() if t not in own.added}
    beyond = sorted(index for index in ordinary if index >= rows)
    if beyond:
        shown = ", ".join(f"{i} {ordinary[i]!r}" for i in beyond[:_SHOWN])
        raise folder.error(
            f"has {rows} rows of vocabulary for a tokenizer of {own.size} ids, such as {shown}",
            "take tokenizer and weights of one model",
        )


def compare_tokenizers(folder: HfFolder, checkpoint: TorchDistCheckpoint) -> Iterator[str]:
    """Remarks: tokenizers that could not be compared, tokens that the folder's lacks.

    Raises:
        RecipeError: an id stands for another text in the folder than in training.
    """
    args = checkpoint.common.get("args")
    if not isinstance(args, Namespace) or getattr(args, "tokenizer_type", None) is None:
        return
    flags = TokenizerFlags.from_args(args)
    saved = checkpoint.folder / "tokenizer"
    if _is_same(flags.files(saved), folder.path):
        return
    trained = flags.vocabulary(saved)
    own = vocabulary_of_files(folder.path, origin=str(folder.path), rows=None)
    if trained.ids is None or own.ids is None:
        why = trained.unreadable if trained.ids is None else own.unreadable
        yield f"the tokenizer of training was not compared with the folder's: {why}"
        return
    there, here = _by_id(trained.ids), _by_id(own.ids)
    other = sorted(i for i in there.keys() & here.keys() if there[i] != here[i])
    if other:
        raise folder.error(
            f"has another tokenizer than the run that wrote the checkpoint ({trained.origin}); "
            f"{len(other)} ids differ: "
            + ", ".join(f"{i} is {here[i]!r}, there {there[i]!r}" for i in other[:_SHOWN]),
            "name the folder that training began from",
        )
    lacking = sorted(there.keys() - here.keys())
    if lacking:
        shown = ", ".join(f"{i} {there[i]!r}" for i in lacking[:_SHOWN])
        yield (
            f"{len(lacking)} tokens of training are not in the folder's tokenizer ({shown}"
            f"{', ...' if len(lacking) > _SHOWN else ''}); copy the files of {trained.origin} into "
            "the output"
        )


def _is_same(files: Path | None, folder: Path) -> bool:
    return files is not None and files.exists() and files.resolve() == folder.resolve()


def _by_id(ids: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in ids.items()}
