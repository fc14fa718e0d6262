"""A process that has imported Megatron once and forks the ranks of each test run.

Imports are most of a small run: forking makes it several times cheaper. Nothing but imports,
the CPU lane and the plugin's installation happens before the fork, so that a forked rank starts
where a fresh one is after its imports. One JSON request a line on stdin, one answer a line on
the descriptor given as argument:

    {"argv": [...], "env": {...}, "logs": [one path per rank], "seconds": 60.0}
    {"returncode": 0}        # null: still running after that time, killed
"""

import argparse
import atexit
import functools
import gc
import importlib
import json
import multiprocessing.process
import multiprocessing.util
import os
import pkgutil
import signal
import sys
import time
import traceback
from typing import NoReturn

GRACE_SECONDS = 5.0
"""After one rank fails, the others get this long to say why they stop."""


_OF_OTHERS = (
    "megatron.core.datasets.helpers",
    "megatron.core.tokenizers.text.models",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.mimo",
    "numpy.ma",
    "torch._subclasses.schema_check_mode",
    "torch.utils.serialization.config",
)
_COMMANDS = ("convert", "planning")
"""Rooms of commands that start no run."""


def _modules_of_runs() -> list[str]:
    """Modules of the package, but for the doors, what commands alone need, and layers that a model
    asks for by name, which some version of Megatron cannot have."""
    import megatron_moe_inject

    names = ["megatron_moe_inject.run"]
    for room in pkgutil.iter_modules(megatron_moe_inject.__path__, "megatron_moe_inject."):
        if room.ispkg and not room.name.endswith((*_COMMANDS, ".host")):
            folder = [f"{megatron_moe_inject.__path__[0]}/{room.name.rpartition('.')[2]}"]
            found = pkgutil.walk_packages(folder, f"{room.name}.")
            names += [module.name for module in found if "command" not in module.name]
    return names


def _fork(request: dict, rank: int) -> int:
    """A child that becomes ``rank``: 0 in the child, its pid here."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = request["argv"]
    _start_over()
    return 0


def _start_over() -> None:
    """As ``multiprocessing`` does in its own forks: children and connections are the parent's."""
    multiprocessing.process._children.clear()
    multiprocessing.util._finalizer_registry.clear()
    multiprocessing.util._run_after_forkers()


def _exit_code(status: int) -> int:
    return os.waitstatus_to_exitcode(status)


def wait(pids: list[int], seconds: float) -> int | None:
    """The first non-zero exit code, 0 when all end well, None at the deadline; none survives."""
    deadline = time.monotonic() + seconds
    running, failed = set(pids), None
    while running and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                if failed is None and _exit_code(status):
                    failed = _exit_code(status)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if failed is None and running:
        return None
    return failed or 0


def serve(answers) -> None:
    """Answer requests until stdin closes; returns in every forked rank."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in range(len(request["logs"])):
            pid = _fork(request, rank)
            if not pid:
                answers.close()
                return
            pids.append(pid)
        answers.write(json.dumps({"returncode": wait(pids, request["seconds"])}) + "\n")
        answers.flush()
    sys.exit()


def _import_everything() -> None:
    """What a training run imports, also later on, and the help texts of Megatron's flags.

    The plugin imports its parts when a run asks for them, as Megatron does some of its own: every
    rank would do so anew. Megatron parses the sources of its configs for help texts, three times
    per run; the answers do not change.
    """
    for module in (*_OF_OTHERS, "megatron_moe_inject.host.gpt_entry", *_modules_of_runs()):
        importlib.import_module(module)
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    stock = ArgumentGroupFactory._get_field_docstrings
    known = functools.cache(lambda config_class: stock(factory, config_class))
    factory = ArgumentGroupFactory.__new__(ArgumentGroupFactory)
    ArgumentGroupFactory._get_field_docstrings = lambda self, config_class: known(config_class)
    arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _prepare_saving() -> None:
    """One process for the queues that Megatron's savers hand their results on by.

    It would start one for each rank that saves, with torch imported anew. Each rank has a queue of
    its own in this one, which ends with this process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.storage import WriteResult

    shared = multiprocessing.get_context("spawn").Manager()
    queue = shared.Queue()
    queue.put(WriteResult)  # makes it import that
    queue.get()
    stock = filesystem_async.get_write_results_queue

    def get_write_results_queue(mp_mode: str = "spawn"):
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = shared.Queue()
        return stock(mp_mode)

    filesystem_async.get_write_results_queue = get_write_results_queue


def _become_rank() -> NoReturn:
    """Train, and leave as an interpreter does, without tearing down the shared imports."""
    from tests.harness import runner

    code = 0
    try:
        runner.main()
    except SystemExit as exit_:
        code = exit_.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Import, then serve; a forked rank comes back here and trains."""
    from megatron_moe_inject import launch

    sys.argv = [sys.argv[0], "--cpu"]
    launch.prepare()
    _import_everything()
    _prepare_saving()
    gc.freeze()
    serve(os.fdopen(int(os.environ["MOE_INJECT_ZYGOTE_ANSWERS"]), "w"))
    _become_rank()


if __name__ == "__main__":
    main()
