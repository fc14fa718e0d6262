"""Published architectures in the real ``pretrain()``: what transformers computes, and injected.

Each is a tiny random model of its architecture (``harness/architectures.py``), whose weights
Megatron's model takes over. Its checkpoint is then a student like any other.
"""

import dataclasses
import functools
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.harness import lane
from tests.harness.architecture_configs import VOCAB
from tests.harness.architectures import ARCHITECTURES
from tests.harness.checkpoints import SAVE, changed
from tests.harness.document_gpt import PER_SAMPLE
from tests.harness.injection import OTHER, PROVEN

BUILT = (str(lane.HARNESS / "architecture_gpt.py"),)
COUNTED = (str(lane.HARNESS / "counted_gpt.py"),)
PACKED = (str(lane.HARNESS / "document_gpt.py"),)
TRAIN = shlex.split(
    "--tokenizer-type NullTokenizer --make-vocab-size-divisible-by 16 --attention-dropout 0 "
    "--hidden-dropout 0 --use-cpu-initialization --num-workers 0 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 3 --lr 1e-2 --weight-decay 0.1 --log-interval 1 "
    f"--eval-iters 0 --eval-interval 1000 --ckpt-format torch_dist --vocab-size {VOCAB}"
)
RECIPE = """
{numbers}
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {layers}}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 0.5}}
train: {train}
{more}
"""
EVERYTHING = """
steering: {coeff: 0.5, target_mass: 0.8, balance: 0.1, retention: 0.5}
retention: {experts: 1.0}
imitation: {hidden: 0.5}
"""
TERMS = ("lm loss", "kd loss", "retention loss", "total loss", "grad norm")
LAYOUTS = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2, "extra": ("--expert-tensor-parallel-size", "1")},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "tp2-ep2": {"tp": 2, "ep": 2},
    "recompute": {
        "nproc": 1,
        "extra": (
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        ),
    },
}
NOT_BEFORE_19 = ("gpt_oss_20b", "olmoe", "gemma", "deepseek_v3_hybrid")
IN_TWO = {
    "deepseek_v3_hybrid": ("--hybrid-layer-pattern", "+-+E|+E+E"),
    "nemotron3_nano": ("--hybrid-layer-pattern", "MEM*|E-ME"),
}


def train(model: str, *extra: str, load: Path | str, nproc=2, tp=1, pp=1, ep=1, cp=1, **options):
    """Steps from a checkpoint of the architecture."""
    at = lane.layout(tp, pp, ep, cp)
    start = ("--load", str(load), "--finetune", "--no-load-optim", "--no-load-rng")
    cut = IN_TWO.get(model, ()) if pp > 1 else ()
    flags = [*ARCHITECTURES[model].flags, *TRAIN, *start, *at, *cut, *extra]
    return lane.run(flags, nproc=nproc, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an architecture: its model in transformers, and what Megatron makes of it."""

    @functools.cache
    def build(model: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        ARCHITECTURES[model].make(folder)
        run_built(model, folder, folder / "megatron")
        return folder

    return build


def run_built(model: str, folder: Path, output: Path, path=(), without=()) -> None:
    """Build it in Megatron, write its logits into ``folder`` and save it."""
    own = [flag for flag in ARCHITECTURES[model].flags if flag not in without]
    flags = [*own, *TRAIN, "--mock-data", *SAVE, str(output)]
    lane.run(flags, script=BUILT, env={"ARCHITECTURE": str(folder)}, pythonpath=path)


def assert_same_logits(model: str, folder: Path) -> None:
    """Of the model and of its layers of multi-token prediction, whose last tokens are unknown."""
    theirs, ours = (torch.load(folder / f"{n}logits.pt") for n in ("", "megatron_"))
    for depth, (expected, logits) in enumerate(zip(theirs, ours, strict=True)):
        known = expected.shape[1] - depth
        difference = logits[:, :known, :VOCAB] - expected[:, :known]
        assert difference.abs().max() < ARCHITECTURES[model].tolerance


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_megatron_has_the_logits_of_transformers(built, model):
    assert_same_logits(model, built(model))


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER is not set")
@pytest.mark.parametrize("model", [name for name in ARCHITECTURES if name not in NOT_BEFORE_19])
def test_the_other_megatron_has_them_too(built, model, tmp_path):
    """gpt-oss lacks flags there, OLMoE and Gemma ``--spec``, which plain queries do not need, and
    hybrid models have no latent attention."""
    spec = ("--spec", "megatron_moe_inject.host.plain_queries", "layers")
    without = spec if set(spec) <= set(ARCHITECTURES[model].flags) else ()
    folder = tmp_path / "copy"
    shutil.copytree(built(model), folder, ignore=shutil.ignore_patterns("megatron*"))
    run_built(model, folder, tmp_path / "saved", [OTHER], without)
    assert_same_logits(model, folder)


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER is not set")
def test_a_spec_needs_a_megatron_that_takes_it():
    run = train("olmoe", "--mock-data", load="/nowhere", nproc=1, check=False, pythonpath=[OTHER])
    assert run.returncode
    assert "projection_norms layers: needs Megatron-Core 0.19, and this is 0.18" in run.output
    assert "Traceback" not in run.output


def test_a_shape_of_rope_that_megatron_ignores_is_an_error():
    run = train("llama3", "--rope-scaling-factor", "32", load="/nowhere", nproc=1, check=False)
    assert run.returncode
    assert "--rope-scaling-factor 32.0: Megatron parses it" in run.output
    assert "Traceback" not in run.output


@functools.cache
def whole_run(folder: Path, model: str, extra=(), **layout) -> lane.Run:
    """Everything trains, without the plugin."""
    return train(model, "--mock-data", *extra, load=folder / "megatron", **layout)


WHOLE = {
    ("deepseek_v3", "tp2"),
    ("olmoe", "tp2"),
}
"""What the quick suite runs: a model whose parts are split in a way of their own."""


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=[pytest.mark.slow] * ((model, layout) not in WHOLE))
        for model in (*IN_TWO, "deepseek_v2_lite", "deepseek_v3", "gpt_oss_20b", "olmoe")
        for layout in LAYOUTS
        # Megatron's local window refuses context parallelism, and its loss of multi-token
        # prediction is a mean over each context-parallel rank's own tokens.
        if layout != "cp2" or model not in ("gpt_oss_20b", "deepseek_v3")
    ],
)
def test_a_layout_trains_as_one_process(built, model, layout):
    at = LAYOUTS[layout]
    run = whole_run(built(model), model, **at)
    one = whole_run(built(model), model, nproc=1)
    for name in ("lm loss", "grad norm"):
        assert run.losses(name) == pytest.approx(one.losses(name), rel=1e-4)


def inject(
    material, folder, model, *extra, layers, train_what="{}", more="", check=True, **options
):
    """Three steps with a recipe and the frozen check."""
    hybrid = "--hybrid-layer-pattern" in ARCHITECTURES[model].flags
    numbers = "layer_numbers: hybrid" if hybrid else ""
    text = RECIPE.format(
        numbers=numbers, layers=layers, teacher=material.teacher, train=train_what, more=more
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    ours = ("--inject-recipe", str(recipe), "--inject-verify-frozen")
    given = (*material.blend, *ours, *extra)
    run = train(model, *given, load=folder / "megatron", **options)
    assert PROVEN.search(run.output), run.tail()
    return run


DENSE_LATENT = lane.dense(
    *("--multi-latent-attention", "--qk-layernorm", "--q-lora-rank", "24", "--kv-lora-rank", "16"),
    *("--qk-head-dim", "16", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "12"),
    *("--kv-channels", "12", "--vocab-size", str(VOCAB)),
)
CHOSEN = {
    "nemotron3_nano": "{4: [3], 7: [1, 5]}",
    "deepseek_v3_hybrid": "{5: [3], 7: [1, 5]}",
}
IN_ALL = {"deepseek_v3": "ep2", "gpt_oss_20b": "tp2", "nemotron3_nano": "pp2"}
STUDENTS = [name for name in ARCHITECTURES if name not in ("qwen3", "llama3", "gemma")]


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in IN_ALL)) for m in STUDENTS]
)
def test_everything_of_a_recipe_trains_it_at_a_layout_as_in_one_process(material, built, model):
    """Chosen experts and routers, the original model, steering, and states of a teacher."""
    layout = LAYOUTS[IN_ALL.get(model, "ep2")]
    options = {
        "layers": CHOSEN.get(model, "{2: [3], 3: [1, 5]}"),
        "train_what": "{router: true}",
        "more": EVERYTHING,
    }
    one = inject(material, built(model), model, nproc=1, **options)
    at = {name: value for name, value in layout.items() if name != "extra"}
    run = inject(material, built(model), model, *layout.get("extra", ()), **at, **options)
    for name in (*TERMS, "steering loss", "imitation loss"):
        assert run.losses(name) == pytest.approx(one.losses(name), rel=2e-4, abs=1e-6)


def test_training_attention_trains_the_projections_of_latents(material, built):
    """DeepSeek-V3: all of each layer's but their norms, and nothing of multi-token prediction."""
    folder = built("deepseek_v3")
    saved = (*SAVE, str(folder / "attention"))
    what = "{experts: none, attention: true}"
    inject(material, folder, "deepseek_v3", *saved, nproc=1, layers="{3: [1]}", train_what=what)
    names = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
    own = {f"decoder.layers.{n}.self_attention.linear_{x}.weight" for n in range(4) for x in names}
    assert changed(folder / "megatron", folder / "attention") == own


@pytest.mark.parametrize("extra", [(), LAYOUTS["recompute"]["extra"]], ids=["plain", "recompute"])
def test_latent_attention_below_the_first_trained_layer_keeps_nothing(material, built, extra):
    folder = built("deepseek_v2_lite")
    run = inject(
        material, folder, "deepseek_v2_lite", *extra, nproc=1, script=COUNTED, layers="{2: [1]}"
    )
    (line,) = (x for x in run.output.splitlines() if x.startswith("layers: "))
    counts = json.loads(line.removeprefix("layers: "))
    for layer in ("0", "1"):
        assert (counts[layer]["saved"], counts[layer]["graphs"]) == (0, 0)
    assert counts["2"]["graphs"] > 0


def test_a_student_with_latent_attention_trains_on_packed_documents(material, built):
    """What the same documents give one to a sample."""
    folder, flags = built("deepseek_v2_lite") / "megatron", ["--calculate-per-token-loss"]
    flags += ["--moe-router-load-balancing-type", "none", *material.blend, "--train-iters", "2"]
    losses = {}
    for kind, size in (("packed", 1), ("single", PER_SAMPLE)):
        own = ["--micro-batch-size", str(size), "--global-batch-size", str(2 * size)]
        own += ["--dataloader-inter-document-masking"] if kind == "packed" else []
        env = {"TESTS_DOCUMENTS": kind}
        run = train("deepseek_v2_lite", *flags, *own, load=folder, nproc=1, script=PACKED, env=env)
        losses[kind] = [*run.losses("lm loss"), *run.losses("grad norm")]
    assert losses["packed"] == pytest.approx(losses["single"], rel=1e-5)


@pytest.mark.slow
def test_a_teacher_with_latent_attention_teaches(material, built, tmp_path):
    """A dense one, the same on a rank of two as on one."""
    data = ("--data-path", material.domain, "--split", "90,5,5", "--lr", "1e-3")
    dense = [f for f in DENSE_LATENT if f != "--mock-data"]
    lane.run([*dense, *data, *SAVE, str(tmp_path)])
    teaching = dataclasses.replace(material, teacher=str(tmp_path))
    folder, recipe = built("deepseek_v2_lite"), {"layers": "{3: [1]}"}
    one, two = (
        inject(teaching, folder, "deepseek_v2_lite", *extra, tp=tp, nproc=tp, **recipe)
        for tp, extra in ((1, ()), (2, LAYOUTS["tp2"]["extra"]))
    )
    assert two.losses("kd loss") == pytest.approx(one.losses("kd loss"), rel=1e-5)
