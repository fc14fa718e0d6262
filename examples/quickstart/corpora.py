"""Cuts the quickstart's two corpora out of the text that ships with Python, as Megatron datasets.

English is the general data: the language reference's topics, docstrings and longer comment blocks.
Code is the domain: the standard library's source with exactly those parts taken out. Every document
belongs to a module or a topic, and a hash of that name decides its split, so a module that was held
out when the shipped models were trained is held out under any other Python version too, although
the text itself may differ by a release.

Trade-off: hashing names makes the splits only roughly their nominal size, which is why the manifest
records the exact bytes and tokens that bits per byte are computed from.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 8
SHORTEST_PROSE = 120
SLICE_BYTES = 300_000
HELD_OUT_BYTES = 160_000
LONGEST_DOCUMENT = 40_000
SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "encodings", "pydoc_data"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
TOKENIZER = Path(__file__).with_name("tokenizer")


@dataclass(frozen=True)
class Document:
    """One piece of text and the module or topic whose name decides its split."""

    source: str
    text: str


def position(source: str) -> int:
    """A number in [0, 2**32) that depends on nothing but the name of a module or topic."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big")


def is_held_out(source: str) -> bool:
    """True for the modules and topics that no model of the quickstart ever trains on."""
    return position(source) % 100 < HELD_OUT_PERCENT


def module_name(path: Path, root: Path) -> str:
    """`json.decoder` for `<root>/json/decoder.py`, and `json` for `<root>/json/__init__.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def split_module(source: str) -> tuple[str, list[str]]:
    """Takes a module apart: its code without docstrings and comments, and the prose that was in it.

    Prose is every docstring and every block of whole-line comments longer than `SHORTEST_PROSE`
    characters. Raises SyntaxError, tokenize.TokenError or ValueError for text that is no module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    dropped: set[int] = set()
    prose: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                statement = node.body[0]
                dropped.update(range(statement.lineno - 1, statement.end_lineno))
                prose.append(docstring)
    block: list[str] = []
    last_row = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start[0] - 1, token.start[1]
        if lines[row][:column].strip():
            lines[row] = lines[row][:column].rstrip() + "\n"
            continue
        dropped.add(row)
        if row != last_row + 1:
            prose.append("\n".join(block))
            block = []
        block.append(token.string.lstrip("#").strip())
        last_row = row
    prose.append("\n".join(block))
    code = "".join(line for row, line in enumerate(lines) if row not in dropped)
    code = re.sub(r"\n\s*\n(\s*\n)+", "\n\n\n", code).strip() + "\n"
    return code, [text.strip() for text in prose if len(text) > SHORTEST_PROSE]


def standard_library(with_tests: bool) -> Iterator[tuple[str, bool, str]]:
    """Yields (module, is a test, source) for every readable module of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = set(path.relative_to(root).parts[:-1])
        is_test = bool(folders & TEST_FOLDERS)
        if folders & SKIPPED_FOLDERS or (is_test and not with_tests):
            continue
        try:
            yield module_name(path, root), is_test, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def read_documents(with_tests: bool) -> tuple[list[Document], list[Document], list[Document]]:
    """(English, code, more English) of the running Python, in the order of their hashed names.

    The third list is the prose, not the code, of Python's own test suite. It is empty unless asked
    for, and only the making of the models asks: it is never held out, and many systems lack it.
    """
    from pydoc_data import topics

    english = [Document(f"topic:{name}", text.strip()) for name, text in topics.topics.items()]
    code: list[Document] = []
    more: list[Document] = []
    for module, is_test, source in standard_library(with_tests):
        try:
            body, prose = split_module(source)
        except (SyntaxError, tokenize.TokenError, ValueError):
            continue
        (more if is_test else english).extend(Document(module, text) for text in prose)
        if not is_test and len(body) > SHORTEST_PROSE:
            code.append(Document(module, body))
    for documents in (english, code, more):
        documents.sort(key=lambda document: position(document.source))
    return english, code, more


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out), without repetitions; text found in both sides is only held out."""
    held_out = {d.text: d for d in documents if is_held_out(d.source)}
    training = {d.text: d for d in documents if d.text not in held_out}
    return list(training.values()), list(held_out.values())


def take_bytes(documents: list[Document], limit: int) -> list[Document]:
    """The first documents of a reasonable length that fit into `limit` bytes together."""
    chosen, used = [], 0
    for document in documents:
        size = len(document.text.encode())
        if size <= LONGEST_DOCUMENT and used + size <= limit:
            chosen.append(document)
            used += size
    return chosen


def write_dataset(documents: list[Document], prefix: Path) -> dict[str, int]:
    """Writes one Megatron indexed dataset (`prefix`.bin, .idx), every document ended by EOD.

    Returns its size as {documents, bytes, tokens}; bytes are those of the text, tokens count EODs.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    tokens = 0
    for encoding in tokenizer.encode_batch([d.text for d in documents]):
        ids = [*encoding.ids, end]
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    size = sum(len(d.text.encode()) for d in documents)
    return {"documents": len(documents), "bytes": size, "tokens": tokens}


def write_sets(sets: dict[str, list[Document]], folder: Path) -> None:
    """Writes datasets by name and, last, their sizes as manifest.json; prints the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {name: write_dataset(documents, folder / name) for name, documents in sets.items()}
    manifest["python"] = ".".join(map(str, sys.version_info[:3]))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name in sets:
        print(
            "{:17s} {documents:6,d} documents {bytes:10,d} bytes {tokens:10,d} tokens".format(
                name, **manifest[name]
            )
        )


def slices(name: str, documents: list[Document]) -> dict[str, list[Document]]:
    """The small sets of one kind of text: what is trained on, and what is held out."""
    training, held_out = split(documents)
    return {
        f"{name}_slice": take_bytes(training, SLICE_BYTES),
        f"{name}_held_out": take_bytes(held_out, HELD_OUT_BYTES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the datasets and manifest.json go")
    parser.add_argument(
        "--pretraining", action="store_true", help="also write the large sets the models came from"
    )
    arguments = parser.parse_args()
    english, code, more = read_documents(with_tests=arguments.pretraining)
    sets = slices("code", code) | slices("english", english)
    if arguments.pretraining:
        english_train, english_held_out = split(english)
        held_out = {document.text for document in english_held_out}
        more = [document for document in more if document.text not in held_out]
        sets |= {"code_train": split(code)[0], "english_train": english_train + more}
    write_sets(sets, arguments.folder)


if __name__ == "__main__":
    main()
