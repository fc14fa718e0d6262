"""The progress bar: on the first rank's terminal and nowhere else."""

import io

import pytest

from megatron_moe_inject.host.progress import StepProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("rank", "kind", "drawn"), [(0, Terminal, 1), (1, Terminal, 0), (0, io.StringIO, 0)]
)
def test_it_is_drawn_on_the_first_ranks_terminal(rank, kind, drawn):
    stream = kind()
    progress = StepProgress(rank, lambda: 6, stream)
    progress.close()
    for _ in range(3):
        progress.end(None, None)
    progress.close()
    assert ("3/6" in stream.getvalue()) == bool(drawn)
    assert bool(stream.getvalue()) == bool(drawn)


def test_the_number_of_steps_may_be_unknown():
    stream = Terminal()
    progress = StepProgress(0, lambda: None, stream)
    progress.end(None, None)
    progress.close()
    assert "1step" in stream.getvalue()
