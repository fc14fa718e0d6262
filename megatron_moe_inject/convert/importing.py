"""From a Hugging Face folder to a Megatron checkpoint, file to file.

No model is built and no process group: each slice of Megatron's is read from the folder, put
together and written, one after the other. Any layout loads the result
(``host.torch_dist_write``).
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.convert.arguments import (
    megatron_arguments,
    option_words,
    shell_arrays,
)
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.grown_folder import CARD, card_of
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.naming import (
    Naming,
    Stored,
    as_hybrid,
    extra_states,
    pieces_of,
)
from megatron_moe_inject.convert.tokenizer import check_own_tokenizer
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.new_experts import STORED, NewExperts
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "folder": None}
"""Words of ``--dtype``; ``None`` keeps the folder's precision, tensor by tensor."""
LAYOUTS = ("gpt", "hybrid")
"""Words of ``--layout``."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        model_type: of the folder.
        tensors: of the folder, those stored twice there or saying nothing aside.
        slices: of Megatron's.
        bytes: of the checkpoint.
        left_out: tensors of the folder that were not taken: copies, and buffers that say nothing.
        rows: of the embedding, with padding.
        card: of new experts, of a folder that was exported with some.
    """

    model_type: str
    tensors: int
    slices: int
    bytes: int
    left_out: tuple[str, ...]
    rows: int
    card: NewExperts | None = None


def import_folder(
    folder: HfFolder,
    output: Path,
    *,
    dtype: str = "folder",
    layout: str | None = None,
    vocab_multiple: int = 128,
    progress: Progress,
) -> Imported:
    """Write a folder's model as a checkpoint that Megatron loads. No collective.

    ``output`` becomes a ``--save`` directory with a ``release``, and ``flags.sh`` and ``flags.txt``
    with Megatron's options of the model; it appears whole or not at all.

    Args:
        folder: opened.
        output: must not exist.
        dtype: a word of ``DTYPES``. What Megatron keeps in float32 is so in any case.
        layout: a word of ``LAYOUTS``; default what is usual for the architecture.
        vocab_multiple: the vocabulary is padded with zeros to a multiple of this.
        progress: wraps the slices to show how far it is.

    Raises:
        RecipeError: an architecture, a configuration or a tensor that cannot be converted, a
            damaged folder, or a disk that does not take the checkpoint.
    """
    model = FolderModel.of(folder)
    flags, naming = _in_layout(model, layout)
    (ids,) = {entry.shape[0] for entry in model.entries if entry.padded}
    check_own_tokenizer(folder, ids)
    rows = -(-ids // vocab_multiple) * vocab_multiple
    flags["--padded-vocab-size"] = rows
    chosen = DTYPES[dtype]
    tokenizer = _tokenizer_flags(folder)
    arguments = megatron_arguments(
        flags | tokenizer, rows, chosen or folder.dtype(model.entries[0].parts[0].name)
    )
    card = _card(model, arguments)
    stored = [naming.stored(entry.slot) for entry in model.entries]
    types = _types(model, stored, chosen)
    require_room(output, _bytes(model, stored, types), "--output")
    left_out = (*model.check_copies(), *model.leftovers)
    with new_folder(output) as part:
        with CheckpointWriter(part / "release") as writer:
            for entry, where in progress(
                zip(model.entries, stored, strict=True), len(model.entries)
            ):
                value = model.joined(entry, types[where.names[0]], rows)
                for piece, part_rows in pieces_of(entry, where):
                    part_value = value[part_rows] if entry.pieces else value
                    size = (*where.axes, *part_value.shape)
                    writer.tensor(piece.names, size, where.place, part_value)
            writer.nothing(extra_states(naming, stored))
            writer.finish({"args": arguments, "checkpoint_version": 3.0, "iteration": 0})
        (part / "latest_checkpointed_iteration.txt").write_text("release")
        arrays = {"MODEL": flags, **({"TOKENIZER": tokenizer} if tokenizer else {})}
        (part / "flags.sh").write_text(shell_arrays(str(folder.path), arrays))
        (part / "flags.txt").write_text(" ".join(option_words(flags)) + "\n")
    return Imported(
        model_type=folder.config.model_type,
        tensors=len(folder.names) - len(left_out),
        slices=len(stored),
        bytes=writer.bytes,
        left_out=left_out,
        rows=rows,
        card=card,
    )


def _card(model: FolderModel, arguments: Namespace) -> NewExperts | None:
    """The folder's card of new experts, which the arguments get too.

    Raises:
        RecipeError: it is damaged, or another model's.
    """
    card = card_of(model.folder)
    if card is None:
        return None
    if card.experts != model.naming.experts:
        raise model.folder.error(
            f"has {model.naming.experts} experts in a layer, and {CARD} says {card.experts}",
            "take that file out of it",
        )
    card = card.in_layers_of(pattern_of(arguments))
    setattr(arguments, STORED, card.plain())
    return card


def _in_layout(model: FolderModel, layout: str | None) -> tuple[dict[str, Any], Naming]:
    """Options and naming in a layout.

    Raises:
        RecipeError: the architecture has no such.
    """
    served = model.architecture.layouts(model.config)
    if layout is not None and layout not in served:
        raise fail(
            "--layout", layout,
            f"is no layout of {model.folder.config.model_type} models of this configuration",
            f"use {' or '.join(served)}",
        )  # fmt: skip
    if (layout or served[0]) == "gpt":
        return dict(model.flags), model.naming
    pattern = model.architecture.layer_pattern(model.config)
    return as_hybrid(model.flags, model.naming, pattern)


def _types(
    model: FolderModel, stored: Iterable[Stored], chosen: torch.dtype | None
) -> Mapping[str, torch.dtype]:
    """By stored tensor its type, one for all of its slices: the widest that one asks for."""
    types: dict[str, torch.dtype] = {}
    for entry, where in zip(model.entries, stored, strict=True):
        name = where.names[0]
        dtype = _type(model, entry, chosen)
        types[name] = torch.promote_types(dtype, types.get(name, dtype))
    return types


def _bytes(model: FolderModel, stored: Iterable[Stored], types: Mapping[str, torch.dtype]) -> int:
    """Of all weights, padding aside."""
    return sum(
        math.prod(entry.shape) * types[where.names[0]].itemsize
        for entry, where in zip(model.entries, stored, strict=True)
    )


def _type(model: FolderModel, entry: Entry, chosen: torch.dtype | None) -> torch.dtype:
    if entry.dtype is not None:
        return getattr(torch, entry.dtype)
    return chosen or model.dtype(entry)


def _tokenizer_flags(folder: HfFolder) -> dict[str, Any]:
    """Options of the folder's tokenizer, where it holds one."""
    path = folder.path.absolute()
    if not any((path / name).is_file() for name in _TOKENIZERS):
        return {}
    return {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": str(path)}
