"""What a run's report draws, from the run's lists: which numbers go into which chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_moe_inject.evaluation.bootstrap import Interval, paired_difference
from megatron_moe_inject.evaluation.evaluation import GENERAL_CLASS, Evaluation
from megatron_moe_inject.evaluation.report.line_charts import Chart, Series
from megatron_moe_inject.evaluation.report.run_file import Step
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.schedule import Schedule, Weight, ever_positive, value_at
from megatron_moe_inject.recipe.schema import Recipe

_RANKINGS = ("ranking accuracy", "ranking accuracy/per token")
SHARES = (
    "new share", "new experts open", "target share", "target gates", "target mass",
    "general on targets", "dropped on targets",
)  # fmt: skip
"""Terms of Megatron's log that say where tokens go and not what is lost."""


def term_charts(steps: Sequence[Step], shares: bool) -> list[Chart]:
    """A chart for each loss term, or each share, with a line for each class that it is told of."""
    terms: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for step in steps for name in step.terms):
        term = name.partition("/")[0]
        if (term in SHARES) is shares:
            terms.setdefault(term, []).append(name)
    charts = []
    for term, names in terms.items():
        series = []
        for name in names:
            logged = [step for step in steps if name in step.terms]
            title = name.partition("/")[2] or ("all tokens" if len(names) > 1 else "")
            values = [step.terms[name] for step in logged]
            series.append(Series(title, [step.iteration for step in logged], values))
        if len(series) == 2 and list(series[0].y) == list(series[1].y):
            del series[0]  # all tokens are those of the only class
        charts.append(Chart(term, series))
    return charts


def gain_charts(evaluations: Sequence[Evaluation]) -> list[Chart]:
    """Changes of the loss since the first evaluation: by iteration, and gain against forgetting.

    The last has its 95 % paired bootstrap interval. All are of one text (``same_text``). None where
    no class has a token.
    """
    first, last = evaluations[0], evaluations[-1]
    changes, intervals = {}, {}
    for name, results in first.classes.items():
        if results.mean("loss") is None:
            continue
        losses = [evaluation.classes[name].measured("loss") for evaluation in evaluations]
        changes[name] = [loss - losses[0] for loss in losses]
        intervals[name] = _last_change(first, last, name)
    if not changes:
        return []
    iterations = [evaluation.provenance.iteration for evaluation in evaluations]
    over_time = [
        Series(name, iterations, values, along=intervals[name], marks=True)
        for name, values in changes.items()
    ]
    unit = "change of loss, nats per token"
    charts = [Chart("held-out loss since the start", over_time, y=unit, zero="y")]
    domains = [name for name in changes if name != GENERAL_CLASS]
    if GENERAL_CLASS in changes and domains:
        paths = [
            Series(
                name,
                changes[GENERAL_CLASS],
                changes[name],
                across=intervals[GENERAL_CLASS],
                along=intervals[name],
                marks=True,
            )
            for name in domains
        ]
        charts.append(
            Chart(
                "gain (down) against forgetting (right)",
                paths,
                x="general text: " + unit,
                y="domain: " + unit,
                zero="xy",
            )
        )
    return charts


def pair_charts(evaluations: Sequence[Evaluation]) -> list[Chart]:
    """Held-out pairs of answers by iteration: how often the chosen answer has the larger reward and
    how often it is the likelier one, and the margin."""
    measured = [e.pairs for e in evaluations if e.pairs is not None]
    if len(measured) < len(evaluations):
        return []
    iterations = [evaluation.provenance.iteration for evaluation in evaluations]
    by_name: dict[str, list[float | None]] = {}
    for pairs in measured:
        for name, mean in pairs.means().items():
            by_name.setdefault(name.removeprefix("preference "), []).append(mean)
    charts = []
    for title, names in (
        ("held-out pairs: the chosen answer is better", ("accuracy", *_RANKINGS)),
        ("held-out pairs: margin", ("margin",)),
    ):
        told = [name for name in names if len(by_name.get(name, ())) == len(iterations)]
        series = [Series(name, iterations, by_name[name], marks=True) for name in told]
        if series:
            charts.append(Chart(title, series))
    return charts


def _last_change(first: Evaluation, last: Evaluation, name: str) -> Interval:
    before, after = first.classes[name].sums, last.classes[name].sums
    return paired_difference(before["loss"], after["loss"], before["tokens"])


def time_charts(steps: Sequence[Step]) -> list[Chart]:
    """Seconds per step, gradient norm and learning rate, where they were written."""
    x = [step.iteration for step in steps]
    charts = []
    for title, values in (
        ("seconds per step", [step.seconds for step in steps]),
        ("gradient norm", [step.grad_norm for step in steps]),
        ("learning rate", [step.learning_rate for step in steps]),
    ):
        if any(value is not None for value in values):
            charts.append(Chart(title, [Series("", x, values)]))
    return charts


def weights(recipe: Recipe) -> dict[str, Weight]:
    """The loss weights that the recipe uses, by the names of its keys."""
    by_name: dict[str, Weight] = {}
    for domain in recipe.domains:
        if domain.teacher is not None:
            by_name[f"alpha, {domain.name}"] = recipe.alpha(domain)
        by_name[f"beta, {domain.name}"] = recipe.beta(domain)
    by_name["general_beta"] = recipe.general_beta()
    by_name["gamma"] = recipe.objective.gamma
    for feature in FEATURES:
        by_name |= feature.weights(recipe)
    return {name: weight for name, weight in by_name.items() if ever_positive(weight)}


def weight_charts(
    found: Mapping[str, Weight], until: int, title: str = "weights of the loss terms"
) -> list[Chart]:
    """The weights over ``until`` iterations; none where all are constant."""
    moving = {name: weight for name, weight in found.items() if isinstance(weight, Schedule)}
    if not moving or until < 1:
        return []
    at = {round(until * i / 200) for i in range(201)}
    at |= {p for weight in moving.values() for p in weight.points if 0 <= p <= until}
    x = sorted(at)
    series = [Series(name, x, [value_at(weight, i) for i in x]) for name, weight in found.items()]
    return [Chart(title, series, layered=True)]
