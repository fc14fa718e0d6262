"""How far a run is: a bar on a terminal, lines in a log, with the time left and the losses."""

import io
from types import SimpleNamespace

import pytest

from megatron_moe_inject.host.progress import StepProgress

TRAINS, EVALUATES = SimpleNamespace(training=True), SimpleNamespace(training=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def clock(*seconds):
    return iter(seconds).__next__


def test_a_terminal_gets_a_bar_that_stays_over_all_steps():
    stream = Terminal()
    progress = StepProgress("profile", lambda: 6, stream=stream)
    for _ in range(3):
        progress.begin(EVALUATES)
        progress.close()
        progress.end(EVALUATES, None)
    progress.say({"kd loss": 1.23456, "kd loss/code": 2.0})
    progress.finish()
    text = stream.getvalue()
    assert "3/6" in text
    assert "kd loss 1.235" in text
    assert "code" not in text
    assert "\n" not in text.rstrip("\n")


def test_a_log_gets_a_line_at_intervals_with_the_time_left():
    stream = io.StringIO()
    progress = StepProgress(
        "evaluation", lambda: 6, interval=2, stream=stream, clock=clock(0.0, 10.0, 40.0)
    )
    for _ in range(4):
        progress.end(EVALUATES, None)
    progress.end(TRAINS, None)
    progress.finish()
    assert stream.getvalue() == (
        "evaluation: step 2 of 6, 0:40 left\nevaluation: step 4 of 6, 0:27 left\n"
    )


@pytest.mark.parametrize(("left", "shown"), [(59.4, "0:59"), (61, "1:01"), (3725, "1:02:05")])
def test_the_time_left(left, shown):
    stream = io.StringIO()
    progress = StepProgress(
        "training", lambda: 3, training=True, interval=0, stream=stream, clock=clock(0.0, left)
    )
    for _ in range(2):
        progress.end(TRAINS, None)
    progress.end(EVALUATES, None)
    assert stream.getvalue() == ""
    progress.say({"lm loss": 2.0, "kd loss": 1.5, "lm loss/code": 3.0})
    assert stream.getvalue() == f"training: step 2 of 3, {shown} left, lm loss 2, kd loss 1.5\n"


def test_the_number_of_steps_may_be_unknown():
    stream = io.StringIO()
    progress = StepProgress("profile", lambda: None, stream=stream)
    progress.end(EVALUATES, None)
    assert stream.getvalue() == "profile: step 1\n"
