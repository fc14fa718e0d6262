"""A student with Mamba layers, as Nemotron 3 Nano has them, through the real ``pretrain()``.

Its pattern is Mamba, experts, attention, experts, Mamba, experts. The kernels are the CPU lane's,
which ``unit/host/test_lane_mamba.py`` compares with the recurrence.
"""

import functools
import json
import re
import zlib

import pytest

from tests.harness import lane
from tests.harness.checkpoints import SAVE, changed
from tests.harness.injection import LAYOUTS, OTHER, PROVEN, assert_clean_end
from tests.harness.material import student_flags

COUNTED = (str(lane.HARNESS / "counted_gpt.py"),)
PATTERN, IN_TWO = "ME*EME", "ME*|EME"
SMALL = ("--mamba-head-dim", "16", "--mamba-state-dim", "8", "--mamba-num-groups", "2")
EVERYTHING = """
layer_numbers: hybrid
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{3: [3], 5: [1]}}}}}}
teachers:
  coder: {{source: "megatron:{teacher}", layers: {{4: 1}}}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 0.5}}
imitation: {{hidden: 0.5}}
train: {{mamba: true}}
"""
FROM = """
layer_numbers: hybrid
domains:
  - {{name: code, data: [1], experts: {{layers: {{5: [1]}}}}}}
objective: {{alpha: 0.0, beta: 1.0}}
train: {{layers: {layers}}}
"""
TERMS = ("lm loss", "kd loss", "imitation loss", "total loss", "grad norm")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
MICRO_BATCHES = 3 * 4


def flags(*data: str, pattern: str = PATTERN, **layout: int) -> list[str]:
    """Of the student; Megatron counts its layers by the pattern."""
    return student_flags(*data, "--hybrid-layer-pattern", pattern, *SMALL, **layout)


def start(material, folder: str, path=()) -> str:
    """A checkpoint of it after two stock steps, the same start at every layout."""
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "2")
    lane.run([*flags(*data), *SAVE, folder], pythonpath=path)
    return folder


@pytest.fixture(scope="module")
def student(material) -> str:
    return start(material, str(material.folder / "mamba"))


def inject(
    material, student, recipe, *extra, script=lane.PRETRAIN, nproc=1, check=True, path=(), **layout
):
    """Three steps with a recipe and the frozen check."""
    written = material.folder / f"mamba-{zlib.crc32(recipe.encode())}.yaml"
    written.write_text(recipe)
    loaded = ("--load", student, "--finetune", "--no-load-optim", "--no-load-rng")
    ours = ("--inject-recipe", str(written), "--inject-verify-frozen", "--train-iters", "3")
    given = [*flags(*material.blend, *loaded, *ours, **layout), *extra]
    run = lane.run(given, nproc=nproc, script=script, check=check, pythonpath=path)
    assert not check or PROVEN.search(run.output), run.tail()
    return run


def experts(layer: int, expert: int) -> set[str]:
    """The names of an expert's weights."""
    front = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc"
    return {f"{front}{n}.weight[{expert}]" for n in (1, 2)}


def mixer(layer: int) -> set[str]:
    """The names of a Mamba layer's parameters that are no norm's."""
    parts = {"in_proj.weight": "zxBC", "conv1d.weight": "xBC", "conv1d.bias": "xBC"}
    whole_ones = {"A_log", "D", "dt_bias", "in_proj.weight.dt", "out_proj.weight"}
    names = whole_ones | {f"{name}.{part}" for name, split in parts.items() for part in split}
    return {f"decoder.layers.{layer}.mixer.{name}" for name in names}


@pytest.fixture(scope="module")
def single(material, student):
    folder = material.folder / "mamba-trained"
    recipe = EVERYTHING.format(teacher=material.teacher)
    return inject(material, student, recipe, *SAVE, str(folder)), folder


def test_mixers_and_chosen_experts_change_and_nothing_else(single, student):
    """Their norms are norms: in front of the projection, and the gated one."""
    run, folder = single
    assert changed(student, folder) == mixer(0) | mixer(4) | experts(3, 3) | experts(5, 1)
    assert re.search(r"^  other ", run.output, re.MULTILINE) is None


AT = {
    "tp2": LAYOUTS["tp2-sp"],
    "pp2": LAYOUTS["pp2"] | {"pattern": IN_TWO},
    "cp2": LAYOUTS["cp2"],
    "ep2": LAYOUTS["ep2"],
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name == "ep2")) for name in AT]
)
def test_a_layout_gives_what_one_process_gives(material, student, single, layout):
    """With teacher, retention, imitation behind a Mamba layer, and trained mixers and experts."""
    recipe = EVERYTHING.format(teacher=material.teacher)
    options = dict(AT[layout])
    run = inject(material, student, recipe, *options.pop("extra"), **options)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single[0].losses(term), rel=2e-5), term
    assert single[0].losses("imitation loss")[-1] < single[0].losses("imitation loss")[0]


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
@pytest.mark.parametrize("layout", ["one process", "tp2", "cp2"])
def test_the_other_supported_megatron_gives_the_same_curve(material, tmp_path, single, layout):
    """From a start of its own: 0.18 reads no checkpoint of 0.19."""
    first = start(material, str(tmp_path / "start"), [OTHER])
    recipe = EVERYTHING.format(teacher=material.teacher)
    options = dict(AT.get(layout, {}))
    run = inject(material, first, recipe, *options.pop("extra", ()), path=[OTHER], **options)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single[0].losses(term), rel=2e-5), term


def layers_of(run: lane.Run) -> dict[int, dict[str, int]]:
    """What each global layer did; see ``counted_gpt``."""
    found = re.findall(r"^layers: (.*)$", run.output, re.MULTILINE)
    return {int(layer): count for line in found for layer, count in json.loads(line).items()}


@pytest.fixture(scope="module")
def plain(material, student):
    """One process without recompute, and its checkpoint, by the layers that train whole."""

    def run(layers):
        folder = material.folder / f"from-{layers}"
        return inject(
            material, student, FROM.format(layers=layers), *SAVE, str(folder), script=COUNTED
        ), folder

    return functools.cache(run)


def check_counts(run: lane.Run, first: int, times: int) -> None:
    """Below ``first`` one forward for each micro-batch and nothing kept."""
    counts = layers_of(run)
    assert sorted(counts) == list(range(len(PATTERN)))
    for layer, count in counts.items():
        if layer < first:
            assert count == {"forwards": MICRO_BATCHES, "saved": 0, "graphs": 0}, layer
        else:
            assert count["forwards"] == times * MICRO_BATCHES, layer
            assert count["graphs"] == MICRO_BATCHES, layer
            assert count["saved"] > 0, layer


def test_a_whole_mamba_layer_trains(plain, student):
    run, folder = plain("[4]")
    norms = {f"decoder.layers.4.mixer.{n}" for n in ("norm.weight", "in_proj.layer_norm_weight")}
    assert changed(student, folder) == mixer(4) | norms | experts(5, 1)
    check_counts(run, 4, 1)


@pytest.mark.parametrize(
    ("layers", "first", "options"),
    [("[4]", 4, {}), ("[]", 5, {}), ("[4]", 4, AT["pp2"])],
    ids=["in a Mamba layer", "above one", "in the second stage"],
)
def test_nothing_runs_backward_below_the_boundary(material, student, plain, layers, first, options):
    """Recomputed above it, with the numbers of a run without recompute."""
    options = dict(options)
    options.pop("extra", ())
    extra = (*FULL, "--recompute-num-layers", "1")
    recipe = FROM.format(layers=layers)
    run = inject(material, student, recipe, *extra, script=COUNTED, **options)
    for term in ("lm loss", "load_balancing_loss", "grad norm"):
        assert run.losses(term) == pytest.approx(plain(layers)[0].losses(term), rel=2e-5), term
    check_counts(run, first, 2)


@pytest.mark.parametrize(
    ("pattern", "layer", "message"),
    [
        (PATTERN, 4, "layers.4: 4 is a Mamba layer; MoE layers: 1, 3, 5"),
        ("*E*E", 3, "train.mamba: True matches nothing; the student has no Mamba layer"),
    ],
    ids=["an expert of a Mamba layer", "no Mamba layer"],
)
def test_what_cannot_train(material, student, pattern, layer, message):
    recipe = FROM.replace("5: [1]", f"{layer}: [1]").replace("layers: {layers}", "mamba: true")
    recipe = recipe.replace("{{", "{").replace("}}", "}")
    extra = ("--hybrid-layer-pattern", pattern)
    assert_clean_end(inject(material, student, recipe, *extra, check=False), [message])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--hybrid-layer-pattern", "G*ME"), "--hybrid-layer-pattern (is 'G*ME'): "),
        (("--hybrid-layer-pattern", "DE"), "use layers of *, +, E, - and M"),
        (("--hybrid-layer-pattern", "+E"), "add --qk-layernorm and --q-lora-rank"),
        (("--mamba-training-ssm-states-dtype", "bf16"), "keep their states in fp32"),
    ],
    ids=["G", "D", "+", "states"],
)
def test_what_the_lane_has_not(material, extra, message):
    run = lane.run([*flags(*material.blend), *extra], check=False)
    assert run.returncode
    assert message in run.output
    assert "Traceback" not in run.output
