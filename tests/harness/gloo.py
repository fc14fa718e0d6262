"""Runs functions on a pool of gloo processes: one start, many cases.

    def case(size):                                  # module level, so that workers can import it
        group = gloo.block_group(size)
        ...                                          # assert, communicate, return plain values

    results = gloo.pool(4).run(case, 2)              # [what rank 0 returned, ..., rank 3]

A pool starts on its first run and lives until the test process ends. Its processes are forked from
a server that has imported torch and nothing else, so a start costs about one import. A failure on
any rank, a dead process or a missed deadline becomes one exception that names the rank; the
processes are then killed, since their collectives may be out of step, and the next run starts new
ones.
"""

import atexit
import functools
import io
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from unittest import mock

import torch
import torch.distributed as dist

_HOST = "127.0.0.1"
_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)


class RankFailedError(AssertionError):
    """A case failed; the message holds each failed rank's traceback."""


class Pool:
    """``world_size`` processes in one gloo group; ``timeout`` seconds for any one run."""

    def __init__(self, world_size: int, timeout: float = 120.0):
        self.world_size = world_size
        self.timeout = timeout
        self._processes = []
        self._pipes: list[Connection] = []
        self._store = None

    def run(self, case: Callable, *args, **kwargs) -> list:
        """Call ``case`` on every rank and return what the ranks returned, in rank order.

        ``case``, its arguments and its results travel by pickle. Raises RankFailedError.
        """
        if not self._processes:
            self._start()
        request = _pack((case, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        answers, errors = self._collect()
        if errors:
            self.close()
            raise RankFailedError("\n".join(f"rank {rank}: {errors[rank]}" for rank in errors))
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; a later run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        # The store listens on a port that the system picks, so no other process can take it first.
        self._store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            pipe, remote = context.Pipe()
            args = (rank, self.world_size, self._store.port, self.timeout, remote)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            remote.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def _collect(self) -> tuple[dict[int, object], dict[int, str]]:
        """Answers and errors by rank. Once a rank has failed the others get one second more."""
        answers, errors = {}, {}
        deadline = time.monotonic() + self.timeout
        waiting = dict(zip(self._pipes, range(self.world_size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    succeeded, answer = _unpack(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=5)
                    succeeded = False
                    answer = f"died with exit code {self._processes[rank].exitcode}"
                (answers if succeeded else errors)[rank] = answer
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + 1.0)
        if waiting and not errors:
            for rank in waiting.values():
                errors[rank] = f"no answer within {self.timeout:g} s"
        return answers, errors


@functools.cache
def pool(world_size: int) -> Pool:
    """The pool of ``world_size`` processes that all tests of this test process share."""
    shared = Pool(world_size)
    atexit.register(shared.close)
    return shared


@functools.cache
def block_group(size: int) -> dist.ProcessGroup:
    """Inside a case: the group of the ``size`` consecutive ranks that this rank belongs to.

    Every rank of the pool must call it with the same sizes in the same order.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    assert world_size % size == 0, f"blocks of {size} do not divide {world_size} ranks"
    groups = [
        dist.new_group(list(range(start, start + size))) for start in range(0, world_size, size)
    ]
    return groups[rank // size]


@contextmanager
def count_collectives() -> Iterator[Counter]:
    """Inside a case: how often each collective of torch.distributed was called, by name."""
    counts = Counter()

    def counting(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in _COLLECTIVES:
            replacement = counting(name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, replacement))
        yield counts


def _serve(rank: int, world_size: int, port: int, timeout: float, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(_HOST, port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            case, args, kwargs = _unpack(request)
            answer = _pack((True, case(*args, **kwargs)))
        except BaseException:  # also pytest.fail and sys.exit: the pool says which rank, and why
            answer = _pack((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _pack(value: object) -> bytes:
    """``value`` as bytes.

    Not by plain pickle: Megatron patches how that stores a tensor, and every worker would have to
    import Megatron to read one back.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)
