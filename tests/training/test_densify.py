"""Experts as one dense feed-forward, through Megatron: exact where no gate makes a difference."""

import math
import re

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.torch_dist_copy import rewritten_copy
from tests.harness import lane
from tests.harness.checkpoints import SAVE, TRACKER
from tests.harness.dense_models import (
    KINDS,
    LOGITS,
    MOE,
    SIZES,
    dense_of,
    run_with_logits,
    start_at,
)
from tests.harness.injection import OTHER

ONE_EXPERT = ("--num-experts", "1", "--moe-router-topk", "1", "--moe-router-pre-softmax")
SHARED = (*lane.MOE, "--moe-shared-expert-intermediate-size", "48")


@pytest.fixture(scope="module")
def dense(material, tmp_path_factory):
    """A dense model by its kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return lambda kind: dense_of(material, kind, folders[kind])


def densified(capsys, base, output, width, *options):
    """The command, and the flags that it says."""
    command = ["densify", str(base), "--output", str(output), "--ffn-hidden-size", str(width)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    return re.search(r"^pass (.*) from now on", said, re.MULTILINE)[1].split()


CASES = [
    pytest.param("gated", ("--experts", "8", "--granularity", "2"), 64, {"tp": 2}, id="parts-tp2"),
    pytest.param(
        "gated", ("--experts", "4", "--layers", "1,3"), 80, {"pp": 2}, id="some-layers-wider-pp2"
    ),
    pytest.param(
        "biases", ("--experts", "4", "--topk", "4"), 64, {"tp": 2}, id="biases-all-chosen-tp2"
    ),
    pytest.param("biases", ("--experts", "4"), 128, {}, id="two-copies", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("method", ["concatenate", "merge"])
@pytest.mark.parametrize(("kind", "options", "width", "layout"), CASES)
def test_back_from_copies_is_the_dense_model(
    material, dense, tmp_path, capsys, kind, options, width, layout, method
):
    upcycle = ["upcycle", str(dense(kind).folder), "--output", str(tmp_path / "moe"), *options]
    assert main(upcycle) == 0
    capsys.readouterr()
    asked = densified(capsys, tmp_path / "moe", tmp_path / "d", width, "--method", method)
    run = run_with_logits(
        *(material, tmp_path / "l", kind, *start_at(tmp_path / "d"), *asked),
        nproc=math.prod(layout.values()), then="train", **layout,
    )  # fmt: skip
    after = torch.load(tmp_path / "l" / "megatron_logits.pt")
    torch.testing.assert_close(after, dense(kind).logits, rtol=0, atol=2e-6)
    assert len(run.iterations) == 2, "and it trains"


def trained(material, folder, *model, nproc=1, **layout):
    """Train a model with experts for a moment; its logits of fixed tokens."""
    run_with_logits(
        *(material, folder, "gated", *MOE, *model, *SAVE, str(folder / "model")),
        nproc=nproc, then="again", **layout,
    )  # fmt: skip
    return torch.load(folder / "megatron_logits_after.pt")


def test_one_expert_is_its_feed_forward(material, tmp_path, capsys):
    before = trained(material, tmp_path / "moe", *ONE_EXPERT)
    asked = densified(capsys, tmp_path / "moe" / "model", tmp_path / "d", 64)
    run_with_logits(
        *(material, tmp_path / "l", "gated", *start_at(tmp_path / "d"), *asked),
        nproc=2, pp=2, then="end",
    )  # fmt: skip
    after = torch.load(tmp_path / "l" / "megatron_logits.pt")
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def hybrid(material, folder, pattern, *extra, nproc=1, then="end", **layout):
    """A hybrid model's logits of fixed tokens."""
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(torch.randint(61, (4, 32)), folder / "tokens.pt")
    sizes = SIZES[SIZES.index("--tokenizer-type") :]
    model = [f for f in lane.dense() if f != "--mock-data"]
    at = model.index("--num-layers")
    data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "2")
    lane.run(
        [
            *model[:at], *model[at + 2 :], *lane.layout(**layout), *sizes,
            *("--hybrid-layer-pattern", pattern), *data, *extra,
        ],
        nproc=nproc, script=LOGITS, env={"LOGITS": str(folder), "LOGITS_THEN": then},
    )  # fmt: skip
    name = "megatron_logits_after.pt" if then == "again" else "megatron_logits.pt"
    return torch.load(folder / name)


def test_layers_of_a_hybrid_model_become_dense_ones(material, tmp_path, capsys):
    before = hybrid(
        material, tmp_path / "moe", "*E*-", *MOE, *ONE_EXPERT, *SAVE, str(tmp_path / "m"),
        then="again",
    )  # fmt: skip
    asked = densified(capsys, tmp_path / "m", tmp_path / "d", 64)
    assert asked[-2:] == ["--hybrid-layer-pattern", "'*-*-'"]
    start = start_at(tmp_path / "d")
    after = hybrid(material, tmp_path / "l", "*-*-", *start, nproc=2, tp=2)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_a_shared_expert_alone(material, tmp_path, capsys):
    """Experts that give nothing, beside a shared one, saved at EP 2."""
    folder = tmp_path / "moe"
    trained(material, folder, *SHARED, nproc=2, ep=2)
    checkpoint = CheckpointPlace("CKPT", folder / "model").open()

    def nothing(begin, part):
        part.zero_()
        return True

    silent = tmp_path / "silent"
    silent.mkdir()
    (silent / TRACKER).write_text((folder / "model" / TRACKER).read_text())
    second = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    copied = silent / checkpoint.folder.name
    rewritten_copy(checkpoint, copied, {second: nothing}, lambda items, total: items)
    run_with_logits(
        *(material, tmp_path / "s", "gated", *MOE, *SHARED, *start_at(silent)), then="end"
    )
    before = torch.load(tmp_path / "s" / "megatron_logits.pt")
    for width in (48, 48 + 64 + 8):
        output = tmp_path / f"d{width}"
        asked = densified(capsys, silent, output, width)
        run_with_logits(
            *(material, tmp_path / f"l{width}", "gated", *start_at(output), *asked),
            nproc=2, tp=2, then="end",
        )  # fmt: skip
        after = torch.load(tmp_path / f"l{width}" / "megatron_logits.pt")
        torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron")
@pytest.mark.slow
def test_the_other_megatron_reads_it(material, tmp_path, capsys):
    before = trained(material, tmp_path / "moe", *ONE_EXPERT)
    asked = densified(capsys, tmp_path / "moe" / "model", tmp_path / "d", 64)
    run_with_logits(
        *(material, tmp_path / "l", "gated", *start_at(tmp_path / "d"), *asked),
        then="end", pythonpath=[OTHER],
    )  # fmt: skip
    after = torch.load(tmp_path / "l" / "megatron_logits.pt")
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_what_is_dense_is_refused(dense, tmp_path, capsys):
    command = ["densify", str(dense("gated").folder), "--output", str(tmp_path / "d")]
    assert main([*command, "--ffn-hidden-size", "64"]) != 0
    assert "has no experts; name a mixture of experts" in capsys.readouterr().err
