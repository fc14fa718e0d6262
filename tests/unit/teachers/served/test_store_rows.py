"""``moe-inject store-teacher`` of a server: the store that its model writes of itself."""

import numpy as np
import pytest
import torch

from megatron_moe_inject import cli
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.teachers.store.reader import Store
from tests.harness.llama_and_texts import llama_and_texts
from tests.harness.teacher_server import TeacherServer, thinker

transformers = pytest.importorskip("transformers")

VOCABULARY, ROWS = 61, 64
RECIPE = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{1: [0]}}}}}}
teachers:
  coder: {{source: "{source}", server: {{concurrent: 3, patience: 3}}}}
objective: {{alpha: 0.5}}
"""


def failure(problem, remedy):
    return fail("store", "s", problem, remedy)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Llama with rows beyond the student's ids, and two data sets of 30 documents."""
    folder = tmp_path_factory.mktemp("material")
    llama_and_texts(folder, ROWS, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def think(material):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(material / "llama"))
    return thinker(model.eval())


@pytest.fixture
def store_teacher(material, capsys, tmp_path):
    """Runs the command; its exit status and what it printed."""

    def run(source, output, *options):
        recipe = tmp_path / "recipe.yaml"
        text = RECIPE.format(source=source)
        recipe.write_text(text if source.startswith("server") else text.replace(
            ", server: {concurrent: 3, patience: 3}", ""))  # fmt: skip
        data = ["--data-path", "1", str(material / "general"), "1", str(material / "code")]
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)]
        ours = ["store-teacher", str(recipe), "--output", str(output), *options]
        status = cli.main(
            [*ours, "--", *data, *tokenizer, "--split", "1,0,0", "--seq-length", "32"]
        )
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def rows_of(folder, material):
    store = Store(folder, failure)
    tokens = np.fromfile(material / "code.bin", np.uint16)
    content, counts = store.read(0, np.arange(len(tokens)))
    rows = store.manifest.plan.row_format.decode(
        torch.from_numpy(content), torch.from_numpy(counts)
    )
    return rows, counts, store.manifest.plan


@pytest.mark.parametrize("options", [("--top", "64"), ("--top", "8"), ("--mass", "0.5")])
def test_it_is_the_store_of_the_model(store_teacher, material, think, tmp_path, options):
    """Documents longer than what is read at once too; with all ids, also at other temperatures."""
    options = (*options, "--log-probs", "fp32")
    whole = "64" in options
    temperatures = ("--temperatures", "1", "2") if whole else ()
    with TeacherServer(think) as server:
        # Of 64 rows three are beyond the student's: with all of them the others are exact.
        status, told = store_teacher(
            f"server:{server.url}", tmp_path / "served", *options, *temperatures
        )
        assert status == 0, told
        assert f"teacher coder: tiny (/models/tiny) at {server.url}, vLLM 0.33.0" in told
        assert server.together > 1
    status, told = store_teacher(
        f"hf:{material / 'llama'}", tmp_path / "live", "--cpu", *options, *temperatures
    )
    assert status == 0, told
    (served, counts, plan), (live, expected, _) = (
        rows_of(tmp_path / name, material) for name in ("served", "live")
    )
    assert plan.teacher.architecture == "tiny of vllm"
    assert (counts > 0).tolist() == (expected > 0).tolist()
    if whole:
        assert torch.equal(served.ids, live.ids)
        for place, temperature in enumerate((1.0, 2.0)):
            torch.testing.assert_close(
                served.at(place, temperature), live.at(place, temperature), rtol=1e-4, atol=1e-5
            )
        return
    # Fewer ids than rows: three that no student has may be among them, and leave a slot empty.
    both = (served.ids[:, :, None] == live.ids[:, None, :]) & (served.ids[:, :, None] >= 0)
    assert both.any(2).sum() > 0.8 * (live.ids >= 0).sum()
    n, a, b = both.nonzero(as_tuple=True)
    gap = served.log_probs[n, a] - live.log_probs[n, b]
    assert gap.abs().max() < 0.2


def test_servers_that_fail_leave_what_is_written(store_teacher, think, tmp_path):
    fault = {"from": 30}
    with TeacherServer(think, faults=lambda n: "500" if n >= fault["from"] else None) as server:
        options = ("--top", "4", "--shard-tokens", "200")
        status, told = store_teacher(f"server:{server.url}", tmp_path / "store", *options)
        assert status == 2
        assert "HTTP 500: as the test asks: 500; see to the servers; the same command" in told
        there = len(list((tmp_path / "store").glob("data0-*.safetensors")))
        assert there
        fault["from"] = 1 << 30
        status, told = store_teacher(f"server:{server.url}", tmp_path / "store", *options)
        assert status == 0, told
        assert f"{there} shards are there already" in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--temperatures", "2"), "--temperatures: 2.0 cannot be had from 5 ids at temperature 1"),
        (("--verify", "3"), "--verify: 3 runs a teacher again, and this one is served; leave it"),
    ],
)
def test_what_servers_cannot_say(store_teacher, think, tmp_path, options, says):
    with TeacherServer(think) as server:
        status, told = store_teacher(
            f"server:{server.url}", tmp_path / "store", "--top", "5", *options
        )
    assert status == 2
    assert says in told
