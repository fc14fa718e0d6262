"""``moe-inject report`` on invented lists: what the page has, leaves out, escapes and refuses."""

import html.parser
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.evaluation.evaluation import LARGEST
from megatron_moe_inject.evaluation.evaluation_file import append_line
from megatron_moe_inject.evaluation.report.charts import gain_charts, term_charts, weights
from megatron_moe_inject.evaluation.report.line_charts import thinned
from megatron_moe_inject.evaluation.report.run_file import append, write_run
from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from tests.harness.evaluations import evaluation
from tests.harness.profiles import from_counts
from tests.harness.run_lists import start, step

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

RECIPE = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {0: [2]}}}
teachers: {coder: {source: "megatron:/ckpt/coder"}}
objective: {alpha: {points: {0: 0.0, 4: 0.7}}, beta: 0.3, gamma: 2.5}
"""
TERMS = {"lm loss": 4.125, "kd loss/code": 1.71875, "target share/code": 0.21}
CHANGES = (3.0, 2.8, 2.625), (3.0, 3.02, 3.0625)


class Page(html.parser.HTMLParser):
    """Headings, pictures, other tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.pictures, self.tags, self.text, self._in = [], [], set(), "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self._in = tag
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text += data
        if self._in == "h2" and data.strip():
            self.headings.append(data)
            self._in = None


def report(folder, *options) -> Page:
    output = folder / "page.html"
    assert main(["report", str(folder), "--output", str(output), *options]) == 0
    page = Page(output.read_text())
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    return page


def fill(folder, terms=TERMS, evaluations=3):
    recipe = dump_recipe(recipe_from_yaml(RECIPE))
    write_run(folder / "inject_run.jsonl", [start(recipe=recipe)])
    for i in range(1, 5):
        shown = {name: value + i for name, value in terms.items()}
        append(folder / "inject_run.jsonl", step(i, shown, learning_rate=1e-3))
    for i in range(evaluations):
        code, general = ({"loss": losses[i]} for losses in CHANGES)
        append_line(
            folder / "inject_evaluation.jsonl",
            evaluation(code | {"teacher": 2.5}, general, iteration=2 * i),
        )


def test_the_whole_page(tmp_path):
    fill(tmp_path)
    page = report(tmp_path)
    assert page.headings == [
        "Gain and forgetting: first and last evaluation",
        "Gain and forgetting over time",
        "Loss terms while training",
        "Where domain tokens go",
        "Weights of the loss terms",
        "Trained parameters",
        "Time and gradient",
        "Starts and versions",
        "Plan",
        "Recipe",
        "Not here",
    ]
    assert len(page.pictures) == 5
    for part in ("5.125", "8.125", "5.71875", "-0.3750", "+0.0625", "24.61", "megatron-core"):
        assert part in page.text, part
    assert "linear(0: 0, 4: 0.7)" in page.text
    assert "4 of 8 iterations, 32 samples" in page.text
    assert "second line after a start is a mean over the first step as well" in page.text
    assert "no routing profiles were given" in page.text


def test_a_killed_run_gives_a_report_of_its_whole_lines(tmp_path):
    fill(tmp_path)
    for name in ("inject_run.jsonl", "inject_evaluation.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"format": "megatron_moe_inj')
    page = report(tmp_path)
    assert "4 of 8 iterations" in page.text
    assert len(page.pictures) == 5


def test_sections_without_data_are_a_line_with_the_reason(tmp_path):
    write_run(tmp_path / "inject_run.jsonl", [start()])
    page = report(tmp_path)
    assert page.pictures == []
    assert "Loss terms while training: no step was logged yet" in page.text
    assert "needs two evaluations, and there are 0" in page.text
    assert "Loss terms while training" not in page.headings
    append(tmp_path / "inject_run.jsonl", step(1))
    page = report(tmp_path)
    assert "the run logged no shares" in page.text
    assert len(page.pictures) == 2
    write_run(tmp_path / "inject_run.jsonl", [step(1)])
    assert "the run's list says nothing of its start" in report(tmp_path).text


def test_evaluations_alone_and_of_other_text(tmp_path):
    for n in (20, 19):
        append_line(tmp_path / "inject_evaluation.jsonl", evaluation({"n": n}, {}, iteration=n))
    page = report(tmp_path)
    assert "class code is not the text of the first evaluation" in page.text
    assert "the evaluations are of different text" in page.text


def test_the_evaluations_may_lie_elsewhere(tmp_path):
    other = tmp_path / "elsewhere.jsonl"
    write_run(tmp_path / "inject_run.jsonl", [start(evaluations=str(other))])
    for i in range(2):
        append_line(other, evaluation({"loss": 3.0 - i}, {}, iteration=i))
    assert "-1.0000" in report(tmp_path).text


def test_the_largest_numbers_that_a_list_may_hold_are_drawn(tmp_path):
    big = {"terms": {"lm loss": LARGEST, "kd loss/code": -LARGEST}, "grad_norm": LARGEST}
    small = {"terms": {"lm loss": -LARGEST, "kd loss/code": 1e-300}, "grad_norm": 5e-324}
    numbers = {"steps": 10**18, "samples": 10**18, "seconds": 1e10}
    lines = [step(1, **big), step(2, **numbers, **small), step(2**59, **big, learning_rate=0.0)]
    write_run(tmp_path / "inject_run.jsonl", [start(train_iters=2**59), *lines])
    for i in range(2):
        losses = {"loss": (3e36, -3e36)[i], "teacher": 1e36}
        line = evaluation(losses, {"loss": 1e36}, iteration=i * 2**59)
        append_line(tmp_path / "inject_evaluation.jsonl", line)
    assert len(report(tmp_path).pictures) == 3


@pytest.mark.parametrize("line", [{"seconds": 1e308}, {"terms": {"lm loss": 1e308}}])
def test_numbers_of_no_run_are_one_error(tmp_path, capsys, line):
    write_run(tmp_path / "inject_run.jsonl", [start(), step(1, **line), step(2, **line)])
    assert main(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "inject_run.jsonl, line 2: " in message
    assert message.count("\n") == 1


def test_text_without_a_token_is_told(tmp_path):
    for i in range(2):
        found = evaluation({"n": 2}, {"n": 2}, iteration=i)
        for of_class in found.classes.values():
            for values in of_class.sums.values():
                values[:] = 0
        append_line(tmp_path / "inject_evaluation.jsonl", found)
    assert "no class of the evaluations has a token" in report(tmp_path).text


def test_nothing_foreign_is_said(tmp_path):
    """Of matplotlib, say, where it may not write its caches, or of a library that is deprecated."""
    fill(tmp_path)
    (tmp_path / "home").touch()  # no folder
    (tmp_path / "sitecustomize.py").write_text(SPEAKING)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MPLCONFIGDIR")}
    env |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    env |= {"PYTHONPATH": f"{tmp_path}:{env.get('PYTHONPATH', '')}:{Path.cwd()}"}
    command = [sys.executable, "-m", "megatron_moe_inject.cli", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path.cwd())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"report: {tmp_path}/inject_report.html (4 lines of steps, 3 evaluations)\n"
    )


SPEAKING = """
import logging, sys, warnings
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "jinja2":
            warnings.warn("a remark", UserWarning)
            logging.getLogger("foreign").warning("another")
sys.meta_path.insert(0, Finder())
"""


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> & $x_{ \"'"
    lines = [
        start(plan=evil, recipe=evil, versions={evil: evil}),
        step(1, {f"kd loss/{evil}": 1.0, f"_{evil}": None}),
        step(2, {f"kd loss/{evil}": 2.0, f"_{evil}": 1.0}),
    ]
    folder = tmp_path / "<script>x"
    folder.mkdir()
    write_run(folder / "inject_run.jsonl", lines)
    page = report(folder)
    assert page.text.count("<script>alert(1)</script> & $x_{ \"'") >= 5
    assert "not finite" in page.text
    assert "cannot read the recipe" in page.text


def test_heat_maps_of_two_profiles(tmp_path):
    fill(tmp_path)
    profiles = [str(tmp_path / name) for name in ("before.json", "after.json")]
    for path, counts in zip(profiles, ([10, 50, 30, 10], [10, 20, 60, 10]), strict=True):
        write_profile(path, from_counts([counts]))
    page = report(tmp_path, "--profiles", *profiles)
    assert "Experts before and after" in page.headings
    assert "30.0 > 60.0" in page.text  # the recipe's target, expert 2 of layer 0
    assert len(page.pictures) == 6


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    def told(*arguments):
        assert main(["report", *arguments]) == 2
        return capsys.readouterr().err

    assert "has no inject_run.jsonl and no inject_evaluation.jsonl" in told(str(tmp_path))
    assert "is no folder" in told(str(tmp_path / "none"))
    fill(tmp_path)
    before = (tmp_path / "inject_run.jsonl").read_bytes()
    assert "is what the report is made from" in told(
        str(tmp_path), "--output", str(tmp_path / "inject_run.jsonl")
    )
    assert (tmp_path / "inject_run.jsonl").read_bytes() == before
    assert not (tmp_path / "inject_report.html").exists()
    for module in ("jinja2", "matplotlib.figure"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            message = told(str(tmp_path))
            assert module.partition(".")[0] in message
            assert "megatron-moe-inject[report]" in message
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "inject_report.html").exists()


def test_terms_are_grouped_by_class_and_gaps_stay():
    steps = [step(1, {"lm loss": 2.0, "lm loss/code": 3.0, "target mass/code": 0.5}), step(2)]
    steps.append(step(3, {"lm loss": None}))
    (losses,) = term_charts(steps, shares=False)
    assert losses.title == "lm loss"
    assert [series.name for series in losses.series] == ["all tokens", "code"]
    assert list(losses.series[0].x) == [1, 2, 3]
    assert list(losses.series[0].y) == [2.0, 3.8, None]
    assert [chart.title for chart in term_charts(steps, shares=True)] == ["target mass"]


def test_choices_of_new_experts_are_a_picture_with_a_line_for_each_class():
    names = ("new share/code", "new share/general", "new experts open")
    steps = [step(n, {name: n / 10 + i for i, name in enumerate(names)}) for n in (1, 2)]
    assert term_charts(steps, shares=False) == []
    shares, door = term_charts(steps, shares=True)
    assert (shares.title, door.title) == ("new share", "new experts open")
    assert [line.name for line in shares.series] == ["code", "general"]
    assert list(shares.series[1].y) == [1.1, 1.2]


def test_gain_against_forgetting():
    found = [evaluation({"loss": a}, {"loss": b}) for a, b in zip(*CHANGES, strict=True)]
    over_time, against = gain_charts(found)
    assert [series.name for series in over_time.series] == ["code", "general"]
    np.testing.assert_allclose(over_time.series[0].y, [0, -0.2, -0.375], atol=1e-6)
    (path,) = against.series
    np.testing.assert_allclose(path.x, [0, 0.02, 0.0625], atol=1e-6)
    assert path.along.value == pytest.approx(-0.375)
    assert path.across.low <= path.across.value <= path.across.high
    assert len(gain_charts([evaluation({"loss": 1.0})] * 2)) == 1


def test_weights_in_use():
    found = weights(recipe_from_yaml(RECIPE))
    assert sorted(found) == ["alpha, code", "beta, code", "gamma", "general_beta"]


def test_shares_of_the_training_data_are_shown(tmp_path):
    constant = RECIPE.replace("{points: {0: 0.0, 4: 0.7}}", "0.7")
    mixed = constant + "mixing: {general: {points: {0: 0.5, 4: 0.1}}}\n"
    write_run(tmp_path / "inject_run.jsonl", [start(recipe=dump_recipe(recipe_from_yaml(mixed)))])
    page = report(tmp_path)
    assert "mixing.general" in page.text
    assert "linear(0: 0.5, 4: 0.1)" in page.text
    assert len(page.pictures) == 1
    write_run(
        tmp_path / "inject_run.jsonl", [start(recipe=dump_recipe(recipe_from_yaml(constant)))]
    )
    assert report(tmp_path).pictures == []


def test_long_lines_are_averaged():
    y = np.arange(5000.0)
    y[:5] = np.nan
    x, thin = thinned(np.arange(5000.0), y, most=1000)
    assert len(x) == len(thin) == 1000
    assert np.isnan(thin[0])
    assert thin[1] == 7.0
    assert x[1] == 7.0
