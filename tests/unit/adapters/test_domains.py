"""Adapters of two domains on the same matrices: each taken out alone, or both merged by weights."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.low_rank import rounded
from megatron_moe_inject.host.stored_adapters import ARGUMENT
from megatron_moe_inject.host.torch_dist_copy import saved_copy
from tests.harness.checkpoints import whole
from tests.harness.stored_adapters import entry, factor_name, opened, write_adapters
from tests.harness.tiny_folders import save_folder

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
ENTRIES = [
    {**entry(2, 8.0), "domain": "code"},
    entry(4, 4.0, "rslora"),
    {**entry(2, 8.0), "domain": "html"},
]
SITES = {(FC1, (0, 1)): [0, 2], (FC1, (1, 0)): [2], (FC2, (1, 3)): [0], (QKV, (1,)): [1]}
WEIGHTS = ("--weights", "code=0.7", "html=-0.25")
MERGED = {("--domain", "code"): (1, 0), ("--domain", "html"): (0, 1), WEIGHTS: (0.7, -0.25)}


def command(name, *words, **paths):
    more = [word for key, value in paths.items() for word in (f"--{key}", str(value))]
    return main([name, *map(str, words), *more])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder, its import, that with the adapters, and with those of code for all tokens."""
    root = tmp_path_factory.mktemp("domains")
    save_folder("qwen3_moe", root / "hf")
    assert command("import-hf", root / "hf", output=root / "base") == 0
    write_adapters(root / "base", root / "both", SITES, ENTRIES)
    described = {
        **vars(opened(root / "both").args)[ARGUMENT],
        "entries": [entry(2, 8.0), entry(4, 4.0, "rslora")],
    }

    def alone(common):
        return {**common, "args": Namespace(**{**vars(common["args"]), ARGUMENT: described})}

    (root / "code").mkdir()
    saved_copy(
        opened(root / "both"), root / "code", {}, lambda items, total: items,
        left_out=lambda name: any(f"inject_adapter.{factor}.2" in name for factor in "ab"),
        common=alone,
    )  # fmt: skip
    assert command("export-delta", base=root / "base", trained=root / "both",
                   output=root / "delta") == 0  # fmt: skip
    return root


def assert_same(one, other):
    one, other = opened(one), opened(other)
    assert set(one.tensors) == set(other.tensors)
    for name in one.tensors:
        assert torch.equal(whole(one, name), whole(other, name)), name


def test_merged_by_one_domain_it_is_that_domains_model(folders, tmp_path):
    paths = {"trained": folders / "both", "output": tmp_path / "chosen"}
    assert command("merge-adapters", "--domain", "code", **paths) == 0
    paths = {"trained": folders / "code", "output": tmp_path / "alone"}
    assert command("merge-adapters", **paths) == 0
    assert_same(tmp_path / "chosen", tmp_path / "alone")


@pytest.mark.parametrize("words", MERGED, ids=" ".join)
def test_changes_are_added_by_their_weights(folders, tmp_path, words):
    """W + s (w_1 B_1 A_1 + w_2 B_2 A_2), rounded once; of a checkpoint and of a delta."""
    paths = {"trained": folders / "both", "output": tmp_path / "merged"}
    assert command("merge-adapters", *words, **paths) == 0
    both, merged = opened(folders / "both"), opened(tmp_path / "merged")
    code, html = MERGED[words]
    for name in {site[0] for site in SITES}:
        value = whole(both, name).double()
        for site, numbers in SITES.items():
            for number in numbers if site[0] == name else ():
                a, b = (whole(both, factor_name(site, f, number)).double() for f in "ab")
                value[site[1]] += (code, 1, html)[number] * ENTRIES[number]["scale"] * (b @ a)
        torch.testing.assert_close(
            whole(merged, name), rounded(value, torch.float32), rtol=1e-7, atol=1e-9
        )
    paths = {"base": folders / "base", "delta": folders / "delta", "output": tmp_path / "applied"}
    assert command("apply-delta", *words, **paths) == 0
    assert_same(tmp_path / "applied", tmp_path / "merged")


def test_a_delta_as_a_folder_is_what_merging_gives(folders, tmp_path):
    paths = {"delta": folders / "delta", "hf": folders / "hf", "output": tmp_path / "delta"}
    assert command("export-hf", *WEIGHTS, **paths) == 0
    paths = {"trained": folders / "both", "output": tmp_path / "merged"}
    assert command("merge-adapters", *WEIGHTS, **paths) == 0
    paths = {"hf": folders / "hf", "output": tmp_path / "out"}
    assert command("export-hf", tmp_path / "merged", **paths) == 0
    for one in (tmp_path / "out").iterdir():
        assert one.read_bytes() == (tmp_path / "delta" / one.name).read_bytes(), one.name


@pytest.mark.parametrize("consumer", ["peft", "vllm", "sglang"])
def test_each_domain_is_a_set_of_its_own(folders, tmp_path, consumer):
    words = ("--hf", folders / "hf", "--format", consumer)
    both = ("export-adapters", folders / "both", *words)
    assert command(*both, "--domain", "code", output=tmp_path / "chosen") == 0
    alone = ("export-adapters", folders / "code", *words)
    assert command(*alone, output=tmp_path / "alone") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert command("check-adapters", tmp_path / "chosen", hf=folders / "hf") == 0
    assert command(*both, "--domain", "html", output=tmp_path / "other") == 0
    code, html = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("chosen", "other")
    )
    assert code.keys() != html.keys() or any(not torch.equal(code[k], html[k]) for k in code)


WRONG = {
    "nothing chosen": ("merge-adapters", (), "holds adapters of each domain apart (code, html); "
                       "choose one of them, such as --domain code, or weigh them: --weights "
                       "code=0.5 html=0.5"),
    "nothing chosen of a delta": ("apply-delta", (), "holds adapters of each domain apart"),
    "nothing chosen as a folder": ("export-hf", (), "holds adapters of each domain apart"),
    "nothing chosen to export": ("export-adapters", (), "such as --domain code\n"),
    "an unknown domain": ("merge-adapters", ("--domain", "hmtl"), "the domain 'hmtl'; did you mean "
                          "html?"),
    "an unknown domain of a delta": ("apply-delta", ("--weights", "js=1"), "the domain 'js'"),
    "none by domain": ("alone", ("--domain", "code"), "holds no adapters of single domains"),
    "no weight": ("merge-adapters", ("--weights", "code"), "--weights: 'code' is no domain with"),
    "a weight of zero": ("apply-delta", ("--weights", "code=0"), "'code=0' is no domain with"),
    "twice": ("merge-adapters", ("--weights", "code=1", "code=2"), "names a domain twice"),
    "a checkpoint as a folder": ("folder", ("--domain", "code"), "among the adapters of a delta"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "words", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line(folders, tmp_path, capsys, name, words, message):
    output, delta, hf = tmp_path / "out", folders / "delta", folders / "hf"
    line = {
        "merge-adapters": ("merge-adapters", "--trained", folders / "both"),
        "alone": ("merge-adapters", "--trained", folders / "code"),
        "apply-delta": ("apply-delta", "--base", folders / "base", "--delta", delta),
        "export-hf": ("export-hf", "--delta", delta, "--hf", hf),
        "folder": ("export-hf", folders / "base", "--hf", hf),
        "export-adapters": ("export-adapters", folders / "both", "--hf", hf),
    }[name]
    capsys.readouterr()
    assert command(*line, *words, output=output) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told, told
    assert not output.exists()
