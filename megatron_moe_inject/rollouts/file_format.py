"""Files of rollouts: texts that a student wrote, with the identity of the checkpoint that wrote.

A file is JSON Lines. The first line says what it is and who wrote it, each further line is one
text, the last line says how many there are and the SHA-256 of all bytes before it, so that a file
that is cut off or was changed is known. Files are written beside their name and renamed when whole
(``host.files.replace_file``); names that begin with a dot, or do not end in ``.jsonl``, are no
business of a reader. No torch.

A text is ``{"prompt": ..., "completion": ..., "mask": [...]}``: prompt and completion each as ids
or as text for the student's tokenizer; ``mask``, which may be left out, has a 1 for each token of
the completion that is to be learned from; ``log_probs``, likewise, has each token's natural
log-probability by who wrote it.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.host.errors import RecipeError, one_line, show_path
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.text import is_whole

FORMAT = "megatron_moe_inject rollouts"
VERSION = 1
SUFFIX = ".jsonl"
_MOST_BYTES = 1 << 31

Tokenize = Callable[[str], list[int]]


class Damaged(Exception):
    """A file that cannot be taken for what it should be; the message is a clause without
    subject."""


@dataclass(frozen=True)
class Writer:
    """The checkpoint that wrote.

    Attributes:
        injection: identity of its injection (``host.lineage``); None of a student as it was before
            one began.
        iteration: optimizer steps that it had taken; None of a release.
        sha256: of its model's stored bytes (``host.stored_checkpoint.model_checksum``); None where
            nobody has read them all.
    """

    injection: str | None
    iteration: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Rollout:
    """One text.

    Attributes:
        prompt, completion: [p] and [c] int64 ids.
        mask: [c] bool, tokens of the completion that are to be learned from.
        log_probs: [c] float64, of the completion by who wrote it; None where that is not told.
    """

    prompt: np.ndarray
    completion: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray | None = None


@dataclass(frozen=True)
class RolloutFile:
    """A whole file.

    Attributes:
        writer: who wrote it.
        rollouts: the texts, in order.
        sha256: of the whole file.
        settings: how they were sampled, in plain values.
    """

    writer: Writer
    rollouts: Sequence[Rollout]
    sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lm_loss(self) -> float | None:
        """Mean of -log p of the tokens that are to be learned from, by who wrote; None where that
        is not told of all of them."""
        told = [(rollout.log_probs, rollout.mask) for rollout in self.rollouts]
        own = [log_probs[mask] for log_probs, mask in told if log_probs is not None]
        if len(own) < len(told) or not sum(map(len, own)):
            return None
        return float(-np.concatenate(own).mean())


def write_rollouts(
    path: Path,
    writer: Writer,
    rollouts: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a file whole, or not at all.

    Args:
        rollouts: each with ``prompt``, ``completion`` and, if wanted, ``mask`` and ``log_probs``;
            other keys are kept.
        settings: how they were sampled.

    Raises:
        RecipeError: it cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION, "checkpoint": asdict(writer)}
    lines = [head | {"settings": dict(settings or {})}, *rollouts]
    content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    foot = {"rollouts": len(rollouts), "sha256": hashlib.sha256(content).hexdigest()}
    replace_file(path, content + json.dumps(foot).encode() + b"\n")


def read_content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        Damaged: it cannot be read, or is no file of this kind by its size.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged("is no file")
        if status.st_size > _MOST_BYTES:
            raise Damaged(f"is larger than {_MOST_BYTES >> 30} GiB")
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror or type(error).__name__})") from None


def parse_rollouts(
    content: bytes, vocab_size: int | None = None, tokenize: Tokenize | None = None
) -> RolloutFile:
    """A file from its bytes.

    Args:
        vocab_size: ids are below; None = any.
        tokenize: ids of a text; None for a tokenizer that has no text.

    Raises:
        Damaged: it is half, was changed, or holds what no rollout can have.
    """
    lines = content.splitlines(keepends=True)
    if len(lines) < 2 or not lines[-1].endswith(b"\n"):
        raise Damaged("is half a file: it has no last line with a checksum")
    head, foot = _object(lines[0], 1), _object(lines[-1], len(lines))
    if head.get("format") != FORMAT:
        raise Damaged(f'does not begin with a line with "format": "{FORMAT}"')
    if head.get("version") != VERSION:
        raise Damaged(f"is of version {head.get('version')!r}, and this reads {VERSION}")
    if "sha256" not in foot:
        raise Damaged("is half a file: it has no last line with a checksum")
    found = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
    if foot["sha256"] != found or foot.get("rollouts") != len(lines) - 2:
        raise Damaged("is damaged: its last line has another checksum or count than it has")
    rollouts = [
        _rollout(_object(line, number), number, vocab_size, tokenize)
        for number, line in enumerate(lines[1:-1], 2)
    ]
    return RolloutFile(
        _writer(head.get("checkpoint")),
        rollouts,
        hashlib.sha256(content).hexdigest(),
        head.get("settings") or {},
    )


def read_rollouts(path: Path) -> RolloutFile:
    """A file of ids, for people and tools.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        return parse_rollouts(read_content(path))
    except Damaged as error:
        raise RecipeError(f"{show_path(path)} {error}; write it again, or remove it") from None


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise Damaged(f"has no JSON in line {number}") from None
    if not isinstance(value, dict):
        raise Damaged(f"has no object in line {number}")
    return value


def _writer(value: Any) -> Writer:
    try:
        writer = Writer(**value)
    except TypeError:
        raise Damaged("does not say which checkpoint wrote it") from None
    texts = all(part is None or isinstance(part, str) for part in (writer.injection, writer.sha256))
    if not texts or not (writer.iteration is None or _is_count(writer.iteration)):
        raise Damaged(f"names a checkpoint by {one_line(repr(value))}, which can be none")
    return writer


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rollout(
    value: dict[str, Any], line: int, vocab_size: int | None, tokenize: Tokenize | None
) -> Rollout:
    prompt = _ids(value.get("prompt"), f"prompt in line {line}", vocab_size, tokenize)
    completion = _ids(value.get("completion"), f"completion in line {line}", vocab_size, tokenize)
    if not len(prompt) or not len(completion):
        raise Damaged(f"has an empty prompt or completion in line {line}")
    log_probs = _log_probs(value.get("log_probs"), len(completion), line)
    mask = value.get("mask")
    if mask is None:
        return Rollout(prompt, completion, np.ones(len(completion), bool), log_probs)
    told = isinstance(mask, list) and all(
        isinstance(one, int | bool) and one in (0, 1) for one in mask
    )
    if not told or len(mask) != len(completion):
        raise Damaged(f"has a mask in line {line} that is no 0 or 1 for each completed token")
    return Rollout(prompt, completion, np.array(mask, bool), log_probs)


def _log_probs(value: Any, length: int, line: int) -> np.ndarray | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        isinstance(one, int | float) and math.isfinite(one) for one in value
    )
    if not numbers or len(value) != length:
        raise Damaged(f"has log_probs in line {line} that are no number for each completed token")
    return np.array(value, np.float64)


def _ids(value: Any, what: str, vocab_size: int | None, tokenize: Tokenize | None) -> np.ndarray:
    if isinstance(value, str):
        if tokenize is None:
            raise Damaged(f"has a text as {what}, and this tokenizer has no text; write ids")
        if not is_whole(value):
            raise Damaged(f"has half a character (a lone surrogate) in the {what}")
        value = tokenize(value)
    if not isinstance(value, list) or not all(_is_count(one) for one in value):
        raise Damaged(f"has no ids and no text as {what}")
    largest = max(value, default=0)
    if largest >= (1 << 31 if vocab_size is None else vocab_size):
        raise Damaged(f"has id {largest} in the {what}, which the student's tokenizer has not")
    return np.array(value, np.int64)
