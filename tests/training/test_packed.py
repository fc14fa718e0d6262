"""Packed documents: all terms are what the same documents give one to a sample."""

import json
import os

import pytest
import yaml

from megatron_moe_inject.host import compat
from tests.harness import chats, lane
from tests.harness.document_gpt import PER_SAMPLE
from tests.harness.injection import TERMS, assert_clean_end, inject
from tests.harness.material import make_material

OTHER = os.environ.get("MEGATRON_OTHER")
MASKED = "--dataloader-inter-document-masking"
DOCUMENTS = (str(lane.HARNESS / "document_gpt.py"),)
CHATS = (str(lane.HARNESS / "chat_gpt.py"),)
UNBALANCED = ("--moe-router-load-balancing-type", "none")
EVERYTHING = {
    "domains": [
        {
            "name": "code",
            "data": [1],
            "teacher": {"coder": 0.7, "second": 0.3},
            "experts": {"layers": {1: [2], 2: [0, 3], 3: [3]}},
        }
    ],
    "teachers": {"coder": {"source": "megatron:{teacher}"}, "second": {"source": "hf:{llama}"}},
    "objective": {"alpha": 0.7, "beta": 0.3, "temperature": 2.0, "gamma": 2.0},
    "train": {"router": True},
    "retention": {"experts": 2.0},
    "imitation": {"hidden": 0.5, "experts": 0.25},
    "steering": {
        "coeff": 0.5, "target_mass": 0.8, "balance": 0.1, "retention": 1.0, "confidence": "label",
    },
}  # fmt: skip
OF_SECOND_ORDER = ("retention loss", "original_kl")
"""Squares of how far the student has moved, small beside what they are differences of."""

NO_LAYERS = ("imitation",)
"""Sections that a teacher by windows does not take."""
not_before_19 = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


def recipe(material, llama, folder, without=(), **changes) -> list[str]:
    """Flags of ``EVERYTHING`` but for some sections, with other sections changed."""
    tree = {key: value for key, value in EVERYTHING.items() if key not in without}
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    text = yaml.safe_dump(tree).format(teacher=material.teacher, llama=llama)
    path = folder / "recipe.yaml"
    path.write_text(text)
    return ["--inject-recipe", str(path), "--inject-verify-frozen"]


def terms(run) -> list[str]:
    """What is logged of the loss, its parts, and where tokens go."""
    words = ("loss", "norm", "retention", "target", "confidence")
    names = [name for name in run.iterations[0] if any(map(name.count, words))]
    return [name for name in names if name != "loss scale"]


def assert_same_terms(run, other) -> None:
    assert terms(run) == terms(other)
    for name in terms(run):
        rel = 5e-4 if name in OF_SECOND_ORDER else 1e-5
        expected = lane.approx(other.losses(name), rel=rel, abs=1e-7)
        assert run.losses(name) == expected, name


def assert_same_sums(found, expected, rel=2e-5) -> None:
    """Two JSON trees whose numbers differ by rounding alone."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            wide = 5e-4 if key in OF_SECOND_ORDER else rel
            assert_same_sums(found[key], expected[key], wide)
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_sums(*pair, rel)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-6)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def documents(material, llama, tmp_path_factory):
    """A run on packed documents, or on the same ones one to a sample, with what it measured."""
    known = {}

    def run(packed, samples, without=(), *, nproc=1, extra=(), changes=(), **layout):
        """``samples``: packs of a micro-batch; ``changes``: of the recipe, by section."""
        key = packed, samples, without, tuple(layout.items()), extra, str(changes)
        if key in known:
            return known[key]
        folder, per = tmp_path_factory.mktemp("documents"), 1 if packed else PER_SAMPLE
        measured = {"file": str(folder / "evaluation.jsonl"), "gate": False}
        flags = material.flags(
            *recipe(material, llama, folder, without, evaluation=measured, **dict(changes)),
            *("--micro-batch-size", str(samples * per), "--global-batch-size", str(8 * per)),
            *("--train-iters", "3", "--eval-iters", "2", "--eval-interval", "2", *UNBALANCED),
            *("--inject-profile", str(folder / "profile.json"), "--inject-profile-coselections"),
            *((MASKED,) if packed else ()),
            *extra,
            **layout,
        )
        env = {"TESTS_DOCUMENTS": "packed" if packed else "single"}
        result = lane.run(flags, nproc=nproc, script=DOCUMENTS, env=env)
        known[key] = result, folder
        return known[key]

    return run


def sums_of_evaluations(folder) -> list:
    """By evaluation and class, all sums over tokens; sequences are others."""
    lines = (folder / "evaluation.jsonl").read_text().splitlines()
    return [
        {
            name: {key: sum(values) for key, values in measured["sums"].items()}
            for name, measured in json.loads(line)["classes"].items()
        }
        for line in lines
    ]


def routing(folder) -> dict:
    """By class, what was counted of the routers, but for the spread over sequences."""
    classes = json.loads((folder / "profile.json").read_text())["classes"]
    return {
        name: {key: value for key, value in counted.items() if key != "spread"}
        for name, counted in classes.items()
    }


@not_before_19
@pytest.mark.parametrize(
    ("samples", "layout"),
    [
        pytest.param(1, dict(), id="one"),
        pytest.param(1, dict(nproc=2, tp=2), id="tp2-sp"),
        pytest.param(1, dict(nproc=2, pp=2), id="pp2"),
        pytest.param(
            2, dict(nproc=2, tp=2), id="two packs to a row, tp2-sp", marks=pytest.mark.slow
        ),
        pytest.param(2, dict(), id="two packs to a row"),
        pytest.param(1, dict(nproc=2, ep=2), id="ep2", marks=pytest.mark.slow),
        pytest.param(4, dict(nproc=2, tp=2), id="four, tp2-sp", marks=pytest.mark.slow),
        pytest.param(2, dict(nproc=2, ep=2), id="two, ep2", marks=pytest.mark.slow),
        pytest.param(1, dict(nproc=4, pp=2, tp=2), id="tp2-pp2", marks=pytest.mark.slow),
        pytest.param(1, dict(nproc=4, pp=4), id="pp4", marks=pytest.mark.slow),
        pytest.param(
            1, dict(extra=("--recompute-granularity", "full", "--recompute-method", "uniform",
                               "--recompute-num-layers", "1")),
            id="full recompute", marks=pytest.mark.slow,
        ),
        pytest.param(
            1, dict(nproc=2, pp=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")),
            id="pp2-vpp2", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_documents_of_a_pack_are_what_they_are_alone(documents, samples, layout):
    """Distillation by both kinds of teachers, gamma, experts held, imitation and steering; the
    evaluation and the routing profile beside. Prompts are masked."""
    alone, of_alone = documents(False, samples)
    packed, of_packed = documents(True, samples, **layout)
    assert_same_terms(packed, alone)
    assert_same_sums(sums_of_evaluations(of_packed), sums_of_evaluations(of_alone))
    assert_same_sums(routing(of_packed), routing(of_alone))


@not_before_19
@pytest.mark.slow
def test_teachers_by_windows_read_their_prefix_before_each_document(documents):
    """Tokens are then weighed by running means of confidence, in which prompts do not count."""
    teachers = {
        "coder": {"source": "megatron:{teacher}", "window": 1, "prefix": [5]},
        "second": {"source": "hf:{llama}", "window": 2, "prefix": [3, 60]},
    }
    changes = {"teachers": teachers}
    alone, _ = documents(False, 1, NO_LAYERS, changes=changes)
    packed, _ = documents(True, 1, NO_LAYERS, changes=changes, nproc=2, pp=2)
    assert_same_terms(packed, alone)
    bare, _ = documents(True, 1, NO_LAYERS, nproc=2, pp=2)
    assert bare.losses("kd loss")[0] != pytest.approx(packed.losses("kd loss")[0], rel=1e-3)


@not_before_19
@pytest.mark.slow
def test_teachers_are_given_what_megatron_packs(material, llama, tmp_path):
    """Documents by Megatron's own data set; unpacked, masks and positions from outside stop at
    borders."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    paths = []
    for stride in (1, 7):
        rng, path = np.random.default_rng(stride), tmp_path / f"documents{stride}"
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
        for length in rng.integers(3, 20, size=900):
            tokens = np.append((rng.integers(60) + stride * np.arange(length)) % 60, 60)
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(f"{path}.idx")
        paths += ["0.5", str(path)]
    ours = recipe(material, llama, tmp_path, ("imitation", "steering", "retention"))
    flags = material.flags(*ours, "--data-path", *paths, *UNBALANCED)
    packed = lane.run([*flags, MASKED])
    masked = lane.run([*flags, "--reset-attention-mask", "--reset-position-ids"])
    assert_same_terms(packed, masked)


def of_chats(material, llama, folder, per_line, *extra, packs=1, path=(), nproc=1, **layout):
    """A run with ``--sft`` on conversations, ``PER_PACK`` to a sample or one.

    Balance within targets is by micro-batch, and these hold the samples in another order.
    """
    data, tokenizer = chats.write_chats(folder / f"chats{per_line}", per_line), folder / "tokens"
    if not tokenizer.exists():
        chats.write_tokenizer(tokenizer)
    size = packs * chats.PER_PACK // per_line
    flags = material.flags(
        *recipe(material, llama, folder, steering={"balance": 0.0}),
        *("--data-path", "0.5", data[0], "0.5", data[1], "--split", "80,20,0", "--sft"),
        *("--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--sft-tokenizer-prompt-format", "nemotron-nano-v2", *UNBALANCED),
        *("--seq-length", "64", "--max-position-embeddings", "64", "--train-iters", "2"),
        *("--micro-batch-size", str(size), "--calculate-per-token-loss", *extra),
        *("--global-batch-size", str(8 * chats.PER_PACK // per_line)),
        **layout,
    )
    return lane.run(flags, nproc=nproc, script=CHATS, pythonpath=path)


@not_before_19
@pytest.mark.parametrize(
    "layout",
    [
        dict(nproc=2, pp=2),
        pytest.param(dict(packs=2), marks=pytest.mark.slow),
        pytest.param(dict(nproc=2, tp=2), marks=pytest.mark.slow),
    ],
    ids=["pp2", "two packs to a row", "tp2-sp"],
)
def test_conversations_of_a_pack_are_what_they_are_alone(material, llama, tmp_path, layout):
    """``--sft`` through our own entry; only answers count."""
    alone = of_chats(material, llama, tmp_path, 1)
    packed = of_chats(material, llama, tmp_path, chats.PER_PACK, **layout)
    assert_same_terms(packed, alone)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER or "0.18" not in OTHER, reason="MEGATRON_OTHER names no 0.18")
def test_conversations_on_the_other_version(llama, tmp_path):
    """Where packs have no common length, so that a micro-batch is one of them."""
    material = make_material(tmp_path, (OTHER,))
    one = of_chats(material, llama, tmp_path, chats.PER_PACK, path=(OTHER,))
    assert one.losses("kd loss")
    stages = of_chats(material, llama, tmp_path, chats.PER_PACK, path=(OTHER,), nproc=2, pp=2)
    assert_same_terms(stages, one)


@not_before_19
def test_what_rows_of_several_samples_do_not_take(material, llama, tmp_path):
    ours = recipe(material, llama, tmp_path)
    run = lane.run(material.flags(*ours, MASKED, pp=2), nproc=2, check=False)
    assert_clean_end(run, (f"{MASKED}: puts the 2 samples", "--pipeline-model-parallel-size 2"))


OWN = """
domains:
  - name: code
    data: [1]
    experts: {{layers: {{2: [3], 3: [3]}}}}
objective: {{alpha: 0, beta: 0.5, general_beta: 0.25}}
"""


@pytest.fixture(scope="module")
def by_sample(material):
    """A sample a micro-batch."""
    return inject(material, OWN, extra=(MASKED, *UNBALANCED, "--micro-batch-size", "1"))


@not_before_19
@pytest.mark.parametrize(
    "layout",
    [
        dict(),
        dict(nproc=2, tp=2),
        pytest.param(dict(nproc=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=["one", "tp2-sp", "ep2"],
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_sample_of_a_row_has_the_loss_of_its_class(material, by_sample, layout, size):
    """Half of a class' weight more or less would show in the total and in the gradient."""
    extra = (MASKED, *UNBALANCED, "--micro-batch-size", str(size))
    run = inject(material, OWN, extra=extra, **layout)
    for term in (term for term in TERMS if term != "kd loss"):
        assert run.losses(term) == lane.approx(by_sample.losses(term), rel=2e-5), term
