"""Our GPT entry; every rank counts the sequences that teachers read here, and says so at its end.

``teachers: {"rank": ..., "before": [{"<name>": [...]}, ...], "else": {"<name>": ...}}`` has for
each training step the sizes of the passes before its schedule, and how many sequences were read
otherwise: inside a schedule, in evaluations and while the run began.

``TESTS_RATIO`` is taken for what was measured: a teacher's sequence in forwards of a stage.
"""

import functools
import json
import os
from collections import defaultdict

from megatron_moe_inject.host import gpt_entry
from megatron_moe_inject.teachers.megatron import MegatronTeacher
from megatron_moe_inject.teachers.pace import Pace
from megatron_moe_inject.teachers.step_teachers import StepTeachers

counts = {"before": [], "else": defaultdict(int)}
ahead = []


def count_passes() -> None:
    """What is read while the teachers of a training step begin, and otherwise."""
    stock_begin, stock_states = StepTeachers.begin, MegatronTeacher.states

    @functools.wraps(stock_begin)
    def begin(self, step):
        if not step.training:
            stock_begin(self, step)
            return
        ahead.append(defaultdict(list))
        stock_begin(self, step)
        counts["before"].append(ahead.pop())

    @functools.wraps(stock_states)
    def states(self, tokens, *args, **kwargs):
        if ahead:
            ahead[-1][self.name].append(len(tokens))
        else:
            counts["else"][self.name] += len(tokens)
        return stock_states(self, tokens, *args, **kwargs)

    StepTeachers.begin, MegatronTeacher.states = begin, states


if __name__ == "__main__":
    count_passes()
    if "TESTS_RATIO" in os.environ:
        Pace.ratio = lambda self, name: float(os.environ["TESTS_RATIO"])
    gpt_entry.main()
    print("teachers: " + json.dumps({"rank": int(os.environ["RANK"]), **counts}), flush=True)
