"""A dense checkpoint as a mixture of experts: the same function through Megatron, at any layout."""

import math
import re
import shutil

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness.checkpoints import whole
from tests.harness.dense_models import KINDS, MOE, dense_of, run_with_logits, start_at
from tests.harness.injection import OTHER

EXPERTS = "decoder.layers.mlp.experts.experts"


@pytest.fixture(scope="module")
def dense(material, tmp_path_factory):
    """A dense model by its kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return lambda kind: dense_of(material, kind, folders[kind])


def upcycled(capsys, dense, output, *options):
    """The command, and the flags that it says."""
    assert main(["upcycle", str(dense.folder), "--output", str(output), *options]) == 0
    said = capsys.readouterr().out
    return re.search(r"^pass (.*) from now on$", said, re.MULTILINE)[1].split()


CASES = [
    pytest.param("gated", ("--experts", "8", "--granularity", "2"), {"ep": 2}, id="parts-ep2"),
    pytest.param("gated", ("--experts", "4", "--layers", "1,3"), {"pp": 2}, id="some-layers-pp2"),
    pytest.param("gated", ("--experts", "4"), {"tp": 2}, id="copies-tp2"),
    pytest.param("biases", ("--experts", "4"), {"ep": 2}, id="copies-with-biases-ep2"),
    *(
        pytest.param(kind, ("--experts", "8", "--granularity", "4"), {}, marks=pytest.mark.slow)
        for kind in KINDS
    ),
]


@pytest.mark.parametrize(("kind", "options", "layout"), CASES)
def test_what_was_dense_computes_the_same(material, dense, tmp_path, capsys, kind, options, layout):
    asked = upcycled(capsys, dense(kind), tmp_path / "moe", *options)
    run = run_with_logits(
        *(material, tmp_path / "l", kind, *start_at(tmp_path / "moe"), *MOE, *asked),
        nproc=math.prod(layout.values()), then="train", **layout,
    )  # fmt: skip
    after = torch.load(tmp_path / "l" / "megatron_logits.pt")
    torch.testing.assert_close(after, dense(kind).logits, rtol=0, atol=2e-6)
    assert len(run.iterations) == 2, "and it trains"


SIGMOID = ("--moe-router-score-function", "sigmoid")


@pytest.mark.slow
def test_gates_of_sigmoids_sum_to_one_too(material, dense, tmp_path, capsys):
    options = ("--experts", "8", "--granularity", "2")
    asked = upcycled(capsys, dense("gated"), tmp_path / "moe", *options)
    start = start_at(tmp_path / "moe")
    for name, flags, same in (
        ("sigmoid", SIGMOID, True),
        ("scaled", (*SIGMOID, "--moe-router-topk-scaling-factor", "2.5"), False),
        ("before", ("--moe-router-pre-softmax",), False),
    ):
        folder = tmp_path / name
        run_with_logits(material, folder, "gated", *start, *MOE, *asked, *flags, then="end")
        after = torch.load(folder / "megatron_logits.pt")
        near = torch.allclose(after, dense("gated").logits, rtol=0, atol=2e-6)
        assert near == same, name


@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron")
@pytest.mark.slow
def test_the_other_megatron_reads_it(material, dense, tmp_path, capsys):
    asked = upcycled(capsys, dense("gated"), tmp_path / "moe", "--experts", "4")
    start = start_at(tmp_path / "moe")
    run_with_logits(
        *(material, tmp_path / "l", "gated", *start, *MOE, *asked), then="end", pythonpath=[OTHER]
    )
    after = torch.load(tmp_path / "l" / "megatron_logits.pt")
    torch.testing.assert_close(after, dense("gated").logits, rtol=0, atol=2e-6)


def test_copies_share_bytes_and_rows_differ(dense, tmp_path, capsys):
    upcycled(capsys, dense("gated"), tmp_path / "moe", "--experts", "8", "--granularity", "2")
    checkpoint = CheckpointPlace("CKPT", tmp_path / "moe").open()
    stored = checkpoint.metadata.storage_data
    places = [
        (info.relative_path, info.offset)
        for part, info in stored.items()
        if part.fqn == f"{EXPERTS}.linear_fc1.weight"
    ]
    assert (len(places), len(set(places))) == (4 * 8, 4 * 2)
    rows = whole(checkpoint, "decoder.layers.mlp.router.weight")
    assert torch.equal(rows[:, 0::2], rows[:, 1::2])
    assert rows.unique(dim=1).shape[1] == 4
    assert 0.01 < float(rows.std()) < 0.03


def test_noise_tells_copies_apart(dense, tmp_path, capsys):
    base = CheckpointPlace("CKPT", dense("gated").folder).open()
    before = whole(base, "decoder.layers.mlp.linear_fc2.weight")
    upcycled(capsys, dense("gated"), tmp_path / "moe", "--experts", "4", "--noise", "0.01")
    checkpoint = CheckpointPlace("CKPT", tmp_path / "moe").open()
    after = whole(checkpoint, f"{EXPERTS}.linear_fc2.weight")
    noise = after - before.unsqueeze(1)
    assert (
        noise.std(dim=(2, 3)).div(before.std(dim=(1, 2)).unsqueeze(1)).sub(0.01).abs().max() < 1e-3
    )
    assert noise.flatten(2).unique(dim=1).shape[1] == 4


MISTAKES = [
    (("--experts", "5", "--granularity", "2"), "--experts: 5 is no two or more copies of 2"),
    (("--experts", "1"), "--experts: 1 is no two or more copies"),
    (("--experts", "4", "--topk", "5"), "--topk: 5 takes no whole copies"),
    (("--experts", "8", "--granularity", "2", "--topk", "3"), "--topk: 3 takes no whole copies"),
    (("--experts", "6", "--granularity", "3"), "--granularity: 3 does not divide the width 64"),
    (("--experts", "4", "--layers", "2-4"), "--layers: 4 is not in the model; its last is 3"),
    (("--experts", "4", "--noise", "-1"), "--noise: -1.0 is negative"),
    (("--experts", "4", "--noise", "nan"), "--noise: nan is not finite"),
    (("--experts", "4", "--noise", "inf"), "--noise: inf is not finite"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_named(dense, tmp_path, capsys, options, message):
    command = ["upcycle", str(dense("gated").folder), "--output", str(tmp_path / "moe")]
    assert main([*command, *options]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_more_routers_than_the_disk_holds_are_refused(dense, tmp_path, capsys, monkeypatch):
    free = 40 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    output = tmp_path / "moe"
    command = ["upcycle", str(dense("gated").folder), "--output", str(output)]
    assert main([*command, "--experts", "100000"]) != 0
    assert f"--output: '{output}' needs 49.0 MiB" in capsys.readouterr().err
    assert not output.exists()


def test_what_has_experts_is_refused(material, tmp_path, capsys):
    command = ["upcycle", material.student, "--output", str(tmp_path / "m"), "--experts", "4"]
    assert main(command) != 0
    assert "has 4 experts in a layer already; name a dense model's" in capsys.readouterr().err
