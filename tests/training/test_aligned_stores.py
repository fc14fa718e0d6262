"""Stores and servers of teachers with another tokenizer in the place of models, through the real
``pretrain()``.

The text has documents of a sample's length. So a teacher that reads each sample reads what the
store's writer read, and losses and gradients must be the same.
"""

import dataclasses
import functools
import shutil
import subprocess
import sys

import pytest

from megatron_moe_inject.host import compat
from megatron_moe_inject.teachers.align.byte_tokenizer import read_tokenizer
from tests.harness import lane
from tests.harness.aligned import write_documents
from tests.harness.injection import OTHER, assert_clean_end
from tests.harness.material import SEQUENCE
from tests.harness.teacher_server import TeacherServer, thinker
from tests.harness.training_recipes import ALIGNED

TERMS = ("lm loss", "kd loss", "total loss", "kd loss/code", "aligned share", "steering loss",
         "grad norm")  # fmt: skip
not_before_19 = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


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

    def run(source=None, *extra, sets=(), nproc=1, check=True, resume=None, path=(), **layout):
        overrides = [] if source is None else [f"teachers.coder.source={source}"]
        ours = ["--inject-recipe", recipe, "--inject-verify-frozen"]
        ours += ["--inject-set", *overrides, *sets] if [*overrides, *sets] else []
        flags = of_text.flags(*ours, *blend, *extra, **layout)
        if resume is not None:
            anew = ("--finetune", "--no-load-optim", "--no-load-rng")
            flags = [flag for flag in flags if flag not in anew] + ["--load", str(resume)]
        return lane.run(flags, nproc=nproc, check=check, pythonpath=path)

    return run


@pytest.fixture(scope="module")
def live(train):
    return train()


@pytest.fixture(scope="module")
def live_at(train):
    """The live teacher's run at a layout, which ``test_aligned_teachers`` compares with others.

    Here Adam makes rounding that differs by layout larger than what is to be seen.
    """
    return functools.cache(lambda *extra, **layout: train(None, *extra, **layout))


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
    pytest.param(dict(nproc=2, cp=2), id="cp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, pp=2), id="pp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, ep=2), id="ep2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=4, tp=2, pp=2), id="tp2-pp2", marks=pytest.mark.slow),
    pytest.param(dict(nproc=2, pp=2, vpp=1), id="pp2-vpp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(train, whole, live_at, layout):
    sizes = {name: size for name, size in layout.items() if name != "vpp"}
    virtual = ("--num-layers-per-virtual-pipeline-stage", "1") if "vpp" in layout else ()
    assert_same(train(f"store:{whole}", *virtual, **sizes), live_at(*virtual, **sizes))


SERVED = [
    pytest.param("sglang", dict(nproc=2, tp=2), id="tp2-sp"),
    pytest.param("vllm", dict(nproc=2, pp=2), id="pp2", marks=pytest.mark.slow),
    pytest.param("sglang", dict(nproc=2, cp=2), id="cp2", marks=pytest.mark.slow),
    pytest.param("vllm", dict(nproc=2, ep=2), id="ep2", marks=pytest.mark.slow),
    pytest.param("vllm", dict(nproc=4, tp=2, cp=2), id="tp2-cp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("protocol", "layout"), SERVED)
def test_every_layout_is_told_the_same(
    train, think, encode, ask, served, live_at, protocol, layout
):
    """One of the ranks that share a sequence asks, for what one process asks."""
    first = served[1]
    with TeacherServer(think, protocol, tokenize=encode) as server:
        source, sets = ask(server)
        run = train(source, sets=sets, **layout)
        if "ep" not in layout:
            assert len(server.asked) == len(first.asked)
        assert {tuple(text) for text in server.asked[2:]} == {tuple(t) for t in first.asked[2:]}
    assert_same(run, live_at(**layout))


def test_a_server_of_another_tokenizer(train, think, ask, of_text):
    """Its vocabulary would take the ids, so that only its cuts tell."""
    other = read_tokenizer(of_text.tokenizer)
    with TeacherServer(think, tokenize=other.one) as server:
        source, sets = ask(server)
        run = train(source, sets=sets, nproc=2, tp=2, check=False)
    remedy = "name the tokenizer of the served model: teachers.coder.server.tokenizer"
    words = (f"'server:{server.url}' {server.url} has another tokenizer", remedy)
    assert_clean_end(run, words)


@pytest.mark.slow
def test_a_server_that_dies_ends_training_with_a_checkpoint(train, think, encode, ask, tmp_path):
    """And a run that goes on from it is as if nothing had been, bit for bit."""
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "100", "--train-iters", "5")
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server, "teachers.coder.server.ahead=0")
        through = train(source, "--train-iters", "5", nproc=2, pp=2, sets=sets)
        begun = len(server.asked)
        server.faults = lambda n: "500" if n > begun + 2 + (begun - 2) // 2 else None
        patience = "teachers.coder.server.patience=1.5"
        cut = train(source, *save, nproc=2, pp=2, sets=[*sets, patience], check=False)
        assert cut.returncode == 2, cut.tail()
        assert "Traceback" not in cut.output
        assert f"{server.url} says HTTP 500" in cut.output
        done = len(cut.iterations)
        assert 0 < done < 5
        server.faults = lambda n: None
        on = train(source, *save, nproc=2, pp=2, sets=sets, resume=tmp_path / "saved")
    for term in TERMS:
        assert [*cut.losses(term), *on.losses(term)] == through.losses(term), term


@pytest.mark.slow
def test_a_store_of_what_a_server_said(write, train, think, encode, ask, live, tmp_path):
    """Written without the model, in spans of a context that is shorter than documents, too."""
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server)
        sets = [f"teachers.coder.source={source}", *sets]
        folder, told = write("--log-probs", "fp32", sets=sets)
        assert "the same" in told
        short = [write("--context", "16", "--log-probs", "fp32", sets=own)[0]
                 for own in (sets, ())]  # fmt: skip
    assert_same(train(f"store:{folder}"), live)
    runs = [train(f"store:{folder}") for folder in short]
    assert_same(*runs)
    first, whole = runs[0].losses("kd loss/code")[0], live.losses("kd loss/code")[0]
    assert first != pytest.approx(whole, rel=1e-6)
    assert first == pytest.approx(whole, rel=0.5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_batches(train, whole, tmp_path):
    """A run that was stopped goes on at another batch size as with its live teacher."""
    begin = ("--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    train(f"store:{whole}", *begin)
    ends = []
    for source in (f"store:{whole}", None):
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{source is None}"))
        more = ("--load", str(folder), "--global-batch-size", "16", "--micro-batch-size", "4")
        ends.append(train(source, *more, nproc=2, ep=2))
    assert_same(*ends)


@pytest.mark.slow
@not_before_19
def test_longer_samples_of_another_order(train, whole, think, encode, ask):
    """Two documents to a sample, each a text of its own; another seed and batch size."""
    flags = ("--dataloader-inter-document-masking", "--seq-length", str(2 * SEQUENCE))
    flags += ("--max-position-embeddings", str(2 * SEQUENCE), "--seed", "7")
    flags += ("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "3")
    live = train(None, *flags)
    assert_same(train(f"store:{whole}", *flags, nproc=2, tp=2), live)
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server)
        run = train(source, *flags, nproc=2, tp=2, sets=sets)
    assert_same(run, live)
    assert max(run.losses("server misses")) == 0


@pytest.mark.slow
def test_measured_beside_the_student(train, whole, think, encode, ask, tmp_path):
    """Evaluations of a store and of servers are those of the model."""
    flags, found = ("--eval-iters", "2", "--eval-interval", "2"), []
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server)
        for name, own, more in (("live", None, []), ("store", f"store:{whole}", []),
                                ("server", source, sets)):  # fmt: skip
            lines = f"evaluation.file={tmp_path / name}.jsonl"
            more = [*more, lines, "evaluation.gate=false"]
            found.append(train(own, *flags, sets=more).evaluations[0])
    for name, value in found[0].items():
        if name.startswith(("teacher loss", "kd loss", "lm loss")):
            assert [other[name] for other in found[1:]] == lane.approx([value] * 2, rel=1e-4)
    assert "teacher loss/code" in found[0]


@pytest.mark.slow
def test_float16_loses_little(train, write, stored):
    folder, told = write()
    assert "fp16: 5 bytes a token" in told
    run = train(f"store:{folder}")
    for term in ("kd loss", "grad norm"):  # then Adam has made more of it
        assert run.losses(term)[:2] == lane.approx(stored.losses(term)[:2], rel=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no other Megatron")
def test_the_other_version_reads_the_same(train, whole, think, encode, ask, of_text, tmp_path):
    """From a student that it has saved."""
    old = dataclasses.replace(of_text, student=str(tmp_path / "student"))
    old.make_student(pythonpath=(OTHER,))
    start = ("--load", old.student)
    live = train(None, *start, path=(OTHER,))
    assert_same(train(f"store:{whole}", *start, nproc=2, pp=2, path=(OTHER,)), live)
    with TeacherServer(think, tokenize=encode) as server:
        source, sets = ask(server)
        assert_same(train(source, *start, sets=sets, path=(OTHER,)), live)


@pytest.mark.slow
def test_a_mistake_is_one_message_at_start(train, whole, write, recipe):
    chunks = train(f"store:{whole}", sets=["teachers.coder.align=none"], check=False)
    assert_clean_end(chunks, ("has chunks of text of a teacher with its own", "write align: chu"))
    _, told = write("--top", "4", check=False)
    assert "--top: 4 is of the student's tokens, and teachers.coder has align: chunks" in told
    _, told = write("--log-probs", "bf16", check=False)
    assert "--log-probs: 'bf16' is of ids" in told
