"""``merge-adapters``: W + s B A of every matrix, rounded once, as a stock checkpoint."""

import math
from argparse import Namespace
from fractions import Fraction

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.low_rank import Product, Rounding, merge, rounded
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from tests.harness.checkpoints import TRACKER, whole
from tests.harness.stored_adapters import entry, factor_name, opened, write_adapters

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
ALONE = "decoder.layers.1.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
SHAPES = {
    FC1: (2, 3, 8, 6),
    QKV: (2, 10, 6),
    ALONE: (6, 4),
    NORM: (6,),
    EMBEDDING: (16, 6),
    HEAD: (16, 6),
}
ENTRIES = [entry(2, 8.0), entry(3, 3.0, "rslora")]
SITES = {(FC1, (0, 1)): [0], (FC1, (1, 2)): [0, 1], (QKV, (1,)): [1], (ALONE, ()): [0]}
IDS = [3, 0, 15]


def write_base(folder, dtype=torch.float32):
    torch.manual_seed(0)
    with CheckpointWriter(folder / "release", chunk_bytes=64) as writer:
        for name, shape in SHAPES.items():
            writer.tensor([name], shape, (), torch.randn(shape).to(dtype))
        writer.finish({"args": Namespace(num_layers=2), "iteration": 0})
    (folder / TRACKER).write_text("release")
    return folder


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    return write_base(tmp_path / "base")


def merged(trained, output):
    return main(["merge-adapters", "--trained", str(trained), "--output", str(output)])


def exact(base, added, name):
    """A merged tensor in fp64, by the definition alone."""
    value = whole(opened(base), name).double()
    for site, numbers in SITES.items():
        for number in numbers if site[0] == name else ():
            a, b = (added[factor_name(site, factor, number)].double() for factor in "ab")
            value[site[1]] += ENTRIES[number]["scale"] * (b @ a)
    rows = added.get(f"{name.removesuffix('.weight')}.inject_vocabulary_rows")
    if rows is not None:
        value[IDS] = rows.double()
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_merged_and_rounded_once(tmp_path, capsys, dtype):
    (tmp_path / "base").mkdir()
    base = write_base(tmp_path / "base", dtype)
    added = write_adapters(base, tmp_path / "trained", SITES, ENTRIES, ids=IDS)
    assert merged(tmp_path / "trained", tmp_path / "out") == 0
    out = opened(tmp_path / "out")
    assert out.folder.name == "iter_0000020"
    assert (tmp_path / "out" / TRACKER).read_text() == "20"
    assert set(out.tensors) == set(SHAPES), "no tensor of the plugin is left"
    assert not [name for name in out.metadata.state_dict_metadata if "inject" in name]
    for name in SHAPES:
        value = whole(out, name)
        assert value.dtype == dtype
        assert torch.equal(value, rounded(exact(base, added, name), dtype)), name
    assert torch.equal(whole(out, NORM), whole(opened(base), NORM))
    arguments = vars(out.args)
    assert arguments["num_layers"] == 2
    assert not [name for name in arguments if name.startswith("inject")]
    assert "optimizer" not in out.common
    text = capsys.readouterr().out
    assert "adapters merged into 6 matrices" in text
    components = [line.split()[0] for line in text.splitlines()]
    assert components[:5] == ["merged", "attention", "experts", "mlp", "vocabulary"]


def test_what_rounding_eats_is_told(tmp_path, base, capsys):
    """A change far below a bf16 weight's last digit is lost, and the report says so."""
    (tmp_path / "low").mkdir()
    low = write_base(tmp_path / "low", torch.bfloat16)
    write_adapters(low, tmp_path / "trained", {(QKV, (0,)): [0]}, ENTRIES, size=1e-4)
    assert merged(tmp_path / "trained", tmp_path / "out") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")]
    _, matrices, largest, rms, lost = row.split()
    assert (matrices, float(lost) > 0.95, float(rms) > 0.9) == ("1", True, True)
    assert float(largest) >= 1.0


def test_rounding_counts_by_hand():
    weight = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.bfloat16)
    product = Product(torch.tensor([[2.0**-9, 2.0**-6, 0.0]]), torch.ones(1, 1), 0.5)
    rounding = Rounding(matrices=1)
    merge(weight, [product], rounding)
    assert weight.tolist() == [[1.0, 1.0 + 2.0**-7, 0.0]]
    assert (rounding.values, rounding.lost) == (2, 1)
    assert (rounding.error, rounding.change) == (2.0**-10, 2.0**-7)
    assert math.isclose(rounding.rms, 2.0**-10 / math.hypot(2.0**-10, 2.0**-7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_once(dtype):
    """Against fractions; a double rounding differs just above the middle of two values."""
    generator = torch.Generator().manual_seed(1)
    ulp = torch.finfo(dtype).eps
    near = 1 + ulp * (torch.arange(64, dtype=torch.float64) + 0.5)
    tiny = 2.0**-40 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    random = torch.randn(200, dtype=torch.float64, generator=generator)
    values = torch.cat([(near[:, None] + tiny).flatten(), random])
    values = torch.cat([values, -values])
    step = rounded(values, dtype).double()
    for value, new in zip(values.tolist(), step.tolist(), strict=True):
        scale = Fraction(2) ** (math.frexp(value)[1] - 1) * Fraction(ulp)
        whole_steps = Fraction(value) / scale
        assert Fraction(new) / scale == round(whole_steps), value
    assert dtype == torch.float32 or not torch.equal(values.to(dtype).double(), step)


def refused(capsys, trained, output, *parts):
    capsys.readouterr()  # what Megatron says when it is first imported
    assert merged(trained, output) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in ("--trained", *parts)), message
    assert not output.exists()


def test_nothing_to_merge_is_an_error(base, tmp_path, capsys):
    refused(capsys, base, tmp_path / "out", "holds neither adapters nor vocabulary rows")


@pytest.mark.parametrize(
    ("described", "parts"),
    [
        ({"version": 2}, ("in version 2 of inject_adapters, this reads 1",)),
        ({"entries": ENTRIES[:1]}, ("inject_adapters has no entry 1",)),
        ({"entries": [entry(2, 8.0)] * 2}, ("where rank 2 of a matrix [", "asks for [2, 6]")),
        ({"entries": [{"rank": 2}]}, ("has an inject_adapters that cannot be", "targets: missing")),
        ({"entries": [*ENTRIES, entry(5, 5.0)]}, ("holds no adapter of entry 2 of",)),
        ({"vocabulary_rows": None}, ("inject_adapters has 0 ids",)),
        ({"vocabulary_rows": {"ids": [3, 0, 16]}}, ("where inject_adapters has 3 ids",)),
        ({"vocabulary_rows": {"ids": [3, 3, 1]}}, ("where inject_adapters has 3 ids",)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(base, tmp_path, capsys, described, parts):
    trained = tmp_path / "trained"
    write_adapters(base, trained, SITES, ENTRIES, ids=IDS, described=described)
    refused(capsys, trained, tmp_path / "out", *parts)


@pytest.mark.parametrize(
    ("added", "parts"),
    [
        ({f"{FC1[:-7]}.inject_adapter.a.0.0.3": (2, 6)}, "of decoder.layers.mlp.experts"),
        ({f"{FC1[:-7]}.inject_adapter.a.0.0": (2, 6)}, "whose numbers name no matrix"),
        ({f"{ALONE[:-7]}.inject_adapter.a.0.2": (2, 4)}, "whose numbers name no matrix"),
        ({"decoder.layers.nothing.inject_adapter.a.0.0": (2, 4)}, "which it has not"),
        ({f"{QKV[:-7]}.inject_adapter.b.0.0": (10, 2)}, "without the other factor"),
        (
            {f"{NORM[:-7]}.inject_adapter.{factor}.0": (2, 6) for factor in "ab"},
            "which is no matrix",
        ),
    ],
)
def test_tensors_that_name_no_adapter_are_refused(base, tmp_path, capsys, added, parts):
    before = opened(base)
    write_adapters(base, tmp_path / "one", {(QKV, (1,)): [0]}, ENTRIES)
    common = opened(tmp_path / "one").common
    with CheckpointWriter(tmp_path / "trained" / "release") as writer:
        for name, stored in before.tensors.items():
            writer.tensor([name], stored.size, (), whole(before, name))
        for name, shape in added.items():
            writer.tensor([name], shape, (), torch.zeros(shape))
        writer.finish(common)
    (tmp_path / "trained" / TRACKER).write_text("release")
    refused(capsys, tmp_path / "trained", tmp_path / "out", parts)


def test_rows_that_are_told_and_not_there_are_refused(base, tmp_path, capsys):
    rows = {"vocabulary_rows": {"ids": [1]}}
    write_adapters(base, tmp_path / "trained", SITES, ENTRIES, described=rows)
    refused(capsys, tmp_path / "trained", tmp_path / "out", "holds no vocabulary rows, of which")


def test_values_that_are_not_finite_are_refused(base, tmp_path, capsys):
    write_adapters(base, tmp_path / "trained", SITES, ENTRIES, size=float("inf"))
    refused(capsys, tmp_path / "trained", tmp_path / "out", "are not all finite")


def test_the_output_is_never_written_over(base, tmp_path, capsys):
    write_adapters(base, tmp_path / "trained", SITES, ENTRIES)
    (tmp_path / "out").mkdir()
    assert merged(tmp_path / "trained", tmp_path / "out") == 2
    assert "is there already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
