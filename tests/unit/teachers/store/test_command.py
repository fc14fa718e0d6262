"""``moe-inject store-teacher`` with a Hugging Face teacher, in this process."""

import re
import shutil

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_inject import cli
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.teachers.store.manifest import read_manifest
from megatron_moe_inject.teachers.store.part import checked_stores
from megatron_moe_inject.teachers.store.reader import Store
from tests.harness.llama_and_texts import llama_and_texts

transformers = pytest.importorskip("transformers")

RECIPE = """
domains:
  - {{name: code, data: [1], teacher: {teacher}, experts: {{layers: {{1: [0]}}}}}}
teachers:
  coder: {{source: "{source}", temperature: 2.0}}
objective: {{alpha: 0.5}}
"""
VOCABULARY = 61


def failure(problem, remedy):
    return fail("store", "s", problem, remedy)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Llama, a recipe, and two data sets of 30 documents."""
    folder = tmp_path_factory.mktemp("material")
    llama_and_texts(folder, 64, VOCABULARY)
    text = RECIPE.format(source=f"hf:{folder / 'llama'}", teacher="coder")
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture
def store_teacher(material, capsys):
    """Runs the command; its exit status and what it printed."""

    def run(output, *options, flags=(), recipe="recipe.yaml"):
        data = ["--data-path", "1", str(material / "general"), "1", str(material / "code")]
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)]
        ours = ["store-teacher", str(material / recipe), "--output", str(output), "--cpu"]
        behind = ["--", *data, *tokenizer, "--split", "1,0,0", "--seq-length", "32", *flags]
        status = cli.main([*ours, *options, *behind])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def logits_of(material, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(material / "llama"))
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0, :, :VOCABULARY].float()


def test_what_it_writes_is_what_the_model_says(store_teacher, material, tmp_path):
    status, told = store_teacher(tmp_path / "store", "--top", "8", "--log-probs", "fp32")
    assert status == 0, told
    store = Store(tmp_path / "store", failure)
    plan = store.manifest.plan
    size = plan.row_format.row_bytes(8)
    assert f"8 of 61 ids, fp32 log-probabilities, temperatures 1, 2: {size} bytes a token" in told
    assert f"store:{tmp_path / 'store'}" in told
    assert (plan.context, plan.overlap, plan.temperatures) == (32, 8, [1.0, 2.0])
    assert list(plan.teacher.weights) == ["config.json", "generation_config.json", "model.safetens"
                                          "ors"]  # fmt: skip
    assert [data.name for data in plan.data] == ["code"]
    text = np.fromfile(material / "code.bin", np.uint16).astype(np.int64)
    data = IndexedDataset(str(material / "code"))  # whose views end with it
    lengths = np.array(data.sequence_lengths)
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts, lengths, strict=True):
        if not 2 <= length <= 33:
            continue
        content, counts = store.read(0, np.arange(start, start + length))
        assert (counts == [8] * (length - 1) + [0]).all()
        rows = plan.row_format.decode(torch.from_numpy(content), torch.from_numpy(counts))
        expected = logits_of(material, text[start : start + length - 1]).log_softmax(-1)
        found = rows.at(0, 1.0)[:-1]
        top = expected.topk(8).indices.sort().values
        assert torch.equal(rows.ids[:-1], top)
        torch.testing.assert_close(found, expected.gather(1, top), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [("--top", "4"), ("--draw", "6"), ("--states", "fp8")])
def test_it_goes_on_and_parts_make_the_same(store_teacher, tmp_path, kind):
    options = (*kind, "--shard-tokens", "300")
    assert store_teacher(tmp_path / "one", *options)[0] == 0
    status, told = store_teacher(tmp_path / "two", *options, "--part", "1/2")
    assert status == 0
    assert "3 shards are left to other processes" in told
    status, told = store_teacher(tmp_path / "two", *options, "--part", "0/2")
    assert "2 shards are there already" in told
    assert "bytes a token" in told
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) > 4
    assert ("head.safetensors" in names) == ("--states" in kind)
    for name in names:
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same, name
    for path in (tmp_path / "two").glob("data0-000001*"):
        path.unlink()
    (tmp_path / "two" / "manifest.json").unlink()
    assert store_teacher(tmp_path / "two", *options)[0] == 0
    for name in names:
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same, name


def test_states_are_the_models(store_teacher, material, tmp_path):
    """As they are bit by bit, and in eight bits as near as the command says."""
    from megatron_moe_inject.losses.spec import LogitTransform
    from megatron_moe_inject.teachers.store.head import read_head

    distances = []
    for precision in ("native", "fp8"):
        folder = tmp_path / precision
        status, told = store_teacher(folder, "--states", precision, "--verify", "10")
        assert status == 0, told
        store = Store(folder, failure)
        manifest, layout = store.manifest, store.layout
        kind = "fp8" if precision == "fp8" else "float32"
        assert f"states of 16 {kind}, of 61 ids: {layout.widest} bytes a token" in told
        found = re.search(
            r"the store is (\S+) nats from the teacher in the mean, (\S+) at most", told
        )
        distances.append(float(found[2]))
    assert distances[0] < 1e-6 < distances[1] < 1e-2
    head, transform = read_head(
        folder, manifest.head_sha256, (61, 16), torch.float32, slice(0, 61), failure
    )
    assert transform == LogitTransform()
    text = np.fromfile(material / "code.bin", np.uint16).astype(np.int64)
    index = IndexedDataset(str(material / "code"))  # whose views end with it
    lengths = np.array(index.sequence_lengths)
    start = int((np.cumsum(lengths) - lengths)[lengths >= 20][0])
    store = Store(tmp_path / "native", failure)
    content, _ = store.read(0, np.arange(start, start + 19))
    states = store.layout.states(torch.from_numpy(content))
    expected = logits_of(material, text[start : start + 19])
    torch.testing.assert_close(states @ head.t(), expected, rtol=1e-4, atol=1e-5)


def test_drawn_ids_are_the_models(store_teacher, material, tmp_path):
    status, told = store_teacher(tmp_path / "store", "--draw", "400")
    assert status == 0, told
    assert "400 drawn ids at temperature 2, of 61 ids: at most" in told
    store = Store(tmp_path / "store", failure)
    text = np.fromfile(material / "code.bin", np.uint16).astype(np.int64)
    index = IndexedDataset(str(material / "code"))  # whose views end with it
    lengths = np.array(index.sequence_lengths)
    start = int((np.cumsum(lengths) - lengths)[lengths >= 20][0])
    content, counts = store.read(0, np.arange(start, start + 19))
    rows = store.layout.decode(torch.from_numpy(content), torch.from_numpy(counts))
    logits = logits_of(material, text[start : start + 19])
    shares = torch.zeros(19, 62).scatter_(
        1, rows.ids.where(rows.ids >= 0, 61), rows.log_probs.exp()
    )[:, :61]
    # One draw from each of 400 parts: off by less than one draw on either side.
    assert ((shares - (logits / 2.0).softmax(-1)).abs() < 2 / 400).all()
    label = logits.log_softmax(-1)[range(19), text[start + 1 : start + 20]]
    torch.testing.assert_close(rows.label, label, rtol=1e-3, atol=1e-3)


def test_a_store_that_is_signed_is_taken_by_who_trusts_its_signer(store_teacher, tmp_path):
    pytest.importorskip("cryptography")
    from tests.harness.stores import key_file

    key = str(key_file(tmp_path))
    status, told = store_teacher(tmp_path / "store", "--top", "4", "--sign", key)
    assert status == 0, told
    signer = told.partition("teachers.coder.trusted: [")[2].partition("]")[0]
    assert read_manifest(tmp_path / "store", failure, [signer], "key").rows
    text = RECIPE.format(source=f"store:{tmp_path / 'store'}", teacher="coder")
    recipe = recipe_from_yaml(text.replace("temperature: 2.0", f"trusted: ['{signer}']"))
    assert checked_stores(recipe).keys() == {"coder"}
    (tmp_path / "store" / "manifest.sig").unlink()
    with pytest.raises(ValueError, match=r"is not signed, and teachers.coder.trusted names who"):
        checked_stores(recipe)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        (("--top", "0"), (), "--top: 0 is not positive; write 1 or more"),
        (("--mass", "1.0"), (), "--mass: 1.0 is not in (0, 1); write such as 0.99"),
        (("--overlap", "32"), (), "--overlap: 32 is not in [0, 32)"),
        (("--temperatures", "0"), (), "--temperatures: 0.0 is not positive"),
        (("--documents", "3"), (), "--documents: '3' is no range; write such as 0:1000"),
        (("--documents", "5:31"), (), "--documents: '5:31' are not among the 30 of"),
        (("--part", "2/2"), (), "--part: '2/2' is no part; write 0/4 to 3/4"),
        (("--draw", "4", "--mass", "0.5"), (), "--mass: 0.5 is of the most likely ids, and --draw"),
        (("--states", "--log-probs", "bf16"), (), "--log-probs: 'bf16' is of the most likely ids"),
        (("--draw", "4", "--verify", "2"), (), "--verify: 2 compares probabilities, which drawn"),
        (("--draw", "4", "--temperatures", "1", "2"), (), "--temperatures: [1.0, 2.0] are several"),
        (("--teacher", "codr"), (), "--teacher: 'codr' is not in 'teachers'; did you mean coder?"),
        (("--sign", "/none"), (), "--sign"),
        ((), ("--context-x", "3"), "store-teacher: --context-x, 3: no flags of Megatron's"),
        ((), ("--vocab-size", "70"), "has another vocabulary: "),
        ((), ("--vocab-size", "60"), "--data-path: "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(store_teacher, tmp_path, options, flags, message):
    status, told = store_teacher(tmp_path / "store", *options, flags=flags)
    assert status == 2
    assert message in told
    assert len([line for line in told.splitlines() if line.startswith("moe-inject: ")]) == 1


def test_data_that_is_none(store_teacher, material, tmp_path):
    flags = ("--data-path", str(material / "general"), str(tmp_path / "nothing"))
    status, told = store_teacher(tmp_path / "store", flags=flags)
    assert status == 2
    assert "nothing' is no data set of Megatron's" in told


def test_a_store_is_no_teacher_of_another(store_teacher, material, tmp_path):
    text = RECIPE.format(source=f"store:{tmp_path}", teacher="coder")
    (material / "other.yaml").write_text(text)
    status, told = store_teacher(tmp_path / "store", recipe="other.yaml")
    assert status == 2
    assert re.search(r"teachers.coder.source: 'store:.* runs no model; name the model", told)


def test_without_flags_there_is_no_data(material, capsys, tmp_path):
    status = cli.main(["store-teacher", str(material / "recipe.yaml"), "--output", str(tmp_path)])
    assert status == 2
    assert "put -- and Megatron's flags for the data" in capsys.readouterr().err


def test_another_store_stays_as_it_is(store_teacher, tmp_path):
    store_teacher(tmp_path / "store", "--top", "4")
    kept = shutil.copytree(tmp_path / "store", tmp_path / "kept")
    status, told = store_teacher(tmp_path / "store", "--top", "5")
    assert status == 2
    assert "is a store with other settings: slots is 4 there and 5 now" in told
    for path in kept.iterdir():
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), ("bf16", 1e-3), ("packed", 2e-2)])
@pytest.mark.parametrize("mass", [(), ("--mass", "0.5")])
def test_a_store_is_held_against_its_teacher(store_teacher, tmp_path, precision, most, mass):
    options = ("--top", "16", "--log-probs", precision, *mass)
    status, told = store_teacher(tmp_path / "store", *options, "--verify", "12")
    assert status == 0, told
    found = re.search(
        r"verified: 12 documents, [\d,]+ tokens: the store is (\S+) nats from the teacher in the "
        r"mean, (\S+) at most; the teacher from itself (\S+) and (\S+);",
        told,
    )
    mean, largest, itself, itself_most = (float(number) for number in found.groups())
    assert -1e-7 <= mean <= largest < most
    assert itself <= itself_most < 1e-6
    assert precision == "fp32" or mean > 10 * abs(itself)
    same = float(re.search(r"the same at (\S+) % of the tokens", told)[1])
    assert same == 100 if precision == "fp32" else same > 20  # it is a flat, random model


def test_a_store_of_another_teacher_is_seen(store_teacher, material, tmp_path):
    """As if somebody had exchanged the teacher behind its name."""
    from megatron_moe_inject.teachers.store import job

    assert store_teacher(tmp_path / "store", "--top", "16")[0] == 0
    stock = job.load_teacher

    def other(*args, **kwargs):
        teacher = stock(*args, **kwargs)
        teacher._head = teacher._head.roll(1, 0)
        return teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_teacher", other)
        told = store_teacher(tmp_path / "store", "--top", "16", "--verify", "5")[1]
    mean = float(re.search(r"the store is (\S+) nats", told)[1])
    assert mean > 1e-4
    assert "the same at 100.00 %" not in told
