"""The plugin under Transformer Engine on a GPU, through the real ``pretrain()``.

All runs start at once when the first is asked for (``runs.py``). References: stock Megatron in the
same precision, the CPU lane in fp32 with the local specification, and bf16 for FP8.
"""

import re

import pytest
import torch

from tests.harness.gpu_runs import (
    APEX,
    BF16,
    DISTRIBUTED,
    EP2,
    EXACT,
    FP8,
    FUSED,
    LENIENT,
    MLA,
    PP2,
    RECIPE,
    TP2,
    Runs,
)
from tests.harness.injection import PROVEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

UNTAUGHT = """
domains:
  - name: code
    data: [1]
    experts: {layers: {2: [0, 3], 3: [3]}}
objective: {alpha: 0.0, beta: 1.0}
"""
SGD = ("--optimizer", "sgd", "--lr", "0.1")
LOCAL = ("--transformer-impl", "local")
EXACTLY = ("--deterministic-mode", "--attention-backend", "unfused", "--no-bias-swiglu-fusion")
FEATURES = {
    "gamma": ("objective.gamma=5.0",),
    "steering": (
        *("train.router=true", "steering.coeff=0.1", "steering.retention=1.0"),
        "steering.confidence=label",
    ),
    "gamma from the host": ("objective.gamma=5.0", "retention.originals=host"),
    "imitation": ("imitation.hidden=0.5", "imitation.experts=0.5"),
    "everything": (
        *("objective.gamma=5.0", "train.router_rows=true", "steering.coeff=0.1"),
        "imitation.hidden=0.5",
    ),
}
RECOMPUTE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")
RECOMPUTE_ACTIVATIONS = (*RECOMPUTE[:-1], "moe_act")
RECOMPUTE_ALL = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
HEAD = ("train.output_layer=true", "train.experts=all")
GRAPHS = {
    "graphs local": ("--cuda-graph-impl", "local", "--cuda-graph-modules", "attn"),
    "graphs local, router": ("--cuda-graph-impl", "local", "--cuda-graph-modules", "moe_router"),
    "graphs te": (
        *("--cuda-graph-impl", "transformer_engine"),
        *("--cuda-graph-modules", "attn", "moe_router", "moe_preprocess"),
    ),
}
CP2 = ("--context-parallel-size", "2", "--attention-backend", "fused")
BLOCKS = ("--inject-set", "layer_numbers=gpt")
HYBRID = ("--hybrid-layer-pattern", "*E*E*E*E")
LAYOUTS = {  # name -> flags, the run of one process that it must equal
    "two dp": ((), "bf16"),
    "two ep": (EP2, "bf16"),
    "two tp": (TP2, "bf16"),
    "two pp": (PP2, "bf16"),
    "two cp": (CP2, "bf16"),
    "two ep, distributed optimizer": ((*EP2, *DISTRIBUTED), "bf16"),
    "two ep, fp8": ((*EP2, *FP8["blockwise"]), "fp8 blockwise"),
    "two pp, fp8": ((*PP2, *FP8["tensorwise"]), "fp8 tensorwise"),
    "two ep, frozen fp8": (
        (*EP2, *FP8["blockwise"], "--inject-set", "train.frozen_experts=fp8"),
        "frozen blockwise",
    ),
    "two pp, hybrid": ((*PP2, "--hybrid-layer-pattern", "*E*E|*E*E", *BLOCKS), "hybrid"),
    "two ep, hybrid": ((*EP2, *HYBRID, *BLOCKS), "hybrid"),
    "two ep, everything": ((*EP2, "--inject-set", *FEATURES["everything"]), "everything"),
    "two tp, everything": ((*TP2, "--inject-set", *FEATURES["everything"]), "everything"),
    "two pp, everything": ((*PP2, "--inject-set", *FEATURES["everything"]), "everything"),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("gpu"))
    runs.make_models()
    exact = (*BF16[:-1], "unfused", *EXACTLY)
    stock = runs.flags(*exact, *LENIENT)
    runs.start("plugin off", stock, env=EXACT)
    runs.start("stock", stock, env={**EXACT, "STOCK_MEGATRON": "1"})
    runs.inject("cpu", *LOCAL, recipe=RECIPE, cpu=True)
    runs.inject("cpu sgd", *LOCAL, *SGD, recipe=RECIPE, cpu=True)
    exactly = {"NVIDIA_TF32_OVERRIDE": "0", "TESTS_WITHOUT": " ".join(APEX)}  # Apex has no RMSNorm
    runs.inject("fp32 local", *LOCAL, *SGD, recipe=RECIPE, env=exactly)
    alone = (*LOCAL, "--bf16", "--no-rope-fusion")  # that kernel is TE's
    bare = {"TESTS_WITHOUT": " ".join(("transformer_engine", *APEX))}
    runs.inject("bf16 local", *alone, "--no-masked-softmax-fusion", recipe=RECIPE, env=bare)
    normed = (*alone, "--normalization", "LayerNorm")  # with Apex and without TE the only one
    other = {"recipe": UNTAUGHT, "student": False}
    runs.inject("local, LayerNorm", *normed, "--no-masked-softmax-fusion", env=bare, **other)
    with_apex = {"TESTS_WITHOUT": "transformer_engine"}
    runs.inject_with_apex("apex local", *normed, env=with_apex, **other)
    runs.inject_with_apex("apex", *BF16, recipe=RECIPE)
    runs.inject_with_apex("apex, head", *BF16, "--inject-set", *HEAD, recipe=RECIPE)
    runs.inject("bf16", *BF16, recipe=RECIPE)
    for name, flags in FP8.items():
        runs.inject(f"fp8 {name}", *BF16, *flags, recipe=RECIPE)
    whole = ("--inject-set", "train.experts=all")
    runs.inject("fp8 delayed, all experts", *BF16, *FP8["delayed"], *whole, recipe=RECIPE)
    runs.inject("bf16, all experts", *BF16, *whole, recipe=RECIPE)
    for name, fields in FEATURES.items():
        ours = ("--inject-set", *fields)
        runs.inject(name, *BF16, *ours, recipe=RECIPE)
        runs.inject(f"fp8 {name}", *BF16, *FP8["blockwise"], *ours, recipe=RECIPE)
    stock = runs.flags(*exact, *LENIENT, *HYBRID)
    runs.start("hybrid, plugin off", stock, env=EXACT)
    runs.start("hybrid, stock", stock, env={**EXACT, "STOCK_MEGATRON": "1"})
    runs.inject("hybrid", *BF16, *HYBRID, *BLOCKS, recipe=RECIPE)
    runs.inject("hybrid, fp8", *BF16, *FP8["blockwise"], *HYBRID, *BLOCKS, recipe=RECIPE)
    kept = (*BLOCKS, "train.frozen_experts=fp8", *FEATURES["everything"])
    runs.inject("hybrid, frozen", *BF16, *FP8["blockwise"], *HYBRID, *kept, recipe=RECIPE)
    gather = (*FP8["blockwise"], *DISTRIBUTED, "--fp8-param-gather")
    runs.inject("fp8 parameters", *BF16, *gather, recipe=RECIPE)
    runs.inject("distributed optimizer", *BF16, *DISTRIBUTED, recipe=RECIPE)
    runs.inject("recompute", *BF16, *RECOMPUTE, recipe=RECIPE)
    runs.inject("recomputed activations", *BF16, *RECOMPUTE_ACTIVATIONS, recipe=RECIPE)
    runs.inject("full recompute", *BF16, *RECOMPUTE_ALL, recipe=RECIPE)
    one_by_one = tuple(f for f in BF16 if f != "--moe-grouped-gemm")
    runs.inject("one by one", *one_by_one, recipe=RECIPE)
    frozen = ("--inject-set", "train.frozen_experts=fp8")
    for name in ("tensorwise", "blockwise"):
        runs.inject(f"frozen {name}", *BF16, *FP8[name], *frozen, recipe=RECIPE)
    fp8 = (*BF16, *FP8["blockwise"], *frozen)
    runs.inject("frozen gathered", *fp8, *gather, recipe=RECIPE)
    runs.inject("frozen recompute", *fp8, *RECOMPUTE, recipe=RECIPE)
    save = ("--save", str(runs.folder / "half"), "--save-interval", "3")
    runs.inject("frozen half", *fp8, *save, "--exit-interval", "3", recipe=RECIPE)
    load = ("--load", str(runs.folder / "half"))
    for name, own in (("frozen resumed", fp8), ("resumed with params", (*BF16, *FP8["blockwise"]))):
        runs.inject(name, *own, *load, recipe=RECIPE, student=False, after="frozen half")
    for name in ("tensorwise", "blockwise"):
        taught = ("--inject-set", f"teachers.coder.fp8={name}")
        runs.inject(f"teacher {name}", *BF16, *taught, recipe=RECIPE)
    experts = (*BF16, "--inject-set", f"teachers.coder.source=megatron:{runs.experts}")
    runs.inject("experts teach", *experts, recipe=RECIPE)
    for name in ("tensorwise", "blockwise"):
        in_fp8 = (*experts, f"teachers.coder.fp8={name}")
        runs.inject(f"experts teach {name}", *in_fp8, recipe=RECIPE)
        on_two = (*in_fp8, "teachers.coder.ep=2")
        runs.inject_by_two(f"experts on two teach {name}", *on_two, recipe=RECIPE)
    runs.inject(
        "poisoned", *BF16, *FP8["blockwise"], recipe=RECIPE, check=False,
        env={"TESTS_POISON_LAYER": "2"},
    )  # fmt: skip
    runs.inject("mla", *BF16, *MLA, recipe=RECIPE, student=False)
    syncs = {"TESTS_REPORT_SYNCS": "1"}
    everything = ("--inject-set", *FEATURES["everything"])
    runs.inject("syncs", *BF16, *everything, recipe=RECIPE, env=syncs)
    runs.inject("syncs fp8", *BF16, *FP8["blockwise"], *everything, recipe=RECIPE, env=syncs)
    for name, flags in (("", ()), ("fp8 ", FP8["blockwise"])):
        runs.inject(f"{name}accumulation fused", *BF16, *flags, recipe=RECIPE, env=FUSED)
    head = ("--inject-set", *HEAD)
    runs.inject("head", *BF16, *head, recipe=RECIPE)
    runs.inject("head, accumulation fused", *BF16, *head, recipe=RECIPE, env=FUSED)
    delayed = (*BF16, *FP8["delayed"])
    runs.inject("delayed, accumulation fused", *delayed, recipe=RECIPE, env=FUSED)
    save = ("--save", str(runs.folder / "delayed"), "--save-interval", "3")
    runs.inject("delayed half", *delayed, *save, "--exit-interval", "3", recipe=RECIPE)
    on = ("--load", str(runs.folder / "delayed"))
    runs.inject(
        "delayed resumed", *delayed, *on, recipe=RECIPE, student=False, after="delayed half",
        env={"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"},
    )  # fmt: skip
    last = RECIPE.replace("[0, 3]", "[3]")
    runs.inject("delayed, last expert", *delayed, recipe=last)
    runs.inject_by_two("two ep, delayed, last expert", *delayed, *EP2, recipe=last)
    torch_rows = ("--inject-set", *FEATURES["gamma"], "objective.kernels=torch")
    runs.inject("gamma, torch rows", *BF16, *torch_rows, recipe=RECIPE)
    runs.inject("head, torch rows", *BF16, *head, "objective.kernels=torch", recipe=RECIPE)
    for name, flags in GRAPHS.items():
        runs.inject(name, *BF16, *flags, recipe=RECIPE, check=False)
        stock = runs.flags(*BF16, *LENIENT, *flags)
        runs.start(f"stock {name}", stock, env={"STOCK_MEGATRON": "1"}, check=False)
    for name, (flags, _) in LAYOUTS.items():
        runs.inject_by_two(name, *BF16, *flags, recipe=RECIPE)
    return runs


def losses(runs: Runs, name: str, term: str = "total loss") -> list[float]:
    return runs[name].losses(term)


def test_every_run(runs):
    """First of all: which runs failed, and why."""
    failed = {}
    for name in runs.names():
        run, why = runs.outcome(name)
        seconds = "" if run is None else f"{run.seconds:5.1f} s"
        how = "FAILED" if run is None else f"ended {run.returncode}" if run.returncode else "ran"
        print(f"{name:28} {how:8} {seconds}")
        if run is None:
            failed[name] = why
        else:
            print("   ", [round(x, 4) for x in run.losses("lm loss")])
            for line in run.output.splitlines():
                if line.startswith("host sync"):
                    print("   ", line)
    for name, why in failed.items():
        print(f"\n===== {name}\n{why[-3500:]}")
    assert not failed, list(failed)


def test_flags_absent_is_bitwise_stock(runs):
    for term in ("lm loss", "grad norm"):
        assert losses(runs, "plugin off", term) == losses(runs, "stock", term)


@pytest.mark.parametrize("term", ["lm loss", "kd loss", "total loss", "grad norm"])
def test_fp32_is_the_cpu_lane(runs, term):
    """With SGD: Adam divides small gradients by their own size, and so makes rounding large."""
    found, expected = losses(runs, "fp32 local", term), losses(runs, "cpu sgd", term)
    assert min(expected) > 0
    assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("term", ["lm loss", "kd loss", "total loss"])
@pytest.mark.parametrize("name", ["bf16", "bf16 local"])
def test_bf16_with_and_without_te_is_near_fp32(runs, name, term):
    assert losses(runs, name, term) == pytest.approx(losses(runs, "cpu", term), rel=1e-2)


def test_apex_without_te(runs):
    """Its norms, softmax, optimizer and gradient accumulation in Megatron's own layers."""
    for term in ("lm loss", "grad norm"):
        near = pytest.approx(losses(runs, "local, LayerNorm", term), rel=1e-2)
        assert losses(runs, "apex local", term) == near, term
    assert PROVEN.search(runs["apex local"].output)


@pytest.mark.parametrize(
    "name",
    [
        *("one by one", "distributed optimizer"),
        *("recompute", "recomputed activations", "full recompute"),
    ],
)
def test_one_curve(runs, name):
    assert losses(runs, name) == pytest.approx(losses(runs, "bf16"), rel=3e-3)


def test_a_hybrid_student_without_the_plugin_is_bitwise_stock(runs):
    for term in ("lm loss", "grad norm"):
        assert losses(runs, "hybrid, plugin off", term) == losses(runs, "hybrid, stock", term)


@pytest.mark.parametrize("term", ["lm loss", "kd loss", "total loss"])
def test_a_hybrid_student_is_a_gpt_student_of_the_same_weights(runs, term):
    """The same products of the same numbers, by TE's own hybrid stack; in FP8 near it."""
    assert losses(runs, "hybrid", term) == pytest.approx(losses(runs, "bf16", term), rel=3e-3)
    fp8 = losses(runs, "fp8 blockwise", term)
    assert losses(runs, "hybrid, fp8", term) == pytest.approx(fp8, rel=1e-2)
    assert PROVEN.search(runs["hybrid, fp8"].output)


def test_frozen_experts_of_a_hybrid_student_in_fp8_alone(runs):
    near = pytest.approx(losses(runs, "fp8 everything"), rel=5e-2)
    assert losses(runs, "hybrid, frozen") == near
    assert PROVEN.search(runs["hybrid, frozen"].output)


@pytest.mark.parametrize("name", [*FEATURES])
def test_features_in_fp8_are_near_bf16(runs, name):
    for term in ("total loss", "kd loss"):
        near = pytest.approx(losses(runs, name, term), rel=5e-2)
        assert losses(runs, f"fp8 {name}", term) == near, term


@pytest.mark.parametrize("precision", ["", "fp8 "])
def test_where_the_originals_are_changes_little(runs, precision):
    """The same values are multiplied; only atomic additions may be ordered otherwise."""
    for term in ("total loss", "retention loss"):
        there = losses(runs, f"{precision}gamma from the host", term)
        here = losses(runs, f"{precision}gamma", term)
        assert there == pytest.approx(here, rel=1e-3, abs=1e-6), term


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_frozen_experts_in_fp8_alone(runs, name):
    """The products are those of FP8 training; only scales may be rounded otherwise."""
    assert losses(runs, f"frozen {name}") == pytest.approx(losses(runs, f"fp8 {name}"), rel=1e-2)
    assert PROVEN.search(runs[f"frozen {name}"].output)


def test_frozen_experts_in_fp8_under_other_options(runs):
    beside = {"frozen gathered": "fp8 parameters", "frozen recompute": "frozen blockwise"}
    for name, other in beside.items():
        assert losses(runs, name) == pytest.approx(losses(runs, other), rel=1e-3), name
        assert PROVEN.search(runs[name].output)


def test_frozen_experts_in_fp8_are_saved_and_resumed(runs):
    whole = losses(runs, "frozen blockwise")[3:]
    assert losses(runs, "frozen resumed") == pytest.approx(whole, rel=1e-4)
    assert losses(runs, "resumed with params") == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_teachers_in_fp8(runs, name):
    kd = losses(runs, f"teacher {name}", "kd loss")
    assert kd == pytest.approx(losses(runs, "bf16", "kd loss"), rel=3e-2)
    assert kd != losses(runs, "bf16", "kd loss")


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_teachers_with_experts_in_fp8(runs, name):
    """Each expert gets rows that FP8 can multiply, however many tokens choose it."""
    kd, exact = (losses(runs, f"experts teach{name}", "kd loss") for name in (f" {name}", ""))
    assert kd == pytest.approx(exact, rel=3e-2)
    assert kd != exact


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_their_experts_on_two_processes_teach_the_same(runs, name):
    one, two = (losses(runs, f"experts {on}teach {name}", "kd loss") for on in ("", "on two "))
    assert two == pytest.approx(one, rel=1e-2)


def test_a_step_that_is_not_finite_says_where(runs):
    run = runs["poisoned"]
    assert run.returncode
    assert "not finite in step 3 on this rank, first things first: output of decoder layer 2" in (
        run.output
    )
    assert "output of decoder layer 1 (" not in run.output


@pytest.mark.parametrize("name", ["syncs", "syncs fp8"])
def test_the_host_never_waits_for_the_device(runs, name):
    output = runs[name].output
    assert re.search(r"host waits seen, Megatron's included: [1-9]", output), "nothing was watched"
    found = [line for line in output.splitlines() if line.startswith("host sync")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["gamma", "head"])
def test_triton_kernels_of_the_loss_change_little(runs, name):
    for term in ("total loss", "kd loss"):
        near = pytest.approx(losses(runs, f"{name}, torch rows", term), rel=1e-3)
        assert losses(runs, name, term) == near, term


@pytest.mark.parametrize(
    ("fused", "plain"),
    [
        ("accumulation fused", "bf16"),
        ("head, accumulation fused", "head"),
        ("fp8 accumulation fused", "fp8 blockwise"),
        ("delayed, accumulation fused", "fp8 delayed"),
        ("apex", "bf16"),
        ("apex, head", "head"),
    ],
)
def test_gradients_accumulate_in_the_products(runs, fused, plain):
    """As where Apex is installed. The output layer, which trains in the second, is ours."""
    assert losses(runs, fused) == pytest.approx(losses(runs, plain), rel=1e-3)
    assert PROVEN.search(runs[fused].output)


def test_delayed_scaling_resumes_with_its_histories(runs):
    whole = losses(runs, "fp8 delayed")
    assert losses(runs, "delayed half") == pytest.approx(whole[:3], rel=1e-4)
    assert losses(runs, "delayed resumed") == pytest.approx(whole[3:], rel=1e-4)
    assert PROVEN.search(runs["delayed resumed"].output)


@pytest.mark.parametrize("name", GRAPHS)
def test_layers_in_cuda_graphs(runs, name):
    if runs[f"stock {name}"].returncode:  # then with the plugin it need not, but may
        pytest.skip(f"stock Megatron cannot train so:\n{runs[f'stock {name}'].tail(8)}")
    assert runs[name].returncode == 0, runs[name].tail()
    assert losses(runs, name) == pytest.approx(losses(runs, "bf16"), rel=3e-3)
    assert PROVEN.search(runs[name].output)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes(runs, name):
    other = LAYOUTS[name][1]
    for term in ("total loss", "kd loss"):
        near = pytest.approx(losses(runs, other, term), rel=3e-3)
        assert losses(runs, name, term) == near, term
    assert PROVEN.search(runs[name].output)


def test_delayed_scaling_where_one_process_alone_trains_the_lowest_experts(runs):
    """All processes must reduce their histories at the same place of the backward pass."""
    two, one = "two ep, delayed, last expert", "delayed, last expert"
    assert losses(runs, two) == pytest.approx(losses(runs, one), rel=3e-3)
    assert PROVEN.search(runs[two].output)


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_near_bf16(runs, name):
    assert losses(runs, f"fp8 {name}") == pytest.approx(losses(runs, "bf16"), rel=3e-2)
