"""Teachers with another tokenizer, through the real ``pretrain()``."""

import json
import shutil

import pytest

from megatron_moe_inject.host import compat
from tests.harness import lane, own_tokenizers
from tests.harness.aligned import without_tokenizer
from tests.harness.injection import assert_clean_end
from tests.harness.training_recipes import ALIGNED

TERMS = ("lm loss", "kd loss", "total loss", "kd loss/code", "aligned share", "grad norm")
not_before_19 = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


@pytest.fixture(scope="module")
def train(of_text):
    """A run with the recipe; ``sets`` override it."""

    def run(*extra, nproc=1, sets=(), check=True, **layout):
        path = of_text.folder / "recipe.yaml"
        path.write_text(ALIGNED.format(teacher=of_text.teacher))
        ours = ["--inject-recipe", str(path), "--inject-verify-frozen"]
        ours += ["--inject-set", *sets] if sets else []
        return lane.run(of_text.flags(*ours, *extra, **layout), nproc=nproc, check=check)

    return run


@pytest.fixture(scope="module")
def alone(train):
    """On one process."""
    return train()


HEAD = ("train.output_layer=true", "objective.skip_worse=true", "objective.confidence=label")


@pytest.fixture(scope="module")
def with_head(train):
    return train(sets=HEAD)


def assert_same(run, other, rel=2e-5, terms=TERMS):
    for term in terms:
        assert other.losses(term), term
        assert run.losses(term) == lane.approx(other.losses(term), rel=rel, abs=1e-7), term


LAYOUTS = [
    pytest.param(dict(nproc=2, tp=2), id="tp2-sp"),
    pytest.param(dict(nproc=2, pp=2), id="pp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, cp=2), id="cp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, ep=2), id="ep2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=4, tp=2, cp=2), id="tp2-cp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=4, tp=2, pp=2), id="tp2-pp2", marks=pytest.mark.slow),
    pytest.param(
        dict(nproc=2, pp=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")),
        id="pp2-vpp2",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(train, alone, layout):
    run = train(*layout.pop("extra", ()), **layout)
    assert_same(run, alone, terms=(*TERMS, "steering loss"))
    assert all(0.8 < share < 1 for share in run.losses("aligned share/code"))


@pytest.mark.parametrize(
    "layout", [dict(tp=2), pytest.param(dict(cp=2), marks=pytest.mark.slow)], ids=["tp2-sp", "cp2"]
)
def test_a_trained_head_and_weighed_chunks(train, with_head, alone, layout):
    run = train(sets=HEAD, nproc=2, **layout)
    assert_same(run, with_head, terms=(*TERMS, "kd factor"))
    assert run.losses("kd factor")[0] < 1
    assert run.losses("kd loss")[:1] == lane.approx(alone.losses("kd loss")[:1], rel=2e-5)


def test_measured_beside_the_student(train, tmp_path):
    """The teacher's loss on the same bytes is known, nothing of its ids; the gate compares it."""
    lines = tmp_path / "evaluation.jsonl"
    flags = ("--eval-iters", "2", "--eval-interval", "2")
    run = train(*flags, sets=[f"evaluation.file={lines}", "evaluation.gate=false"])
    assert "texts are aligned by their bytes" in run.output
    measured = run.evaluations[0]
    assert measured["teacher loss/code"] > 1
    assert "teacher agreement/code" not in measured
    first = json.loads(lines.read_text().splitlines()[0])
    sums = first["classes"]["code"]["sums"]
    assert {"teacher_loss", "taught_loss", "taught_tokens"} <= sums.keys()
    assert not {"teacher_kl", "agreement"} & sums.keys()
    gate = [f"evaluation.file={tmp_path / 'other.jsonl'}", "evaluation.gate=true"]
    closed = train(*flags, sets=gate, check=False)
    words = ("does not predict its domain better than its student", "% of whose tokens the teacher")
    assert_clean_end(closed, words)


@pytest.mark.slow
@not_before_19
def test_documents_apart(train):
    """Packed, and masked from each other, a document is read alike."""
    flags = ("--eod-mask-loss", "--micro-batch-size", "1", "--calculate-per-token-loss")
    sets = ["steering.coeff=0"]  # whose threshold makes much of little
    packed = train("--dataloader-inter-document-masking", *flags, sets=sets)
    divided = train("--dataloader-inter-document-masking", *flags, sets=sets, nproc=2, tp=2)
    assert_same(divided, packed)
    masked = train("--reset-attention-mask", "--reset-position-ids", *flags, sets=sets)
    assert masked.losses("aligned share") == lane.approx(packed.losses("aligned share"))


def source_of(of_text, folder, model):
    """Setting of a teacher that was trained for two steps with a tokenizer of its own."""
    own = own_tokenizers.byte_level(folder / "tokenizer", 420, part=1)
    flags = of_text.flags()
    data = flags[flags.index("--data-path") : flags.index("--load")]
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(own))
    save = ("--save", str(folder / "teacher"), "--save-interval", "10", "--train-iters", "2")
    lane.run([*without_tokenizer(model), *kind, *data, *save])
    return f"teachers.coder.source=megatron:{folder / 'teacher'}"


@pytest.mark.slow
def test_a_megatron_teacher(train, of_text, tmp_path):
    """Its tokenizer is the one that its checkpoint was trained with."""
    sets = [source_of(of_text, tmp_path, lane.dense())]
    run = train(sets=sets)
    assert "420 ids; texts are aligned by their bytes" in run.output
    assert_same(train(sets=sets, nproc=2, tp=2), run)


def test_a_megatron_teacher_with_experts(train, of_text, tmp_path):
    """On two ranks: in some steps only one of them has a text."""
    few = ("--data-path", "0.9", of_text.general, "0.1", of_text.domain, "--train-iters", "6")
    sets = [source_of(of_text, tmp_path, lane.moe()), "steering.coeff=0"]
    one = train(*few, sets=sets)
    two = train(*few, sets=[*sets, "teachers.coder.ep=2"], nproc=2)
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sets", "extra", "words"),
    [
        (["teachers.coder.window=1"], (), ("teachers.coder.window: 1 is of hidden states",)),
        (["teachers.coder.ranks=pipeline"], (), ("teachers.coder.ranks: 'pipeline'",)),
        (["imitation.hidden=1"], (), ("imitation.hidden", "has align: chunks")),
        (["objective.confidence=entropy"], (), ("objective.confidence", "write label")),
        (["steering.confidence=top"], (), ("steering.confidence", "write label")),
        (["teachers.coder.source=hf:{words}"], (), ("teachers.coder.align", "WordPiece gives no")),
        ([], ("--reset-position-ids",), ("--reset-position-ids", "add --reset-attention-mask")),
        ([], ("--tokenizer-type", "NullTokenizer", "--vocab-size", "299"),
         ("needs the bytes of the student's tokens", "NullTokenizer")),
    ],
)  # fmt: skip
def test_one_clear_error(train, of_text, tmp_path, sets, extra, words):
    folder = shutil.copytree(of_text.same, tmp_path / "words")
    own_tokenizers.word_piece(folder)
    sets = [text.format(words=folder) for text in sets]
    assert_clean_end(train(*extra, sets=sets, check=False), words)
