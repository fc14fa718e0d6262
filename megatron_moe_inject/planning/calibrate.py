"""What a GPU reaches, from measured steps: planned operations over measured seconds.

A results file is what ``examples/benchmarks/gpu/step_bench.py --json`` writes: the sizes of a
student and its teacher, and for each way to train (an arm) the seconds of a step and the peak of
memory. Each known arm of the wanted precision is planned with the same sizes; its rate is what is
planned over what was measured, and its memory says how far plans of memory have been off.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, listing, show_path
from megatron_moe_inject.planning.client import Planner
from megatron_moe_inject.planning.job_plan import JobPlan

_ALL = (
    "{experts: all, router: true, attention: true, norms: true, embedding: true, "
    "output_layer: true}"
)
_TAUGHT = "objective: {alpha: 1, beta: 0}\n"
_ARMS: Mapping[str, str] = {
    "stock": f"objective: {{alpha: 0, beta: 1}}\ntrain: {_ALL}\n",
    "freeze": "objective: {alpha: 0, beta: 1}\n",
    "kd": _TAUGHT,
    "gamma": "objective: {alpha: 1, beta: 0, gamma: 1}\n",
    "host": "objective: {alpha: 1, beta: 0, gamma: 1}\nretention: {originals: host}\n",
    "features": _TAUGHT + "imitation: {hidden: 0.5}\n",
    "steering": _TAUGHT
    + "train: {router_rows: true}\nsteering: {coeff: 0.01, confidence: label}\n",
    "frozen": _TAUGHT + "train: {frozen_experts: fp8}\n",
}
"""Arms of the benchmark, as the rest of a recipe."""
_UNTAUGHT = ("stock", "freeze")
_NEEDED = ("layers", "hidden", "ffn", "experts", "topk", "heads", "seq", "vocab", "chosen")
_FP8 = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise")


@dataclass(frozen=True)
class Measured:
    """One arm, planned and measured.

    Attributes:
        tflops: planned operations over measured seconds, 10^12 a second.
        planned_bytes, measured_bytes: peaks of memory.
    """

    precision: str
    arm: str
    tflops: float
    planned_bytes: int
    measured_bytes: int

    @property
    def off(self) -> float:
        """How far the plan of memory is off, as a share of what was measured."""
        return self.planned_bytes / self.measured_bytes - 1


@dataclass(frozen=True)
class Rate:
    """What a GPU reaches.

    Attributes:
        tflops: the mean over measured arms, 10^12 operations a second.
        low, high: of the arms.
        told: where it is from.
    """

    tflops: float
    low: float
    high: float
    told: str


def read_results(path: str) -> dict[str, Any]:
    """A results file.

    Raises:
        RecipeError: it cannot be read, or is no results of the benchmark.
    """
    remedy = "give what examples/benchmarks/gpu/step_bench.py --json writes"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise RecipeError(
            f"--calibrate: {show_path(path)} cannot be read ({reason}); {remedy}"
        ) from None
    sizes = found.get("sizes") if isinstance(found, dict) else None
    lacking = [name for name in _NEEDED if not isinstance((sizes or {}).get(name), int)]
    if lacking or not isinstance(found.get("rows"), list):
        lacks = listing(lacking) or "rows"
        raise RecipeError(f"--calibrate: {show_path(path)} lacks {lacks}; {remedy}")
    return found


def measured_arms(
    planner: Planner, results: Mapping[str, Any], precision: str | None = None
) -> list[Measured]:
    """Every known arm of a results file, planned; each once, by the first row that has numbers.

    Args:
        precision: ``bf16`` or ``fp8``; None for both.
    """
    found: dict[tuple[str, str], Measured] = {}
    for row in results["rows"]:
        key = row.get("precision", ""), row.get("arm", "")
        seconds = row.get("device_seconds") or statistics.median(row.get("seconds") or [0.0])
        if not seconds or key in found or key[1] not in _ARMS or precision not in (None, key[0]):
            continue
        plan = arm_plan(planner, results["sizes"], *key)
        rank = plan.worst
        rate = plan.flops_per_gpu / seconds / 1e12
        found[key] = Measured(*key, rate, rank.peak, row["peak_bytes"])
    return list(found.values())


def arm_plan(planner: Planner, sizes: Mapping[str, int], precision: str, arm: str) -> JobPlan:
    """The plan of an arm of the benchmark on one GPU."""
    taught = arm not in _UNTAUGHT
    experts = {
        layer: sorted((layer + 3 * j) % sizes["experts"] for j in range(sizes["chosen"]))
        for layer in range(sizes["layers"])
    }
    chosen = "" if arm == "stock" else f", experts: {{layers: {experts}}}"
    teacher = ", teacher: coder" if taught else ""
    recipe = f"domains: [{{name: code, data: [1]{teacher}{chosen}}}]\n{_ARMS[arm]}"
    recipe += 'teachers: {coder: {source: "megatron:/teacher"}}\n' if taught else ""
    answer = planner.plan(
        recipe,
        _flags(sizes, precision),
        1,
        stock=arm == "stock",
        teachers={"coder": _teacher(sizes)} if taught else {},
    )
    return answer.plan


def _teacher(sizes: Mapping[str, int]) -> dict[str, Any]:
    hidden, layers, vocab = sizes["teacher-hidden"], sizes["teacher-layers"], sizes["vocab"]
    of_layer = 4 * hidden**2 + 3 * hidden * sizes["teacher-ffn"] + 2 * hidden
    parameters = 2 * vocab * hidden + layers * of_layer + hidden
    from megatron_moe_inject.teachers.base import TeacherInfo

    info = TeacherInfo(
        "coder", "megatron:/teacher", "megatron", "/teacher", "GPT", layers, hidden, vocab, vocab,
        parameters, None, "",
    )  # fmt: skip
    values = asdict(info)
    return {name: value for name, value in values.items() if name != "shared"}


def _flags(sizes: Mapping[str, int], precision: str) -> Sequence[str]:
    text = (
        "--seq-length {seq} --max-position-embeddings {seq} --position-embedding-type rope "
        "--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
        "--hidden-dropout 0 --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer "
        "--micro-batch-size {micro-batch} --global-batch-size {global-batch} --lr 1e-4 "
        "--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} "
        "--num-experts {experts} --moe-router-topk {topk} --ffn-hidden-size {ffn} "
        "--moe-ffn-hidden-size {ffn} --moe-token-dispatcher-type alltoall --moe-grouped-gemm "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --train-iters 10 "
        "--bf16 --data-path 0.1 general 0.9 domain --split 100,0,0"
    )
    vocabulary = ("--vocab-size", str(sizes["vocab"] - 1))
    return [*text.format(**sizes).split(), *vocabulary, *(_FP8 if precision == "fp8" else ())]


def rate_of(arms: Sequence[Measured], machine: str) -> Rate:
    """The rate of measured arms.

    Raises:
        RecipeError: there is none.
    """
    if not arms:
        raise RecipeError(
            "--calibrate: no measured step of this precision is in the file; give --tflops"
        )
    rates = [arm.tflops for arm in arms]
    offs = [arm.off for arm in arms]
    told = (
        f"at {statistics.mean(rates):.0f} TFLOP/s a GPU, the mean of {len(rates)} measured steps "
        f"({min(rates):.0f} to {max(rates):.0f}; {machine}), whose memory was planned "
        f"{min(offs):+.0%} to {max(offs):+.0%} off"
    )
    return Rate(statistics.mean(rates), min(rates), max(rates), told)
