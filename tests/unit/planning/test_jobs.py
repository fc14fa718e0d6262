"""Plans of published models, of measured runs, and mistakes."""

import contextlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.planning import command as planning_command
from megatron_moe_inject.planning.calibrate import measured_arms, rate_of, read_results
from megatron_moe_inject.planning.client import planner
from megatron_moe_inject.planning.step_time import step_time
from tests.harness.planned_jobs import (
    DEEPSEEK_V3,
    QWEN3_30B,
    QWEN3_235B,
    session_planner,
)

RESULTS = Path(__file__).resolve().parents[3] / "examples" / "benchmarks" / "results"
RECIPE = """
domains: [{{name: code, data: [0], experts: {{layers: {layers}}}}}]
objective: {{alpha: 0, beta: 1}}
"""
EXPERT = {"qwen30": 3 * 2048 * 768, "deepseek": 3 * 7168 * 2048}
EP = "--expert-model-parallel-size"


def plan(layers, flags, gpus, **options):
    recipe = RECIPE.format(layers=layers)
    return session_planner().plan(recipe, flags, gpus, **options).plan


def test_qwen3_30b_on_two_nodes():
    """Eight chosen experts, five of them on one rank; backward stops at layer 12."""
    layers = {12: [0, 1, 2, 3, 4], 13: [40], 47: [3, 127]}
    found = plan(layers, [*QWEN3_30B, EP, "8"], 16)
    assert sum(found.parameters.values()) == 30_532_122_624
    assert found.trained == {"experts": 8 * EXPERT["qwen30"]}
    assert found.boundary == 12
    assert [rank.trained_experts for rank in found.ranks] == [6, 0, 1, 0, 0, 0, 0, 1] * 2
    first = found.ranks[0]
    assert first.gradients == 4 * first.trained == 4 * 6 * EXPERT["qwen30"]
    assert first.optimizer == 12 * first.trained // 2
    assert first.parameters == 2 * (30_532_122_624 - 7 * 48 * 16 * EXPERT["qwen30"])
    assert first.peak == found.worst.peak > found.ranks[1].peak
    (cost,) = found.stages[0].costs
    assert cost.forward_flops == pytest.approx(29.0e12 + 5.1e12, rel=0.02)
    assert cost.backward_flops / 29.0e12 == pytest.approx(0.985, rel=0.02)


@pytest.mark.slow
def test_recompute_and_where_backward_stops_change_what_is_kept():
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    flags = [*QWEN3_30B, "--num-layers", "8", EP, "8"]
    late, early = (plan({layer: [0]}, flags, 8).stages[0].costs[0] for layer in (6, 1))
    again = plan({1: [0]}, [*flags, *full.split()], 8)
    (recomputed,) = again.stages[0].costs
    assert late.kept < 0.45 * early.kept
    assert late.backward_flops < 0.45 * early.backward_flops
    assert recomputed.kept < 0.1 * early.kept
    # Of a sequence: products of a layer, its attention, the router's (whose weight's gradient
    # Megatron makes although it is frozen), the head's two, and those of the expert that trains.
    attention = 2 * (32 * 4096 * 4096 // 2) * 256
    router = 2 * 4096 * 2048 * 128
    expert = 2 * 2048 * 3 * 2048 * 768
    layer = 2 * 4096 * 2048 * (5120 + 4096) + router + 16 * expert
    head = 2 * 2 * 4096 * 2048 * 151936
    assert early.forward_flops == recomputed.forward_flops == 8 * (layer + attention) + head
    assert recomputed.backward_flops == 7 * (2 * layer + 3.5 * attention + router) + expert


def test_a_mamba_layer_keeps_what_its_kernel_does():
    """What two more Mamba layers behind the lowest that trains add to a hybrid model."""
    hidden, width, heads, groups, state, chunk = 2048, 64, 64, 8, 128, 128
    sizes = f"--mamba-state-dim {state} --mamba-head-dim {width} --mamba-num-groups {groups}"
    flags = [*QWEN3_30B, *shlex.split(sizes), "--mamba-num-heads", str(heads)]
    few, more = (
        plan({0: [0]}, [*without_layers(flags), "--hybrid-layer-pattern", pattern], 1)
        for pattern in ("EMM*", "EMMMM*")
    )
    (few,), (more,) = few.stages[0].costs, more.stages[0].costs
    tokens, inner = 4096, heads * width
    read = 2 * inner + 2 * groups * state + heads
    kept = (more.kept - few.kept) / 2 / tokens
    # Its input in the kernel's order and its output before the gate; what both norms read; a
    # number a row of each.
    assert kept == pytest.approx(2 * (read + inner) + 2 * (hidden + inner), rel=0.01)
    products = 2 * tokens * hidden * (read + inner)
    scan = 2 * tokens * (chunk * (groups * state + inner) + 2 * inner * state)
    assert (more.forward_flops - few.forward_flops) / 2 == products + scan
    assert (more.backward_flops - few.backward_flops) / 2 == products + 3 * scan


def without_layers(flags):
    at = flags.index("--num-layers")
    return flags[:at] + flags[at + 2 :]


def test_qwen3_235b_on_256_ranks():
    flags = [*QWEN3_235B, "--tensor-model-parallel-size", "2", "--sequence-parallel", EP, "32"]
    flags += ["--expert-tensor-parallel-size", "1", "--pipeline-model-parallel-size", "2"]
    found = plan({60: [0]}, flags, 256, activations=False)
    assert sum(found.parameters.values()) == 235_093_634_560
    assert len(found.ranks) == 256
    trains = {(rank.place.pp, rank.place.ep) for rank in found.ranks if rank.trained}
    assert trains == {(1, 0)}


@pytest.mark.parametrize(
    ("gpus", "activations"), [(1024, False), pytest.param(4096, True, marks=pytest.mark.slow)]
)
def test_deepseek_v3_every_rank(gpus, activations):
    layers = {30: [0, 1, 2, 3, 4, 100], 45: [40], 60: [3, 127]}
    found = plan(layers, [*DEEPSEEK_V3, EP, "64"], gpus, activations=activations)
    assert sum(found.parameters.values()) - found.parameters["mtp"] == 671_026_404_352
    assert found.parameters["mtp"] == 11_610_067_968
    assert found.trained == {"experts": 9 * EXPERT["deepseek"]}
    assert [rank.place.rank for rank in found.ranks] == list(range(gpus))
    assert found.boundary == 30
    chosen = [rank for rank in found.ranks if rank.trained]
    assert {rank.place.pp for rank in chosen} == {6, 13, 14}
    assert sum(r.optimizer for r in chosen) == 12 * 9 * EXPERT["deepseek"]
    if activations:
        idle = found.stages[0].costs[0]
        assert (idle.backward_flops, idle.saved) == (0, 0)
        assert found.stages[-1].costs[-1].loss > 0


@pytest.mark.parametrize(
    ("precision", "number"), [("bf16", 7), pytest.param("fp8", 3, marks=pytest.mark.slow)]
)
def test_memory_measured_on_an_h100_is_planned_within_a_tenth(precision, number):
    """And the operations of a step over its time are a rate that one machine can have."""
    results = read_results(str(RESULTS / "2026-11-26-step-h100-third.json"))
    arms = measured_arms(session_planner(), results, precision)
    assert len(arms) == number
    assert {f"{arm.precision}-{arm.arm}": arm.off for arm in arms if abs(arm.off) > 0.1} == {}
    rate = rate_of(arms, "H100")
    assert 0.85 * rate.tflops < rate.low < rate.high < 1.15 * rate.tflops < 989


def test_time_of_a_pipeline_with_a_teacher(tmp_path):
    """Two stages alike wait for one another once; the teacher runs before the last."""
    flags = [*QWEN3_30B, "--num-layers", "4", "--pipeline-model-parallel-size", "2"]
    flags += ["--global-batch-size", "8"]
    found = plan({0: [0]}, flags, 2)
    time = step_time(found, 300, 10)
    first, last = (stage.costs[0] for stage in found.stages)
    seconds = [(c.forward_flops + c.backward_flops) / 300e12 for c in (first, last)]
    assert time.compute == pytest.approx(8 * max(seconds))
    assert 0 < time.bubble < 2 * max(seconds)
    assert time.gpu_hours == pytest.approx(10 * time.seconds * 2 / 3600)


@pytest.fixture
def one_process(monkeypatch):
    """The command asks the session's planning process, which has imported Megatron."""
    monkeypatch.setattr(
        planning_command, "planner", lambda: contextlib.nullcontext(session_planner())
    )


def command(tmp_path, *options):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(layers={1: [0]}))
    small = ["--num-layers", "2", "--hidden-size", "64", "--moe-ffn-hidden-size", "64"]
    few = ["--global-batch-size", "8", "--seq-length", "128", EP, "4"]
    return ["plan", str(path), *options, "--", *QWEN3_30B, *small, *few]


def test_the_command_says_whether_ranks_fit(tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = shlex.split(f"--gpus 8 --gpu-memory 6 --reserve 1 --tflops 100 --json {out}")
    assert main(command(tmp_path, *options)) == 0
    text = capsys.readouterr().out
    assert "  all 8 ranks fit; the fullest has" in text
    assert "at 100 TFLOP/s a GPU: the student" in text
    assert "ranks (8 GPUs, EP=4; GiB)" in text
    assert len(json.loads(out.read_text())["ranks"]) == 8


@pytest.mark.usefixtures("one_process")
def test_ranks_that_do_not_fit_are_told_by_the_exit_status(tmp_path, capsys):
    assert main(command(tmp_path, "--gpus", "8", "--gpu-memory", "0.05", "--reserve", "0")) == 3
    text = capsys.readouterr().out
    assert "  8 of 8 ranks do not fit (pipeline stages 0), by up to" in text
    helps = text.partition("\nwhat helps\n")[2].splitlines()
    assert any("--recompute-granularity full" in line for line in helps)
    for line in helps:
        peak = float(line.partition(": ")[2].split()[0])
        assert line.endswith(f"still {peak - 0.05:.2f} GiB too much")


@pytest.mark.usefixtures("one_process")
@pytest.mark.slow
def test_suggested_layouts_fit(tmp_path, capsys):
    """What is pasted fits when it is planned, on fewer GPUs than were given."""
    options = shlex.split("--gpus 2 --gpu-memory 0.25 --reserve 0 --tflops 100 --suggest")
    argv = command(tmp_path, *options)
    assert main([*argv, EP, "2"]) == 0
    lines = capsys.readouterr().out.partition("\nsuggested\n")[2].splitlines()
    named = [line.strip() for line in lines if line.endswith(":")]
    pasted = [line.split() for line in lines if line.strip().startswith("--")]
    assert [name.split(":")[0] for name in named] == ["fewest GPUs", "fastest on 2 GPUs"]
    gpus = named[0].split()[2].rstrip(":")
    assert gpus == "1"
    for number, flags in zip((gpus, "2"), pasted, strict=True):
        argv = command(tmp_path, "--gpus", number, *options[2:-1])
        assert main([*argv[: argv.index(EP)], *flags]) == 0


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ("--gpus 6", [], "--gpus: 6 is no multiple of EP 4 = 4; give 4 or 8, or another layout"),
        ("--gpus 0", [], "--gpus: 0 is not positive"),
        ("--gpus 8 --gpu-memory nan", ["--bf16"], "--gpu-memory: nan is not finite"),
        ("--gpus 8 --tflops inf", ["--bf16"], "--tflops: inf is not finite"),
        ("--tflops 100", [], "--tflops: is of a plan of ranks; add --gpus"),
        ("--gpus 8 --calibrate none.json", [], "--calibrate: 'none.json' cannot be read"),
        ("--gpus 8 --calibrate RECIPE", [], "cannot be read (not JSON); give what"),
        ("--gpus 8 --tflops 1 --calibrate a", [], "--calibrate: stands beside --tflops"),
        ("--gpus 8 --gpu-memory 2", [], "--reserve: 4 GiB is all of --gpu-memory 2"),
        ("--gpus 8", ["--num-experts", "6"], "Megatron flags: "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, flags, message):
    path = str(tmp_path / "recipe.yaml")
    argv = command(tmp_path, *options.replace("RECIPE", path).split())
    assert main([*argv, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_plan_of_ranks_needs_flags_and_chosen_experts(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(layers={1: [0]}))
    assert main(["plan", str(path), "--gpus", "8"]) == 2
    assert "--gpus: needs the model and its layout; add --" in capsys.readouterr().err
    path.write_text(
        "domains: [{name: code, data: [0], experts: {profile: later.json, method: top_n, n: 1}}]\n"
        "objective: {alpha: 0, beta: 1}\n"
    )
    assert main(["plan", str(path), "--gpus", "8", "--", *QWEN3_30B]) == 2
    assert "still to be chosen from later.json" in capsys.readouterr().err


TAUGHT = """
domains: [{{name: code, data: [0], teacher: coder, experts: {{layers: {{0: [0]}}}}}}]
teachers: {{coder: {{source: "hf:/coder", ranks: {ranks}}}}}
"""
EVERYTHING = """
domains: [{{name: code, data: [0], teacher: coder}}]
teachers: {{coder: {{source: "megatron:/coder", ep: {ep}, fp8: {fp8}}}}}
train: {{everything: true}}
"""
TEACHER = {
    "name": "coder", "source": "hf:/coder", "kind": "hf", "path": "/coder", "num_layers": 16,
    "architecture": "LlamaForCausalLM", "hidden_size": 2048, "vocab_rows": 151936,
    "vocab_size": 151936, "parameters": 1_600_000_000, "max_positions": None, "vocabulary": "",
}  # fmt: skip


def test_a_teacher_on_all_stages_is_held_by_all_and_takes_less_time():
    flags = [*QWEN3_30B, "--num-layers", "4", "--pipeline-model-parallel-size", "4"]
    flags += ["--global-batch-size", "16", EP, "4"]
    found = {}
    for ranks in ("last", "auto"):
        recipe = TAUGHT.format(ranks=ranks)
        options = {"teachers": {"coder": TEACHER}, "memory": 80 * 2**30}
        found[ranks] = session_planner().plan(recipe, flags, 16, **options).plan
    weights = 2 * TEACHER["parameters"]
    held = {name: [t.weights for t in plan.teachers] for name, plan in found.items()}
    assert held == {"last": [0, 0, 0, weights], "auto": [weights] * 4}
    last, spread = found["last"], found["auto"]
    assert sum(t.flops for t in last.teachers) == sum(t.flops for t in spread.teachers) > 0
    work = [teacher.flops for teacher in spread.teachers]
    assert work == sorted(work)
    assert [rank.teacher - weights for rank in last.ranks[-4:]] == [4 * 4096 * 2048 * 2] * 4
    slow, fast = (step_time(plan, 300, None) for plan in (last, spread))
    assert fast.teacher < 0.5 * slow.teacher
    assert (fast.compute, fast.bubble) == (slow.compute, slow.bubble)


def test_a_teacher_with_experts_is_held_in_parts_and_works_as_a_token_passes():
    """For a dense student of which everything trains."""
    experts = {"number": 64, "topk": 4, "parameters": 640_000_000}
    given = re.sub(r"--(moe|num-experts)\S*( [^-]\S*)*", "", " ".join(QWEN3_30B))
    dense = [*given.split(), "--num-layers", "2", "--global-batch-size", "8"]

    def planned(ep, experts, fp8="none"):
        recipe = EVERYTHING.format(ep=ep, fp8=fp8)
        options = {"teachers": {"coder": TEACHER | {"experts": experts}}}
        return session_planner().plan(recipe, dense, 4, **options).plan

    whole, parts, other = planned(1, experts), planned(4, experts), planned(1, None)
    assert sum(whole.trained.values()) == sum(whole.parameters.values()) > 0
    assert whole.boundary == -1
    weights = [plan.teachers[0].weights for plan in (whole, parts, other)]
    routed = 2 * experts["parameters"]
    assert weights == [2 * TEACHER["parameters"], weights[0] - routed + routed // 4, weights[0]]
    in_fp8 = planned(4, experts, "blockwise")
    multiplied = weights[1] // 2 - 2 * TEACHER["vocab_rows"] * TEACHER["hidden_size"]
    assert in_fp8.teachers[0].weights == weights[1] + multiplied
    # A row for each token and expert: on several ranks, and filled up, there are more of them.
    working = [plan.teachers[0].working for plan in (other, whole, parts, in_fp8)]
    assert working == sorted(set(working))
    flops = [plan.teachers[0].flops for plan in (whole, parts, other)]
    assert flops[0] == flops[1]
    tokens = flops[2] - flops[0]
    assert tokens / (2 * experts["parameters"] * 60 // 64) == pytest.approx(2 * 4096, rel=1e-6)
    with pytest.raises(RecipeError, match=r"teachers\.coder\.ep: 8 does not divide the 4 ranks"):
        planned(8, experts)


@pytest.mark.slow
@pytest.mark.skipif("MEGATRON_OTHER" not in os.environ, reason="names another Megatron")
def test_another_megatron_plans_the_same(monkeypatch):
    folders = [os.environ["MEGATRON_OTHER"], str(RESULTS.parents[2])]
    flags = [*QWEN3_30B, "--num-layers", "4", EP, "4", "--pipeline-model-parallel-size", "2"]
    here = plan({1: [0, 40], 3: [7]}, flags, 8)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    with planner() as process:
        there = process.plan(RECIPE.format(layers={1: [0, 40], 3: [7]}), flags, 8).plan
    assert there == here


def test_a_process_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # the interpreter finds no module there
    with (
        planner() as process,
        pytest.raises(RuntimeError, match=r"process ended: (?s:.*)encodings"),
    ):
        process.plan(RECIPE.format(layers={1: [0]}), QWEN3_30B, 8)
