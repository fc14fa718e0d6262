"""Stores and servers of teachers with another tokenizer in the place of models, through the real
``pretrain()``.

The text has documents of a sample's length. So a teacher that reads each sample reads what the
store's writer read, and losses and gradients must be the same.
"""

import subprocess
import sys

import pytest

from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer
from tests.harness import lane
from tests.harness.aligned import make_aligned_material, write_documents
from tests.harness.material import SEQUENCE
from tests.harness.teacher_server import TeacherServer, thinker
from tests.harness.training_recipes import ALIGNED

TERMS = ("lm loss", "kd loss", "total loss", "kd loss/code", "aligned share", "steering loss",
         "grad norm")  # fmt: skip


@pytest.fixture(scope="module")
def of_text(tmp_path_factory):
    return make_aligned_material(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def blend(of_text, tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"), of_text.tokenizer, SEQUENCE)


@pytest.fixture(scope="module")
def recipe(of_text):
    path = of_text.folder / "recipe.yaml"
    path.write_text(ALIGNED.format(teacher=of_text.teacher))
    return str(path)


@pytest.fixture(scope="module")
def write(of_text, blend, recipe, tmp_path_factory):
    """Writes a store with more options and recipe overrides, by the command line; its folder."""

    def written(*options, sets=(), check=True):
        folder = tmp_path_factory.mktemp("stores") / "store"
        command = [sys.executable, "-m", "megatron_moe_inject.cli", "store-teacher", recipe]
        command += ["--output", str(folder), "--cpu", *options]
        command += ["--inject-set", *sets] if sets else []
        flags = [*blend[:-1], *of_text.tokenizer_flags, "--seq-length", str(SEQUENCE)]
        run = subprocess.run(
            [*command, "--", *flags], capture_output=True, text=True, timeout=300, check=False
        )
        assert (run.returncode == 0) == check, run.stderr
        return folder, run.stdout + run.stderr

    return written


@pytest.fixture(scope="module")
def whole(write):
    folder, told = write("--log-probs", "fp32", "--shard-tokens", "2000", "--verify", "20")
    assert "chunks of text by a tokenizer of 450 ids, fp32: 7 bytes a token" in told
    assert "0 labels are in another chunk" in told
    return folder


@pytest.fixture(scope="module")
def train(of_text, blend, recipe):
    """A run on the documents; of the live teacher unless another source is named."""

    def run(source=None, *extra, sets=(), nproc=1, check=True, **layout):
        overrides = [] if source is None else [f"teachers.coder.source={source}"]
        ours = ["--inject-recipe", recipe, "--inject-verify-frozen"]
        ours += ["--inject-set", *overrides, *sets] if [*overrides, *sets] else []
        flags = of_text.flags(*ours, *blend, *extra, **layout)
        return lane.run(flags, nproc=nproc, check=check)

    return run


@pytest.fixture(scope="module")
def live(train):
    return train()


@pytest.fixture(scope="module")
def stored(train, whole):
    return train(f"store:{whole}")


@pytest.fixture(scope="module")
def think(of_text):
    import transformers

    return thinker(transformers.AutoModelForCausalLM.from_pretrained(str(of_text.teacher)).eval())


@pytest.fixture(scope="module")
def encode(of_text):
    """The teacher's tokenizer, as a server has it."""
    return read_tokenizer(of_text.teacher).one


@pytest.fixture(scope="module")
def ask(of_text):
    """Source and overrides of a run that asks a server, impatiently."""

    def asked(server, *more, tokenizer=of_text.teacher):
        usual = {"tokenizer": tokenizer, "timeout": 20, "patience": 20}
        sets = [f"teachers.coder.server.{key}={value}" for key, value in usual.items()]
        return f"'server:{server.url}'", [*sets, *more]

    return asked


@pytest.fixture(scope="module")
def served(train, think, encode, ask):
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server)
        return train(source, sets=sets), server


def assert_same(run, other, rel=2e-5):
    for term in TERMS:
        assert other.losses(term), term
        assert run.losses(term) == lane.approx(other.losses(term), rel=rel, abs=1e-7), term


def test_a_store_is_its_teacher(live, stored):
    """Loss, gradient, which labels are told, and how sure it is of each, which steering weighs."""
    assert_same(stored, live)
    assert all(0.8 < share <= 1 for share in stored.losses("aligned share/code"))
    assert "a store of hf:" in stored.output
    assert "texts were aligned by their bytes when it was written" in stored.output


def test_a_server_is_its_teacher(live, served, of_text):
    """It is asked for the teacher's own ids, ahead of the step, and for no others."""
    run, server = served
    assert_same(run, live)
    assert max(run.losses("server misses")) == 0
    assert f"ids of a text as the tokenizer in {of_text.teacher}; the log-probability of" in (
        run.output
    )
    assert {text[0] for text in server.asked[2:]} == {1}, "behind the teacher's own beginning"


LAYOUTS = [
    pytest.param(dict(nproc=2, tp=2), id="tp2-sp"),
    pytest.param(dict(nproc=2, cp=2), id="cp2"),
    pytest.param(dict(nproc=2, pp=2), id="pp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, ep=2), id="ep2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=4, tp=2, pp=2), id="tp2-pp2", marks=pytest.mark.slow),
    pytest.param(
        dict(nproc=2, pp=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")),
        id="pp2-vpp2",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(train, whole, stored, layout):
    """With context parallelism Megatron itself weighs the masked ends of documents by rank, so that
    a live teacher at the same layout is what it must equal."""
    extra = layout.pop("extra", ())
    other = train(None, *extra, **layout) if "cp" in layout else stored
    assert_same(train(f"store:{whole}", *extra, **layout), other)
