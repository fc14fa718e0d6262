"""Files and folders that are written as a whole or not at all.

A list that grows gets whole lines; its reader leaves out a last one without an end.

The new content is written beside the old file, forced to disk and renamed over it, which a POSIX
file system does in one step: a reader sees the old file or the new one, whatever interrupts the
writer. A killed writer can leave its ``.part`` file behind, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe_inject.typed import RecipeError, one_line, show


def replace_file(path: str | Path, content: bytes) -> None:
    """Make ``content`` the content of ``path``; a symbolic link keeps pointing where it did.

    Raises:
        RecipeError: the file cannot be written; what was there before still is.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RecipeError(
            f"{show(str(path))} cannot be written ({reason}); name a file in a folder that exists"
        ) from None


def try_file(path: Path, origin: str) -> None:
    """See whether ``replace_file`` can write ``path``; the folders above it are made.

    Args:
        origin: the flag or key that asks for it, which the message names.

    Raises:
        RecipeError: it cannot.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        named = {"prefix": f".{target.name[:80]}.", "suffix": ".part"}
        with tempfile.NamedTemporaryFile(dir=target.parent, **named) as file:
            file.write(b"tried")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RecipeError(
            f"{origin}: {one_line(str(path), 200)} cannot be written ({reason}); name a place that "
            "takes files",
            origin,
        ) from None


def append_line(path: str | Path, line: bytes) -> None:
    """Add a line, with its end, to a list on disk and force it there; a new file is made.

    Raises:
        RecipeError: the file cannot be written; what was begun is cut off again.
    """
    rest = memoryview(line)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(handle).st_size
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RecipeError(f"{show(str(path))} cannot be written ({reason})") from None


def whole_lines(text: str) -> list[str]:
    """The lines of a list that somebody may be writing: a last one without an end is left out."""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def readable_json(value: Any, indent: str = "") -> str:
    """JSON with one key and one row of numbers to a line."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(k)}: {readable_json(v, deeper)}" for k, v in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list) and value and isinstance(value[0], list):
        items = [readable_json(v, deeper) for v in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(value, allow_nan=False)
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}{closing}"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its name when the block ends well, and else is removed.

    ``path`` must not exist. Files are forced to disk before the name is taken.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    folder.mkdir(parents=True)
    try:
        yield folder
        for entry in folder.rglob("*"):
            if entry.is_file():
                with entry.open("rb") as file:
                    os.fsync(file.fileno())
        os.rename(folder, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; file systems that cannot sync a folder are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
