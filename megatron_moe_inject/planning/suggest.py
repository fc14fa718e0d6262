"""Layouts that fit: on the fewest GPUs, and the fastest.

Layouts of TP, PP, VPP, EP and recompute are ordered by arithmetic from the plan of the given layout
(what a layer keeps and computes there, which parameters there are), and the best are planned as a
whole until one fits. What is shown was planned; the order alone is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.text import table
from megatron_moe_inject.planning.client import Planner
from megatron_moe_inject.planning.job_plan import JobPlan
from megatron_moe_inject.planning.layout import Layout
from megatron_moe_inject.planning.report import GIB, Memory, too_large
from megatron_moe_inject.planning.step_time import StepTime, step_time

_NODE = 8
"""GPUs that reach each other fast; TP stays within, EP where it can."""
_PLANS = 6
"""Layouts that are planned for one answer at most."""
_MARGIN = 1.15
"""Estimated memory over what there is, up to which a layout is planned."""
RECOMPUTE: dict[str, tuple[str, ...]] = {
    "none": (),
    "experts": ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    "full": (
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ),
}
_KEPT = {"none": 1.0, "experts": 0.5, "full": 0.08}
"""Of what a layer keeps without recompute."""
_TAKES_VALUE = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank",
    "--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers", "--expert-model-parallel-size",
    "--expert-tensor-parallel-size", "--recompute-granularity", "--recompute-method",
    "--recompute-num-layers", "--microbatch-group-size-per-virtual-pipeline-stage",
)  # fmt: skip
_TAKES_SEVERAL = ("--recompute-modules",)
_TAKES_NONE = ("--sequence-parallel", "--recompute-activations")


@dataclass(frozen=True)
class Model:
    """What layouts of a model follow from.

    Attributes:
        groups: key and value heads, over which TP can divide attention.
        pattern: a hybrid model's layers, which stages divide evenly or as the pattern says.
    """

    layers: int
    experts: int
    heads: int
    groups: int
    micro_batch: int
    global_batch: int
    predicts: bool
    pattern: bool = False


@dataclass(frozen=True)
class Candidate:
    """A layout with recompute, and what is estimated of it.

    Attributes:
        ends: layers of the first and of the last stage, where stages have not all as many.
        bytes: the peak of a rank.
        seconds: of a step, in any unit that all candidates share.
    """

    layout: Layout
    recompute: str
    ends: tuple[int, int] | None = None
    bytes: float = 0.0
    seconds: float = 0.0

    def flags(self) -> list[str]:
        """Megatron's flags for it."""
        layout = self.layout
        flags = ["--tensor-model-parallel-size", str(layout.tp)]
        flags += ["--pipeline-model-parallel-size", str(layout.pp)]
        if layout.tp > 1:
            flags += ["--sequence-parallel"]
        if layout.ep > 1:
            flags += ["--expert-model-parallel-size", str(layout.ep)]
        if layout.ep > 1 or layout.tp > 1:
            flags += ["--expert-tensor-parallel-size", str(layout.etp)]
        if layout.vpp > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)]
        if self.ends is not None:
            first, last = map(str, self.ends)
            flags += ["--decoder-first-pipeline-num-layers", first]
            flags += ["--decoder-last-pipeline-num-layers", last]
        return [*flags, *RECOMPUTE[self.recompute]]


@dataclass(frozen=True)
class Suggestion:
    """A layout that was planned.

    Attributes:
        what: it is the best of.
        time: None where no rate is known.
    """

    what: str
    candidate: Candidate
    plan: JobPlan
    time: StepTime | None


def without_layout(flags: Sequence[str]) -> list[str]:
    """Megatron's flags without those that a candidate gives."""
    kept: list[str] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if flag in _TAKES_VALUE:
            rest.pop(0)
        elif flag in _TAKES_SEVERAL:
            while rest and not rest[0].startswith("--"):
                rest.pop(0)
        elif flag not in _TAKES_NONE:
            kept.append(flag)
    return kept


def layouts(model: Model, gpus: int, cp: int) -> Iterator[Layout]:
    """Every layout of a job that Megatron can divide, the first and the last stage aside evenly."""
    for tp in (n for n in (1, 2, 4, 8) if model.groups % n == 0 and model.heads % n == 0):
        for pp in _stages(model):
            if gpus % (tp * cp * pp) or pp > model.layers:
                continue
            dp = gpus // (tp * cp * pp)
            if model.global_batch % (model.micro_batch * dp):
                continue
            micro_batches = model.global_batch // (model.micro_batch * dp)
            for ep in _divisors(model.experts) if model.experts else [1]:
                if gpus % (ep * pp) or (model.experts and tp > 1 and ep == 1):
                    continue
                for vpp in (1, 2, 4) if pp > 1 and micro_batches % pp == 0 else (1,):
                    if vpp > 1 and (model.layers % (pp * vpp) or model.predicts):
                        continue
                    yield Layout(gpus, tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=1)


def _stages(model: Model) -> list[int]:
    """Numbers of stages: what divides the layers, and powers of two with smaller ends."""
    powers = [] if model.pattern else [n for n in (2, 4, 8, 16, 32) if ends(model.layers, n)]
    return sorted({*_divisors(model.layers), *powers})


def ends(layers: int, pp: int) -> tuple[int, int] | None:
    """Layers of the first and of the last of ``pp`` stages, where the others have as many as each
    other and no fewer; ``None`` where all can have as many, or the ends would have none."""
    if layers % pp == 0:
        return None
    rest = layers - -(-layers // pp) * (pp - 2)
    return (rest - rest // 2, rest // 2) if rest > 1 else None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def estimated(base: JobPlan, model: Model, layout: Layout, recompute: str) -> Candidate:
    """Memory and time of a layout, from the plan of another.

    A rank's parameters and states divide as they do in Megatron; what a layer keeps and computes
    is the base's, divided by TP.
    """
    sparse = base.parameters.get("experts", 0)
    dense = sum(base.parameters.values()) - sparse
    outer = base.parameters.get("embedding", 0) + base.parameters.get("output_layer", 0)
    share = -(-model.layers // layout.pp) / model.layers
    body = (dense - outer) * share / layout.tp + sparse * share / layout.ep
    held = 2 * (body + outer / layout.tp / min(2, layout.pp))
    of_experts = base.trained.get("experts", 0) * share / layout.ep
    of_others = (sum(base.trained.values()) - base.trained.get("experts", 0)) * share / layout.tp
    # Chosen experts are seldom spread evenly.
    spread = 1.0 if base.trained.get("experts") == sparse else min(layout.ep, 3.0)
    states = of_experts * spread * (4 + 12 / layout.edp) + of_others * (4 + 12 / layout.dp_cp)
    stage_kept, stage_flops, transient, layers = _base_stage(base)
    in_flight = (
        layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)) if layout.vpp > 1 else 0
    )
    in_flight = in_flight or layout.pp
    micro_batches = model.global_batch // (model.micro_batch * layout.dp)
    kept = stage_kept / layers * model.layers * share * base.layout.tp / layout.tp
    activations = kept * _KEPT[recompute] * min(in_flight, micro_batches)
    activations += transient * base.layout.tp / layout.tp
    teacher = max(each.weights + each.states for each in base.teachers)
    again = {"none": 0.0, "experts": 0.6, "full": 1.0}[recompute]
    forward, backward = (n / layers * model.layers * share for n in stage_flops)
    work = (forward * (1 + again) + backward) * base.layout.tp / layout.tp
    bubble = (layout.pp - 1) / layout.vpp
    # What is not computed: messages of TP, and of EP beyond a node, as shares of the work.
    messages = 1 + 0.04 * (layout.tp.bit_length() - 1)
    messages += 0.03 * max(0, layout.ep.bit_length() - _NODE.bit_length()) + 0.01 * bool(bubble)
    seconds = work * messages * (micro_batches + bubble)
    peak = held + states + activations + teacher
    return Candidate(layout, recompute, ends(model.layers, layout.pp), peak, seconds)


def _base_stage(base: JobPlan) -> tuple[float, tuple[float, float], float, float]:
    """Of all stages together: what a micro-batch keeps, its operations, what passes need besides,
    and layers."""
    costs = [cost for stage in base.stages for cost in stage.costs]
    kept = float(sum(cost.kept for cost in costs))
    flops = sum(c.forward_flops for c in costs), sum(c.backward_flops for c in costs)
    transient = max(max(c.forward_peak, c.backward_peak) - c.kept for c in costs)
    layers = sum(len(chunk) for stage in base.stages for chunk in stage.layers)
    return kept, flops, float(transient), float(max(1, layers))


class Search:
    """Plans candidates of a model until one fits.

    Args:
        planner: plans them.
        recipe: YAML, its experts resolved.
        flags: the user's.
        base: the plan of the user's layout.
        tflops: a GPU's rate; None where it is not known.
    """

    def __init__(
        self,
        planner: Planner,
        recipe: str,
        flags: Sequence[str],
        base: JobPlan,
        model: Model,
        memory: Memory,
        tflops: float | None,
    ) -> None:
        self._planner = planner
        self._recipe = recipe
        self._flags = without_layout(flags)
        self._base = base
        self._model = model
        self._memory = memory
        self._tflops = tflops
        self._known: dict[tuple[Layout, str], tuple[JobPlan, int | None] | None] = {}

    def fewest(self) -> Suggestion | None:
        """The fastest layout that was found on the smallest power of two of GPUs that fits."""
        gpus = 1
        while gpus <= self._base.layout.gpus:
            found = self._best(gpus, f"fewest GPUs: {gpus}")
            if found is not None:
                return found
            gpus *= 2
        return None

    def fastest(self) -> Suggestion | None:
        """The fastest layout that was found on all GPUs."""
        gpus = self._base.layout.gpus
        return self._best(gpus, f"fastest on {gpus} GPUs")

    def _best(self, gpus: int, what: str) -> Suggestion | None:
        candidates = [
            estimated(self._base, self._model, layout, recompute)
            for layout in layouts(self._model, gpus, self._base.layout.cp)
            for recompute in RECOMPUTE
        ]
        limit = self._memory.usable * _MARGIN
        worth = sorted((c for c in candidates if c.bytes <= limit), key=lambda c: c.seconds)
        # The roomiest ones last: where the estimate is too low for all, they may fit.
        roomy = sorted(worth, key=lambda c: c.bytes)[:2]
        tried = [*worth[: _PLANS - len(roomy)], *roomy]
        for candidate in dict.fromkeys(tried):
            planned = self._plan(candidate)
            if planned is None or too_large(planned[0], self._memory):
                continue
            time = None
            if self._tflops is not None:
                time = step_time(planned[0], self._tflops, planned[1])
            return Suggestion(what, candidate, planned[0], time)
        return None

    def _plan(self, candidate: Candidate) -> tuple[JobPlan, int | None] | None:
        """None where Megatron or the plugin refuses the layout."""
        key = candidate.layout, candidate.recompute
        if key not in self._known:
            flags = [*self._flags, *candidate.flags()]
            try:
                answer = self._planner.plan(
                    self._recipe, flags, candidate.layout.gpus, memory=self._memory.total
                )
            except RecipeError:
                self._known[key] = None
            else:
                self._known[key] = answer.plan, answer.steps
        return self._known[key]


def suggestion_lines(found: Sequence[Suggestion | None]) -> list[str]:
    """A table, and the flags to paste."""
    known = [each for each in found if each is not None]
    if not known:
        return ["no layout of TP, PP, EP, virtual stages and recompute fits this many GPUs"]
    rows = [("", "layout", "recompute", "peak GiB", "step s", "tokens/s a GPU")]
    for each in known:
        time = ("", "")
        if each.time is not None:
            per_gpu = each.time.tokens_per_second / each.time.gpus
            time = f"{each.time.seconds:.3g}", f"{per_gpu:,.0f}"
        layout = each.candidate.layout.text()
        peak = f"{each.plan.worst.peak / GIB:.2f}"
        rows.append((each.what, layout, each.candidate.recompute, peak, *time))
    lines = table(rows, right=(3, 4, 5))
    for each in known:
        lines += [f"{each.what}:", f"  {' '.join(each.candidate.flags())}"]
    return lines
