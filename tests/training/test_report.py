"""``moe-inject report`` of a real run that was stopped and resumed."""

import pytest

from megatron_moe_inject import cli
from megatron_moe_inject.evaluation.report.run_file import Start, Step, append, read_run
from tests.harness import lane
from tests.harness.evaluating import EVALUATIONS, GAMMA
from tests.harness.injection import inject, recipe_file
from tests.harness.material import student_flags

STEERED = GAMMA + "steering: {{report: true}}\n"


def test_a_run_that_was_stopped_and_resumed(material, tmp_path):
    folder, path = tmp_path / "run", tmp_path / "run" / "inject_run.jsonl"
    keep = ("--save", str(folder), "--save-interval", "1", "--train-iters", "6", *EVALUATIONS)
    first = inject(material, STEERED, extra=(*keep, "--exit-interval", "3"))
    lines = read_run(path)
    assert [line.iteration for line in lines] == [0, 1, 2, 3]
    append(path, Step(4, 32, 1, 0, 1.0, {"lm loss": 77.0}))  # of a step that is taken again
    with path.open("a") as file:
        file.write('{"format": "megatron_moe_inj')
    ours = ("--inject-recipe", recipe_file(material, STEERED), "--load", str(folder))
    pytest.importorskip("tensorboard")  # a rank that writes for it has the terms of each step
    board = ("--log-interval", "2", "--tensorboard-dir", str(tmp_path / "board"))
    second = lane.run(student_flags(*material.blend, *keep, *ours, *board))
    lines = read_run(path)
    starts = [line for line in lines if isinstance(line, Start)]
    steps = [line for line in lines if isinstance(line, Step)]
    assert [start.iteration for start in starts] == [0, 3]
    places = [(start.loaded.checkpoint, start.loaded.iteration) for start in starts]
    assert places == [(material.student, 3), (str(folder), 3)]
    assert starts[0].loaded.sha256 != starts[1].loaded.sha256 is not None
    assert [step.iteration for step in steps] == [1, 2, 3, 4, 6]
    assert [step.steps for step in steps] == [1, 1, 1, 1, 2]
    assert [step.samples for step in steps] == [8, 16, 24, 32, 48]

    exact = {int(step["iteration"]): step for step in first.iterations + second.iterations}
    assert sorted(exact) == [1, 2, 3, 4, 5, 6]
    for step in steps:
        covered = [exact[step.iteration - i] for i in range(step.steps)]
        for name in ("lm loss", "kd loss", "kd loss/code", "retention loss", "target share/code"):
            means = [values[name] for values in covered]  # of unequal numbers of tokens
            low, high = min(means) * (1 - 1e-5) - 1e-7, max(means) * (1 + 1e-5) + 1e-7
            assert low <= step.terms[name] <= high, name
        assert step.terms["load_balancing_loss"] > 0
        assert step.grad_norm == covered[0]["grad norm"]
        assert 0 < step.seconds < 60
    assert steps[0].learning_rate > steps[-1].learning_rate == 0  # Megatron's linear decay
    assert starts[-1].plan in second.output
    assert "gamma: 2.0" in starts[-1].recipe
    trained = {row.name: row.trained for row in starts[-1].parameters}
    assert trained["experts"] > 0
    assert trained["router"] == 0

    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "inject_report.html").read_text()
    for name, value in steps[-1].terms.items():
        assert name in page
        assert f"{value:.6g}" in page
    assert page.count("data:image/png;base64,") == 4
    assert "resumed from iteration 3" in page
    assert "lm loss 77" not in page


@pytest.mark.parametrize("layout", [dict(pp=2), dict(ep=2)], ids=str)
def test_two_processes_write_one_list(material, tmp_path, layout):
    """The last rank's, of the terms of the last stage, alike at every layout, resumed too."""
    keep = ("--save-interval", "2", "--train-iters", "4", *EVALUATIONS)
    alone, both = tmp_path / "one", tmp_path / "two"
    one = inject(material, STEERED, extra=(*keep, "--save", str(alone)))
    stop = ("--save", str(both), "--exit-interval", "2")
    inject(material, STEERED, nproc=2, extra=(*keep, *stop), **layout)
    ours = ("--inject-recipe", recipe_file(material, STEERED), "--load", str(both))
    on = student_flags(*material.blend, *keep, *ours, "--save", str(both), **layout)
    two = lane.run(on, nproc=2)
    assert [step["iteration"] for step in two.iterations] == [3, 4]
    lines = [read_run(folder / "inject_run.jsonl") for folder in (alone, both)]
    assert [line.iteration for line in lines[1]] == [0, 1, 2, 2, 3, 4]
    steps = [[line for line in own if isinstance(line, Step)] for own in lines]
    for left, right in zip(*steps, strict=True):
        assert left.terms.keys() == right.terms.keys()
        for name in ("lm loss", "kd loss/code", "retention loss", "target share/code"):
            expected = pytest.approx(left.terms[name], rel=2e-5, abs=1e-6)
            assert right.terms[name] == expected, name
    assert one.losses("lm loss")[2:] == pytest.approx(two.losses("lm loss"), rel=2e-5)
    starts = [[line for line in own if isinstance(line, Start)] for own in lines]
    assert starts[0][0].parameters == starts[1][0].parameters


def test_without_the_section_nothing_is_written(material, tmp_path):
    inject(material, extra=("--save", str(tmp_path), "--save-interval", "100"))
    assert not (tmp_path / "inject_run.jsonl").exists()
