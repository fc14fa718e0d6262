"""Stored originals are read at any layout, whichever rank has something to train, or none."""

import contextlib
import os
import signal
import time

import pytest
import torch
import torch.multiprocessing as mp

from tests.harness.original_worlds import ALONE, JOB, POLICIES, enter


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    context = mp.spawn(enter, (folder,), nprocs=2, join=False)
    deadline = time.monotonic() + 400
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline
    except BaseException:
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        raise
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_layout_reads_what_every_layout_wrote(found, policy):
    layouts = {*ALONE, *JOB}
    cases = {(w, r) for own in found for p, w, r, _, _ in own if p == policy}
    assert cases == {(writer, reader) for writer in layouts for reader in layouts}
    assert [case for own in found for case in own if case[0] == policy and case[3]] == []
    read = sum(case[4] for own in found for case in own if case[0] == policy)
    assert (read == 0) == (policy == "nothing of what is kept")
