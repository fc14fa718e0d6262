"""A folder that one run saves to is closed to others while its process lives, and no longer."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.save_lock import FILE, SaveLock

HOLD = """
import os, sys, time
from megatron_moe_inject.host.save_lock import SaveLock
lock = SaveLock(sys.argv[1])
lock.take()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, and one that it has forked."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_told_at_once_and_a_killed_one_leaves_the_folder(tmp_path, holder):
    with pytest.raises(RecipeError, match=r"--save: .* is in use by another run") as told:
        SaveLock(tmp_path / "run").take()
    assert f'"process": {holder.pid}' in str(told.value)
    holder.kill()
    holder.wait()
    SaveLock(tmp_path / "run").take()  # what it has forked lives on
    assert json.loads((tmp_path / "run" / FILE).read_text())["process"] == os.getpid()


def test_a_holder_on_another_node_is_waited_for(tmp_path, holder):
    path = tmp_path / "run" / FILE
    path.write_text(path.read_text().replace('"host": "', '"host": "not-'))
    before = time.monotonic()
    with pytest.raises(RecipeError, match="not-"):
        SaveLock(tmp_path / "run", lease_seconds=1).take()
    assert 1 <= time.monotonic() - before < 10


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"--save: .* cannot be written to"):
        SaveLock(tmp_path / "file" / "run").take()
