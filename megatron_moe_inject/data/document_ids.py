"""Documents as ids: what a Hugging Face tokenizer makes of a text, in this process or in others.

The ids are those of Megatron's ``HuggingFaceTokenizer``: with the tokens that the tokenizer puts
around a text by itself (Llama's beginning token), unless they are not wanted. Then comes the token
that ends a document. No code of the tokenizer's folder runs and nothing is fetched.

A document belongs to the held-out part by a hash of its text and the seed, so that it stays on its
side whatever else is in the files, in whatever order, and its copies go with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.data.json_lines import Lines
from megatron_moe_inject.host.errors import RecipeError, fail, listing, one_line, show

_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


@dataclass(frozen=True)
class Encoding:
    """How documents become ids; the same in every process.

    Attributes:
        field: the key of the text in a line.
        special_tokens: whether the tokenizer's own tokens are put around a text.
        end: id that ends a document; ``None`` for no such token.
        rows: of the model's embedding; an id beyond is an error. ``None`` where it is not known.
        held_out: share of documents that are held out.
        seed: of their choice.
    """

    field: str = "text"
    special_tokens: bool = True
    end: int | None = None
    rows: int | None = None
    held_out: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Documents:
    """What became of some lines.

    Attributes:
        ids: int32, of all documents, one after the other.
        lengths: int64, of each.
        held_out: bool, of each.
        text_bytes: int64, of each text in UTF-8.
        empty: lines without text.
        ends_within: documents whose text holds the token that ends one.
    """

    ids: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray
    text_bytes: np.ndarray
    empty: int
    ends_within: int


def load_tokenizer(flag: str, folder: Path) -> Any:
    """A folder's tokenizer, by ``transformers``.

    Raises:
        RecipeError: no such folder, or no tokenizer in it that can be built without its code.
    """
    if importlib.util.find_spec("transformers") is None:
        raise fail(flag, str(folder), "needs the transformers package", "pip install transformers")
    if not folder.is_dir():
        raise fail(
            flag, str(folder), "is no directory on this machine",
            "name the folder of a model or a tokenizer (hf download NAME --local-dir DIR)",
        )  # fmt: skip
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:  # whatever a damaged file makes a library raise
        reason = one_line(str(problem) or type(problem).__name__, 160)
        raise fail(
            flag, str(folder), f"holds no tokenizer that transformers reads ({reason})",
            "name a folder with tokenizer.json or tokenizer.model",
        ) from problem  # fmt: skip


def end_of_document(tokenizer: Any, word: str | None) -> int:
    """The id of the token that ends a document.

    Args:
        word: the token; default the tokenizer's ``eos_token``, or else ``sep_token``, as Megatron
            has it.

    Raises:
        RecipeError: the tokenizer has no such token, or names none.
    """
    ids = tokenizer.get_vocab()
    known = [token for token in _USUAL_ENDS if token in ids]
    hint = f"such as {listing(known)}" if known else "one of its vocabulary"
    token = word or tokenizer.eos_token or tokenizer.sep_token
    if token is None:
        raise RecipeError(
            f"--eod-token: the tokenizer names no token that ends a document (eos_token); name it, "
            f"{hint}, or give --no-append-eod",
            "--eod-token",
        )
    if token not in ids:
        raise fail("--eod-token", token, "is no token of the tokenizer", f"name one, {hint}")
    return int(ids[token])


class Encoder:
    """Makes ids of lines. It can be sent to other processes, which then need no ``transformers``
    where the tokenizer is one of ``tokenizers``.

    Args:
        tokenizer: see ``load_tokenizer``.
        encoding: how.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._how = encoding
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = backend is not None
        self._tokenizer: Any = tokenizer if backend is None else backend
        if self._fast:
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def documents(self, lines: Lines) -> Documents:
        """The documents of some lines; one without any ids is left out.

        Raises:
            RecipeError: a line that cannot be read, or an id beyond the model's rows.
        """
        how = self._how
        numbered = list(lines.texts(how.field))
        texts = [text for _, text in numbered]
        kept: list[np.ndarray] = []
        held_out, sizes = [], []
        ends_within = 0
        for (number, text), ids in zip(numbered, self._ids(texts), strict=True):
            if not text or not len(ids):
                continue
            self._check_rows(lines, number, ids)
            if how.end is not None:
                ends_within += bool((ids[:-1] == how.end).any())
                ids = ids if ids[-1] == how.end else np.append(ids, np.int32(how.end))
            kept.append(ids)
            content = text.encode("utf-8")
            sizes.append(len(content))
            held_out.append(is_held_out(content, how.held_out, how.seed))
        return Documents(
            np.concatenate(kept) if kept else np.zeros(0, np.int32),
            np.array([len(ids) for ids in kept], np.int64),
            np.array(held_out, bool),
            np.array(sizes, np.int64),
            len(lines.lines) - len(kept),
            ends_within,
        )

    def _ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        special = self._how.special_tokens
        if self._fast:
            for encoded in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special):
                yield np.array(encoded.ids, np.int32)
            return
        for text in texts:
            ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            yield np.array(ids, np.int32)

    def _check_rows(self, lines: Lines, number: int, ids: np.ndarray) -> None:
        if self._how.rows is not None and (largest := int(ids.max())) >= self._how.rows:
            raise lines.error(
                number,
                f"has id {largest}, and the model of the tokenizer's folder has "
                f"{self._how.rows} rows",
                "use the tokenizer that belongs to the model",
            )


def is_held_out(text: bytes, share: float, seed: int) -> bool:
    """Whether a document is held out, by a hash of it and the seed."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def encoded(chunks: Iterable[Lines], encoder: Encoder, workers: int) -> Iterator[Documents]:
    """The documents of chunk after chunk, in their order, whatever the number of processes.

    A few chunks for each process are in memory at a time.

    Raises:
        RecipeError: see ``Encoder.documents``; or a process that was killed.
    """
    if workers == 1:
        for chunk in chunks:
            yield encoder.documents(chunk)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, (encoder,)
    )
    waiting: deque[concurrent.futures.Future[Documents]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RecipeError(
            f"--workers: one of {show(workers)} processes was killed, perhaps for its memory; use "
            "fewer",
            "--workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: list[Encoder] = []
"""Of this worker process."""


def _begin_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _ENCODER.append(encoder)


def _end_with_parent() -> None:
    """A killed main process leaves no others behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        wait([parent.sentinel])
    os._exit(1)


def _work(lines: Lines) -> Documents:
    return _ENCODER[0].documents(lines)
