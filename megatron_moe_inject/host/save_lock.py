"""One run at a time saves into a folder.

Two runs with one ``--save`` delete each other's unfinished checkpoints and mix their lists. So the
first rank of a run holds a lock on a file in the folder, which the system releases when its process
ends, however it ends. It is a POSIX record lock, because processes that a rank forks (loaders,
savers) do not share those and cannot outlive the run with one. A network file system may keep the
lock of a node that has died for as long as its lease lasts, which a run on another node waits for.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from megatron_moe_inject.host.errors import (
    RecipeError,
    one_line,
    show_path,
)

FILE = "inject_run.lock"
LEASE_SECONDS = 100.0
"""Longer than NFS servers keep the locks of a client that is gone, by default."""
_TAKEN = (errno.EACCES, errno.EAGAIN)


class SaveLock:
    """The lock of one run on its ``--save`` folder.

    Args:
        folder: is made where it is missing.
        lease_seconds: how long to wait for a holder on another node.
    """

    def __init__(self, folder: str | Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self._folder = Path(folder)
        self._lease = lease_seconds

    def take(self) -> None:
        """Take the lock, and keep it until this process ends.

        A file system without locks is worth a warning and not the run.

        Raises:
            RecipeError: the folder cannot be written to, or another run holds it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecipeError(
                f"--save: {show_path(self._folder)} cannot be written to ({error.strerror})"
            ) from None
        until = time.monotonic() + self._lease
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    os.close(handle)
                    print(
                        f"megatron_moe_inject: warning: --save: {self._folder} takes no locks "
                        f"({error.strerror}), so a second run in it would not be noticed",
                        flush=True,
                    )
                    return
            holder = os.pread(handle, 500, 0).decode(errors="replace")
            if _host(holder) in (None, socket.gethostname()) or time.monotonic() > until:
                os.close(handle)
                raise RecipeError(
                    f"--save: {show_path(self._folder)} is in use by another run "
                    f"({one_line(holder)}); end that one, or give each run a folder of its own"
                )
            time.sleep(min(5.0, self._lease / 10))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        mine = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        try:  # the handle is never closed: that would let the lock go
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(mine).encode(), 0)
        except OSError as error:
            os.close(handle)
            raise RecipeError(
                f"--save: {show_path(self._folder)} cannot be written to ({error.strerror})"
            ) from None


def _host(holder: str) -> str | None:
    try:
        return json.loads(holder)["host"]
    except (ValueError, TypeError, KeyError):
        return None
