"""``moe-inject report``: a run's folder as one HTML page.

Reads the lists that the run writes (``evaluation.report.run_file``,
``evaluation.evaluation_file``), whole at any moment, so a report can be made while the run goes on
and after it was killed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.data.section import MIXING
from megatron_moe_inject.evaluation.comparison import comparison
from megatron_moe_inject.evaluation.evaluation import Evaluation
from megatron_moe_inject.evaluation.evaluation_file import LIST, read_list
from megatron_moe_inject.evaluation.report.charts import (
    gain_charts,
    pair_charts,
    term_charts,
    time_charts,
    weight_charts,
    weights,
)
from megatron_moe_inject.evaluation.report.line_charts import Chart, line_charts
from megatron_moe_inject.evaluation.report.page import Code, Picture, Section, Table, render_page
from megatron_moe_inject.evaluation.report.run_file import FILE, Start, Step, read_run
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.experts.choose.profile_numbers import in_numbers_of
from megatron_moe_inject.experts.choose.routing_profile import GENERAL_CLASS, RoutingProfile
from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import (
    RecipeError,
    show,
    show_path,
)
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.recipe.layer_numbers import renumbered
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.schedule import show_weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.routing.report import check_same_student, layer_table, picture

OUTPUT = "inject_report.html"
_LAST_LINES = 20
_EXAMPLES = """examples:
  moe-inject report /ckpt/run
  moe-inject report /ckpt/run --output report.html --profiles before.json after.json

RUN is the --save folder of a run whose recipe has evaluation: {}. It may be running.
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``run`` of the parsed options returns the text."""
    report = add_command(
        commands,
        "report",
        "a run as one HTML page",
        "Make one self-contained HTML page of a run: losses, gain and forgetting, "
        "shares, weights, parameters, time, recipe and versions.",
        _EXAMPLES,
        run=_report,
    )
    report.add_argument("folder", metavar="RUN", help="the --save folder of a run")
    report.add_argument("--output", metavar="FILE", help=f"the page (default: RUN/{OUTPUT})")
    report.add_argument(
        "--profiles",
        metavar=("BEFORE", "AFTER"),
        nargs=2,
        help="two routing profiles of the student, for heat maps of its experts",
    )


@dataclass(frozen=True)
class RunData:
    """What is known of a run; ``recipe`` is None where this version cannot read it."""

    starts: Sequence[Start]
    steps: Sequence[Step]
    evaluations: Sequence[Evaluation]
    recipe: Recipe | None
    profiles: tuple[RoutingProfile, RoutingProfile] | None = None


def read_folder(folder: str | Path) -> RunData:
    """The lists of a run's folder.

    Raises:
        RecipeError: there is none, or one is damaged.
    """
    folder = Path(folder)
    lines = read_run(folder / FILE)
    starts = [line for line in lines if isinstance(line, Start)]
    places = [folder / LIST] + [Path(start.evaluations) for start in starts[-1:]]
    list_path = next((place for place in places if place.exists()), places[0])
    if not lines and not list_path.exists():
        raise RecipeError(
            f"{show_path(folder)} has no {FILE} and no {LIST}; give the --save folder of a "
            "run whose recipe has evaluation: {}"
        )
    recipe = None
    if starts:
        try:
            recipe = recipe_from_yaml(starts[-1].recipe)
        except RecipeError:
            recipe = None
    steps = [line for line in lines if isinstance(line, Step)]
    return RunData(starts, steps, read_list(list_path), recipe)


def report_page(data: RunData, title: str) -> str:
    """The page.

    Raises:
        RecipeError: jinja2 or matplotlib is not installed.
    """
    return render_page(title, _subtitle(data), sections(data))


def sections(data: RunData) -> list[Section]:
    """Everything on the page, in its order."""
    return [
        _comparison(data),
        _gain(data),
        _terms(data),
        _shares(data),
        _weights(data),
        _parameters(data),
        _experts(data),
        _time(data),
        *_origin(data),
    ]


def _subtitle(data: RunData) -> str:
    parts = []
    if data.steps:
        total = data.starts[-1].train_iters if data.starts else 0
        parts.append(
            f"{data.steps[-1].iteration:,}{f' of {total:,}' if total else ''} iterations, "
            f"{data.steps[-1].samples:,} samples"
        )
    if data.starts:
        resumed = [f"{start.iteration:,}" for start in data.starts if start.iteration]
        parts.append(f"begun or resumed last on {data.starts[-1].time}")
        if resumed:
            parts.append(f"resumed from iteration {', '.join(resumed)}")
    return "; ".join(parts) + "." if parts else "No step was logged yet."


def _charts(charts: Sequence[Chart]) -> Picture:
    return Picture(line_charts(charts), "; ".join(chart.title for chart in charts))


def _comparison(data: RunData) -> Section:
    title = "Gain and forgetting: first and last evaluation"
    if len(data.evaluations) < 2:
        count = len(data.evaluations)
        return Section(title, missing=f"needs two evaluations, and there {_are(count)} {count}")
    names = ("the first evaluation", "the last evaluation")
    try:
        rows, notes = comparison(data.evaluations[0], data.evaluations[-1], names)
    except RecipeError as error:
        return Section(title, missing=str(error))
    return Section(title, [Table(rows, names=2), *notes])


def _gain(data: RunData) -> Section:
    title = "Gain and forgetting over time"
    if len(data.evaluations) < 2:
        return Section(title, missing="needs two evaluations")
    if len({evaluation.text() for evaluation in data.evaluations}) > 1:
        return Section(title, missing="the evaluations are of different text")
    charts = gain_charts(data.evaluations)
    if not charts:
        return Section(title, missing="no class of the evaluations has a token")
    words = "Changes since the first evaluation; bars are the last one's 95 % paired intervals."
    return Section(title, [words, _charts([*charts, *pair_charts(data.evaluations)])])


def _terms(data: RunData) -> Section:
    title = "Loss terms while training"
    charts = term_charts(data.steps, shares=False)
    if not charts:
        return Section(title, missing="no step was logged yet")
    return Section(
        title,
        [
            "Means over the steps since the line before. Megatron's second line after a start is a "
            "mean over the first step as well.",
            _charts(charts),
            Table(_first_and_last(data.steps)),
            Code(_lines(data.steps[-_LAST_LINES:]), "the last lines"),
        ],
    )


def _first_and_last(steps: Sequence[Step]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("term", "first", "last", "least", "most")]
    for name in dict.fromkeys(name for step in steps for name in step.terms):
        values = [step.terms[name] for step in steps if name in step.terms]
        known = [value for value in values if value is not None]
        numbers = (values[0], values[-1], min(known, default=None), max(known, default=None))
        rows.append((name, *map(_number, numbers)))
    return rows


def _lines(steps: Sequence[Step]) -> str:
    return "\n".join(
        f"{step.iteration}: " + ", ".join(f"{n} {_number(v)}" for n, v in step.terms.items())
        for step in steps
    )


def _shares(data: RunData) -> Section:
    title = "Where domain tokens go"
    charts = term_charts(data.steps, shares=True)
    if not charts:
        reason = "the run logged no shares; steering, or steering.report: true, logs them"
        return Section(title, missing=reason)
    return Section(title, ["Shares of routing choices, by domain.", _charts(charts)])


def _weights(data: RunData) -> Section:
    title = "Weights of the loss terms"
    if data.recipe is None:
        known = "this version of the package cannot read the recipe" if data.starts else _NO_START
        return Section(title, missing=known)
    by_name = weights(data.recipe)
    shares = {f"mixing.{name}": share for name, share in data.recipe[MIXING].items()}
    rows = [("weight", "value"), *((n, show_weight(w)) for n, w in {**by_name, **shares}.items())]
    parts: list = [Table(rows)]
    reached = data.steps[-1].iteration if data.steps else 0
    until = max(reached, data.starts[-1].train_iters)
    charts = weight_charts(by_name, until)
    charts += weight_charts(shares, until, "shares of the training data, as asked for")
    return Section(title, [_charts(charts), *parts] if charts else parts)


_NO_START = "the run's list says nothing of its start"


def _parameters(data: RunData) -> Section:
    title = "Trained parameters"
    rows = data.starts[-1].parameters if data.starts else []
    if not rows:
        return Section(title, missing=_NO_START)
    cells: list[Sequence[str]] = [("component", "trained", "frozen", "trained, %")]
    everything = ("all", sum(r.trained for r in rows), sum(r.frozen for r in rows))
    for name, trained, frozen in (*((r.name, r.trained, r.frozen) for r in rows), everything):
        share = 100 * trained / max(1, trained + frozen)
        cells.append((name, f"{trained:,}", f"{frozen:,}", f"{share:.2f}"))
    return Section(title, [Table(cells)])


def _experts(data: RunData) -> Section:
    title = "Experts before and after"
    if data.profiles is None:
        return Section(title, missing="no routing profiles were given (--profiles BEFORE AFTER)")
    before, after = data.profiles
    names = [name for name in before.classes if name in after.classes and name != GENERAL_CLASS]
    if not names:
        return Section(title, missing="the profiles have no domain in common")
    parts: list = []
    recipe = None if data.recipe is None else _numbered(data.recipe, before)
    for name in names:
        targets = {}
        for domain in recipe.domains if recipe is not None else ():
            if domain.name == name:
                targets = _known_targets(domain.experts.layers, before)
        parts.append(Picture(picture(before, after, name, targets), f"routing of {name}"))
        parts.append(Code("\n".join(layer_table(before, after, name, targets))))
    return Section(title, parts)


def _numbered(recipe: Recipe, profile: RoutingProfile) -> Recipe | None:
    """The recipe in a profile's layer numbers, ``None`` where it does not say which it has."""
    try:
        return renumbered(recipe, profile.provenance.pattern)
    except RecipeError:
        return None


def _known_targets(layers: dict[int, list[int]], profile: RoutingProfile) -> dict[int, list[int]]:
    experts = profile.provenance.router.num_moe_experts
    return {
        layer: [expert for expert in ids if expert < experts]
        for layer, ids in layers.items()
        if layer in profile.provenance.moe_layers
    }


def _time(data: RunData) -> Section:
    title = "Time and gradient"
    if not data.steps:
        return Section(title, missing="no step was logged yet")
    spent = sum(step.seconds * step.steps for step in data.steps)
    middle = statistics.median(step.seconds for step in data.steps)
    skipped = sum(step.skipped for step in data.steps)
    words = f"Median {middle:.3f} s per step, {spent / 3600:.2f} hours in all steps shown."
    if skipped:
        words += f" {skipped} {'steps were' if skipped > 1 else 'step was'} skipped."
    return Section(title, [words, _charts(time_charts(data.steps))])


def _origin(data: RunData) -> list[Section]:
    if not data.starts:
        return [Section("Recipe, plan and versions", missing=_NO_START)]
    last = data.starts[-1]
    rows: list[Sequence[str]] = [("begun", "from iteration", "processes", *last.versions)]
    for start in data.starts:
        versions = [start.versions.get(name, "") for name in last.versions]
        rows.append((start.time, f"{start.iteration:,}", f"{start.world_size:,}", *versions))
    return [
        Section("Starts and versions", [Table(rows)]),
        Section("Plan", [Code(last.plan)]),
        Section("Recipe", [Code(last.recipe)]),
    ]


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _report(options: argparse.Namespace) -> str:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise RecipeError(f"{show(options.folder)} is no folder; give the --save folder of a run")
    output = Path(folder / OUTPUT if options.output is None else options.output)
    data = read_folder(folder)
    _refuse_overwriting(output, folder, data, options.profiles or [])
    if options.profiles is not None:
        before, after = (read_profile(path) for path in options.profiles)
        after = in_numbers_of(after, before.provenance.pattern, "--profiles", options.profiles[1])
        check_same_student(before, after, tuple(options.profiles))
        data = RunData(data.starts, data.steps, data.evaluations, data.recipe, (before, after))
    name = folder.resolve().name or str(folder)
    replace_file(output, report_page(data, f"{name}: knowledge injection").encode())
    return (
        f"report: {output} ({len(data.steps)} lines of steps, {len(data.evaluations)} evaluations)"
    )


def _refuse_overwriting(output: Path, folder: Path, data: RunData, profiles: Sequence[str]) -> None:
    read = [str(folder / FILE), str(folder / LIST), *profiles]
    read += [start.evaluations for start in data.starts]
    if os.path.realpath(output) in map(os.path.realpath, read):
        raise RecipeError(f"--output: {show_path(output)} is what the report is made from")
