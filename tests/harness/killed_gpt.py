"""Our GPT entry; each rank kills itself, as ``kill -9`` does, while it looks up the samples of step
``TESTS_KILL_STEP`` (counted from 0 in this run) in a store."""

import functools
import os
import signal

from megatron_moe_inject.host import gpt_entry
from megatron_moe_inject.teachers.store.step_teacher import StoreTeacher


def main() -> None:
    stock, left = StoreTeacher._look_up, [int(os.environ["TESTS_KILL_STEP"])]

    @functools.wraps(stock)
    def look_up(self, batches, samples):
        found = stock(self, batches, samples)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return found

    StoreTeacher._look_up = look_up
    gpt_entry.main()


if __name__ == "__main__":
    main()
