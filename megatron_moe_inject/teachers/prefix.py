"""What stands in front of everything that a teacher reads: a ``<bos>``, where it was trained so.

Megatron's windows begin anywhere in a document. A model that has always seen a ``<bos>`` in front
of its text predicts much worse without one, near the beginning of a window above all. So the
teacher reads its prefix and then the window; the states at the prefix are dropped before anything
uses them.

With an attention mask from outside (``--reset-attention-mask``) the prefix is visible to every
document of a window: causal states of the prefix depend on nothing else, so each document reads
what it would read with a prefix of its own. Positions count on from the prefix, which is exact
where they are told by ``position_ids`` (Hugging Face models and learned positions, with
``--reset-position-ids``); Megatron's rotary positions count from the beginning of the window, for
the teacher as for the student, so a later document sees the prefix from afar. Without such a mask a
later document sees what came before, and no prefix of its own.

Shapes: n sequences, s sequence length, m length of the prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.host.errors import (
    fail,
    listing,
)
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.teachers.base import Source, Teacher
from megatron_moe_inject.teachers.tokenizer_files import named_tokens

_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Tokenizers without ``tokenizer.json`` that put a ``<bos>`` in front unless told otherwise."""


class PrefixedTeacher(Teacher):
    """A teacher that reads a prefix in front of each sequence; its states are those behind it.

    Args:
        teacher: what reads.
        prefix: ids, at least one.
        multiple: what must divide the length that the teacher gets; the end is filled up with
            tokens that nobody sees.
    """

    def __init__(self, teacher: Teacher, prefix: Sequence[int], multiple: int = 1) -> None:
        assert prefix, "a teacher without a prefix needs no wrapper"
        self.bare = teacher
        self.prefix = tuple(prefix)
        self._multiple = multiple
        self.name = teacher.name
        self.hidden_size = teacher.hidden_size
        self.num_layers = teacher.num_layers
        self.vocab_size = teacher.vocab_size
        self.logit_transform = teacher.logit_transform

    def states(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """See ``base.Teacher``."""
        count, length = tokens.shape
        ahead = len(self.prefix)
        behind = -(ahead + length) % self._multiple
        front = torch.tensor(self.prefix, dtype=tokens.dtype)
        front = to_device(front, tokens.device).expand(count, ahead)
        parts = [front, tokens]
        if behind:
            parts.append(front[:, :1].expand(count, behind))
        if position_ids is not None or behind:
            position_ids = self._positions(tokens, position_ids, behind)
        if attention_mask is not None:
            attention_mask = self._mask(attention_mask, behind)
        prefixed = self.bare.states(torch.cat(parts, dim=1), position_ids, attention_mask, layers)
        return [states[:, ahead : ahead + length] for states in prefixed]

    def _positions(
        self, tokens: torch.Tensor, position_ids: torch.Tensor | None, behind: int
    ) -> torch.Tensor:
        """``[n, m + s + behind]``; 0 at the tokens that nobody sees."""
        ahead = len(self.prefix)
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        front = torch.arange(ahead, device=tokens.device).expand(len(tokens), ahead)
        last = position_ids.new_zeros(len(tokens), behind)
        return torch.cat([front, position_ids + ahead, last], dim=1)

    def _mask(self, forbidden: torch.Tensor, behind: int) -> torch.Tensor:
        """``[n or 1, 1, m + s + behind, the same]``, True where attention is forbidden."""
        ahead, length = len(self.prefix), forbidden.shape[-1]
        whole = ahead + length + behind
        mask = forbidden.new_ones(len(forbidden), 1, whole, whole)
        mask[..., :ahead, :ahead].triu_(1)
        mask[..., ahead:, :ahead] = False
        mask[..., ahead : ahead + length, ahead : ahead + length] = forbidden
        return mask

    def passes(self, own: int) -> AbstractContextManager[None]:
        """See ``base.Teacher``."""
        return self.bare.passes(own)

    def head_weight(self, start: int, stop: int) -> torch.Tensor:
        """See ``base.Teacher``."""
        return self.bare.head_weight(start, stop)


def resolved_prefix(
    source: Source,
    written: str | Sequence[int],
    *,
    files: Path | None,
    ids: Mapping[str, int] | None,
    rows: int,
    adds: bool = True,
) -> tuple[tuple[int, ...], str]:
    """The prefix of a teacher, and a clause that says where it is from.

    Args:
        written: ``TeacherSpec.prefix``.
        files: folder or file of its tokenizer, None where there is none.
        ids: its tokens, None where they cannot be read.
        rows: of its embedding.
        adds: whether text was given to it with what its tokenizer adds.

    Raises:
        RecipeError: ``bos`` where no file names one, or an id without a row.
    """
    key = f"teachers.{source.name}.prefix"
    if written == "none":
        return (), "as the recipe says"
    if not isinstance(written, str):
        front, prefix_origin = tuple(written), "as the recipe says"
    elif written == "bos":
        bos = _bos(files, ids, source)
        if bos is None:
            raise fail(
                key, written, f"is not named by the files of {source.text}",
                "write its id, as in prefix: [1]",
            )  # fmt: skip
        front, prefix_origin = (bos,), "as the recipe says"
    elif files is None or ids is None:
        return (), "its tokenizer cannot be read, so that nobody knows what stood in front"
    elif not adds:
        return (), "its text was prepared without what its tokenizer adds"
    else:
        front, prefix_origin = _automatic(source, files, ids), "as its tokenizer does"
    beyond = [index for index in front if not 0 <= index < rows]
    if beyond:
        raise fail(
            key, written if isinstance(written, str) else list(written),
            f"holds the id {beyond[0]}, and the embedding has {rows} rows",
            "name ids of its own, or none",
        )  # fmt: skip
    return front, prefix_origin


def words(prefix: Sequence[int], told: str) -> str:
    """The prefix in words, for a plan."""
    if not prefix:
        return f"reads the text with nothing in front ({told})"
    return f"reads id {listing(prefix, 8)} in front of the text ({told})"


def _automatic(source: Source, files: Path, ids: Mapping[str, int]) -> tuple[int, ...]:
    folder = files if files.is_dir() else files.parent
    content = folder / "tokenizer.json" if files.is_dir() else files
    try:
        processor = None
        if content.suffix == ".json" and content.is_file():
            processor = json.loads(content.read_text("utf-8")).get("post_processor")
        if processor is not None:
            return _in_front(processor)
        if not _adds_bos(folder):
            return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise fail(
            f"teachers.{source.name}.prefix", "auto",
            f"cannot be known: the tokenizer in {folder} is damaged ({error})",
            "copy it again, or write none, bos or a list of ids",
        ) from error  # fmt: skip
    bos = _bos(files, ids, source)
    return () if bos is None else (bos,)


def _in_front(processor: Mapping[str, Any]) -> tuple[int, ...]:
    """What a post-processor of ``tokenizers`` puts in front of a single text."""
    kind = processor["type"]
    if kind == "Sequence":
        parts = [_in_front(part) for part in processor["processors"]]
        return tuple(index for part in reversed(parts) for index in part)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (int(processor["cls"][1]),)
    if kind != "TemplateProcessing":
        return ()
    ids: list[int] = []
    for piece in processor["single"]:
        if "SpecialToken" not in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def _adds_bos(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    adds = config.get("add_bos_token")
    return kind in _ADD_BOS if adds is None else bool(adds)


def _bos(files: Path | None, ids: Mapping[str, int] | None, source: Source) -> int | None:
    """Id of the beginning-of-sequence token, by the tokenizer's files or else the model's."""
    if files is not None and ids is not None:
        token = named_tokens(files if files.is_dir() else files.parent).get("bos_token")
        if token is not None and token in ids:
            return ids[token]
    path = source.path / "config.json"
    index = json.loads(path.read_text("utf-8")).get("bos_token_id") if path.is_file() else None
    return index if isinstance(index, int) else None
