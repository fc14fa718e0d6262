"""The plugin around Transformer Engine's own modules, without a GPU: what is built and saved.

Every run goes through the real ``pretrain()`` with TE's layer specification, up to where training
would begin, and saves. Forward passes, and thus losses, are tests/gpu's.
"""

import re
from pathlib import Path

import pytest

from megatron_moe_inject.adapters.merge import merge_adapters
from megatron_moe_inject.experts.delta.delta import export_delta
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.stored_adapters import StoredAdapters
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from tests.harness import lane
from tests.harness.gpu_runs import BF16, DISTRIBUTED, EP2, FP8, MLA, PP2, RECIPE, TP2, Runs

pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

ROWS = ("objective.gamma=5.0", "train.router_rows=true", "steering.coeff=0.1")


def hybrid(pattern):
    """Flags of a hybrid student for a recipe in GPT blocks."""
    return "--hybrid-layer-pattern", pattern, "--inject-set", "layer_numbers=gpt"


ONE_BY_ONE = tuple(flag for flag in BF16 if flag != "--moe-grouped-gemm")
CASES = {
    "grouped": (1, BF16),
    "one by one": (1, ONE_BY_ONE),
    "ep2, distributed optimizer": (2, (*BF16, *EP2, *DISTRIBUTED)),
    "tp2": (2, (*BF16, *TP2)),
    "pp2": (2, (*BF16, *PP2)),
    "fp8 blockwise": (1, (*BF16, *FP8["blockwise"])),
    "fp8 tensorwise, ep2": (2, (*BF16, *FP8["tensorwise"], *EP2)),
    "fp8 delayed": (1, (*BF16, *FP8["delayed"])),
    "fp8 delayed, all experts": (
        *(1, (*BF16, *FP8["delayed"], "--inject-set", "train.experts=all")),
    ),
    "hybrid": (1, (*BF16, *hybrid("*E*E*E*E"))),
    "hybrid, pp2": (2, (*BF16, *PP2, *hybrid("*E*E|*E*E"))),
    "hybrid, ep2, fp8 blockwise": (*(2, (*BF16, *EP2, *FP8["blockwise"], *hybrid("*E*E*E*E"))),),
    "rows, steering, gamma": (1, (*BF16, "--inject-set", *ROWS)),
}
PUBLISH = lane.HARNESS / "published_gpt.py"
FROZEN = (*BF16, *FP8["blockwise"], "--inject-set", "train.frozen_experts=fp8")
ANEW = ("--finetune", "--no-load-optim", "--no-load-rng")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("te"))
    runs.make_models()
    return runs


def build(runs, name, nproc, flags, recipe=RECIPE, **options):
    """The output of a run and the checkpoint that it saved, at most one iteration old."""
    saved = runs.folder / re.sub(r"\W+", "-", f"saved {name}")
    save = ("--save", str(saved), "--save-interval", "100")
    own = {"cpu": True, "nproc": nproc, "env": {"TESTS_TE_ON_CPU": "1"}, **options}
    if recipe is None:
        runs.start(name, runs.flags(*flags, *save), **own)
    else:
        runs.inject(name, *flags, *save, recipe=recipe, **own)
    return runs[name].output, saved


@pytest.fixture(scope="module")
def stock(runs):
    """What Megatron saves of the student where the plugin has no recipe.

    It cannot load what layers without TE saved, so it gets what the plugin made of that.
    """
    own = ("--load", str(build(runs, "names of TE", 1, BF16)[1]))
    return build(runs, "no recipe", 1, (*BF16, *own), recipe=None)[1]


@pytest.fixture(scope="module")
def published(runs, stock):
    """A folder with the student's experts in FP8 by blocks, and a checkpoint of what they mean."""
    folder = runs.folder / "published"
    env = {"TESTS_TE_ON_CPU": "1", "TESTS_PUBLISH": str(folder)}
    own = {"recipe": None, "script": (str(PUBLISH),), "env": env}
    return folder, build(runs, "publish", 1, (*BF16, "--load", str(stock)), **own)[1]


def differences(base: Path, other: Path, folder: Path) -> dict[str, int]:
    """Slices that are not bitwise the same, by tensor."""
    places = CheckpointPlace("--base", base), CheckpointPlace("--trained", other)
    try:
        return dict(export_delta(*places, folder).changed)
    except RecipeError as error:
        if "does not differ" not in str(error):
            raise
        return {}


@pytest.mark.parametrize("name", ["Float8BlockScaling", "Float8CurrentScaling"])
def test_a_teachers_experts_get_the_rows_that_fp8_asks_for(name):
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.quantization import get_align_size_for_quantization

    assert get_align_size_for_quantization(getattr(recipe, name)()) == LENGTH_MULTIPLE


@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_built_and_all_is_saved_as_it_was_loaded(runs, stock, tmp_path, case):
    output, saved = build(runs, case, *CASES[case])
    trained = r"1\.57 M +0" if case == "fp8 delayed, all experts" else r"295 k +1\.28 M"
    assert re.search(rf"experts +{trained}", output)
    assert differences(stock, saved, tmp_path / "delta") == {}


@pytest.mark.parametrize(("nproc", "layout"), [(1, ()), (2, EP2)], ids=["one", "ep2"])
def test_frozen_experts_in_fp8_alone_are_rounded_once(runs, stock, tmp_path, nproc, layout):
    """Scaled by blocks; scales of whole tensors are found by kernels."""
    flags = (*FROZEN, *layout)
    _, saved = build(runs, f"frozen {nproc}", nproc, flags)
    rounded = differences(stock, saved, tmp_path / "delta")
    assert {name.rpartition("experts.experts.")[2] for name in rounded} == {
        "linear_fc1.weight",
        "linear_fc2.weight",
    }
    assert sum(rounded.values()) == 2 * 13, "13 of 16 experts are frozen"
    load = ("--load", str(saved), *ANEW)
    _, again = build(runs, f"frozen {nproc}, again", nproc, (*flags, *load), student=False)
    assert differences(saved, again, tmp_path / "more") == {}


@pytest.mark.parametrize(("nproc", "layout"), [(1, ()), (2, EP2)], ids=["one", "ep2"])
def test_a_published_student_is_saved_as_it_was_loaded(runs, published, tmp_path, nproc, layout):
    """Its frozen experts are kept as they were published, whatever their scales."""
    folder, loaded = published
    name = f"published {nproc}"
    flags = (*FROZEN, f"train.fp8_source=hf:{folder}", *layout, "--load", str(loaded), *ANEW)
    _, saved = build(runs, name, nproc, flags, student=False)
    assert differences(loaded, saved, tmp_path / "delta") == {}
    flags = (*FROZEN, *layout, "--load", str(loaded), *ANEW)
    _, encoded = build(runs, f"{name}, encoded anew", nproc, flags, student=False)
    assert sum(differences(loaded, encoded, tmp_path / "anew").values()) == 2 * 13


@pytest.mark.parametrize("pattern", [None, "+E+E+E+E"])
def test_multi_latent_attention(runs, pattern):
    flags = (*BF16, *MLA, *(() if pattern is None else hybrid(pattern)))
    output, _ = build(runs, f"mla {pattern}", 1, flags, student=False)
    assert re.search(r"experts +295 k +1\.28 M", output)


ADAPTED = (
    *("--inject-set", "train.experts=none", "train.vocabulary_rows={ids: [1, 40]}"),
    "train.adapters=[{targets: [experts, attention, router, output_layer], rank: 4}]",
)


@pytest.mark.parametrize(
    ("name", "nproc", "flags", "attention"),
    [
        ("grouped", 1, BF16, ("linear_qkv", "linear_proj")),
        ("one by one", 1, ONE_BY_ONE, ("linear_qkv", "linear_proj")),
        ("ep2", 2, (*BF16, *EP2, *DISTRIBUTED), ("linear_qkv", "linear_proj")),
        ("tp2", 2, (*BF16, *TP2), ("linear_qkv", "linear_proj")),
        ("hybrid", 1, (*BF16, *hybrid("*E*E*E*E")), ("linear_qkv", "linear_proj")),
        ("fp8", 1, (*BF16, *FP8["blockwise"]), ("linear_qkv", "linear_proj")),
    ],
)
def test_adapters_stand_beside_all_modules(runs, stock, tmp_path, name, nproc, flags, attention):
    """Under the names of a run without Transformer Engine, with nothing else moved."""
    own = [flag for flag in ADAPTED if "vocabulary" not in flag]
    _, saved = build(runs, f"adapters, {name}", nproc, (*flags, *own))
    stored = StoredAdapters(CheckpointPlace("--trained", saved).open())
    shapes = {}
    for (tensor, _), pairs in stored.pairs.items():
        module = tensor.removesuffix(".weight").rpartition(".")[2]
        for pair in pairs:
            assert not stored.read(pair.b).any()
            sizes = tuple(stored.read(pair.a).shape), tuple(stored.read(pair.b).shape)
            shapes.setdefault(module, []).append(sizes)
    assert {module: len(found) for module, found in shapes.items()} == {
        "linear_fc1": 3, "linear_fc2": 3, "router": 4, "output_layer": 1,
        **dict.fromkeys(attention, 4),
    }  # fmt: skip
    assert set(shapes["linear_fc1"]) == {((4, 128), (512, 4))}
    assert set(shapes["linear_fc2"]) == {((4, 256), (128, 4))}
    assert set(shapes["linear_qkv"]) == {((4, 128), (384, 4))}
    merged = tmp_path / "merged"
    merge_adapters(CheckpointPlace("--trained", saved), merged, lambda items, _: items)
    assert differences(stock, merged, tmp_path / "delta") == {}


def test_adapters_of_latent_attention_and_rows(runs):
    rows = [flag for flag in ADAPTED if "adapters=" not in flag]
    one = "train.adapters=[{targets: [attention], rank: 4}]"
    _, saved = build(runs, "adapters, mla", 1, (*BF16, *MLA, *rows, one), student=False)
    stored = StoredAdapters(CheckpointPlace("--trained", saved).open())
    modules = {tensor.split(".")[-2] for tensor, _ in stored.pairs}
    assert modules == {
        "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj",
        "linear_proj",
    }  # fmt: skip
    assert stored.ids == [1, 40]
    assert set(stored.rows) == {"embedding.word_embeddings.weight", "output_layer.weight"}
