"""Text in JSON Lines files as Megatron's data sets (``.bin`` and ``.idx``), with a held-out part.

One pass over the files: lines are read, encoded (``document_ids``) and written one chunk at a
time. The sets are written in a hidden folder and take their names when all of them are whole, the
``.idx`` files last: what was interrupted has no ``.idx``, and Megatron finds no data set there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.data.document_ids import Documents, Encoder, Encoding, encoded
from megatron_moe_inject.data.json_lines import Lines, read_lines
from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.host.files import new_files

HELD_OUT = "_held_out"
_LAST = (".json", ".idx")


@dataclass
class SetSize:
    """How much is in a data set.

    Attributes:
        documents: in it.
        tokens: the ends of documents included.
        bytes: of the texts in UTF-8.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Prepared:
    """What was written.

    Attributes:
        sets: by what is added to the prefix: "" and, where there is one, ``HELD_OUT``.
        read_bytes: of the lines.
        empty: lines without text, which were left out.
        ends_within: documents whose text holds the token that ends one.
        largest_id: of all.
    """

    sets: dict[str, SetSize]
    read_bytes: int = 0
    empty: int = 0
    ends_within: int = 0
    largest_id: int = -1


def outputs(prefix: Path, held_out: float) -> list[Path]:
    """The files that ``prepare`` writes."""
    sets = ["", HELD_OUT] if held_out else [""]
    ends = [f"{name}{ending}" for name in sets for ending in (".bin", ".idx")]
    return [prefix.with_name(prefix.name + end) for end in [*ends, ".json"]]


def refuse_existing(paths: Iterable[Path]) -> None:
    """RecipeError for an output that is there already."""
    for path in paths:
        if os.path.lexists(path):
            raise RecipeError(
                f"--output: {show_path(path)} is there already; remove it or name another prefix",
                "--output",
            )


def prepare(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Any,
    encoding: Encoding,
    *,
    workers: int = 1,
    watch: Callable[[Iterable[Lines]], Iterable[Lines]] = iter,
) -> Prepared:
    """Write ``prefix``.bin and .idx, the same of the held-out part, and ``prefix``.json with sizes
    and settings.

    Args:
        inputs: JSON Lines files.
        tokenizer: see ``load_tokenizer``; its largest id decides how many bytes an id takes.
        workers: processes that encode.
        watch: sees the lines go by, to show how far it is.

    Raises:
        RecipeError: an output that exists or cannot be written, a mistake in the inputs, or a part
            without a document. Nothing is left then.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    refuse_existing(outputs(prefix, encoding.held_out))
    done = Prepared({"": SetSize(), **({HELD_OUT: SetSize()} if encoding.held_out else {})})
    encoder = Encoder(tokenizer, encoding)
    with new_files(prefix, _LAST) as folder:
        dtype = DType.optimal_dtype(max(tokenizer.get_vocab().values()) + 1)
        builders = {
            name: IndexedDatasetBuilder(str(folder / f"{prefix.name}{name}.bin"), dtype=dtype)
            for name in done.sets
        }
        chunks = watch(_counted(read_lines(inputs), done))
        for documents in encoded(chunks, encoder, workers):
            _add(documents, builders, done)
        for name, size in done.sets.items():
            if not size.documents:
                raise _nothing(name, done)
            builders[name].finalize(str(folder / f"{prefix.name}{name}.idx"))
        (folder / f"{prefix.name}.json").write_text(
            _record(inputs, tokenizer, encoding, done), "utf-8"
        )
    return done


def _counted(chunks: Iterable[Lines], done: Prepared) -> Iterable[Lines]:
    for chunk in chunks:
        done.read_bytes += sum(map(len, chunk.lines))
        yield chunk


def _add(documents: Documents, builders: dict[str, Any], done: Prepared) -> None:
    end = np.cumsum(documents.lengths)
    for ids, held_out in zip(np.split(documents.ids, end[:-1]), documents.held_out, strict=False):
        builders[HELD_OUT if held_out else ""].add_document(ids, [len(ids)])
    for name, size in done.sets.items():
        chosen = documents.held_out if name else ~documents.held_out
        size.documents += int(chosen.sum())
        size.tokens += int(documents.lengths[chosen].sum())
        size.bytes += int(documents.text_bytes[chosen].sum())
    done.empty += documents.empty
    done.ends_within += documents.ends_within
    done.largest_id = max(done.largest_id, int(documents.ids.max(initial=-1)))


def _nothing(name: str, done: Prepared) -> RecipeError:
    total = sum(size.documents for size in done.sets.values())
    if not total:
        return RecipeError("--input: no document is in these files; name others", "--input")
    part = "held out" if name else "left to train on"
    return RecipeError(
        f"--held-out: of {total} documents none is {part}; take another share or more text",
        "--held-out",
    )


def _record(inputs: Sequence[Path], tokenizer: Any, encoding: Encoding, done: Prepared) -> str:
    content = {
        "sets": {name: asdict(size) for name, size in done.sets.items()},
        "inputs": [str(path) for path in inputs],
        "tokenizer": tokenizer.name_or_path,
        **asdict(encoding),
    }
    return json.dumps(content, indent=1) + "\n"
