"""How a run says that it failed: one line, once on each node, and the last thing on the screen.

``torchrun`` prints a block of its own after a process has failed. It shows there what the process
left in the file that ``TORCHELASTIC_ERROR_FILE`` names, so the line goes into that, too. Ranks that
have nothing to say wait to be ended by ``torchrun``, and are then not listed as further failures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_moe_inject.host.meeting import LEAVING_SECONDS, Meeting

PREFIX = "megatron_moe_inject: error: "
EXIT_CODE = 2
_BOLD_RED, _PLAIN = "\033[1;31m", "\033[0m"


def end(message: str, meeting: Meeting) -> NoReturn:
    """Say once on this node what is wrong, and end this process.

    Works where every rank comes here and where one does. No collective, but the process group is
    taken down where all ranks came.

    Raises:
        SystemExit: always.
    """
    text = PREFIX + message
    first = meeting.is_first(message)
    if first:
        _leave_for_torchrun(text)
        sys.stdout.flush()
        print(f"\n{_standing_out(text)}", file=sys.stderr, flush=True)
    if meeting.leave() and dist.is_initialized():
        dist.destroy_process_group()
    if not first and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(LEAVING_SECONDS)
    raise SystemExit(EXIT_CODE)


def _standing_out(text: str) -> str:
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"{_BOLD_RED}{text}{_PLAIN}" if colours else text


def _leave_for_torchrun(text: str) -> None:
    """In the form of ``torch.distributed.elastic``'s error handler, on lines of its own."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    # It shows the earliest failure as the cause, in whole seconds: those ended by it come after.
    extra_info = {"py_callstack": f"\n\n{text}\n", "timestamp": str(int(time.time()) - 1)}
    try:
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra_info}}))
    except OSError as error:  # the line still stands on stderr
        print(f"megatron_moe_inject: warning: {file}: {error}", file=sys.stderr, flush=True)
