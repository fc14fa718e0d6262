"""Stores in the place of their teachers, through the real ``pretrain()``.

The text has documents of a sample's length. So a teacher that reads each sample reads what the
store's writer read, and with all ids stored the losses and gradients must be the same.
"""

import shutil
import subprocess
import sys

import pytest

from megatron_moe_inject.host import compat
from megatron_moe_inject.teachers.store.row_format import RowFormat
from tests.harness import lane
from tests.harness.corpus import write_corpora
from tests.harness.injection import OTHER, assert_clean_end, recipe_file
from tests.harness.material import SEQUENCE, make_material
from tests.harness.training_recipes import TOLD

TERMS = ("lm loss", "kd loss", "total loss", "kd loss/code", "steering loss", "grad norm")
END = "60"
STARTS = ("nproc", "check", "script", "env")
KILLED = (str(lane.HARNESS / "killed_gpt.py"),)
WHOLE = ("--top", "61", "--log-probs", "fp32")
TOKENIZER = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "61")
not_before_19 = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


@pytest.fixture(scope="module")
def blend(tmp_path_factory) -> tuple[str, ...]:
    """Flags of two corpora whose documents have a sample's length, an end included."""
    import numpy as np

    folder = tmp_path_factory.mktemp("documents")
    general, domain = write_corpora(folder, documents=400, length=SEQUENCE)
    for prefix in (general, domain):
        tokens = np.fromfile(f"{prefix}.bin", np.uint16).reshape(-1, SEQUENCE)
        tokens[:, -1] = int(END)
        tokens.tofile(f"{prefix}.bin")
    return ("--data-path", "0.4", general, "0.6", domain, "--split", "90,5,5", "--eod-mask-loss")


@pytest.fixture(scope="module")
def write(material, blend, tmp_path_factory):
    """Writes a store with more options and recipe overrides, by the command line; its folder."""

    def written(*options, sets=()):
        folder = tmp_path_factory.mktemp("stores") / "store"
        command = [sys.executable, "-m", "megatron_moe_inject.cli", "store-teacher"]
        command += [recipe_file(material, TOLD), "--output", str(folder), "--cpu", *options]
        command += ["--inject-set", *sets] if sets else []
        flags = [*blend[:-1], *TOKENIZER, "--seq-length", str(SEQUENCE)]
        run = subprocess.run(
            [*command, "--", *flags], capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stderr
        return folder, run.stdout

    return written


@pytest.fixture(scope="module")
def whole(write):
    return write(*WHOLE, "--shard-tokens", "2000")[0]


@pytest.fixture(scope="module")
def train(material, blend):
    """A run on the documents; of the live teacher unless a store is named."""

    def run(store=None, *extra, sets=(), of=material, goes_on=False, path=(), **how):
        starts = {name: how.pop(name) for name in list(how) if name in STARTS}
        overrides = [] if store is None else [f"teachers.coder.source=store:{store}"]
        overrides += sets
        ours = ["--inject-recipe", recipe_file(material, TOLD), "--inject-verify-frozen"]
        ours += ["--inject-set", *overrides] if overrides else []
        flags = of.flags(*ours, *blend, *extra, **how)
        if goes_on:
            fresh = ("--finetune", "--no-load-optim", "--no-load-rng")
            flags = [flag for flag in flags if flag not in fresh]
        return lane.run(flags, pythonpath=path, **starts)

    return run


@pytest.fixture(scope="module")
def live(train):
    return train()


@pytest.fixture(scope="module")
def stored(train, whole):
    return train(whole)


def assert_same(run, other, rel=2e-5):
    for term in TERMS:
        assert other.losses(term), term
        assert run.losses(term) == lane.approx(other.losses(term), rel=rel, abs=1e-7), term


def test_all_ids_of_a_store_are_its_teacher(live, stored):
    """Loss, gradient, and how sure it is of each token, which steering weighs by."""
    assert_same(stored, live)
    for shown in ("a store of GPTModel", "61 ids, fp32 log-probabilities"):
        assert shown in stored.output
    assert "12,400 tokens" in stored.output


@pytest.mark.parametrize(
    "layout",
    [
        dict(nproc=2, tp=2),
        dict(nproc=2, pp=2),
        pytest.param(dict(nproc=2, cp=2), marks=pytest.mark.slow),
        pytest.param(dict(nproc=2, ep=2), marks=pytest.mark.slow),
        pytest.param(dict(nproc=4, tp=2, pp=2), marks=pytest.mark.slow),
        pytest.param(dict(nproc=4, tp=2, cp=2), marks=pytest.mark.slow),
        pytest.param(
            dict(nproc=2, pp=2, extra=("--num-layers-per-virtual-pipeline-stage", "1")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tp2-sp", "pp2", "cp2", "ep2", "tp2-pp2", "tp2-cp2", "pp2-vpp2"],
)
def test_every_layout_reads_the_same(train, whole, stored, layout):
    """With context parallelism Megatron itself weighs the masked ends of documents by rank, so that
    a live teacher at the same layout is what it must equal."""
    extra = layout.pop("extra", ())
    other = train(None, *extra, **layout) if "cp" in layout else stored
    assert_same(train(whole, *extra, **layout), other)


@not_before_19
def test_longer_samples_of_another_order_read_the_same_store(train, whole):
    """Two documents to a sample, another seed and batch size; a model reads each document too."""
    flags = ("--dataloader-inter-document-masking", "--seq-length", str(2 * SEQUENCE))
    flags += ("--max-position-embeddings", str(2 * SEQUENCE), "--seed", "7")
    flags += ("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "3")
    assert_same(train(whole, *flags, nproc=2, tp=2), train(None, *flags))


@pytest.mark.slow
def test_a_run_goes_on_with_other_batches(train, whole, tmp_path):
    """A run that was stopped goes on at another batch size as with its live teacher."""
    begin = ("--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    train(whole, *begin)
    ends = []
    for store in (whole, None):
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{store is None}"))
        more = ("--load", str(folder), "--global-batch-size", "16", "--micro-batch-size", "4")
        ends.append(train(store, *more, nproc=2, ep=2))
    assert_same(*ends)


@pytest.mark.slow
def test_a_run_that_is_killed_within_a_step_goes_on(train, whole, stored, tmp_path):
    """``kill -9`` while rows are read; the store is as it was, and the curve goes on."""
    save = ("--save", str(tmp_path), "--save-interval", "1")
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    killed = train(whole, *save, check=False, script=KILLED, env={"TESTS_KILL_STEP": "2"})
    assert killed.returncode not in (0, 2)
    assert "Traceback" not in killed.output
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before
    on = train(whole, *save, "--load", str(tmp_path), goes_on=True)
    assert [step["iteration"] for step in on.iterations] == [3, 4]
    for term in TERMS:
        assert on.losses(term) == lane.approx(stored.losses(term)[2:], rel=1e-6), term


def test_some_ids_and_the_rest_say_less_than_all(train, write, live, tmp_path):
    """What is merged can only hide a difference; here 12 of 61 ids hide little."""
    folder, told = write("--top", "12")
    size = RowFormat(61, 12, "packed", 2).row_bytes(12)
    assert f"12 of 61 ids, packed log-probabilities, temperatures 1, 2: {size} bytes a tok" in told
    measured = [f"evaluation.file={tmp_path / 'evaluation.jsonl'}", "evaluation.gate=true"]
    run = train(folder, "--eval-iters", "2", "--eval-interval", "2", sets=measured)
    merged, all_ids = run.losses("kd loss/code")[0], live.losses("kd loss/code")[0]
    assert 0.6 * all_ids < merged < all_ids * 1.001
    assert "teacher gate: code: loss of teacher coder" in run.output
    renormalized = train(folder, sets=["teachers.coder.tail=renormalize"])
    assert renormalized.losses("kd loss/code")[0] != pytest.approx(merged, rel=1e-3)


def committee(llama, by):
    """Recipe overrides for a second teacher of another width."""
    return [
        f"teachers.prose.source=hf:{llama}",
        "domains.0.teacher={coder: 0.7, prose: 0.3}",
        f"domains.0.committee={by}",
    ]


def test_a_store_beside_a_model_is_the_live_committee(train, whole, llama):
    """Mixed by the label's probability, which weighs tokens as well."""
    sets = [*committee(llama, "label"), "objective.confidence=label", "objective.skip_worse=true"]
    assert_same(train(whole, nproc=2, tp=2, sets=sets), train(None, sets=sets))


def test_states_are_their_teacher(train, write):
    """What no store of ids can do: another temperature, confidence by entropy."""
    folder, told = write("--states", "native")
    assert "states of 48 float32, of 61 ids: 196 bytes a token" in told
    sets = ["objective.divergence=reverse_kl", "objective.confidence=entropy",
            "objective.temperature=3.0"]  # fmt: skip
    assert_same(train(folder, nproc=2, tp=2, sets=sets), train(None, sets=sets))


@pytest.mark.slow
def test_two_stores_and_a_model(train, write, whole, llama):
    """Stores of all ids of both are the committee, at any layout; of 12 of 61 ids near it, though
    of what the random one knows nearly half goes to the rest."""
    sets = committee(llama, "top")
    live = train(None, sets=sets)
    source = [f"teachers.coder.source=hf:{llama}"]
    other, _ = write(*WHOLE, sets=source)
    stored = [*sets, f"teachers.prose.source=store:{other}"]
    for layout in (dict(nproc=1), dict(nproc=2, cp=1, pp=2), dict(nproc=2, ep=2)):
        assert_same(train(whole, sets=stored, **layout), live)
    few, _ = write("--top", "12")
    few_other, _ = write("--top", "12", sets=source)
    merged = train(few, sets=[*sets, f"teachers.prose.source=store:{few_other}"])
    first, expected = merged.losses("kd loss/code")[0], live.losses("kd loss/code")[0]
    assert first == pytest.approx(expected, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_states_at_other_layouts(train, write, live, precision):
    folder, _ = write("--states", precision)
    exact = precision == "native"
    for layout in (dict(nproc=2, cp=2), dict(nproc=2, pp=2), dict(nproc=4, tp=2, pp=2)):
        other = train(None, **layout) if "cp" in layout else live
        run = train(folder, **layout)
        if exact:
            assert_same(run, other)
        else:
            first, expected = (r.losses("kd loss/code")[0] for r in (run, other))
            assert first == pytest.approx(expected, rel=2e-2)


@pytest.mark.slow
def test_drawn_ids_teach(train, write, live, tmp_path):
    """Their loss is the forward KL and the teacher's entropy, up to the noise of the draws; the
    same ids at every layout. The label's probability is known, how near it is to the student not.
    """
    folder, told = write("--draw", "400")
    assert "400 drawn ids at temperature 2" in told
    sets = ["teachers.coder.tail=sample", "objective.skip_worse=true"]
    measured = ("--eval-iters", "2", "--eval-interval", "2")
    gate = ["evaluation.gate=true", f"evaluation.file={tmp_path / 'evaluation.jsonl'}"]
    run = train(folder, *measured, sets=[*sets, *gate])
    assert "is a store of drawn ids" in run.output
    assert run.losses("kd loss/code")[0] > live.losses("kd loss/code")[0]
    assert_same(train(folder, nproc=2, tp=2, sets=sets), train(folder, sets=sets))
    known = train(None, sets=["objective.skip_worse=true"])
    assert run.losses("lm loss") == pytest.approx(known.losses("lm loss"), rel=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no other Megatron")
def test_the_other_version_reads_the_same(train, write, tmp_path):
    """A teacher that the other version saved, in a store that this one wrote; two stages."""
    old = make_material(tmp_path, (OTHER,))
    sets = [f"teachers.coder.source=megatron:{old.teacher}"]
    folder, _ = write(*WHOLE, sets=sets)
    stored = train(folder, nproc=2, pp=2, of=old, path=(OTHER,))
    assert_same(stored, train(None, sets=sets, of=old, path=(OTHER,)))


@pytest.mark.slow
def test_ids_by_mass_of_a_hugging_face_teacher(train, write, llama):
    sets = [f"teachers.coder.source=hf:{llama}"]
    folder, told = write("--top", "61", "--mass", "0.9", "--log-probs", "bf16", sets=sets)
    assert "at most 61 of 61 ids" in told
    run, other = train(folder), train(None, sets=sets)
    first, expected = run.losses("kd loss/code")[0], other.losses("kd loss/code")[0]
    assert 0.9 * expected < first < expected * 1.005
    assert_same(train(folder, nproc=2, tp=2), run)


@pytest.mark.slow
def test_a_sample_that_the_store_lacks_ends_the_run(train, write):
    folder, _ = write("--top", "4", "--documents", "0:60")
    run = train(folder, check=False)
    lacks = "of domain: it has documents 0 to 59 of 400; store the whole data set"
    assert_clean_end(run, ("teachers.coder.source: 'store:", "says nothing about token", lacks))


def test_another_text_than_the_stores_is_noticed(train, whole, blend, tmp_path):
    """Of the same lengths, so that only the tokens themselves differ."""
    for end in (".bin", ".idx"):
        for entry, name in ((blend[2], "general"), (blend[4], "domain")):
            shutil.copy(f"{entry}{end}", tmp_path / f"{name}{end}")
    content = bytearray((tmp_path / "domain.bin").read_bytes())
    for place in range(0, len(content), 2 * SEQUENCE):
        content[place + 10] = (content[place + 10] + 1) % 60
    (tmp_path / "domain.bin").write_bytes(content)
    data = ("--data-path", "0.4", str(tmp_path / "general"), "0.6", str(tmp_path / "domain"))
    run = train(whole, *data, check=False)
    assert_clean_end(run, ("says nothing about", "it is about another version of domain"))


def test_a_mistake_is_one_message_at_start(train, whole):
    run = train(whole, sets=["domains.0.data=[0]"], nproc=2, tp=2, check=False)
    told = "general, the text of its domain; it is about domain"
    assert_clean_end(run, ("says nothing about", told))


@pytest.mark.slow
def test_a_changed_store_ends_the_run(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "store")
    for path in folder.glob("data0-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 4 :: 97] = bytes(len(content[len(content) // 4 :: 97]))
        path.write_bytes(content)
    run = train(folder, check=False)
    assert_clean_end(run, ("teachers.coder.source: 'store:", "was changed or is damaged in rows"))
