"""A run's list: what is written reads back, cut-off and damaged lines, what a resumed run keeps."""

import json

import pytest

from megatron_moe_inject.evaluation.evaluation import LARGEST
from megatron_moe_inject.evaluation.report.run_file import (
    append,
    finite,
    kept,
    read_run,
    write_run,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from tests.harness.run_lists import start, step


def test_lines_read_back(tmp_path):
    path = tmp_path / "inject_run.jsonl"
    lines = [start(), step(1), step(2, {"kd loss/code": None}, learning_rate=1e-3)]
    assert read_run(path) == []
    write_run(path, lines[:1])
    for line in lines[1:]:
        append(path, line)
    assert read_run(path) == lines


def test_the_beginning_of_a_line_is_left_out(tmp_path):
    path = tmp_path / "inject_run.jsonl"
    write_run(path, [start(), step(1, {"lm loss/größe": 1.0})])
    whole = path.read_bytes()
    append(path, step(2))
    longer = path.read_bytes()
    for cut in range(len(whole), len(longer)):
        path.write_bytes(longer[:cut])
        assert len(read_run(path)) == 2
    path.write_bytes(b"\xc3" + whole)
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        read_run(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "line 2: version: 2 is not known here"),
        ({"kind": "stop"}, "line 2: kind: 'stop' is not known"),
        ({"kind": ["step"]}, "line 2: kind:"),
        ({"format": "other"}, "line 2: is no line of a run"),
        ({"terms": {"lm loss": "x"}}, "line 2: terms.'lm loss': 'x' is not a number"),
        ({"seconds": None}, "line 2: seconds"),
        ({"seconds": 1e308}, "line 2: seconds: 1e+308 is no time that a step takes"),
        ({"seconds": -1.0}, "line 2: seconds: -1.0 is no time that a step takes"),
        ({"seconds": float("inf")}, "line 2: seconds: inf is not finite"),
        ({"terms": {"lm loss": 1e308}}, "line 2: terms.'lm loss': 1e+308 is beyond what float32"),
        ({"terms": {"lm loss": float("nan")}}, "line 2: terms.'lm loss': nan is not finite"),
        ({"grad_norm": -1e39}, "line 2: grad_norm: -1e+39 is beyond what float32 holds"),
        ({"more": 1}, "line 2: more: unknown key"),
    ],
)
def test_damaged_lines_are_told(tmp_path, change, message):
    path = tmp_path / "inject_run.jsonl"
    write_run(path, [start(), step(1)])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(RecipeError, match=r"inject_run\.jsonl, line 2") as error:
        read_run(path)
    assert message in str(error.value)
    path.write_text(f"{first}\n{second[:-9]}\n")
    with pytest.raises(RecipeError, match="is damaged or no JSON"):
        read_run(path)


def test_a_resumed_run_keeps_what_it_goes_on_from():
    lines = [start(), step(1), step(2), start(2), step(3), step(4)]
    assert kept(lines, 3) == lines[:5]
    assert kept(lines, 2) == lines[:3]
    assert kept(lines, 1) == lines[:2]


def test_what_is_written_is_finite_in_float32():
    for value in (0.0, -1.5, LARGEST, -LARGEST, None):
        assert finite(value) == value
    for value in (float("nan"), float("inf"), -float("inf"), 1e39, -1e308):
        assert finite(value) is None


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append(tmp_path / "x.jsonl", step(1, seconds=float("nan")))
