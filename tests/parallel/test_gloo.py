"""The gloo pool reports what went wrong and where, and recovers."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import gloo


def _sum_of_ranks(size):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total, group=gloo.block_group(size))
    return os.getpid(), total.item()


def _fail_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("broken on purpose")
    dist.barrier()


def _leave_on(rank, leave):
    if dist.get_rank() == rank:
        leave("left on purpose")
    dist.barrier()


def _die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)


def _sleep():
    time.sleep(60)


@pytest.fixture(scope="module")
def pair():
    pool = gloo.Pool(2)
    yield pool
    pool.close()


def test_processes_are_reused_and_groups_are_blocks(pair):
    together, alone = pair.run(_sum_of_ranks, 2), pair.run(_sum_of_ranks, 1)
    assert [total for _, total in together] == [1.0, 1.0]
    assert [total for _, total in alone] == [0.0, 1.0]
    assert [pid for pid, _ in together] == [pid for pid, _ in alone]


def test_failure_names_the_rank_and_the_next_run_works(pair):
    with pytest.raises(gloo.RankFailedError, match=r"rank 1: (.|\n)*broken on purpose"):
        pair.run(_fail_on, 1)
    assert [total for _, total in pair.run(_sum_of_ranks, 2)] == [1.0, 1.0]


@pytest.mark.parametrize("leave", [sys.exit, pytest.fail, pytest.skip])
def test_a_case_that_leaves_otherwise_has_failed_and_says_where(pair, leave):
    with pytest.raises(gloo.RankFailedError, match=r"rank 1: (.|\n)*left on purpose"):
        pair.run(_leave_on, 1, leave)


def test_death_is_reported(pair):
    with pytest.raises(gloo.RankFailedError, match="rank 0: died with exit code 7"):
        pair.run(_die_on, 0)


def test_missed_deadline_is_reported(pair):
    pair.run(_sum_of_ranks, 2)
    pair.timeout, before = 0.5, pair.timeout
    try:
        with pytest.raises(gloo.RankFailedError, match=r"rank 1: no answer within 0\.5 s"):
            pair.run(_sleep)
    finally:
        pair.timeout = before
