"""Ranks of a job that are threads of one process."""

import threading
from datetime import timedelta

import torch.distributed as dist

from megatron_moe_inject.host.meeting import Meeting


def ranks(size, seconds=5.0):
    """Meetings of a job whose ranks are threads here."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=seconds))
    return [Meeting(store, rank, size, seconds) for rank in range(size)]


def all_at_once(*actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
