"""Served teachers in the place of models beside the student, through the real ``pretrain()``.

The server is a real one over HTTP (``tests.harness.teacher_server``), over the very model that a
live ``hf:`` teacher loads, so with all ids asked for the losses and gradients must be the same.
"""

import numpy as np
import pytest

from megatron_moe_inject.host import compat
from tests.harness import lane
from tests.harness.injection import OTHER, assert_clean_end, recipe_file
from tests.harness.material import EVALUATES, make_material
from tests.harness.teacher_server import TeacherServer, thinker
from tests.harness.training_recipes import TOLD

ALL = 69
"""Rows of the teacher's head, eight of them beyond the student's ids."""
TERMS = ("lm loss", "kd loss", "total loss", "kd loss/code", "steering loss", "grad norm")
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def think(llama):
    import transformers

    return thinker(transformers.AutoModelForCausalLM.from_pretrained(str(llama)).eval())


@pytest.fixture(scope="module")
def train(material):
    """A run whose teacher is at a source."""

    def run(
        source,
        *extra,
        nproc=1,
        sets=(),
        check=True,
        env=None,
        resume=None,
        path=(),
        of=material,
        **layout,
    ):
        overrides = [f"teachers.coder.source={source}", *sets]
        ours = ["--inject-recipe", recipe_file(material, TOLD), "--inject-verify-frozen"]
        flags = of.flags(*ours, "--inject-set", *overrides, *extra, **layout)
        if resume is not None:
            anew = ("--finetune", "--no-load-optim", "--no-load-rng")
            flags = [flag for flag in flags if flag not in anew] + ["--load", str(resume)]
        return lane.run(flags, nproc=nproc, check=check, env=env, pythonpath=path)

    return run


def ask(server, *more, top=ALL):
    """Source and overrides of a run that asks a server, impatiently."""
    usual = {"top": top, "timeout": 20, "patience": 20}
    sets = [f"teachers.coder.server.{key}={value}" for key, value in usual.items()]
    return f"'server:{server.url}'", [*sets, *more]


@pytest.fixture(scope="module")
def live(train, llama):
    return train(f"hf:{llama}")


@pytest.fixture(scope="module")
def served(train, think):
    with TeacherServer(think) as server:
        source, sets = ask(server)
        return train(source, sets=sets), server


def assert_same(run, other, rel=2e-5):
    for term in TERMS:
        assert other.losses(term), term
        assert run.losses(term) == lane.approx(other.losses(term), rel=rel, abs=1e-7), term


def test_all_ids_of_a_server_are_its_model(live, served):
    """Loss, gradient, and how sure it is of each token, which steering weighs by."""
    run, server = served
    assert_same(run, live)
    assert max(run.losses("server misses")) == 0
    assert "vLLM 0.33.0; tokens not compared" in run.output
    # A probe and its long form, 19 samples of the domain in four steps and those of two more ahead.
    assert len(server.asked) < 50


def test_servers_that_die_end_training_with_a_checkpoint(train, think, tmp_path):
    """Two ranks of two stages, of which one asks, and none is left waiting; the run then goes on
    as if nothing had been, bit for bit."""
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "100")
    whole = ("--train-iters", "6")
    with TeacherServer(think) as server:
        source, sets = ask(server, "teachers.coder.server.ahead=0")
        through = train(source, *whole, nproc=2, pp=2, sets=sets)
        begun = len(server.asked)
        server.faults = lambda n: "500" if n > begun + 2 + (begun - 2) // 2 else None
        source, sets = ask(
            server, "teachers.coder.server.ahead=0", "teachers.coder.server.patience=1.5"
        )
        cut = train(source, *whole, *save, nproc=2, pp=2, sets=sets, check=False)
        assert cut.returncode == 2, cut.tail()
        assert "Traceback" not in cut.output
        (told,) = {x for x in cut.output.splitlines() if "megatron_moe_inject: error" in x}
        for part in (
            f"teachers.coder.source: 'server:{server.url}' no longer says what is needed: ",
            f"{server.url} says HTTP 500: as the test asks: 500",
            f"; what was trained is saved in {tmp_path / 'saved'}",
        ):
            assert part in told
        done = len(cut.iterations)
        assert 0 < done < 6
        assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == str(done)
        assert cut.losses("total loss") == through.losses("total loss")[:done]
        server.faults = lambda n: None
        source, sets = ask(server)
        on = train(source, *whole, *save, nproc=2, pp=2, sets=sets, resume=tmp_path / "saved")
    for term in TERMS:
        assert on.losses(term) == through.losses(term)[done:], term


def test_two_tensor_parallel_ranks_a_key_and_sglang(train, think, served, tmp_path):
    """One of the ranks asks; its key is in no line, and in no file that is saved."""
    save = ("--save", str(tmp_path), "--save-interval", "2", "--tensorboard-dir", str(tmp_path))
    with TeacherServer(think, "sglang", key=SECRET) as server:
        source, sets = ask(server, "teachers.coder.server.key_from=TEACHER_KEY")
        run = train(source, *save, nproc=2, tp=2, sets=sets, env={"TEACHER_KEY": SECRET})
        assert len(server.asked) == len(served[1].asked)
    assert_same(run, served[0])
    assert SECRET not in run.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".distcp" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        dict(nproc=2, ep=2),
        dict(nproc=2, cp=2),
        dict(nproc=4, tp=2, pp=2),
        dict(nproc=4, ep=2, pp=2),
    ],
    ids=["ep2", "cp2", "tp2-pp2", "ep2-pp2"],
)
def test_every_layout_is_told_the_same(train, think, served, layout):
    with TeacherServer(think) as server:
        source, sets = ask(server)
        assert_same(train(source, sets=sets, **layout), served[0])


@pytest.mark.slow
@pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)
def test_documents_of_packed_samples_are_texts_of_their_own(train, think, llama):
    flags = ("--dataloader-inter-document-masking", "--micro-batch-size", "1")
    with TeacherServer(think) as server:
        source, sets = ask(server)
        run = train(source, *flags, nproc=2, tp=2, sets=sets)
        assert {len(t) for t in server.asked[2:]} != {33}
    assert_same(run, train(f"hf:{llama}", *flags))


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no other Megatron")
def test_the_other_version_is_told_the_same(train, think, llama, tmp_path):
    old = make_material(tmp_path, (OTHER,))
    with TeacherServer(think) as server:
        source, sets = ask(server)
        run = train(source, nproc=2, pp=2, sets=sets, of=old, path=(OTHER,))
    assert_same(run, train(f"hf:{llama}", of=old, path=(OTHER,)))
    assert max(run.losses("server misses")) == 0


def test_a_server_that_fails_in_an_evaluation(train, think, material, tmp_path):
    """The next training step ends with a checkpoint of the one before."""
    tokens = np.fromfile(f"{material.domain}.bin", np.uint16)
    trained, held_out = (part.tobytes() for part in np.split(tokens, [36 * 300]))

    def fault(number):
        text = np.array(server.asked[number], np.uint16).tobytes()
        return "500" if text in held_out and text not in trained else None

    save = ("--save", str(tmp_path), "--save-interval", "100", "--eval-interval", "2")
    save += EVALUATES
    with TeacherServer(think, faults=fault) as server:
        source, sets = ask(server, "teachers.coder.server.patience=1.5")
        run = train(source, *save, sets=sets, check=False)
    assert run.returncode == 2, run.tail()
    assert "Traceback" not in run.output
    assert "HTTP 500: as the test asks: 500; see to the servers, and go on from" in run.output
    assert len(run.iterations) == 2
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_server_that_does_not_fit_is_one_message_at_start(train, think):
    with TeacherServer(think, max_logprobs=20) as server:
        source, sets = ask(server)
        run = train(source, nproc=2, tp=2, sets=sets, check=False)
    told = "start it with a larger --max-logprobs, or set teachers.coder.server.top to less than 69"
    assert_clean_end(run, (f"teachers.coder.source: 'server:{server.url}'", told))


def test_what_needs_the_labels_probability(train, think, llama, tmp_path):
    """Token weighting, and an evaluation with the teacher's loss, are those of the model."""
    runs = []
    with TeacherServer(think) as server:
        source, sets = ask(server)
        for kind, own, more in (("served", source, sets), ("live", f"hf:{llama}", [])):
            file = tmp_path / f"{kind}.jsonl"
            more = [*more, "objective.confidence=label", f"evaluation.file={file}"]
            runs.append(train(own, "--eval-iters", "2", "--eval-interval", "4", sets=more))
    served, live = runs
    # A weight that is rounded otherwise moves what Adam makes of gradients near 0.
    assert_same(served, live, rel=2e-4)
    measured = [run.evaluations[:-1] for run in runs]  # the last is on the test data
    for found, expected in zip(*measured, strict=True):
        assert "teacher loss/code" in expected
        for name, value in expected.items():
            if name.startswith(("teacher", "kd", "lm")):
                assert found[name] == pytest.approx(value, rel=1e-4), name
