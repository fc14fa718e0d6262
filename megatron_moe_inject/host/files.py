"""Files and folders that are written as a whole or not at all.

A list that grows gets whole lines; its reader leaves out a last one without an end.

The new content is written beside the old file, forced to disk and renamed over it, which a POSIX
file system does in one step: a reader sees the old file or the new one, whatever interrupts the
writer. A killed writer can leave its ``.part`` behind, nothing else; the next one of the same name
removes it. Parts have names of their own, whatever process ids there are on other machines, and are
locked while somebody writes them.

A name that a file gives for another file is a plain name in the same folder, or an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from megatron_moe_inject.host.errors import (
    RecipeError,
    one_line,
    show_path,
)
from megatron_moe_inject.host.text import memory_text

_ABANDONED_SECONDS = 24 * 3600
"""A part that nobody has touched for so long is nobody's, whoever began it."""


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether a name found in a file means a file in the same folder, and nothing else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_file_path(path: str) -> bool:
    """Whether a path can be that of a file, as far as its text says."""
    return os.path.basename(path) not in ("", ".", "..") and "\0" not in path


def replace_file(path: str | Path, content: bytes) -> None:
    """Make ``content`` the content of ``path``; a symbolic link keeps pointing where it did.

    Raises:
        RecipeError: the file cannot be written; what was there before still is.
    """
    try:
        target = Path(os.path.realpath(path))
        if not target.name:
            raise IsADirectoryError(21, "Is a directory")
        _remove_abandoned(target)
        part, handle = _locked_part(target, _new_file)
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise RecipeError(
            f"{show_path(path)} cannot be written ({_reason(error)}); "
            "name a file in a folder that exists"
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
        prefix = f".{target.name[:80]}."
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=prefix, suffix=".part") as file:
            file.write(b"tried")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RecipeError(
            f"{origin}: {one_line(str(path), 200)} cannot be written ({reason}); name a place that "
            "takes files",
            origin,
        ) from None


def require_room(path: Path, needed: int, origin: str) -> None:
    """See whether the disk of a file or folder to be written has that many bytes left.

    Args:
        path: need not exist, nor the folders above it.
        origin: the flag that asks for it, which the message names.

    Raises:
        RecipeError: it has not.
    """
    existing = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RecipeError(
            f"{origin}: {show_path(path)} needs {memory_text(needed)}, of which "
            f"{memory_text(free)} are free; name a place on a larger disk",
            origin,
        )


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
    except (OSError, ValueError) as error:
        raise RecipeError(f"{show_path(path)} cannot be written ({_reason(error)})") from None


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

    ``path`` must not exist; the folders above it are made. Files are forced to disk before the name
    is taken, and may be read and written by whom the umask lets, whatever library wrote them.

    Raises:
        RecipeError: the folder, or something in it, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        folder, handle = _locked_part(path, _new_directory)
        try:
            yield folder
            allowed = folder.stat().st_mode & 0o666  # the folder's own is by the umask
            for entry in folder.rglob("*"):
                if entry.is_file():
                    if entry.stat().st_mode & 0o777 != allowed:
                        entry.chmod(allowed)
                    with entry.open("rb") as file:
                        os.fsync(file.fileno())
            os.rename(folder, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
    except OSError as error:
        raise RecipeError(
            f"{show_path(path)} cannot be written ({_reason(error)}); "
            "name a new folder in one that takes it"
        ) from None


@contextlib.contextmanager
def new_files(prefix: Path, last: Sequence[str]) -> Iterator[Path]:
    """A hidden folder beside ``prefix`` whose files go beside it when the block ends well.

    None of them may be there yet; the folders above ``prefix`` are made. Each is forced to disk
    before one takes its name. Where the block ends in an error all of them are removed.

    Args:
        prefix: what their names begin with.
        last: endings of names; files take their names in this order, after all others.

    Raises:
        RecipeError: the folder, or something in it, cannot be written, or a file is there.
    """
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(prefix)
        folder, handle = _locked_part(prefix, _new_directory)
        try:
            yield folder
            files = sorted(
                folder.iterdir(), key=lambda f: last.index(f.suffix) if f.suffix in last else -1
            )
            for file in files:
                with file.open("rb") as content:
                    os.fsync(content.fileno())
            _place(files, prefix.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
    except OSError as error:
        raise RecipeError(
            f"{show_path(prefix)} cannot be written ({_reason(error)}); "
            "name new files in a folder that takes them"
        ) from None


def _place(files: Sequence[Path], folder: Path) -> None:
    """Move files to a folder, all of them or none; ``OSError`` where one is there."""
    placed: list[Path] = []
    try:
        for file in files:
            target = folder / file.name
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(file, target)
            placed.append(target)
        _sync_folder(folder)
    except OSError:
        for target in placed:
            target.unlink()
        raise


def _reason(error: Exception) -> str:
    """In one word or a few why the system refused."""
    return getattr(error, "strerror", None) or one_line(str(error)) or type(error).__name__


def _locked_part(target: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new part of ``target`` by ``make``, locked by its open handle until that is closed."""
    while True:
        part = target.with_name(f".{target.name}.{_machine()}-{secrets.token_hex(6)}.part")
        handle = make(part)
        # Before the lock, another writer may have taken the part for an abandoned one.
        if _lock(handle) is not False and part.exists():
            return part, handle
        os.close(handle)


def _new_file(part: Path) -> int:
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _new_directory(part: Path) -> int:
    part.mkdir()
    return os.open(part, os.O_RDONLY | os.O_DIRECTORY)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())


def _lock(handle: int) -> bool | None:
    """Take the lock: True, False where another process has it, None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of ``target`` left behind; what cannot be removed stays.

    A part is abandoned when it has no lock and was begun on this machine, where a lock of another
    process would be seen, or when nothing in it was touched for a day.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.([A-Za-z0-9_-]+)\.part")
    with contextlib.suppress(OSError):
        for part in list(target.parent.iterdir()):
            match = ours.fullmatch(part.name)
            if match is None or part.is_symlink():
                continue
            with contextlib.suppress(OSError):
                _remove_if_abandoned(part, match[1].rpartition("-")[0] == _machine())


def _remove_if_abandoned(part: Path, begun_here: bool) -> None:
    handle = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
    try:
        lock = _lock(handle)
        touched = max(entry.lstat().st_mtime for entry in (part, *part.rglob("*")))
        old = time.time() - touched > _ABANDONED_SECONDS
        if lock is False or not (old or (lock and begun_here)):
            return
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; file systems that cannot sync a folder are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
