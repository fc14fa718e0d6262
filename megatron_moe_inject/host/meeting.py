"""Where the ranks of a job meet without a process group: in one key-value store.

Before ``torch.distributed`` exists a rank that finds a mistake alone would end without the others,
which then wait for it in their first collective. So they meet in the store that Megatron is about
to build its process group from (``env://``, or the one that the script hands to ``pretrain``). The
store is kept, since the first rank may serve it: what goes wrong later, on one rank or all, is said
once on each node by whoever comes to it first, also where collectives hang.

Keys carry the number of the ``pretrain()`` call in this process, which is the same on all ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LEAVING_SECONDS = 5.0
"""How long ranks that end wait for others that end too, and for a store that may be gone."""
_CALLS = itertools.count()


class Meeting:
    """This rank's place among all.

    Args:
        store: a ``torch.distributed.Store`` of all ranks, None for one rank alone.
        rank, size: this rank, and how many there are.
        seconds: how long one waits for another before the job counts as broken.
        name: what the keys begin with.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        size: int,
        seconds: float,
        name: str = "moe-inject",
    ) -> None:
        self._store = None if store is None else dist.PrefixStore(name, store)
        self.rank = rank
        self.size = size
        self._seconds = seconds

    @classmethod
    def of_job(cls, args: Namespace, store: dist.Store | None = None) -> Meeting:
        """All ranks of the job that ``pretrain`` was called for.

        Args:
            args: Megatron's arguments.
            store: what ``pretrain`` was given to make a process group from.

        Raises:
            ValueError: the environment does not say where the ranks meet.
        """
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        limit = timedelta(minutes=args.distributed_timeout_minutes)
        name = f"moe-inject {next(_CALLS)}"
        if size == 1 or getattr(args, "fake_process_group", False):
            return cls(None, 0, 1, limit.total_seconds(), name)
        if store is None and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        if store is None:
            store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        return cls(store, rank, size, limit.total_seconds(), name)

    def decide(self, own: Any, judge: Callable[[dict[int, Any]], Any]) -> Any:
        """What the first rank makes of what all ranks say, on every rank.

        Args:
            own: what this rank says, in plain JSON values.
            judge: from what ranks say, by rank, to plain JSON values; runs on the first rank. Ranks
                that say nothing in time are missing.

        Traffic: one value to the store and one from it on each rank; all of them to the first rank.
        """
        store = self._store
        if store is None:
            return judge({0: own})
        store.set(f"said by {self.rank}", json.dumps(own))
        if self.rank == 0:
            store.set("decided", json.dumps(judge(self._all(store))))
        else:
            store.wait(["decided"], timedelta(seconds=self._seconds + LEAVING_SECONDS))
        return json.loads(store.get("decided"))

    def _all(self, store: dist.Store) -> dict[int, Any]:
        keys = {f"said by {rank}": rank for rank in range(self.size)}
        try:
            store.wait(list(keys), timedelta(seconds=self._seconds))
        except RuntimeError:  # DistStoreError: too late
            keys = {key: rank for key, rank in keys.items() if store.check([key])}
        values = store.multi_get(list(keys))
        return {rank: json.loads(value) for rank, value in zip(keys.values(), values, strict=True)}

    def is_first(self, message: str) -> bool:
        """Whether no other rank of this node came with this message before.

        True also where the store does not answer, so that no message is lost.
        """
        store, answers = self._store, []
        if store is None:
            return True

        def ask() -> None:
            digest = hashlib.sha256(message.encode()).hexdigest()
            answers.append(store.add(f"{socket.gethostname()} {digest}", 1) == 1)

        asking = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        asking.start()
        asking.join(LEAVING_SECONDS)
        return answers[0] if answers else True

    def leave(self) -> bool:
        """Wait a moment for all ranks to come here too; whether they did."""
        if self._store is None:
            return True
        try:
            left = self._store.add("left", 1)
            deadline = time.monotonic() + LEAVING_SECONDS
            while left < self.size and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add("left", 0)
        except RuntimeError:  # the rank that serves the store has gone
            return False
        return left >= self.size


def _quietly(ask: Callable[[], None]) -> None:
    try:
        ask()
    except RuntimeError:  # the rank that serves the store has gone
        return
