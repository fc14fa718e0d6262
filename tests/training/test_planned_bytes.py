"""Plans against real jobs of the CPU lane: what every rank holds, byte for byte."""

import json
import shlex

import pytest

from tests.harness import lane
from tests.harness.planned_jobs import session_planner

ALLOCATED = (str(lane.HARNESS / "allocated_gpt.py"),)
RECIPE = """
domains: [{{name: code, data: [0], experts: {{layers: {{1: [0, 3], 3: [1]}}}}}}]
objective: {{alpha: 0, beta: 1}}
train: {{router_rows: true, norms: {norms}}}
retention: {{l2: 0.1}}
"""
ADAPTED = """
domains: [{{name: code, data: [0]}}]
objective: {{alpha: 0, beta: 1}}
train:
  experts: none
  norms: {norms}
  adapters:
    - {{targets: [experts], experts: all, rank: 4{of_experts}}}
    - {{targets: [attention], rank: 4{of_attention}}}
  vocabulary_rows: {{ids: [3, 5, 60]}}
"""
BY_DOMAIN = ", by: domain"
MAMBA = "--mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2"
SHAPES = ("--moe-expert-capacity-factor", "1", "--moe-pad-expert-input-to-capacity")
"""Known without values, as a plan takes them."""
BF16 = ("--bf16", "--use-distributed-optimizer")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")
HYBRID = ("--hybrid-layer-pattern", "ME|*E", *shlex.split(MAMBA))
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("nproc", "layout", "flags", "norms"),
    [
        pytest.param(2, {"ep": 2}, BF16, True, id="EP 2, bf16, distributed optimizer"),
        pytest.param(2, {"pp": 2}, VIRTUAL, False, id="PP 2 x VPP 2"),
        pytest.param(2, {"tp": 2}, (), True, id="TP 2"),
        pytest.param(2, {}, lane.DISTRIBUTED_OPTIMIZER, True, id="overlap", marks=slow),
        pytest.param(2, {"ep": 2}, (), False, id="EP 2", marks=slow),
        pytest.param(1, {}, ("--bf16",), True, id="bf16", marks=slow),
        pytest.param(2, {"cp": 2}, (), True, id="CP 2", marks=slow),
        pytest.param(2, {"pp": 2}, HYBRID, True, id="hybrid, PP 2", marks=slow),
        pytest.param(1, {}, (*FULL, "--recompute-num-layers", "1"), True, id="full", marks=slow),
        pytest.param(1, {}, SELECTIVE, True, id="selective", marks=slow),
        pytest.param(1, {}, lane.DEEPSEEK_ROUTER, False, id="DeepSeek's router", marks=slow),
        pytest.param(
            4, {"tp": 2, "ep": 2, "pp": 2}, BF16, True, id="TP 2 x EP 2 x PP 2", marks=slow
        ),
    ],
)
def test_bytes_are_those_of_a_job(tmp_path, nproc, layout, flags, norms):
    assert_planned(tmp_path, nproc, layout, flags, RECIPE.format(norms=str(norms).lower()))


@pytest.mark.parametrize(
    ("nproc", "layout", "flags", "by"),
    [
        pytest.param(2, {"ep": 2}, BF16, (BY_DOMAIN, ""), id="EP 2, experts by domain"),
        pytest.param(2, {"ep": 2}, BF16, ("", BY_DOMAIN), id="EP 2", marks=slow),
        pytest.param(2, {"tp": 2}, (), ("", BY_DOMAIN), id="TP 2", marks=slow),
        pytest.param(2, {"tp": 2}, (), (BY_DOMAIN, ""), id="TP 2, by domain", marks=slow),
        pytest.param(2, {"pp": 2}, BF16, ("", ""), id="PP 2", marks=slow),
    ],
)
def test_bytes_of_adapters_and_rows_of_the_vocabulary(tmp_path, nproc, layout, flags, by):
    recipe = ADAPTED.format(norms="true", of_experts=by[0], of_attention=by[1])
    assert_planned(tmp_path, nproc, layout, flags, recipe)


def assert_planned(tmp_path, nproc, layout, flags, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    given = lane.moe("--num-layers", "4", "--train-iters", "1", *SHAPES, *flags, **layout)
    ours = ("--inject-recipe", str(path), "--inject-from-scratch")
    run = lane.run([*given, *ours], nproc=nproc, script=ALLOCATED)
    lines = (line for line in run.output.splitlines() if line.startswith("allocated: "))
    real = {found["rank"]: found for found in (json.loads(line[11:]) for line in lines)}
    # The lane's own attention under context parallelism makes tensors that a plan cannot have.
    same_kernels = "cp" not in layout
    plan = session_planner().plan(recipe, given, nproc, on_gpus=not same_kernels).plan
    assert len(plan.ranks) == len(real) == nproc
    for rank in plan.ranks:
        there = real[rank.place.rank]
        planned = {name: getattr(rank, name) for name in ("parameters", "gradients")}
        planned |= {name: getattr(rank, name) for name in ("optimizer", "originals")}
        assert planned == {name: there[name] for name in planned}, rank.place
    for pp, stage in enumerate(plan.stages if same_kernels else ()):
        ranks = [rank for rank in plan.ranks if rank.place.pp == pp]
        most = max(ranks, key=lambda rank: rank.trained_experts)
        assert [cost.saved for cost in stage.costs] == real[most.place.rank]["saved"]
    assert any(sum(there["saved"]) for there in real.values())
